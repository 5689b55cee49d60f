"""What a caller may ask of a generation, checked in one place."""

import dataclasses
import numbers
from collections.abc import Sequence, Set
from typing import Any, TypedDict

import numpy as np

from grok1.engine.sampling import SamplingParams
from grok1.engine.steps import LogitsProcessor
from grok1.keywords import as_python, check_flags, is_whole, shown


class GenerationArguments(TypedDict, total=False):
    """The fields of `GenerationOptions` as keyword arguments of a function."""

    max_new_tokens: int
    temperature: int | float
    top_p: int | float
    top_k: int | None
    min_p: int | float | None
    seed: int | Sequence[int]
    stop: str | int | Sequence[str | int] | None
    ignore_eos: bool
    logprobs: int | None
    add_bos: bool
    allow_control: bool
    allowed_tokens: Any
    logits_processor: LogitsProcessor | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Options of `Model.generate` and `Model.stream`.

    Attributes:
      max_new_tokens: Most tokens to generate.
      temperature: Divides the logits; 0 takes the most probable token.
      top_p: Nucleus: the fewest most probable tokens that together reach this; 1 is off.
      top_k: Only this many most probable tokens; None is off.
      min_p: Only tokens at least this fraction as probable as the most probable; None is off.
      seed: Seed of the draws: prompt i of a batch draws from stream i of the seed. A sequence gives
        each prompt a seed of its own, with the draws it would have alone.
      stop: Strings or token ids that end a continuation; one, or several.
      ignore_eos: Go on after the end-of-sequence token.
      logprobs: Report log-probabilities, with this many alternatives a token; None for none.
      add_bos: Begin text prompts with the beginning-of-sequence token; the released model does not.
        Token ids are taken as they are, and with this an error.
      allow_control: Let control pieces such as `<|separator|>` in a text prompt be themselves,
        instead of the plain text they are spelled with.
      allowed_tokens: Draw only these, for all prompts: token ids, or bool `[V]`; None for all.
      logits_processor: Function (logits float32 `[B, V]`, tokens int32 `[B, S]`, length int32
        `[B]`) -> logits, in JAX operations, run on the device before each draw; `tokens[:length]`
        are a row's tokens so far. Each function compiles a program.

    Raises:
      ValueError: If a value is out of range; the message names it.
      TypeError: If a value is of another type; the message names it.
    """

    max_new_tokens: int = 64
    temperature: int | float = 0.7
    top_p: int | float = 0.95
    top_k: int | None = None
    min_p: int | float | None = None
    seed: int | Sequence[int] = 0
    stop: str | int | Sequence[str | int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    add_bos: bool = False
    allow_control: bool = False
    allowed_tokens: Any = None
    logits_processor: LogitsProcessor | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.name not in ("allowed_tokens", "logits_processor"):
                object.__setattr__(self, field.name, as_python(getattr(self, field.name)))
        self._check_types()
        if not is_whole(self.max_new_tokens) or self.max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens must be a whole number above 0, found {shown(self.max_new_tokens)}"
            )
        if self.logprobs is not None and (not is_whole(self.logprobs) or self.logprobs < 0):
            raise ValueError(
                f"logprobs must be a number of alternatives from 0, or None, found "
                f"{shown(self.logprobs)}"
            )
        if not isinstance(self.seed, (int, np.integer)) and not _is_several(self.seed):
            raise TypeError(f"seed takes a whole number, or one a prompt, found {shown(self.seed)}")
        for seed in [self.seed] if isinstance(self.seed, (int, np.integer)) else self.seed:
            check_seed(seed)
        for stop in self._stops():
            if not is_whole(stop) and not isinstance(stop, str):
                raise TypeError(
                    f"stop takes strings and token ids, found {shown(stop)} of type "
                    f"{type(stop).__name__}"
                )
            if stop == "":
                raise ValueError("stop must not hold an empty string: it would end at once")
        self.sampling()

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        names = [field.name for field in dataclasses.fields(self)]
        return all(_is_same(getattr(self, name), getattr(other, name)) for name in names)

    def _check_types(self) -> None:
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not is_number and (name != "min_p" or value is not None):
                raise TypeError(f"{name} must be a number, found {shown(value)}")
        check_flags(
            ignore_eos=self.ignore_eos, add_bos=self.add_bos, allow_control=self.allow_control
        )
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise TypeError(
                "logits_processor must be a function of (logits, tokens, length), found "
                f"{shown(self.logits_processor)}"
            )

    def sampling(self) -> SamplingParams:
        """Returns the part of the options that shapes a draw."""
        names = ("temperature", "top_p", "top_k", "min_p")
        return SamplingParams(**{name: getattr(self, name) for name in names})

    def stop_strings(self) -> list[str]:
        """Returns the strings of `stop`."""
        return [stop for stop in self._stops() if isinstance(stop, str)]

    def stop_tokens(self) -> list[int]:
        """Returns the token ids of `stop`."""
        return [int(stop) for stop in self._stops() if not isinstance(stop, str)]

    def seeds(self, num_prompts: int) -> list[tuple[int, int]]:
        """Returns (seed, stream) of each prompt.

        Raises:
          ValueError: If there is a sequence of seeds, but not one a prompt.
        """
        if isinstance(self.seed, (int, np.integer)):
            return [(int(self.seed), i) for i in range(num_prompts)]
        if len(self.seed) != num_prompts:
            raise ValueError(f"{len(self.seed)} seeds for {num_prompts} prompts; give one a prompt")
        return [(int(seed), 0) for seed in self.seed]

    def allowed_mask(self, vocab_size: int) -> np.ndarray | None:
        """Returns bool `[V]`, True for tokens that may be drawn; None where all may.

        Raises:
          ValueError: If the ids are out of range, a mask has another size, or nothing is allowed.
        """
        if self.allowed_tokens is None:
            return None
        given = self.allowed_tokens
        try:
            given = np.asarray(list(given) if isinstance(given, Set) else given)
        except ValueError:  # sequences of different lengths
            given = np.asarray(given, object)
        if given.dtype == object or (given.ndim > 1 and given.dtype != bool):
            raise ValueError(
                "allowed_tokens must be one sequence of token ids, or one mask, for all prompts, "
                f"found {shown(self.allowed_tokens)}"
            )
        if given.dtype == bool:
            if given.shape != (vocab_size,):
                raise ValueError(
                    f"allowed_tokens as a mask must be bool[{vocab_size}], found "
                    f"bool{list(given.shape)}"
                )
            # The caller's array may change before the last token is drawn.
            mask = given.copy()
        else:
            check_ids(given, vocab_size, "allowed_tokens")
            mask = np.zeros(vocab_size, bool)
            mask[given.astype(np.int64)] = True
        if not mask.any():
            raise ValueError("allowed_tokens allows no token; allow at least one")
        return mask

    def _stops(self) -> list[Any]:
        if self.stop is None:
            return []
        if isinstance(self.stop, (str, int, np.integer)):
            return [self.stop]
        if not _is_several(self.stop):
            raise TypeError(
                "stop takes strings and token ids, one or a list, found "
                f"{shown(self.stop)} of type {type(self.stop).__name__}"
            )
        return list(self.stop)


def check_ids(ids: np.ndarray, vocab_size: int, what: str) -> None:
    """Checks that an array holds token ids.

    Raises:
      ValueError: If it holds anything else; the message begins with `what`.
    """
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        found = "text" if ids.dtype.kind == "U" else ids.dtype
        raise ValueError(f"{what} must be whole-number token ids, found {found}")
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise ValueError(
            f"{what} must be token ids from 0 to {vocab_size - 1}, found {outside.flat[0]}"
        )


def check_seed(seed: Any) -> None:
    """Checks a seed of draws: JAX would drop the upper half of a larger number.

    Raises:
      ValueError: If it is no whole number, or out of range.
    """
    if not is_whole(seed) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be a whole number from 0 to 2**32 - 1, found {shown(seed)}")


def _is_same(one: Any, other: Any) -> bool:
    if hasattr(one, "shape") or hasattr(other, "shape"):
        return np.array_equal(one, other)
    return one == other


def _is_several(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
