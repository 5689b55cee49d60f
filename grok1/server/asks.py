"""From a body to requests: every field checked, prompts as token ids, defaults as OpenAI's."""

import dataclasses
import math
import secrets
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from grok1.engine.adjustment import NUM_BIASES
from grok1.engine.sampling import SamplingParams
from grok1.engine.steps import NUM_ENDS
from grok1.generate.completion import CompletionBuilder
from grok1.generate.request import Request, Wishes
from grok1.generate.requests import end_of_sequence
from grok1.server.bodies import CompletionBody, SamplingBody
from grok1.server.core import Server
from grok1.server.fields import checked_ids, refuse, within
from grok1.server.handle import Handle
from grok1.server.refusals import RefusalError
from grok1.server.texts import encode_text

_MOST_STOPS, _LONGEST_STOP = 16, 256
_MOST_CHOICES = 128
_LONG_ANSWER = 512  # tokens
_MOST_PENDING = 512  # events that a client that does not read can leave


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    Attributes:
      add_bos: Whether `add_special_tokens` begins prompts with [BOS].
      most_prompts: Prompts of a request.
      most_tokens: Largest `max_tokens`; None for what fits.
      timeout: Seconds that a request has.
    """

    add_bos: bool = False
    most_prompts: int = 128
    most_tokens: int | None = None
    timeout: float | None = 600.0

    def usual(self, max_tokens: int) -> int:
        """Returns what `max_tokens` is where a client does not say: no more than it may say."""
        return max_tokens if self.most_tokens is None else min(max_tokens, self.most_tokens)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt, and its text as it is echoed.

    Attributes:
      tokens: Its ids.
      text: As it was given, or what its ids stand for.
    """

    tokens: list[int]
    text: str


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request that has been checked.

    Attributes:
      prompts: What to continue.
      handles: For each prompt those of its choices.
      num_choices: How many of these are returned.
      num_top: Alternatives to report; None for no log-probabilities.
      echo: Whether the answer begins with the prompt.
      num_prompt_top: Alternatives to report of the prompt, as `prompt_logprobs`.
      with_ids: Whether to return token ids.
      with_top_ids: Whether to return those of `top_logprobs`, by their text.
    """

    prompts: list[Prompt]
    handles: list[list[Handle]]
    num_choices: int
    num_top: int | None
    echo: bool = False
    num_prompt_top: int | None = None
    with_ids: bool = False
    with_top_ids: bool = False

    @property
    def every_handle(self) -> list[Handle]:
        """All handles, those of the first prompt first."""
        return [handle for handles in self.handles for handle in handles]

    def cancel(self) -> None:
        """Cancels all choices."""
        for handle in self.every_handle:
            handle.cancel()

    @property
    def is_long(self) -> bool:
        """Whether so much is told that nobody else should wait until it is written."""
        requests = [handle.request for handle in self.every_handle]
        told = sum(one.max_tokens + len(one.tokens) * one.scores_prompt for one in requests)
        return told > _LONG_ANSWER


def read_prompts(given: Any, server: Server, limits: Limits, body: SamplingBody) -> list[Prompt]:
    """Returns the prompts of a request: a text, texts, ids, or lists of ids.

    Raises:
      RefusalError: If it is something else, empty, or too much.
    """
    model = server.model
    if given is None:
        raise RefusalError(
            "there is no prompt; for a new document give the id of [BOS], or a text with "
            "add_special_tokens where the server adds [BOS]",
            param="prompt",
        )
    many: list[Any] = given if isinstance(given, list) else [given]
    if given and isinstance(given, list) and isinstance(given[0], int):
        many = [given]
    kinds = {type(one) for one in (given if isinstance(given, list) else [given])}
    if len(kinds) > 1:
        raise refuse("prompt", "one kind: a text, texts, token ids, or lists of these", given)
    if len(many) > limits.most_prompts:
        raise refuse("prompt", f"at most {limits.most_prompts} prompts", len(many))
    if not many or not all(many):
        raise RefusalError(
            "the prompt is empty; give at least one token, such as that of [BOS]", param="prompt"
        )
    prompts = []
    for one in many:
        if isinstance(one, str):
            if model.tokenizer is None:
                raise RefusalError(
                    "this model has no tokenizer; give the prompt as token ids", param="prompt"
                )
            add_bos = bool(body.add_special_tokens) and limits.add_bos
            tokens = encode_text(model.tokenizer, one, add_bos=add_bos)
            text = one
        else:
            tokens = checked_ids("prompt", one, model.config.vocab_size)
            text = model.tokenizer.decode(tokens) if model.tokenizer else ""
        if (keep := body.truncate_prompt_tokens) is not None:
            within("truncate_prompt_tokens", keep, 1, math.inf, "1 or more")
            if keep < len(tokens):
                tokens = tokens[-keep:]
                text = model.tokenizer.decode(tokens) if model.tokenizer else ""
        if not tokens:
            raise RefusalError("the prompt has no token", param="prompt")
        prompts.append(Prompt(tokens, text))
    return prompts


def completion_ask(body: CompletionBody, server: Server, limits: Limits) -> Ask:
    """Returns what a completion asks for.

    Raises:
      RefusalError: If a field is out of range.
    """
    num_top = server.num_top
    within("logprobs", body.logprobs, 0, num_top, f"from 0 to {num_top}")
    within("prompt_logprobs", body.prompt_logprobs, 0, num_top, f"from 0 to {num_top}")
    within("max_tokens", body.max_tokens, 0, math.inf, "0 or more; there is no -1 for no limit")
    echo, stream = bool(body.echo), bool(body.stream)
    if body.max_tokens == 0 and not echo:
        raise RefusalError("max_tokens 0 needs echo; give 1 or more", param="max_tokens")
    if body.suffix is not None:
        raise RefusalError("suffix is not supported: this model only continues", param="suffix")
    if body.prompt_logprobs is not None and stream:
        raise RefusalError("prompt_logprobs come without stream", param="prompt_logprobs")
    num_choices = 1 if body.n is None else body.n
    best_of = num_choices if body.best_of is None else body.best_of
    within("n", num_choices, 1, _MOST_CHOICES, f"from 1 to {_MOST_CHOICES}")
    within("best_of", best_of, num_choices, _MOST_CHOICES, f"from n to {_MOST_CHOICES}")
    if best_of > num_choices and stream:
        raise RefusalError("best_of more than n comes without stream", param="best_of")
    prompts = read_prompts(body.prompt, server, limits, body)
    # What can never be answered is not made. What needs no model need not wait for it.
    count, most = len(prompts) * best_of, server.most_at_once
    if count > max(most, limits.most_prompts):
        raise RefusalError(
            f"{count} requests are asked for at once, of at most {most}", param="prompt"
        )
    max_tokens = limits.usual(16) if body.max_tokens is None else body.max_tokens
    sampler = Sampler(body, server, limits, max_tokens)
    sampler.ranks = best_of > num_choices
    scores_prompt = (echo and body.logprobs is not None) or body.prompt_logprobs is not None
    handles = [
        sampler.handles(prompt, number * best_of, best_of, body.logprobs, scores_prompt)
        for number, prompt in enumerate(prompts)
    ]
    return Ask(
        prompts,
        handles,
        num_choices,
        body.logprobs,
        echo,
        body.prompt_logprobs,
        bool(body.return_token_ids),
        bool(body.return_top_ids) and body.logprobs is not None,
    )


class Sampler:
    """How a request samples, checked once for all its choices.

    Attributes:
      ranks: Whether choices are ranked by their log-probabilities.
    """

    def __init__(
        self,
        body: SamplingBody,
        server: Server,
        limits: Limits,
        max_tokens: int,
        more_stops: Sequence[str] = (),
    ):
        """Checks the fields.

        Args:
          body: The request's.
          server: What is to answer it.
          limits: What a client may ask for.
          max_tokens: Most tokens to generate.
          more_stops: The server's own, beside those of the request.

        Raises:
          RefusalError: If one is out of range.
        """
        model = server.model
        self._server, self._limits, self._body = server, limits, body
        self.ranks = False
        if limits.most_tokens is not None:
            within("max_tokens", max_tokens, 0, limits.most_tokens, f"at most {limits.most_tokens}")
        self._max_tokens = max_tokens
        vocab_size = model.config.vocab_size
        if body.stream_options is not None and not body.stream:
            raise RefusalError("stream_options needs stream", param="stream_options")
        if body.use_beam_search:
            raise RefusalError("there is no beam search here", param="use_beam_search")
        if body.skip_special_tokens is False:
            raise RefusalError(
                "skip_special_tokens must be true: special tokens have no text here; "
                "return_token_ids has their ids",
                param="skip_special_tokens",
            )
        within("priority", body.priority, 0, 0, "0: the first that comes is served first")
        self._sampling = _sampling(body)
        self._seed = secrets.randbits(32) if body.seed is None else body.seed % 2**32
        self._stops = [*_stops(body.stop), *more_stops]
        if self._stops and model.tokenizer is None:
            raise RefusalError(
                "stop needs a tokenizer, and this model has none; give stop_token_ids", param="stop"
            )
        self._ends = set(checked_ids("stop_token_ids", body.stop_token_ids or (), vocab_size))
        if not body.ignore_eos:
            self._ends.add(end_of_sequence(model.tokenizer))
        self._wishes = _wishes(body, vocab_size, max_tokens)
        self._allowed = None
        if body.allowed_token_ids is not None:
            ids = checked_ids("allowed_token_ids", body.allowed_token_ids, vocab_size)
            if not ids:
                raise refuse("allowed_token_ids", "at least one token id", ids)
            self._allowed = np.isin(np.arange(vocab_size), ids)
            if body.min_tokens and set(ids) <= self._ends:
                raise RefusalError(
                    "min_tokens forbids the ends, and allowed_token_ids all else",
                    param="min_tokens",
                )
        if body.min_tokens and len(self._ends) > NUM_ENDS:
            raise refuse(
                "stop_token_ids", f"fewer than {NUM_ENDS} with min_tokens", len(self._ends)
            )

    def handles(
        self,
        prompt: Prompt,
        first: int,
        count: int,
        num_top: int | None,
        scores_prompt: bool = False,
    ) -> list[Handle]:
        """Returns the handles of a prompt's choices.

        Args:
          prompt: What to continue.
          first: Stream of the seed from which the first choice draws.
          count: How many choices.
          num_top: Alternatives to report; None for no log-probabilities.
          scores_prompt: Whether the prompt's tokens are scored.

        Raises:
          RefusalError: If the prompt leaves no room.
        """
        tokens, capacity = prompt.tokens, self._server.sizes.capacity
        wanted = self._max_tokens
        excess = len(tokens) + min(wanted, 1) - capacity
        if excess > 0:
            free = ", of which one must stay free for a new token" if wanted else ""
            raise RefusalError(
                f"the prompt has {len(tokens)} tokens and the context holds {capacity}{free}; "
                f"shorten it by {excess}",
                code="context_length_exceeded",
                param="prompt",
            )
        max_tokens = min(wanted, capacity - len(tokens))
        now, timeout = time.monotonic(), self._limits.timeout
        made = []
        for stream in range(first, first + count):
            request = Request(
                tokens=tokens,
                max_tokens=max_tokens,
                seed=self._seed,
                stream=stream,
                sampling=self._sampling,
                allowed=self._allowed,
                ends=tuple(sorted(self._ends)),
                one_by_one=bool(self._stops),
                num_top=0 if num_top is None and self.ranks else num_top,
                wishes=self._wishes,
                scores_prompt=scores_prompt,
                salt=(self._body.cache_salt or "").encode(),
            )
            builder = CompletionBuilder(
                self._server.model.tokenizer,
                max_tokens=max_tokens,
                limit_reason="length",
                stop_tokens=self._ends,
                stop_strings=self._stops,
                with_logprobs=request.num_top is not None,
            )
            builder.num_prompt_tokens = len(tokens)
            builder.keeps_stop = bool(self._body.include_stop_str_in_output)
            builder.min_tokens = self._body.min_tokens or 0
            deadline = None if timeout is None else now + timeout
            pending = _MOST_PENDING if self._body.stream else None
            made.append(Handle(request, builder, deadline, pending))
        return made


def _sampling(body: SamplingBody) -> SamplingParams:
    within("temperature", body.temperature, 0, 100, "from 0 (the most probable token) to 100")
    top_p = 1.0 if body.top_p is None else body.top_p
    if not 0 < top_p <= 1:
        raise refuse("top_p", "above 0 and at most 1", top_p)
    within("top_k", body.top_k, -1, math.inf, "a number of tokens, or -1 or 0 for all")
    within("min_p", body.min_p, 0, 1, "from 0 to 1")
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=top_p,
        top_k=body.top_k if body.top_k is not None and body.top_k > 0 else None,
        min_p=body.min_p or None,
    )


def _stops(given: str | list[str] | None) -> list[str]:
    stops = [given] if isinstance(given, str) else list(given or ())
    if len(stops) > _MOST_STOPS:
        raise refuse("stop", f"at most {_MOST_STOPS} texts", len(stops))
    for stop in stops:
        if not 1 <= len(stop) <= _LONGEST_STOP:
            raise refuse("stop", f"texts of 1 to {_LONGEST_STOP} characters", stop)
    return stops


def _wishes(body: SamplingBody, vocab_size: int, max_tokens: int) -> Wishes | None:
    for name in ("presence_penalty", "frequency_penalty"):
        within(name, getattr(body, name), -2, 2, "from -2 to 2")
    repetition = 1.0 if body.repetition_penalty is None else body.repetition_penalty
    # A smaller one would make logits that no float32 holds.
    within("repetition_penalty", repetition, 0.01, 100, "from 0.01 to 100")
    within("min_tokens", body.min_tokens, 0, max(max_tokens, 0), f"from 0 to {max_tokens}")
    biases = {}
    if len(body.logit_bias or {}) > NUM_BIASES:
        raise refuse("logit_bias", f"for at most {NUM_BIASES} tokens", len(body.logit_bias or {}))
    for key, value in (body.logit_bias or {}).items():
        if not key.isascii() or not key.isdecimal():
            raise refuse("logit_bias", "by token id", key)
        # Python reads no number of thousands of digits; zeros before it are none of it.
        [token] = checked_ids("logit_bias", [int(key.lstrip("0")[:20] or 0)], vocab_size)
        within("logit_bias", value, -100, 100, "from -100 to 100")
        if token in biases:  # "5" and "05"
            raise refuse("logit_bias", "one number for each token id", key)
        biases[token] = value
    wishes = Wishes(
        biases=biases,
        presence=body.presence_penalty or 0.0,
        frequency=body.frequency_penalty or 0.0,
        repetition=repetition,
        min_tokens=body.min_tokens or 0,
    )
    is_neutral = wishes == Wishes() and body.allowed_token_ids is None
    return None if is_neutral else wishes


def num_characters(source: Any) -> int:
    """Returns how many characters or token ids prompts or messages have."""
    if isinstance(source, list) and not (source and isinstance(source[0], int)):
        return sum(map(num_characters, source))
    if isinstance(source, (str, list)):
        return len(source)
    return num_characters(getattr(source, "content", None) or getattr(source, "text", None) or "")
