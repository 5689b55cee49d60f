"""The command line: `python -m benchmarks`, or `python -m benchmarks --help`."""

import argparse
import contextlib
import dataclasses
import datetime
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence

from benchmarks import models, report
from benchmarks.figures import Failure, Result
from benchmarks.machine import ROOT, BenchmarkError, Worker
from benchmarks.peers import LlamaCpp
from benchmarks.setting import FULL, QUICK
from benchmarks.suite import ACCELERATOR_SECTIONS, CPU_SECTIONS, SECTIONS, Suite
from grok1 import GROK_1
from grok1.machine.processor import available_cores


def numbers(text: str) -> list[int]:
    """Reads "2,1"."""
    return [int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """Reads "toy,bench"."""
    return text.split(",")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or these arguments instead."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure grok1 on this machine, against what the machine can do, against the "
        "dense form of the released code, and against llama.cpp.",
    )
    parser.add_argument(
        "--model",
        type=names,
        help=f"some of {','.join(models.NAMES)}; default: toy,bench on a CPU, else grok1-layers",
    )
    parser.add_argument(
        "--layers", type=int, help="layers of grok1-layers; default: 1 on a CPU, else 8"
    )
    parser.add_argument(
        "--only", type=names, metavar="SECTIONS", help=f"some of {','.join(SECTIONS)}"
    )
    parser.add_argument(
        "--threads",
        type=numbers,
        help="CPU threads, as 2,1: decoding one row is also measured with those after the first; "
        "default: all, and with --gguf one",
    )
    parser.add_argument("--repeats", type=int, help=f"rounds; default: {FULL.repeats}")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few tokens, one round: a smoke test of some minutes, whose ratios mean little",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="what a GPU has to show, in six minutes: exactness of every kernel and of the golden "
        "checkpoint, then decode, prefill, long context, load and offload; kept line by line",
    )
    parser.add_argument(
        "--probe",
        type=pathlib.Path,
        help="with --check: a shared library of the simplest CUDA kernels, see gpu_probe",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    parser.add_argument("--gguf", type=pathlib.Path, help="the model as a file of llama.cpp")
    parser.add_argument(
        "--llama-cpp", type=pathlib.Path, help="directory of llama-bench; default: the PATH"
    )
    parser.add_argument(
        "--scratch", type=pathlib.Path, help="keep the models' files here, and use those found"
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        help="directory of the JSON file; default: benchmarks/results, and nowhere with --quick",
    )
    return parser.parse_args(arguments)


def plan(arguments: argparse.Namespace, device: dict) -> list[models.BenchModel]:
    """Fills in the defaults of this device, and checks what can be checked before measuring."""
    on_cpu = device["platform"] == "cpu"
    arguments.model = arguments.model or (["toy", "bench"] if on_cpu else ["grok1-layers"])
    if arguments.layers is None:
        arguments.layers = 1 if on_cpu else 8
    if not 0 < arguments.layers <= GROK_1.num_layers:
        raise BenchmarkError(
            f"--layers must be 1 to {GROK_1.num_layers}, as Grok-1 has, found {arguments.layers}"
        )
    if arguments.repeats is not None and arguments.repeats < 1:
        raise BenchmarkError(f"--repeats must be above 0, found {arguments.repeats}")
    if arguments.only is None:
        arguments.only = CPU_SECTIONS if on_cpu else ACCELERATOR_SECTIONS
        if arguments.quick:  # without what takes minutes, without kernels the draws alone too
            long = ("context", "sampler")
            arguments.only = [section for section in arguments.only if section not in long]
    for section in arguments.only:
        if section not in SECTIONS:
            raise BenchmarkError(
                f"there is nothing called {section!r} to measure; choose from {', '.join(SECTIONS)}"
            )
    if not on_cpu:
        for option in ("threads", "gguf"):
            if getattr(arguments, option) is not None:
                raise BenchmarkError(f"--{option} is for CPUs, and this is {device['name']}")
    elif arguments.threads is None:
        most = available_cores()
        arguments.threads = [most, 1] if arguments.gguf and most > 1 else [most]
    for threads in arguments.threads or []:
        if not 0 < threads <= available_cores():
            raise BenchmarkError(
                f"--threads {threads}: this process may use 1 to {available_cores()} CPUs"
            )
    if arguments.probe:
        raise BenchmarkError("--probe is measured by --check; give both")
    if arguments.llama_cpp and not arguments.gguf:
        raise BenchmarkError("--llama-cpp needs the model as a file too; give --gguf")
    chosen = [models.model_named(name, arguments.layers) for name in arguments.model]
    for model in chosen:
        models.check_memory(model, device, arguments.only)
    return chosen


@contextlib.contextmanager
def directory_for_models(scratch: pathlib.Path | None) -> Iterator[pathlib.Path]:
    """The directory to keep, or one that is removed at the end."""
    if scratch is None:
        with tempfile.TemporaryDirectory(prefix="grok1-benchmark-") as directory:
            yield pathlib.Path(directory)
        return
    try:
        scratch.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchmarkError(f"--scratch {scratch}: {error.strerror}") from None
    yield scratch.absolute()


def cost(
    chosen: Sequence[models.BenchModel],
    arguments: argparse.Namespace,
    on_cpu: bool,
    directory: pathlib.Path,
) -> str:
    """Says beforehand what a run takes."""
    needed = {model: model.needed_bytes(arguments.only) for model in chosen}
    disk = max((needed[model] for model in chosen if model.bundled is None), default=0)
    memory = max(needed.values())
    parts = [f"{1.3 * memory / 1e9:.2g} GB of memory"]
    if disk and (on_cpu or Suite.needs_files(arguments.only)):
        parts.append(f"{disk / 1e9:.2g} GB of disk in {directory}")
    if on_cpu and set(arguments.model) == {"toy", "bench"}:
        parts.insert(0, "about 4 minutes" if arguments.quick else "about half an hour")
    return f"{', '.join(model.name for model in chosen)}: this takes {', '.join(parts)}"


def say(text: str) -> None:
    """Tells on stderr what is going on."""
    print(f"benchmarks: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Measures, prints the table or the JSON, and writes the file."""
    arguments = parse_arguments()
    if arguments.check:
        # Not before: it starts JAX in this process, which the measurements leave to others.
        from benchmarks import gpu_check

        if arguments.probe and not arguments.probe.is_file():
            raise BenchmarkError(
                f"--probe {arguments.probe}: there is no such file; give the shared library that "
                "nvcc makes of the probe"
            )
        output = arguments.output or ROOT / "benchmarks" / "results"
        figures = gpu_check.run(output, probe=arguments.probe)
        if not all(figure.holds for figure in figures):
            raise BenchmarkError("not everything holds; the lines that say NO name what does not")
        return
    with Worker() as worker:
        device = worker.call("describe")
    chosen = plan(arguments, device)
    on_cpu = device["platform"] == "cpu"
    llama_cpp = LlamaCpp(arguments.llama_cpp, arguments.gguf) if arguments.gguf else None
    if llama_cpp:
        device["versions"]["llama.cpp"] = llama_cpp.version
        if not any(llama_cpp.is_model_of(model.num_parameters) for model in chosen):
            sizes = ", ".join(f"{m.name} has {m.num_parameters:,}" for m in chosen)
            raise BenchmarkError(
                f"{arguments.gguf} has {llama_cpp.num_parameters:,} parameters, of another model: "
                f"{sizes}"
            )
    effort = QUICK if arguments.quick else FULL
    if arguments.repeats is not None:
        effort = dataclasses.replace(effort, repeats=arguments.repeats)
    output = arguments.output or (None if arguments.quick else ROOT / "benchmarks" / "results")
    results: list[Result] = []
    failures: list[Failure] = []
    written: pathlib.Path | None = None

    def found():
        date = datetime.date.today().isoformat()
        how = {
            "model": arguments.model,
            "layers": arguments.layers,
            "only": list(arguments.only),
            "threads": arguments.threads,
            "repeats": effort.repeats,
            "quick": arguments.quick,
        }
        return report.document(device, date, how, results, failures)

    with directory_for_models(arguments.scratch) as directory:
        say(cost(chosen, arguments, on_cpu, directory))
        for model in chosen:
            path = None
            if on_cpu or Suite.needs_files(arguments.only):
                say(f"{model.name}: files ({model.num_bytes / 1e9:.2g} GB)")
                path = models.checkpoint(model, directory)
            peer = llama_cpp
            if peer and not peer.is_model_of(model.num_parameters):
                peer = None
            suite = Suite(
                model, path, arguments.only, effort, arguments.threads, peer, say, directory
            )
            for result in suite.run():
                if isinstance(result, Failure):
                    say(f"{result.model}: {result.measurement}: failed: {result.reason}")
                    failures.append(result)
                    continue
                say(report.line(result))
                results.append(result)
                # After each, so that what comes to an end halfway was not for nothing.
                if output is not None:
                    written = report.write(found(), output)
    if written is not None:
        say(f"written to {written}")
    print(json.dumps(found()) if arguments.json else report.table(found()))
    if failures:
        names = ", ".join(f"{failure.model}: {failure.measurement}" for failure in failures)
        raise BenchmarkError(f"could not be measured: {names}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nbenchmarks: interrupted")
    except (BenchmarkError, ValueError, OSError) as error:
        sys.exit(f"benchmarks: {error}")
