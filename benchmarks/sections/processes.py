"""What takes processes of its own: their start, their loads, their memory."""

import statistics
import tempfile
from collections.abc import Iterator

from benchmarks import machine
from benchmarks.figures import Result, interleave, ratio
from benchmarks.machine import Worker
from benchmarks.setting import Setting


def start(setting: Setting, threads: int | None) -> Iterator[Result]:
    """Load, first tokens and peak memory of two fresh processes, the first of them uncached."""
    assert setting.path
    with tempfile.TemporaryDirectory(prefix="grok1-benchmark-cache-") as cache:
        # Everything that grok1 keeps between processes is below this directory; a cache of
        # JAX's own, wherever the user has one, would hide what there is to compile.
        environment = {"XDG_CACHE_HOME": cache, "JAX_COMPILATION_CACHE_DIR": None}
        found = []
        for which in ("first", "second"):
            setting.tell(f"{which} process")
            with Worker(threads, environment) as worker:
                kernels = worker.call("build_kernels")
                load = worker.call("load", path=str(setting.path))
                tokens = worker.call("first_tokens")
                found.append((kernels, load, tokens, worker.call("peak_memory")))
    (built, load, first, peak), (_, _, second, _) = found

    def result(measurement, value, unit, **more):
        return Result(setting.model.name, measurement, value, unit, threads, **more)

    size = load["file_bytes"]
    yield result("load", load["seconds"], "s", details={"file_bytes": size})
    if built["available"]:
        yield result("build of the kernels", built["seconds"], "s")
    # A difference of two times: where nothing was compiled it can come out below zero.
    compiles = [max(0, tokens["cold"] - tokens["compiled"]) for tokens in (first, second)]
    yield result("compile, first process", compiles[0], "s")
    of_first = {"first process": compiles[1] / compiles[0]} if compiles[0] else {}
    yield result("compile, second process", compiles[1], "s", ratios=of_first)
    prompt = {"prompt": first["prompt"], "of_a_first_call": first["cold"]}
    yield result("time to first token", first["warm"], "s", details=prompt)
    yield result("peak memory", peak / 1e9, "GB", ratios={"files": peak / size})


def load(setting: Setting, threads: int | None) -> Iterator[Result]:
    """Loads by fresh processes, of files that are not in memory, beside plain reads of them."""
    assert setting.path
    files = setting.path / "ckpt-0"
    shares = []

    def one_load():
        with Worker(threads) as worker:
            worker.call("describe")  # it has started
            machine.forget_files(files)
            machine.use_memory(files)
            found = worker.call("load", path=str(setting.path))
            shares.append(worker.call("peak_memory") / found["kept_bytes"])
        return found["file_bytes"] / found["seconds"]

    contestants = {"disk": lambda: machine.read_rate(files), "grok1": one_load}
    rounds = interleave(contestants, setting.effort.repeats, setting.tell)
    rounds = {name: [rate / 1e9 for rate in rates] for name, rates in rounds.items()}
    yield Result(
        setting.model.name,
        "load, files not in memory",
        statistics.median(rounds["grok1"]),
        "GB/s",
        threads,
        {"disk": ratio(rounds, "grok1", "disk")},
        rounds,
        {"peak_memory_over_kept": shares},
    )


def context(setting: Setting, threads: int | None) -> Iterator[Result]:
    """A prompt that fills the context, in a process of its own for the sake of its memory."""
    with setting.worker(threads) as worker:
        setting.tell("a prompt that fills the context")
        found = worker.call("full_context")
    details = {"prompt": found["prompt"], "seconds": found["seconds"]}
    yield Result(
        setting.model.name,
        "full context, memory beside weights and cache",
        found["bytes"] / 1e9,
        "GB",
        threads,
        details=details,
    )
