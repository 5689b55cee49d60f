"""How the processes of a server hear of each turn: from process 0, over connections of its own.

The coordination service of `jax.distributed` takes half a millisecond and more for a message, a
connection takes a thirtieth of that. It is used once, to exchange the port and a key with which
every message is signed. Each process says every second that it is there, also while it computes:
one that is silent, or whose connection ends, ends all.
"""

import base64
import contextlib
import dataclasses
import hmac
import json
import os
import queue
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed as jax_distributed
from jax.sharding import Mesh

from grok1.engine.sampling import SamplingParams
from grok1.generate.request import Request, Wishes
from grok1.machine.agreement import exchange
from grok1.machine.announcement import say
from grok1.machine.processes import OtherProcessError
from grok1.server.replica import Plan

_BEAT_SECONDS = 1.0
_SILENT_SECONDS = 10.0  # after which a process is taken for dead; JAX ends all after twice as long
_START_SECONDS = 300.0
_END_SECONDS = 5.0  # that a process has to end by itself
_HEAD = struct.Struct(">I32s")


class Connection:
    """Signed messages between two processes, each with its place in their order."""

    def __init__(self, one: socket.socket, key: bytes):
        self._socket, self._key = one, key
        self._sent = self._received = 0
        self._lock = threading.Lock()
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        one.settimeout(_SILENT_SECONDS)

    def send(self, message: Any) -> None:
        """Sends something that JSON can hold.

        Raises:
          OSError: If the other does not take it.
        """
        data = json.dumps(message, separators=(",", ":")).encode()
        with self._lock:
            signed = self._signature(self._sent, data)
            self._sent += 1
            self._socket.sendall(_HEAD.pack(len(data), signed) + data)

    def receive(self) -> Any:
        """Waits for a message.

        Raises:
          OSError: If there is none, for as long as a process may be silent, or it is not signed.
        """
        length, signed = _HEAD.unpack(self._exactly(_HEAD.size))
        data = self._exactly(length)
        if not hmac.compare_digest(signed, self._signature(self._received, data)):
            raise OSError("a message is not signed with the server's key")
        self._received += 1
        return json.loads(data)

    def close(self) -> None:
        """Ends the connection."""
        self._socket.close()

    def _signature(self, number: int, data: bytes) -> bytes:
        return hmac.digest(self._key, number.to_bytes(8, "big") + data, "sha256")

    def _exactly(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = self._socket.recv(min(count - len(parts), 1 << 20))
            if not part:
                raise OSError("the connection has ended")
            parts += part
        return bytes(parts)


class Leader:
    """Process 0's end: tells the others each plan, and notices when one is gone."""

    def __init__(self, others: dict[int, Connection], on_lost: Callable[[Exception], None]):
        self._others, self._on_lost = others, on_lost
        self._is_over = threading.Event()
        for rank, connection in others.items():
            threading.Thread(target=self._watch, args=(rank, connection), daemon=True).start()
        if others:
            threading.Thread(target=self._beat, daemon=True).start()

    @classmethod
    @contextlib.contextmanager
    def of(cls, mesh: Mesh, on_lost: Callable[[Exception], None]) -> Iterator["Leader"]:
        """Yields what tells the other processes of a mesh; nobody, where this one is alone.

        Args:
          mesh: The model's devices.
          on_lost: Called, from another thread, with what has become of a process.

        Raises:
          OtherProcessError: If one does not come.
        """
        members = members_of(mesh)
        leader = cls(_accept(mesh, members) if len(members) > 1 else {}, on_lost)
        try:
            yield leader
        finally:
            leader.close()

    @property
    def is_alone(self) -> bool:
        """Whether there are no others."""
        return not self._others

    def send(self, plan: Plan) -> None:
        """Tells all others what to do next.

        Raises:
          OtherProcessError: If one does not listen.
        """
        if not self._others:
            return
        submitted = {number: _packed(request) for number, request in plan.submitted.items()}
        self._tell({"submitted": submitted, "over": plan.over})

    def close(self) -> None:
        """Lets the others end."""
        if not self._is_over.is_set():
            self._is_over.set()
            with contextlib.suppress(OtherProcessError):
                self._tell({"end": True})
            for connection in self._others.values():
                connection.close()

    def _tell(self, message: Any) -> None:
        for rank, connection in self._others.items():
            try:
                connection.send(message)
            except OSError as error:
                raise OtherProcessError(f"process {rank} of the server is gone: {error}") from None

    def _watch(self, rank: int, connection: Connection) -> None:
        try:
            while True:
                connection.receive()
        except OSError as error:
            if not self._is_over.is_set():
                words = "says nothing any more" if isinstance(error, TimeoutError) else "is gone"
                self._on_lost(OtherProcessError(f"process {rank} of the server {words}"))

    def _beat(self) -> None:
        while not self._is_over.wait(_BEAT_SECONDS):
            with contextlib.suppress(OtherProcessError):
                self._tell({})


class Follower:
    """Another process's end: hears from process 0 what to do, and says that it is there."""

    def __init__(self, mesh: Mesh):
        """Connects to process 0.

        Raises:
          OtherProcessError: If it does not answer.
        """
        self._connection = _connect(mesh)
        self._found: queue.Queue[Any] = queue.Queue()
        self._is_over = threading.Event()
        for target in (self._listen, self._beat):
            threading.Thread(target=target, daemon=True).start()

    def plans(self) -> Iterator[Plan]:
        """Yields what process 0 does, until its server is closed.

        Raises:
          OtherProcessError: If process 0 is gone. Where this process does not end by then, because
            it waits for a step of all, it is ended.
        """
        try:
            while True:
                message = self._found.get()
                if isinstance(message, Exception):
                    raise message
                if "end" in message:
                    return
                submitted = {int(n): _unpacked(one) for n, one in message["submitted"].items()}
                yield Plan(submitted, message["over"])
        finally:
            self._is_over.set()
            self._connection.close()

    def _listen(self) -> None:
        try:
            while not self._is_over.is_set():
                message = self._connection.receive()
                if message:
                    self._found.put(message)
                if "end" in message:
                    return
        except OSError as error:
            words = "says nothing any more" if isinstance(error, TimeoutError) else "is gone"
            self._found.put(OtherProcessError(f"process 0 of the server {words}"))
            if not self._is_over.wait(_END_SECONDS):
                say(f"grok1: process 0 of the server {words}")
                os._exit(1)

    def _beat(self) -> None:
        while not self._is_over.wait(_BEAT_SECONDS):
            try:
                self._connection.send({})
            except OSError:
                return


def members_of(mesh: Mesh) -> Sequence[int]:
    """Returns the processes that a model lies on."""
    return sorted({device.process_index for device in mesh.devices.flat})


def _coordinator_host() -> str:
    address = jax_distributed.global_state.coordinator_address
    assert address is not None  # there are several processes
    return address.rpartition(":")[0].strip("[]")


def _accept(mesh: Mesh, members: Sequence[int]) -> dict[int, Connection]:
    """Lets the others connect; they reach this host as the coordinator, which is here."""
    host = _coordinator_host()
    is_local = host in ("localhost", "127.0.0.1", "::1")
    with socket.create_server((host if is_local else "", 0), backlog=len(members)) as listening:
        key = secrets.token_bytes(32)
        words = {"port": str(listening.getsockname()[1]), "key": key.hex()}
        exchange("serve", lambda: words, mesh)
        deadline = time.monotonic() + _START_SECONDS
        others: dict[int, Connection] = {}
        while len(others) < len(members) - 1:
            listening.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                one, _ = listening.accept()
            except TimeoutError:
                missing = sorted(set(members) - set(others) - {jax.process_index()})
                raise OtherProcessError(
                    f"processes {missing} of the server did not connect in {_START_SECONDS:.0f} s"
                ) from None
            connection = Connection(one, key)
            try:
                others[int(connection.receive()["rank"])] = connection
            except (OSError, ValueError, KeyError, TypeError):
                connection.close()  # somebody else
        return others


def _connect(mesh: Mesh) -> Connection:
    said = exchange("serve", lambda: {}, mesh)
    words = next(of_rank for of_rank in said.values() if "port" in of_rank)
    address = (_coordinator_host(), int(words["port"]))
    try:
        connection = Connection(
            socket.create_connection(address, timeout=_SILENT_SECONDS), bytes.fromhex(words["key"])
        )
    except OSError as error:
        raise OtherProcessError(
            f"process 0 of the server does not answer at port {address[1]}: {error}"
        ) from None
    connection.send({"rank": jax.process_index()})
    return connection


def _packed(request: Request) -> dict[str, Any]:
    """What another process has to know of a request."""
    allowed = request.allowed
    packed = None if allowed is None else base64.b64encode(np.packbits(allowed).tobytes()).decode()
    wishes = None
    if request.wishes is not None:
        # As pairs: JSON's keys are texts.
        biases = list(request.wishes.biases.items())
        wishes = {**dataclasses.asdict(request.wishes), "biases": biases}
    return {
        "tokens": list(request.tokens),
        "max_tokens": request.max_tokens,
        "seed": request.seed,
        "stream": request.stream,
        "sampling": dataclasses.asdict(request.sampling),
        "allowed": None if allowed is None else [len(allowed), packed],
        "ends": list(request.ends),
        "one_by_one": request.one_by_one,
        "num_top": request.num_top,
        "wishes": wishes,
        "scores_prompt": request.scores_prompt,
        "salt": request.salt.hex(),
    }


def _unpacked(packed: dict[str, Any]) -> Request:
    allowed, wishes = packed["allowed"], packed["wishes"]
    if allowed is not None:
        size, data = allowed
        bits = np.unpackbits(np.frombuffer(base64.b64decode(data), np.uint8))
        allowed = bits[:size].astype(bool)
    if wishes is not None:
        wishes = Wishes(**{**wishes, "biases": dict(wishes["biases"])})
    rest = {
        "sampling": SamplingParams(**packed["sampling"]),
        "allowed": allowed,
        "wishes": wishes,
        "salt": bytes.fromhex(packed["salt"]),
    }
    return Request(**{**packed, **rest})
