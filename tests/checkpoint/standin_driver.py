"""CUDA's driver for a CPU's memory: what is copied moves no sooner than somebody waits for it.

So that memory which is used again too early, or a wait that is missing, shows. What native code
calls has an address, as the driver's functions have.
"""

import collections
import ctypes
import itertools
import threading
from types import SimpleNamespace

from grok1.machine.cuda_driver import _Copy2D

_HOST, _DEVICE = 1, 2


def library(refuse: str = "", damage: bool = False) -> SimpleNamespace:
    """Returns what `ctypes.CDLL` would.

    Args:
      refuse: A function that fails.
      damage: Whether what is copied arrives changed.
    """
    numbers = itertools.count(1)
    waiting = collections.defaultdict(list)
    owners: dict[int, int] = {}  # the context that each stream is of
    contexts = itertools.count(7)
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
        pointer._obj.value = number = next(numbers)
        owners[number] = context.current
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
        pointer._obj.value = next(contexts)
        return 0

    def set_current(given):
        context.current = given
        return status("cuCtxSetCurrent")

    def begin(name, stream, *copies):
        assert context.current == owners[stream]  # of this thread
        with lock:
            waiting[stream] += copies
        return status(name)

    def copy(to, of, size, stream):
        return begin("cuMemcpyHtoDAsync_v2", stream, (to, of, size))

    def copy_2d(pointer, stream):
        it = pointer.contents
        assert (it.src_type, it.dst_type) == (_HOST, _DEVICE)
        assert it.width <= min(it.src_pitch, it.dst_pitch)
        rows = [
            (it.dst_device + row * it.dst_pitch, it.src_host + row * it.src_pitch, it.width)
            for row in range(it.height)
        ]
        return begin("cuMemcpy2DAsync_v2", stream, *rows)

    def synchronize(stream):
        with lock:
            for one in waiting.pop(stream, []):
                move(*one)
        return status("cuStreamSynchronize")

    def in_c(function, *types):
        return ctypes.CFUNCTYPE(ctypes.c_int, *types)(function)

    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    return SimpleNamespace(
        cuInit=lambda flags: status("cuInit"),
        cuDeviceGet=device,
        cuDevicePrimaryCtxRetain=retain,
        cuCtxSetCurrent=in_c(set_current, pointer),
        cuPointerGetAttribute=attribute,
        cuMemHostAlloc=alloc,
        cuStreamCreate=new_stream,
        cuStreamSynchronize=in_c(synchronize, pointer),
        cuMemcpyHtoDAsync_v2=in_c(copy, ctypes.c_uint64, pointer, size, pointer),
        cuMemcpy2DAsync_v2=in_c(copy_2d, ctypes.POINTER(_Copy2D), pointer),
        waiting=waiting,
    )
