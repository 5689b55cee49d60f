"""How JAX starts in this process, and where it cannot."""

import os
import sys
import threading

import jax
from jax._src import xla_bridge

from grok1.machine import environment
from grok1.machine.announcement import hint

_PROCESSOR = "/proc/cpuinfo"
_TASKS = "/proc/self/task"  # a directory for each thread of this process


def _started_before_fork() -> bool:
    """Whether JAX started in a process that this one was forked from: its threads are not here."""
    if not xla_bridge.backends_are_initialized() or not os.path.isdir(_TASKS):
        return False
    return len(os.listdir(_TASKS)) <= threading.active_count()


_is_forked = _started_before_fork()


def _note_fork() -> None:
    global _is_forked
    _is_forked = xla_bridge.backends_are_initialized()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def check_not_forked() -> None:
    """Checks that JAX has its threads: without them whatever it is asked for waits for ever.

    Raises:
      RuntimeError: If this process was forked after JAX had started.
    """
    if _is_forked:
        raise RuntimeError(
            "this process was forked from one in which JAX was running, and JAX's threads do not "
            'survive a fork; start it with multiprocessing.get_context("spawn"), or fork before '
            "JAX is used"
        )


def check_environment() -> None:
    """Checks the variables that are ours, and says on stderr, once, which are not known.

    Raises:
      ValueError: If one has a value that means nothing.
    """
    environment.check()
    for words in environment.unknown():
        hint(words)


def start_jax() -> None:
    """Starts JAX, if it is not running, on the platform that is asked for.

    Raises:
      ValueError: If a variable of the environment has a value that means nothing.
      RuntimeError: If that is not there, or the process was forked after JAX had started.
    """
    check_environment()
    check_not_forked()
    if sys.platform == "linux" and not os.path.exists(_PROCESSOR):
        hint(f"there is no {_PROCESSOR}, without which XLA fails on CPUs; mount /proc")
    try:
        jax.devices()
    # JAX's own words where a plugin is there and fails; where there is none it has no words.
    except (AssertionError, RuntimeError) as error:
        platforms = jax.config.values["jax_platforms"]
        raise RuntimeError(
            f"JAX cannot start on the platform that is asked for, JAX_PLATFORMS={platforms}: "
            f"{str(error).partition(' (set JAX_PLATFORMS')[0] or 'it has no plugin for that'}; "
            "install the plugin, such as jax[cuda12], or leave JAX_PLATFORMS out"
        ) from error
