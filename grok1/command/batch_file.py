"""Many prompts from a file: a JSON object a line, each with options of its own."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from grok1 import keywords
from grok1.command.advice import FileError
from grok1.command.answers import Answer, answers
from grok1.files import unique_names
from grok1.generate.options import GenerationOptions
from grok1.model import Model

_OPTIONS = sorted(
    {field.name for field in dataclasses.fields(GenerationOptions)} - {"logits_processor"}
)


class Line(NamedTuple):
    """One prompt of a file.

    Attributes:
      given: The object as it stands there.
      tokens: Its prompt's token ids.
      options: Its own, and those of the command.
      group: Equal for lines that can run side by side.
    """

    given: dict[str, Any]
    tokens: list[int]
    options: GenerationOptions
    group: str


Encode = Callable[[Any, GenerationOptions], list[int]]
"""(prompt, options) to token ids, all checked."""


def parse(text: str, name: str, defaults: GenerationOptions, encode: Encode) -> list[Line]:
    """Reads and checks all lines.

    Args:
      text: The file; empty lines are passed over.
      name: Its name, for errors.
      defaults: What a line does not say. Line i, from 0, draws with the default seed plus i.
      encode: Turns a prompt into token ids.

    Raises:
      FileError: If a line is no such object, or its prompt or options are refused; the message
        names the file and the line. If there is no line.
    """
    lines = []
    # Not `splitlines`: JSON holds other line ends than these as they are.
    for number, raw in enumerate(text.split("\n"), 1):
        if not raw.strip():
            continue
        try:
            lines.append(_line(raw, len(lines), defaults, encode))
        except (ValueError, TypeError, RecursionError) as error:
            raise FileError(f"{name}, line {number}: {error}") from None
    if not lines:
        raise FileError(f"{name}: no prompts; give a JSON object a line, with a prompt in each")
    return lines


def run(model: Model, lines: list[Line]) -> Iterator[tuple[Line, Answer]]:
    """Yields each line with its answer, in their order; lines of equal options run side by side."""
    groups: dict[str, list[int]] = {}
    for i, line in enumerate(lines):
        groups.setdefault(line.group, []).append(i)
    told, done = 0, {}
    for indices in groups.values():
        chosen = [lines[i] for i in indices]
        seeds = [int(np.asarray(line.options.seed)) for line in chosen]
        options = dataclasses.replace(chosen[0].options, seed=seeds)
        ended = iter(indices)
        for _, answer in answers(model, [line.tokens for line in chosen], options):
            if answer is None:
                continue
            done[next(ended)] = answer
            while told in done:
                yield lines[told], done.pop(told)
                told += 1


def _line(raw: str, index: int, defaults: GenerationOptions, encode: Encode) -> Line:
    try:
        given = json.loads(raw, object_pairs_hook=unique_names)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error}") from None
    if not isinstance(given, dict) or "prompt" not in given:
        raise ValueError('expected an object with a "prompt", as {"prompt": "text"}')
    own = {name: value for name, value in given.items() if name not in ("prompt", "id")}
    keywords.check(own, ["id", *_OPTIONS], "a line of this file")
    if isinstance(own.get("seed", 0), list):
        raise ValueError(f"seed must be one whole number, found {own['seed']}")
    seed = (int(np.asarray(defaults.seed)) + index) % 2**32
    options = dataclasses.replace(defaults, **{"seed": seed, **own})
    prompt = given["prompt"]
    if not isinstance(prompt, (str, list)):
        raise ValueError(f"the prompt must be text or a list of token ids, found {prompt!r:.80}")
    own.pop("seed", None)
    return Line(given, encode(prompt, options), options, json.dumps(own, sort_keys=True))
