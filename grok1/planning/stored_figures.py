"""What XLA has reported of a model's programs, kept for later plans: compiling takes many seconds.

The figures lie in the private directory of `machine.cache_directory` under a hash of all that
decides them: this package's sources, the versions of JAX, the processor, the settings in the
environment and the request. GROK1_COMPILATION_CACHE=0 keeps none, and reads none.
"""

import contextlib
import hashlib
import json
import os
import platform
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from grok1.engine.compilation import source_hash
from grok1.machine import environment
from grok1.machine.cache_directory import held_directory
from grok1.machine.processor import instructions, schedulable_cores

MAX_STORED = 64
"""Files of figures; the ones that were unused for the longest time give way."""

Figures = dict[tuple[int, int], int]
"""Working memory in bytes by (batch, capacity)."""

_PREFIX = "plan-"


def name_of(model: dict[str, Any], variables: dict[str, str]) -> str | None:
    """Names the file of a model's figures; None where none are kept.

    Args:
      model: What is compiled; JSON.
      variables: The environment that it is compiled in.

    Raises:
      ValueError: If GROK1_COMPILATION_CACHE has a value that means nothing.
    """
    sources = source_hash()
    if os.name != "posix" or not environment.is_on("GROK1_COMPILATION_CACHE") or sources is None:
        return None
    settings = {
        name: value
        for name, value in sorted(variables.items())
        if name.startswith(("GROK1_", "JAX_", "XLA_", "LIBTPU_"))
    }
    versions = jax.__version__, version("jaxlib"), np.__version__, platform.python_version()
    here = sources, versions, instructions(), schedulable_cores(), settings, model
    return _PREFIX + hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()


def read(name: str | None) -> Figures:
    """Returns what is kept under a name; nothing where there is none, or it cannot be read."""
    if name is None:
        return {}
    # Whatever is wrong, compiling is the answer.
    with contextlib.suppress(OSError, RuntimeError, ValueError, TypeError):
        with held_directory() as directory:
            data = directory.read(name)
            with contextlib.suppress(OSError):  # of a read-only file system
                directory.touch(name)
        return {
            (int(batch), int(size)): int(found) for batch, size, found in json.loads(data or b"[]")
        }
    return {}


def keep(name: str | None, figures: Figures) -> None:
    """Keeps figures under a name, as far as they can be kept."""
    if name is None:
        return
    data = json.dumps([[*shape, found] for shape, found in sorted(figures.items())]).encode()
    with contextlib.suppress(OSError, RuntimeError), held_directory() as directory:
        directory.write(name, data)
        kept = [other for other in directory.names() if other.startswith(_PREFIX)]
        for old in sorted(kept, key=directory.last_use)[:-MAX_STORED]:
            directory.remove(old)
