"""The loop that turns prompts into tokens: batches, chunks, and who is still running.

Token ids only; what a token means, and whether it ends a request, is for the caller to say.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from grok1.engine.engine import Engine
from grok1.engine.sampling import SamplingParams, no_token_error, sampling_state
from grok1.engine.steps import NUM_ENDS, Ends, LogitsProcessor, Step
from grok1.machine.processor import waiting_politely
from grok1.nn.sharding import DATA_AXIS, put

MAX_ROWS = 32
"""Most requests that run side by side; more wait for a place in the next batch."""

_DELIVERY = 0.1  # seconds; tokens that take longer to come are not collected

_LONG_WAIT = 0.002  # seconds; after shorter steps a model waits for this thread, not the reverse


@dataclasses.dataclass
class Request:
    """One prompt to continue.

    Attributes:
      tokens: The prompt.
      max_tokens: Most tokens to generate; prompt and these together fit the context.
      seed: Seed of the request's draws.
      stream: Tells apart requests of one seed, so that equal prompts draw different tokens.
      finished: Set by the caller, between two tokens, to end the request early.
    """

    tokens: Sequence[int]
    max_tokens: int
    seed: int
    stream: int = 0
    finished: bool = False


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


def generate(
    engine: Engine,
    requests: Sequence[Request],
    sampling: SamplingParams,
    allowed: np.ndarray,
    ends: Sequence[int] | None = None,
    num_top: int | None = None,
    processor: LogitsProcessor | None = None,
) -> Iterator[tuple[int, Sampled]]:
    """Yields (index of the request, token) as the tokens come.

    A row's tokens do not depend on which others run beside it.

    Args:
      engine: The model.
      requests: What to continue.
      sampling: How every request draws.
      allowed: bool `[V]`, False for tokens that must not be drawn.
      ends: Tokens that end a request, at most `NUM_ENDS`; None where other things may end one, so
        that the caller is to be asked after each token.
      num_top: Alternatives to report with log-probabilities; None for no log-probabilities.
      processor: Changes the logits before the draw.

    Raises:
      ValueError: If a request has no token that can be drawn; the message says why.
    """
    for start in range(0, len(requests), MAX_ROWS):
        batch = requests[start : start + MAX_ROWS]
        for row, sampled in _generate_batch(
            engine, batch, sampling, allowed, ends, num_top, processor
        ):
            yield start + row, sampled


def _generate_batch(
    engine: Engine,
    requests: Sequence[Request],
    sampling: SamplingParams,
    allowed: np.ndarray,
    ends: Sequence[int] | None,
    num_top: int | None,
    processor: LogitsProcessor | None,
) -> Iterator[tuple[int, Sampled]]:
    batch = engine.batch_for(len(requests))
    capacity = engine.capacity_for(max(len(r.tokens) + r.max_tokens for r in requests))
    tokens = np.zeros((batch, capacity), np.int32)
    seeds, streams = np.zeros((2, batch), np.uint32)
    prompts, limits = np.zeros((2, batch), np.int32)
    for row, request in enumerate(requests):
        tokens[row, : len(request.tokens)] = request.tokens
        seeds[row], streams[row] = request.seed, request.stream
        prompts[row], limits[row] = len(request.tokens), request.max_tokens

    rows = NamedSharding(engine.mesh, P(DATA_AXIS))
    keys = engine.request_keys(seeds, streams)
    rows_state = jax.tree.map(lambda leaf: put(leaf, rows), sampling_state(sampling, keys))
    everywhere = NamedSharding(engine.mesh, P())
    allowed_everywhere = put(allowed, everywhere)
    most_steps = 1 if ends is None else engine.most_steps
    ending = np.full((batch, NUM_ENDS), -1, np.int32)
    ending[:, : len(ends or ())] = ends or ()
    ends_of_rows = Ends(put(ending, rows), put(prompts, rows))
    state = engine.new_state(tokens)
    needs_logits = sampling.temperature > 0 or num_top is not None or processor is not None
    greedily = not needs_logits and engine.screening_table is not None
    why = functools.partial(no_token_error, processor=processor, all_allowed=bool(allowed.all()))

    # The last prompt token is left for the first decode step, so that prefill needs no logits.
    remaining = np.array([len(r.tokens) - 1 for r in requests] + [0] * (batch - len(requests)))
    while remaining.any():
        chunk = engine.chunk_for(batch, int(remaining.max()))
        num_valid = np.minimum(remaining, chunk).astype(np.int32)
        state = engine.prefill(state, num_valid, chunk)
        remaining = remaining - num_valid

    # The device works on steps while the host reads those before, so a request may be run past
    # where the caller ends it; such tokens are never yielded.
    started = np.zeros(batch, np.int32)
    in_flight: tuple[np.ndarray, Step] | None = None
    waited, delivered, num_collected = 0.0, None, 1
    while True:
        running = [not request.finished for request in requests]
        num_steps = np.minimum(limits - started, num_collected)
        num_steps *= np.array(running + [False] * (batch - len(requests)))
        upcoming = None
        if num_steps.any():
            if greedily:
                state, step = engine.decode_greedily(
                    state, num_steps, ends_of_rows, allowed_everywhere
                )
            else:
                state, step = engine.decode(
                    state,
                    num_steps,
                    ends_of_rows,
                    allowed_everywhere,
                    rows_state,
                    num_top,
                    processor,
                )
            started += num_steps
            upcoming = (num_steps, step)
            if not engine.runs_ahead:
                yield from _sampled(num_steps, _on_host(step, num_top), requests, num_top, why)
                continue
        if in_flight is not None:
            num_steps, step = in_flight
            start = time.perf_counter()
            with waiting_politely() if waited > _LONG_WAIT else contextlib.nullcontext():
                on_host = _on_host(step, num_top)
            end = time.perf_counter()
            waited = end - start
            if delivered is not None:
                of_step = (end - delivered) / num_steps.max()
                num_collected = int(np.clip(_DELIVERY / of_step, 1, most_steps))
            delivered = end
            yield from _sampled(num_steps, on_host, requests, num_top, why)
        elif upcoming is None:
            return
        in_flight = upcoming


def _on_host(step: Step, num_top: int | None) -> Step:
    if num_top is None:
        # Each array that is read takes time from the model.
        return step._replace(tokens=jax.device_get(step.tokens))
    return jax.device_get(step)


def _sampled(
    num_steps: np.ndarray,
    on_host: Step,
    requests: Sequence[Request],
    num_top: int | None,
    why_no_token: Callable[[int], ValueError],
) -> Iterator[tuple[int, Sampled]]:
    for number in range(num_steps.max()):
        for row in np.flatnonzero(num_steps > number).tolist():
            if requests[row].finished:
                continue
            token = int(on_host.tokens[number, row])
            if token < 0:
                raise why_no_token(token)
            if num_top is None:
                yield row, Sampled(token, None, {})
                continue
            best = zip(
                on_host.top_tokens[number, row], on_host.top_logprobs[number, row], strict=True
            )
            alternatives = {int(candidate): float(logprob) for candidate, logprob in best}
            yield row, Sampled(token, float(on_host.logprobs[number, row]), alternatives)
