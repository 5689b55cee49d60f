"""How far two models are apart on a text: the figures, and the tables that show them.

Dimension key: T position.
"""

from typing import Any, NamedTuple

import numpy as np

from grok1 import reprs


class Position(NamedTuple):
    """One position where the two differ much.

    Attributes:
      position: Its place in the text; the distributions are those after this token.
      token: The token there.
      piece: Its spelling; None without a tokenizer.
      divergence: KL(A || B) in nats.
      top_a: A's most probable next token.
      top_b: B's.
    """

    position: int
    token: int
    piece: str | None
    divergence: float
    top_a: int
    top_b: int


class LayerDifference(NamedTuple):
    """One layer, over all positions.

    Attributes:
      residual: Norm of the difference of the residual streams after the layer, over A's norm.
      same_experts: Fraction of A's experts that B ran too; 1 where A ran none.
    """

    residual: float
    same_experts: float


class ForcedComparison(NamedTuple):
    """How far B is from A when its tokens go to the experts that A's went to.

    What is left is the rounding of weights; the rest of a divergence is near ties of the router.

    Attributes:
      mean_divergence: Mean of KL(A || B) over the positions, in nats.
      top_1_agreement: Fraction of positions with the same most probable token.
      residuals: For each layer, as `LayerDifference.residual`.
    """

    mean_divergence: float
    top_1_agreement: float
    residuals: list[float]


class Comparison(NamedTuple):
    """How far B is from A on a text; divergences are in nats.

    Attributes:
      a: What A is.
      b: What B is.
      tokens: The text, `[T]`.
      divergences: KL(A || B) of the next token's distribution at every position, `[T]`.
      top_1_agreement: Fraction of positions with the same most probable token.
      top_k: How many tokens the next one counts.
      top_k_agreement: Fraction of A's `top_k` most probable tokens that are among B's.
      logits_difference: Norm of the difference of the logits over the norm of A's.
      perplexity_a: Perplexity of the text under A; None for a single token.
      perplexity_b: The same under B.
      worst: The positions of the largest divergences, largest first.
      layers: One entry a layer; None where there are no layers to compare.
      notes: What was not compared, and why.
      forced: The same with A's experts in both; None if that was not asked for.
    """

    a: str
    b: str
    tokens: list[int]
    divergences: np.ndarray
    top_1_agreement: float
    top_k: int
    top_k_agreement: float
    logits_difference: float
    perplexity_a: float | None
    perplexity_b: float | None
    worst: list[Position]
    layers: list[LayerDifference] | None
    notes: list[str]
    forced: ForcedComparison | None = None

    # As a tuple, it would ask an array whether it is true.
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Comparison):
            return NotImplemented
        mine, its = self._asdict(), other._asdict()
        divergences = mine.pop("divergences"), its.pop("divergences")
        return np.array_equal(*divergences, equal_nan=True) and mine == its

    def __ne__(self, other: object) -> bool:
        return not self == other

    @property
    def mean_divergence(self) -> float:
        """Mean of KL(A || B) over the positions."""
        return float(self.divergences.mean())

    @property
    def largest_divergence(self) -> float:
        """The largest KL(A || B)."""
        return float(self.divergences.max())

    @property
    def expert_agreement(self) -> float | None:
        """Fraction of A's experts that B ran too, over all layers."""
        if self.layers is None:
            return None
        return float(np.mean([layer.same_experts for layer in self.layers]))

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            **self._asdict(),
            "divergences": self.divergences.tolist(),
            "mean_divergence": self.mean_divergence,
            "largest_divergence": self.largest_divergence,
            "expert_agreement": self.expert_agreement,
            "worst": [one._asdict() for one in self.worst],
            "layers": self.layers and [layer._asdict() for layer in self.layers],
            "forced": self.forced and self.forced._asdict(),
        }

    def __repr__(self) -> str:
        agreement = self.expert_agreement
        experts = "" if agreement is None else f", same experts {agreement:.2%}"
        return (
            f"Comparison({len(self.tokens)} tokens, KL mean {self.mean_divergence:.3e}, largest "
            f"{self.largest_divergence:.3e}, same most probable token {self.top_1_agreement:.2%}"
            f"{experts})"
        )

    def _repr_html_(self) -> str:
        rows: list[tuple[str, object]] = [
            ("A", self.a),
            ("B", self.b),
            ("tokens", f"{len(self.tokens):,}"),
            ("KL(A || B), mean", f"{self.mean_divergence:.3e} nats"),
            (
                "KL(A || B), largest",
                f"{self.largest_divergence:.3e} nats, at position {self.worst[0].position}",
            ),
            ("same most probable token", f"{self.top_1_agreement:.2%}"),
            (f"same {self.top_k} most probable", f"{self.top_k_agreement:.2%}"),
            ("logits differ by", f"{self.logits_difference:.3e} of A's norm"),
        ]
        if self.perplexity_a is not None:
            rows.append(("perplexity", f"A {self.perplexity_a:.4f}, B {self.perplexity_b:.4f}"))
        if self.layers is not None:
            residuals = [layer.residual for layer in self.layers]
            largest = int(np.argmax(residuals))
            rows += [
                ("same experts", f"{self.expert_agreement:.2%}"),
                (
                    "residual streams differ by",
                    f"{residuals[largest]:.3e} of A's norm at most, after layer {largest}",
                ),
            ]
        rows += [("note", note) for note in self.notes]
        return reprs.table("Comparison", rows)

    def lines(self) -> list[str]:
        """The same as tables."""
        first = self.worst[0]
        lines = [
            f"A: {self.a}",
            f"B: {self.b}",
            f"{len(self.tokens)} tokens",
            "",
            f"KL(A || B), nats         mean {self.mean_divergence:.3e}, largest "
            f"{self.largest_divergence:.3e} at position {first.position}",
            f"same most probable token {self.top_1_agreement:8.2%}",
            f"same {self.top_k:3} most probable   {self.top_k_agreement:8.2%}",
            f"logits                   differ by {self.logits_difference:.3e} of A's norm",
        ]
        if self.perplexity_a is not None and self.perplexity_b is not None:
            lines.append(
                f"perplexity               {self.perplexity_a:.6g} (A), {self.perplexity_b:.6g} (B)"
            )
        if self.expert_agreement is not None:
            lines.append(f"same experts             {self.expert_agreement:8.2%}")
        if self.forced is not None:
            lines.append(
                f"with A's experts         KL mean {self.forced.mean_divergence:.3e}, same most "
                f"probable token {self.forced.top_1_agreement:.2%}"
            )
        lines += [
            "",
            "largest divergences",
            "  position     nats  after token, then A's and B's next",
        ]
        for one in self.worst:
            piece = "" if one.piece is None else f" {one.piece!r}"
            lines.append(
                f"  {one.position:8} {one.divergence:8.2e}  {one.token}{piece}: "
                f"{one.top_a}, {one.top_b}"
            )
        if self.layers is not None:
            forced = [] if self.forced is None else self.forced.residuals
            columns = "  residual with A's experts" if forced else ""
            lines += ["", f"  layer  residual differs by  same experts{columns}"]
            for number, layer in enumerate(self.layers):
                line = f"  {number:5}  {layer.residual:19.3e}  {layer.same_experts:12.2%}"
                lines.append(line + (f"  {forced[number]:25.3e}" if forced else ""))
        return lines + [f"note: {note}" for note in self.notes]
