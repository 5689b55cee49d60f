"""The kernels in C++, for CPUs, where XLA reads int8 far slower than memory can.

They are compiled at first use with the system's compiler, for this very processor and against the
headers of the installed jaxlib, into a private directory. Where that cannot be done, one line on
stderr says why and everything runs through XLA.

Environment: GROK1_NATIVE=0 turns them off; GROK1_NUM_THREADS is the number of threads of a kernel
(default: the cores that the process may run on); XDG_CACHE_HOME is where the library is kept.
"""

import ctypes
import functools
import itertools
import pathlib
import threading
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8, UInt32

from grok1.machine import environment
from grok1.machine.announcement import hint
from grok1.machine.native_library import Sources, UnavailableError, loaded_library
from grok1.machine.processor import available_cores

_SOURCES = Sources("native", pathlib.Path(__file__).parent, "the native CPU kernels")

_MATMUL = "grok1_quantized_matmul"
_MATMUL_INT4 = "grok1_int4_matmul"
_EXPERTS = "grok1_experts"
_EXPERTS_INT4 = "grok1_int4_experts"
_FETCHED_EXPERTS = "grok1_fetched_experts"
_FETCHED_EXPERTS_INT4 = "grok1_int4_fetched_experts"
_ROUND = "grok1_int4_round"
_ROUND_BLOCK = "grok1_int4_round_block"
_ATTENTION = "grok1_attention"
_MOST_PROBABLE = "grok1_most_probable"
# Called by `rowwise`.
NORM = "grok1_norm"
ADD_NORM = "grok1_add_norm"
ROTATE = "grok1_rotate"
ROUTE = "grok1_route"
TABLE_PRODUCTS = "grok1_table_products"
EXPONENTIAL_SUMS = "grok1_exponential_sums"
LOG = "grok1_log"
# Called by `draws`.
SAMPLE = "grok1_sample"
DRAW = "grok1_draw"
DRAW_MEASURED = "grok1_draw_measured"
LOG_PROBABILITIES = "grok1_log_probabilities"
_USE_THREADS = "grok1_use_threads"
_LOCK = threading.Lock()
_TURNED_OFF = threading.Event()
# Layer, expert, the next one, where to write the addresses; see layers.cc.
_FETCH = ctypes.CFUNCTYPE(ctypes.c_int32, *(ctypes.c_int32,) * 3, ctypes.POINTER(ctypes.c_size_t))


def is_available() -> bool:
    """Whether the kernels can run; builds and registers the library when first asked.

    Says on stderr, once a process, why it cannot. False without a word when GROK1_NATIVE=0 or
    when the default backend of JAX is no CPU.

    Raises:
      ValueError: If a variable of the environment has a value that means nothing.
    """
    with _LOCK:  # a second thread must not register what it has built itself
        return not _TURNED_OFF.is_set() and _is_available()


def turn_off() -> None:
    """Makes `is_available` false, since a process that this one computes with has no kernels."""
    _TURNED_OFF.set()


@functools.cache
def _is_available() -> bool:
    if not environment.is_on("GROK1_NATIVE") or jax.default_backend() != "cpu":
        return False
    num_threads = environment.num_threads()
    try:
        targets = (
            _MATMUL,
            _MATMUL_INT4,
            _EXPERTS,
            _EXPERTS_INT4,
            _FETCHED_EXPERTS,
            _FETCHED_EXPERTS_INT4,
            _ROUND,
            _ROUND_BLOCK,
            _ATTENTION,
            _MOST_PROBABLE,
            NORM,
            ADD_NORM,
            ROTATE,
            ROUTE,
            TABLE_PRODUCTS,
            EXPONENTIAL_SUMS,
            LOG,
            SAMPLE,
            DRAW,
            DRAW_MEASURED,
            LOG_PROBABILITIES,
        )
        library = loaded_library([*targets, _USE_THREADS], _SOURCES)
        handlers = {target: jax.ffi.pycapsule(getattr(library, target)) for target in targets}
    except (UnavailableError, OSError, RuntimeError) as error:  # RuntimeError: no home directory
        hint(f"running through XLA, several times slower than the native kernels: {error}")
        return False
    getattr(library, _USE_THREADS)(ctypes.c_int64(num_threads or available_cores()))
    for target, handler in handlers.items():
        jax.ffi.register_ffi_target(target, handler, platform="cpu")
    return True


def quantized_matmul(
    x: Float[Array, "M K"],
    weight: Sequence[Array],
    index: tuple[int | Array, ...],
    num_valid: int | Array,
) -> Float[Array, "M N"]:
    """Computes `x @ weight[index]`.

    Products and sums are float32; the result does not depend on the number of threads.

    Args:
      x: float32 `[M, K]`.
      weight: A `QuantizedArray` or an `Int4Array` `[*lead, K, N]`; read in place, whatever the
        index.
      index: One index, a number or a traced scalar, for each leading axis, from 0 on.
      num_valid: Rows of `x` to multiply, a number or a traced scalar.

    Returns:
      float32 `[M, N]`, zeros from row `num_valid` on.

    Raises:
      RuntimeError: If there is no library.
    """
    require()
    matrix = jnp.int32(0)
    for size, i in zip(weight[0].shape[:-2], index, strict=True):
        matrix = matrix * size + jnp.asarray(i, jnp.int32)
    out = jax.ShapeDtypeStruct((x.shape[0], weight[0].shape[-1]), jnp.float32)
    target = _MATMUL if len(weight) == 2 else _MATMUL_INT4
    return jax.ffi.ffi_call(target, out)(x, *weight, matrix, jnp.asarray(num_valid, jnp.int32))


def experts(
    x: Float[Array, "M D"],
    weights: Sequence[Sequence[Array]],
    layer: int | Array,
    expert_indices: Int[Array, "M A"],
    expert_weights: Float[Array, "M A"],
) -> Float[Array, "M D"]:
    """Sums, for each token, its experts' gated feed-forward times their weights.

    Args:
      x: float32 `[M, D]`.
      weights: Gate, up and down, all `QuantizedArray`s or all `Int4Array`s; read in place. The
        first two `[*lead, E, D, F]`, down `[*lead, E, F, D]`.
      layer: Index of the layer, 0 where there is no such axis.
      expert_indices: int32; one outside 0 to E-1 is not run.
      expert_weights: float32.

    Returns:
      float32 `[M, D]`.

    Raises:
      RuntimeError: If there is no library.
    """
    require()
    out = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    target = _EXPERTS if len(weights[0]) == 2 else _EXPERTS_INT4
    return jax.ffi.ffi_call(target, out)(
        x,
        *itertools.chain(*weights),
        jnp.asarray(layer, jnp.int32),
        expert_indices.astype(jnp.int32),
        expert_weights,
    )


def round_int4(
    weight: Float[Array, "K N"],
    like: Sequence[jax.ShapeDtypeStruct],
    feedback: tuple[Array, Array] | None = None,
) -> Sequence[Array]:
    """Rounds a weight to 4 bits, as `int4_rounding` does to parts `like` these.

    With feedback, the original weight and a factor, it is one block of `int4_feedback`; the errors
    `[K, N]` and what is lost `[N]` come behind the parts.
    """
    require()
    if feedback is None:
        return jax.ffi.ffi_call(_ROUND, [*like])(weight)
    more = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (weight.shape, weight.shape[1:])]
    return jax.ffi.ffi_call(_ROUND_BLOCK, [*like, *more])(weight, *feedback)


class Fetch:
    """A Python function that a program asks for experts' weights, and the handle that names it.

    Attributes:
      handle: uint32 `[2]`, an argument of the program; of use as long as this object lives.
    """

    def __init__(self, function: Callable[[int, int, int | None], Sequence[int] | None]):
        """Wraps a function.

        Args:
          function: Called on a thread of XLA's with a layer, the expert that is needed and the one
            that will be needed next, if any. It returns the addresses of what is fetched of the
            expert's gate, up and down, row by row, which stay as they are until it is called again;
            or None if they cannot be had. It must not raise.
        """

        def fetch(layer, expert, following, values):
            addresses = function(layer, expert, None if following < 0 else following)
            if addresses is None:
                return 1
            for place, one in enumerate(addresses):
                values[place] = one
            return 0

        self._callback = _FETCH(fetch)
        address = ctypes.cast(self._callback, ctypes.c_void_p).value
        self.handle = np.array([address], np.uint64).view(np.uint32)


def fetched_experts(
    x: Float[Array, "M D"],
    handle: UInt32[Array, "2"],
    known: Sequence[Array],
    layer: int | Array,
    expert_indices: Int[Array, "M A"],
    expert_weights: Float[Array, "M A"],
) -> Float[Array, "M D"]:
    """As `experts`, with weights that the host is asked for once the choice is known.

    Args:
      x: float32 `[M, D]`.
      handle: Of a `Fetch`, which is asked for one chosen expert after another.
      known: Of int8 experts the bfloat16 scales, those of gate and up `[L, E, G, F]`, of down
        `[L, E, G, D]`; of 4-bit ones their sizes, uint32 `[4]`: E, F, the blocks of gate and up,
        and those of down.
      layer: Index of the layer.
      expert_indices: int32; one outside 0 to E-1 is not run, and not asked for.
      expert_weights: float32.

    Returns:
      float32 `[M, D]`, bit for bit what `experts` returns for these weights. The program fails if
      the weights cannot be had.

    Raises:
      RuntimeError: If there is no library.
    """
    require()
    out = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    target = _FETCHED_EXPERTS if len(known) == 3 else _FETCHED_EXPERTS_INT4
    return jax.ffi.ffi_call(target, out)(
        x,
        handle,
        *known,
        jnp.asarray(layer, jnp.int32),
        expert_indices.astype(jnp.int32),
        expert_weights,
    )


def attention(
    query: Float[Array, "R T C G H"],
    cached: tuple[Float[Array, "L B C S H"], Float[Array, "L B C S H"]],
    layer: int | Array,
    slots: Int[Array, " R"],
    positions: Int[Array, "R T"],
    scaling: tuple[float, float],
) -> Float[Array, "R T C G H"]:
    """Soft-capped attention over the cached positions up to each query's own.

    Args:
      query: float32.
      cached: Keys and values, float32; only the filled positions of the layer are read, in place.
      layer: Which layer of the cache to read.
      slots: int32, which row of the cache each row of queries sees; one outside it sees nothing,
        and its result is zeros.
      positions: int32, absolute position of each query.
      scaling: The factor on the query-key products, and the soft cap that then bounds the logits.

    Returns:
      float32.

    Raises:
      RuntimeError: If there is no library.
    """
    require()
    out = jax.ShapeDtypeStruct(query.shape, jnp.float32)
    return jax.ffi.ffi_call(_ATTENTION, out)(
        query,
        *cached,
        jnp.asarray(layer, jnp.int32),
        slots,
        positions,
        scale=np.float32(scaling[0]),
        soft_cap=np.float32(scaling[1]),
    )


def most_probable(
    x: Float[Array, "M D"],
    rows: Float[Array, "V D"],
    values: Int8[Array, "V D"],
    scales: Float[Array, " V"],
    uncertainty: Float[Array, " V"],
    allowed: Bool[Array, "*M V"],
) -> tuple[Int[Array, " M"], Float[Array, " M"]]:
    """Finds the allowed row of a table with the largest product, reading its int8 copy.

    Args:
      x: float32 `[M, D]`.
      rows: float32 `[V, D]`; only the few rows that the copy cannot rule out are read.
      values: int8 `[V, D]`.
      scales: float32 `[V]`; `scales * values` is close to `rows`.
      uncertainty: float32 `[V]`, no less than the norm of what `scales * values` leaves out.
      allowed: False for rows that must not be found, `[V]` for all inputs or `[M, V]`.

    Returns:
      (index of the row, int32, -1 if there is none; its product, float32).

    Raises:
      RuntimeError: If there is no library.
    """
    require()
    out = (
        jax.ShapeDtypeStruct((len(x),), jnp.int32),
        jax.ShapeDtypeStruct((len(x),), jnp.float32),
    )
    index, product = jax.ffi.ffi_call(_MOST_PROBABLE, out)(
        x, rows, values, scales, uncertainty, allowed
    )
    return index, product


def require() -> None:
    """Checks that the kernels can run.

    Raises:
      RuntimeError: If there is no library.
    """
    if not is_available():
        raise RuntimeError("the native kernels are not available here; use another implementation")
