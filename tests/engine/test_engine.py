"""Chunks, capacities, and how often anything is compiled."""

import functools

import jax
import numpy as np
import pytest

import grok1
from grok1.config import GROK_1
from grok1.engine.engine import Engine
from grok1.engine.programs import Key, Kind
from grok1.engine.shapes import CHUNK_LENGTHS, chunk_for, chunks, prompt_chunks
from grok1.engine.steps import Draw
from grok1.nn.sharding import make_mesh
from grok1.ops.cpu import bindings
from grok1.ops.cuda import presence
from grok1.planning.memory import abstract_engine, released_weights
from tests.conftest import TOY as TOY_PATH
from tests.helpers import slow
from tests.one_device import within


@pytest.fixture(scope="module")
def grok_1_engine() -> Engine:
    mesh = make_mesh(GROK_1, within((1, 8)))
    return abstract_engine(released_weights(GROK_1), GROK_1, mesh, "bfloat16")


@pytest.mark.parametrize(
    ("num_tokens", "capacity"), [(1, 256), (256, 256), (257, 512), (4097, 8192), (8192, 8192)]
)
def test_capacities_are_few(grok_1_engine, num_tokens, capacity):
    assert grok_1_engine.capacity_for(num_tokens) == capacity


@pytest.mark.parametrize(
    ("batch", "remaining", "chunks"),
    [
        (1, 11, [16]),
        (1, 33, [64]),
        (1, 32, [16, 16]),
        (1, 100, [64, 64]),
        (1, 8191, [1024] * 8),
        (32, 1000, [64] * 16),
    ],
)
def test_chunks_cover_a_prompt(grok_1_engine, batch, remaining, chunks):
    found = []
    while remaining > 0:
        found.append(grok_1_engine.chunk_for(batch, remaining))
        remaining -= found[-1]
    assert found == chunks


@pytest.mark.parametrize(
    ("platform", "batch", "remaining", "chunks"),
    [
        ("gpu", 1, 11, [16]),
        ("gpu", 1, 2048, [2048]),
        ("gpu", 1, 8191, [8192]),
        ("gpu", 1, 3000, [4096]),
        ("gpu", 4, 3000, [2048, 1024]),
        ("gpu", 1, 512, [512]),
        ("cpu", 1, 2048, [1024, 1024]),
    ],
)
def test_prompts_run_in_longer_chunks_on_gpus(grok_1_engine, platform, batch, remaining, chunks):
    lengths, most_tokens = prompt_chunks(platform)
    found = []
    while remaining > 0:
        found.append(grok_1_engine.chunk_for(batch, remaining, most_tokens, lengths))
        remaining -= found[-1]
    assert found == chunks
    # Where logits or log-probabilities of every position are wanted, nothing is longer.
    assert grok_1_engine.chunk_for(1, 8191) == CHUNK_LENGTHS[-1]


def test_every_prompt_length_is_covered_with_little_padding(grok_1_engine):
    for length in range(1, 3000):
        remaining, computed = length, 0
        while remaining > 0:
            chunk = grok_1_engine.chunk_for(1, remaining)
            assert chunk in CHUNK_LENGTHS
            computed += chunk
            remaining -= chunk
        assert computed < 2 * length + CHUNK_LENGTHS[0]


@pytest.mark.parametrize(("start", "end"), [(0, 1), (0, 300), (37, 2500), (5, 5)])
def test_a_walk_runs_each_token_once(start, end):
    walk = list(chunks(start, end, functools.partial(chunk_for, 1)))
    assert [at for one in walk for at in range(one.start, one.end)] == list(range(start, end))
    assert all(1 <= one.num_tokens <= one.length for one in walk)
    # Only the last one is padded.
    assert all(one.num_tokens == one.length for one in walk[:-1])


def test_scored_logits_stay_within_a_quarter_of_a_gigabyte(grok_1_engine):
    chunk = grok_1_engine.scoring_chunk_for(1, 8192)
    assert chunk * 131072 * 4 <= 1 << 28


def test_one_program_for_each_shape_whatever_the_request(nano_path):
    model = grok1.load(nano_path, mesh=(1, 1), dtype="float32", progress=False)
    for length, seed, temperature in [
        (3, 0, 0),
        (9, 1, 1.0),
        (14, 2, 0.5),
        (16, 3, 0),
        (2, 4, 2.0),
    ]:
        tokens = np.arange(1, length + 1)
        model.generate(tokens, max_new_tokens=length, seed=seed, temperature=temperature)
    programs = model.engine._programs.held
    traced = {key.kind.value: len(program.executables) for key, program in programs.items()}
    greedily = (
        {"decode greedily": 1, "screening table": 1}
        if model.engine.screening_table is not None
        else {}
    )
    assert traced == {"empty cache": 1, "request keys": 1, "prefill": 1, "decode": 1, **greedily}
    # Another batch size is another shape, once.
    model.generate([[1, 2], [3]], max_new_tokens=2)
    model.generate([[4], [5, 6, 7]], max_new_tokens=5)
    drawn = Key(kind=Kind.DECODE, length=1, is_screened=model.engine.is_screened(Draw(None, None)))
    assert len(programs[drawn].executables) == 2
    assert len(programs[Key(kind=Kind.PREFILL, length=16)].executables) == 2


@pytest.mark.parametrize(
    ("mesh", "cache_dtype"),
    [((1, 1), "float32"), pytest.param((1, 8), "int8", marks=slow)],
    ids=["1x1", "1x8"],
)
def test_a_decode_step_does_not_pay_for_capacity(mesh, cache_dtype):
    model = grok1.load(
        TOY_PATH, mesh=mesh, dtype="float32", cache_dtype=cache_dtype, progress=False
    )
    engine, found = model.engine, []
    arguments = engine.abstract_decode_arguments(1)
    for capacity in (256, 1024):
        state = engine.abstract_state(1, capacity)
        lowered = engine.decode_program(None, None).lower(engine.weights, state, *arguments)
        compiled = lowered.compile()
        memory = compiled.memory_analysis()
        held = sum(
            np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(state)
        )
        # The state is written in place; of a copy, and of whole reads, there would be traces here.
        assert memory.alias_size_in_bytes >= held
        found.append((memory.temp_size_in_bytes, compiled))
    (small_temporaries, small), (temporaries, large) = found
    assert temporaries <= small_temporaries + 8192
    # Of a call of a kernel, XLA counts what it is given, not what it reads.
    is_by_kernel = (bindings.is_available() and cache_dtype == "float32") or presence.kernels()
    if not is_by_kernel:
        small_reads, reads = (one.cost_analysis()["bytes accessed"] for one in (small, large))
        assert reads <= small_reads + 8192
