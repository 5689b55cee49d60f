"""Beginnings of prompts that were run before: kept in blocks, found by their tokens.

A block is found by the hash of all tokens up to its end, so that it stands for nothing but these.
Beside the keys and values of a prompt that was scored are the statistics of its tokens. Those are
of the tokens one further on, so the first one behind such a block is a part of its name.

There are two tiers: blocks on the devices, and behind them others in the host's memory. What a
prompt has just used comes to the devices, what was unused there for longest makes room for it, and
is lost when the host's memory is full too. Where a block goes depends on nothing but the requests.
"""

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import numpy as np

from grok1.engine.blocks import Blocks
from grok1.engine.engine import Engine
from grok1.engine.steps import DecodeState
from grok1.generate.request import Request, Running, ScoredPart

_LEFT_FREE = 0.25  # of the memory that there was, once it has run out: transfers take of it too


class Tier(NamedTuple):
    """What a place for blocks has.

    Attributes:
      num_blocks: Most blocks.
      num_kept: Blocks that are in use.
      num_found: Tokens of prompts that were found there.
    """

    num_blocks: int
    num_kept: int
    num_found: int


class _OnDevices(NamedTuple):
    number: int  # of the block
    scored: ScoredPart | None


class _OnHost(NamedTuple):
    block: Blocks  # one, alone
    scored: ScoredPart | None


class PrefixStore:
    """Blocks of keys and values beside a state; those that were used last stay longest.

    Attributes:
      length: Positions of a block.
      num_asked: Tokens of prompts that could have been found.
    """

    def __init__(self, engine: Engine, num_blocks: int, length: int, num_on_host: int = 0):
        """Takes no memory before the first block is kept.

        Args:
          engine: The model.
          num_blocks: Most blocks on the devices, 1 or more.
          length: Positions of each.
          num_on_host: Most blocks in the host's memory; 0 for devices without `pinned` memory.
        """
        self._engine, self._num_blocks, self.length = engine, num_blocks, length
        self._num_on_host = num_on_host
        self.start_counting()
        self.forget()

    def start_counting(self) -> None:
        """Counts from nothing."""
        self.num_asked = self._num_found_on_devices = self._num_found_on_host = 0

    @property
    def num_found(self) -> int:
        """Tokens of prompts that were found."""
        return self._num_found_on_devices + self._num_found_on_host

    @property
    def num_kept(self) -> int:
        """Blocks that are in use."""
        return len(self._order)

    @property
    def tiers(self) -> dict[str, Tier]:
        """What the devices have, and what the host's memory."""
        found = self._num_found_on_devices, self._num_found_on_host
        return {
            "device": Tier(self._num_blocks, len(self._on_devices), found[0]),
            "host": Tier(self._num_on_host, len(self._on_host), found[1]),
        }

    def forget(self) -> None:
        """Lets go of all blocks, and of their memory."""
        self._blocks: Blocks | None = None
        # The one that was used last is the last, here and of those on the devices.
        self._order: OrderedDict[bytes, None] = OrderedDict()
        self._on_devices: OrderedDict[bytes, _OnDevices] = OrderedDict()
        self._on_host: dict[bytes, _OnHost] = {}

    def reserve(self) -> int:
        """Takes all memory of the host's that blocks can need, for as long as this process runs.

        JAX keeps what it has once had of the system, so that no copy waits for it later.

        Returns:
          How many blocks there is memory for, at most those that were asked for.
        """
        blocks, held = self._engine.empty_blocks(1, self.length), []
        with contextlib.suppress(jax.errors.JaxRuntimeError, MemoryError):
            while len(held) < self._num_on_host:
                held.append(jax.block_until_ready(self._engine.take_block(blocks, 0)))
            return len(held)
        return int(len(held) * (1 - _LEFT_FREE))

    def limit(self, num_on_host: int) -> None:
        """Lets go of all blocks, and keeps no more than these in the host's memory."""
        self.forget()
        self._num_on_host = num_on_host

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
        while running.to_prefill - len(names) * self.length >= self.length:
            name = self._name(running, first + len(names) * self.length)
            if name not in self._order:
                break
            names.append(name)
        self._used(names)
        chain = set(names)
        for name in names:
            start = running.num_prefilled
            if name in self._on_devices:
                assert self._blocks is not None
                number, scored = self._on_devices[name]
                state = self._engine.put_block(state, running.slot, start, self._blocks, number)
                self._num_found_on_devices += self.length
            else:
                alone, scored = self._on_host[name]
                block = self._engine.block_on_devices(alone)
                state = self._engine.put_block(state, running.slot, start, block, 0)
                self._bring(name, block, chain)
                self._num_found_on_host += self.length
            if scored is not None:
                request.prompt_scores.append(scored)
            running.to_prefill -= self.length
        self._used(names)
        request.num_reused += running.num_prefilled - first
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
            self._blocks = self._engine.empty_blocks(self._num_blocks, self.length)
        assert name not in self._order  # else `reuse` had found it
        before = running.names[: start // self.length]
        self._used(before)
        if self._is_full and next(iter(self._order)) in before:
            return  # without the one that it would take the place of it could not be found
        number = self._room()
        blocks, self._blocks = self._blocks, None
        self._blocks = self._engine.keep_block(blocks, number, state, running.slot, start)
        self._order[name], self._on_devices[name] = None, _OnDevices(number, scored)
        self._used([*before, name])

    def spill(self) -> None:
        """Moves all blocks from the devices to the host's memory, as far as it has room."""
        for name in list(self._on_devices):
            if len(self._on_host) < self._num_on_host:
                self._move_out(name)
            else:
                del self._order[name], self._on_devices[name]

    def _used(self, names: Sequence[bytes]) -> None:
        """Notes that the blocks of a prompt were used, given in its order."""
        # The last of a chain is let go of first: without those before it cannot be found.
        for name in reversed(names):
            if name in self._order:
                self._order.move_to_end(name)
            if name in self._on_devices:
                self._on_devices.move_to_end(name)

    @property
    def _is_full(self) -> bool:
        # One on its way to the devices has left its place, and is in the order all the same.
        held = len(self._on_devices) + len(self._on_host)
        return held == self._num_blocks + self._num_on_host

    def _room(self) -> int:
        """Returns the number of a block on the devices that is free, or is now."""
        if len(self._on_devices) < self._num_blocks:
            return len(self._on_devices)
        if self._is_full:
            name, _ = self._order.popitem(last=False)
            if name in self._on_devices:
                return self._on_devices.pop(name).number
            del self._on_host[name]
        return self._move_out(next(iter(self._on_devices)))

    def _move_out(self, name: bytes) -> int:
        """Moves a block to the host's memory; returns the number that it had on the devices."""
        number, scored = self._on_devices.pop(name)
        assert self._blocks is not None
        self._on_host[name] = _OnHost(self._engine.take_block(self._blocks, number), scored)
        return number

    def _bring(self, name: bytes, block: Blocks, chain: Collection[bytes]) -> None:
        """Moves a block of a chain to the devices, unless others of that have all their room."""
        is_full = len(self._on_devices) == self._num_blocks
        if is_full and next(iter(self._on_devices)) in chain:
            return
        scored = self._on_host.pop(name).scored
        number = self._room()
        assert self._blocks is not None
        blocks, self._blocks = self._blocks, None
        self._blocks = self._engine.place_block(blocks, number, block)
        self._on_devices[name] = _OnDevices(number, scored)

    def _name(self, running: Running, start: int) -> bytes:
        """What the block of a request's prompt from `start` on is found by."""
        request, chain, names = running.request, running.chain, running.names
        if not chain:
            kind = b"scored" if request.scores_prompt else b"run"
            chain.append(_digest(kind, _digest(request.salt)))
        while len(names) <= start // self.length:
            end = len(chain) * self.length
            chain.append(_digest(chain[-1], _ids(request, end - self.length, end)))
            names.append(chain[-1])
            if request.scores_prompt:
                names[-1] = _digest(chain[-1], _ids(request, end, end + 1))
        return names[start // self.length]


def _ids(request: Request, begin: int, end: int) -> bytes:
    return np.asarray(request.tokens[begin:end], np.int32).tobytes()


def _digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()
