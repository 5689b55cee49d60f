"""Beginnings of prompts that were run before: kept in blocks, found by their tokens.

A block is found by the hash of all tokens up to its end, so that it stands for nothing but these.
Beside the keys and values of a prompt that was scored are the statistics of its tokens. Those are
of the tokens one further on, so the first one behind such a block is a part of its name.
"""

import hashlib
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from grok1.engine.blocks import Blocks
from grok1.engine.engine import Engine
from grok1.engine.steps import DecodeState
from grok1.generate.request import Request, Running, ScoredPart


class _Kept(NamedTuple):
    number: int  # of the block
    scored: ScoredPart | None


class PrefixStore:
    """Blocks of keys and values beside a state; those that were used last stay longest.

    Attributes:
      num_asked: Tokens of prompts that could have been found.
      num_found: Those that were.
    """

    def __init__(self, engine: Engine, num_blocks: int, length: int):
        """Takes no memory on the devices before the first block is kept.

        Args:
          engine: The model.
          num_blocks: Most blocks.
          length: Positions of each.
        """
        self._engine, self._num_blocks, self._length = engine, num_blocks, length
        self.num_asked = self.num_found = 0
        self.forget()

    @property
    def num_kept(self) -> int:
        """Blocks that are in use."""
        return len(self._found)

    def forget(self) -> None:
        """Lets go of all blocks, and of their memory."""
        self._blocks: Blocks | None = None
        self._found: OrderedDict[bytes, _Kept] = OrderedDict()

    def reuse(self, state: DecodeState, running: Running) -> DecodeState:
        """Puts all blocks into a request's slot that come next in its prompt.

        Args:
          state: Consumed: its memory goes to the result.
          running: The request; what is left of its prompt is counted down.
        """
        request, first = running.request, running.num_prefilled
        if not first:
            self.num_asked += running.to_prefill
        names: list[bytes] = []
        while running.to_prefill >= self._length:
            start = running.num_prefilled
            name = self._name(running, start)
            kept = self._found.get(name)
            if kept is None:
                break
            assert self._blocks is not None
            state = self._engine.put_block(state, running.slot, start, self._blocks, kept.number)
            if kept.scored is not None:
                request.prompt_scores.append(kept.scored)
            running.to_prefill -= self._length
            names.append(name)
        # The last of a chain is let go of first: without those before it cannot be found.
        for name in reversed(names):
            self._found.move_to_end(name)
        found = running.num_prefilled - first
        request.num_reused += found
        self.num_found += found
        return state

    def keep(
        self, state: DecodeState, running: Running, start: int, scored: ScoredPart | None
    ) -> None:
        """Keeps a part of a request's prompt that was run as one whole chunk.

        Args:
          state: Where it was run.
          running: The request.
          start: Position of its first token, a multiple of the length.
          scored: What was found of the tokens behind them, where the prompt is scored.
        """
        name = self._name(running, start)
        if self._blocks is None:
            self._blocks = self._engine.empty_blocks(self._num_blocks, self._length)
        if name in self._found:
            return
        if len(self._found) < self._num_blocks:
            number = len(self._found)
        else:
            _, (number, _) = self._found.popitem(last=False)
        blocks, self._blocks = self._blocks, None
        self._blocks = self._engine.keep_block(blocks, number, state, running.slot, start)
        self._found[name] = _Kept(number, scored)

    def _name(self, running: Running, start: int) -> bytes:
        """What the block of a request's prompt from `start` on is found by."""
        request, chain = running.request, running.chain
        if not chain:
            kind = b"scored" if request.scores_prompt else b"run"
            chain.append(_digest(kind, _digest(request.salt)))
        end = start + self._length
        while len(chain) <= end // self._length:
            begin = (len(chain) - 1) * self._length
            chain.append(_digest(chain[-1], _ids(request, begin, begin + self._length)))
        if not request.scores_prompt:
            return chain[end // self._length]
        return _digest(chain[end // self._length], _ids(request, end, end + 1))


def _ids(request: Request, begin: int, end: int) -> bytes:
    return np.asarray(request.tokens[begin:end], np.int32).tobytes()


def _digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()
