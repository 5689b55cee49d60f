"""Errors as clients of OpenAI's protocol expect them: a status, a type, a code, a message."""

import json
from typing import Any

from grok1.server.errors import (
    CancelledError,
    DeadlineError,
    NoTokenError,
    QueueFullError,
    SlowReaderError,
    StepError,
    UnavailableError,
)


class RefusalError(Exception):
    """An answer that is an error.

    Attributes:
      status: Of HTTP.
      type: One of OpenAI's words for kinds of errors.
      code: Names the error for programs; None for those that have no name.
      param: The field of the request that it is about.
      headers: More headers of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.type, self.code, self.param = status, type, code, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """Returns the answer's JSON."""
        return {
            "error": {
                "message": str(self),
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def encoded(self) -> bytes:
        """Returns the answer's body."""
        return json.dumps(self.body()).encode()


def refusal_of(error: BaseException) -> RefusalError:
    """Returns what a client is told of an error."""
    no_retry = {"x-should-retry": "false"}
    if isinstance(error, RefusalError):
        return error
    if isinstance(error, QueueFullError):
        return RefusalError(
            str(error),
            status=429,
            type="rate_limit_error",
            code="queue_full",
            headers={"retry-after": str(error.retry_after)},
        )
    if isinstance(error, DeadlineError):
        return RefusalError(
            str(error), status=504, type="timeout_error", code="deadline", headers=no_retry
        )
    if isinstance(error, UnavailableError):
        headers = no_retry if "has failed" in str(error) else {"retry-after": "5"}
        return RefusalError(
            str(error), status=503, type="unavailable_error", code="unavailable", headers=headers
        )
    if isinstance(error, NoTokenError):
        return RefusalError(
            str(error), status=500, type="server_error", code="no_token", headers=no_retry
        )
    if isinstance(error, StepError):
        return RefusalError(str(error), status=500, type="server_error", code="step_failed")
    if isinstance(error, SlowReaderError):
        return RefusalError(str(error), status=499, type="server_error", code="slow_reader")
    if isinstance(error, CancelledError):
        return RefusalError(str(error), status=499, type="server_error", code="cancelled")
    return RefusalError("the server has failed to answer", status=500, type="server_error")
