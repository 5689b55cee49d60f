"""Traces: what the tokens of a text go through, for one client after the other."""

import asyncio
from typing import Any

import msgspec
import numpy as np

from grok1.server.core import Server
from grok1.server.errors import DeadlineError, QueueFullError
from grok1.server.texts import TokenTexts
from grok1.study import tracing

_MOST_WAITING = 16


class Traces:
    """Traces texts one at a time, beside the steps of those that decode."""

    def __init__(self, server: Server, name: str, texts: TokenTexts, timeout: float | None):
        """Traces nothing yet.

        Args:
          server: What has the model.
          name: The model's in the protocol.
          texts: Names of tokens.
          timeout: Seconds that a trace may wait for others; None for any number.
        """
        self._server, self._name, self._texts = server, name, texts
        self._timeout = timeout
        self._turn = asyncio.Lock()
        self._num_waiting = 0

    async def trace(self, tokens: list[int], lens_top: int) -> bytes:
        """Returns the answer's body, once those that came before have theirs.

        Who is no longer waited for has no turn. One that runs ends by itself, and only then has
        the next one its own: no more than one thread is ever taken from those of other requests.

        Args:
          tokens: The text.
          lens_top: Tokens that the lens is to show of each place.

        Raises:
          QueueFullError: If as many wait as may.
          DeadlineError: If it has no turn in time.
        """
        if self._num_waiting >= _MOST_WAITING:
            words = f"{self._num_waiting} traces wait and at most {_MOST_WAITING} may"
            raise QueueFullError(words, retry_after=5)
        self._num_waiting += 1
        try:
            async with asyncio.timeout(self._timeout):
                await self._turn.acquire()
        except TimeoutError:
            words = f"the trace had no turn within its {self._timeout:.1f} s"
            raise DeadlineError(words) from None
        finally:
            self._num_waiting -= 1
        running = asyncio.ensure_future(asyncio.to_thread(self._traced, tokens, lens_top))
        running.add_done_callback(lambda _: self._turn.release())
        return await asyncio.shield(running)

    def _traced(self, tokens: list[int], lens_top: int) -> bytes:
        server, texts = self._server, self._texts
        engine, capture = server.model.engine, ("router", "logit_lens")
        most = server.sizes.chunk * engine.batch_for(1)
        trace = tracing.trace(engine, None, tokens, capture, lens_top=lens_top, most_tokens=most)
        lens = trace.lens_tokens
        made: dict[str, Any] = {
            "object": "trace",
            "model": self._name,
            "token_ids": tokens,
            "tokens": [texts.name(token) for token in tokens],
            "num_experts": server.model.config.num_experts,
            # [layer][token][choice]
            "experts": trace.expert_indices.tolist(),
            "gates": np.round(trace.expert_weights.astype(np.float64), 4).tolist(),
            "lens_tokens": lens.tolist(),
            "lens_logprobs": np.round(trace.lens_logprobs.astype(np.float64), 4).tolist(),
            "names": {token: texts.name(token) for token in np.unique(lens).tolist()},
        }
        return msgspec.json.encode(made)
