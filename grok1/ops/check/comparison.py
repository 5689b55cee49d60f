"""Compares every CUDA kernel with XLA's form of its operation, on the devices that are here.

`presence` runs it in a process of its own on the first use of a device. Each verdict is a line of
JSON, written as soon as it is known.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from grok1.machine.processor import available_cores
from grok1.ops.check.cases import cases
from grok1.ops.cuda import presence

TOLERANCE = 2e-3
"""Largest difference, relative to the largest number: between what rounds otherwise and a fault."""


class Comparison(NamedTuple):
    """A case that can be run.

    Attributes:
      name: Of the case.
      kernel: Gives the kernel's compiled program.
      form: Gives that of XLA's form.
      arguments: Of both.
    """

    name: str
    kernel: Callable[[], Any]
    form: Callable[[], Any]
    arguments: Any


def main() -> None:
    """Prints the verdicts, of one device of each kind."""
    devices = {device.device_kind: device for device in jax.local_devices()}.values()
    begun: dict[str, list] = {operation: [] for operation in presence.OPERATIONS}
    # Compiling takes most of the time and is done side by side. A kernel that fails may leave a
    # device on which nothing runs any more: they run one after the other.
    with ThreadPoolExecutor(available_cores()) as pool:
        for operation, device in itertools.product(presence.OPERATIONS, devices):
            if presence.is_for(operation, device):
                with jax.default_device(device):
                    begun[operation].append(_attempted(operation, pool))
        for operation, of_devices in begun.items():
            problem = next(filter(None, (problem_of(operation, of) for of in of_devices)), "")
            print(json.dumps({"operation": operation, "problem": problem}), flush=True)


def _attempted(operation: str, pool: ThreadPoolExecutor) -> list[Comparison] | None:
    try:
        return [*comparisons(operation, lambda compile: pool.submit(compile).result)]
    except Exception:
        return None  # the next attempt says why


def problem_of(operation: str, begun: list[Comparison] | None = None) -> str:
    """Says how an operation's kernels differ from XLA's form; empty if they do not.

    Args:
      operation: Which.
      begun: Its comparisons, where they are there.
    """
    try:
        for name, difference in differences(operation, begun):
            if not difference <= TOLERANCE:  # nor is NaN
                return f"on {name} it is {difference:.1e} away"
    except Exception as error:
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
    return ""


def differences(
    operation: str, begun: list[Comparison] | None = None
) -> Iterator[tuple[str, float]]:
    """Yields how far an operation's kernels are from XLA's form in each case."""
    for name, kernel, form, arguments in begun or comparisons(operation):
        # Twice: memory that a launch leaves behind must not matter to the next.
        found = [kernel()(*arguments) for _ in range(2)][-1]
        leaves = zip(jax.tree.leaves(found), jax.tree.leaves(form()(*arguments)), strict=True)
        yield name, float(np.max([relative_difference(*pair) for pair in leaves]))


def comparisons(
    operation: str, begin: Callable[[Callable], Callable] = functools.cache
) -> Iterator[Comparison]:
    """Yields an operation's cases.

    Args:
      operation: Which.
      begin: Takes what compiles, and returns what gives what that comes to.
    """
    for name, (kernel, form, arguments) in cases(operation):
        arguments = jax.device_put(arguments)
        first, second = (
            begin(jax.jit(lambda *of, run=run: run(*of)).lower(*arguments).compile)
            for run in (kernel, form)
        )
        yield Comparison(name, first, second, arguments)


def relative_difference(found: Any, expected: Any) -> float:
    """The largest difference over the largest number; int8 may be rounded to its neighbour."""
    allowed = 1 if np.asarray(found).dtype == np.int8 else 0
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    difference = np.abs(found - expected) - allowed
    return float(difference.max() / max(np.abs(expected).max(), 1e-30))
