"""The shapes that programs are compiled for: few, so that requests of any length share them.

Pure: numbers in, numbers out.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

CHUNK_LENGTHS = (16, 64, 256, 1024)
"""Prefill shapes. Each is four times the last: at most two chunks of a size, bar the largest."""

CHUNK_TOKENS = 4096
"""Most tokens, over all rows, that one chunk computes at a time."""

LONG_CHUNK_LENGTHS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Those of prompts of which nothing but the cache is wanted, on GPUs.

There a chunk of hundreds of tokens takes little longer than one of 64, for both read every expert.
"""

LONG_CHUNK_TOKENS = 8192
"""Most tokens of such a chunk, over all rows."""

_SMALLEST_CAPACITY = 256
_LOGITS_BYTES = 1 << 28  # most memory that the logits of one scored chunk take


class Chunk(NamedTuple):
    """A part of a text, as one call runs it.

    Attributes:
      start: Position of its first token.
      num_tokens: How many it has.
      length: That of its program; what is beyond these is padding.
    """

    start: int
    num_tokens: int
    length: int

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.start + self.num_tokens


def chunks(start: int, end: int, length_for: Callable[[int], int]) -> Iterator[Chunk]:
    """Yields the chunks of a text from `start` to `end`.

    Args:
      start: Position of the first token.
      end: Position after the last.
      length_for: Takes how many tokens remain; returns the length of the next chunk.
    """
    while start < end:
        length = length_for(end - start)
        chunk = Chunk(start, min(length, end - start), length)
        yield chunk
        start = chunk.end


def capacity_for(num_tokens: int, context: int) -> int:
    """Cache capacity for up to `num_tokens` tokens: a power of two or the context."""
    capacity = _SMALLEST_CAPACITY
    while capacity < num_tokens:
        capacity *= 2
    return min(capacity, context)


def smallest_capacity(context: int) -> int:
    """The capacity of the shortest texts."""
    return capacity_for(1, context)


def batch_for(num_rows: int, num_groups: int) -> int:
    """Rows of a batch that holds `num_rows`: a power of two times the groups that share them."""
    rows = num_groups
    while rows < num_rows:
        rows *= 2
    return rows


def prompt_chunks(platform: str) -> tuple[tuple[int, ...], int]:
    """Lengths of chunks of prompts, and the most tokens of one over all rows.

    Args:
      platform: JAX's name of it.
    """
    if platform in ("gpu", "cuda"):
        return LONG_CHUNK_LENGTHS, LONG_CHUNK_TOKENS
    return CHUNK_LENGTHS, CHUNK_TOKENS


def chunk_for(
    batch: int,
    remaining: int,
    most_tokens: int = CHUNK_TOKENS,
    lengths: Sequence[int] = CHUNK_LENGTHS,
) -> int:
    """Length of the next chunk when the longest row has `remaining` tokens to run.

    Args:
      batch: Rows of the chunk.
      remaining: Tokens of the longest.
      most_tokens: Most tokens over all rows, where so few can be run.
      lengths: Those to choose from, ascending.
    """
    lengths = [n for n in lengths if n * batch <= most_tokens] or [lengths[0]]
    fitting = [n for n in lengths if n >= remaining]
    if fitting and (remaining > fitting[0] // 2 or fitting[0] == lengths[0]):
        return fitting[0]
    return max(n for n in lengths if n <= remaining)


def scoring_chunk_for(batch: int, remaining: int, vocab_size: int, most_tokens: int) -> int:
    """As `chunk_for`, with the logits of every position in mind."""
    chunk = chunk_for(batch, remaining, most_tokens)
    fitting = [n for n in CHUNK_LENGTHS if n * batch * vocab_size * 4 <= _LOGITS_BYTES]
    return min(chunk, max(fitting, default=CHUNK_LENGTHS[0]))
