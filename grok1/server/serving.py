"""`grok1.serve`: a loaded model over HTTP; what that needs is imported when it is called."""

import dataclasses
from typing import Any

from grok1 import keywords
from grok1.model import Model
from grok1.server.core import Server


@keywords.suggesting()
def serve(
    model: Model, *, server: dict[str, Any] | None = None, http: dict[str, Any] | None = None
) -> None:
    """Serves a model over HTTP, in OpenAI's protocol, until the process is told to end.

    Args:
      model: Loaded.
      server: Arguments of `Server`, as `{"max_slots": 16}`.
      http: Those of `HttpOptions`, as `{"port": 8000, "name": "grok-1", "api_key": "..."}`.

    Raises:
      ImportError: If the packages of `grok1[serve]` are not installed.
      ValueError: If an option is out of range.
      TypeError: If one is unknown.
      OSError: If the port is taken.
    """
    try:
        from grok1.server.running import HttpOptions, run
    except ImportError as error:
        raise ImportError(
            f"grok1.serve needs the package {error.name}: pip install 'grok1[serve]'"
        ) from error
    given = http or {}
    keywords.check(given, [field.name for field in dataclasses.fields(HttpOptions)], "http")
    run(lambda: Server(model, **(server or {})), HttpOptions(**given))
