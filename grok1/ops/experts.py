"""The mixture of experts: the chosen experts' feed-forward, dense and sparse.

Dimension key: M token, D model dim, F expert hidden dim, E expert, A selected experts a token,
L layer.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grok1.ops import dispatch, forms
from grok1.ops.cpu import bindings
from grok1.ops.cuda import calls, presence, shapes, shapes_int4, shapes_of_prompts
from grok1.ops.formats import is_quantized
from grok1.ops.int4 import Int4Array
from grok1.ops.layers import exact_einsum
from grok1.ops.quantized import Index, QuantizedArray, dequantize, matmul
from grok1.ops.routing import Routing

# Most rows of one expert that are multiplied at once; also what the last rows are padded to.
_BLOCK = 128


class ExpertWeights(NamedTuple):
    """The experts of a stack of layers; `down(gelu(gate(x)) * up(x))`.

    Attributes:
      gate: `[L, E, D, F]`.
      up: `[L, E, D, F]`.
      down: `[L, E, F, D]`.
    """

    gate: Any
    up: Any
    down: Any


class FetchedExperts(NamedTuple):
    """The experts of a stack of layers whose int8 values the host fetches when they are chosen.

    Attributes:
      handle: uint32 `[2]`, names the host's function: that of a `bindings.Fetch`; None where the
        host brings experts to the device itself.
      gate_scales: bfloat16 `[L, E, G, F]`.
      up_scales: bfloat16 `[L, E, G, F]`.
      down_scales: bfloat16 `[L, E, G, D]`.
    """

    handle: Any
    gate_scales: Any
    up_scales: Any
    down_scales: Any


class FetchedInt4Experts(NamedTuple):
    """The experts of a stack of layers of which the host fetches all that is 4-bit.

    Attributes:
      handle: As of `FetchedExperts`.
      sizes: uint32 `[4]`: E, F, the blocks of gate and up, and those of down; None where the host
        brings experts to the device itself.
    """

    handle: Any
    sizes: Any


def fetched_parts(weight: Any) -> range:
    """Which parts of an expert's quantised weight are fetched; int8 scales are small, and stay."""
    return range(1) if isinstance(weight, QuantizedArray) else range(len(weight))


class Routed(NamedTuple):
    """Tokens and the experts that they chose.

    Attributes:
      x: The layer's normed input `[M, D]`, in the type of the products.
      expert_indices: int32 `[M, A]`; those of padding are beyond the last expert.
      expert_weights: float32 `[M, A]`.
    """

    x: Array
    expert_indices: Array
    expert_weights: Array


def experts(
    x: Float[Array, "M D"],
    weights: ExpertWeights | FetchedExperts | FetchedInt4Experts,
    index: Index,
    routing: Routing,
    valid: Bool[Array, " M"],
    implementation: str | None = None,
) -> Float[Array, "M D"]:
    """Sums each token's experts, weighted by the router.

    Args:
      x: Input, in the type of the products.
      weights: Experts of a stack of layers; fetched ones where `forms.has_kernels`, and without a
        choice of implementation.
      index: Index of the layer, `(layer,)`, or `()` when the experts have no layer axis.
      routing: Where each token goes.
      valid: False for padding, which gets zeros.
      implementation: "dense" computes every expert for every token, "sparse" only the chosen ones,
        "cpp" and "grouped" too, from quantised weights, "cuda" and "cuda_tiles" from int8 ones,
        "cuda_int4" from 4-bit ones; None for that of `forms.PREFERRED`.

    Returns:
      float32.
    """
    if isinstance(weights, (FetchedExperts, FetchedInt4Experts)):
        return experts_fetched(x, weights, index, routing, valid)
    arguments = x, weights, index, routing, valid
    return forms.run("experts", *arguments, implementation=implementation)


@forms.form("experts", "dense")
def _experts_dense(
    x: Float[Array, "M D"],
    weights: ExpertWeights,
    index: Index,
    routing: Routing,
    valid: Bool[Array, " M"],
) -> Float[Array, "M D"]:
    return jnp.where(valid[:, None], experts_dense(x, weights, index, routing), 0)


def experts_dense(
    x: Float[Array, "M D"], weights: ExpertWeights, index: Index, routing: Routing
) -> Float[Array, "M D"]:
    """Every expert for every token, then a weighted sum: the readable, differentiable reference.

    Args:
      x: Input; the inputs of the products are rounded to its type, the products are float32.
      weights: Experts of a stack of layers.
      index: Index of the layer, `(layer,)`, or `()` when the experts have no layer axis.
      routing: Where each token goes.

    Returns:
      float32.
    """
    gate, up, down = (dequantize(weight)[index] for weight in weights)
    num_experts = routing.probs.shape[-1]
    chosen_MAE = jax.nn.one_hot(routing.expert_indices, num_experts, dtype=jnp.float32)
    weights_ME = exact_einsum("MA,MAE->ME", routing.expert_weights, chosen_MAE)
    x_MD = x.astype(jnp.float32)
    hidden_MEF = jax.nn.gelu(exact_einsum("MD,EDF->MEF", x_MD, gate), approximate=True)
    hidden_MEF *= exact_einsum("MD,EDF->MEF", x_MD, up)
    out_MED = exact_einsum("MEF,EFD->MED", hidden_MEF.astype(x.dtype).astype(jnp.float32), down)
    return exact_einsum("MED,ME->MD", out_MED, weights_ME)


@forms.form("experts", "sparse")
def experts_sparse(
    x: Float[Array, "M D"],
    weights: ExpertWeights,
    index: Index,
    routing: Routing,
    valid: Bool[Array, " M"],
) -> Float[Array, "M D"]:
    """Only the chosen experts: rows sorted by expert, each expert's rows in blocks.

    An expert that no valid token chose is not read, one that several chose is read once a block;
    no token is dropped, whatever the balance.

    Args:
      x: Input, in the type of the products.
      weights: Experts of a stack of layers.
      index: Index of the layer, `(layer,)`, or `()` when the experts have no layer axis.
      routing: Where each token goes.
      valid: False for padding, which costs nothing and gets zeros.

    Returns:
      float32.
    """
    num_tokens, num_experts = routing.probs.shape
    # A token picks an expert at most once, so an expert has at most M rows.
    block = min(_BLOCK, num_tokens)
    rows = dispatch.sorted_rows(x, routing.expert_indices, valid, num_experts, block)

    def run(x_block, expert, num_valid):
        return expert_ffn(x_block, weights, (*index, expert), num_valid)

    out_sorted = dispatch.run_in_blocks(rows, block, run)
    return dispatch.summed(out_sorted, rows, routing.expert_weights, valid)


def _is_not_grouped(x, weights, index, routing, valid) -> str | None:
    if not all(map(is_quantized, weights)):
        return "it reads quantised weights"
    return _is_not_of_many(x, shapes.MOST_ROWS)


def _is_not_of_many(x, few: int) -> str | None:
    if x.dtype != jnp.bfloat16:
        return f"its products are of bfloat16, not {x.dtype}"
    return None if len(x) > few else f"it is for more than {few} tokens, not {len(x)}"


@forms.form("experts", "grouped", refuses=_is_not_grouped)
def experts_grouped(
    x: Float[Array, "M D"],
    weights: ExpertWeights,
    index: Index,
    routing: Routing,
    valid: Bool[Array, " M"],
) -> Float[Array, "M D"]:
    """As `experts_sparse`, for many tokens: each expert's rows in one product, in bfloat16.

    The matrix is made a float one first. An expert's rows are padded to one of a few numbers, for
    each of which there is a program of its own; a loop of known length chooses among them.
    """
    num_tokens, num_experts = routing.probs.shape
    sizes = dispatch.sizes_of_groups(num_tokens, routing.expert_indices.shape[1], num_experts)
    rows = dispatch.sorted_rows(x, routing.expert_indices, valid, num_experts, sizes[-1])

    def run(x_group, expert):
        return expert_ffn(x_group, weights, (*index, expert), implementation="converted")

    out_sorted = dispatch.run_in_groups(rows, sizes, run)
    return dispatch.summed(out_sorted, rows, routing.expert_weights, valid)


def _is_not_for_tiles(x, weights, index, routing, valid) -> str | None:
    if "experts_prompt" not in presence.kernels():
        return "its CUDA kernels are not available here"
    if not all(isinstance(weight, QuantizedArray) for weight in weights):
        return "it reads int8 weights"
    reason = _is_not_of_many(x, shapes_of_prompts.MOST_FEW)
    if reason is not None:
        return reason
    gate, up, down = (calls.matrix_of((weight.values, weight.scales)) for weight in weights)
    return shapes.refusal_of_expert(gate, up, down, shapes_of_prompts.refusal_of_tiles)


@forms.form("experts", "cuda_tiles", refuses=_is_not_for_tiles)
def experts_cuda_tiles(
    x: Float[Array, "M D"],
    weights: ExpertWeights,
    index: Index,
    routing: Routing,
    valid: Bool[Array, " M"],
) -> Float[Array, "M D"]:
    """As `experts_grouped`, in CUDA: the float matrix is made in registers, for every tile anew."""
    (layer,) = index or (0,)
    rows = dispatch.sorted_rows(x, routing.expert_indices, valid, routing.probs.shape[-1], 0)
    gate, up, down = ((weight.values, weight.scales) for weight in weights)
    of_rows = rows.first_row, rows.rows_per_expert
    out_sorted = calls.experts_of_prompts(rows.x, (gate, up, down), layer, *of_rows)
    return dispatch.summed(out_sorted, rows, routing.expert_weights, valid)


def _is_float(x, weights, index, routing, valid) -> str | None:
    if len({type(weight) for weight in weights}) == 1 and is_quantized(weights[0]):
        return None
    return "it reads quantised weights, gate, up and down in one format"


@forms.form("experts", "cpp", refuses=_is_float)
def experts_cpp(
    x: Float[Array, "M D"],
    weights: ExpertWeights,
    index: Index,
    routing: Routing,
    valid: Bool[Array, " M"],
) -> Float[Array, "M D"]:
    """As `experts_sparse`, in C++: quantised weights read in place, float32 whatever the input."""
    (layer,) = index or (0,)
    num_experts = routing.probs.shape[-1]
    indices_MA = jnp.where(valid[:, None], routing.expert_indices, num_experts)
    x = x.astype(jnp.float32)
    return bindings.experts(x, weights, layer, indices_MA, routing.expert_weights)


def _is_not_for_cuda(x, weights, index, routing, valid) -> str | None:
    if not all(isinstance(weight, QuantizedArray) for weight in weights):
        return "it reads int8 weights"
    if len(x) > shapes.MOST_ROWS:
        return f"it runs up to {shapes.MOST_ROWS} tokens, not {len(x)}"
    gate, up, down = (calls.matrix_of((weight.values, weight.scales)) for weight in weights)
    return shapes.refusal_of_experts(routing.probs.shape[-1], gate, up, down)


@forms.form("experts", "cuda", refuses=_is_not_for_cuda)
def experts_cuda(
    x: Float[Array, "M D"],
    weights: ExpertWeights,
    index: Index,
    routing: Routing,
    valid: Bool[Array, " M"],
) -> Float[Array, "M D"]:
    """As `experts_sparse`, in CUDA, for few tokens: int8 weights read in place, once; float32."""
    (layer,) = index or (0,)
    gate, up, down = ((weight.values, weight.scales) for weight in weights)
    choice = routing.expert_indices, routing.expert_weights
    return calls.experts(x, (gate, up, down), layer, choice, valid)


def _is_not_for_cuda_int4(x, weights, index, routing, valid) -> str | None:
    if "experts_int4" not in presence.kernels():
        return "its CUDA kernels are not available here"
    if not all(isinstance(weight, Int4Array) for weight in weights):
        return "it reads 4-bit weights"
    if len(x) > shapes.MOST_ROWS:
        return f"it runs up to {shapes.MOST_ROWS} tokens, not {len(x)}"
    gate, up, down = map(calls.int4_matrix_of, weights)
    num_experts = routing.probs.shape[-1]
    return shapes.refusal_of_experts(num_experts, gate, up, down, shapes_int4.refusal_of)


@forms.form("experts", "cuda_int4", refuses=_is_not_for_cuda_int4)
def experts_cuda_int4(
    x: Float[Array, "M D"],
    weights: ExpertWeights,
    index: Index,
    routing: Routing,
    valid: Bool[Array, " M"],
) -> Float[Array, "M D"]:
    """As `experts_cuda`, of 4-bit weights; of more than a few bfloat16 tokens 15 bits count."""
    (layer,) = index or (0,)
    choice = routing.expert_indices, routing.expert_weights
    is_made_in_blocks = "experts_int4_of_one" in presence.kernels()
    return calls.experts_int4(x, tuple(weights), layer, choice, valid, is_made_in_blocks)


def experts_fetched(
    x: Float[Array, "M D"],
    weights: FetchedExperts | FetchedInt4Experts,
    index: Index,
    routing: Routing,
    valid: Bool[Array, " M"],
) -> Float[Array, "M D"]:
    """`experts_cpp` of weights that are read where the host has them."""
    (layer,) = index
    indices_MA = jnp.where(valid[:, None], routing.expert_indices, routing.probs.shape[-1])
    x = x.astype(jnp.float32)
    return bindings.fetched_experts(
        x, weights.handle, weights[1:], layer, indices_MA, routing.expert_weights
    )


def fetched_expert(
    routed: Routed,
    values: Sequence[Array],
    scales: FetchedExperts | FetchedInt4Experts,
    layer: Int[Array, ""],
    expert: Int[Array, ""],
) -> Float[Array, "M D"]:
    """What one expert adds for the tokens that chose it; on any platform.

    Args:
      routed: The tokens.
      values: What is fetched of its gate, up and down: int8 values `[1, K, N]`, or the three parts
        of each, which are 4-bit.
      scales: Those of all experts that are not fetched.
      layer: Index of the layer.
      expert: Which of the layer's experts it is.

    Returns:
      float32.
    """
    if isinstance(scales, FetchedExperts):
        alone = ExpertWeights(
            *(
                QuantizedArray(matrix, of_all[layer, expert][None])
                for matrix, of_all in zip(values, scales[1:], strict=True)
            )
        )
    else:
        alone = ExpertWeights(*(Int4Array(*values[i : i + 3]) for i in (0, 3, 6)))
    x, expert_indices, expert_weights = routed
    is_mine_MA = expert_indices == expert
    # As the first expert of one; tokens that did not choose it are as padding.
    to_it = Routing(
        jnp.ones((len(x), 1)),
        jnp.where(is_mine_MA, 0, 1),
        jnp.where(is_mine_MA, expert_weights, 0),
    )
    return experts(x, alone, (), to_it, is_mine_MA.any(axis=1))


def expert_ffn(
    x: Float[Array, "M D"],
    weights: ExpertWeights,
    index: Index,
    num_valid: int | Array | None = None,
    implementation: str | None = None,
) -> Float[Array, "M D"]:
    """One expert's gated feed-forward; float32. GELU in its tanh form, as trained.

    Args:
      x: Input, in the type of the products.
      weights: Experts of a stack of layers.
      index: Index of the layer, if there is such an axis, and of the expert.
      num_valid: Rows from this one on do not matter, int32; None for all rows.
      implementation: As for `matmul`.
    """
    how = index, num_valid, implementation
    hidden = jax.nn.gelu(matmul(x, weights.gate, *how), approximate=True)
    hidden *= matmul(x, weights.up, *how)
    return matmul(hidden.astype(x.dtype), weights.down, *how)
