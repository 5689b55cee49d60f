"""How probable the tokens of a text are, and continuations to choose from: what scoring returns.

Dimension key: T token of a text, k alternative, O option.
"""

import dataclasses
import functools
import math

import numpy as np

from grok1 import reprs
from grok1.generate.completion import perplexity
from grok1.generate.requests import Prompt

_TOKENS_SHOWN = 2000  # of a score in a notebook; a page of 100,000 coloured tokens does not scroll


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """What the model makes of a text, token by token; logarithms are natural.

    Entry t of every array is about token t given all tokens before it. Nothing stands before the
    first token, so its entries say nothing: NaN, and -1 where they are whole numbers.

    Attributes:
      tokens: int32 `[T]`, with [BOS] if `add_bos` put it first.
      pieces: The text of each token, such as " the", or its spelling in the vocabulary where it has
        none of its own; None without a tokenizer.
      logprobs: float32 `[T]`.
      ranks: int32 `[T]`, 0 where the token was the most probable one; among equally probable tokens
        the lower id comes first.
      entropies: float32 `[T]`, in nats, of the distribution that the token comes from.
      top_tokens: int32 `[T, k]`, the most probable tokens in its place, best first.
      top_logprobs: float32 `[T, k]`.
      num_bytes: UTF-8 bytes that the scored tokens stand for; None without a tokenizer.
    """

    tokens: np.ndarray
    pieces: list[str] | None
    logprobs: np.ndarray
    ranks: np.ndarray
    entropies: np.ndarray
    top_tokens: np.ndarray
    top_logprobs: np.ndarray
    num_bytes: int | None

    @property
    def num_scored(self) -> int:
        """How many tokens have a log-probability: all but the first."""
        return len(self.tokens) - 1

    @functools.cached_property
    def total_logprob(self) -> float:
        """Sum of the log-probabilities, in nats."""
        return float(np.sum(self.logprobs[1:], dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-probability of the scored tokens.

        Infinity where no float holds it.
        """
        return perplexity(-self.total_logprob / self.num_scored)

    @property
    def bits_per_byte(self) -> float:
        """Bits to code the scored tokens over the UTF-8 bytes that they stand for.

        Raises:
          ValueError: If there is no tokenizer to tell the bytes, or there are none.
        """
        if not self.num_bytes:
            missing = "a tokenizer, and the model has none"
            if self.num_bytes == 0:
                missing = "text, and the scored tokens are all control pieces"
            raise ValueError(f"bits_per_byte needs {missing}; use perplexity")
        return -self.total_logprob / math.log(2) / self.num_bytes

    def __repr__(self) -> str:
        bits = f", {self.bits_per_byte:.4g} bits/byte" if self.num_bytes else ""
        return (
            f"Score({self.num_scored} tokens scored, logprob {self.total_logprob:.6g}, perplexity "
            f"{self.perplexity:.4g}{bits})"
        )

    def _repr_html_(self) -> str:
        bits = -self.logprobs[:_TOKENS_SHOWN] / math.log(2)
        pieces = self.pieces or [f"[{token}]" for token in self.tokens[:_TOKENS_SHOWN]]
        hints = [
            f"{token}: {surprisal:.2f} bits, rank {rank}, entropy {entropy / math.log(2):.2f} bits"
            for token, surprisal, rank, entropy in zip(
                self.tokens, bits, self.ranks, self.entropies, strict=False
            )
        ]
        summary = f"{self.num_scored:,} tokens scored, perplexity {self.perplexity:.4g}"
        if self.num_bytes:
            summary += f", {self.bits_per_byte:.4g} bits a byte"
        if len(self.tokens) > _TOKENS_SHOWN:
            summary += f"; the first {_TOKENS_SHOWN:,} are shown"
        return reprs.surprisal_text(pieces[:_TOKENS_SHOWN], bits.tolist(), hints, summary)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Choice:
    """How probable each of some continuations of one context is; logarithms are natural.

    Attributes:
      options: The continuations, as given.
      tokens: The tokens of each that were scored.
      logprobs: float64 `[O]`, log-probability of each whole continuation.
      per_token: float64 `[O]`, the same over the number of its tokens.
      per_byte: float64 `[O]`, the same over the UTF-8 bytes of the option; None if it is given as
        ids to a model without tokenizer.
      is_greedy: bool `[O]`, whether every token was the most probable one in its place.
    """

    options: list[Prompt]
    tokens: list[list[int]]
    logprobs: np.ndarray
    per_token: np.ndarray
    per_byte: np.ndarray | None
    is_greedy: np.ndarray

    @property
    def best(self) -> int:
        """Index of the most probable option."""
        return int(self.logprobs.argmax())

    @property
    def best_per_token(self) -> int:
        """Index of the option that is most probable for each token."""
        return int(self.per_token.argmax())

    @property
    def best_per_byte(self) -> int | None:
        """Index of the option that is most probable for each byte; None without `per_byte`."""
        return None if self.per_byte is None else int(self.per_byte.argmax())

    def __repr__(self) -> str:
        logprobs = ", ".join(f"{logprob:.2f}" for logprob in self.logprobs)
        return f"Choice(best={self.options[self.best]!r}, logprobs=[{logprobs}])"

    def _repr_html_(self) -> str:
        rows = [
            (str(option), f"{total:.2f} nats in all, {each:.2f} a token")
            for option, total, each in zip(self.options, self.logprobs, self.per_token, strict=True)
        ]
        return reprs.table(f"Most probable: {self.options[self.best]}", rows)
