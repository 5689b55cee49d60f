"""The work: generation with a clock, what it cannot do without, and how fast that is alone.

`Model.generate` is a loop over `requests.Batch` that throws the pieces of text away; here the loop
notes when they come, so that one call tells its time to the first token from its steady rate.
"""

import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import grok1
from grok1.engine import sampling
from grok1.generate.pace import Call, Pace
from grok1.generate.requests import Batch
from grok1.machine.processor import available_cores
from grok1.nn.sharding import DATA_AXIS

_SECONDS = 0.5  # of one measurement: long enough for many passes, short beside a round
_READ_BYTES = 1 << 30  # several times the largest cache
_COPY_BYTES = 1 << 31


GREEDY = {"temperature": 0}

DECODING: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "sampled": {"temperature": 0.7, "top_p": 0.95},  # the defaults of `generate`
    "greedy with 5 logprobs": GREEDY | {"logprobs": 5},
}
"""Options of `generate` for the ways of decoding that are measured."""


class Timing(NamedTuple):
    """How one call went.

    Attributes:
      first: Seconds from the call to the first token of every row.
      steps: Seconds from there to the last token of every row.
      sequences: int `[B, S]`, prompts and what was generated.
    """

    first: float
    steps: float
    sequences: np.ndarray


def random_prompts(vocab_size: int, batch: int, length: int) -> np.ndarray:
    """Returns int `[batch, length]`, the same ids every time; every row has other ones."""
    return np.random.default_rng(0).integers(vocab_size, size=(batch, length))


def run(model: grok1.Model, prompts: np.ndarray, num_tokens: int, **how: Any) -> Timing:
    """Continues prompts of one length by `num_tokens` each, whatever is drawn.

    Args:
      model: The model.
      prompts: int `[B, T]`.
      num_tokens: How many new tokens each row gets.
      **how: Sampling options of `generate`; temperature 0 without them.
    """
    how = how or GREEDY
    options = grok1.GenerationOptions(max_new_tokens=num_tokens, ignore_eos=True, **how)
    start = time.perf_counter()
    batch = Batch(model.engine, model.tokenizer, prompts.tolist(), options)
    times = [time.perf_counter() for _ in batch.run()]
    generated = np.array([builder.build().tokens for builder in batch.builders])
    # The tokens of one step come together, in the order of the rows.
    first = times[len(prompts) - 1]
    return Timing(first - start, times[-1] - first, np.concatenate([prompts, generated], axis=1))


def decode(
    model: grok1.Model, batch: int, prompt: int, num_steps: int, how: str = "greedy"
) -> Timing:
    """Times `num_steps` decode steps after the one that gives the first token.

    Args:
      model: The model.
      batch: Rows that run side by side.
      prompt: Tokens of each row's prompt.
      num_steps: Steps between the first token and the last.
      how: One of `DECODING`.
    """
    prompts = random_prompts(model.config.vocab_size, batch, prompt)
    return run(model, prompts, num_steps + 1, **DECODING[how])


def spread(model: grok1.Model, tokens: np.ndarray) -> dict[str, float]:
    """How a model spreads its probability at the temperature that is the default.

    Args:
      model: The model.
      tokens: int `[T]`, a text.

    Returns:
      The mean probability of the "most probable" token, and the median size of the "nucleus", the
      fewest tokens that reach the default top-p together, over all positions.
    """
    defaults = grok1.GenerationOptions()
    logits = np.asarray(model.logits(tokens), np.float64) / defaults.temperature
    weights = np.sort(np.exp(logits - logits.max(axis=-1, keepdims=True)), axis=-1)[:, ::-1]
    probs = weights / weights.sum(axis=-1, keepdims=True)
    sizes = (np.cumsum(probs, axis=-1) - probs < defaults.top_p).sum(axis=-1)
    return {"most probable": float(probs[:, 0].mean()), "nucleus": float(np.median(sizes))}


def time_to_first_token(model: grok1.Model, length: int) -> float:
    """Seconds from the call with one prompt of `length` tokens to its first token."""
    return run(model, random_prompts(model.config.vocab_size, 1, length), 1).first


def prefill(model: grok1.Model, length: int) -> float:
    """Seconds that `length` tokens of one prompt take.

    A prompt's last token is run by the first decode step, so this is the time to the first token of
    a prompt of one token more, less the same of a prompt of one token, which has no prefill.
    """
    return time_to_first_token(model, length + 1) - time_to_first_token(model, 1)


def experts_read(model: grok1.Model, sequences: np.ndarray, start: int) -> float:
    """Experts, over all layers, that a decode step over these rows needs; the mean over its steps.

    The router itself is asked, over the tokens that were really run: an expert that several rows
    chose is needed once.

    Args:
      model: The model.
      sequences: int `[B, S]`, prompts and continuations.
      start: Position of the first step to count; the last is that of the last token but one, since
        the last token is drawn and not run.
    """
    engine, num_rows, end = model.engine, len(sequences), sequences.shape[1] - 1
    batch = engine.batch_for(num_rows)
    tokens = np.zeros((batch, engine.capacity_for(end)), np.int32)
    tokens[:num_rows, :end] = sequences[:, :end]
    state = engine.new_state(tokens)
    rows = np.arange(batch) < num_rows
    for chunk in engine.chunks(batch, start):
        num_valid = np.where(rows, chunk.num_tokens, 0).astype(np.int32)
        state = engine.prefill(state, num_valid, chunk.length)
    needed = 0
    for chunk in engine.chunks(batch, end, start, with_logits=True):
        num_valid = np.where(rows, chunk.num_tokens, 0).astype(np.int32)
        state, _, captured = engine.score(state, num_valid, chunk.length, ("expert_indices",))
        indices_LMA = np.asarray(captured["expert_indices"])
        indices = indices_LMA.reshape(len(indices_LMA), batch, chunk.length, -1)
        chosen = indices[:, :num_rows, : chunk.num_tokens, :, None] == np.arange(
            model.config.num_experts
        )
        needed += int(chosen.any(axis=(1, 3)).sum())
    return needed / (end - start)


def decode_bytes(
    model: grok1.Model, batch: int, start: int, num_steps: int, experts_per_step: float
) -> dict[str, float]:
    """Bytes that one decode step must read, by what they are, the mean over the steps.

    Args:
      model: The model.
      batch: Rows.
      start: Position of the first step.
      num_steps: Number of steps.
      experts_per_step: Experts needed a step, over all layers (`experts_read`).

    Returns:
      Weights as they are held in memory, scales included, of "layers" (attention, norms, router),
      "experts" and "head"; and the filled part of the "cache".
    """
    config, params = model.config, model.params
    capacity = model.engine.capacity_for(start + num_steps + 1)
    cache = model.engine.abstract_state(batch, capacity).cache
    filled = start + (num_steps + 1) / 2  # a step at position p reads p + 1 keys
    return {
        "layers": _num_bytes(params.layers._replace(experts=())) + _num_bytes(params.final_norm),
        "experts": _num_bytes(params.layers.experts)
        / (config.num_layers * config.num_experts)
        * experts_per_step,
        "head": head_bytes(model, batch),
        "cache": _num_bytes(cache._replace(length=())) / capacity * filled,
    }


def head_bytes(model: grok1.Model, batch: int) -> float:
    """Bytes that finding the most probable tokens must read: the embedding, or its int8 copy."""
    engine = model.engine
    num_rows = engine.batch_for(batch) // engine.mesh.shape[DATA_AXIS]
    is_read = engine.screening_table is not None and engine.head_copies.is_read_by(num_rows)
    return _num_bytes(engine.screening_table if is_read else model.params.embedding)


@contextlib.contextmanager
def without_head_copy(model: grok1.Model) -> Iterator[None]:
    """Lets a model decode from all logits."""
    copies = vars(model.engine.head_copies)
    kept = model.engine.screening_table
    copies["table"] = None
    try:
        yield
    finally:
        copies["table"] = kept


@contextlib.contextmanager
def waits() -> Iterator[list[float]]:
    """Gives a list in which the seconds come that each call of the model lets the host wait."""
    seconds: list[float] = []
    read = Pace.read

    def timed(pace: Pace, call: Call) -> Any:
        start = time.perf_counter()
        found = read(pace, call)
        seconds.append(time.perf_counter() - start)
        return found

    with mock.patch.object(Pace, "read", timed):
        yield seconds


def prefill_operations(config: grok1.ModelConfig, num_tokens: int) -> float:
    """Multiplications and additions that a prompt needs, with only the chosen experts.

    Weights twice, for a product and a sum; scores and mixing over the positions up to each token's
    own. No logits: prefill has none.
    """
    width = config.num_q_heads * config.key_size
    attention = 2 * config.emb_size * (width + config.num_kv_heads * config.key_size)
    expert = 3 * config.emb_size * config.ffn_size
    weights = attention + config.emb_size * config.num_experts
    weights += config.num_selected_experts * expert
    mean_keys = (num_tokens + 1) / 2
    return 2 * num_tokens * config.num_layers * (weights + 2 * width * mean_keys)


class Sampler:
    """`engine.sampling.sample` alone, on a vocabulary as large as Grok-1's."""

    def __init__(self, model: grok1.Model, text: str, size: int = grok1.GROK_1.vocab_size):
        """Keeps the logits of a trained model's text, tiled and perturbed.

        Args:
          model: The model, with its tokenizer.
          text: Of 32 tokens or more.
          size: Of the vocabulary to draw from.
        """
        assert model.tokenizer is not None
        tokens = model.tokenizer.encode(text)[-32:]
        logits = np.asarray(model.logits(tokens), np.float32)
        tiled = np.tile(logits, (1, -(-size // logits.shape[1])))[:, :size]
        random = np.random.default_rng(0)
        self._logits = {
            "trained": tiled + 0.5 * random.standard_normal(tiled.shape, np.float32),
            "flat": 0.5 * random.standard_normal(tiled.shape, np.float32),
        }
        self._sample = jax.jit(sampling.sample)

    def __call__(self, shape: str, rows: int, num_filtered: int) -> float:
        """Seconds that a step's draws take.

        Args:
          shape: "trained" or "flat".
          rows: Rows of the step.
          num_filtered: How many of them draw at the default temperature and top-p; the others are
            greedy.
        """
        keys = np.arange(2 * rows, dtype=np.uint32).reshape(rows, 2)
        state = sampling.sampling_state(sampling.SamplingParams(), keys)
        state = state._replace(
            temperature=np.where(np.arange(rows) < num_filtered, state.temperature, 0)
        )
        logits = self._logits[shape][np.arange(rows) % len(self._logits[shape])]
        arguments = (logits, np.ones(logits.shape[1], bool), state, np.arange(rows, dtype=np.int32))
        placed = jax.tree.map(jnp.asarray, arguments)
        return _seconds_of(lambda: self._sample(*placed))


class HostBandwidth:
    """Reads an array larger than any cache on as many threads as the process may use.

    NumPy's maximum of bytes is one instruction a vector and lets go of the interpreter's lock.
    Sums, by NumPy or by a compiled loop, were mostly slower where measured, by up to a
    sixth: they would flatter what is compared.
    """

    def __init__(self):
        threads = available_cores()
        self._pool = concurrent.futures.ThreadPoolExecutor(threads)
        # Written, not only allocated: untouched pages are all the same page of zeros.
        self._parts = np.array_split(np.ones(_READ_BYTES, np.uint8), threads)

    def __call__(self) -> float:
        """Bytes read per second."""
        return _READ_BYTES / _seconds_of(lambda: list(self._pool.map(np.max, self._parts)))


class DeviceBandwidth:
    """Copies an array on an accelerator, where what is read and what is written both count."""

    def __init__(self):
        self._data = jnp.zeros(_COPY_BYTES // 4, jnp.int32)
        self._copy = jax.jit(lambda x: x + 1)  # a plain copy would be no work at all

    def __call__(self) -> float:
        """Bytes read and written per second."""
        return 2 * _COPY_BYTES / _seconds_of(lambda: self._copy(self._data))


class MatmulRate:
    """A square product of the type that the model's products have: float32, or bfloat16."""

    def __init__(self, dtype, on_cpu: bool):
        self._size = 2048 if on_cpu else 8192
        self._x = jnp.ones((self._size, self._size), dtype)
        self._matmul = jax.jit(
            lambda x, y: jnp.matmul(
                x, y, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
            )
        )

    def __call__(self) -> float:
        """Operations per second."""
        return 2 * self._size**3 / _seconds_of(lambda: self._matmul(self._x, self._x))


def _seconds_of(work: Callable[[], object]) -> float:
    """Mean time of `work`, over as many times as fit the measurement, the first one apart."""
    jax.block_until_ready(work())
    times, elapsed = 0, 0.0
    start = time.perf_counter()
    while elapsed < _SECONDS:
        # Several in a row, so that a device is not idle while the host looks at the clock.
        jax.block_until_ready([work() for _ in range(4)][-1])
        times += 4
        elapsed = time.perf_counter() - start
    return elapsed / times


def _num_bytes(tree) -> float:
    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))
