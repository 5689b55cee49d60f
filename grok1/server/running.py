"""Running the HTTP interface: its socket, its signals, and its end."""

import asyncio
import contextlib
import dataclasses
import ipaddress
import logging
import os
import pathlib
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import uvicorn

from grok1.machine.announcement import say
from grok1.machine.background import do_not_wait, in_background
from grok1.machine.startup import start_jax
from grok1.server.app import Access, App
from grok1.server.asks import Limits
from grok1.server.chat import load_template
from grok1.server.core import Server
from grok1.server.errors import UnavailableError
from grok1.server.gate import Keys, loopback_hosts
from grok1.server.protocol import Protocol

_CHECK_SECONDS = 0.5
_IDLE_SECONDS = 75  # that a connection stays open without one
_END_SECONDS = 5  # for the last answers, once the requests are over
_CUT_SECONDS = 1.0  # for the tasks of those that were cut off
_MOST_HEAD = 1 << 16  # bytes
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^\s/]+")
_HOST_NAME = re.compile(r"[^\s/]+")
_log = logging.getLogger("grok1.server")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """How a server is reached.

    Attributes:
      host: Address to listen at; others than this machine's own need a key, or `no_auth`.
      port: Port to listen at; 0 for one that is free.
      name: The model's name in the protocol.
      api_key: Keys that clients may have, one or several.
      api_key_file: A file of keys, one a line, read anew when it changes.
      metrics_key: What reads the metrics; None for anybody.
      no_auth: Listen to other machines without a key.
      allowed_host: More names that the server is reached by, where it listens to this machine.
      cors: Origins whose pages may ask.
      chat_template: "transcript", or a file in the language of Jinja; None for no chats.
      add_bos: Let `add_special_tokens` begin prompts with [BOS].
      ignore_unknown: Take bodies with fields that are not known.
      max_tokens: Largest `max_tokens` of a request; None for what fits.
      max_body: Largest body, in bytes.
      request_timeout: Seconds that a request has; None for any number.
      drain: Seconds that requests have to end, once the server is told to.
      page: Whether there is a page at `/`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = "grok-1"
    api_key: str | Sequence[str] = ()
    api_key_file: str | pathlib.Path | None = None
    metrics_key: str | None = None
    no_auth: bool = False
    allowed_host: str | Sequence[str] = ()
    cors: str | Sequence[str] = ()
    chat_template: str | None = None
    add_bos: bool = False
    ignore_unknown: bool = False
    max_tokens: int | None = None
    max_body: int = 4 << 20
    request_timeout: float | None = 600.0
    drain: float = 30.0
    page: bool = True

    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def app(self) -> App:
        """Returns the endpoints.

        Raises:
          ValueError: If it would listen to other machines without a key, a value is out of range,
            or two would have no effect together.
          CheckpointError: If the file of keys cannot be read.
          FileNotFoundError: If there is no template.
        """
        keys = _each(self.api_key)
        for name, value in [("name", self.name), ("metrics_key", self.metrics_key)] + [
            ("api_key", key) for key in keys
        ]:
            if value == "":
                raise ValueError(f"{name} must not be empty; leave it out, or give one")
            if name != "name" and value is not None and value != value.strip():
                raise ValueError(
                    f"{name} must not begin or end with a space: a client cannot send those"
                )
        # What a browser never sends would let nobody in, without a word.
        for origin in _each(self.cors):
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    "cors must be *, or an origin as browsers send it, such as "
                    f"https://grok.example, found {origin!r:.80}"
                )
        for host in _each(self.allowed_host):
            if not _HOST_NAME.fullmatch(host):
                raise ValueError(
                    f"allowed_host must be a name alone, such as grok.example, found {host!r:.80}"
                )
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port must be from 0 to 65535, found {self.port}")
        for name in ("max_tokens", "max_body"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, found {getattr(self, name)}")
        if self.request_timeout is not None and not self.request_timeout > 0:
            raise ValueError(
                f"request_timeout must be above 0 seconds, found {self.request_timeout}"
            )
        if not self.drain >= 0:
            raise ValueError(f"drain must be 0 seconds or more, found {self.drain}")
        file = None if self.api_key_file is None else pathlib.Path(self.api_key_file)
        of_clients = Keys(keys, file)
        if not self.is_local() and not of_clients and not self.no_auth:
            raise ValueError(
                f"host {self.host} is reached by other machines, and there is no key: give one "
                "with api_key, or no_auth if everybody there may ask"
            )
        if self.no_auth and of_clients:
            raise ValueError(
                "no_auth is for a server that needs no key, and there are keys; leave out one or "
                "the other"
            )
        if _each(self.allowed_host) and not self.is_local():
            raise ValueError(
                f"host {self.host} is reached by other machines, and under any name; allowed_host "
                "adds names where the server listens to this machine alone: leave it out, or host"
            )
        access = Access(
            of_clients,
            Keys([self.metrics_key] if self.metrics_key else []),
            loopback_hosts([*_each(self.allowed_host), self.host]) if self.is_local() else None,
            _each(self.cors),
            self.max_body,
            self.ignore_unknown,
            self.page,
        )
        limits = Limits(
            add_bos=self.add_bos, most_tokens=self.max_tokens, timeout=self.request_timeout
        )
        template = None if self.chat_template is None else load_template(self.chat_template)
        return App(self.name, limits, access, template)


def _each(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def run(make: Callable[[], Server], options: HttpOptions, program: str = "grok1") -> None:
    """Answers from the start, and with a model as soon as there is one.

    Args:
      make: Loads the model and returns its server, not started.
      options: How it is reached.
      program: The name that messages begin with.

    Raises:
      Exception: What `make` raises, or the server's start.
    """
    start_jax()
    if jax.process_index() == 0:
        Running(make, options, program).run_all()
    else:
        options.app()
        make().follow()


def _is_no_stranger(record: logging.LogRecord) -> bool:
    """Keeps quiet of what anybody who reaches the port can cause as often as they like."""
    # uvicorn's warnings are about requests, its errors about this program.
    return record.levelno != logging.WARNING


class Running(uvicorn.Server):
    """uvicorn's server, which lets requests end before it does.

    Attributes:
      port: Where it listens; None until it does.
    """

    def __init__(self, make: Callable[[], Server], options: HttpOptions, program: str = "grok1"):
        """Takes the arguments of `run`, and checks them."""
        app = options.app()
        config = uvicorn.Config(
            app.asgi,
            host=options.host,
            port=options.port,
            http=Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_IDLE_SECONDS,
            h11_max_incomplete_event_size=_MOST_HEAD,
        )
        super().__init__(config)
        self._app, self._make, self._options, self._program = app, make, options, program
        self.port: int | None = None
        self._error: BaseException | None = None
        self._is_draining = False
        self._left_by: int | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def run_all(self) -> None:
        """Runs until a signal, or until there can be no model.

        Raises:
          OSError: If the socket cannot be opened.
          KeyboardInterrupt: If Ctrl-C came before it was ready.
          SystemExit: If another signal did.
        """
        self.run()
        server = self._app.server
        if self._left_by is not None:
            # What is loaded or compiled is of no use, and cannot be interrupted.
            if server is not None:
                server.leave()
            do_not_wait(128 + self._left_by)
            if self._left_by == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + self._left_by)
        if server is not None:
            server.close()
        if self._error is not None:
            raise self._error

    async def startup(self, sockets: Any = None) -> None:
        """Opens the socket, says where, and begins to load."""
        self._loop = asyncio.get_running_loop()
        uvicorns = logging.getLogger("uvicorn.error")
        uvicorns.addFilter(_is_no_stranger)
        uvicorns.disabled = True
        try:
            await super().startup(sockets)
        except SystemExit as left:
            cause = left.__context__
            assert isinstance(cause, OSError)
            # asyncio puts more into the text of some.
            words = os.strerror(cause.errno) if cause.errno and cause.errno > 0 else cause.strerror
            raise OSError(
                f"{self._options.host}:{self._options.port}: {words}; give another port, or host"
            ) from None
        finally:
            uvicorns.disabled = False
        if self.started:
            in_background(self._load)
            self.port = self.servers[0].sockets[0].getsockname()[1]
            host = f"[{self._options.host}]" if ":" in self._options.host else self._options.host
            self._say(f"listening at http://{host}:{self.port}")

    async def shutdown(self, sockets: Any = None) -> None:
        """Ends all connections, in time also those whose clients do not read their answers."""
        seconds = 0.0 if self.force_exit else _END_SECONDS
        timer = asyncio.get_running_loop().call_later(seconds, self._abort)
        try:
            await super().shutdown(sockets)
            if tasks := set(self.server_state.tasks):
                # Those that were cut off end by themselves, and say nothing.
                await asyncio.wait(tasks, timeout=_CUT_SECONDS)
        finally:
            timer.cancel()

    def _abort(self) -> None:
        for connection in list(self.server_state.connections):
            assert isinstance(connection, Protocol)
            connection.transport.abort()

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Takes a signal: the first lets requests end, the second does not.

        Before there can be requests, the first ends it all.
        """
        server = self._app.server
        is_ready = server is not None and server.state not in ("loading", "compiling")
        if self._is_draining or not is_ready:
            if not self._is_draining:
                self._left_by = sig
            self.force_exit = self.should_exit = True
            if self._loop is not None:
                with contextlib.suppress(RuntimeError):  # it has ended
                    self._loop.call_soon_threadsafe(self._abort)
            return
        assert server is not None
        self._is_draining = True
        server.drain()
        name = signal.Signals(sig).name
        threading.Thread(target=self._drain, args=(name,), name="grok1-drain", daemon=True).start()

    def _drain(self, name: str) -> None:
        server = self._app.server
        assert server is not None
        self._say(f"{name}: no new requests; those that run have {self._options.drain:g} s")
        server.close(self._options.drain)
        self.should_exit = True

    def _load(self) -> None:
        try:
            server = self._make()
            self._app.serve(server)
            server.start()
            if server.state != "ready":
                return
            sizes = server.sizes
            self._say(
                f"ready: {sizes.num_slots} requests side by side, of {sizes.capacity:,} tokens; "
                f"prompts in chunks of {sizes.chunk:,}, {sizes.prefix_tokens:,} tokens kept"
                + (
                    f", {sizes.host_prefix_tokens:,} on the host"
                    if sizes.host_prefix_tokens
                    else ""
                )
            )
            self._end_with(server)
        except BaseException as error:
            if not self._is_draining:
                self._error = error
            self.should_exit = True

    def _end_with(self, server: Server) -> None:
        """Waits until the model is given up, lets clients hear of it, and ends the program.

        What has started it starts it again; a server that is up and refuses all would be left so.
        """
        while server.state != "dead":
            if self.should_exit or server.state == "closed":
                return
            time.sleep(_CHECK_SECONDS)
        time.sleep(_CHECK_SECONDS)
        self._error = server.error or UnavailableError("the server has failed, see its log")
        self.should_exit = True

    def _say(self, words: str) -> None:
        say(f"{self._program}: {words}")
