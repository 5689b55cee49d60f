"""The CUDA kernel of attention of many queries against float64, on a CPU in place of a device."""

import numpy as np
import pytest

from grok1.ops.cuda import shapes_of_prompts
from grok1.ops.cuda.shapes_of_rows import Heads
from tests.helpers import slow
from tests.ops import standin
from tests.ops.cuda_cases import LAYER

pytestmark = pytest.mark.not_on_gpu("a CPU stands for a device there")

HALF = 2**-10  # weights and values have 11 bits

# Several rows of a cache that is no multiple of a tile; one block whose last warps have few rows;
# a head as wide as Grok-1's.
HEADS = [
    Heads(3, 45, 2, 2, 64, 4, 150, "float16", "float16"),
    Heads(1, 13, 1, 6, 64, 2, 200, "float16", "float16"),
    Heads(1, 70, 1, 1, 128, 1, 140, "float16", "float16"),
]


def kernel_of(heads):
    return shapes_of_prompts.attend(heads, 0.3, 30.0)


@pytest.fixture(scope="module")
def library():
    return standin.build([kernel_of(heads) for heads in HEADS])


def case_of(heads, at, size=1.0):
    """Query, keys, values, slots and positions; what is after the last position is no number."""
    rng = np.random.default_rng(14)
    shape = (2, heads.slots, heads.heads, heads.capacity, heads.size)
    keys, values = (rng.standard_normal(shape).astype(np.float16) for _ in "kv")
    query = size * rng.standard_normal(
        (heads.rows, heads.length, heads.heads, heads.group, heads.size)
    )
    slots = rng.permutation(heads.slots)[: heads.rows].astype(np.int32)
    if heads.rows > 2:
        slots[1] = heads.slots
    room = heads.capacity - heads.length
    starts = {"first": np.zeros(heads.rows, int), "last": np.full(heads.rows, room)}.get(
        at, rng.integers(0, room + 1, heads.rows)
    )
    positions = (starts[:, None] + np.arange(heads.length)).astype(np.int32)
    for row, slot in enumerate(slots):
        if slot < heads.slots:
            for array in (keys, values):
                array[1, slot, :, positions[row, -1] + 1 :] = np.nan
    return query.astype(np.float16), keys, values, slots, positions


def attended(query, keys, values, slots, positions):
    """In float64, of the layer of the test."""
    out = np.zeros(query.shape)
    for row, time, head in np.ndindex(*query.shape[:3]):
        if slots[row] < keys.shape[1]:
            at = 1, slots[row], head, slice(positions[row, time] + 1)
            logits = query[row, time, head].astype(float) @ keys[at].astype(float).T
            weights = np.exp(30 * np.tanh(0.3 * logits / 30))
            weights /= weights.sum(axis=-1, keepdims=True)
            out[row, time, head] = weights @ values[at].astype(float)
    return out


def difference(library, heads, at, size=1.0):
    """Largest difference from float64, relative to the largest number."""
    query, keys, values, slots, positions = case = case_of(heads, at, size)
    arguments = query, keys, values, LAYER, slots, positions
    (out,) = standin.run(library, kernel_of(heads), *arguments)
    expected = attended(*case)
    out = out.reshape(expected.shape)
    return np.abs(out - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("at", ["first", "last", "anywhere"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_prompts(library, heads, at):
    assert difference(library, heads, at) < HALF


@pytest.mark.parametrize("size", [0, 40])
def test_logits_of_nothing_and_beyond_the_cap(library, size):
    assert difference(library, HEADS[1], "last", size) < HALF


BREAKS = [
    ("if (!sees(i, begin, j)) products[j][i] = 0;", ";"),
    ("if (!sees(i, begin, j)) products[j][i] = none;", ";"),
    ("total[half] *= shrink;", ""),
    ("begin + S::KEYS - 1 > (int)least", "begin + S::KEYS - 1 > (int)most"),
    ("begin + first + i * AT_ONCE <= last", "true"),
    ("    wait_for_all_but<0>();\n", ""),
    ("chunk ^ row % 8", "0"),
]
"""A text of the source, and what stands there when it is broken."""


@pytest.mark.parametrize(
    ("text", "broken"),
    [BREAKS[0], *(pytest.param(*each, marks=slow) for each in BREAKS[1:])],
    ids=lambda of: str(of)[:40],
)
def test_a_broken_kernel_is_noticed(text, broken):
    heads = HEADS[1]
    library = standin.build([kernel_of(heads)], [(text, broken)], level="-O0")
    with pytest.raises(AssertionError):
        assert difference(library, heads, "last") + difference(library, heads, "first", 40) < HALF
