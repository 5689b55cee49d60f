"""The page for people who would rather look: three files, and nothing from elsewhere."""

import functools
import hashlib
import importlib.resources

from starlette.requests import Request
from starlette.responses import Response

PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def page(request: Request) -> Response:
    """Answers with one of the files."""
    name, media_type = PAGE[request.url.path]
    data = _file(name)
    tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
    headers = {
        "etag": tag,
        "cache-control": "no-cache",
        "content-security-policy": POLICY,
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "content-type": media_type,
    }
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(data, headers=headers)


@functools.cache
def _file(name: str) -> bytes:
    return importlib.resources.files("grok1.server").joinpath("web", name).read_bytes()
