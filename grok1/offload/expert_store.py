"""The experts of a model on disk, handed over one after another while it runs.

What is used often is kept in memory (`expert_cache`). The rest is computed with where the page
cache has it (`mapping`), or, where that cannot be, because a conversion keeps matrices transposed,
the system is old or the weights go on to another device, read into one of two buffers, of which one
is filled while the other is used.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from grok1.checkpoint import mapping
from grok1.checkpoint.blocks import Target
from grok1.checkpoint.mapping import Window
from grok1.checkpoint.reading import Reader
from grok1.checkpoint.storage import StoredArray
from grok1.checkpoint.tensor_file import DTYPES
from grok1.offload.buffers import Buffer, PartOfExpert, pageable_buffer
from grok1.offload.expert_cache import ExpertCache, Key
from grok1.offload.stored_experts import check_mapped, check_of, place_of
from grok1.ops.cpu import bindings

_NUM_THREADS = 8
_COPIED_BYTES = 1 << 25  # by one thread at a time
# Of a block that goes on to a device. An expert is few blocks for many threads: they are to end at
# the same time, and the smaller a block, the more of its time is the interpreter's.
_MOST_SENT_BYTES = 1 << 24


@dataclasses.dataclass
class Traffic:
    """What some steps have fetched.

    Attributes:
      steps: How many: chunks of prompts, or tokens.
      seconds: How long they took in all.
      bytes_read: Of experts' weights, that were not held in memory.
      num_used: Experts used, each counted once a layer and step.
      num_held: How many of these were held in memory.
    """

    steps: int = 0
    seconds: float = 0.0
    bytes_read: int = 0
    num_used: int = 0
    num_held: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the experts used that were held in memory."""
        return self.num_held / max(1, self.num_used)


class _Fetched(NamedTuple):
    """An expert that can be computed with.

    Attributes:
      buffer: What holds it, if it was read.
      windows: On its files, if they are mapped; to be closed after its use.
      is_spare: Whether the buffer may be used for another expert afterwards.
      number: What the reader is to be waited for, if it is still being read.
    """

    buffer: Buffer | None
    windows: Sequence[Window] = ()
    is_spare: bool = False
    number: int = 0

    @property
    def addresses(self) -> list[int]:
        """Of what is fetched of gate, up and down."""
        if self.buffer is None:
            return [window.address for window in self.windows]
        return [matrix.ctypes.data for matrix in self.buffer.matrices]


class _Plan(NamedTuple):
    """Where an expert will be.

    Attributes:
      held: What holds it already.
      is_kept: Whether it is to be held.
      victim: Which is to leave for it; None if there is room.
    """

    held: Buffer | None = None
    is_kept: bool = False
    victim: Key | None = None


class ExpertStore:
    """Hands over experts while a program runs; between `begin` and `end` it has threads.

    Attributes:
      fetch: What programs of a CPU ask.
      num_bytes: Of one expert in memory.
      lock: To be held from `begin` to `end`: one program at a time.
      is_mapped: Whether what is not held is read from the page cache, without a copy.
      error: What went wrong since `begin`.
    """

    def __init__(
        self,
        layers: list[list[StoredArray]],
        allow_mapping: bool = True,
        new_buffer: Callable[[Sequence[PartOfExpert]], Buffer] = pageable_buffer,
        new_passing: Callable[[Sequence[PartOfExpert]], Buffer] | None = None,
    ):
        """Reads nothing yet.

        Args:
          layers: For each layer what is fetched of gate, up and down of all experts.
          allow_mapping: Whether files may be mapped.
          new_buffer: Allocates the memory that experts are read into.
          new_passing: The same on the device, for each expert that is not to be held here; None
            for two of the host's in turn.
        """
        self._layers = layers
        arrays = layers[0]
        parts = [PartOfExpert(array.shape[-2:], DTYPES[array.dtype]) for array in arrays]
        self._new_buffer = functools.partial(new_buffer, parts)
        self._new_passing = functools.partial(new_passing, parts) if new_passing else None
        self._num_experts = arrays[0].num_matrices
        self.num_bytes = sum(array.nbytes for array in arrays) // self._num_experts
        in_place = not any(array.transposed for array in arrays)
        self.is_mapped = allow_mapping and in_place and mapping.is_available()
        self.fetch = bindings.Fetch(self._fetch)
        self.error: BaseException | None = None
        self.lock = threading.Lock()
        self._cache: ExpertCache[Buffer] = ExpertCache(0)
        self._spare: list[Buffer] = []
        self._looked_at: set[Key] = set()
        self._cancelled = threading.Event()
        self._traffic = Traffic()
        self._on_layer: Callable[[int], Any] = lambda _: None
        self._layer = -1
        self._current: _Fetched | None = None
        self._upcoming: tuple[Key, Future[_Fetched]] | None = None
        self._pools: list[ThreadPoolExecutor] = []
        self._reader: Reader | None = None

    @property
    def num_all(self) -> int:
        """Experts of the model."""
        return len(self._layers) * self._num_experts

    @property
    def num_held(self) -> int:
        """Experts in memory now."""
        return len(self._cache)

    @property
    def capacity(self) -> int:
        """Most experts in memory."""
        return self._cache.capacity

    def resize(self, capacity: int) -> None:
        """Holds this many experts from now on, and lets go of more; not while a program runs."""
        self._cache.shrink(min(capacity, self.num_all))

    def begin(self, traffic: Traffic, on_layer: Callable[[int], Any] = lambda _: None) -> None:
        """Gets ready for a step of the model.

        Args:
          traffic: What is fetched is added to it.
          on_layer: Called, on a thread of XLA's, with each layer when its first expert is wanted.
        """
        self.error = None
        self._cancelled.clear()
        self._traffic, self._on_layer = traffic, on_layer
        self._layer = -1
        self._cache.step()
        self._pools = [
            ThreadPoolExecutor(1, "grok1-fetch"),
            ThreadPoolExecutor(_NUM_THREADS, "grok1-mapping"),
        ]
        if self._reader is None:
            # The pages may be those of another expert's file, or serve another process.
            name = "grok1-reader" if self._new_passing is None else "grok1-experts"
            self._reader = Reader(lambda _: self._check_cancelled(), keep_pages=True, name=name)

    def cancel(self) -> None:
        """Has the running program fail at the next expert, and what is being read be given up."""
        self._cancelled.set()
        if self._reader is not None:
            self._reader.stop()

    def end(self) -> None:
        """Ends the threads and gives up what is not held.

        Those that read for a device stay for the next step if nothing has gone wrong: sixteen take
        a millisecond to begin.
        """
        is_done = not self._cancelled.is_set() and self._upcoming is None
        stays = is_done and self._new_passing is not None
        self._cancelled.set()
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)
        self._pools = []
        if self._reader is not None and not stays:
            self._reader.close()
            self._reader = None
        if self._upcoming is not None:
            _, future = self._upcoming
            if not future.cancelled() and future.exception() is None:
                self._release(future.result())
        self._upcoming = None
        if self._current is not None:
            self._release(self._current)
            self._current = None
        self._spare = []

    def check(self) -> None:
        """Checks that the files of the expert handed over last are as they were, if it is mapped.

        Raises:
          CheckpointError: If what was computed with may have been written to meanwhile.
        """
        for window in self._current.windows if self._current is not None else ():
            window.check()

    def holds(self, layer: int, expert: int) -> bool:
        """Whether an expert is in memory, so that to `take` it takes no time."""
        return (layer, expert) in self._cache

    def take(
        self, layer: int, expert: int, following: int | None, in_use: Sequence[Key] = ()
    ) -> tuple[Buffer, bool]:
        """Returns an expert, good until the next call, while another one is got ready.

        Args:
          layer: Index of the layer.
          expert: Which of its experts.
          following: The one that will be wanted next, if any.
          in_use: Others that are still in use, of those that were held when they were taken.

        Returns:
          The expert, and whether it is held: then it is good as long as it is said to be in use.

        Raises:
          CheckpointError: If it cannot be read.
          CancelledError: After `cancel`.
          ValueError: If files are mapped, which leaves no buffer.
        """
        fetched = self._next(layer, expert, following, in_use)
        if fetched.buffer is None:
            raise ValueError("experts are mapped; make the store with allow_mapping=False")
        return fetched.buffer, self.holds(layer, expert)

    def count_held(self, layer: int) -> None:
        """Counts an expert of a layer that was used without this store.

        Raises:
          CancelledError: After `cancel`.
        """
        self._check_cancelled()
        self._say_layer(layer)
        self._traffic.num_used += 1
        self._traffic.num_held += 1

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise CancelledError

    def _fetch(self, layer: int, expert: int, following: int | None) -> list[int] | None:
        """The addresses of an expert; called by programs."""
        try:
            return self._next(layer, expert, following).addresses
        except BaseException as error:  # across a program's C++ nothing can be raised
            self.error = self.error or error
            return None

    def _next(
        self, layer: int, expert: int, following: int | None, in_use: Sequence[Key] = ()
    ) -> _Fetched:
        # Whoever asks for an expert is done with the one before.
        self.check()
        if self._current is not None:
            self._release(self._current)
            self._current = None
        self._say_layer(layer)
        key, after = (layer, expert), None if following is None else (layer, following)
        if self._upcoming is not None and self._upcoming[0] == key:
            (_, future), self._upcoming = self._upcoming, None
            self._current = current = future.result()
        else:
            self._current = current = self._prepare(key, self._plan(key, in_use))
        plan = None if after is None else self._plan(after, (key, *in_use))
        if after is not None and plan is not None and self._is_at_once(plan):
            # Those who read go on with it when they are done with this one.
            future = Future()
            future.set_result(self._prepare(after, plan))
            self._upcoming, plan = (after, future), None
        if current.number:
            assert self._reader is not None  # between `begin` and `end` there is one
            self._reader.wait(current.number)
        if after is not None and plan is not None:
            self._upcoming = after, self._pools[0].submit(self._prepare, after, plan)
        return current

    def _is_at_once(self, plan: _Plan) -> bool:
        """Whether `_prepare` waits for nothing."""
        is_passing = self._new_passing is not None and not self.is_mapped and not plan.is_kept
        return plan.held is not None or is_passing

    def _say_layer(self, layer: int) -> None:
        if layer != self._layer:
            self._layer = layer
            self._on_layer(layer)

    def _plan(self, key: Key, in_use: Sequence[Key]) -> _Plan:
        """Counts a use, and says where the expert will be."""
        self._check_cancelled()
        self._traffic.num_used += 1
        held = self._cache.use(key)
        if held is not None:
            self._traffic.num_held += 1
            return _Plan(held)
        self._traffic.bytes_read += self.num_bytes
        victim = self._cache.victim(key, in_use)
        return _Plan(None, victim != key, victim)

    def _prepare(self, key: Key, plan: _Plan) -> _Fetched:
        self._check_cancelled()
        if plan.held is not None:
            return _Fetched(plan.held)
        if plan.is_kept:
            victim = plan.victim
            buffer = self._new_buffer() if victim is None else self._cache.take(victim)
            self._fill(key, buffer)
            self._cache.put(key, buffer)
            return _Fetched(buffer)
        if self.is_mapped:
            return self._map(key)
        if self._new_passing is not None:
            buffer = self._new_passing()
            return _Fetched(buffer, number=self._submit(key, buffer))
        buffer = self._spare.pop() if self._spare else self._new_buffer()
        self._read(key, buffer)
        return _Fetched(buffer, is_spare=True)

    def _release(self, fetched: _Fetched) -> None:
        for window in fetched.windows:
            window.close()
        if fetched.is_spare and fetched.buffer is not None:
            self._spare.append(fetched.buffer)

    def _fill(self, key: Key, buffer: Buffer) -> None:
        """Reads an expert that is to be kept."""
        if not self.is_mapped:
            self._read(key, buffer)
            return
        # By way of a window: the page cache then has it in huge pages, which is what serves the
        # next to map the same file, and a plain read would have left it in small ones.
        mapped = self._map(key)
        try:
            jobs = []
            for window, matrix in zip(mapped.windows, buffer.matrices, strict=True):
                source, target = window.bytes(), matrix.reshape(-1).view(np.int8)
                for start in range(0, len(target), _COPIED_BYTES):
                    part = slice(start, start + _COPIED_BYTES)
                    jobs.append((target[part], source[part]))
            for _ in self._pools[1].map(lambda job: np.copyto(*job), jobs):
                pass
            for window in mapped.windows:
                window.check()
        finally:
            self._release(mapped)

    def _read(self, key: Key, buffer: Buffer) -> None:
        assert self._reader is not None  # between `begin` and `end` there is one
        self._reader.wait(self._submit(key, buffer))

    def _submit(self, key: Key, buffer: Buffer) -> int:
        """Begins to read an expert; returns what to wait for."""
        layer, expert = key
        reader, number = self._reader, 0
        assert reader is not None  # between `begin` and `end` there is one
        most = None
        if buffer.copier is not None:
            of_thread = -(-self.num_bytes // reader.num_threads)
            most = -(-of_thread // -(-of_thread // _MOST_SENT_BYTES))
        for array, matrix in zip(self._layers[layer], buffer.matrices, strict=True):
            bounds = ((expert, expert + 1), *((0, size) for size in matrix.shape[1:]))
            targets = [Target(bounds, matrix, buffer.copier)]
            number = reader.submit(array, targets, check_of(array, expert), most_bytes=most)
        return number

    def _map(self, key: Key) -> _Fetched:
        layer, expert = key
        windows: list[Window] = []
        try:
            for array in self._layers[layer]:
                size = array.nbytes // array.num_matrices
                windows.append(Window(*place_of(array, expert), size))
            blocks = [block for window in windows for block in window.blocks()]
            for _ in self._pools[1].map(self._populate, blocks):
                pass
            # Once: a file that has changed since is refused.
            if key not in self._looked_at:
                check_mapped(self._layers[layer], expert, windows)
                self._looked_at.add(key)
        except BaseException:
            for window in windows:
                window.close()
            raise
        return _Fetched(None, windows)

    def _populate(self, block: tuple[Window, int]) -> None:
        self._check_cancelled()
        window, place = block
        window.populate(place)
