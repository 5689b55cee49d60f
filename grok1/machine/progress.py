"""Bars on stderr for what takes long, where there is somebody to see them."""

import sys
from typing import Any

from tqdm import tqdm

_NOTEBOOK_SECONDS = 1.0  # A notebook keeps what is shown, and quick work is nothing to keep.


def progress_bar(total: int | None, what: str, is_wanted: bool = True, **options: Any) -> tqdm:
    """Returns a bar, which shows nothing where stderr is neither a terminal nor a notebook's.

    Args:
      total: Of the units that are done.
      what: What is done, in a word.
      is_wanted: False for a bar that shows nothing.
      **options: Of `tqdm`; by default units are bytes.
    """
    options = {"unit": "B", "unit_scale": True} | options
    in_notebook = _is_notebook(sys.stderr)
    if in_notebook:
        options["delay"] = max(options.get("delay", 0), _NOTEBOOK_SECONDS)
    return tqdm(
        total=total,
        desc=what,
        disable=not (is_wanted and (in_notebook or _is_terminal(sys.stderr))),
        **options,
    )


def _is_terminal(stream: Any) -> bool:
    # A process may have none, or have closed it.
    return stream is not None and not getattr(stream, "closed", False) and stream.isatty()


def _is_notebook(stream: Any) -> bool:
    """Whether what is written goes to a page of Jupyter, whose stream says that it is a file."""
    return any(kind.__module__.startswith("ipykernel.") for kind in type(stream).__mro__)
