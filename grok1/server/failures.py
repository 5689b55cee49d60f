"""What is answered where an endpoint raises."""

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from grok1.server.gate import answer
from grok1.server.refusals import RefusalError, refusal_of


async def refused(request: Request, error: Exception) -> Response:
    """Answers with what a client is told of an error."""
    return answer(refusal_of(error))


async def nobody(request: Request, error: Exception) -> Response:
    """Answers a client that is gone."""
    # What is sent to a client that is gone goes nowhere.
    return Response(status_code=499)


async def http_error(request: Request, error: HTTPException) -> Response:
    """Answers for a path or a method that is not there."""
    what = f"{request.method} {request.url.path:.100}"
    if error.status_code == 405:
        words, code = f"there is no {what} here; see the Allow header", "method_not_allowed"
    else:
        words, code = f"there is no {what} here", "not_found"
    headers = dict(error.headers or {})
    return answer(
        RefusalError(
            words, status=error.status_code, type="not_found_error", code=code, headers=headers
        )
    )
