"""Connections of HTTP: how long a client may take to say what it wants, and to read the answer."""

import asyncio
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from grok1.server.refusals import RefusalError

_HEADER_SECONDS = 15.0  # that a client has to send the head of a request
_READ_SECONDS = 30.0  # that a client can take nothing of an answer that waits for it
_MOST_UNSENT = 1 << 16  # bytes
_BAD_REQUEST = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n"
)


class Protocol(H11Protocol):
    """uvicorn's, which ends connections that take too long to say what they want, or to read."""

    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Waits for a request."""
        super().connection_made(transport)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            # The system takes megabytes otherwise, all at once: who reads them slowly would seem
            # to read nothing.
            one = transport.get_extra_info("socket")
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _MOST_UNSENT)
        self._set_timer()

    def data_received(self, data: bytes) -> None:
        """Takes a part of one."""
        before = self.cycle
        super().data_received(data)
        if self.cycle is not None and (
            self.cycle is not before or not self.cycle.response_complete
        ):
            self._stop_timer()
        elif self._timer is None:
            self._set_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no longer."""
        self._stop_timer()
        self._stop_watching()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Waits for the client to read."""
        super().pause_writing()
        self._watch_reading()

    def resume_writing(self) -> None:
        """Goes on, once it has read."""
        super().resume_writing()
        self._stop_watching()

    def on_response_complete(self) -> None:
        """Waits for the client to read the end of an answer."""
        super().on_response_complete()
        self._watch_reading()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP, in the form of the server's other errors."""
        # Behind the beginning of an answer another one would be a part of it.
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = RefusalError("this is no request of HTTP/1.1", code="invalid_http").encoded()
            self.transport.write(_BAD_REQUEST % len(body) + body)
        self.transport.close()

    def _set_timer(self) -> None:
        self._timer = self.loop.call_later(_HEADER_SECONDS, self._give_up)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch_reading(self) -> None:
        """Ends the connection if its client takes nothing of what has been written, for too long.

        Otherwise the system keeps it, and the answer, as long as the client likes.
        """
        self._stop_watching()
        if left := self.transport.get_write_buffer_size():
            self._unread = self.loop.call_later(_READ_SECONDS, self._see_what_is_read, left)

    def _stop_watching(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _see_what_is_read(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._watch_reading()
        else:
            self.transport.abort()

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
