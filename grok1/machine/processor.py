"""The processor that this process runs on: its instructions, its cores, and who may have one."""

import contextlib
import os
import platform
from collections.abc import Iterator


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


def available_cores() -> int:
    """Returns how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
