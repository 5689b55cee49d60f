"""Requests that come and go: what each draws is what it draws alone, and slots are never lost."""

import types
from typing import Any

import numpy as np
import pytest

import grok1
from grok1.engine import shapes
from grok1.engine.engine import Engine
from grok1.engine.sampling import SamplingParams
from grok1.engine.slots import Slots
from grok1.generate import pace
from grok1.generate.prefill import SideBySide, largest_call
from grok1.generate.request import Request, Running, Wishes
from grok1.generate.scheduler import Scheduler
from tests.conftest import TOY
from tests.helpers import SLOW_TESTS, covered_by_a_mesh, skip_unless_it_runs_here, slow

GREEDY = SamplingParams(temperature=0)
SAMPLED = SamplingParams(temperature=1.2, top_p=0.9)
NUM_SLOTS = 4
NUM_REQUESTS = 24 if SLOW_TESTS else 12


# tests/server/test_core.py lets requests come and go on one device.
@pytest.fixture(
    scope="module",
    params=[pytest.param((1, 1), marks=covered_by_a_mesh), (2, 2)],
    ids=["1x1", "2x2"],
)
def engine(request, nano_path) -> Engine:
    return grok1.load(nano_path, mesh=request.param, dtype="float32", progress=False).engine


def request(number: int, **options) -> Request:
    """One of many, of all lengths up to the largest chunk but one."""
    random = np.random.default_rng(number)
    length = int(random.choice([1, 2, 5, 17, 18, 40, 70]))
    return Request(
        tokens=random.integers(128, size=length).tolist(),
        max_tokens=int(random.integers(1, 24)),
        seed=number,
        sampling=SAMPLED if number % 2 else GREEDY,
        **options,
    )


def run(engine: Engine, requests, num_slots=NUM_SLOTS) -> list[list[int]]:
    """What requests draw that are all known at the start."""
    one = Scheduler(engine, num_slots, 96)
    drawn = {each: [] for each in requests}
    for each in requests:
        one.submit(each)
    while not one.is_idle:
        for each, sampled in one.step():
            drawn[each].append(sampled.token)
    assert one.num_running == 0
    return list(drawn.values())


@pytest.fixture(scope="module")
def alone(engine) -> list[list[int]]:
    return [run(engine, [request(number)])[0] for number in range(NUM_REQUESTS)]


def test_what_a_request_draws_does_not_depend_on_who_comes_and_goes(engine, alone, monkeypatch):
    monkeypatch.setattr(pace, "_DELIVERY", 1e9)
    random = np.random.default_rng(0)
    one = Scheduler(engine, NUM_SLOTS, 96, chunk_tokens=64)
    waiting = [(number, request(number)) for number in random.permutation(NUM_REQUESTS).tolist()]
    submitted, drawn, cancelled = dict[Request, int](), dict[int, list[int]](), set()
    while waiting or not one.is_idle:
        for number, each in waiting[: int(random.integers(3))]:
            one.submit(each)
            submitted[each], drawn[number] = number, []
        waiting = [pair for pair in waiting if pair[1] not in submitted]
        for each, sampled in one.step():
            assert not each.cancelled
            drawn[submitted[each]].append(sampled.token)
        assert one.num_running <= NUM_SLOTS
        if submitted and random.random() < 0.2:
            # Those that wait, run, and are over.
            victim = list(submitted)[int(random.integers(len(submitted)))]
            one.cancel(victim)
            cancelled.add(submitted[victim])
    assert one.num_running == one.num_waiting == 0
    assert NUM_REQUESTS // 8 < len(cancelled) < 2 * NUM_REQUESTS // 3
    for number, tokens in drawn.items():
        expected = alone[number]
        assert tokens == (expected[: len(tokens)] if number in cancelled else expected)


def test_a_slot_is_free_again_when_a_request_is_cancelled(engine):
    one = Scheduler(engine, NUM_SLOTS, 96)
    running = [request(0) for _ in range(NUM_SLOTS)]
    for each in running:
        each.max_tokens = 20
        one.submit(each)
    late = request(2)
    one.submit(late)
    one.step()
    assert (one.num_running, one.num_waiting) == (NUM_SLOTS, 1)
    one.cancel(running[1])
    # At once, though the devices work on a token of its.
    one.step()
    assert (one.num_running, one.num_waiting) == (NUM_SLOTS, 0)
    drawn = []
    while not one.is_idle:
        drawn += [sampled.token for each, sampled in one.step() if each is late]
    assert drawn == run(engine, [request(2)])[0]


def test_requests_side_by_side_have_options_of_their_own(nano):
    engine = nano.engine
    vocab_size = engine.config.vocab_size
    few = np.isin(np.arange(vocab_size), [5, 70, 81])
    options = [
        {"allowed": few, "max_tokens": 9},
        {"allowed": ~few, "sampling": SAMPLED, "max_tokens": 5},
        {"num_top": 3},
        {"num_top": 0, "ends": tuple(range(vocab_size // 2)), "sampling": SAMPLED},
        {"ends": tuple(range(0, vocab_size, 2)), "one_by_one": True},
        {"processor": lambda logits, tokens, length: -logits, "max_tokens": 4},
    ]
    requests = [Request(**{"tokens": [7, 8, 9], "max_tokens": 12, **one}) for one in options]
    together = Scheduler(engine, NUM_SLOTS, 96)
    for each in requests:
        together.submit(each)
    drawn = {each: [] for each in requests}
    while not together.is_idle:
        for each, sampled in together.step():
            drawn[each].append(sampled)
    for each, found in drawn.items():
        [alone] = run(engine, [Request(**vars(each))])
        assert [sampled.token for sampled in found] == alone
        assert {len(sampled.alternatives) for sampled in found} == {each.num_top or 0}
        ended = [token in each.ends for token in alone]
        assert ended[-1] or len(alone) == each.max_tokens
        assert not any(ended[:-1])
        if each.allowed is not None:
            assert each.allowed[alone].all()
    assert len(drawn[requests[3]]) < 12


def test_a_prompt_does_not_stop_those_that_decode(engine, monkeypatch):
    monkeypatch.setattr(pace, "_DELIVERY", 1e-9)
    monkeypatch.setattr(Engine, "chunk_for", lambda *_: 16)
    one = Scheduler(engine, NUM_SLOTS, 96)
    decoding = Request(tokens=[1], max_tokens=30)
    one.submit(decoding)
    one.step()
    for _ in range(2):
        one.submit(Request(tokens=[1] * 65, max_tokens=1))
    ready = []
    for number in range(12):
        for each, _ in one.step():
            ready.append((number, each is decoding))
    # A token a turn, while two prompts of 4 chunks, side by side, are run.
    assert [number for number, is_decoding in ready if is_decoding] == list(range(12))
    assert [number for number, is_decoding in ready if not is_decoding] == [4, 4]


def test_a_turn_runs_a_chunk_of_prompts_of_all_lengths_up_to_a_bound(engine):
    # One call runs 16 tokens of four rows; in 36 more there is no room for 64 of one.
    for chunk_tokens, expected in ((4096, [10, 60, 12]), (100, [10, 12])):
        one = Scheduler(engine, NUM_SLOTS, 96, chunk_tokens=chunk_tokens)
        for length in (10, 60, 12):
            one.submit(Request(tokens=[1] * length, max_tokens=2, sampling=GREEDY))
        one.step()
        assert sorted(len(each.tokens) for each in one.prefilled) == sorted(expected)


def test_after_a_step_that_fails_the_others_go_on(engine, monkeypatch):
    one = Scheduler(engine, NUM_SLOTS, 96)
    lost = [request(number) for number in range(NUM_SLOTS)]
    for each in [*lost, request(4)]:
        one.submit(each)
    with monkeypatch.context() as patches:
        patches.setattr(Engine, "prefill", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            one.step()
    assert (one.num_running, one.num_waiting) == (0, 1)
    drawn = []
    while not one.is_idle:
        drawn += [sampled.token for _, sampled in one.step()]
    assert [drawn] == run(engine, [request(4)])


@pytest.mark.parametrize(("tokens", "max_tokens"), [([], 1), ([1] * 90, 7), ([1], 96)])
def test_what_does_not_fit_a_slot_is_refused(engine, tokens, max_tokens):
    one = Scheduler(engine, NUM_SLOTS, 96)
    message = f"the 96 of a slot, found a prompt of {len(tokens)} and up to {max_tokens} new ones"
    with pytest.raises(ValueError, match=message):
        one.submit(Request(tokens=tokens, max_tokens=max_tokens))
    assert one.is_idle


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize(("num_slots", "groups"), [(1, 1), (2, 1), (8, 1), (32, 1), (8, 2), (6, 3)])
def test_the_largest_call_is_the_largest_that_is_made(platform, num_slots, groups):
    calls = []
    devices = np.array([types.SimpleNamespace(platform=platform)])
    mesh = types.SimpleNamespace(shape={"data": groups}, devices=devices)

    def prefill(state, num_valid, chunk, slots):
        calls.append((len(slots), chunk))

    state: Any = None
    engine: Any = types.SimpleNamespace(mesh=mesh, chunk_for=shapes.chunk_for, prefill=prefill)
    slots, side_by_side = Slots(num_slots, groups), SideBySide(engine, num_slots, None)
    request = Request(tokens=[1] * 8192, max_tokens=0)
    prompts = [Running(request, slots.take(), np.zeros(2), 8191) for _ in range(num_slots)]
    while prompts := [one for one in prompts if one.to_prefill]:
        side_by_side.run(state, prompts, slots, 0)
    rows, chunk = largest_call(engine, num_slots, 8192, platform)
    assert rows * chunk == max(rows * chunk for rows, chunk in calls)


# --- slots ------------------------------------------------------------------------------------


def test_slots_are_taken_from_all_groups_and_given_back():
    slots = Slots(6, 2)
    assert [slots.take() for _ in range(5)] == [0, 3, 1, 4, 2]
    slots.give_back(1)
    assert slots.num_free == 2
    assert [slots.take(), slots.take()] == [1, 5]
    assert slots.num_free == 0


@pytest.mark.parametrize(
    ("slots", "expected", "rows"),
    [
        ([0], [0, 8], [0]),
        ([5, 2], [2, 5], [1, 0]),
        ([1, 3], [1, 3, 8, 8], [0, 1]),
        ([7, 6, 5, 0], [0, 8, 8, 8, 7, 6, 5, 8], [4, 5, 6, 0]),
    ],
)
def test_a_row_lies_where_its_slot_does(slots, expected, rows):
    layout = Slots(8, 2).layout(slots, [2, 4, 8])
    assert layout.slots.tolist() == expected
    assert layout.rows.tolist() == rows


@pytest.mark.not_on_gpu("a row has the same bits in any batch in the CPU's form alone")
@pytest.mark.parametrize("cache_dtype", ["float32", "int8", pytest.param("float16", marks=slow)])
def test_log_probabilities_are_the_same_bits_whoever_runs_beside(kernels, cache_dtype):
    skip_unless_it_runs_here("cpp")
    engine = grok1.load(TOY, mesh=(1, 1), dtype="float32", cache_dtype=cache_dtype).engine

    def made(seed, **options):
        sampling = SamplingParams(temperature=1.0)
        return Request(tokens=[7, 8, 9], max_tokens=6, seed=seed, sampling=sampling, **options)

    def run(*others):
        # Of one number of rows, so that one program is compiled of each kind.
        scheduler, first = Scheduler(engine, 4, 64, (4,)), made(0, num_top=3)
        for each in (first, *others):
            scheduler.submit(each)
        found = []
        while not scheduler.is_idle:
            found += [sampled for each, sampled in scheduler.step() if each is first]
        return found

    alone = run()
    assert len(alone) == 6
    assert all(sampled.logprob < 0 for sampled in alone)
    # As many alternatives, or the program is another.
    biased = made(1, num_top=3, wishes=Wishes(biases={5: 9.0}))
    assert run(made(1), made(2), made(3)) == alone
    assert run(biased) == alone
