"""Prompts that begin alike: what is found is what would be computed, and nothing else is found."""

import concurrent.futures
import sys

import jax
import numpy as np
import pytest

import grok1
from grok1.engine.engine import Engine
from grok1.engine.sampling import SamplingParams
from grok1.generate.prefill import OnGrid
from grok1.generate.prefix import PrefixStore
from grok1.generate.request import Request, ScoredPart
from grok1.generate.scheduler import Scheduler
from grok1.nn.unembedding import TokenStatistics
from tests.helpers import SLOW_TESTS, slow
from tests.one_device import within

CHUNK = 16


MESHES = {"float32": (1, 1), "int8": (2, 2), "float16": (1, 8), "int8 of groups": (2, 4)}
"""By the types of caches."""


@pytest.fixture(scope="module")
def engine_of(nano, nano_path):
    """The engine of a key of `MESHES`."""
    loaded = {"float32": nano}

    def get(name: str) -> Engine:
        if name not in loaded:
            loaded[name] = grok1.load(
                nano_path,
                mesh=within(MESHES[name]),
                dtype="float32",
                cache_dtype=name.split()[0],
                progress=False,
            )
        return loaded[name].engine

    return get


@pytest.fixture(params=["float32", pytest.param("int8", marks=slow)])
def engine(request, engine_of) -> Engine:
    return engine_of(request.param)


class Runner:
    """A scheduler that keeps `num_blocks`, and what its requests got."""

    def __init__(self, engine: Engine, num_blocks: int, num_on_host: int = 0):
        self.store = None
        if num_blocks:
            self.store = PrefixStore(engine, num_blocks, CHUNK, num_on_host)
        self.scheduler = Scheduler(engine, 4, 96, (), prefill=OnGrid(engine, CHUNK, 5, self.store))

    def run(self, *requests: Request) -> list[tuple]:
        drawn = {one: [] for one in requests}
        for one in requests:
            self.scheduler.submit(one)
        while not self.scheduler.is_idle:
            for one, sampled in self.scheduler.step():
                drawn[one].append((sampled.token, sampled.logprob))
        scores = [
            np.concatenate([part.on_host().logprobs for part in one.prompt_scores] or [[]]).tolist()
            for one in requests
        ]
        return list(zip(drawn.values(), scores, strict=True))

    def reused(self, one: Request) -> int:
        """Runs a request; returns how many of its tokens were found."""
        self.run(one)
        return one.num_reused

    @property
    def kept(self) -> tuple[int, int]:
        """Blocks on the devices and in the host's memory."""
        tiers = self.store.tiers
        return tiers["device"].num_kept, tiers["host"].num_kept


def request(length: int, *changed: int, scores: bool = False, salt: bytes = b"") -> Request:
    tokens = [(7 * n + 3) % 128 for n in range(length)]
    for place in changed:
        tokens[place] = 99
    return Request(
        tokens=tokens,
        max_tokens=4,
        num_top=3,
        sampling=SamplingParams(temperature=0),
        scores_prompt=scores,
        salt=salt,
    )


@pytest.mark.parametrize(
    ("cache_dtype", "scores", "room"),
    [
        ("float32", False, (32, 0)),
        ("int8", True, (32, 0)),
        ("float32", True, (2, 32)),
        ("int8", False, (1, 32)),
        pytest.param("float32", True, (32, 0), marks=slow),
        pytest.param("int8", False, (32, 0), marks=slow),
        pytest.param("float16", False, (2, 32), marks=slow),
        pytest.param("float16", True, (1, 32), marks=slow),
        pytest.param("int8 of groups", True, (3, 32), marks=slow),
    ],
)
def test_what_is_found_is_what_would_be_computed(engine_of, cache_dtype, scores, room):
    engine = engine_of(cache_dtype)
    asked = [
        # Length, changed tokens, tokens that are found.
        ((70,), 0),
        ((70,), 64),
        ((70, 69), 64),
        ((70, 64), 48 if scores else 64),  # a block of scores knows the token behind it
        ((70, 20), 16),
        ((40,), 32),
        ((33,), 32),
        ((32,), 16),
        ((17,), 16),
        ((16,), 0),
    ]
    asked = asked if SLOW_TESTS else [*asked[:4], *asked[-3:]]
    with_store, without = Runner(engine, *room), Runner(engine, 0)
    for (length, *changed), num_found in asked:
        one, other = (request(length, *changed, scores=scores) for _ in range(2))
        assert with_store.run(one) == without.run(other)
        assert (one.num_reused, other.num_reused) == (num_found, 0)
    for different in ({"salt": b"other"}, {"scores": not scores}):
        one = request(70, **{"scores": scores, **different})
        with_store.run(one)
        assert one.num_reused == 0
    num_on_host = with_store.kept[1]
    assert bool(with_store.store.tiers["host"].num_found) == bool(num_on_host) == bool(room[1])


def test_prompts_that_run_side_by_side_share_their_beginning(engine):
    runner = Runner(engine, 32)
    many = [request(70, 69 - n) for n in range(4)]
    together = runner.run(*many)
    # Steps of other numbers of requests may round otherwise, and nothing else differs.
    for number, (drawn, _) in enumerate(together):
        [(alone, _)] = Runner(engine, 0).run(request(70, 69 - number))
        assert [token for token, _ in drawn] == [token for token, _ in alone]
        np.testing.assert_allclose([lp for _, lp in drawn], [lp for _, lp in alone], atol=1e-5)
    # 64 tokens are run once, and found by the other three.
    assert sum(one.num_reused for one in many) == 3 * 64


def test_blocks_that_were_not_used_for_long_make_room(engine_of):
    engine = engine_of("float32")
    runner = Runner(engine, 6)
    lone, reused = Runner(engine, 0), runner.reused
    assert reused(request(70)) == 0  # four blocks
    assert reused(request(40, 0)) == 0  # two more
    assert reused(request(70)) == 64
    assert reused(request(40, 1)) == 0  # in place of those of the second
    assert reused(request(70)) == 64
    assert reused(request(40, 0)) == 0
    assert runner.store.num_kept == 6
    for one in (request(70), request(40, 0), request(40, 1)):
        assert runner.run(one) == lone.run(Request(**{**vars(one), "prompt_scores": []}))
    runner.scheduler._forget()
    assert reused(request(70)) == 0
    assert runner.store.num_found < runner.store.num_asked


def test_what_makes_room_on_the_devices_is_lost_on_the_host_last(engine_of):
    runner = Runner(engine_of("float32"), 2, 4)
    lone, reused = Runner(runner.scheduler._engine, 0), runner.reused
    assert reused(request(40)) == 0
    assert runner.kept == (2, 0)
    assert reused(request(40, 0)) == 0
    assert runner.kept == (2, 2)
    assert reused(request(40)) == 32  # the two change places
    assert runner.store.tiers["host"].num_found == 32
    assert reused(request(40)) == 32
    assert runner.store.tiers["device"].num_found == 32
    assert reused(request(40, 1)) == 0
    assert runner.kept == (2, 4)
    assert reused(request(40, 2)) == 0  # in place of those of the second
    assert runner.kept == (2, 4)
    assert reused(request(40, 0)) == 0
    assert reused(request(40, 1)) == 32  # after the first was lost
    assert runner.kept == (2, 4)  # two that change places need no room
    assert reused(request(40)) == 0
    for changed in ((1,), (0,), ()):
        assert runner.run(request(40, *changed)) == lone.run(request(40, *changed))


def test_statistics_go_where_their_block_goes(engine_of):
    runner = Runner(engine_of("float32"), 2, 8)
    [expected] = Runner(runner.scheduler._engine, 0).run(request(40, scores=True))
    for changed, on_host in (((), 0), ((0,), 0), ((), 32), ((), 32), ((0,), 64), ((), 96)):
        one = request(40, *changed, scores=True)
        [found] = runner.run(one)
        assert changed or found == expected
        assert runner.store.tiers["host"].num_found == on_host


def test_what_comes_back_makes_room_last_again_from_its_beginning(engine_of):
    runner = Runner(engine_of("float32"), 3, 8)
    for changed, num_found in (((), 0), ((0,), 0), ((), 48)):
        assert runner.reused(request(52, *changed)) == num_found
    assert runner.reused(request(17, 5)) == 0  # in place of the last of the three
    before = runner.store.tiers
    assert runner.reused(request(40)) == 32
    after = runner.store.tiers
    assert after["device"].num_found == before["device"].num_found + 32
    assert after["host"].num_found == before["host"].num_found


@pytest.mark.parametrize("room", [(1, 4), (2, 2), (2, 1), (1, 0), (3, 0)])
def test_a_prompt_longer_than_the_room_keeps_its_beginning(engine_of, room):
    runner = Runner(engine_of("float32"), *room)
    [expected] = Runner(runner.scheduler._engine, 0).run(request(70))
    assert runner.run(request(70)) == [expected]
    for _ in range(3):
        again = request(70)
        assert runner.run(again) == [expected]
        assert again.num_reused == CHUNK * min(4, sum(room))
    # Another takes it all, and gives it back.
    assert runner.reused(request(70, 0)) == 0
    assert runner.kept == (room[0], min(room[1], 8 - room[0]))
    assert runner.reused(request(70, 0)) == CHUNK * min(4, sum(room))
    assert runner.run(request(70)) == [expected]


@pytest.mark.parametrize("room", [(4, 0), (2, 2), (1, 3)])
def test_the_end_of_a_prompt_makes_room_before_its_beginning(engine_of, room):
    runner = Runner(engine_of("float32"), *room)
    assert runner.reused(request(70)) == 0
    for number in range(3):
        assert runner.reused(request(17, number)) == 0
        assert runner.reused(request(70)) == 48
    assert runner.reused(request(40, 20)) == 16  # three of the prompt's four are left
    assert runner.reused(request(70)) == 48


def arrays_on_host() -> int:
    return sum(array.sharding.memory_kind == "pinned_host" for array in jax.live_arrays())


def test_what_a_failed_step_loses_is_lost_in_both_places(engine_of, monkeypatch):
    engine = engine_of("float32")
    runner, before = Runner(engine, 1, 8), arrays_on_host()
    [expected] = runner.run(request(70))
    assert runner.kept == (1, 3)
    assert arrays_on_host() == before + 3 * 2  # keys and values
    with monkeypatch.context() as patch:

        def failing(*_):
            raise RuntimeError("the device is on fire")

        patch.setattr(engine, "place_block", failing)
        with pytest.raises(RuntimeError, match="on fire"):
            runner.run(request(40, 0), request(70))
    assert runner.kept == (0, 0)
    assert arrays_on_host() == before
    runner.scheduler._waiting.clear()
    assert runner.run(request(70)) == [expected]
    again = request(70)
    assert runner.run(again) == [expected]
    assert again.num_reused == 64


def test_memory_of_the_host_is_taken_before_it_is_needed(engine_of, monkeypatch):
    engine = engine_of("float32")
    store, take, left = PrefixStore(engine, 2, CHUNK, 8), engine.take_block, [99]

    def taking(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of host memory")
        return take(*arguments)

    monkeypatch.setattr(engine, "take_block", taking)
    before = arrays_on_host()
    assert store.reserve() == 8
    assert arrays_on_host() == before
    left[0] = 5
    assert store.reserve() == 3  # others want some too
    store.limit(3)
    assert store.tiers["host"].num_blocks == 3


def test_ends_of_prompts_run_together_as_far_as_those_that_decode_allow(engine, monkeypatch):
    calls, run = [], engine.prefill

    def counted(state, num_valid, chunk, slots):
        calls.append(sorted(num_valid[num_valid > 0].tolist()))
        return run(state, num_valid, chunk, slots)

    monkeypatch.setattr(engine, "prefill", counted)
    runner = Runner(engine, 32)
    runner.run(*(request(7 + n) for n in range(4)))
    assert calls == [[6, 7, 8, 9]]
    calls.clear()
    runner.run(request(1), *(request(7, n) for n in range(3)))
    assert calls == [[6, 6], [6]]  # 16 tokens a turn
    calls.clear()
    # A whole chunk is kept, and what is kept is run alone.
    runner.run(*(request(20 + n, n) for n in range(2)))
    assert calls == [[16], [16], [3, 4]]


def test_threads_may_ask_for_the_same_scores(monkeypatch):
    values = [np.full((2, 3), number) for number in range(5)]
    [part, get] = [ScoredPart(TokenStatistics(*values), 1, 2), jax.device_get]
    others = []

    def meanwhile(whole):
        # What another thread does between any two steps of this one's.
        if not others:
            others.append(None)
            others[0] = part.on_host()
        return get(whole)

    monkeypatch.setattr(jax, "device_get", meanwhile)
    for found in (part.on_host(), *others, part.on_host()):
        np.testing.assert_array_equal(found, [np.full(2, number) for number in range(5)])


def test_no_thread_misses_scores_that_another_takes():
    before = sys.getswitchinterval()
    values = TokenStatistics(*(np.zeros((1, 1)) for _ in range(5)))
    parts = [ScoredPart(values, 0, 1) for _ in range(2000)]
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(lambda: [part.on_host() for part in parts]) for _ in range(4)]
            assert all(len(one.result()) == len(parts) for one in asked)
    finally:
        sys.setswitchinterval(before)
