"""Rows to experts and back: tokens sorted by expert, each expert's rows run side by side.

No row is dropped, whatever the balance, and padding is never run.

Dimension key: M token, D model dim, E expert, A selected experts a token, R = M*A rows.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_TILE = 128  # rows of the tiles that large products are computed in on GPUs

# What an expert's rows are padded to, in parts of the mean.
_PARTS = (0.25, 0.5, 0.75, 0.875, 1, 1.0625, 1.125, 1.25, 1.5, 2)
_MOST_ROWS = 4096  # of a group; their gate and up are float32 and take memory


class SortedRows(NamedTuple):
    """Rows in the order of their experts.

    Attributes:
      x: `[R + slack, D]`, in the type of the products; what follows the last row is 0.
      first_row: int32 `[E]`, each expert's first.
      rows_per_expert: int32 `[E]`, how many it has.
      place_of_row: int32 `[R]`, where each row of `[M, A]` is.
    """

    x: Any
    first_row: Any
    rows_per_expert: Any
    place_of_row: Any


def sorted_rows(
    x: Float[Array, "M D"],
    expert_indices: Int[Array, "M A"],
    valid: Bool[Array, " M"],
    num_experts: int,
    slack: int,
) -> SortedRows:
    """Sorts rows by expert.

    Args:
      x: Input, a token a row.
      expert_indices: Those of each token.
      valid: False for padding.
      num_experts: E.
      slack: Rows to add behind the last.
    """
    # Padding is sent to an expert beyond the last, whose rows sort to the end and never run.
    expert_of_row = jnp.where(valid[:, None], expert_indices, num_experts).reshape(-1)
    row_order = jnp.argsort(expert_of_row, stable=True)
    rows_per_expert = jnp.bincount(expert_of_row, length=num_experts)
    first_row = jnp.cumsum(rows_per_expert) - rows_per_expert
    x_sorted = jnp.pad(x[row_order // expert_indices.shape[1]], ((0, slack), (0, 0)))
    num_rows = len(row_order)
    place_of_row = jnp.zeros(num_rows, row_order.dtype).at[row_order].set(jnp.arange(num_rows))
    return SortedRows(x_sorted, first_row, rows_per_expert, place_of_row)


def run_in_blocks(
    rows: SortedRows, block: int, run: Callable[[Array, Array, Array], Array]
) -> Float[Array, "R D"]:
    """Runs each expert's rows in blocks of one size, as many as it has: a loop over all of them.

    Args:
      rows: With at least a block of slack: a block that is not full reads, and writes, past its
        expert's rows.
      block: Rows of a block.
      run: Takes a block, its expert and how many of its rows matter; returns float32 `[block, D]`.
    """
    _, first_row, rows_per_expert, _ = rows
    blocks_per_expert = -(-rows_per_expert // block)
    last_block = jnp.cumsum(blocks_per_expert)

    def run_block(i, out_sorted):
        expert = jnp.searchsorted(last_block, i, side="right")
        block_of_expert = i - (last_block[expert] - blocks_per_expert[expert])
        start = first_row[expert] + block_of_expert * block
        x_block = jax.lax.dynamic_slice_in_dim(rows.x, start, block)
        num_valid = jnp.minimum(rows_per_expert[expert] - block_of_expert * block, block)
        # What this writes past its expert's rows, the next block overwrites.
        return jax.lax.dynamic_update_slice_in_dim(
            out_sorted, run(x_block, expert, num_valid), start, axis=0
        )

    out_sorted = jnp.zeros(rows.x.shape, jnp.float32)
    return jax.lax.fori_loop(0, last_block[-1], run_block, out_sorted)


def run_in_groups(
    rows: SortedRows, sizes: Sequence[int], run: Callable[[Array, Array], Array]
) -> Float[Array, "R D"]:
    """Runs each expert's rows at once: a loop of known length, which picks the size that fits.

    Args:
      rows: With the largest size as slack.
      sizes: Of `sizes_of_groups`; an expert with more rows runs groups of the largest.
      run: Takes rows, as many as one of the sizes, and their expert; returns float32, a row each.
    """
    most = sizes[-1]

    def run_group(expert, size, start, out_sorted):
        out = run(jax.lax.dynamic_slice_in_dim(rows.x, start, size), expert)
        # What this writes past its expert's rows, the next one overwrites.
        return jax.lax.dynamic_update_slice_in_dim(out_sorted, out, start, axis=0)

    def run_expert(expert, out_sorted):
        first, num_rows = rows.first_row[expert], rows.rows_per_expert[expert]

        def run_groups(out_sorted):
            def run_next(i, out_sorted):
                return run_group(expert, most, first + i * most, out_sorted)

            return jax.lax.fori_loop(0, -(-num_rows // most), run_next, out_sorted)

        branches = [lambda out_sorted: out_sorted]
        branches += [functools.partial(run_group, expert, size, first) for size in sizes]
        branches += [run_groups] if most == _MOST_ROWS else []
        branch = jnp.sum(num_rows > jnp.asarray((0, *sizes)))
        return jax.lax.switch(branch, branches, out_sorted)

    out_sorted = jnp.zeros(rows.x.shape, jnp.float32)
    return jax.lax.fori_loop(0, len(rows.first_row), run_expert, out_sorted)


def sizes_of_groups(num_tokens: int, num_selected: int, num_experts: int) -> list[int]:
    """Numbers of rows that an expert's are padded to; finer near the mean, which most are near.

    Args:
      num_tokens: M, the most rows of an expert.
      num_selected: A.
      num_experts: E.
    """
    mean = num_tokens * num_selected / num_experts
    wanted = [min(mean * part, num_tokens) for part in _PARTS] + [num_tokens]
    return sorted({_TILE * -(-int(min(rows, _MOST_ROWS)) // _TILE) for rows in wanted})


def summed(
    out_sorted: Float[Array, "R D"],
    rows: SortedRows,
    expert_weights: Float[Array, "M A"],
    valid: Bool[Array, " M"],
) -> Float[Array, "M D"]:
    """Each token's rows, weighted; 0 for padding.

    Args:
      out_sorted: float32, what has become of the rows, in their order.
      rows: The order.
      expert_weights: float32.
      valid: False for padding.
    """
    # What no expert ran may be anything.
    is_run = rows.place_of_row < rows.rows_per_expert.sum()
    out_RD = jnp.where(is_run[:, None], out_sorted[rows.place_of_row], 0)
    out_MAD = out_RD.reshape(*expert_weights.shape, -1)
    out_MD = jnp.sum(out_MAD * expert_weights[..., None], axis=1)
    return jnp.where(valid[:, None], out_MD, 0)
