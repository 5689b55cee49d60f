"""The experts of a model on disk, handed to a running program one after another.

What is used often is kept in memory (`expert_cache`). The rest is computed with where the page
cache has it (`mapping`), or, where that cannot be, because a conversion keeps matrices transposed
or the system is old, read into one of two buffers, of which one is filled while the other is used.
"""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from grok1 import mapping, native
from grok1.expert_cache import ExpertCache, Key
from grok1.mapping import Window
from grok1.moe import ExpertWeights
from grok1.reading import Reader, Target
from grok1.storage import StoredArray

_NUM_THREADS = 8
_COPIED_BYTES = 1 << 25  # by one thread at a time


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


class CancelledError(Exception):
    """Fetching was told to stop."""


class _Fetched(NamedTuple):
    """An expert that can be computed with.

    Attributes:
      key: Which one.
      addresses: Of gate, up and down.
      windows: To be closed after its use.
      buffer: To be used again after its use.
    """

    key: Key
    addresses: list[int]
    windows: Sequence[Window] = ()
    buffer: np.ndarray | None = None


class ExpertStore:
    """Hands over experts while a program runs; between `begin` and `end` it has threads.

    Attributes:
      fetch: What programs ask.
      num_bytes: Of one expert in memory.
      lock: To be held from `begin` to `end`: one program at a time.
      is_mapped: Whether what is not held is read from the page cache, without a copy.
      error: What went wrong since `begin`.
    """

    def __init__(self, layers: list[ExpertWeights], allow_mapping: bool = True):
        """Reads nothing yet.

        Args:
          layers: For each layer gate, up and down of all experts, `StoredArray`s of int8.
          allow_mapping: Whether files may be mapped.
        """
        self._layers = layers
        arrays: list[StoredArray] = list(layers[0])
        self._shapes = [array.shape[-2:] for array in arrays]
        self._num_experts = arrays[0].num_matrices
        self.num_bytes = sum(array.nbytes for array in arrays) // self._num_experts
        in_place = not any(array.transposed or array.dtype != "int8" for array in arrays)
        self.is_mapped = allow_mapping and in_place and mapping.is_available()
        self.fetch = native.Fetch(self._fetch)
        self.error: BaseException | None = None
        self.lock = threading.Lock()
        self._cache: ExpertCache[np.ndarray] = ExpertCache(0)
        self._spare: list[np.ndarray] = []
        self._cancelled = threading.Event()
        self._traffic = Traffic()
        self._on_layer: Callable[[int], Any] = lambda _: None
        self._layer = -1
        self._current: _Fetched | None = None
        self._upcoming: tuple[Key, Future[_Fetched]] | None = None
        self._pools: list[ThreadPoolExecutor] = []

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

    def cancel(self) -> None:
        """Has the running program fail at the next expert."""
        self._cancelled.set()

    def end(self) -> None:
        """Ends the threads and gives up what is not held."""
        self._cancelled.set()
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)
        self._pools = []
        if self._upcoming is not None:
            _, future = self._upcoming
            if not future.cancelled() and future.exception() is None:
                self._release(future.result())
        self._upcoming = None
        if self._current is not None:
            self._release(self._current)
            self._current = None
        self._spare = []

    def _fetch(self, layer: int, expert: int, following: int | None) -> list[int] | None:
        """The addresses of an expert, while the next one is got ready; called by programs."""
        # A program asks for an expert when it is done with the one before.
        try:
            if self._current is not None:
                self._release(self._current)
                self._current = None
            if layer != self._layer:
                self._layer = layer
                self._on_layer(layer)
            key = layer, expert
            if self._upcoming is not None and self._upcoming[0] == key:
                (_, future), self._upcoming = self._upcoming, None
                self._current = future.result()
            else:
                self._current = self._prepare(key, ())
            if following is not None:
                after = layer, following
                future = self._pools[0].submit(self._prepare, after, (key,))
                self._upcoming = after, future
            return self._current.addresses
        except BaseException as error:  # across a program's C++ nothing can be raised
            self.error = self.error or error
            return None

    def _prepare(self, key: Key, in_use: Sequence[Key]) -> _Fetched:
        if self._cancelled.is_set():
            raise CancelledError
        self._traffic.num_used += 1
        held = self._cache.use(key)
        if held is not None:
            self._traffic.num_held += 1
            return _Fetched(key, self._addresses(held))
        self._traffic.bytes_read += self.num_bytes
        victim = self._cache.victim(key, in_use)
        if victim != key:
            buffer = self._new_buffer() if victim is None else self._cache.take(victim)
            self._fill(key, buffer)
            self._cache.put(key, buffer)
            return _Fetched(key, self._addresses(buffer))
        if self.is_mapped:
            return self._map(key)
        buffer = self._spare.pop() if self._spare else self._new_buffer()
        self._read(key, buffer)
        return _Fetched(key, self._addresses(buffer), buffer=buffer)

    def _release(self, fetched: _Fetched) -> None:
        for window in fetched.windows:
            window.close()
        if fetched.buffer is not None:
            self._spare.append(fetched.buffer)

    def _new_buffer(self) -> np.ndarray:
        return np.empty(self.num_bytes, np.int8)

    def _matrices(self, buffer: np.ndarray) -> list[np.ndarray]:
        """Gate, up and down in a buffer, each `[1, K, N]`."""
        sizes = [rows * columns for rows, columns in self._shapes]
        parts = np.split(buffer, np.cumsum(sizes)[:-1])
        return [part.reshape(1, *shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _addresses(self, buffer: np.ndarray) -> list[int]:
        return [matrix.ctypes.data for matrix in self._matrices(buffer)]

    def _fill(self, key: Key, buffer: np.ndarray) -> None:
        """Reads an expert into a buffer of `num_bytes`."""
        if not self.is_mapped:
            self._read(key, buffer)
            return
        # By way of a window: the page cache then has it in huge pages, which is what serves the
        # next to map the same file, and a plain read would have left it in small ones.
        mapped = self._map(key)
        try:
            jobs = []
            for window, matrix in zip(mapped.windows, self._matrices(buffer), strict=True):
                source, target = window.bytes(), matrix.reshape(-1)
                for start in range(0, len(target), _COPIED_BYTES):
                    part = slice(start, start + _COPIED_BYTES)
                    jobs.append((target[part], source[part]))
            for _ in self._pools[1].map(lambda job: np.copyto(*job), jobs):
                pass
            del jobs, source
        finally:
            self._release(mapped)

    def _read(self, key: Key, buffer: np.ndarray) -> None:
        layer, expert = key

        def check(_: int) -> None:
            if self._cancelled.is_set():
                raise CancelledError

        # The pages may be those of another expert's file, or serve another process.
        with Reader(check, keep_pages=True) as reader:
            matrices = self._matrices(buffer)
            for array, matrix in zip(self._layers[layer], matrices, strict=True):
                bounds = ((expert, expert + 1), *((0, size) for size in matrix.shape[1:]))
                reader.submit(array, [Target(bounds, matrix)])
            reader.wait()

    def _map(self, key: Key) -> _Fetched:
        layer, expert = key
        windows: list[Window] = []
        try:
            for array in self._layers[layer]:
                size = array.nbytes // array.num_matrices
                if len(array.parts) == 1:
                    file, span = array.parts[0]
                    windows.append(Window(file, span.offset + expert * size, size))
                else:
                    file, span = array.parts[expert]
                    windows.append(Window(file, span.offset, size))
            blocks = [block for window in windows for block in window.blocks()]
            for _ in self._pools[1].map(self._populate, blocks):
                pass
        except BaseException:
            for window in windows:
                window.close()
            raise
        return _Fetched(key, [window.address for window in windows], windows)

    def _populate(self, block: tuple[Window, int]) -> None:
        if self._cancelled.is_set():
            raise CancelledError
        window, place = block
        window.populate(place)
