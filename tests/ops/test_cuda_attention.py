"""The CUDA kernels of attention for few queries against float64, on a CPU in place of a device."""

import ml_dtypes
import numpy as np
import pytest

from grok1.ops.cuda import shapes_of_rows
from grok1.ops.cuda.shapes_of_rows import Heads
from tests.helpers import SLOW_TESTS, slow
from tests.ops import standin
from tests.ops.cuda_cases import LAYER, assert_close

pytestmark = pytest.mark.not_on_gpu("a CPU stands for a device there")

HEADS = [
    Heads(1, 1, 2, 6, 128, 3, 200, "float32", "float32"),
    Heads(2, 3, 1, 2, 32, 2, 64, "float16", "float16"),
    Heads(3, 1, 2, 3, 48, 4, 130, "int8", "bfloat16"),
    Heads(1, 9, 1, 7, 16, 1, 257, "bfloat16", "float32"),
    Heads(2, 1, 3, 2, 8, 2, 96, "float32", "float32"),
    Heads(1, 2, 1, 2, 256, 1, 96, "int8", "float32"),
]


def attention(heads):
    return shapes_of_rows.attend(heads, 0.3, 30.0)


def placing(heads):
    return shapes_of_rows.of_layers(shapes_of_rows.place(heads, addends=2), layers=2)


def step(heads):
    kernel = shapes_of_rows.place_and_attend(heads, 2, 0.3, 30.0)
    return shapes_of_rows.of_layers(kernel, layers=2)


# A kernel is compiled for each size: in the gate, for one of each way through its source.
SOME_HEADS = HEADS if SLOW_TESTS else HEADS[:4]
STEPS = [heads for heads in SOME_HEADS if heads.length == 1]
KERNELS = [
    *(kernel for heads in SOME_HEADS for kernel in (attention(heads), placing(heads))),
    *map(step, STEPS),
]


@pytest.fixture(scope="module")
def library():
    return standin.build(KERNELS)


@pytest.fixture
def rng():
    return np.random.default_rng(14)


def cache_of(rng, heads):
    """Keys, values and their scales, and the keys and values that they stand for."""
    shape = (2, heads.slots, heads.heads, heads.capacity, heads.size)
    if heads.cache_dtype != "int8":
        arrays = [rng.standard_normal(shape).astype(heads.cache_dtype) for _ in "kv"]
        return arrays, [array.astype(float) for array in arrays]
    arrays = [rng.integers(-127, 128, shape).astype(np.int8) for _ in "kv"]
    scales = [0.02 * rng.random(shape[:-1]).astype(np.float32) for _ in "kv"]
    exact = [of * scale.astype(float)[..., None] for of, scale in zip(arrays, scales, strict=True)]
    return [*arrays, *scales], exact


def place_of(rng, heads, last=None):
    """Slots, one outside the cache where there are several rows, and positions."""
    slots = rng.permutation(heads.slots)[: heads.rows].astype(np.int32)
    if heads.rows > 2:
        slots[1] = heads.slots
    starts = rng.integers(0, heads.capacity - heads.length + 1, (heads.rows, 1))
    if last is not None:
        starts[:] = last - heads.length + 1
    return slots, (starts + np.arange(heads.length)).astype(np.int32)


def inputs_of(rng, heads):
    """Two arrays whose sum is what is projected, and the frequencies of the phases."""
    half, columns = heads.size // 2, heads.heads * (heads.group + 2) * heads.size
    projected = rng.standard_normal((2, heads.rows * heads.length, columns))
    frequencies = 10000.0 ** (-np.arange(half) / half)
    return projected.astype(np.float32), frequencies.astype(np.float32)


def attended(query, keys, values, slots, positions):
    out = np.zeros(query.shape)
    for row, time, head in np.ndindex(*query.shape[:3]):
        if slots[row] < keys.shape[0]:
            seen = slice(positions[row, time] + 1)
            logits = query[row, time, head].astype(float) @ keys[slots[row], head, seen].T
            logits = np.exp(30 * np.tanh(0.3 * logits / 30))
            weights = logits / logits.sum(axis=-1, keepdims=True)
            out[row, time, head] = weights @ values[slots[row], head, seen]
    return out


@pytest.mark.parametrize("at", ["anywhere", "first", "last", "border"])
@pytest.mark.parametrize("heads", SOME_HEADS, ids=str)
def test_attention(library, rng, heads, at):
    arrays, (keys, values) = cache_of(rng, heads)
    last = {"first": heads.length - 1, "last": heads.capacity - 1, "border": 31 + heads.length}
    slots, positions = place_of(rng, heads, last.get(at))
    if heads.cache_dtype != "int8":
        # What is after the last position may be no number.
        for array in arrays[:2]:
            array[..., positions.max() + 1 :, :] = np.nan
    shape = (heads.rows, heads.length, heads.heads, heads.group, heads.size)
    kind = ml_dtypes.bfloat16 if heads.query_dtype == "bfloat16" else heads.query_dtype
    query = rng.standard_normal(shape).astype(kind)
    found, *_ = standin.run(library, attention(heads), query, *arrays, LAYER, slots, positions)
    expected = attended(query, keys[1], values[1], slots, positions)
    assert_close(found.reshape(shape), expected, 3e-6)


@pytest.mark.parametrize("heads", SOME_HEADS, ids=str)
def test_placing(library, rng, heads):
    arrays, (keys, values) = cache_of(rng, heads)
    slots, positions = place_of(rng, heads)
    valid = np.arange(heads.length)[None].repeat(heads.rows, axis=0) != 1
    projected, frequencies = inputs_of(rng, heads)
    operands = projected, frequencies, LAYER, slots, positions, valid, *arrays
    query, *cache = standin.run(library, placing(heads), *operands)

    phases = (positions[..., None].astype(np.float32) * frequencies)[:, :, None].astype(float)
    vectors = projected.sum(axis=0).reshape(heads.rows, heads.length, -1, heads.size)
    first, second = np.split(vectors.astype(float), 2, axis=-1)
    turned = np.concatenate(
        [
            first * np.cos(phases) - second * np.sin(phases),
            second * np.cos(phases) + first * np.sin(phases),
        ],
        axis=-1,
    )
    kept = heads.heads * heads.group
    for row, time in np.argwhere(valid & (slots[:, None] < heads.slots)):
        at = 1, slots[row], slice(None), positions[row, time]
        keys[at] = turned[row, time, kept : kept + heads.heads]
        values[at] = vectors[row, time, kept + heads.heads :]
    # Half of the last place: of float32 with its sums, of 10 bits, of 7 bits, of 254 steps.
    near = {"float32": 1e-6, "float16": 2**-11, "bfloat16": 2**-8, "int8": 0.51 / 127}
    of_query = near[heads.query_dtype]
    assert_close(
        query.astype(float).reshape(turned[:, :, :kept].shape), turned[:, :, :kept], of_query
    )
    for number, expected in enumerate((keys, values)):
        found = cache[number].astype(float)
        if heads.cache_dtype == "int8":
            found *= cache[2 + number][..., None]
        assert_close(found, expected, near[heads.cache_dtype])


def test_what_is_too_large_for_float16_saturates_but_for_infinity(library, rng):
    heads = HEADS[1]
    arrays, _ = cache_of(rng, heads)
    slots, positions = np.arange(2, dtype=np.int32), np.zeros((2, 3), np.int32)
    projected = np.zeros((2, 6, heads.heads * (heads.group + 2) * heads.size), np.float32)
    projected[0, :, -heads.size :] = [1e5, -1e5, np.inf, np.nan, *np.zeros(heads.size - 4)]
    valid = np.zeros((2, 3), bool)
    valid[:, 0] = True
    operands = projected, np.zeros(16, np.float32), LAYER, slots, positions, valid, *arrays
    values = standin.run(library, placing(heads), *operands)[2]
    np.testing.assert_array_equal(values[1, 0, 0, 0, :4], [65504, -65504, np.inf, np.nan])


@pytest.mark.parametrize("at", ["anywhere", "first", "last", "border"])
@pytest.mark.parametrize("heads", STEPS, ids=str)
def test_a_step_is_its_parts(library, rng, heads, at):
    arrays, _ = cache_of(rng, heads)
    last = {"first": 0, "last": heads.capacity - 1, "border": 32}
    slots, positions = place_of(rng, heads, last.get(at))
    projected, frequencies = inputs_of(rng, heads)
    valid = np.ones((heads.rows, 1), bool)
    valid[2:] = False  # its key is none of the cache's
    operands = projected, frequencies, LAYER, slots, positions, valid, *arrays
    query, *cache = standin.run(library, placing(heads), *operands)
    expected, *_ = standin.run(library, attention(heads), query, *cache, LAYER, slots, positions)
    out, _, _, *written = standin.run(library, step(heads), *operands)
    np.testing.assert_array_equal(out, expected)
    for found, wanted in zip(written, cache, strict=True):
        np.testing.assert_array_equal(found, wanted)


BREAKS = [
    ("of_lane >= part.end || of_lane > upto", "of_lane >= part.end", test_attention, 1),
    ("16 * half + of * OF_LOGIT", "16 * half + of", test_attention, 2),
    ("half ? sums[next][i] : sums[m][i], given", "sums[m][i], given", test_attention, 0),
    ("S::H + 2 * key_of_lane + half", "S::H + 2 * key_of_lane", test_attention, 0),
    ("int from = 0; from < part.count", "int from = 1; from < part.count", test_attention, 0),
    (
        "part.begin <= position && position",
        "part.begin == position && position",
        test_a_step_is_its_parts,
        0,
    ),
    (
        "S::C * (S::G + !is_key) + head",
        "S::C * (S::G + is_key) + head",
        test_a_step_is_its_parts,
        2,
    ),
    (
        "vector.turn(frequencies, position);\n    if (is_query)",
        ";\n    if (is_query)",
        test_a_step_is_its_parts,
        0,
    ),
    # Any block may be the last.
    ("if (from + j >= part.count)", "if (from + j > part.number)", test_attention, 0),
]
"""A text of the sources, what stands there when it is broken, the test that sees it, and of which
heads."""


@pytest.mark.parametrize(
    ("text", "broken", "test", "number"),
    [pytest.param(*each, marks=() if i == 5 else slow) for i, each in enumerate(BREAKS)],
    ids=lambda of: getattr(of, "__name__", str(of))[:40],
)
def test_a_broken_kernel_is_noticed(rng, text, broken, test, number):
    heads = HEADS[number]
    kernels = [attention(heads), placing(heads)] + (
        [step(heads)] if test is test_a_step_is_its_parts else []
    )
    library = standin.build(kernels, [(text, broken)])
    with pytest.raises(AssertionError):
        test(library, rng, heads, "anywhere")
