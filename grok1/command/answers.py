"""Prompts that run side by side, and what is told of them one after another."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from grok1.generate.completion import Completion
from grok1.generate.options import GenerationOptions
from grok1.generate.requests import Batch
from grok1.model import Model

_FEWEST = 4  # Tokens come several at a time on a CPU: the rate of fewer is that of nothing.


class Answer(NamedTuple):
    """One prompt's continuation and what it cost.

    Attributes:
      completion: The continuation.
      first: Seconds from the start of the run to the first token.
      last: Seconds from the start of the run to the last token.
      start: When the run started, in seconds of `time.perf_counter`; those that ran together have
        the same.
    """

    completion: Completion
    first: float
    last: float
    start: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns the completion's fields, with "usage"; seconds are rounded to milliseconds."""
        rate = tokens_per_second([self])
        fields = dataclasses.asdict(self.completion)
        usage = {
            "prompt_tokens": fields.pop("num_prompt_tokens"),
            "completion_tokens": len(self.completion.tokens),
            "seconds_to_first_token": round(self.first, 3),
            "tokens_per_second": None if rate is None else round(rate, 2),
        }
        return {**fields, "usage": usage}


def answers(
    model: Model, prompts: Sequence[Sequence[int]], options: GenerationOptions
) -> Iterator[tuple[str, Answer | None]]:
    """Yields the texts of a batch in the order of its prompts, though all run at once.

    Args:
      model: The model.
      prompts: Token ids.
      options: Of all of them.

    Yields:
      (text, None) with the text of the first prompt that has not ended, as it becomes certain; then
      ("", answer) at its end, and the same of the next.
    """
    # The ids have their [BOS].
    batch = Batch(
        model.engine, model.tokenizer, prompts, dataclasses.replace(options, add_bos=False)
    )
    start, current = time.perf_counter(), 0
    waiting, first, last = [""] * len(prompts), [0.0] * len(prompts), [0.0] * len(prompts)
    for index, piece in batch.run():
        last[index] = time.perf_counter() - start
        first[index] = first[index] or last[index]
        waiting[index] += piece
        while current < len(prompts):
            if waiting[current]:
                yield waiting[current], None
                waiting[current] = ""
            builder = batch.builders[current]
            if builder.stop_reason is None:
                break
            yield "", Answer(builder.build(), first[current], last[current], start)
            current += 1


def tokens_per_second(told: Sequence[Answer]) -> float | None:
    """Returns the rate of the tokens after each answer's first; None where they are too few.

    Of runs one after another, what each takes before its first token is no part of it.
    """
    count = sum(len(answer.completion.tokens) - 1 for answer in told)
    seconds = 0.0
    for start in {answer.start for answer in told}:
        run = [answer for answer in told if answer.start == start]
        seconds += max(answer.last for answer in run) - min(answer.first for answer in run)
    return count / seconds if count >= _FEWEST and seconds > 0 else None


def cost(told: Sequence[Answer]) -> str:
    """Returns what a run cost in one line, as "11 prompt tokens, 100 tokens, ..."."""
    prompt_tokens = sum(answer.completion.num_prompt_tokens or 0 for answer in told)
    tokens = sum(len(answer.completion.tokens) for answer in told)
    first = min(answer.start + answer.first for answer in told)
    first -= min(answer.start for answer in told)
    parts = [] if len(told) == 1 else [f"{len(told)} prompts"]
    parts += [
        _count(prompt_tokens, "prompt token"),
        _count(tokens, "new token"),
        f"the first after {first:.2f} s",
    ]
    rate = tokens_per_second(told)
    if rate is not None:
        parts.append(f"then {_rate(rate)} tokens/s")
    return ", ".join(parts)


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
