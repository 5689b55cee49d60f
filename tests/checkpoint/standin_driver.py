"""CUDA's driver for a CPU's memory: what is copied moves no sooner than somebody waits for it.

So that memory which is used again too early, or a wait that is missing, shows.
"""

import collections
import ctypes
import itertools
import threading
from types import SimpleNamespace

_HOST, _DEVICE = 1, 2


def library(refuse: str = "", damage: bool = False) -> SimpleNamespace:
    """Returns what `ctypes.CDLL` would.

    Args:
      refuse: A function that fails.
      damage: Whether what is copied arrives changed.
    """
    numbers = itertools.count(1)
    waiting = collections.defaultdict(list)
    held: list[object] = []
    lock = threading.Lock()
    context = threading.local()

    def status(name: str) -> int:
        return 700 if name == refuse else 0

    def move(to: int, of: int, size: int) -> None:
        ctypes.memmove(to, of, size)
        if damage:
            ctypes.memset(to, 99, 1)

    def alloc(pointer, num_bytes, flags):
        assert flags == 1
        held.append(memory := (ctypes.c_uint8 * num_bytes)())
        ctypes.memset(memory, 77, num_bytes)
        pointer._obj.value = ctypes.addressof(memory)
        return status("cuMemHostAlloc")

    def new_stream(pointer, flags):
        assert flags == 1
        pointer._obj.value = next(numbers)
        return status("cuStreamCreate")

    def attribute(pointer, which, address):
        assert which == 9
        assert address
        pointer._obj.value = 5
        return status("cuPointerGetAttribute")

    def device(pointer, ordinal):
        assert ordinal.value == 5
        pointer._obj.value = 6
        return 0

    def retain(pointer, number):
        assert number.value == 6
        pointer._obj.value = 7
        return 0

    def set_current(given):
        context.current = given.value
        return 0

    def begin(name, stream, *copies):
        assert context.current == 7  # of this thread
        with lock:
            waiting[stream.value] += copies
        return status(name)

    def copy(to, of, size, stream):
        return begin("cuMemcpyHtoDAsync_v2", stream, (to, of, size))

    def copy_2d(pointer, stream):
        it = pointer._obj
        assert (it.src_type, it.dst_type) == (_HOST, _DEVICE)
        assert it.width <= min(it.src_pitch, it.dst_pitch)
        rows = [
            (it.dst_device + row * it.dst_pitch, it.src_host + row * it.src_pitch, it.width)
            for row in range(it.height)
        ]
        return begin("cuMemcpy2DAsync_v2", stream, *rows)

    def synchronize(stream):
        with lock:
            for one in waiting.pop(stream.value, []):
                move(*one)
        return status("cuStreamSynchronize")

    return SimpleNamespace(
        cuInit=lambda flags: status("cuInit"),
        cuDeviceGet=device,
        cuDevicePrimaryCtxRetain=retain,
        cuCtxSetCurrent=set_current,
        cuPointerGetAttribute=attribute,
        cuMemHostAlloc=alloc,
        cuStreamCreate=new_stream,
        cuStreamSynchronize=synchronize,
        cuMemcpyHtoDAsync_v2=copy,
        cuMemcpy2DAsync_v2=copy_2d,
        waiting=waiting,
    )
