"""Routing by hand; sparse and dense experts against float64, and what padding may not touch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grok1.ops import dispatch
from grok1.ops import experts as experts_module
from grok1.ops.experts import ExpertWeights, expert_ffn, experts, experts_dense, experts_sparse
from grok1.ops.quantized import quantize
from grok1.ops.routing import Routing, route
from tests.helpers import dequantized, skip_unless_it_runs_here, slow

D, F = 7, 11

quantize_compiled = jax.jit(quantize, static_argnames="num_groups")
route_compiled = jax.jit(route, static_argnames="num_selected")


@jax.jit
def dense(x, weights, index, routing):
    return experts_dense(x, weights, index, routing)


@jax.jit
def sparse(x, weights, index, routing, valid):
    return experts_sparse(x, weights, index, routing, valid)


@functools.partial(jax.jit, static_argnames="form")
def in_form(x, weights, index, routing, valid, form):
    return experts(x, weights, index, routing, valid, implementation=form)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def random_weights(num_experts, lead=(), model_dim=D, hidden_dim=F):
    """On the host, so that XLA has no scaling of each shape to compile."""

    def draw(seed, rows, columns):
        drawn = np.random.default_rng(seed).standard_normal((*lead, num_experts, rows, columns))
        return (drawn / rows**0.5).astype(np.float32)

    return ExpertWeights(
        gate=draw(0, model_dim, hidden_dim),
        up=draw(1, model_dim, hidden_dim),
        down=draw(2, hidden_dim, model_dim),
    )


def random_inputs(num_tokens, num_experts, num_selected, model_dim=D):
    x, router = normal(3, num_tokens, model_dim), normal(4, model_dim, num_experts)
    return x, route_compiled(x, router, num_selected=num_selected)


def with_experts(routing, indices):
    return routing._replace(expert_indices=jnp.asarray(indices, jnp.int32))


def float64_experts(x, weights, routing):
    """Expert by expert, from the definition; `weights` has no layer axis."""
    x, gate, up, down = (np.asarray(array).astype(np.float64) for array in (x, *weights))
    indices, factors = np.asarray(routing.expert_indices), np.asarray(routing.expert_weights)
    out = np.zeros_like(x)
    for expert in range(len(gate)):
        token, choice = np.nonzero(indices == expert)
        hidden = x[token] @ gate[expert]
        gelu = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        product = (gelu * (x[token] @ up[expert])) @ down[expert]
        np.add.at(out, token, factors[token, choice][:, None] * product)
    return out


def assert_close(actual, expected, tolerance=1e-5):
    assert actual.dtype == jnp.float32
    assert np.abs(np.asarray(actual) - expected).max() <= tolerance * np.abs(expected).max()


# --- routing ----------------------------------------------------------------------------------


def test_route_by_hand():
    # Each coordinate selects logits that are the logarithms of probabilities.
    probs = np.array([[0.4, 0.1, 0.3, 0.15, 0.05], [0.05, 0.2, 0.11, 0.14, 0.5]])
    routing = route(jnp.eye(2), jnp.asarray(np.log(probs), jnp.float32), 3)
    np.testing.assert_allclose(routing.probs, probs, rtol=1e-6)
    # Best first, and the probabilities as they are: those of a token sum to less than 1.
    np.testing.assert_array_equal(routing.expert_indices, [[0, 2, 3], [4, 1, 3]])
    expected = [[0.4, 0.3, 0.15], [0.5, 0.2, 0.14]]
    np.testing.assert_allclose(routing.expert_weights, expected, rtol=1e-6)


def test_route_with_a_soft_cap_and_renormalised_gates_by_hand():
    x, router = jnp.asarray([[1.0]]), jnp.asarray([[0.0, 4.0, 2.0]])
    capped = 2 * np.tanh(np.array([0.0, 4.0, 2.0]) / 2)
    probs = np.exp(capped) / np.exp(capped).sum()
    routing = route(x, router, 2, softcap=2.0)
    np.testing.assert_allclose(routing.probs[0], probs, rtol=1e-6)
    np.testing.assert_allclose(routing.expert_weights[0], probs[[1, 2]], rtol=1e-6)
    routing = route(x, router, 2, softcap=2.0, renormalize=True)
    np.testing.assert_allclose(routing.probs[0], probs, rtol=1e-6)
    np.testing.assert_allclose(
        routing.expert_weights[0], probs[[1, 2]] / probs[[1, 2]].sum(), rtol=1e-6
    )


def test_route_breaks_ties_to_the_lower_expert():
    routing = route_compiled(jnp.ones((1, D)), jnp.zeros((D, 8)), num_selected=2)
    np.testing.assert_array_equal(routing.expert_indices, [[0, 1]])
    np.testing.assert_array_equal(routing.expert_weights, [[0.125, 0.125]])


def test_route_is_float32_whatever_the_input():
    # Logits 1 and 1.001 are one number in bfloat16: rounded, the lower expert would win.
    router = jnp.array([[1.0, 1.001]])
    routing = route_compiled(jnp.ones((1, 1), jnp.bfloat16), router, num_selected=1)
    assert routing.probs.dtype == jnp.float32
    np.testing.assert_array_equal(routing.expert_indices, [[1]])


# --- experts ----------------------------------------------------------------------------------


def test_expert_ffn_by_hand():
    # gelu(1) = 0.841192 in its tanh form (0.841345 exactly), times 3, times 2.
    one = jnp.ones((1, 1, 1))
    weights = ExpertWeights(gate=one, up=3 * one, down=2 * one)
    output = expert_ffn(jnp.ones((1, 1)), weights, (0,))
    np.testing.assert_allclose(output, [[6 * 0.841192]], rtol=1e-6)


@pytest.mark.optimised
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_selected"),
    # 300 tokens are several blocks of 128 an expert.
    [pytest.param(1, 8, 2, marks=slow), (2, 5, 3), (300, 8, 2)],
)
def test_dense_and_sparse_against_float64(num_tokens, num_experts, num_selected):
    x, routing = random_inputs(num_tokens, num_experts, num_selected)
    weights = random_weights(num_experts)
    expected = float64_experts(x, weights, routing)
    assert_close(dense(x, weights, (), routing), expected)
    assert_close(sparse(x, weights, (), routing, np.ones(num_tokens, bool)), expected)


@pytest.mark.parametrize("num_tokens", [7, 300])
def test_no_token_is_dropped_when_all_choose_the_same_experts(num_tokens):
    x, routing = random_inputs(num_tokens, 8, 2)
    routing = with_experts(routing, np.broadcast_to([5, 2], (num_tokens, 2)))
    weights = random_weights(8)
    output = sparse(x, weights, (), routing, np.ones(num_tokens, bool))
    assert_close(output, float64_experts(x, weights, routing))


@pytest.mark.parametrize("num_tokens", [7, 300])
def test_padding_gets_zeros_and_its_experts_are_not_read(num_tokens):
    x, routing = random_inputs(num_tokens, 8, 2)
    valid = np.arange(num_tokens) % 3 != 1
    # Valid tokens choose among experts 1, 4 and 6; padding chooses from those that hold NaN.
    choices = np.array([1, 4, 6])[(np.arange(num_tokens)[:, None] + [0, 1]) % 3]
    routing = with_experts(routing, np.where(valid[:, None], choices, [0, 7]))
    weights = random_weights(8)
    expected = float64_experts(x, weights, routing)[valid]
    unread = np.where(np.isin(np.arange(8), [1, 4, 6]), 0, np.nan).astype(np.float32)
    weights = jax.tree.map(lambda weight: weight + unread[:, None, None], weights)
    output = np.asarray(sparse(x, weights, (), routing, valid))
    assert_close(output[valid], expected)
    np.testing.assert_array_equal(output[~valid], 0)


@pytest.mark.parametrize("num_tokens", [7, 300])
def test_an_expert_runs_once_for_each_block_of_its_valid_rows(monkeypatch, num_tokens):
    runs = []

    def recording_ffn(x, weights, index, num_valid):
        jax.debug.callback(lambda expert: runs.append(int(expert)), index[-1])
        return expert_ffn(x, weights, index, num_valid)

    monkeypatch.setattr(experts_module, "expert_ffn", recording_ffn)
    x, routing = random_inputs(num_tokens, 8, 2)
    valid = np.arange(num_tokens) % 3 != 1
    choices = np.where(np.arange(num_tokens)[:, None] < 5, [6, 1], [4, 6])
    routing = with_experts(routing, np.where(valid[:, None], choices, [0, 7]))
    output = jax.jit(experts_sparse)(x, random_weights(8), (), routing, valid)
    output.block_until_ready()
    jax.effects_barrier()
    # All the valid tokens, 200 of 300, choose expert 6: two blocks of 128.
    num_blocks = 1 if num_tokens == 7 else 2
    assert runs == [1] + [4] * num_blocks + [6] * num_blocks


def test_a_batch_of_padding_alone_reads_no_expert():
    x, routing = random_inputs(7, 8, 2)
    weights = jax.tree.map(lambda weight: weight + jnp.nan, random_weights(8))
    output = sparse(x, weights, (), routing, np.zeros(7, bool))
    np.testing.assert_array_equal(output, np.zeros((7, D)))


@pytest.mark.optimised
@pytest.mark.parametrize("form", ["dense", "sparse", "cpp"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.02)])
def test_quantised_weights_of_one_layer_of_a_stack(form, dtype, tolerance):
    skip_unless_it_runs_here(form)
    model_dim, hidden_dim = 13, 24  # 8 groups of 3 rows of the down projection, as released
    gate, up, down = random_weights(5, (3,), model_dim, hidden_dim)
    weights = ExpertWeights(
        quantize_compiled(gate), quantize_compiled(up), quantize_compiled(down, num_groups=8)
    )
    x, routing = random_inputs(7, 5, 3, model_dim)
    x = x.astype(dtype)
    exact = [dequantized(weight) for weight in weights]
    for layer in (0, 2):
        output = in_form(x, weights, (layer,), routing, np.ones(7, bool), form)
        one_layer = ExpertWeights(*(np.asarray(weight)[layer] for weight in exact))
        assert_close(output, float64_experts(x, one_layer, routing), tolerance)


@pytest.mark.parametrize("form", ["dense", "sparse", "cpp"])
@pytest.mark.parametrize("num_tokens", [pytest.param(2, marks=slow), 9, 40])
def test_what_is_no_number_stays_so(form, num_tokens):
    skip_unless_it_runs_here(form)
    weights = ExpertWeights(*(quantize_compiled(one) for one in random_weights(3)))
    x, routing = random_inputs(num_tokens, 3, 1)
    routing = with_experts(routing, (np.arange(num_tokens) % 2)[:, None])
    one_is_none = weights.up._replace(scales=weights.up.scales.at[1, 0, 4].set(jnp.nan))
    of_token, of_expert = np.arange(num_tokens) == 1, np.arange(num_tokens) % 2 == 1
    gates = routing._replace(expert_weights=routing.expert_weights.at[1].set(jnp.nan))
    for inputs, expected in (
        ((x.at[1, 3].set(jnp.nan), weights, routing), of_token),
        ((x.at[1, 3].set(jnp.inf), weights, routing), of_token),
        ((x, weights, gates), of_token),
        ((x, weights._replace(up=one_is_none), routing), of_expert),
    ):
        x_here, weights_here, routing_here = inputs
        valid = np.ones(num_tokens, bool)
        output = in_form(x_here, weights_here, (), routing_here, valid, form)
        if form == "dense":
            # Every expert has to do with every token there.
            assert not np.isfinite(np.asarray(output)[expected]).any()
        else:
            np.testing.assert_array_equal(~np.isfinite(output), np.tile(expected[:, None], D))


@pytest.mark.optimised
@pytest.mark.parametrize(
    "num_tokens", [1, *(pytest.param(number, marks=slow) for number in (3, 9)), 500]
)
def test_native_experts_of_few_and_of_many_rows(num_tokens):
    skip_unless_it_runs_here("cpp")
    # More hidden columns than a panel, full tiles and not; in 500 tokens, several passes.
    model_dim, hidden_dim = 150, 4200
    gate, up, down = random_weights(5, (), model_dim, hidden_dim)
    weights = ExpertWeights(
        quantize_compiled(gate), quantize_compiled(up), quantize_compiled(down, num_groups=8)
    )
    x, routing = random_inputs(num_tokens, 5, 2, model_dim)
    # Three of four choose expert 0, and one token in 50 expert 4: many rows and few in one call.
    number = np.arange(num_tokens)
    first = np.where(number % 4 < 3, 0, 1)
    routing = with_experts(routing, np.stack([first, np.where(number % 50 == 0, 4, 2)], axis=1))
    valid = number % 7 != 5
    output = np.asarray(in_form(x, weights, (), routing, valid, "cpp"))
    expected = float64_experts(x, [dequantized(weight) for weight in weights], routing)
    assert_close(output[valid], expected[valid], 2e-6)
    np.testing.assert_array_equal(output[~valid], 0)


@pytest.mark.parametrize(
    # A panel of hidden columns, or the whole width, narrower than the parts that work is cut into.
    ("model_dim", "hidden_dim"),
    [(3, 16), (16, 1), (16, 4098)],
)
def test_native_experts_with_next_to_no_columns(model_dim, hidden_dim):
    skip_unless_it_runs_here("cpp")
    weights = ExpertWeights(*map(quantize_compiled, random_weights(4, (), model_dim, hidden_dim)))
    x, routing = random_inputs(2, 4, 2, model_dim)
    valid = np.ones(2, bool)
    # The kernel's memory keeps what a call has left there.
    in_form(1e6 * x, weights, (), routing, valid, "cpp")
    output = in_form(x, weights, (), routing, valid, "cpp")
    exact = [dequantized(weight) for weight in weights]
    assert_close(output, float64_experts(x, exact, routing), 2e-6)


def check_grouped(x, weights, routing, valid):
    """Against float64, and that padding gets zeros; inputs of the products are bfloat16."""
    x = x.astype(jnp.bfloat16)
    output = np.asarray(in_form(x, weights, (1,), routing, valid, "grouped"))
    one_layer = [np.asarray(dequantized(weight))[1] for weight in weights]
    expected = float64_experts(x, one_layer, routing)[valid]
    assert np.linalg.norm(output[valid] - expected) <= 4e-3 * np.linalg.norm(expected)
    np.testing.assert_array_equal(output[~valid], 0)


@pytest.fixture(scope="module")
def stack():
    gate, up, down = random_weights(5, (2,), 13, 24)
    return ExpertWeights(
        quantize_compiled(gate), quantize_compiled(up), quantize_compiled(down, num_groups=8)
    )


@pytest.mark.parametrize(
    "num_tokens", [200, *(pytest.param(number, marks=slow) for number in (65, 1000))]
)
def test_many_tokens_in_groups_against_float64(stack, num_tokens):
    x, routing = random_inputs(num_tokens, 5, 2, 13)
    every = np.ones(num_tokens, bool)
    check_grouped(x, stack, routing, every)
    check_grouped(x, stack, routing, np.arange(num_tokens) % 7 < 3)
    # All tokens at one expert; expert 0, 2 and 4 are nobody's.
    check_grouped(x, stack, with_experts(routing, np.tile([3, 1], (num_tokens, 1))), every)


def test_more_rows_than_the_largest_group_go_in_several(monkeypatch, stack):
    monkeypatch.setattr(dispatch, "_MOST_ROWS", 128)
    # Another number of tokens, so that nothing that is compiled fits.
    x, routing = random_inputs(301, 5, 2, 13)
    routing = with_experts(routing, np.tile([3, 1], (301, 1)))
    check_grouped(x, stack, routing, np.ones(301, bool))


def test_an_expert_that_nobody_chose_is_not_read_in_groups(stack):
    x, routing = random_inputs(200, 5, 2, 13)
    valid = np.arange(200) % 3 != 1
    routing = with_experts(routing, np.where(valid[:, None], [3, 1], [0, 4]))
    unread = np.isin(np.arange(5), [1, 3])[:, None, None]
    poisoned = ExpertWeights(
        *(one._replace(scales=jnp.where(unread, one.scales, jnp.nan)) for one in stack)
    )
    output = in_form(x.astype(jnp.bfloat16), poisoned, (1,), routing, valid, "grouped")
    assert np.isfinite(output).all()


@pytest.mark.parametrize("num_tokens", [65, 128, 1000, 2048, 8192])
def test_sizes_of_groups_hold_every_expert_with_little_padding(num_tokens):
    sizes = dispatch.sizes_of_groups(num_tokens, 2, 8)
    assert all(size % 128 == 0 for size in sizes)
    assert len(sizes) <= 12  # for each there is a program
    assert sizes[-1] >= min(num_tokens, 4096)
    for num_rows in range(num_tokens // 8, num_tokens // 2, 17):
        assert min(size for size in sizes if size >= num_rows) <= max(128, 1.5 * num_rows + 128)


def test_groups_are_for_many_tokens_of_bfloat16(stack):
    for x, why in (
        (normal(3, 70, 13), "its products are of bfloat16, not float32"),
        (normal(3, 64, 13).astype(jnp.bfloat16), "it is for more than 64 tokens, not 64"),
    ):
        routing = route_compiled(normal(3, len(x), 13), normal(4, 13, 5), num_selected=2)
        with pytest.raises(NotImplementedError, match=f"'grouped': {why}"):
            experts(x, stack, (1,), routing, jnp.ones(len(x), bool), "grouped")


def test_a_row_does_not_depend_on_its_batch_mates():
    weights = random_weights(8)
    x, routing = random_inputs(300, 8, 2)
    together = np.asarray(sparse(x, weights, (), routing, np.ones(300, bool)))
    # Alone, in a small batch, and in the same batch turned round, where it lies in another block.
    for rows in ([0], [123], range(100, 107), range(299, -1, -1)):
        rows = list(rows)
        chosen = Routing(*(jnp.asarray(np.asarray(part)[rows]) for part in routing))
        apart = sparse(np.asarray(x)[rows], weights, (), chosen, np.ones(len(rows), bool))
        error = np.abs(np.asarray(apart) - together[rows]).max()
        assert error <= 1e-6 * np.abs(together).max()
