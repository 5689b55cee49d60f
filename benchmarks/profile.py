"""What a device does in a step, kernel by kernel, as JAX's profiler saw it."""

import collections
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax

Kernels = dict[str, tuple[int, float]]
"""For each kernel how often it ran and its seconds in all, the longest first."""

_MOST = 15  # kernels to name; the rest are one


def profile(work: Callable[[], Any]) -> Kernels:
    """Profiles a function that has run before.

    Args:
      work: What to run; returns arrays to wait for.

    Raises:
      ValueError: If the profiler saw nothing on an accelerator.
    """
    with tempfile.TemporaryDirectory(prefix="grok1-benchmark-profile-") as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(work())
        files = pathlib.Path(directory).rglob("*.xplane.pb")
        kernels = [
            (event.name, event.duration_ns / 1e9)
            for file in files
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes
            if plane.name.startswith("/device:")
            for line in plane.lines
            if _is_of_kernels(line.name)
            for event in line.events
        ]
    if not kernels:
        raise ValueError("the profiler saw no kernel; it does on GPUs and TPUs, not on CPUs")
    return summed(kernels)


def summed(kernels: list[tuple[str, float]]) -> Kernels:
    """Adds up the runs of each kernel, of (name, seconds) each; those after the longest are one."""
    times: dict[str, int] = collections.defaultdict(int)
    seconds: dict[str, float] = collections.defaultdict(float)
    for name, duration in kernels:
        times[name] += 1
        seconds[name] += duration
    longest = sorted(seconds, key=lambda name: seconds[name], reverse=True)
    found = {name: (times[name], seconds[name]) for name in longest[:_MOST]}
    if rest := longest[_MOST:]:
        found["others"] = sum(times[n] for n in rest), sum(seconds[n] for n in rest)
    return found


def _is_of_kernels(line: str) -> bool:
    # GPUs have a line a stream, beside lines that group the same kernels by module or by scope; of
    # a TPU's lines the operations are one.
    return line.startswith("Stream") or line == "XLA Ops"
