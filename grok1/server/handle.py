"""A request as its caller sees it: text as it comes, and the completion, in threads and asyncio."""

import asyncio
import math
import numbers
import threading
import time
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from typing import Any, NamedTuple

from grok1.generate.completion import Completion, CompletionBuilder
from grok1.generate.request import Request, Sampled
from grok1.generate.requests import unreached
from grok1.keywords import shown, warn
from grok1.server.errors import CancelledError, NoTokenError, ServingError


class Piece(NamedTuple):
    """What one token adds.

    Attributes:
      text: Text that has become certain, perhaps none.
      sampled: The token.
    """

    text: str
    sampled: Sampled


class Times(NamedTuple):
    """When what happened, in seconds of `time.monotonic`; 0 for what did not.

    Attributes:
      submitted: It was submitted.
      admitted: It got a slot.
      prefilled: Its prompt had been run.
      first: Its first token came.
      last: Its last token came, or it ended otherwise.
    """

    submitted: float = 0.0
    admitted: float = 0.0
    prefilled: float = 0.0
    first: float = 0.0
    last: float = 0.0


def check_timeout(seconds: Any) -> None:
    """Checks a time to wait: of NaN nothing is ever late.

    Raises:
      TypeError: If it is neither a number nor None.
    """
    is_number = isinstance(seconds, numbers.Real) and not isinstance(seconds, bool)
    if seconds is not None and not (is_number and not math.isnan(seconds)):
        raise TypeError(f"timeout must be a number of seconds, or None, found {shown(seconds)}")


class Handle:
    """One request of a `Server`.

    Wait for its `result`, iterate over its text, or do either in asyncio: `await handle`,
    `async for text in handle`. It is cancelled with `cancel`, also from another thread.

    Attributes:
      request: What the scheduler knows of it.
      times: When what happened.
      deadline: When it is given up, in seconds of `time.monotonic`; None for never.
      most_pending: So many tokens that nobody has taken end it; None for any number.
    """

    def __init__(
        self,
        request: Request,
        builder: CompletionBuilder,
        deadline: float | None = None,
        most_pending: int | None = None,
    ):
        self.request, self.builder = request, builder
        self.deadline, self.most_pending = deadline, most_pending
        self.times = Times(submitted=time.monotonic())
        self._pieces: list[Piece] = []
        self._taken = 0
        self._error: ServingError | None = None
        self._is_over = False
        self._changed = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._woken: asyncio.Event | None = None
        self._cancel: Any = None
        self._interventions: Sequence[Any] = ()

    @property
    def is_over(self) -> bool:
        """Whether no more tokens come."""
        return self._is_over

    @property
    def error(self) -> Exception | None:
        """Why there is no completion, once it is over."""
        return self._error

    @property
    def num_reused(self) -> int:
        """Tokens of the prompt that were not run but found from an earlier one."""
        return self.request.num_reused

    @property
    def num_pending(self) -> int:
        """Tokens that came and were not taken."""
        return len(self._pieces) - self._taken

    @property
    def warnings(self) -> list[str]:
        """What changed less than was asked for, once it has a completion; mostly nothing.

        That is an intervention that names a position which was to be generated and was not.
        """
        told = (
            unreached(one, self.request, self.builder, "the text") for one in self._interventions
        )
        return [words for words in told if words is not None]

    def cancel(self) -> None:
        """Ends the request: its slot is free within a step, and no more tokens come."""
        if self._cancel is not None:
            self._cancel(self, CancelledError("the request was cancelled"))

    def result(self, timeout: float | None = None) -> Completion:
        """Waits for the end.

        Args:
          timeout: Seconds to wait at most.

        Returns:
          The completion; its text is empty where only the prompt was run.

        Raises:
          ServingError: If it has none; a subclass says why.
          TypeError: If the timeout is no number.
          TimeoutError: If it is not over in time; it goes on.
        """
        check_timeout(timeout)
        seconds = None if timeout is None else min(timeout, threading.TIMEOUT_MAX)
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_over, seconds):
                raise TimeoutError(f"the request is not over after {timeout} s; it goes on")
        return self._result()

    def __iter__(self) -> Iterator[str]:
        """Yields text as it becomes certain; raises as `result`."""
        at = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda at=at: self._is_over or len(self._pieces) > at)
            new = self._pieces[at:]
            at += len(new)
            self._taken = at
            yield from (piece.text for piece in new if piece.text)
            if self._is_over and at == len(self._pieces):
                self._result()
                return

    def __await__(self) -> Generator[Any, None, Completion]:
        return self.wait().__await__()

    async def wait(self) -> Completion:
        """As `result`, in asyncio; if the task is cancelled, so is the request."""
        await self.ended()
        return self._result()

    async def ended(self) -> None:
        """Waits for the end as `wait`, and warns of nothing.

        Raises:
          ServingError: As `result`.
        """
        try:
            async for _ in self.groups():
                pass
        except asyncio.CancelledError:
            self.cancel()
            raise
        if self.error is not None:
            raise self.error

    async def __aiter__(self) -> AsyncIterator[str]:
        async for group in self.groups():
            for piece in group:
                if piece.text:
                    yield piece.text
        self._result()

    async def groups(self) -> AsyncIterator[list[Piece]]:
        """Yields what has come since the last time, until the request is over."""
        # That of an earlier wait may have ended, and would be told in place of this one.
        if self._woken is None or self._loop is not asyncio.get_running_loop():
            self._woken = asyncio.Event()
            self._loop = asyncio.get_running_loop()
        while True:
            self._woken.clear()
            is_over = self._is_over
            new = self._pieces[self._taken :]
            self._taken += len(new)
            if new:
                yield new
            elif is_over:
                return
            else:
                await self._woken.wait()

    def _result(self) -> Completion:
        if self.error is not None:
            raise self.error
        for words in self.warnings:
            warn(words)
        return self.builder.build()

    # What follows is the engine thread's.

    def push(self, sampled: Sampled) -> None:
        """Takes the next token."""
        self._pieces.append(Piece(self.builder.push(sampled), sampled))

    def stamp(self, **times: float) -> None:
        """Notes when something happened."""
        self.times = self.times._replace(**times)

    def finish(self, error: ServingError | None = None) -> None:
        """Ends the request, with an error or as the builder has it."""
        if error is None and (cause := self.request.error) is not None:
            error = NoTokenError(str(cause))
        self._error = error
        self.stamp(last=time.monotonic())
        self._is_over = True

    def wake(self) -> asyncio.AbstractEventLoop | None:
        """Wakes threads that wait; returns the loop in which to call `wake_in_loop`, if any."""
        with self._changed:
            self._changed.notify_all()
        return self._loop

    def wake_in_loop(self) -> None:
        """Wakes the task that waits."""
        if self._woken is not None:
            self._woken.set()

    def on_cancel(self, cancel: Any) -> None:
        """Tells whom `cancel` calls, with the handle and the error."""
        self._cancel = cancel

    def runs_under(self, interventions: Sequence[Any]) -> None:
        """Tells what changes the model that runs it."""
        self._interventions = interventions
