"""Answers that wait: for a model, and for a client that may be gone."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from grok1.server.errors import CancelledError, ServingError
from grok1.server.refusals import RefusalError, refusal_of
from grok1.server.texts import utf8_escape

T = TypeVar("T")

_log = logging.getLogger("grok1.server")


class ClientGoneError(Exception):
    """The client has hung up; nobody reads an answer."""


async def gone(receive: Receive) -> None:
    """Returns when the client has hung up; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive, cancel: Callable) -> T:
    """Returns what some work makes, unless the client hangs up.

    Args:
      work: Waits for requests.
      receive: The client's.
      cancel: Called where the work does not end.

    Raises:
      ClientGoneError: If the client hung up.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        if not task.done() or task.cancelled() or task.exception() is not None:
            cancel()
        await _end(task, watch)


async def _end(*tasks: asyncio.Future) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


class Json(Response):
    """A JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Returns the body; what is encoded already stays as it is."""
        return content if isinstance(content, bytes) else msgspec.json.encode(content)


class EventStream(Response):
    """Server-sent events, from the first on whose making no error came."""

    def __init__(
        self,
        first: Any,
        rest: AsyncGenerator[Any, None],
        cancel: Callable[[], None],
    ):
        """Takes what it sends.

        Args:
          first: The first event, which has come already; None for none yet.
          rest: The others; None where there is nothing to say.
          cancel: Called when the stream ends before they do.
        """
        super().__init__(media_type="text/event-stream; charset=utf-8")
        self._first, self._rest, self._cancel = first, rest, cancel
        self.headers["cache-control"] = "no-store"
        self.headers["x-accel-buffering"] = "no"
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events until they end or the client is gone."""
        watch = asyncio.ensure_future(gone(receive))
        work = asyncio.ensure_future(self._send(send))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not work.done() or work.cancelled() or work.exception() is not None:
                self._cancel()
            await _end(work, watch)
            # Where it was cut off between two events, what makes them still waits for more.
            await self._rest.aclose()

    async def _send(self, send: Send) -> None:
        async def put(data: bytes, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": data, "more_body": more}
            await send(message)

        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            await put(_event(self._first))
            async for event in self._rest:
                await put(_event(event))
        except Exception as error:
            if not isinstance(error, CancelledError):
                if not isinstance(error, (ServingError, RefusalError)):
                    _log.exception("a stream failed")
                await put(_event(refusal_of(error).body()))
            self._cancel()
        await put(b"data: [DONE]\n\n", more=False)


def _event(event: Any) -> bytes:
    if event is None:
        return b": ping\n\n"
    return b"data: " + utf8_escape(msgspec.json.encode(event)) + b"\n\n"
