"""The output head: logits of the whole vocabulary, what a given token scores, or the best token.

Per device, inside `jax.shard_map`, as `decoder`. The embedding is also the head; as float32 it
would be a good part of what a small model reads for a token. Where only the largest logit is
wanted, or a draw, an int8 copy rules out all but a few rows, and those are compared in float32;
log-probabilities of what is drawn read a second byte of each number. Where tokens are given, their
statistics are all that leaves the devices, and logits exist for some rows at a time.

Dimension key: M row, V vocabulary rows held here, D model dim.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from grok1.config import ModelConfig
from grok1.nn.sharding import MODEL_AXIS
from grok1.ops import forms
from grok1.ops.cpu import bindings, rowwise
from grok1.ops.cuda import presence
from grok1.ops.layers import exact_einsum, split_terms
from grok1.ops.residual import norm

_TABLE_BLOCK = 512  # rows copied at a time
_LOGITS_BYTES = 1 << 25  # most memory of one device that logits to be summed up take at a time


class ScreeningTable(NamedTuple):
    """An int8 copy of the embedding, and how far from it each row may be.

    Attributes:
      values: int8 `[V, D]`.
      scales: float32 `[V]`; `scales * values` is close to the embedding.
      uncertainty: float32 `[V]`; a row's product with any x is within `uncertainty * |x|` of the
        product with the copy, what rounding adds in float32 included.
    """

    values: Any
    scales: Any
    uncertainty: Any


class Remainders(NamedTuple):
    """What a `ScreeningTable` leaves out, in four bits a number.

    Attributes:
      codes: uint8 `[V, 32 * ceil(D / 64)]`; byte j of 32 has the code of column j of 64 in its low
        bits, of column j + 32 in its high ones. `scales * (table.values + (code - 7.5) / 15)` is
        closer to the embedding. Each was rounded up or down at random, so that the mean of its
        error is 0.
      uncertainty: float32 `[V]`; as the table's, of the product with both.
    """

    codes: Any
    uncertainty: Any


REMAINDER_STEPS = 15
"""Steps of a `Remainders` in one of its `ScreeningTable`."""


def screening_table(embedding: Float[Array, "V D"]) -> ScreeningTable:
    """Copies an embedding to int8, one scale a row, and bounds what is lost (Cauchy-Schwarz)."""
    width = embedding.shape[1]

    def copy(start, rows):
        scales = jnp.abs(rows).max(axis=-1) / 127
        divisor = jnp.where(scales == 0, 1, scales)[:, None]
        values = jnp.clip(jnp.round(rows / divisor), -127, 127)
        kept = values * scales[:, None]
        lost = jnp.linalg.norm(rows - kept, axis=-1)
        # Adding n float32 numbers in any order is off by at most n units in the last place.
        rounding = width * jnp.finfo(jnp.float32).eps * jnp.linalg.norm(kept, axis=-1)
        return ScreeningTable(values.astype(jnp.int8), scales, 1.001 * (lost + rounding))

    return _in_blocks(copy, embedding)


def remainders(embedding: Float[Array, "V D"], table: ScreeningTable) -> Remainders:
    """Copies in four bits what a `screening_table` leaves out, and bounds what both leave out."""
    width = embedding.shape[1]

    def copy(start, rows, values, scales):
        divisor = jnp.where(scales == 0, 1, scales)[:, None]
        values = values.astype(jnp.float32)
        steps = (rows / divisor - values) * REMAINDER_STEPS + REMAINDER_STEPS / 2
        codes = jnp.clip(jnp.floor(steps + _dither(start, steps.shape)), 0, REMAINDER_STEPS)
        kept = (values + (codes / REMAINDER_STEPS - 0.5)) * scales[:, None]
        lost = jnp.linalg.norm(rows - kept, axis=-1)
        # The kernel adds up 16 or more sums in turns: so many units in the last place. It adds half
        # a step of the table to all numbers, and takes it off at the end.
        added = (width / 16 + 32) * jnp.finfo(jnp.float32).eps
        rounding = added * (jnp.linalg.norm(kept, axis=-1) + 0.5 * width**0.5 * scales)
        return Remainders(_in_half_lines(codes), 1.001 * (lost + rounding))

    return _in_blocks(copy, embedding, table.values, table.scales)


def _in_half_lines(codes: Float[Array, "rows D"]) -> UInt8[Array, "rows packed"]:
    num_rows, width = codes.shape
    padded = jnp.pad(codes.astype(jnp.uint8), ((0, 0), (0, -width % 64)))
    low, high = jnp.moveaxis(padded.reshape(num_rows, -1, 2, 32), 2, 0)
    return (low | (high << 4)).reshape(num_rows, -1)


def _dither(start: Int[Array, ""], shape: tuple[int, int]) -> Float[Array, "rows D"]:
    """Numbers from 0 to 1 for rows from `start` on, the same on every device and at any time."""
    rows = start.astype(jnp.uint32) + jnp.arange(shape[0], dtype=jnp.uint32)
    bits = rows[:, None] * shape[1] + jnp.arange(shape[1], dtype=jnp.uint32)
    # MurmurHash3's finaliser (Appleby, 2008).
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    bits ^= bits >> 16
    return (bits >> 8).astype(jnp.float32) * 2**-24


def _in_blocks(copy: Callable[..., Any], *arrays: Array) -> Any:
    """Applies `copy(start, *rows)` to some rows at a time, so that float32 between takes little."""
    num_rows = len(arrays[0])
    num_blocks = -(-num_rows // _TABLE_BLOCK)
    block = min(_TABLE_BLOCK, num_rows)

    def rows_from(start):
        return (jax.lax.dynamic_slice_in_dim(array, start, block) for array in arrays)

    def write_block(i, table):
        # The last block starts early where the rows are no multiple of it.
        start = jnp.minimum(i * block, num_rows - block)
        return jax.tree.map(
            lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new, start, axis=0),
            table,
            copy(start, *rows_from(start)),
        )

    shapes = jax.eval_shape(lambda start: copy(start, *rows_from(start)), jnp.int32(0))
    empty = jax.tree.map(lambda leaf: jnp.zeros((num_rows, *leaf.shape[1:]), leaf.dtype), shapes)
    return jax.lax.fori_loop(0, num_blocks, write_block, empty)


def unembed(
    embedding: Float[Array, "V D"], config: ModelConfig, x: Float[Array, "M D"]
) -> Float[Array, "M vocab"]:
    """Logits of the whole vocabulary from the final norm's output; float32, on every device."""
    logits = jax.lax.all_gather(_products(embedding, x), MODEL_AXIS, axis=1, tiled=True)
    return logits * config.output_multiplier_scale


class TokenStatistics(NamedTuple):
    """What the model makes of given tokens, each where it stands; natural logarithms.

    Attributes:
      logprobs: float32 `[...]`, of the token.
      ranks: int32 `[...]`, how many tokens are more probable, equal ones of lower id included.
      entropies: float32 `[...]`, of the distribution over the vocabulary.
      top_tokens: int32 `[..., top]`, the most probable tokens, best first.
      top_logprobs: float32 `[..., top]`.
    """

    logprobs: Any
    ranks: Any
    entropies: Any
    top_tokens: Any
    top_logprobs: Any


def token_statistics(
    embedding: Float[Array, "V D"],
    config: ModelConfig,
    x: Float[Array, "M D"],
    tokens: Int[Array, " M"],
    num_top: int,
) -> TokenStatistics:
    """Scores one token a row; each device sums up its own part of the vocabulary.

    Args:
      embedding: This device's rows.
      config: The model.
      x: The final norm's output.
      tokens: The token that follows in each row.
      num_top: How many of the most probable tokens to return.
    """
    num_rows, width = x.shape
    vocab_here = len(embedding)
    first = jax.lax.axis_index(MODEL_AXIS) * vocab_here
    ids = first + jnp.arange(vocab_here)

    def score_block(rows):
        x, tokens = rows
        logits = _products(embedding, x) * config.output_multiplier_scale
        # The maximum is of the whole vocabulary, so that no exponential overflows on any device.
        largest = jax.lax.pmax(logits.max(axis=-1), MODEL_AXIS)
        shifted = logits - largest[:, None]
        exponentials = jnp.exp(shifted)
        total, weighted = jax.lax.psum(
            (exponentials.sum(axis=-1), (exponentials * shifted).sum(axis=-1)), MODEL_AXIS
        )
        log_total = jnp.log(total)

        local = tokens - first
        is_here = (local >= 0) & (local < vocab_here)
        found = jnp.take_along_axis(shifted, jnp.where(is_here, local, 0)[:, None], axis=1)[:, 0]
        chosen = jax.lax.psum(jnp.where(is_here, found, 0), MODEL_AXIS)
        before = (shifted > chosen[:, None]) | (
            (shifted == chosen[:, None]) & (ids < tokens[:, None])
        )
        ranks = jax.lax.psum(before.sum(axis=-1, dtype=jnp.int32), MODEL_AXIS)

        best, best_ids = jnp.zeros((len(x), 0)), jnp.zeros((len(x), 0), jnp.int32)
        if num_top > 0:
            best, places = jax.lax.top_k(shifted, min(num_top, vocab_here))
            # Devices hold ascending ids, so that equal logits stay in the order of their ids.
            best = jax.lax.all_gather(best, MODEL_AXIS, axis=1, tiled=True)
            best_ids = jax.lax.all_gather(places + first, MODEL_AXIS, axis=1, tiled=True)
            best, places = jax.lax.top_k(best, num_top)
            best_ids = jnp.take_along_axis(best_ids, places, axis=1).astype(jnp.int32)
        return TokenStatistics(
            chosen - log_total,
            ranks,
            log_total - weighted / total,
            best_ids,
            best - log_total[:, None],
        )

    block = max(1, min(num_rows, _LOGITS_BYTES // (4 * vocab_here)))
    num_blocks = -(-num_rows // block)
    padding = num_blocks * block - num_rows
    blocks = (
        jnp.pad(x, ((0, padding), (0, 0))).reshape(num_blocks, block, width),
        jnp.pad(tokens, (0, padding)).reshape(num_blocks, block),
    )
    statistics = jax.lax.map(score_block, blocks)
    return jax.tree.map(
        lambda leaf: leaf.reshape(num_blocks * block, *leaf.shape[2:])[:num_rows], statistics
    )


def logit_lens(
    embedding: Float[Array, "V D"],
    final_norm: Float[Array, " D"],
    config: ModelConfig,
    x: Float[Array, "M D"],
    num_top: int,
) -> tuple[Int[Array, "M top"], Float[Array, "M top"]]:
    """What the model would say if a layer were its last (nostalgebraist, 2020).

    Args:
      embedding: This device's rows.
      final_norm: The scale of the norm before the output head.
      config: The model.
      x: The residual stream after the layer.
      num_top: How many tokens to name.

    Returns:
      int32 tokens, the most probable first, and their float32 log-probabilities.
    """
    logits = unembed(embedding, config, norm(x, final_norm))
    best, tokens = jax.lax.top_k(logits, num_top)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return tokens.astype(jnp.int32), best - total


def most_probable(
    embedding: Float[Array, "V D"],
    table: ScreeningTable,
    x: Float[Array, "M D"],
    allowed: Bool[Array, "*M vocab"],
) -> Int[Array, " M"]:
    """The allowed token with the largest logit, as `unembed` and an argmax would find it; on CPUs.

    Args:
      embedding: This device's rows.
      table: Their `screening_table`.
      x: The final norm's output.
      allowed: False for tokens that must not be found, `[vocab]` for all rows or `[M, vocab]`.

    Returns:
      int32; -1 where no token is found, because the largest product is no number or infinite.
    """
    rows = len(embedding)
    first = jax.lax.axis_index(MODEL_AXIS) * rows
    here = jax.lax.dynamic_slice_in_dim(allowed, first, rows, axis=-1)
    index, product = bindings.most_probable(x, embedding, *table, here)
    products = jax.lax.all_gather(product, MODEL_AXIS)
    indices = jax.lax.all_gather(jnp.maximum(index, 0) + first, MODEL_AXIS)
    best = jnp.argmax(products, axis=0)
    found = jnp.take_along_axis(indices, best[None], axis=0)[0].astype(jnp.int32)
    return jnp.where(jnp.isfinite(products.max(axis=0)), found, -1)


def _products(embedding: Float[Array, "V D"], x: Float[Array, "M D"]) -> Float[Array, "M V"]:
    return forms.run("logits", x, embedding)


@forms.form("logits", "direct")
def _logits_direct(x: Float[Array, "M D"], embedding: Float[Array, "V D"]) -> Float[Array, "M V"]:
    if embedding.dtype != x.dtype:
        # Two terms, so that 16 bits of the input's mantissa count, in one pass over the table.
        terms = jnp.concatenate(split_terms(x, embedding.dtype))
        return exact_einsum("MD,VD->MV", terms, embedding).reshape(2, len(x), -1).sum(axis=0)
    return exact_einsum("MD,VD->MV", x, embedding)


def _is_not_for_rows(x, embedding) -> str | None:
    if not embedding.dtype == x.dtype == jnp.float32:
        return "it multiplies float32 by float32"
    return None


@forms.form("logits", "cpp", refuses=_is_not_for_rows)
def _logits_cpp(x: Float[Array, "M D"], embedding: Float[Array, "V D"]) -> Float[Array, "M V"]:
    return rowwise.table_products(x, embedding)


def _is_not_for_three_terms(x, embedding) -> str | None:
    if len(x) == 1:
        return "of one row XLA makes a product and a sum, as fast as memory is read"
    if (reason := _is_not_for_rows(x, embedding)) is not None:
        return reason
    if not presence.kernels():
        return "it takes an NVIDIA device of compute capability 8.0, on which kernels run"
    return None


@forms.form("logits", "three_terms", refuses=_is_not_for_three_terms)
def _logits_by_three_terms(
    x: Float[Array, "M D"], embedding: Float[Array, "V D"]
) -> Float[Array, "M V"]:
    # Both operands as two numbers of 11 bits each, split in registers; three products on tensor
    # cores. Those of float32 on ordinary cores take three times as long as the table is read.
    algorithm = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return jnp.einsum("MD,VD->MV", x, embedding, precision=algorithm)
