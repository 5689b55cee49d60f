"""Tools for checkpoints: `python -m grok1 --help`."""

import argparse
import json
import os
import pathlib
import sys

import jax

from grok1 import comparison
from grok1.care import conversion, gguf_file, inspection, verification
from grok1.checkpoint.directory import load_config
from grok1.config import GROK_1
from grok1.planning import planning

_BROKEN_PIPE = 128 + 13  # what a shell reports of a program that SIGPIPE ends


def _verify(arguments: argparse.Namespace) -> int:
    report = verification.verify(
        arguments.directory, deep=arguments.deep, sums_file=arguments.manifest
    )
    print("\n".join(report.lines()))
    return 0 if report.is_good else 1


def _inspect(arguments: argparse.Namespace) -> int:
    report = inspection.inspect(arguments.directory, layer=arguments.layer, full=arguments.full)
    print(json.dumps(report.to_dict()) if arguments.json else "\n".join(report.lines()))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    notes = conversion.convert(
        arguments.source,
        arguments.target,
        to=arguments.to,
        dtype=arguments.dtype,
        embedding=arguments.emb,
    )
    print("\n".join([f"{arguments.target}: written and read back", *notes]))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    text = arguments.prompt
    if arguments.text is not None:
        text = arguments.text.read_text(encoding="utf-8")
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
    )
    print(json.dumps(found.to_dict()) if arguments.json else "\n".join(found.lines()))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    config = GROK_1
    if arguments.directory is not None:
        if not arguments.directory.is_dir():
            raise ValueError(f"{arguments.directory}: there is no such directory")
        config = load_config(arguments.directory)
    names = ("devices", "memory", "device", "mesh", "batch", "context", "dtype", "cache_dtype",
             "bandwidth", "disk", "layers", "embedding_dtype")  # fmt: skip
    found = planning.plan(
        config,
        **{name: getattr(arguments, name) for name in names},
        checkpoint=arguments.directory,
    )
    print(json.dumps(found.to_dict()) if arguments.json else "\n".join(found.lines()))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m grok1", description="Tools for checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, text):
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    verify = command("verify", _verify, "Check every file of a checkpoint and list what is wrong.")
    verify.add_argument("directory", type=pathlib.Path, help="directory that holds ckpt-0/")
    verify.add_argument("--deep", action="store_true", help="read the weights too; SHA-256 of each")
    verify.add_argument(
        "--manifest",
        type=pathlib.Path,
        metavar="FILE",
        help="checksums as sha256sum writes them; default: SHA256SUMS in the directory",
    )

    inspect = command("inspect", _inspect, "Show the tensors of a checkpoint and their statistics.")
    inspect.add_argument("directory", type=pathlib.Path, help="directory that holds ckpt-0/")
    inspect.add_argument("--layer", type=int, metavar="N", help="only this layer")
    inspect.add_argument("--full", action="store_true", help="statistics of all rows, not a sample")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")

    convert = command("convert", _convert, "Write a checkpoint in another format.")
    convert.add_argument("source", type=pathlib.Path, help="directory that holds the checkpoint")
    convert.add_argument("target", type=pathlib.Path, help="new directory; for gguf a new file")
    convert.add_argument("--to", choices=conversion.FORMATS, required=True)
    convert.add_argument(
        "--dtype", choices=["int8", "bfloat16"], help="of the weights; default: as in the source"
    )
    convert.add_argument(
        "--emb", choices=gguf_file.EMBEDDING_TYPES, help="of the embedding in gguf; default: f32"
    )

    compare = command(
        "compare", _compare, "Say how far two models, or saved logits, are apart over a text."
    )
    for side in "ab":
        compare.add_argument(
            side,
            type=pathlib.Path,
            metavar=side.upper(),
            help="a model's directory, or logits [T, V] in .npz (with tokens) or .npy",
        )
    source = compare.add_mutually_exclusive_group()
    source.add_argument("--text", type=pathlib.Path, metavar="FILE", help="the text, in UTF-8")
    source.add_argument("--prompt", metavar="TEXT", help="the text itself")
    for side in "ab":
        which = f"of {side.upper()}"
        compare.add_argument(f"--dtype-{side}", choices=["float32", "bfloat16"], help=which)
        compare.add_argument(f"--mesh-{side}", help=f"{which}, as 1x8; default: all")
        compare.add_argument(
            f"--cache-dtype-{side}", choices=["float32", "float16", "int8"], help=which
        )
        compare.add_argument(
            f"--router-softcap-{side}",
            type=float,
            metavar="CAP",
            help=f"cap the router's logits {which}; default: as its configuration says",
        )
        compare.add_argument(
            f"--renormalize-gates-{side}",
            action=argparse.BooleanOptionalAction,
            help=f"divide expert weights {which} by their sum; default: likewise",
        )
    compare.add_argument("--top-k", type=int, default=5, metavar="K", help="default: 5")
    compare.add_argument(
        "--save-logits", type=pathlib.Path, metavar="FILE", help="write A's to a .npz, for later"
    )
    compare.add_argument("--json", action="store_true", help="print one JSON object")

    plan = command(
        "plan", _plan, "Say whether and how a model fits some devices, and how fast it can be."
    )
    plan.add_argument(
        "directory", type=pathlib.Path, nargs="?", help="a model's, for its sizes; default: Grok-1"
    )
    plan.add_argument("--devices", type=int, metavar="N", help="default: those present")
    plan.add_argument("--memory", type=float, metavar="GB", help="of each; of a CPU, all of it")
    plan.add_argument("--device", choices=[*planning.DEVICE_KINDS, "cpu"], help="what they are")
    plan.add_argument("--mesh", help="DATAxMODEL devices, as 1x8; default: all")
    plan.add_argument("--batch", type=int, default=1, help="prompts side by side; default: 1")
    plan.add_argument("--context", type=int, metavar="TOKENS", help="default: the model's")
    plan.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: by device")
    plan.add_argument("--cache-dtype", choices=["float32", "float16", "int8"])
    plan.add_argument("--bandwidth", type=float, metavar="GB/s", help="of their memory")
    plan.add_argument(
        "--disk", type=float, metavar="GB/s", help="what it delivers; default: 2, or as measured"
    )
    plan.add_argument("--layers", type=int, metavar="N", help="only the first; default: all")
    plan.add_argument("--embedding-dtype", choices=["float32", "bfloat16"], default="float32")
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    parsed = _parser().parse_args(arguments)
    # The other commands run no model; an accelerator is left to who needs it.
    if parsed.run not in (_compare, _plan):
        jax.config.update("jax_platforms", "cpu")
    try:
        status = parsed.run(parsed)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Nobody reads on, as behind `| head`; Python would say so once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except KeyboardInterrupt:
        print("\ngrok1: interrupted; the same command starts or continues it", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"grok1: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
