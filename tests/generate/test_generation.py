"""Several steps a call: the same tokens, and nothing run past an end."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grok1
from grok1.engine.engine import Engine
from grok1.engine.sampling import SamplingParams, sampling_state
from grok1.engine.steps import NUM_ENDS, DecodeState, Draw, Ends, Rows, Step, run_steps
from grok1.generate import pace, scheduler
from grok1.generate.request import Request
from grok1.nn.capture import as_capture
from tests.helpers import slow

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [11], [100, 101]]


class Lengths(NamedTuple):
    """As much of a cache as counts."""

    length: jax.Array


def following(token):
    return (3 * token + 1) % 17


def count_up(state: DecodeState, rows: Rows) -> tuple[DecodeState, Step]:
    """Draws `following` of each active row's last token; of another row nonsense."""
    slots, active = rows.slots, rows.count > 0
    before = state.cache.length[slots]
    length = state.cache.length.at[slots].add(rows.count)
    drawn = jnp.where(active, following(state.tokens[slots, before]), -7)
    places = jnp.where(active, before + 1, state.tokens.shape[1])
    tokens = state.tokens.at[slots, places].set(drawn, mode="drop")
    nothing = jnp.zeros((len(active), 0))
    return DecodeState(Lengths(length), tokens), Step(
        drawn, drawn.astype(jnp.float32) / 2, nothing, nothing
    )


def test_rows_run_their_own_steps_or_to_their_own_end():
    # 2 is followed by 7, 5, 16, 15, 12, 3, 10, 14, 9, 11, 0, 1, 4, 13, 6, 2; 8 by itself.
    prompts = np.array([[2, 0], [2, 0], [16, 7], [8, 8], [2, 0]])
    begin = np.array([1, 1, 2, 2, 1], np.int32)
    ends = Ends(jnp.tile(jnp.array([-1, 16, 8]), (5, 1)), jnp.asarray(begin))
    # The requests are in any slots; what is in others stays as it is.
    slots = np.array([3, 0, 5, 1, 6], np.int32)
    rows = Rows(jnp.asarray(slots), jnp.array([5, 2, 6, 3, 0]))
    tokens = jnp.full((7, 12), 1, jnp.int32).at[slots].set(0).at[slots, :2].set(prompts)
    lengths = jnp.full(7, 4, jnp.int32).at[slots].set(begin - 1)
    state = DecodeState(Lengths(lengths), tokens)
    state, drawn = jax.jit(lambda *args: run_steps(count_up, 6, *args))(state, rows, ends)
    assert state.cache.length[np.array([2, 4])].tolist() == [4, 4]
    assert (state.tokens[np.array([2, 4])] == 1).all()
    state = DecodeState(Lengths(state.cache.length[slots]), state.tokens[slots])
    # Own number; fewer; an end in the prompt that is none, then one; an end as the last of a prompt
    # is run, what it draws ends; nothing.
    expected = [[7, 5, 16], [7, 5], [5, 16], [8], []]
    assert state.cache.length.tolist() == [
        first - 1 + len(row) for first, row in zip(begin, expected, strict=True)
    ]
    assert drawn.tokens.shape == (6, 5)
    assert drawn.top_tokens.shape == (6, 5, 0)
    for row, found in enumerate(expected):
        last = begin[row] + len(found)
        assert state.tokens[row, begin[row] : last].tolist() == found
        assert not state.tokens[row, last:].any()
        assert drawn.tokens[: len(found), row].tolist() == found
        assert drawn.logprobs[: len(found), row].tolist() == [token / 2 for token in found]


@pytest.fixture
def calls(monkeypatch) -> list[tuple[np.ndarray, np.ndarray]]:
    """(steps of each row, lengths of all slots after them) of every call that decodes.

    Time is no object.
    """
    monkeypatch.setattr(pace, "_DELIVERY", 1e9)
    seen = []
    for name in ("decode", "decode_greedily"):
        method = getattr(Engine, name)

        def spy(self, state, num_steps, *arguments, method=method, **options):
            state, step = method(self, state, num_steps, *arguments, **options)
            seen.append((num_steps, np.asarray(state.cache.length)))
            return state, step

        monkeypatch.setattr(Engine, name, spy)
    return seen


# Several steps a call of a mesh are run by the tests of the scheduler, too.
@pytest.fixture(scope="module", params=["1x1", pytest.param("2x4", marks=slow)])
def model(request, nano, nano_path) -> grok1.Model:
    if request.param == "1x1":
        return nano
    return grok1.load(nano_path, mesh=(2, 4), dtype="float32", progress=False)


@pytest.mark.not_on_gpu("several steps a call are of CPUs")
@pytest.mark.parametrize("options", [{}, {"logprobs": 0}], ids=["table", "logits"])
def test_collected_steps_draw_what_the_logits_say(model, calls, options):
    if options and model.mesh.size > 1:
        return  # what a mesh has to do with it, the table shows
    found = model.generate(PROMPTS, max_new_tokens=29, temperature=0, ignore_eos=True, **options)
    most = model.engine.most_steps
    assert most == 8
    # The first for the first token, and another two until it is known how long a step takes.
    assert [int(steps.max()) for steps, _ in calls] == [1, 1, 1, most, most, most, 2]
    for prompt, completion in zip(PROMPTS, found, strict=True):
        assert len(completion.tokens) == 29
        logits = model.logits([*prompt, *completion.tokens])
        np.testing.assert_array_equal(
            completion.tokens, logits[len(prompt) - 1 : -1].argmax(axis=-1)
        )


@pytest.mark.not_on_gpu("several steps a call are of CPUs")
def test_a_token_that_ends_a_row_is_the_last_that_it_runs(model, calls):
    options = {"max_new_tokens": 32, "temperature": 1.5, "top_p": 1, "ignore_eos": True}
    seeds = [4, 5, 6, 29]
    *_, last = model.generate(PROMPTS, seed=seeds, **options)
    # Of the last row the token that comes latest; all prompts but that row's end with it.
    stop = max(last.tokens, key=last.tokens.index)
    prompts = [[*prompt, stop] for prompt in PROMPTS[:3]] + PROMPTS[3:]
    alone = [
        model.generate(prompt, seed=seed, **options).tokens
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    found = model.generate(prompts, seed=seeds, stop=stop, **options)
    # Slots are taken from each group of devices in turn.
    lengths = calls[-1][1].reshape(model.mesh.shape["data"], -1).T.flatten()
    for prompt, completion, tokens, length in zip(prompts, found, alone, lengths, strict=True):
        ended = stop in tokens
        expected = tokens[: tokens.index(stop) + 1] if ended else tokens
        assert completion.tokens == expected
        assert completion.stop_reason == ("stop" if ended else "length")
        assert length == len(prompt) + len(expected) - 1
    assert found[-1].stop_reason == "stop"
    assert 10 < len(found[-1].tokens) < 32


@pytest.mark.not_on_gpu("several steps a call are of CPUs")
def test_what_a_token_cannot_tell_is_asked_after_every_step(toy, calls):
    found = toy.generate("The first", max_new_tokens=24, temperature=0, stop=["~~~~"])
    assert len(found.tokens) == 24
    assert [int(steps.max()) for steps, _ in calls] == [1] * 24


@pytest.mark.not_on_gpu("several steps a call are of CPUs")
def test_slow_tokens_are_not_collected(nano, calls, monkeypatch):
    monkeypatch.setattr(pace, "_DELIVERY", 1e-9)
    nano.generate(PROMPTS[0], max_new_tokens=12, ignore_eos=True)
    assert [int(steps.max()) for steps, _ in calls] == [1] * 12


def test_a_request_that_is_broken_off_leaves_the_model_usable(nano):
    expected = nano.generate(PROMPTS[0], max_new_tokens=40, temperature=0, ignore_eos=True)
    greedy = SamplingParams(temperature=0)
    requests = [Request(tokens=PROMPTS[0], max_tokens=40, sampling=greedy)]
    stream = scheduler.generate(nano.engine, requests)
    for place, (row, sampled) in enumerate(stream):
        assert row == 0
        assert sampled.token == expected.tokens[place]
        # In the middle of what one call has brought.
        if place == 20:
            requests[0].cancelled = True
    assert place == 20
    again = nano.generate(PROMPTS[0], max_new_tokens=40, temperature=0, ignore_eos=True)
    assert again.tokens == expected.tokens


@pytest.mark.parametrize("greedily", [False, True], ids=["decode", "decode_greedily"])
@pytest.mark.parametrize("capture", [(), ("router_probs",)], ids=["several", "single"])
def test_more_steps_than_a_call_runs_are_refused(nano, greedily, capture):
    engine = nano.engine
    if capture:
        engine = engine.observed(as_capture(capture), 256, lambda *_: None)
    most = engine.most_steps
    assert most == (1 if capture or jax.default_backend() != "cpu" else 8)
    state = engine.new_state(np.ones((1, 256), np.int32))
    everything = jnp.ones(nano.config.vocab_size, bool)
    ends = Ends(np.full((1, NUM_ENDS), -1), np.array([1]))
    decode, draw = engine.decode_greedily, everything
    if not greedily:
        sampling = sampling_state(SamplingParams(), np.zeros((1, 2), np.uint32))
        decode, draw = engine.decode, Draw(everything, sampling)
    arguments = (np.array([most + 1]), ends, draw)
    with pytest.raises(ValueError, match=f"at most {most} steps of a row here, found {most + 1}"):
        decode(state, *arguments)
