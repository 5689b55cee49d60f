"""Generation with a clock, exactly as `Model.generate` does it.

`Model.generate` is a loop over `requests.Batch` that throws the pieces of text away; here the loop
notes when they come, so that one call tells its time to the first token from its steady rate.
"""

import time
from typing import NamedTuple

import numpy as np

import grok1
from grok1.generate.requests import Batch


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


def run(model: grok1.Model, prompts: np.ndarray, num_tokens: int) -> Timing:
    """Continues prompts of one length greedily by `num_tokens` each, whatever is drawn.

    Greedy: a draw of temperature 0.7 from a random model would time the sampling of a flat
    distribution, which no trained model has.
    """
    options = grok1.GenerationOptions(max_new_tokens=num_tokens, temperature=0, ignore_eos=True)
    start = time.perf_counter()
    batch = Batch(model.engine, model.tokenizer, prompts.tolist(), options)
    times = [time.perf_counter() for _ in batch.run()]
    generated = np.array([builder.build().tokens for builder in batch.builders])
    # The tokens of one step come together, in the order of the rows.
    first = times[len(prompts) - 1]
    return Timing(first - start, times[-1] - first, np.concatenate([prompts, generated], axis=1))


def decode(model: grok1.Model, batch: int, prompt: int, num_steps: int) -> Timing:
    """Times `num_steps` decode steps after the one that gives the first token.

    Args:
      model: The model.
      batch: Rows that run side by side.
      prompt: Tokens of each row's prompt.
      num_steps: Steps between the first token and the last.
    """
    return run(model, random_prompts(model.config.vocab_size, batch, prompt), num_steps + 1)


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
    done = 0
    while done < start:
        chunk = engine.chunk_for(batch, start - done)
        count = min(chunk, start - done)
        state = engine.prefill(state, np.where(rows, count, 0).astype(np.int32), chunk)
        done += count
    needed = 0
    while done < end:
        chunk = engine.scoring_chunk_for(batch, end - done)
        count = min(chunk, end - done)
        num_valid = np.where(rows, count, 0).astype(np.int32)
        state, _, captured = engine.score(state, num_valid, chunk, ("expert_indices",))
        indices_LMA = np.asarray(captured["expert_indices"])
        indices = indices_LMA.reshape(len(indices_LMA), batch, chunk, -1)[:, :num_rows, :count]
        chosen = indices[..., None] == np.arange(model.config.num_experts)
        needed += int(chosen.any(axis=(1, 3)).sum())
        done += count
    return needed / (end - start)
