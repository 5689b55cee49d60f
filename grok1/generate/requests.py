"""One call's prompts: checked, made into requests, and their tokens into completions."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from grok1.config import ModelConfig
from grok1.engine.engine import Engine
from grok1.generate.completion import CompletionBuilder
from grok1.generate.options import GenerationOptions, check_ids
from grok1.generate.request import Request
from grok1.generate.scheduler import generate
from grok1.keywords import check_flags, shown, warn
from grok1.machine.agreement import agree
from grok1.tokenizer import Tokenizer

Prompt = str | Sequence[int] | np.ndarray | jax.Array
"""Text, or token ids."""

_RELEASED_EOS_ID = 2


class Batch:
    """The requests of one call, each with the builder of its completion.

    Attributes:
      builders: One for each prompt, in their order.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        prompts: Sequence[Prompt],
        options: GenerationOptions,
    ):
        config = engine.config
        agree(
            "generate",
            lambda: {
                "prompts": list(prompts),
                **vars(options),
                "interventions": engine.interventions,
            },
            engine.mesh,
        )
        check_options(options, config, tokenizer)
        self._engine = engine
        allowed = options.allowed_mask(config.vocab_size)
        self._requests: list[Request] = []
        self.builders: list[CompletionBuilder] = []
        for prompt, draws in zip(prompts, options.seeds(len(prompts)), strict=True):
            tokens = prompt_tokens(prompt, tokenizer, config, options)
            room = config.sequence_len - len(tokens)
            request, builder = as_request(tokens, room, options, tokenizer, draws, allowed)
            # The last of the new tokens is drawn and not run.
            engine.check_length(len(tokens), num_new=max(0, request.max_tokens - 1))
            self._requests.append(request)
            self.builders.append(builder)

    def run(self) -> Iterator[tuple[int, str]]:
        """Yields (prompt, text that became certain) for every token; ends when all are over."""
        for i, sampled in generate(self._engine, self._requests):
            piece = self.builders[i].push(sampled)
            self._requests[i].cancelled = self.builders[i].stop_reason is not None
            yield i, piece
        self._warn_of_unreached()

    def _warn_of_unreached(self) -> None:
        """Says which interventions name a position that was to be generated and was not."""
        for one in self._engine.interventions:
            for i, (request, builder) in enumerate(zip(self._requests, self.builders, strict=True)):
                words = unreached(one, request, builder, f"prompt {i}")
                if words is not None:
                    warn(words)
                    break  # one message for all prompts


def unreached(
    intervention: Any, request: Request, builder: CompletionBuilder, name: str
) -> str | None:
    """Says which position an intervention names that was to be generated and was not.

    Args:
      intervention: Of `study.intervention`.
      request: A request that is over.
      builder: That of its completion.
      name: What to call the text.

    Returns:
      The words; None where it had all positions.
    """
    num_run = len(request.tokens) + max(0, builder.num_tokens - 1)
    if (beyond := intervention.beyond(num_run)) is None:
        return None
    return (
        f"{type(intervention).__name__}: nothing was changed at position {beyond}, which {name} "
        f"did not reach: it ended by {builder.stop_reason!r} with {num_run} tokens run; give "
        "ignore_eos=True or fewer stops, or name all positions from one on as slice(10, None)"
    )


def as_request(
    tokens: Sequence[int],
    room: int,
    options: GenerationOptions,
    tokenizer: Tokenizer | None,
    draws: tuple[int, int],
    allowed: np.ndarray | None,
) -> tuple[Request, CompletionBuilder]:
    """Returns what a prompt asks of the engine, and what makes its completion.

    Args:
      tokens: The prompt.
      room: How many tokens there can be behind it, at least one.
      options: As `check_options` takes them.
      tokenizer: For text; None for a model without.
      draws: Its seed and stream, of `GenerationOptions.seeds`.
      allowed: The options' `allowed_mask`.
    """
    ends = set(options.stop_tokens())
    if not options.ignore_eos:
        ends.add(end_of_sequence(tokenizer))
    seed, stream = draws
    max_tokens = min(options.max_new_tokens, room)
    request = Request(
        tokens=tokens,
        max_tokens=max_tokens,
        seed=seed,
        stream=stream,
        sampling=options.sampling(),
        allowed=allowed,
        ends=tuple(sorted(ends)),
        one_by_one=bool(options.stop_strings()),
        num_top=options.logprobs,
        processor=options.logits_processor,
    )
    builder = CompletionBuilder(
        tokenizer,
        max_tokens=max_tokens,
        limit_reason="context" if room < options.max_new_tokens else "length",
        stop_tokens=ends,
        stop_strings=options.stop_strings(),
        with_logprobs=options.logprobs is not None,
    )
    builder.num_prompt_tokens = len(tokens)
    return request, builder


def end_of_sequence(tokenizer: Tokenizer | None) -> int:
    """Returns the token that ends a text: the released one where there is no tokenizer."""
    return _RELEASED_EOS_ID if tokenizer is None else tokenizer.eos_id


def check_options(
    options: GenerationOptions, config: ModelConfig, tokenizer: Tokenizer | None
) -> None:
    """Checks options against a model, which need not be in memory.

    Raises:
      ValueError: If a stop string needs a tokenizer and there is none, or there are more
        alternatives, other stop tokens or other allowed tokens than the vocabulary has.
    """
    if tokenizer is None and options.stop_strings():
        raise ValueError(
            f"stop string {options.stop_strings()[0]!r} needs a tokenizer, and this model has "
            "none; stop at token ids instead"
        )
    if options.logprobs is not None and options.logprobs > config.vocab_size:
        raise ValueError(
            f"logprobs must be at most the vocabulary of {config.vocab_size}, found "
            f"{options.logprobs}"
        )
    check_ids(np.asarray(options.stop_tokens()), config.vocab_size, "stop")
    options.allowed_mask(config.vocab_size)


def prompt_tokens(
    prompt: Prompt, tokenizer: Tokenizer | None, config: ModelConfig, options: GenerationOptions
) -> list[int]:
    """Returns the token ids of a prompt that a model, which need not be in memory, can continue.

    Raises:
      ValueError: If the prompt is empty or leaves no room in the context, or as `encode_prompt`.
    """
    tokens = encode_prompt(
        prompt,
        tokenizer,
        config.vocab_size,
        add_bos=options.add_bos,
        allow_control=options.allow_control,
    )
    if not tokens:
        raise ValueError("the prompt is empty; give at least one token, or use add_bos=True")
    excess = len(tokens) + 1 - config.sequence_len
    if excess > 0:
        raise ValueError(
            f"the prompt has {len(tokens)} tokens and the context holds {config.sequence_len}, of "
            f"which one must stay free for a new token; shorten the prompt by {excess}"
        )
    return tokens


def encode_prompt(
    prompt: Prompt,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    *,
    add_bos: bool = False,
    allow_control: bool = False,
) -> list[int]:
    """Returns the token ids of a prompt; those that are given are checked and stay as they are.

    Args:
      prompt: Text or token ids.
      tokenizer: For text; None for a model without.
      vocab_size: Ids are below it.
      add_bos: As in `Tokenizer.encode`; for text alone.
      allow_control: As in `Tokenizer.encode`, for text.

    Raises:
      TypeError: If it is neither text nor a sequence, or a switch is neither True nor False.
      ValueError: If ids are out of range or no such sequence, or [BOS] is to stand before them, or
        a text has no tokenizer.
    """
    check_flags(add_bos=add_bos, allow_control=allow_control)
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(
                "this model has no tokenizer; give token ids, or load it with tokenizer="
            )
        return tokenizer.encode(prompt, add_bos=add_bos, allow_control=allow_control)
    _check_kind(prompt)
    if add_bos:
        raise ValueError(
            "add_bos puts [BOS] before text, and token ids are taken as they are; begin them with "
            "its id, tokenizer.bos_id"
        )
    try:
        array = np.asarray(prompt)
    except ValueError:  # sequences of different lengths
        array = np.asarray(prompt, object)
    if array.ndim != 1 or array.dtype == object:
        raise ValueError(
            f"a prompt of token ids must be one sequence of whole numbers, found {shown(prompt)}"
        )
    if array.dtype.kind == "U":
        raise ValueError(
            "a prompt is one text, or one sequence of token ids, found a sequence of texts "
            f"{shown(prompt)}; give each by itself"
        )
    check_ids(array, vocab_size, "the prompt")
    return array.tolist()


def is_batch(prompt: Any) -> bool:
    """Whether this is a sequence of prompts, not one.

    Raises:
      TypeError: If it is neither.
      ValueError: If it is an empty sequence, which may be either.
    """
    if isinstance(prompt, str):
        return False
    _check_kind(prompt)
    if len(prompt) == 0:
        raise ValueError(
            "there is no prompt in an empty sequence; give text, token ids, or a list of these"
        )
    if isinstance(prompt, (np.ndarray, jax.Array)):
        return prompt.ndim > 1
    return any(isinstance(item, (str, Sequence)) or getattr(item, "ndim", 0) for item in prompt)


def _check_kind(prompt: Any) -> None:
    """Checks that a prompt that is no text is a sequence, and not one of bytes or of strings."""
    if isinstance(prompt, (bytes, bytearray, memoryview)):
        raise TypeError(
            f"a prompt is text or token ids, found {type(prompt).__name__}; decode it to text, as "
            "bytes(prompt).decode(), or give list(prompt) if the bytes are ids"
        )
    if isinstance(prompt, (np.ndarray, jax.Array)) and prompt.ndim > 0:
        if prompt.dtype.kind in "SUO":
            raise TypeError(
                f"an array of prompts must be of token ids, found one of {prompt.dtype}; give a "
                "list of texts: prompts.tolist()"
            )
    elif not isinstance(prompt, Sequence):
        raise TypeError(
            f"a prompt is text or a sequence of token ids, found {type(prompt).__name__}"
        )
