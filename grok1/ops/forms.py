"""Which form of an operation runs where: one table, and the choice.

An operation has several forms, which compute the same thing: those that go through XLA run on any
device, those in C++ on CPUs, those in CUDA on NVIDIA GPUs. A form is a function of the operation's
arguments, under `@form` in the module that holds it; what it cannot compute, it says. A new one is
that function, its name in `PREFERRED`, and a parameter of the tests that hold all forms to the same
numbers.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from grok1.ops.cpu import bindings
from grok1.ops.cuda import presence

PREFERRED: dict[str, dict[str, tuple[str, ...]]] = {
    "matmul": {
        "cpu": ("cpp", "tiled"),
        "cuda": ("converted", "direct"),
        "tpu": ("of_rows",),
        "default": ("direct",),
    },
    "matmul_int4": {
        "cpu": ("cpp", "blocked"),
        "cuda": ("converted", "blocked"),
        "tpu": ("halves",),
        "default": ("blocked",),
    },
    "round_int4": {"cpu": ("cpp", "xla"), "default": ("xla",)},
    "project": {"cuda": ("cuda", "halves", "one_by_one"), "default": ("one_by_one",)},
    "experts": {
        "cpu": ("cpp", "sparse"),
        "cuda": ("cuda_tiles", "cuda", "cuda_int4", "grouped", "sparse"),
        "default": ("sparse",),
    },
    "attend_cache": {
        "cpu": ("cpp", "by_row", "blocked"),
        "cuda": ("cuda", "cuda_tiles", "blocked"),
        "tpu": ("sliced",),
        "default": ("blocked",),
    },
    "append_heads": {"cuda": ("cuda", "steps"), "default": ("steps",)},
    "append_and_attend": {"cuda": ("cuda", "apart"), "default": ("apart",)},
    "rotate": {"cpu": ("cpp", "xla"), "default": ("xla",)},
    "norm": {"cpu": ("cpp", "xla"), "cuda": ("cuda", "xla"), "default": ("xla",)},
    "add_norm": {"cpu": ("cpp", "xla"), "cuda": ("cuda", "xla"), "default": ("xla",)},
    "route": {"cpu": ("cpp", "xla"), "cuda": ("cuda", "xla"), "default": ("xla",)},
    "add_and_route": {"cuda": ("cuda", "apart"), "default": ("apart",)},
    "logits": {
        "cpu": ("cpp", "direct"),
        "cuda": ("three_terms", "direct"),
        "default": ("direct",),
    },
    "most_probable": {
        "cpu": ("cpp", "direct"),
        "cuda": ("cuda", "direct"),
        "default": ("direct",),
    },
    "exponential_sums": {"cpu": ("cpp", "xla"), "default": ("xla",)},
    "log": {"cpu": ("cpp", "xla"), "default": ("xla",)},
    "convert": {"cuda": ("cuda", "xla"), "default": ("xla",)},
    "convert_int4": {"cuda": ("cuda", "xla"), "default": ("xla",)},
}
"""The forms of each operation that are asked in turn, by JAX's name of the platform."""


class _Form(NamedTuple):
    function: Callable[..., Any]
    refuses: Callable[..., str | None]


_FORMS: dict[tuple[str, str], _Form] = {}


def form(
    operation: str, name: str, refuses: Callable[..., str | None] = lambda *arguments: None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the function it decorates as a form of an operation.

    Args:
      operation: Which one.
      name: Of the form.
      refuses: Takes the arguments, of which it may read types and shapes, and says why the form
        cannot compute these; None if it can.
    """

    def register(function):
        _FORMS[operation, name] = _Form(function, refuses)
        return function

    return register


def prepare(platform: str) -> str:
    """Names the native kernels that programs for a platform may call; builds them when first asked.

    Args:
      platform: JAX's name of it.
    """
    if platform == "cpu":
        return str(bindings.is_available())
    return " ".join(sorted(presence.kernels())) if platform in ("gpu", "cuda") else ""


def kernels_in_words(platform: str) -> list[str]:
    """Says which operations run in CUDA kernels on devices of a platform that has them."""
    if platform not in ("gpu", "cuda"):
        return []
    there = presence.kernels()
    missing = sorted(
        operation
        for operation in set(presence.OPERATIONS) - there
        if presence.INSTEAD.get(operation) not in there
    )
    if not missing:
        return ["CUDA kernels"]
    return [f"CUDA kernels but for {', '.join(missing)}" if there else "no CUDA kernels"]


def has_kernels(platform: str) -> bool:
    """Whether forms in C++ run on devices of a platform; builds them when first asked."""
    return platform == "cpu" and bindings.is_available()


def refusal(operation: str, name: str, *arguments: Any) -> str | None:
    """Says why a form does not run on these arguments; None if it does.

    Raises:
      ValueError: If the operation has no such form.
    """
    found = _FORMS.get((operation, name))
    if found is None:
        names = ", ".join(sorted(of for its, of in _FORMS if its == operation))
        raise ValueError(f"{operation} has no form {name!r}; its forms are {names}")
    if name == "cpp" and not bindings.is_available():
        return "the native kernels are not available here"
    if name == "cuda" and operation not in presence.kernels():
        return "its CUDA kernels are not available here"
    return found.refuses(*arguments)


def chosen(operation: str, platform: str, *arguments: Any) -> str | None:
    """Names the form that computes these arguments on a platform; None if none does."""
    table = PREFERRED[operation]
    for name in table.get(platform, table["default"]):
        if refusal(operation, name, *arguments) is None:
            return name
    return None


def run(operation: str, *arguments: Any, implementation: str | None = None, **static: Any) -> Any:
    """Computes an operation in the first form of its table that can, on the program's platform.

    Args:
      operation: A key of `PREFERRED`.
      *arguments: Trees of arrays.
      implementation: The form to take; None for the table's.
      **static: What is no array.

    Raises:
      ValueError: If the operation has no such form.
      NotImplementedError: If the form asked for cannot compute these arguments.
    """
    if implementation is not None:
        reason = refusal(operation, implementation, *arguments)
        if reason is not None:
            raise NotImplementedError(f"{operation} in the form {implementation!r}: {reason}")
        return _FORMS[operation, implementation].function(*arguments, **static)
    by_platform = {
        platform: chosen(operation, platform, *arguments) for platform in PREFERRED[operation]
    }
    default = by_platform["default"]
    functions = {
        platform: functools.partial(_FORMS[operation, name].function, **static)
        for platform, name in by_platform.items()
        if name is not None and (platform == "default" or name != default)
    }
    if [*functions] == ["default"]:
        return functions["default"](*arguments)  # nothing to trace twice
    return jax.lax.platform_dependent(*arguments, **functions)
