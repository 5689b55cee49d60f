"""Products with the rows of the embedding, or the largest by way of an int8 copy; their normaliser.

Dimension key: M row, V rows of the embedding, D columns.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grok1.ops import forms
from grok1.ops.cpu import bindings, rowwise
from grok1.ops.cuda import calls, presence, shapes_of_screening
from grok1.ops.layers import exact_einsum, split_terms
from grok1.ops.screening import ScreeningTable

Largest = tuple[Int[Array, " M"], Float[Array, " M"]]


def logits(x: Float[Array, "M D"], embedding: Float[Array, "V D"]) -> Float[Array, "M V"]:
    """The products with all rows, in float32."""
    return forms.run("logits", x, embedding)


def exponential_sums(
    shifted: Float[Array, "M V"], implementation: str | None = None
) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    """The sum of `exp(shifted)` over each row, and that of `exp(shifted) * shifted`; float32.

    Args:
      shifted: float32, not above 0.
      implementation: "xla" or "cpp"; None for that of `forms.PREFERRED`.
    """
    return forms.run("exponential_sums", shifted, implementation=implementation)


def log(x: Float[Array, " M"], implementation: str | None = None) -> Float[Array, " M"]:
    """The natural logarithm of each row's number; arguments as for `exponential_sums`."""
    return forms.run("log", x, implementation=implementation)


def most_probable(
    x: Float[Array, "M D"],
    embedding: Float[Array, "V D"],
    table: ScreeningTable,
    allowed: Bool[Array, "*M V"],
) -> Largest:
    """Finds the allowed row with the largest product, the first of equals.

    Args:
      x: float32.
      embedding: float32.
      table: Its `screening_table`, which forms read that say what they do not take.
      allowed: False for rows that must not be found, `[V]` for all of x or `[M, V]`.

    Returns:
      (index of the row, int32, -1 if there is none; its product, float32). A product that is not
      finite where x, or a row, allowed or not, is no number.
    """
    return forms.run("most_probable", x, embedding, table, allowed)


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


@forms.form("exponential_sums", "xla")
def _exponential_sums_by_xla(
    shifted: Float[Array, "M V"],
) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    exponentials = jnp.exp(shifted)
    return exponentials.sum(axis=-1), (exponentials * shifted).sum(axis=-1)


@forms.form("exponential_sums", "cpp")
def _exponential_sums_cpp(
    shifted: Float[Array, "M V"],
) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    return rowwise.exponential_sums(shifted)


@forms.form("log", "xla")
def _log_by_xla(x: Float[Array, " M"]) -> Float[Array, " M"]:
    return jnp.log(x)


@forms.form("log", "cpp")
def _log_cpp(x: Float[Array, " M"]) -> Float[Array, " M"]:
    return rowwise.log(x)


@forms.form("most_probable", "direct")
def most_probable_direct(
    x: Float[Array, "M D"],
    embedding: Float[Array, "V D"],
    table: ScreeningTable,
    allowed: Bool[Array, "*M V"],
) -> Largest:
    """As `most_probable`, from all products; reads no table."""
    products = logits(x, embedding)
    there = jnp.where(allowed, products, -jnp.inf)
    largest = there.max(axis=-1)
    index = jnp.where(largest == -jnp.inf, -1, jnp.argmax(there, axis=-1)).astype(jnp.int32)
    return index, jnp.where(jnp.isnan(products).any(axis=-1), jnp.nan, largest)


def _is_not_to_be_screened(x, embedding, table, allowed) -> str | None:
    return _is_not_for_rows(x, embedding)


@forms.form("most_probable", "cpp", refuses=_is_not_to_be_screened)
def _most_probable_cpp(
    x: Float[Array, "M D"],
    embedding: Float[Array, "V D"],
    table: ScreeningTable,
    allowed: Bool[Array, "*M V"],
) -> Largest:
    return bindings.most_probable(x, embedding, *table, allowed)


def _is_not_for_cuda(x, embedding, table, allowed) -> str | None:
    return _is_not_for_rows(x, embedding) or shapes_of_screening.refusal_of(*x.shape)


@forms.form("most_probable", "cuda", refuses=_is_not_for_cuda)
def most_probable_cuda(
    x: Float[Array, "M D"],
    embedding: Float[Array, "V D"],
    table: ScreeningTable,
    allowed: Bool[Array, "*M V"],
) -> Largest:
    """As `most_probable`, in CUDA."""
    return calls.most_probable(x, embedding, table, allowed)
