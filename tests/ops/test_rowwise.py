"""What a row comes to does not depend on the rows that come with it, to the last bit; on CPUs.

The router must not send a token elsewhere for its neighbours' sake, nor an answer change with the
load of a server.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from grok1 import TOY
from grok1.nn.sharding import MODEL_AXIS, make_mesh
from grok1.nn.unembedding import logit_lens, token_statistics
from grok1.ops import forms, int4
from grok1.ops.cpu import bindings
from grok1.ops.experts import ExpertWeights, experts
from grok1.ops.quantized import QuantizedArray
from grok1.ops.routing import Selection, choose_experts
from tests.helpers import SLOW_TESTS, slow

pytestmark = pytest.mark.not_on_gpu("a row has the same bits in any batch in the CPU's form alone")

NUM_ROWS = 230  # more than a pass of many rows
# Of each way to multiply, and of the remainders of its blocks.
SOME_ROWS = (1, 2, 3, 4, 6, 7, 12, 13, 24, 25, 193) if SLOW_TESTS else (1, 3, 4, 7, 13, 193)


@pytest.fixture(autouse=True)
def kernels_here(kernels):
    # Asked where the module is imported, each process of the tests would build them.
    if not forms.has_kernels(jax.default_backend()):
        pytest.skip("the native kernels are not available here")


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def quantized_weight(seed, *shape, groups=1):
    random = np.random.default_rng(seed)
    values = random.integers(-127, 128, shape).astype(np.int8)
    scales = random.uniform(0.5, 1, (*shape[:-2], groups, shape[-1])).astype(np.float32)
    return QuantizedArray(jnp.asarray(values), jnp.asarray(scales, jnp.bfloat16))


def assert_rows_are_alike(function, *arrays):
    """`function` maps rows to rows; of the first few alone it must give the first of all."""
    program = jax.jit(function)
    everything = jax.tree.leaves(program(*arrays))
    for count in SOME_ROWS:
        alone = jax.tree.leaves(program(*(array[:count] for array in arrays)))
        for whole, part in zip(everything, alone, strict=True):
            np.testing.assert_array_equal(part, whole[:count], err_msg=f"{count} rows")
    return everything


# Widths that are no multiple of a register or a line, groups of scales that cut a run of weight
# rows, and a matrix of several segments.
@pytest.mark.parametrize(
    ("depth", "width", "groups"), [(300, 70, 1), (192, 130, 2), (1536, 2048, 8), (257, 8250, 1)]
)
def test_products_with_a_weight(depth, width, groups):
    weight = quantized_weight(0, depth, width, groups=groups)
    assert_rows_are_alike(
        lambda x: bindings.quantized_matmul(x, weight, (), len(x)), normal(1, NUM_ROWS, depth)
    )


# The second has several segments of the hidden size, and a slice that is no multiple of one.
@pytest.mark.parametrize(
    ("num_experts", "width", "hidden"),
    [
        (5, 136, 200),
        (2, 256, 2100),
        pytest.param(2, 136, 200, marks=slow),
        pytest.param(5, 256, 2100, marks=slow),
    ],
)
def test_experts(num_experts, width, hidden):
    stack = ExpertWeights(
        quantized_weight(0, num_experts, width, hidden),
        quantized_weight(1, num_experts, width, hidden, groups=4),
        quantized_weight(2, num_experts, hidden, width, groups=2),
    )

    def run(x, logits):
        routing = choose_experts(logits, 2)
        return experts(x, stack, (), routing, jnp.ones(len(x), bool), implementation="cpp")

    # Uneven, so that one of a token's experts has few rows and the other many.
    logits = normal(3, NUM_ROWS, num_experts) + 0.7 * np.arange(num_experts, dtype=np.float32)
    assert_rows_are_alike(run, normal(4, NUM_ROWS, width), logits)


# Groups of 32 rows and, in blocks of 136 and 200, of 8.
@pytest.mark.parametrize(("width", "hidden"), [(256, 2112), (136, 200)])
def test_experts_in_four_bits(width, hidden):
    random = np.random.default_rng(0)

    def drawn(rows, columns):
        blocks = int4.num_blocks(rows)
        codes = random.integers(0, 256, (2, rows // 2, columns)).astype(np.uint8)
        subscales = random.integers(0, 256, (2, int4.CODE_ROWS * blocks, columns)).astype(np.uint8)
        scales = random.uniform(0.5, 1, (2, blocks, columns)).astype(np.float16) / rows
        return int4.Int4Array(*map(jnp.asarray, (codes, subscales, scales)))

    stack = ExpertWeights(drawn(width, hidden), drawn(width, hidden), drawn(hidden, width))

    def run(x, logits):
        routing = choose_experts(logits, 1)
        return experts(x, stack, (), routing, jnp.ones(len(x), bool), implementation="cpp")

    logits = normal(3, NUM_ROWS, 2) + 0.7 * np.arange(2, dtype=np.float32)
    assert_rows_are_alike(run, normal(4, NUM_ROWS, width), logits)


@pytest.mark.parametrize("width", [pytest.param(6, marks=slow), 64, 203])
def test_norms(width):
    x, branch = normal(0, NUM_ROWS, width), normal(1, NUM_ROWS, width)
    scales = jnp.asarray(normal(2, 2, 3, width))

    def run(x, branch):
        both = scales[0], scales[1]
        return forms.run("add_norm", x, branch, both, jnp.int32(2), implementation="cpp")

    def exact_norm(x, scale):
        return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-5) * scale

    total, normed = assert_rows_are_alike(run, x, branch)
    exact = x + exact_norm(branch.astype(np.float64), np.float64(scales[0, 2]))
    np.testing.assert_allclose(total, exact, rtol=2e-6, atol=1e-6)
    exact = exact_norm(exact, np.float64(scales[1, 2]))
    np.testing.assert_allclose(normed, exact, rtol=4e-6, atol=2e-6)


def test_phases():
    query, key = (jnp.asarray(normal(heads, NUM_ROWS, 1, heads, 20)) for heads in (6, 2))
    positions = jnp.asarray(np.random.default_rng(2).integers(0, 8192, (NUM_ROWS, 1)), jnp.int32)

    def run(*arguments):
        return forms.run("rotate", *arguments, implementation="cpp")

    found = assert_rows_are_alike(run, query, key, positions)
    with_xla = forms.run("rotate", query, key, positions, implementation="xla")
    for one, other in zip(found, with_xla, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("num_experts", [pytest.param(3, marks=slow), 8, 17])
def test_the_router(num_experts):
    x, routers = normal(0, NUM_ROWS, 100), jnp.asarray(normal(1, 2, 100, num_experts))

    def run(x):
        how = {"implementation": "cpp", "selection": Selection(2, 30.0, True)}
        return forms.run("route", x, routers, jnp.int32(1), **how)

    logits, probs, indices, weights = assert_rows_are_alike(run, x)
    exact = x.astype(np.float64) @ np.asarray(routers[1], np.float64)
    exact = 30 * np.tanh(exact / 30)
    np.testing.assert_allclose(logits, exact, rtol=2e-6, atol=2e-5)
    exact = np.exp(exact - exact.max(axis=-1, keepdims=True))
    exact /= exact.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(probs, exact, rtol=1e-4)
    best = np.argsort(-exact, axis=-1)[:, :2]
    np.testing.assert_array_equal(indices, best)
    chosen = np.take_along_axis(exact, best, axis=-1)
    np.testing.assert_allclose(weights, chosen / chosen.sum(-1, keepdims=True), rtol=1e-4)


def test_the_router_takes_the_lower_of_equal_experts_and_survives_what_is_no_number():
    x = jnp.array([[1.0, 0.0], [0.0, 1.0], [np.nan, 1.0], [0.0, 0.0]])
    routers = jnp.array([[[0.0, 2.0, 2.0, 1.0], [3.0, 1.0, 3.0, 3.0]]])
    options = {"selection": Selection(3)}
    for form in ("cpp", "xla"):
        _, routing = forms.run("route", x, routers, jnp.int32(0), implementation=form, **options)
        indices = np.asarray(routing.expert_indices)
        np.testing.assert_array_equal(indices[[0, 1, 3]], [[1, 2, 3], [0, 2, 3], [0, 1, 2]])
        assert np.isnan(routing.expert_weights[2]).all()
        assert set(indices[2]) <= set(range(4))


@pytest.mark.parametrize(("depth", "size"), [(5, 3), (1029, 130)])
def test_logits(depth, size):
    x, table = normal(0, NUM_ROWS, depth), normal(1, size, depth)

    def run(x):
        return forms.run("logits", x, jnp.asarray(table), implementation="cpp")

    (found,) = assert_rows_are_alike(run, x)
    exact = x.astype(np.float64) @ table.astype(np.float64).T
    np.testing.assert_allclose(found, exact, rtol=1e-6, atol=4e-5)


@pytest.mark.parametrize("size", [3, 1280, 5003])
def test_sums_of_exponentials_and_their_logarithms(size):
    shifted = np.minimum(3 * normal(0, NUM_ROWS, size) - 4, 0)

    def run(shifted):
        sums = forms.run("exponential_sums", shifted, implementation="cpp")
        return sums, forms.run("log", sums[0], implementation="cpp")

    total, weighted, log_total = assert_rows_are_alike(run, shifted)
    powers = np.exp(shifted.astype(np.float64))
    np.testing.assert_allclose(total, powers.sum(-1), rtol=5e-7)
    np.testing.assert_allclose(weighted, (powers * shifted).sum(-1), rtol=2e-6, atol=1e-9)
    np.testing.assert_allclose(log_total, np.log(np.asarray(total, np.float64)), atol=1e-6)


# Few logits a row XLA sums up otherwise for one row than for many.
@pytest.mark.optimised
@pytest.mark.parametrize("num_devices", [1, 2])
def test_scores_of_tokens(num_devices):
    config = dataclasses.replace(TOY, vocab_size=1280)
    x, embedding = normal(0, NUM_ROWS, 64), normal(1, config.vocab_size, 64)
    tokens = np.arange(NUM_ROWS, dtype=np.int32)
    final_norm = np.ones(64, np.float32)

    def run(embedding, x, tokens):
        scored = token_statistics(embedding, config, x, tokens, 5)
        return scored, logit_lens(embedding, final_norm, config, x, 5)

    mesh = make_mesh(config, (1, num_devices))
    specs = (PartitionSpec(MODEL_AXIS), PartitionSpec(), PartitionSpec())
    sharded = jax.shard_map(
        run, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
    )
    assert_rows_are_alike(lambda x, tokens: sharded(jnp.asarray(embedding), x, tokens), x, tokens)
