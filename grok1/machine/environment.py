"""What is set by variables of the environment, each of which has few values that mean something.

GROK1_NATIVE=0 turns off the kernels in C++ and CUDA, reading files in C++, and copies by CUDA's
driver. GROK1_COMPILATION_CACHE=0 keeps no programs for later processes. GROK1_CUDA_GRAPHS=0 records
no steps as CUDA graphs. GROK1_NUM_THREADS is the number of threads of a kernel.
"""

import os
import sys

SWITCHES = ("GROK1_NATIVE", "GROK1_COMPILATION_CACHE", "GROK1_CUDA_GRAPHS")
_NUM_THREADS = "GROK1_NUM_THREADS"
_MOST_THREADS = 4096


def is_on(name: str) -> bool:
    """Whether one of `SWITCHES` is on, as all are that nobody has set.

    Raises:
      ValueError: If it is neither 0 nor 1.
    """
    setting = os.environ.get(name, "")
    if setting not in ("", "0", "1"):
        raise ValueError(f"{name} must be 0 or 1, found {setting!r}; set one of them or unset it")
    return setting != "0"


def num_threads() -> int | None:
    """Returns how many threads a kernel may have; None if nobody has said.

    Raises:
      ValueError: If it is no such number.
    """
    setting = os.environ.get(_NUM_THREADS, "")
    if not setting:
        return None
    is_short = len(setting) <= len(str(_MOST_THREADS))
    number = int(setting) if is_short and setting.isascii() and setting.isdecimal() else 0
    if 1 <= number <= _MOST_THREADS:
        return number
    raise ValueError(
        f"{_NUM_THREADS} must be a whole number from 1 to {_MOST_THREADS}, found {setting!r:.80}; "
        "unset it for the cores that this process may run on"
    )


def check() -> None:
    """Checks all of them.

    Raises:
      ValueError: If one has a value that means nothing.
    """
    num_threads()
    for name in SWITCHES:
        is_on(name)


def of_child(**variables: str) -> dict[str, str]:
    """Returns the environment of a process that this one starts, with these variables set.

    It finds this package where this process has found it.
    """
    path = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "PYTHONPATH": path, **variables}
