"""Arguments of public functions: mistyped ones, numbers of other libraries, messages about them."""

import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import re
import sys
import warnings
from collections.abc import Callable, Collection
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def check(given: Collection[str], known: Collection[str], function: str) -> None:
    """Refuses a keyword that a function does not have.

    Raises:
      TypeError: If one of `given` is not `known`; the message has the one that is nearest.
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
            raise TypeError(f"{function} has no argument {name!r}; {hint}")


def shown(value: Any, most: int = 80) -> str:
    """Returns what a value is for a message: on one line, and not all of one that is long."""
    # Python refuses to write more digits than it would read.
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of some {value.bit_length() * math.log10(2):,.0f} digits"
    # An array is written over several lines.
    return re.sub(r"\s*\n\s*", " ", repr(value))[:most]


def as_python(value: Any) -> Any:
    """Returns numbers and arrays of NumPy, JAX or others, alone or in a list, as Python's own.

    Anything else is returned as it is. Sums of NumPy's small integers would wrap around.
    """
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(map(as_python, value))
    return value.tolist() if hasattr(value, "ndim") and hasattr(value, "tolist") else value


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, of Python or NumPy."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_flags(**given: Any) -> None:
    """Checks arguments that are True or False, by their names: any text would count as True.

    Raises:
      TypeError: If one is something else.
    """
    for name, value in given.items():
        if not isinstance(as_python(value), bool):
            raise TypeError(f"{name} must be True or False, found {shown(value)}")


def warn(message: str) -> None:
    """Warns of what a caller gave, at the line outside of this package that led here.

    However many functions and generators lie between: a line of the library tells a user nothing,
    and Python shows a warning once a line, so that a second caller would not see his own.
    """
    level, frame = 2, sys._getframe(1)
    while frame is not None and _is_inside(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    # Level 1 is this function.
    warnings.warn(message, stacklevel=level)


def _is_inside(module: str) -> bool:
    # Functions under `own_settings` are called by contextlib.
    return module.split(".")[0] in ("grok1", "contextlib")


def suggesting(options: type | None = None) -> Callable[[F], F]:
    """Lets a function refuse unknown keywords by `check`.

    Args:
      options: The dataclass whose fields are the function's `**options`. `inspect.signature`, which
        notebooks ask for completions, then shows them one by one.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        parameters = [
            parameter
            for parameter in signature.parameters.values()
            if parameter.kind != inspect.Parameter.VAR_KEYWORD
        ]
        if options is not None:
            parameters += [
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=field.default,
                    annotation=field.type,
                )
                for field in dataclasses.fields(options)
            ]
        known = [one.name for one in parameters if one.name != "self"]

        @functools.wraps(function)
        def checked(*arguments, **given):
            check(given, known, function.__name__)
            return function(*arguments, **given)

        checked.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore
        return checked  # pyright: ignore[reportReturnType]

    return decorate
