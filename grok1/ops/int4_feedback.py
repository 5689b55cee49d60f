"""Rounding to 4 bits with error feedback (GPTQ): what a row loses, the rows below it make up for.

With inputs X, what rounding W to Q does to the products is |X (W - Q)|^2, which is |M^T E|^2 with
the errors E = W - Q and the upper triangular M of the Gram matrix X^T X = M M^T. Row i of M^T E is
M_ii E_i and a sum over the rows above it; so these are rounded first, and row i is rounded from
where that sum is zero: from W_i + sum_k (M_ki / M_ii) E_k. Blocks take their scales when their turn
comes, from the weights as they are to be rounded then. This needs no inverse of the Gram matrix.

Dimension key: K contracting rows, N output columns, T rows of inputs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from grok1.ops import forms
from grok1.ops.cpu import bindings
from grok1.ops.formats import INT4
from grok1.ops.int4 import BOOK, Int4Array, group_rows, pack, pack_subscales
from grok1.ops.int4_rounding import (
    LARGEST,
    LARGEST_OF_BLOCK,
    inverse_of,
    nearest_codes,
    searched,
)

DAMPING = 0.01
"""Share of the mean of a Gram matrix's diagonal that is added to it, so that it has a factor."""

_COLUMNS = 4096  # that are rounded at a time


class _Block(NamedTuple):
    """A block that is rounded: its parts, the errors of its rows, and what the columns lose."""

    weight: Int4Array
    errors: np.ndarray
    lost: np.ndarray


def feedback_factor(gram: Float[np.ndarray, "K K"]) -> Float[np.ndarray, "K K"]:
    """Returns what `round_with_feedback` takes: M_ki / M_ii above the diagonal, and M_ii on it.

    Args:
      gram: X^T X of some inputs `[T, K]`; some are not zero.

    Returns:
      float32.
    """
    # M is the Cholesky factor of the rows and columns in reverse.
    damped = gram[::-1, ::-1].astype(np.float64)
    damped[np.diag_indices_from(damped)] += DAMPING * np.diagonal(damped).mean()
    factor = np.linalg.cholesky(damped)[::-1, ::-1]
    diagonal = np.diagonal(factor).copy()
    shares = (factor / diagonal).astype(np.float32)
    shares[np.diag_indices_from(shares)] = diagonal
    return shares


def round_with_feedback(
    weight: Float[np.ndarray, "K N"],
    num_blocks: int,
    factors: Sequence[Float[np.ndarray, "rows rows"]],
    implementation: str | None = None,
) -> tuple[Int4Array, float]:
    """Rounds a matrix to 4 bits for the inputs that it gets.

    Args:
      weight: float32.
      num_blocks: Blocks along K.
      factors: Of `feedback_factor`, for parts of the rows that are as long as each other and
        whole blocks: errors are made up for within a part.
      implementation: The form to take, "cpp" or "xla"; None for the best here.

    Returns:
      The weight, NumPy arrays, and the sum of the squared errors of the products, as far as the
      factors know of them.
    """
    form = implementation or forms.chosen("round_int4", jax.default_backend(), weight, num_blocks)
    run = _block_cpp if form == "cpp" else _block_xla
    rows, columns = weight.shape
    block, part_rows = rows // num_blocks, rows // len(factors)
    found, lost = [], 0.0
    for start in range(0, columns, _COLUMNS):
        original = np.ascontiguousarray(weight[:, start : start + _COLUMNS])
        adjusted, blocks = original.copy(), []
        for number in range(num_blocks):
            begin, end = number * block, (number + 1) * block
            part = begin // part_rows
            first, last = part * part_rows, (part + 1) * part_rows
            factor, here = factors[part], slice(begin - first, end - first)
            shares = np.ascontiguousarray(factor[here, here])
            done = run(adjusted[begin:end], original[begin:end], shares)
            if end < last:
                adjusted[end:last] += factor[here, end - first :].T @ done.errors
            blocks.append(done.weight)
            lost += float(done.lost.sum(dtype=np.float64))
        found.append([np.concatenate(of_part) for of_part in zip(*blocks, strict=True)])
    return Int4Array(
        *(np.concatenate(of_part, axis=1) for of_part in zip(*found, strict=True))
    ), lost


def _block_cpp(adjusted: np.ndarray, original: np.ndarray, shares: np.ndarray) -> _Block:
    *parts, errors, lost = map(np.asarray, _called_cpp(adjusted, original, shares))
    return _Block(Int4Array(*parts), errors, lost)


@jax.jit
def _called_cpp(adjusted: Array, original: Array, shares: Array) -> Sequence[Array]:
    return bindings.round_int4(adjusted, INT4.abstract(adjusted.shape, 1), (original, shares))


def _block_xla(adjusted: np.ndarray, original: np.ndarray, shares: np.ndarray) -> _Block:
    _, sub, scales = searched(adjusted, 1, LARGEST, LARGEST_OF_BLOCK)
    exact = sub[0].astype(jnp.float32) * scales.astype(jnp.float32)
    by_row = jnp.repeat(exact, group_rows(len(adjusted)), axis=0)
    codes, errors, lost = _rows_xla(adjusted, original, shares, by_row)
    weight = Int4Array(pack(np.asarray(codes)), pack_subscales(np.asarray(sub)), np.asarray(scales))
    return _Block(weight, np.asarray(errors), np.asarray(lost))


@jax.jit
def _rows_xla(adjusted: Array, original: Array, shares: Array, scales: Array):
    def add_row(carry, k):
        rows, lost = carry
        codes = nearest_codes(rows[k] * inverse_of(scales[k]))
        value = jnp.asarray(BOOK)[codes].astype(jnp.float32) * scales[k]
        lost += (shares[k, k] * (rows[k] - value)) ** 2
        error = original[k] - value
        below = jnp.where(jnp.arange(len(rows)) > k, shares[k], 0)
        return (rows + below[:, None] * error, lost), (codes.astype(jnp.uint8), error)

    begin = adjusted, jnp.zeros(adjusted.shape[1])
    (_, lost), (codes, errors) = jax.lax.scan(add_row, begin, jnp.arange(len(adjusted)))
    return codes, errors, lost
