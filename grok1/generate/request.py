"""One request: what it asks for, how far it is, and the tokens that it gets.

Dimension key: R row of a step, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from grok1.engine.sampling import SamplingParams, no_token_error
from grok1.engine.steps import NUM_ENDS, LogitsProcessor, Step


@dataclasses.dataclass(eq=False, kw_only=True)
class Request:
    """One prompt to continue.

    Attributes:
      tokens: The prompt, at least one token.
      max_tokens: Most tokens to generate; prompt and these together fit the scheduler's capacity.
      seed: Seed of the request's draws.
      stream: Tells apart requests of one seed, so that equal prompts draw different tokens.
      sampling: How it draws.
      allowed: bool `[V]`, False for tokens that must not be drawn; None for all.
      ends: Tokens after which it is over.
      one_by_one: Whether something else than these may end it, so that each token is handed over
        before more than the next one are drawn.
      num_top: Alternatives to report with log-probabilities; None for no log-probabilities.
      processor: Changes the logits before the draw.
      cancelled: Set by `Scheduler.cancel`.
      error: Why it is over, where no token could be drawn for it.
    """

    tokens: Sequence[int]
    max_tokens: int
    seed: int = 0
    stream: int = 0
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    allowed: np.ndarray | None = None
    ends: Sequence[int] = ()
    one_by_one: bool = False
    num_top: int | None = None
    processor: LogitsProcessor | None = None
    cancelled: bool = False
    error: Exception | None = None

    @property
    def is_asked_after_each(self) -> bool:
        """Whether its tokens are drawn one a call."""
        return self.one_by_one or len(self.ends) > NUM_ENDS


class Sampled(NamedTuple):
    """One generated token.

    Attributes:
      token: Its id.
      logprob: Its log-probability under the model, None when not asked for.
      alternatives: Log-probabilities by token id, most probable first.
    """

    token: int
    logprob: float | None
    alternatives: dict[int, float]


@dataclasses.dataclass(eq=False)
class Running:
    """A request that has a slot.

    Attributes:
      request: The request.
      slot: Its slot.
      key: uint32 `[2]`, what its draws are keyed by.
      to_prefill: Tokens of the prompt that are still to be run before it decodes.
      num_started: Tokens whose steps have been started.
      num_delivered: Tokens that were handed over.
      is_over: Whether the last was.
    """

    request: Request
    slot: int
    key: np.ndarray
    to_prefill: int
    num_started: int = 0
    num_delivered: int = 0
    is_over: bool = False

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is left to be started."""
        return self.is_over or self.request.cancelled or self.num_left == 0

    @property
    def num_left(self) -> int:
        """Tokens whose steps are still to be started."""
        return self.request.max_tokens - self.num_started


def no_token(code: int, request: Request) -> ValueError:
    """Returns the error of a request for which no token could be drawn."""
    all_allowed = request.allowed is None or bool(request.allowed.all())
    return no_token_error(code, request.processor, all_allowed=all_allowed)


def sampled(on_host: Step, number: int, row: int, num_top: int | None) -> Sampled:
    """Returns the token that a step has drawn for a row, with what is wanted beside it."""
    token = int(on_host.tokens[number, row])
    if num_top is None:
        return Sampled(token, None, {})
    tokens, logprobs = on_host.top_tokens[number, row], on_host.top_logprobs[number, row]
    best = zip(tokens[:num_top], logprobs[:num_top], strict=True)
    alternatives = {int(candidate): float(logprob) for candidate, logprob in best}
    return Sampled(token, float(on_host.logprobs[number, row]), alternatives)
