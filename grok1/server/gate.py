"""What every request passes before it is read: who asks, for which host, and how much they send."""

import codecs
import hashlib
import hmac
import logging
import pathlib
import re
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from grok1.files import CheckpointError, read_bounded, unreadable
from grok1.machine.announcement import say
from grok1.server.refusals import RefusalError

_OPEN = ("/health", "/ping")
_PAGE = ("/", "/app.js", "/style.css")
_LOOPBACK = {"localhost", "127.0.0.1", "[::1]"}
_NEVER, _GONE = (0, 0, 0), (0, 0, 1)  # stamps that no file has
_MOST_KEYS = 1 << 20  # bytes of a file
_ID = re.compile(r"[\x21-\x7e]{1,128}")
_log = logging.getLogger("grok1.server")


class Keys:
    """Keys that clients may have; those of a file are read anew when the file changes."""

    def __init__(self, keys: Sequence[str] = (), file: pathlib.Path | None = None):
        self._given = [_hash(key.encode("utf-8", "surrogateescape")) for key in keys]
        self._file, self._stamp = file, _NEVER
        self._of_file: list[bytes] = []
        if file is not None:
            self._read()
            if not self._of_file:
                raise ValueError(f"{file}: holds no key; write one a line")

    def __bool__(self) -> bool:
        return bool(self._given or self._file)

    def has(self, key: bytes) -> bool:
        """Whether a key, as a client has sent it, is one of these; takes as long for every key."""
        self._read()
        digest = _hash(key)
        matches = [hmac.compare_digest(digest, one) for one in (*self._given, *self._of_file)]
        return any(matches)

    def _read(self) -> None:
        if self._file is None:
            return
        try:
            found = self._file.stat()
            stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
            if stamp != self._stamp:
                data = read_bounded(self._file, _MOST_KEYS)
                words = map(bytes.strip, data.removeprefix(codecs.BOM_UTF8).splitlines())
                self._of_file = [
                    _hash(word) for word in words if word and not word.startswith(b"#")
                ]
                if self._stamp != _NEVER:
                    say(f"grok1: {self._file}: read again, keys: {len(self._of_file)}")
                self._stamp = stamp
        except (OSError, CheckpointError) as error:
            refusal = unreadable(self._file, error) if isinstance(error, OSError) else error
            if self._stamp == _NEVER:
                raise refusal from error
            # Without the file nobody is known by it, until it is there, as it was or otherwise.
            if self._stamp != _GONE:
                say(f"grok1: {refusal}; none of its keys is taken until it can be read")
            self._of_file, self._stamp = [], _GONE


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Gate:
    """ASGI middleware that refuses what must not come in, and names every request."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        metrics_keys: Keys,
        hosts: Sequence[str] | None,
        most_bytes: int,
        on_answer: Callable[[str, int], None],
    ):
        """Wraps an application.

        Args:
          app: The application.
          keys: Who may ask; with none, everybody.
          metrics_keys: Who may read the metrics; with none, everybody.
          hosts: The names that this server is reached by; None for any.
          most_bytes: Largest body.
          on_answer: Called with the path and the status of each answer when it begins.
        """
        self._on_answer = on_answer
        self._app, self._keys, self._metrics_keys = app, keys, metrics_keys
        self._hosts = None if hosts is None else {host.lower() for host in hosts}
        self._most_bytes = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers that it is refused."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Paths may end in slashes: a redirection would name the scheme that a proxy speaks to here.
        scope["path"] = scope["path"].rstrip("/") or "/"
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        name = given if _ID.fullmatch(given) else f"req-{secrets.token_hex(8)}"
        scope.setdefault("state", {})["request_id"] = name

        has_begun = False

        async def named(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                self._on_answer(scope["path"], message["status"])
                own = MutableHeaders(scope=message)
                own["x-request-id"] = name
                own.setdefault("x-content-type-options", "nosniff")
                own.setdefault("cache-control", "no-store")
            await send(message)

        try:
            self._check(scope, headers)
        except RefusalError as refusal:
            await answer(refusal)(scope, receive, named)
            return
        try:
            await self._app(scope, self._bounded(receive), named)
        except Exception:
            if has_begun:
                raise  # the connection ends, so that nobody takes a part for the whole
            _log.exception("no answer to %s %r, %s", scope["method"], scope["path"], name)
            await answer(
                RefusalError(
                    f"the server has failed to answer; its log has the cause under {name}",
                    status=500,
                    type="server_error",
                )
            )(scope, receive, named)

    def _check(self, scope: Scope, headers: Headers) -> None:
        path, method = scope["path"], scope["method"]
        if self._hosts is not None:
            host = headers.get("host", "").lower()
            host = re.sub(r":\d+$", "", host)
            if host not in self._hosts:
                raise RefusalError(
                    "this server does not answer under that name; give it with --allowed-host",
                    status=421,
                    code="wrong_host",
                )
        keys = self._metrics_keys if path == "/metrics" else self._keys
        is_open = path in _OPEN or (path in _PAGE and method in ("GET", "HEAD"))
        if keys and not is_open and method != "OPTIONS":
            kind, _, key = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not keys.has(key.encode("latin-1").strip()):
                raise RefusalError(
                    "a key is needed: Authorization: Bearer KEY"
                    if not key.strip()
                    else "this key is not known here",
                    status=401,
                    type="authentication_error",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
        if method != "POST":
            return
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # Otherwise a page of another site could post without asking for leave.
            raise RefusalError(
                "the body must be JSON: Content-Type: application/json",
                status=415,
                code="unsupported_media_type",
            )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self._most_bytes:
            raise self._too_large()

    def _too_large(self) -> RefusalError:
        return RefusalError(
            f"the body must be at most {self._most_bytes} bytes",
            status=413,
            code="request_too_large",
        )

    def _bounded(self, receive: Receive) -> Receive:
        num_bytes = 0

        async def bounded() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._most_bytes:
                raise self._too_large()
            return message

        return bounded


def loopback_hosts(more: Sequence[str]) -> list[str]:
    """Returns the names of a server that only this machine reaches, and `more`."""
    return [*_LOOPBACK, *more]


def answer(refusal: RefusalError) -> Response:
    """Returns the answer that says no."""
    headers: dict[str, Any] = dict(refusal.headers)
    return Response(
        refusal.encoded(), refusal.status, headers=headers, media_type="application/json"
    )
