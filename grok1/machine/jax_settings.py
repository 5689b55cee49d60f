"""The settings of JAX that this library's own work is done under, whatever the user has chosen.

They are the process's, and many change what a function of JAX's returns or refuses: with 64-bit
types a Python number is another type, a guard against transfers refuses a host's argument, without
`jit` there is no program to compile. A user chooses them for code of his own; a model computes the
same numbers under all of them. What is not named here, such as the default precision of products,
is the user's to choose.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from jax._src import config, core

_OWN = {
    "jax_check_tracer_leaks": False,
    "jax_debug_infs": False,
    "jax_debug_key_reuse": False,
    "jax_debug_nans": False,
    "jax_default_device": None,
    "jax_disable_jit": False,
    "jax_enable_x64": False,
    "jax_no_tracing": False,
    "jax_numpy_rank_promotion": "allow",
    "jax_random_seed_offset": 0,
    "jax_threefry_partitionable": True,
}
_GUARDS = (
    "jax_transfer_guard_device_to_device",
    "jax_transfer_guard_device_to_host",
    "jax_transfer_guard_host_to_device",
)
_STATES = [(config.config_states[name], value) for name, value in _OWN.items()]
_GUARD_STATES = [config.config_states[name] for name in (*_GUARDS, "jax_transfer_guard")]

Settings = list[tuple[Any, Any]]
"""Settings that hold in one thread: the setting, its value."""


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """Inside, this thread has the library's settings. Costs next to nothing where it has them.

    Raises:
      RuntimeError: If JAX is tracing a function: what runs inside is compiled already, and the
        host's.
    """
    if not core.trace_state_clean():
        raise RuntimeError(
            "a model runs programs of its own, and cannot be called inside jax.jit, vmap, grad or "
            "another transformation of JAX; call it outside, and give the function what it returns"
        )
    changes = [(state, value) for state, value in _STATES if state.value != value]
    if any(state.value not in (None, "allow") for state in _GUARD_STATES):
        # The last one is for all directions, and gives way to the others.
        changes += [(state, "allow") for state in _GUARD_STATES]
    with under(changes):
        yield


def settings_of_thread() -> Settings:
    """Returns the settings that hold in this thread alone, as the block of a `with` makes them."""
    found = [(state, state.get_local()) for state in config.config_states.values()]
    return [(state, value) for state, value in found if value is not config.config_ext.unset]


@contextlib.contextmanager
def under(settings: Settings) -> Iterator[None]:
    """Inside, these settings hold in this thread.

    Args:
      settings: Such as `settings_of_thread` returns, in another.
    """
    with contextlib.ExitStack() as stack:
        for state, value in settings:
            stack.enter_context(state(value))
        yield
