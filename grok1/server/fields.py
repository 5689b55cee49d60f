"""Checks of the fields of a body, each of which a refusal names."""

import math
from collections.abc import Sequence
from typing import Any

from grok1.server.refusals import RefusalError


def refuse(param: str, must: str, found: Any) -> RefusalError:
    """Returns the refusal of a field's value."""
    return RefusalError(f"{param} must be {must}, found {found!r:.80}", param=param)


def within(param: str, value: Any, low: float, high: float, must: str) -> None:
    """Checks that a number, if there is one, lies in a range.

    Raises:
      RefusalError: If it does not.
    """
    if value is not None and not (math.isfinite(value) and low <= value <= high):
        raise refuse(param, must, value)


def check_model(given: str | None, served: Sequence[str]) -> None:
    """Checks that a request is for a model that is served.

    Raises:
      RefusalError: If it is not.
    """
    if given is not None and given not in served:
        raise RefusalError(
            f"there is no model {given!r:.80} here; it is {served[0]!r}",
            status=404,
            type="not_found_error",
            code="model_not_found",
            param="model",
        )


def checked_ids(param: str, ids: Sequence[int], vocab_size: int) -> list[int]:
    """Returns token ids of the vocabulary.

    Raises:
      RefusalError: If one is not.
    """
    for token in ids:
        if not 0 <= token < vocab_size:
            raise refuse(param, f"token ids from 0 to {vocab_size - 1}", token)
    return list(ids)
