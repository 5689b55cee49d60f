"""What a model makes of a text, left in files, and how far two such records are apart.

Both are read from their files some rows at a time, and compared in float64.

Dimension key: T position, V vocabulary, D model dim, L layer, A chosen experts.
"""

from typing import NamedTuple

import numpy as np

from grok1.generate.completion import perplexity
from grok1.study.comparison_report import Comparison, LayerDifference, Position

_ROWS_BYTES = 1 << 25  # most memory that one float64 array of the comparison takes
_RESIDUAL_ROWS = 256  # positions of one layer that are compared at a time
_WORST = 5  # positions that are listed


class RecordedRun(NamedTuple):
    """What a source makes of the text, as arrays in files.

    Attributes:
      name: What the source is.
      tokens: `[T]`; None for logits that were saved alone.
      pieces: Spelling of each token; None without a tokenizer.
      logits: float `[T, V]`.
      residual: float32 `[L, T, D]`; None for saved logits.
      experts: int32 `[L, T, A]`, those that ran, -1 for none; None for saved logits.
    """

    name: str
    tokens: list[int] | None
    pieces: list[str] | None
    logits: np.ndarray
    residual: np.ndarray | None = None
    experts: np.ndarray | None = None


def compare_runs(a: RecordedRun, b: RecordedRun, top_k: int) -> Comparison:
    """Says how far B is from A, of the same text and vocabulary.

    Args:
      a: What B is measured against; its tokens are known.
      b: The other one.
      top_k: How many most probable tokens are compared as sets.

    Raises:
      ValueError: If a logit is not finite.
    """
    assert a.tokens is not None  # the caller has seen to it
    num_tokens, vocab_size = a.logits.shape
    divergences = np.empty(num_tokens)
    best = np.empty((2, num_tokens), np.int64)
    logprobs = np.zeros(2)
    same_top_k, difference, norm = 0, 0.0, 0.0
    rows = max(1, _ROWS_BYTES // (8 * vocab_size))
    for start in range(0, num_tokens, rows):
        here = slice(start, start + rows)
        logits = [_finite(run, here) for run in (a, b)]
        logprobs_a, logprobs_b = (_log_softmax(part) for part in logits)
        divergences[here] = np.sum(np.exp(logprobs_a) * (logprobs_a - logprobs_b), axis=-1)
        best[:, here] = [part.argmax(axis=-1) for part in logits]
        tops = [_most_probable(part, top_k) for part in logits]
        same_top_k += int((tops[0][:, :, None] == tops[1][:, None, :]).sum())
        difference += float(np.sum((logits[0] - logits[1]) ** 2))
        norm += float(np.sum(logits[0] ** 2))
        # None where the block ends with the text after one row.
        following = np.asarray(a.tokens[start + 1 : start + rows + 1], np.int64)
        places = np.arange(len(following)), following
        logprobs += logprobs_a[places].sum(), logprobs_b[places].sum()
    # A divergence of float64 rounding may come out just below zero.
    divergences = np.maximum(divergences, 0)
    pieces = a.pieces or b.pieces
    worst = [
        Position(
            index,
            a.tokens[index],
            None if pieces is None else pieces[index],
            float(divergences[index]),
            *best[:, index].tolist(),
        )
        for index in np.argsort(-divergences, kind="stable")[:_WORST].tolist()
    ]
    perplexity_a, perplexity_b = None, None
    if num_tokens > 1:
        perplexity_a, perplexity_b = map(perplexity, (-logprobs / (num_tokens - 1)).tolist())
    layers, notes = _compare_layers(a, b)
    return Comparison(
        a.name,
        b.name,
        a.tokens,
        divergences,
        float((best[0] == best[1]).mean()),
        top_k,
        same_top_k / (num_tokens * top_k),
        (difference / norm) ** 0.5 if norm else 0.0,
        perplexity_a,
        perplexity_b,
        worst,
        layers,
        notes,
    )


def _compare_layers(
    a: RecordedRun, b: RecordedRun
) -> tuple[list[LayerDifference] | None, list[str]]:
    """One layer after the other, so that two residual streams are in memory."""
    if a.residual is None or b.residual is None or a.experts is None or b.experts is None:
        return None, ["layers are not compared: saved logits have none"]
    if a.residual.shape != b.residual.shape:
        shapes = a.residual.shape, b.residual.shape
        sizes = [f"{num_layers} of width {width}" for num_layers, _, width in shapes]
        return None, [f"layers are not compared: A has {sizes[0]}, B {sizes[1]}"]
    layers = []
    for layer in range(len(a.residual)):
        difference = norm = 0.0
        for start in range(0, a.residual.shape[1], _RESIDUAL_ROWS):
            here = slice(start, start + _RESIDUAL_ROWS)
            of_a = a.residual[layer, here].astype(np.float64)
            difference += float(np.sum((of_a - b.residual[layer, here]) ** 2))
            norm += float(np.sum(of_a**2))
        chosen_a, chosen_b = a.experts[layer], b.experts[layer]
        ran = chosen_a >= 0
        same = ran & (chosen_a[:, :, None] == chosen_b[:, None, :]).any(axis=-1)
        share = float(same.sum() / ran.sum()) if ran.any() else 1.0
        layers.append(LayerDifference((difference / norm) ** 0.5 if norm else 0.0, share))
    return layers, []


def _finite(run: RecordedRun, rows: slice) -> np.ndarray:
    logits = run.logits[rows].astype(np.float64)
    good = np.isfinite(logits).all(axis=-1)
    if not good.all():
        raise ValueError(
            f"{run.name}: the logits at position {rows.start + int(np.argmin(good))} are not finite"
        )
    return logits


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _most_probable(logits: np.ndarray, top_k: int) -> np.ndarray:
    return np.argpartition(-logits, top_k - 1, axis=-1)[:, :top_k]
