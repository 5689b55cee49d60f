"""What is set by variables of the environment, each of which has few values that mean something.

GROK1_NATIVE=0 turns off the kernels in C++ and CUDA, reading files in C++, and copies by CUDA's
driver. GROK1_COMPILATION_CACHE=0 keeps no programs for later processes. GROK1_CUDA_GRAPHS=0 records
no steps as CUDA graphs, GROK1_CUDA_GRAPHS=unrolled the turns of their loops one after the other.
GROK1_NUM_THREADS is the number of threads of a kernel.
"""

import difflib
import os
import sys

CHOICES = {
    "GROK1_NATIVE": ("0", "1"),
    "GROK1_COMPILATION_CACHE": ("0", "1"),
    "GROK1_CUDA_GRAPHS": ("0", "1", "unrolled"),
}
"""Values of variables that have few; one that nobody has set is 1."""

_NUM_THREADS = "GROK1_NUM_THREADS"
_MOST_THREADS = 4096
_PREFIX = "GROK1_"
_OF_TESTS = ("GROK1_SLOW_TESTS", "GROK1_TEST_PLATFORM")


def unknown() -> list[str]:
    """Returns a sentence about each variable that is named as one of ours and is none."""
    names = (*CHOICES, _NUM_THREADS)
    found = []
    for name in sorted(os.environ):
        if not name.upper().startswith(_PREFIX) or name in (*names, *_OF_TESTS):
            continue
        near = difflib.get_close_matches(name.upper(), names, n=1, cutoff=0.75)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        found.append(f"the variable {name!r:.80} of the environment is not known; {meant}")
    return found


def choice(name: str) -> str:
    """Returns the value of one of `CHOICES`.

    Raises:
      ValueError: If it is none of those that mean something.
    """
    setting = os.environ.get(name) or "1"
    *others, last = CHOICES[name]
    if setting not in CHOICES[name]:
        raise ValueError(
            f"{name} must be {', '.join(others)} or {last}, found {setting!r:.80}; set one of them "
            "or unset it"
        )
    return setting


def is_on(name: str) -> bool:
    """Whether one of `CHOICES` is on, in whichever way.

    Raises:
      ValueError: If it has a value that means nothing.
    """
    return choice(name) != "0"


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
    for name in CHOICES:
        choice(name)


def of_child(**variables: str) -> dict[str, str]:
    """Returns the environment of a process that this one starts, with these variables set.

    It finds this package where this process has found it.
    """
    path = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "PYTHONPATH": path, **variables}
