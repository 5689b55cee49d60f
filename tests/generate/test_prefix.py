"""Prompts that begin alike: what is found is what would be computed, and nothing else is found."""

import numpy as np
import pytest

import grok1
from grok1.engine.engine import Engine
from grok1.engine.sampling import SamplingParams
from grok1.generate.prefill import OnGrid
from grok1.generate.prefix import PrefixStore
from grok1.generate.request import Request
from grok1.generate.scheduler import Scheduler
from tests.helpers import SLOW_TESTS, slow
from tests.one_device import within

CHUNK = 16


@pytest.fixture(scope="module")
def engines(nano, nano_path) -> dict[str, Engine]:
    """By the type of their caches."""
    options = {"dtype": "float32", "cache_dtype": "int8", "progress": False}
    int8 = grok1.load(nano_path, mesh=within((2, 2)), **options)
    return {"float32": nano.engine, "int8": int8.engine}


@pytest.fixture(params=["float32", pytest.param("int8", marks=slow)])
def engine(request, engines) -> Engine:
    return engines[request.param]


class Runner:
    """A scheduler that keeps `num_blocks`, and what its requests got."""

    def __init__(self, engine: Engine, num_blocks: int):
        self.store = PrefixStore(engine, num_blocks, CHUNK) if num_blocks else None
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
    ("cache_dtype", "scores"),
    [
        ("float32", False),
        ("int8", True),
        pytest.param("float32", True, marks=slow),
        pytest.param("int8", False, marks=slow),
    ],
)
def test_what_is_found_is_what_would_be_computed(engines, cache_dtype, scores):
    engine = engines[cache_dtype]
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
    with_store, without = Runner(engine, 32), Runner(engine, 0)
    for (length, *changed), num_found in asked:
        one, other = (request(length, *changed, scores=scores) for _ in range(2))
        assert with_store.run(one) == without.run(other)
        assert (one.num_reused, other.num_reused) == (num_found, 0)
    for different in ({"salt": b"other"}, {"scores": not scores}):
        one = request(70, **{"scores": scores, **different})
        with_store.run(one)
        assert one.num_reused == 0


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


def test_blocks_that_were_not_used_for_long_make_room(engines):
    engine = engines["float32"]
    runner = Runner(engine, 6)
    lone = Runner(engine, 0)

    def reused(one):
        runner.run(one)
        return one.num_reused

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
