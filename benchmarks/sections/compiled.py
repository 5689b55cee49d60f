"""What the compiled steps are on a device."""

from collections.abc import Iterator

from benchmarks.figures import Result
from benchmarks.machine import Worker
from benchmarks.setting import Setting


def programs(setting: Setting, worker: Worker, threads: int | None) -> Iterator[Result]:
    """What the steps hold in memory, by XLA's account."""
    setting.tell("compiling for XLA's account of memory")
    reports = worker.call("programs", batches=list(setting.effort.prompts))
    for name, report in reports.items():
        yield Result(
            setting.model.name,
            f"temporaries of {name}",
            report["temporary_bytes"] / 1e9,
            "GB",
            threads,
            details=report,
        )


def profile(setting: Setting, worker: Worker, threads: int | None) -> Iterator[Result]:
    """Which kernels the device runs in a step, and for how long."""
    setting.tell("profiling")
    prefill = min(setting.effort.prefills[-1], setting.model.config.sequence_len - 2)
    profiles = worker.call("profiles", batches=list(setting.effort.prompts), prefill=prefill)
    for name, kernels in profiles.items():
        total = sum(seconds for _, seconds in kernels.values())
        details = {
            "kernels": {
                kernel: {"times": times, "seconds": seconds, "share": seconds / total}
                for kernel, (times, seconds) in kernels.items()
            }
        }
        yield Result(
            setting.model.name, f"device in {name}", 1e3 * total, "ms", threads, details=details
        )
