"""The processor that this process runs on: its instructions, its cores, and who may have one."""

import contextlib
import os
import pathlib
import platform
from collections.abc import Iterator

from grok1.machine import control_groups


def instructions() -> str:
    """Returns what distinguishes processors that run different instructions.

    A home directory can be shared by several computers, so the names of files depend on it.
    """
    lines = {platform.machine(), platform.processor()}
    try:
        with open("/proc/cpuinfo") as file:
            lines |= {line for line in file if line.lower().startswith(("flags", "features"))}
    except OSError:
        pass
    return "\n".join(sorted(lines))


def schedulable_cores() -> int:
    """Returns how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_cores(
    root: pathlib.Path = control_groups.ROOT, own: pathlib.Path = control_groups.OWN
) -> int:
    """Returns how many cores this process may use all the time.

    A container may run on every core of its host and have the time of two: threads for all would be
    stopped together, for most of every tenth of a second, while they wait for each other.

    Args:
      root: Where control groups are mounted.
      own: What says which one is this process's.
    """
    cores = schedulable_cores()
    for version, directory in control_groups.directories("cpu", root, own):
        try:
            quota, period = _quota(directory, version)
        except (OSError, ValueError):
            continue
        # Without a limit the first is -1, or the word "max".
        if quota > 0 and period > 0:
            cores = min(cores, max(1, quota // period))
    return cores


def _quota(directory: pathlib.Path, version: int) -> tuple[int, int]:
    """Microseconds of a core that a group has in a period, and those of the period."""
    if version == 2:
        quota, period = (directory / "cpu.max").read_text().split()
        return int(quota), int(period)
    names = "cpu.cfs_quota_us", "cpu.cfs_period_us"
    quota, period = (int((directory / name).read_text()) for name in names)
    return quota, period


@contextlib.contextmanager
def waiting_politely() -> Iterator[None]:
    """Inside, this thread does not take the core of one that computes when its wait is over.

    The system prefers a thread that wakes up, and puts it where the one runs that woke it: after
    each step of a model, where the computing thread would go on with the next. Linux alone.
    """
    before = _policy()
    # A policy that someone has chosen stays.
    if before is None or before != os.SCHED_OTHER:
        yield
        return
    _set_policy(os.SCHED_BATCH)
    try:
        yield
    finally:
        _set_policy(before)


def _policy() -> int | None:
    """This thread's scheduling policy; None where there is none, or a sandbox does not say."""
    if not hasattr(os, "SCHED_BATCH"):
        return None
    try:
        return os.sched_getscheduler(0)
    except OSError:
        return None


def _set_policy(policy: int) -> None:
    with contextlib.suppress(OSError):  # a sandbox may forbid it
        os.sched_setscheduler(0, policy, os.sched_param(0))
