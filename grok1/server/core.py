"""`Server`: one model, and a thread that runs the requests of many callers side by side."""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Unpack

from grok1 import keywords
from grok1.generate.options import GenerationArguments, GenerationOptions
from grok1.generate.request import Wishes
from grok1.generate.requests import Prompt, as_request, check_options, prompt_tokens
from grok1.machine.background import start_endless
from grok1.machine.jax_settings import own_settings
from grok1.model import Model
from grok1.server import sizing, warmup
from grok1.server.desk import Desk, Load
from grok1.server.errors import (
    QueueFullError,
    ServingError,
    StepError,
    UnavailableError,
)
from grok1.server.handle import Handle, check_timeout
from grok1.server.links import Follower, Leader
from grok1.server.replica import MOST_TOP, Replica

_FAILURES = 3  # of steps, with no request answered between, after which the model is given up
_HEARTBEAT = 5.0  # seconds; other processes hear from this one at least as often
_log = logging.getLogger("grok1.server")


class Server:
    """Answers requests of many threads and tasks with one model.

    Requests run side by side, first come first served; the tokens of each are those that it gets
    alone. While one prompt is run, a chunk at a time, the others go on.

        with grok1.Server(model) as server:
            handles = [server.submit(prompt, max_new_tokens=100) for prompt in prompts]
            completions = [handle.result() for handle in handles]

    Attributes:
      model: The model. It must not be used otherwise while a server of several processes runs.
      sizes: Slots, their length, and the chunk of a turn; the last is known once it is ready.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_slots: int | None = None,
        capacity: int | None = None,
        max_queue: int = 256,
        max_stall: float = sizing.MAX_STALL,
        chunk: int | None = None,
        prefix_tokens: int | None = None,
        host_prefix_tokens: int | None = None,
        decode_rows: Sequence[int] = (1, 4, 16, 64),
        step_timeout: float = 60.0,
    ):
        """Takes no memory on the devices before it is started.

        Args:
          model: Loaded.
          max_slots: Most requests that run side by side; None for as many as half of the free
            memory holds, at most 16 for each group of devices.
          capacity: Most tokens of a request, its prompt included, rounded up to a power of two of
            256 or more; the context at most, and for None.
          max_queue: Most requests that wait for a slot.
          max_stall: Longest pause, in seconds, that the prompt of one request makes for others.
          chunk: Tokens of a prompt that are run at a time, one of 16, 64, 256 and 1,024; None for
            as many as `max_stall` leaves time for, measured at the start.
          prefix_tokens: Tokens of prompts whose keys and values are kept for those that begin
            alike; None for half as many as the slots hold, 0 for none.
          host_prefix_tokens: Tokens that move to the host's memory when those are too many, until
            they are asked for; fewer if there is not the memory. None for a quarter of the free
            memory, at most 48 GB and four times `prefix_tokens`, and for 0 on CPUs.
          decode_rows: Numbers of requests that steps are compiled for, beside `max_slots`.
          step_timeout: Seconds after which a step that has not ended means that something is wrong.

        Raises:
          ValueError: If one is out of range.
        """
        given = {"max_slots": max_slots, "capacity": capacity, "max_queue": max_queue,
                 "max_stall": max_stall, "chunk": chunk, "prefix_tokens": prefix_tokens,
                 "host_prefix_tokens": host_prefix_tokens,
                 "step_timeout": step_timeout}  # fmt: skip
        sizing.check(given, model.config.sequence_len)
        self.model = model
        self.sizes = sizing.sizes_for(
            model.engine,
            max_slots,
            capacity,
            (prefix_tokens, host_prefix_tokens),
            tuple(decode_rows),
        )
        self._max_queue, self._max_stall, self._chunk = max_queue, max_stall, chunk
        self._step_timeout = step_timeout
        self._replica: Replica | None = None
        self._state = "loading"
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        self._wake = threading.Condition()
        self._desk = Desk(self._wake)
        self._turn_began: float | None = None
        self._num_failures = 0
        self.on_finish = self._desk.on_finish
        self.on_finish.append(self._finished)
        self.on_turn: list[Callable[[float, int, int], None]] = []

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def state(self) -> str:
        """Whether requests are answered: see `Load`."""
        return self._state

    @property
    def error(self) -> Exception | None:
        """Why it is dead."""
        return self._error

    def start(self, wait: bool = True) -> None:
        """Compiles all programs and begins to take requests.

        Args:
          wait: Return when it is ready; without it requests are refused until then.

        Raises:
          UnavailableError: If the programs cannot be compiled or run; from the cause.
        """
        if self._state == "closed":
            raise UnavailableError("a closed server does not start again; make another")
        if self._thread is None:
            self._thread = start_endless(self._run, "grok1-engine", self._end)
        if wait:
            with self._wake:
                self._wake.wait_for(lambda: self._state not in ("loading", "compiling"))
            if self._state == "dead":
                raise UnavailableError(f"the server cannot start: {self._error}") from self._error

    def close(self, drain: float = 0.0) -> None:
        """Ends the server; requests that still run are cancelled.

        Args:
          drain: Seconds to let them finish before. New ones are refused at once.
        """
        self.drain()
        with self._wake:
            seconds = min(drain, threading.TIMEOUT_MAX)
            self._wake.wait_for(lambda: not self._desk.num_open or self._state == "dead", seconds)
        seconds, thread, self._thread = self._end(), self._thread, None
        if thread is not None:
            thread.join(seconds)

    def _end(self) -> float | None:
        self.leave()
        # A thread that waits for a process that is gone does not end.
        return 1.0 if self._state == "dead" else None

    def leave(self) -> None:
        """Ends the server without waiting for what it does: a step, or a program that compiles."""
        with self._wake:
            if self._state != "dead":
                self._state = "closed"
            self._wake.notify_all()

    def follow(self) -> None:
        """Does what process 0's server does, until that is closed; for the other processes.

        Raises:
          OtherProcessError: If process 0 is gone.
        """
        engine = self.model.engine
        with own_settings():
            follower = Follower(engine.mesh)
            self.sizes, replica = warmup.prepared(
                engine, self.sizes, self._chunk, self._max_stall, self._go_on
            )
            for plan in follower.plans():
                replica.turn(plan)

    def drain(self) -> None:
        """Refuses new requests; those that it has go on."""
        with self._wake:
            if self._state in ("loading", "compiling", "ready"):
                self._state = "draining"
                self._wake.notify_all()

    @keywords.suggesting(GenerationOptions)
    def submit(
        self,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        **options: Unpack[GenerationArguments],
    ) -> Handle:
        """Lets a prompt be continued, and returns at once.

        Args:
          prompt: Text or token ids.
          timeout: Seconds after which the request is given up, waiting or running; None for never.
          **options: Those of `GenerationOptions`, as for `Model.generate`, but `logits_processor`;
            `seed` is one number, and with it the tokens are those of `Model.generate`.

        Returns:
          A handle: `result()`, iteration, `await` and `async for`, `cancel()`.

        Raises:
          ValueError, TypeError: As `Model.generate`.
          QueueFullError: If as many requests wait as may.
          UnavailableError: If the server is not ready, or closed.
        """
        check_timeout(timeout)
        parsed = GenerationOptions(**options)
        if parsed.logits_processor is not None:
            raise ValueError("a server takes no logits_processor: each compiles its own programs")
        model, config = self.model, self.model.config
        check_options(parsed, config, model.tokenizer)
        if parsed.logprobs is not None and parsed.logprobs > self.num_top:
            raise ValueError(
                f"logprobs must be at most {self.num_top} here, found {parsed.logprobs}"
            )
        tokens = prompt_tokens(prompt, model.tokenizer, config, parsed)
        [draws] = parsed.seeds(1)
        allowed = parsed.allowed_mask(config.vocab_size)
        request, builder = as_request(
            tokens, self.room(tokens), parsed, model.tokenizer, draws, allowed
        )
        deadline = None if timeout is None else time.monotonic() + timeout
        handle = Handle(request, builder, deadline)
        self.check([handle])
        self.enqueue([handle])
        return handle

    @property
    def num_top(self) -> int:
        """Most alternatives that a request can ask for."""
        return min(MOST_TOP, self.model.config.vocab_size)

    def room(self, tokens: Sequence[int]) -> int:
        """Returns how many tokens there can be behind a prompt.

        Raises:
          ValueError: If there can be none.
        """
        room = self.sizes.capacity - len(tokens)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens and a slot holds {self.sizes.capacity}, of "
                f"which one must stay free for a new token; shorten the prompt by {1 - room}"
            )
        return room

    @property
    def most_at_once(self) -> int:
        """Most requests that it can have."""
        return self._max_queue + self.sizes.num_slots

    def check(self, handles: Sequence[Handle]) -> None:
        """Checks that what intervenes in the model fits these prompts, and they can ever wait.

        Raises:
          ValueError: If it does not, or they are too many.
        """
        if len(handles) > self.most_at_once:
            raise ValueError(
                f"{len(handles)} requests are asked for at once, of at most {self.most_at_once}"
            )
        for handle in handles:
            request = handle.request
            self.model.engine.check_length(
                len(request.tokens), num_new=max(0, request.max_tokens - 1)
            )

    def enqueue(self, handles: Sequence[Handle]) -> None:
        """Lets requests wait for a slot, all or none of them.

        Raises:
          QueueFullError, UnavailableError: As `submit`.
        """
        for handle in handles:
            request = handle.request
            if request.allowed is not None and request.wishes is None:
                # Rows with tokens of their own run in the program that does everything.
                request.wishes = Wishes()
            handle.on_cancel(self._desk.cancel)
            handle.runs_under(self.model.engine.interventions)
        with self._wake:
            if self._state == "loading" and self._thread is None:
                raise UnavailableError(
                    "the server has not been started: call start(), or use it in a with block"
                )
            if self._state != "ready":
                raise UnavailableError(f"the server is {self._state} and takes no requests")
            load = self.load()
            free = load.num_slots - load.num_running
            if load.num_waiting + len(handles) > self._max_queue + free:
                raise QueueFullError(
                    f"{load.num_waiting} requests wait and at most {self._max_queue} may; "
                    f"{len(handles)} more do not fit",
                    self._retry_after(load),
                )
            self._desk.take(handles)

    def load(self) -> Load:
        """Returns what the server has to do."""
        replica, sizes = self._replica, self.sizes
        if replica is None:
            return Load(self._state, 0, 0, sizes.num_slots, 0.0, 0, 0, 0, {})
        scheduler, store = replica.scheduler, replica.store
        return Load(
            self._state,
            scheduler.num_running,
            scheduler.num_waiting + self._desk.num_new,
            sizes.num_slots,
            self._desk.num_positions / (sizes.num_slots * sizes.capacity),
            store.num_asked if store else 0,
            store.num_found if store else 0,
            store.length if store else 0,
            store.tiers if store else {},
        )

    def _retry_after(self, load: Load) -> int:
        wait = self._desk.mean_seconds * load.num_waiting / load.num_slots
        return int(min(60, max(1, wait)))

    @property
    def is_stuck(self) -> bool:
        """Whether a step has not ended in time."""
        began = self._turn_began
        return began is not None and time.monotonic() - began > self._step_timeout

    # What follows is the engine thread's.

    def _run(self) -> None:
        error: ServingError = UnavailableError("the server was closed")
        try:
            mesh = self.model.engine.mesh
            with own_settings(), Leader.of(mesh, self._lost) as leader:
                self._become("compiling")
                self.sizes, self._replica = warmup.prepared(
                    self.model.engine, self.sizes, self._chunk, self._max_stall, self._go_on
                )
                self._become("ready")
                while self._wait(self._replica):
                    self._turn(self._replica, leader)
        except warmup.GivenUpError:
            pass
        except BaseException as failure:
            _log.exception("the engine's thread has ended")
            self._error = failure if isinstance(failure, Exception) else None
            error = UnavailableError(f"the server has failed: {type(failure).__name__}")
            self._state = "dead"
        finally:
            self._turn_began = None
            self._desk.close(error)

    def _go_on(self) -> bool:
        """Whether there is a reason to compile more; other processes would wait for the rest."""
        return self._state != "closed" or not self.model.engine.setup.is_alone

    def _lost(self, error: Exception) -> None:
        """Ends all requests where another process is gone: the engine's thread may wait for it."""
        with self._wake:
            self._state, self._error = "dead", error
        _log.error("%s", error)
        self._desk.close(UnavailableError(f"the server has failed: {error}"))

    def _become(self, state: str) -> None:
        with self._wake:
            if self._state not in ("draining", "closed", "dead"):
                self._state = state
            self._wake.notify_all()

    def _wait(self, replica: Replica) -> bool:
        """Waits for something to do; False when the server is closed."""
        with self._wake:
            if replica.scheduler.is_idle:
                self._wake.wait_for(
                    lambda: self._state == "closed" or self._desk.is_due, _HEARTBEAT
                )
            return self._state not in ("closed", "dead")

    def _turn(self, replica: Replica, leader: Leader) -> None:
        began = self._turn_began = time.monotonic()
        plan = self._desk.plan(began)
        leader.send(plan)
        try:
            drawn = replica.turn(plan)
        except Exception:
            if not leader.is_alone:
                raise  # the others are somewhere else in the same step, or nowhere
            self._fail(replica)
            return
        finally:
            self._turn_began = None
        self._desk.note(replica.scheduler, drawn, began)
        for tell in self.on_turn:
            tell(time.monotonic() - began, len(drawn), replica.scheduler.num_prompt_tokens)

    def _finished(self, handle: Handle) -> None:
        # A step that went well shows little: it may have had what the next one lacks.
        if handle.error is None:
            self._num_failures = 0

    def _fail(self, replica: Replica) -> None:
        reference = secrets.token_hex(4)
        _log.exception("a step failed, %s", reference)
        self._num_failures += 1
        self._desk.lose(replica.scheduler, StepError(reference))
        if self._num_failures >= _FAILURES:
            raise UnavailableError(f"{_FAILURES} steps failed, and no request was answered between")
