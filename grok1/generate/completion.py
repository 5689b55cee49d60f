"""What a request becomes: tokens to text, stop strings, and the finished completion."""

import dataclasses
import math
import sys
from collections.abc import Collection, Sequence
from typing import Literal

from grok1 import reprs
from grok1.generate.request import Sampled
from grok1.tokenizer import Tokenizer

StopReason = Literal["stop", "length", "context"]


def perplexity(nats: float) -> float:
    """Returns the exponential of a mean surprisal; infinity for what no float holds."""
    return math.inf if nats > math.log(sys.float_info.max) else math.exp(nats)


@dataclasses.dataclass(frozen=True)
class Completion:
    """A generated continuation.

    Attributes:
      text: The continuation, without the stop string or stop token that ended it; None for a model
        without a tokenizer.
      tokens: Every generated token, the stop token or those of the stop string included.
      logprobs: Log-probability of each token under the model, before temperature and filters;
        None unless asked for.
      top_logprobs: For each token the log-probabilities of the most probable tokens by id, best
        first; None unless asked for.
      stop_reason: "stop" for a stop token or string, "length" for `max_new_tokens`, "context" when
        prompt and continuation filled the context.
      stop_match: The stop string, or the id of the stop token, that ended it: the tokenizer's
        `eos_id` for the end of sequence. None where a limit did.
      num_prompt_tokens: How many tokens it continues.
    """

    text: str | None
    tokens: list[int]
    logprobs: list[float] | None
    top_logprobs: list[dict[int, float]] | None
    stop_reason: StopReason
    stop_match: str | int | None = None
    num_prompt_tokens: int | None = None

    def __repr__(self) -> str:
        match = "" if self.stop_match is None else f", stop_match={self.stop_match!r}"
        return (
            f"Completion(text={self.text!r}, {len(self.tokens)} tokens, "
            f"stop_reason={self.stop_reason!r}{match})"
        )

    def _repr_html_(self) -> str:
        match = "" if self.stop_match is None else f" {self.stop_match!r}"
        rows: list[tuple[str, object]] = [
            ("tokens", len(self.tokens)),
            ("ended by", f"{self.stop_reason}{match}"),
        ]
        if self.logprobs is not None:
            mean = sum(self.logprobs) / len(self.logprobs)
            rows.append(("mean log-probability", f"{mean:.3f} nats a token"))
            rows.append(("perplexity", f"{perplexity(-mean):.2f}"))
        text = "" if self.text is None else reprs.text_block(self.text)
        return text + reprs.table("Completion", rows)


class CompletionBuilder:
    """Collects one request's tokens and says when it is over.

    Attributes:
      stop_reason: None while the request runs.
      num_prompt_tokens: How many tokens it continues, for whoever reads the completion.
      keeps_stop: Whether the text ends with the stop string or token, not before it.
      min_tokens: Stop strings are looked for in what comes after so many tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        max_tokens: int,
        limit_reason: StopReason,
        stop_tokens: Collection[int] = (),
        stop_strings: Sequence[str] = (),
        with_logprobs: bool = False,
    ):
        """Takes no token yet.

        Args:
          tokenizer: For text; None for tokens alone.
          max_tokens: Most tokens.
          limit_reason: The stop reason where these are reached.
          stop_tokens: Tokens that end it.
          stop_strings: Strings that end it.
          with_logprobs: Whether the completion has log-probabilities.
        """
        self.stop_reason: StopReason | None = None
        self._stop_match: str | int | None = None
        self.num_prompt_tokens: int | None = None
        self._decoder = tokenizer.stream_decoder() if tokenizer else None
        self._max_tokens = max_tokens
        self._limit_reason: StopReason = limit_reason
        self._stop_tokens, self._stop_strings = frozenset(stop_tokens), tuple(stop_strings)
        self._with_logprobs, self.keeps_stop, self.min_tokens = with_logprobs, False, 0
        self._sampled: list[Sampled] = []
        self._text = ""  # certain
        self._held = ""  # could still turn out to be the beginning of a stop string

    @property
    def num_tokens(self) -> int:
        """How many tokens it has."""
        return len(self._sampled)

    def push(self, sampled: Sampled) -> str:
        """Takes the next token and returns the text that has become certain, perhaps none."""
        self._sampled.append(sampled)
        if sampled.token in self._stop_tokens:
            if self.keeps_stop and self._decoder:
                self._held += self._decoder.push(sampled.token)
            return self._finish("stop", sampled.token)
        certain = self._extend(self._decoder.push(sampled.token) if self._decoder else "")
        if self.stop_reason is None and len(self._sampled) == self._max_tokens:
            certain += self._finish(self._limit_reason)
        return certain

    def build(self) -> Completion:
        """Returns the completion of a request that is over."""
        assert self.stop_reason is not None or not self._max_tokens
        columns = zip(*self._sampled, strict=True)
        tokens, logprobs, alternatives = columns if self._sampled else ((), (), ())
        return Completion(
            text=self._text if self._decoder else None,
            tokens=list(tokens),
            logprobs=list(logprobs) if self._with_logprobs else None,
            top_logprobs=list(alternatives) if self._with_logprobs else None,
            stop_reason=self.stop_reason or self._limit_reason,
            stop_match=self._stop_match,
            num_prompt_tokens=self.num_prompt_tokens,
        )

    def _extend(self, text: str) -> str:
        """Adds text, and releases all that no stop string can begin in any more."""
        self._held += text
        if len(self._sampled) <= self.min_tokens:
            return self._release(len(self._held))
        found = [(self._held.find(stop), stop) for stop in self._stop_strings]
        ends = [(at + len(stop), at, stop) for at, stop in found if at >= 0]
        if ends:
            # The stop that was complete first, so that the cut does not depend on how the text was
            # divided into tokens.
            end, begin, self._stop_match = min(ends)
            self.stop_reason = "stop"
            return self._release(end if self.keeps_stop else begin)
        return self._release(len(self._held) - self._possible_stop_length())

    def _finish(self, reason: StopReason, match: int | None = None) -> str:
        certain = self._extend(self._decoder.flush() if self._decoder else "")
        if self.stop_reason is None:
            self.stop_reason, self._stop_match = reason, match
            certain += self._release(len(self._held))
        return certain

    def _release(self, count: int) -> str:
        certain, self._held = self._held[:count], self._held[count:]
        self._text += certain
        return certain

    def _possible_stop_length(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        return max(
            (
                length
                for stop in self._stop_strings
                for length in range(1, min(len(stop), len(self._held) + 1))
                if self._held.endswith(stop[:length])
            ),
            default=0,
        )
