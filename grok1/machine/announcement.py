"""Says on stderr what takes long, while it does."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

import jax

PATIENCE = 2.0
"""Seconds that pass in silence."""


@contextlib.contextmanager
def announced(work: str) -> Iterator[None]:
    """Prints "grok1: {work} ..." if the block takes longer than `PATIENCE`, then how long it took.

    Only the first of several processes speaks.
    """
    lock = threading.Lock()
    spoken = finished = False
    start = time.perf_counter()

    def speak():
        nonlocal spoken
        with lock:
            if not finished and jax.process_index() == 0:
                print(f"grok1: {work} ...", end="", file=sys.stderr, flush=True)
                spoken = True

    timer = threading.Timer(PATIENCE, speak)
    timer.daemon = True
    timer.start()
    outcome = "stopped after"
    try:
        yield
        outcome = "done in"
    finally:
        timer.cancel()
        with lock:
            finished = True
        if spoken:
            seconds = time.perf_counter() - start
            print(f" {outcome} {seconds:.1f} s", file=sys.stderr, flush=True)
