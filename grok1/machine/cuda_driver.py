"""Copies to the memory of NVIDIA devices by CUDA's driver, begun by any thread of the host.

What goes this way needs no program, no second place on the device and next to nothing of the
interpreter's time, so that many threads can each send what they have read. The array that is
written to must be known to its maker alone, and be used when the copies are done.
"""

import ctypes
import functools
import math
import threading
from typing import Any

import jax
import numpy as np

from grok1.machine import environment
from grok1.machine.announcement import hint

_LIBRARY = "libcuda.so.1"
# cuda.h
_HOST, _DEVICE = 1, 2  # CUmemorytype
_DEVICE_ORDINAL = 9  # CUpointer_attribute
_PORTABLE = 1  # of cuMemHostAlloc: pinned for all devices
_NON_BLOCKING = 1  # of cuStreamCreate: without a thought to the default stream

_LOCK = threading.Lock()
_THREAD = threading.local()
_CHECKED = 3, 8, 16  # shape of the array of the check


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = [
        ("src_x", ctypes.c_size_t),
        ("src_y", ctypes.c_size_t),
        ("src_type", ctypes.c_uint),
        ("src_host", ctypes.c_void_p),
        ("src_device", ctypes.c_uint64),
        ("src_array", ctypes.c_void_p),
        ("src_pitch", ctypes.c_size_t),
        ("dst_x", ctypes.c_size_t),
        ("dst_y", ctypes.c_size_t),
        ("dst_type", ctypes.c_uint),
        ("dst_host", ctypes.c_void_p),
        ("dst_device", ctypes.c_uint64),
        ("dst_array", ctypes.c_void_p),
        ("dst_pitch", ctypes.c_size_t),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    ]


_POINTER = ctypes.POINTER(ctypes.c_void_p)
_FUNCTIONS = {
    "cuInit": [ctypes.c_uint],
    "cuDeviceGet": [ctypes.POINTER(ctypes.c_int), ctypes.c_int],
    "cuDevicePrimaryCtxRetain": [_POINTER, ctypes.c_int],
    "cuCtxSetCurrent": [ctypes.c_void_p],
    "cuPointerGetAttribute": [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64],
    "cuMemHostAlloc": [_POINTER, ctypes.c_size_t, ctypes.c_uint],
    "cuStreamCreate": [_POINTER, ctypes.c_uint],
    "cuStreamSynchronize": [ctypes.c_void_p],
    "cuMemcpyHtoDAsync_v2": [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p],
    "cuMemcpy2DAsync_v2": [ctypes.POINTER(_Copy2D), ctypes.c_void_p],
}


class DriverError(RuntimeError):
    """The driver refused something."""


def refused(name: str, status: int) -> DriverError:
    """Says that a function of the driver failed, and what to do."""
    return DriverError(
        f"{name} of CUDA's driver failed with error {status}; GROK1_NATIVE=0 has JAX copy"
    )


class Copier:
    """Copies to one device. Its functions may be called by several threads at once.

    Attributes:
      context: The device's, for functions of the driver's that others call.
    """

    def __init__(self, library: Any, device: Any):
        """Asks the driver for the device's own context, which is XLA's.

        Args:
          library: CUDA's driver.
          device: JAX's device.

        Raises:
          DriverError: If the driver refuses.
        """
        self._library = library
        self._addresses: dict[tuple[str, ...], Any] = {}
        for name, types in _FUNCTIONS.items():
            getattr(library, name).argtypes = types
        self._call("cuInit", 0)
        on_device = jax.device_put(np.zeros(_CHECKED, np.uint8), device)
        address = jax.block_until_ready(on_device).unsafe_buffer_pointer()
        ordinal, number = ctypes.c_int(-1), ctypes.c_int(-1)
        self._call("cuPointerGetAttribute", ctypes.byref(ordinal), _DEVICE_ORDINAL, address)
        self._call("cuDeviceGet", ctypes.byref(number), ordinal)
        self.context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), number)

    def functions(self, names: tuple[str, ...]) -> Any:
        """Returns the addresses of some of the driver's functions, as an array of C's."""
        # Kept: it would be a fifth of what the interpreter has to do for a block that is sent.
        if names not in self._addresses:
            functions = [ctypes.cast(getattr(self._library, n), ctypes.c_void_p) for n in names]
            addresses = (function.value for function in functions)
            self._addresses[names] = (ctypes.c_void_p * len(names))(*addresses)
        return self._addresses[names]

    def pinned(self, num_bytes: int) -> np.ndarray:
        """Returns pinned memory, uint8, which stays until the process ends."""
        self.enter()
        address = ctypes.c_void_p()
        self._call("cuMemHostAlloc", ctypes.byref(address), num_bytes, _PORTABLE)
        assert address.value is not None  # it was not refused
        return _at(address.value, num_bytes)

    def stream(self) -> ctypes.c_void_p:
        """Returns a stream of its own, which stays until the process ends."""
        self.enter()
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        return stream

    def copy(self, out: np.ndarray, source: np.ndarray, stream: ctypes.c_void_p) -> None:
        """Begins a copy; the source must not change until `wait` has returned.

        Args:
          out: Where to, `[R, C]`, any rows and columns of a matrix of what `place_of` returned.
          source: Pinned memory of the same shape and type, its rows contiguous.
          stream: Of this device; what it was given before comes before.

        Raises:
          DriverError: If the driver refuses.
        """
        self.enter()
        height, width = source.shape[0], source.shape[1] * source.itemsize
        pitch, out_pitch = source.strides[0], out.strides[0]
        if height == 1 or pitch == out_pitch == width:
            size = height * width
            to, of = out.ctypes.data, source.ctypes.data
            self._call("cuMemcpyHtoDAsync_v2", to, of, size, stream)
            return
        copy = _Copy2D(
            src_type=_HOST,
            src_host=source.ctypes.data,
            src_pitch=pitch,
            dst_type=_DEVICE,
            dst_device=out.ctypes.data,
            dst_pitch=out_pitch,
            width=width,
            height=height,
        )
        self._call("cuMemcpy2DAsync_v2", ctypes.byref(copy), stream)

    def wait(self, stream: ctypes.c_void_p) -> None:
        """Waits until all copies of a stream are done.

        Raises:
          DriverError: If one has failed.
        """
        self.enter()
        self._call("cuStreamSynchronize", stream)

    def enter(self) -> None:
        """Has this thread work in the device's context, which it may be doing already.

        Raises:
          DriverError: If the driver refuses.
        """
        if getattr(_THREAD, "copier", None) is not self:
            self._call("cuCtxSetCurrent", self.context)
            _THREAD.copier = self

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise refused(name, status)


def place_of(array: jax.Array) -> np.ndarray:
    """Returns where an array of a single device is, as an array to be divided into parts.

    Addresses are all that is to be taken from it: its elements are not in the host's memory. It
    holds the array, so that a thread which still copies to a part has where to.
    """
    place = _at(array.unsafe_buffer_pointer(), array.nbytes, array)
    return place.view(array.dtype).reshape(array.shape)


@functools.cache
def copier_of(device: Any) -> Copier | None:
    """Returns what copies to a device, found to do so correctly; None if JAX has to.

    Says on stderr what is wrong. None without a word if it is no NVIDIA GPU or GROK1_NATIVE=0.

    Args:
      device: JAX's device, one of this process.

    Raises:
      ValueError: If a variable of the environment has a value that means nothing.
    """
    if not environment.is_on("GROK1_NATIVE") or not _is_nvidia(device):
        return None
    with _LOCK:
        try:
            return _checked(Copier(ctypes.CDLL(_LIBRARY), device), device)
        except (AttributeError, OSError, DriverError) as error:
            hint(f"copying to {device} through JAX, which is slower: {error}")
            return None


def _checked(copier: Copier, device: Any) -> Copier:
    """Returns it if a small array that is copied in parts is what arrives.

    Raises:
      DriverError: If it is not, or the driver refuses.
    """
    expected = np.arange(math.prod(_CHECKED), dtype=np.uint8).reshape(_CHECKED)[..., ::-1]
    array = jax.block_until_ready(jax.device_put(np.full(_CHECKED, 255, np.uint8), device))
    pinned = copier.pinned(array.nbytes).reshape(_CHECKED)
    pinned[...] = expected
    stream, place = copier.stream(), place_of(array)
    copier.copy(place[0], pinned[0], stream)
    for matrix in (1, 2):
        for columns in (slice(0, 5), slice(5, None)):
            copier.copy(place[matrix, :, columns], pinned[matrix, :, columns], stream)
    copier.wait(stream)
    if not np.array_equal(array, expected):
        raise DriverError("what was copied is not what arrived")
    return copier


def _is_nvidia(device: Any) -> bool:
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return device.platform != "cpu" and major.isdecimal() and minor.isdecimal()


def _at(address: int, num_bytes: int, held: Any = None) -> np.ndarray:
    memory = (ctypes.c_uint8 * num_bytes).from_address(address)
    vars(memory)["held"] = held
    return np.ctypeslib.as_array(memory)
