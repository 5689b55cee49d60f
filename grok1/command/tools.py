"""The commands about checkpoints: plan, verify, inspect, convert and compare."""

import argparse

import jax

from grok1 import comparison
from grok1.care import conversion, inspection, verification
from grok1.care.rounding import Calibrated
from grok1.checkpoint.directory import load_config
from grok1.command import streams
from grok1.config import GROK_1
from grok1.machine.startup import check_environment
from grok1.planning import planning


def run(arguments: argparse.Namespace) -> int:
    """Runs the command that `arguments` name and returns the exit status."""
    check_environment()
    # The others run no model; an accelerator is left to who needs it.
    if arguments.command not in ("compare", "plan"):
        jax.config.update("jax_platforms", "cpu")
    return _RUN[arguments.command](arguments)


def _verify(arguments: argparse.Namespace) -> int:
    report = verification.verify(
        arguments.directory, deep=arguments.deep, sums_file=arguments.manifest
    )
    print("\n".join(report.lines()))
    return 0 if report.is_good else 1


def _inspect(arguments: argparse.Namespace) -> int:
    report = inspection.inspect(arguments.directory, layer=arguments.layer, full=arguments.full)
    _show(report, arguments)
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    to = arguments.to
    if arguments.calibrate is not None:
        if to != "int4":
            raise ValueError(
                f"--calibrate is for --to int4, whose weights are rounded, not for {to}"
            )
        to = Calibrated(streams.read_text(arguments.calibrate))
    notes = conversion.convert(
        arguments.source,
        arguments.target,
        to=to,
        dtype=arguments.dtype,
        embedding=arguments.emb,
    )
    print("\n".join([f"{arguments.target}: written and read back", *notes]))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    text = arguments.prompt
    if arguments.text is not None:
        text = streams.read_text(arguments.text)
    loads = [
        {
            option: value
            for option in ("dtype", "mesh", "cache_dtype", "router_softcap", "renormalize_gates")
            if (value := getattr(arguments, f"{option}_{side}")) is not None
        }
        for side in "ab"
    ]
    found = comparison.compare(
        arguments.a,
        arguments.b,
        text,
        top_k=arguments.top_k,
        load_a=loads[0],
        load_b=loads[1],
        save_logits=arguments.save_logits,
        force_experts=arguments.force_experts,
    )
    _show(found, arguments)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    config = GROK_1
    if arguments.directory is not None:
        config = load_config(arguments.directory)
    names = ("devices", "memory", "device", "mesh", "batch", "context", "dtype", "cache_dtype",
             "bandwidth", "disk", "layers", "embedding_dtype", "weights")  # fmt: skip
    found = planning.plan(
        config,
        **{name: getattr(arguments, name) for name in names},
        checkpoint=arguments.directory,
    )
    _show(found, arguments)
    return 0


def _show(found: comparison.Comparison | inspection.Inspection | planning.Plan, arguments) -> None:
    if arguments.json:
        streams.print_json(found.to_dict())
    else:
        print("\n".join(found.lines()))


_RUN = {
    "plan": _plan,
    "verify": _verify,
    "inspect": _inspect,
    "convert": _convert,
    "compare": _compare,
}
