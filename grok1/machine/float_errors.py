"""What NumPy does about overflow and the like is a setting of the program, and not of a library."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np

_Function = TypeVar("_Function", bound=Callable)


def as_numpy_comes(function: _Function) -> _Function:
    """Lets a function run with NumPy's own settings, whatever `np.seterr` has been told.

    Small numbers that become zero where they are rounded to a smaller type are as they should be.
    """
    settings = np.errstate(divide="warn", over="warn", under="ignore", invalid="warn")
    return settings(function)
