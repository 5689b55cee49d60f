"""One request: what it asks for, how far it is, and the tokens that it gets.

Dimension key: R row of a step, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from grok1.engine.adjustment import NUM_BIASES, Adjustment
from grok1.engine.sampling import SamplingParams, no_token_error
from grok1.engine.steps import NUM_ENDS, LogitsProcessor, Step
from grok1.nn.unembedding import TokenStatistics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a request changes in its logits; see `engine.adjustment.Adjustment`.

    Attributes:
      biases: By token id, at most `NUM_BIASES`.
      presence: Penalty of tokens that were generated before.
      frequency: The same, for each time.
      repetition: Divisor for tokens of the prompt or generated before.
      min_tokens: So many tokens are drawn before one that ends the request.
    """

    biases: Mapping[int, float] = dataclasses.field(default_factory=dict)
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    min_tokens: int = 0


@dataclasses.dataclass(eq=False, kw_only=True)
class Request:
    """One prompt to continue.

    Attributes:
      tokens: The prompt, at least one token.
      max_tokens: Most tokens to generate; prompt and these together fit the scheduler's capacity.
        0 only runs the prompt.
      seed: Seed of the request's draws.
      stream: Tells apart requests of one seed, so that equal prompts draw different tokens.
      sampling: How it draws.
      allowed: bool `[V]`, False for tokens that must not be drawn; None for all.
      ends: Tokens after which it is over.
      one_by_one: Whether something else than these may end it, so that each token is handed over
        before more than the next one are drawn.
      num_top: Alternatives to report with log-probabilities; None for no log-probabilities.
      processor: Changes the logits before the draw.
      wishes: Change them as well; not together with a processor.
      scores_prompt: Whether the tokens of the prompt are scored, where `prefill.OnGrid` runs it.
      salt: Sets apart prompts that must not share what was computed for them.
      prompt_scores: What is found of the prompt, from its second token on.
      num_reused: How many tokens of the prompt were not run but taken from an earlier one.
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
    wishes: Wishes | None = None
    scores_prompt: bool = False
    salt: bytes = b""
    prompt_scores: list["ScoredPart"] = dataclasses.field(default_factory=list)
    num_reused: int = 0
    cancelled: bool = False
    error: Exception | None = None

    @property
    def is_asked_after_each(self) -> bool:
        """Whether its tokens are drawn one a call."""
        return self.one_by_one or len(self.ends) > NUM_ENDS


class ScoredPart:
    """Statistics of some tokens of a prompt, on the devices until they are asked for.

    Several requests may have it, and several threads ask for it.
    """

    def __init__(self, found: TokenStatistics, row: int, count: int):
        self._found: TokenStatistics | None = found
        self._row, self._count = row, count
        self._on_host: TokenStatistics | None = None

    def on_host(self) -> TokenStatistics:
        """Returns the statistics, with an entry for each token."""
        # In the order opposite to that in which they change: another thread may do so in between.
        found, on_host = self._found, self._on_host
        if on_host is None:
            # Copies, so that the memory of what is padding goes.
            on_host = TokenStatistics(
                *(np.array(leaf[self._row, : self._count]) for leaf in jax.device_get(found))
            )
            self._on_host = on_host
            self._found = None
        return on_host


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
      chain: Hashes of the beginnings of its prompt, one a block, as far as `prefix` asked for them.
      names: What these blocks are found by.
      num_started: Tokens whose steps have been started.
      num_delivered: Tokens that were handed over.
      is_over: Whether the last was.
    """

    request: Request
    slot: int
    key: np.ndarray
    to_prefill: int
    chain: list[bytes] = dataclasses.field(default_factory=list)
    names: list[bytes] = dataclasses.field(default_factory=list)
    num_started: int = 0
    num_delivered: int = 0
    is_over: bool = False

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is left to be started."""
        is_all_started = not self.to_prefill and self.num_left == 0
        return self.is_over or self.request.cancelled or is_all_started

    @property
    def num_prefilled(self) -> int:
        """Tokens of the prompt that were run."""
        return len(self.request.tokens) - 1 - self.to_prefill

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


def adjustment(requests: Sequence[Request], rows: np.ndarray, num_rows: int) -> Adjustment:
    """Returns what the requests wish, each in its row; other rows keep their logits."""

    def full(value, dtype, *more):
        return np.full((num_rows, *more), value, dtype)

    made = Adjustment(
        tokens=full(np.iinfo(np.int32).max, np.int32, NUM_BIASES),
        biases=full(0, np.float32, NUM_BIASES),
        presence=full(0, np.float32),
        frequency=full(0, np.float32),
        repetition=full(1, np.float32),
        begin=full(0, np.int32),
        ends=full(-1, np.int32, NUM_ENDS),
        open=full(0, np.int32),
        is_measured=full(False, bool),
    )
    for request, row in zip(requests, rows, strict=True):
        made.begin[row] = len(request.tokens)
        if (wishes := request.wishes) is None:
            made.is_measured[row] = request.num_top is not None
            continue
        count = len(wishes.biases)
        made.tokens[row, :count] = list(wishes.biases)
        made.biases[row, :count] = list(wishes.biases.values())
        made.presence[row], made.frequency[row] = wishes.presence, wishes.frequency
        made.repetition[row] = wishes.repetition
        if wishes.min_tokens:
            made.ends[row, : len(request.ends)] = request.ends
            made.open[row] = len(request.tokens) + wishes.min_tokens
    return made
