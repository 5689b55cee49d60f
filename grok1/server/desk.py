"""The requests of a server: who waits, who runs, and who is told what.

Callers take requests in and cancel them, from any thread; all else is the engine thread's, which
makes the plan of each turn and hands over what came of it.
"""

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from grok1.generate.prefix import Tier
from grok1.generate.request import Request, Sampled
from grok1.generate.scheduler import Scheduler
from grok1.server.errors import DeadlineError, ServingError, SlowReaderError
from grok1.server.handle import Handle
from grok1.server.replica import Plan


class _Held(NamedTuple):
    number: int
    handle: Handle


class Load(NamedTuple):
    """What a server has to do.

    Attributes:
      state: "loading", "compiling", "ready", "draining", "closed" or "dead".
      num_running: Requests that have a slot.
      num_waiting: Requests that wait for one.
      num_slots: Slots.
      filled: Share of the slots' positions that running requests have asked for.
      prefix_asked: Tokens of prompts that could have been found from earlier ones.
      prefix_found: Those that were.
      prefix_block: Tokens of a block of what is kept of prompts; 0 where nothing is kept.
      prefix_tiers: The places for such blocks, by name: "device" and "host".
    """

    state: str
    num_running: int
    num_waiting: int
    num_slots: int
    filled: float
    prefix_asked: int
    prefix_found: int
    prefix_block: int
    prefix_tiers: Mapping[str, Tier]


class Desk:
    """All requests that are not over.

    Attributes:
      on_finish: Called with each handle that is over.
    """

    def __init__(self, wake: threading.Condition):
        """Takes what is notified when there is something to do, or a request is over."""
        self._wake = wake
        self._inbox: list[Handle] = []
        self._to_cancel: list[tuple[Handle, ServingError]] = []
        self._handles: dict[Request, _Held] = {}
        self._over: list[int] = []  # numbers of requests that the scheduler is still to be told of
        self._queued: deque[Handle] = deque()
        self._numbers = itertools.count()
        self._seconds = deque([1.0], maxlen=64)  # of the last requests
        self.on_finish: list[Callable[[Handle], None]] = []

    @property
    def num_new(self) -> int:
        """Requests that are in no plan yet."""
        return len(self._inbox)

    @property
    def num_open(self) -> int:
        """Requests that are not over."""
        return len(self._inbox) + len(self._handles)

    @property
    def num_positions(self) -> int:
        """Positions of slots that requests may come to fill."""
        return sum(
            len(request.tokens) + request.max_tokens
            for request, held in list(self._handles.items())
            if held.handle.times.admitted
        )

    @property
    def mean_seconds(self) -> float:
        """How long the last requests took."""
        return sum(self._seconds) / len(self._seconds)

    @property
    def is_due(self) -> bool:
        """Whether a plan would say anything."""
        return bool(self._inbox or self._to_cancel or self._over)

    def take(self, handles: Sequence[Handle]) -> None:
        """Lets requests wait for a slot."""
        with self._wake:
            self._inbox += handles
            self._wake.notify_all()

    def cancel(self, handle: Handle, error: ServingError) -> None:
        """Ends a request with an error, at the next turn."""
        with self._wake:
            self._to_cancel.append((handle, error))
            self._wake.notify_all()

    # What follows is the engine thread's.

    def plan(self, now: float) -> Plan:
        """Returns the plan of the next turn, and ends what is cancelled or too late."""
        with self._wake:
            inbox, self._inbox = dict.fromkeys(self._inbox), []
            to_end, self._to_cancel = self._to_cancel, []
        for handle in [*inbox, *(held.handle for held in self._handles.values())]:
            if handle.deadline is not None and now > handle.deadline:
                seconds = handle.deadline - handle.times.submitted
                words = f"the request was not over after its {seconds:.1f} s"
                to_end.append((handle, DeadlineError(words)))
        for handle, _ in to_end:
            # Then it never reaches the scheduler.
            inbox.pop(handle, None)
        self._end(to_end)
        submitted = {}
        for handle in inbox:
            number = next(self._numbers)
            self._handles[handle.request] = _Held(number, handle)
            self._queued.append(handle)
            submitted[number] = handle.request
        over, self._over = self._over, []
        return Plan(submitted, over)

    def note(
        self, scheduler: Scheduler, drawn: Sequence[tuple[Request, Sampled]], began: float
    ) -> None:
        """Hands over what came of a turn.

        Args:
          scheduler: What made it.
          drawn: The tokens.
          began: When it began.
        """
        now = time.monotonic()
        while len(self._queued) > scheduler.num_waiting:
            self._queued.popleft().stamp(admitted=began)
        over: list[Handle] = []
        for request in scheduler.prefilled:
            if request in self._handles:
                handle = self._handles[request].handle
                handle.stamp(prefilled=now)
                if not request.max_tokens:
                    over.append(handle)
        touched = []
        for request, sampled in drawn:
            if request in self._handles:
                handle = self._handles[request].handle
                self._push(handle, sampled, now)
                touched.append(handle)
        over += [
            held.handle
            for request, held in self._handles.items()
            if request.error is not None or held.handle.builder.stop_reason is not None
        ]
        self._end([(handle, None) for handle in over], touched)

    def lose(self, scheduler: Scheduler, error: ServingError) -> None:
        """Ends every request that had a slot, with an error."""
        waiting = set(scheduler.waiting)
        lost = [held.handle for request, held in self._handles.items() if request not in waiting]
        self._end([(handle, error) for handle in lost])

    def close(self, error: ServingError) -> None:
        """Ends every request with an error."""
        with self._wake:
            left = [*self._inbox, *(held.handle for held in self._handles.values())]
            self._inbox = []
            self._wake.notify_all()
        self._end([(handle, error) for handle in left])

    def _push(self, handle: Handle, sampled: Sampled, now: float) -> None:
        if handle.builder.stop_reason is not None:
            return  # a stop string has ended it within the steps of this turn
        if not handle.times.first:
            handle.stamp(first=now)
        handle.push(sampled)
        if handle.most_pending is not None and handle.num_pending > handle.most_pending:
            words = f"{handle.num_pending} tokens wait to be read; the request was cancelled"
            self.cancel(handle, SlowReaderError(words))

    def _end(
        self, over: Sequence[tuple[Handle, ServingError | None]], touched: Sequence[Handle] = ()
    ) -> None:
        """Finishes handles, and wakes who waits for these or for others."""
        for handle, error in over:
            if handle.is_over:
                continue
            for part in handle.request.prompt_scores if error is None else ():
                part.on_host()
            handle.finish(error)
            held = self._handles.pop(handle.request, None)
            if held is not None:
                # The next turn takes its slot, if it still has one.
                self._over.append(held.number)
            if not handle.times.admitted and handle in self._queued:
                self._queued.remove(handle)
            self._seconds.append(handle.times.last - handle.times.submitted)
            for tell in self.on_finish:
                tell(handle)
        loops: dict[Any, list[Handle]] = {}
        for handle in dict.fromkeys([*touched, *(handle for handle, _ in over)]):
            if (loop := handle.wake()) is not None:
                loops.setdefault(loop, []).append(handle)
        for loop, handles in loops.items():
            # A loop that is closed has nobody who waits.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_wake_all, handles)
        if over:
            with self._wake:
                self._wake.notify_all()


def _wake_all(handles: Sequence[Handle]) -> None:
    for handle in handles:
        handle.wake_in_loop()
