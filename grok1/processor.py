"""The processor that this process runs on: its instructions, and how much of it there is to use."""

import os
import platform


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
