"""Arrays on disk to the memory of accelerators, piece by piece, reading and transfer side by side.

Where CUDA's driver can be asked, the threads that read send each piece to its place in an array
that is there already (`DirectCarrier`). Elsewhere (`Carrier`) a piece is read into one of several
slots of pinned memory, each by a thread of `reading`; out of it the device copies the piece by
itself, and a program puts it into its place. Several pieces are read while one is in transfer, so
that neither waits for the other.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from grok1.checkpoint.blocks import Bounds, Check, Target
from grok1.checkpoint.pinned import has_pinned_memory, pinned, sent
from grok1.checkpoint.reading import Reader
from grok1.checkpoint.storage import StoredArray
from grok1.machine.cuda_driver import Copier, place_of
from grok1.machine.jax_settings import own_settings
from grok1.machine.processor import available_cores

_STAGING_BYTES = 3 << 27  # of all slots, for all devices
_NUM_SLOTS = 12  # of which
_IN_TRANSFER = 2  # hold what takes memory on the device a second time
_MOST_COMPILED = 8  # programs at a time


@dataclasses.dataclass(eq=False)
class Stack:
    """An array on a device that is filled in pieces.

    Attributes:
      shape: Its shape, which it has from the start: to reshape it would be to copy it.
      layer_shape: Shape of a layer: without the axis for the layers, if it has one.
      dtype: Its type.
      device: Where it is.
      array: The array, once something is in its place.
    """

    shape: tuple[int, ...]
    layer_shape: tuple[int, ...]
    dtype: np.dtype
    device: Any
    array: jax.Array | None = None

    def place(self, layer: int, part: "Part") -> np.ndarray:
        """Where in the array a part of a layer begins."""
        lead = [layer] if len(self.shape) > len(self.layer_shape) else []
        return np.array([*lead, *(start for start, _ in part.bounds)], np.int32)

    def index(self, layer: int, part: "Part") -> tuple[int | slice, ...]:
        """Where in the array a part of a layer is."""
        lead = [layer] if len(self.shape) > len(self.layer_shape) else []
        return (*lead, *(slice(*pair) for pair in part.bounds))


class Part(NamedTuple):
    """Bounds within a layer of stacks of one shape."""

    bounds: tuple[Bounds, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its size along each axis."""
        return tuple(stop - start for start, stop in self.bounds)


class Load(NamedTuple):
    """A part of a layer that is to come into stacks.

    Attributes:
      array: The layer on disk.
      stacks: Of one call of `AnyCarrier.stacks`.
      layer: Which layer of them.
      part: One of `AnyCarrier.parts`.
      bounds: Of the part in the array, for each stack.
      check: As for `Reader.submit`.
    """

    array: StoredArray
    stacks: Sequence[Stack]
    layer: int
    part: Part
    bounds: Sequence[tuple[Bounds, ...]]
    check: Check | None


class _Slot(NamedTuple):
    """Memory for a piece for each device: to be written to, and as it is sent."""

    views: list[np.ndarray]
    arrays: list[Any]


class _Piece(NamedTuple):
    """What is being read into a slot."""

    number: int
    slot: _Slot
    stacks: Sequence[Stack]
    parts: list[np.ndarray]
    place: np.ndarray


class Programs:
    """What is compiled while something is read; a context, at whose end nothing is being compiled.

    What was compiled once serves the next load of the process.
    """

    _compiled: ClassVar[dict[tuple, Any]] = {}

    def __init__(self) -> None:
        """Starts no thread yet."""
        self._pool = ThreadPoolExecutor(min(_MOST_COMPILED, available_cores()), "grok1-compiler")
        self._futures: dict[tuple, Future] = {}

    def __enter__(self) -> "Programs":
        return self

    def __exit__(self, *exception) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def empty(self, stack: Stack) -> Future:
        """Begins to compile what makes a stack's array, unless that has begun."""
        return self.get(compiled_empty, stack.shape, stack.dtype, stack.device)

    def get(self, compiled: Callable, *arguments: Any) -> Future:
        """Begins to compile a program, unless that has begun."""
        key = compiled, *arguments
        if key not in self._futures:
            self._futures[key] = self._pool.submit(self._get, key)
        return self._futures[key]

    def _get(self, key: tuple) -> Any:
        if key not in self._compiled:
            compiled, *arguments = key
            with own_settings():
                self._compiled[key] = compiled(*arguments)
        return self._compiled[key]


class AnyCarrier(Protocol):
    """What fills stacks of some devices."""

    def stacks(
        self, shape: tuple[int, ...], layer_shape: tuple[int, ...], dtype: np.dtype
    ) -> list[Stack]:
        """Returns one for each device; begins to compile what it needs.

        Args:
          shape: Of each.
          layer_shape: The same, or without the first axis, if that is for the layers.
          dtype: Of its elements.
        """
        ...

    def parts(self, stack: Stack) -> Iterator[Part]:
        """Yields the parts of a layer that are filled one by one, in order."""
        ...

    def carry(self, load: Load) -> None:
        """Has a part of each stack's layer filled; waits while too much is under way.

        Raises:
          CheckpointError: If something asked for earlier could not be read; what `check` raises.
        """
        ...

    def finish(self) -> None:
        """Waits until all is in its place.

        Raises:
          CheckpointError: As `carry`.
        """
        ...


class DirectCarrier:
    """An `AnyCarrier` whose threads that read send what they read."""

    def __init__(self, reader: Reader, copiers: Mapping[Any, Copier], programs: Programs):
        """Takes no memory yet.

        Args:
          reader: What reads.
          copiers: What copies to each device; each gets a part of every array.
          programs: Has compiled what makes the arrays.
        """
        self._reader, self._copiers, self._programs = reader, copiers, programs
        self._places: dict[Stack, np.ndarray] = {}

    def stacks(
        self, shape: tuple[int, ...], layer_shape: tuple[int, ...], dtype: np.dtype
    ) -> list[Stack]:
        """As `AnyCarrier.stacks`."""
        stacks = [Stack(shape, layer_shape, dtype, device) for device in self._copiers]
        for stack in stacks:
            self._programs.empty(stack)
        return stacks

    def parts(self, stack: Stack) -> Iterator[Part]:
        """Yields a layer as a whole: the reader divides it."""
        yield Part(tuple((0, size) for size in stack.layer_shape))

    def carry(self, load: Load) -> None:
        """As `AnyCarrier.carry`."""
        self._make(load.stacks)
        targets = [
            Target(
                of,
                self._places[stack][stack.index(load.layer, load.part)],
                self._copiers[stack.device],
            )
            for of, stack in zip(load.bounds, load.stacks, strict=True)
        ]
        self._reader.submit(load.array, targets, load.check)

    def finish(self) -> None:
        """As `AnyCarrier.finish`."""
        self._reader.wait()

    def _make(self, stacks: Sequence[Stack]) -> None:
        new = [stack for stack in stacks if stack.array is None]
        for stack in new:
            stack.array = self._programs.empty(stack).result()()
        # The device fills them with zeros, and must not do so later than they are written to.
        for stack in new:
            self._places[stack] = place_of(jax.block_until_ready(stack.array))


class Carrier:
    """An `AnyCarrier` by JAX's own means, for every accelerator."""

    def __init__(self, reader: Reader, devices: Sequence[Any], largest: int, programs: Programs):
        """Takes no memory yet.

        Args:
          reader: What reads.
          devices: Each gets a part of every array.
          largest: Bytes of the largest layer of a stack.
          programs: Has compiled what fills the arrays.
        """
        self._reader, self._devices, self._programs = reader, devices, programs
        self._slot_bytes = min(largest, _STAGING_BYTES // (_NUM_SLOTS * len(devices)))
        self._free: list[_Slot] = []
        self._num_slots = 0
        self._reading: collections.deque[_Piece] = collections.deque()
        self._sent: collections.deque[tuple[_Slot, list[jax.Array]]] = collections.deque()

    def stacks(
        self, shape: tuple[int, ...], layer_shape: tuple[int, ...], dtype: np.dtype
    ) -> list[Stack]:
        """As `AnyCarrier.stacks`."""
        stacks = [Stack(shape, layer_shape, dtype, device) for device in self._devices]
        for stack in stacks:
            self._programs.empty(stack)
            for size in {part.shape for part in self.parts(stack)}:
                self._put(stack, size)
        return stacks

    def parts(self, stack: Stack) -> Iterator[Part]:
        """Yields the parts of a layer that fit into a slot each, in order."""
        most, sizes = self._slot_bytes // stack.dtype.itemsize, stack.layer_shape
        axis = next(i for i in range(len(sizes)) if math.prod(sizes[i + 1 :]) <= most)
        step = _even_step(sizes[axis], most // math.prod(sizes[axis + 1 :]))
        for lead in np.ndindex(sizes[:axis]):
            for start in range(0, sizes[axis], step):
                ranges = [(index, index + 1) for index in lead]
                ranges.append((start, min(start + step, sizes[axis])))
                ranges += [(0, size) for size in sizes[axis + 1 :]]
                yield Part(tuple(ranges))

    def carry(self, load: Load) -> None:
        """As `AnyCarrier.carry`."""
        slot, shape = self._slot(), load.part.shape
        num_bytes = math.prod(shape) * load.stacks[0].dtype.itemsize
        parts = [
            view[:num_bytes].view(stack.dtype).reshape(shape)
            for view, stack in zip(slot.views, load.stacks, strict=True)
        ]
        targets = [Target(of, out) for of, out in zip(load.bounds, parts, strict=True)]
        number = self._reader.submit(load.array, targets, load.check)
        begin = load.stacks[0].place(load.layer, load.part)
        self._reading.append(_Piece(number, slot, load.stacks, parts, begin))

    def finish(self) -> None:
        """As `AnyCarrier.finish`."""
        while self._reading:
            self._send()
        while self._sent:
            self._arrive()

    def _slot(self) -> _Slot:
        if self._free:
            return self._free.pop()
        if self._num_slots < _NUM_SLOTS:
            self._num_slots += 1
            pairs = [self._memory(device) for device in self._devices]
            return _Slot([view for view, _ in pairs], [array for _, array in pairs])
        while not self._free:
            self._send()
        return self._free.pop()

    def _memory(self, device: Any) -> tuple[np.ndarray, Any]:
        if has_pinned_memory(device):
            return pinned(device, (self._slot_bytes,), np.uint8)
        memory = np.empty(self._slot_bytes, np.uint8)
        return memory, memory

    def _send(self) -> None:
        """Sends the piece that was asked for first."""
        piece = self._reading.popleft()
        self._reader.wait(piece.number)
        if len(self._sent) == _IN_TRANSFER:
            self._arrive()
        arrays = []
        for i, (stack, part) in enumerate(zip(piece.stacks, piece.parts, strict=True)):
            whole = self._is_sent_whole(part.nbytes)
            source = piece.slot.arrays[i] if whole else piece.slot.views[i][: part.nbytes]
            raw = sent(source, stack.device)
            if stack.array is None:
                stack.array = self._programs.empty(stack).result()()
            put = self._put(stack, part.shape).result()
            stack.array = put(stack.array, raw, piece.place)
            arrays.append(raw)
        self._sent.append((piece.slot, arrays))

    def _arrive(self) -> None:
        slot, arrays = self._sent.popleft()
        jax.block_until_ready(arrays)
        self._free.append(slot)

    def _is_sent_whole(self, num_bytes: int) -> bool:
        """Whether a piece goes by its slot; a copy of a small one is less to do."""
        return 2 * num_bytes > self._slot_bytes

    def _put(self, stack: Stack, size: tuple[int, ...]) -> Future:
        num_bytes = math.prod(size) * stack.dtype.itemsize
        length = self._slot_bytes if self._is_sent_whole(num_bytes) else num_bytes
        return self._programs.get(
            _compiled_put, stack.shape, stack.dtype, stack.device, size, length
        )


def _even_step(size: int, most: int) -> int:
    """The largest step up to `most` that `size` is a multiple of, if it is not half as large."""
    most = min(size, most)
    return next((step for step in range(most, most // 2, -1) if size % step == 0), most)


def compiled_empty(shape: tuple[int, ...], dtype: np.dtype, device: Any) -> Any:
    """Compiles what returns a new array on a device, of zeros."""
    there = SingleDeviceSharding(device)
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=there).lower().compile()


def _compiled_put(
    shape: tuple[int, ...], dtype: np.dtype, device: Any, size: tuple[int, ...], length: int
) -> Any:
    """Compiles (stack, bytes sent, place) -> the stack with the piece that the first bytes are."""
    count = math.prod(size) * dtype.itemsize

    def put(stack, raw, place):
        of_each = (dtype.itemsize,) if dtype.itemsize > 1 else ()
        piece = jax.lax.bitcast_convert_type(raw[:count].reshape(*size, *of_each), dtype)
        of_stack = piece.reshape((1,) * (len(shape) - len(size)) + size)
        return jax.lax.dynamic_update_slice(stack, of_stack, tuple(place))

    there = SingleDeviceSharding(device)
    stack = jax.ShapeDtypeStruct(shape, dtype, sharding=there)
    raw = jax.ShapeDtypeStruct((length,), np.uint8, sharding=there)
    place = jax.ShapeDtypeStruct((len(shape),), np.int32)
    return jax.jit(put, donate_argnums=0).lower(stack, raw, place).compile()
