"""What compiled programs take, and the largest batch and context that fit."""

import dataclasses
import json
import types
from typing import Any

import pytest

import grok1
from grok1.config import GROK_1, TOY
from grok1.generate.prefill import largest_call
from grok1.nn.manifest import in_memory
from grok1.nn.sharding import make_mesh
from grok1.planning import compiled_memory, memory, planning, stored_figures
from grok1.planning.memory import abstract_engine, released_weights, shard_bytes, state_bytes
from tests.helpers import count_collectives, slow


@pytest.fixture(scope="module")
def step_on_eight():
    """A step of decoding of the real model, compiled for eight devices from shapes alone."""
    mesh = make_mesh(GROK_1, (1, 8))
    engine = abstract_engine(released_weights(GROK_1), GROK_1, mesh, "bfloat16")
    state = engine.abstract_state(1, 8192)
    lowered = engine.decode_program(None, None).lower(
        engine.weights, state, *engine.abstract_decode_arguments(1)
    )
    return lowered.compile()


def test_a_step_of_the_real_model_fits_eight_devices_and_meets_three_times(step_on_eight):
    memory = step_on_eight.memory_analysis()
    assert memory.argument_size_in_bytes <= 41e9
    assert memory.temp_size_in_bytes <= 0.5e9
    # Two all-reduces in the body of the loop over layers and one for the embedding, whose rows are
    # shared out; the gather is of the logits.
    assert count_collectives(step_on_eight.as_text()) == {
        "all-reduce": 3,
        "all-gather": 1,
        "all-to-all": 0,
        "collective-permute": 0,
        "reduce-scatter": 0,
    }


@slow
def test_the_real_model_on_eight_gpus_agrees_with_what_xla_compiles(on_eight_gpus, step_on_eight):
    found = on_eight_gpus
    compiled = step_on_eight.memory_analysis()
    arguments = compiled.argument_size_in_bytes - found["cache_bytes"]
    assert found["weights_bytes"] == pytest.approx(arguments, rel=0.01)
    assert compiled.temp_size_in_bytes <= found["working_bytes"]
    # A prompt's chunk is of 8,192 tokens there; for it XLA takes 1.4 GB on an H200.
    assert 1.4e9 <= found["working_bytes"] <= 2e9
    # 2 (keys and values) x 64 layers x 8192 positions x 128 float16 of one head, and the tokens.
    assert found["cache_bytes"] == pytest.approx(2 * 64 * 8192 * 128 * 2, rel=1e-3)
    assert found["fits"]
    assert (found["largest_batch"], found["largest_context"]) == (32, 8192)
    assert found["usable_bytes"] == 60e9
    assert found["checkpoint_bytes"] == pytest.approx(318_239_886_140, rel=1e-5)
    assert found["load_seconds"] == pytest.approx(found["checkpoint_bytes"] / 2e9)


@slow
def test_working_memory_is_that_of_the_toys_compiled_programs():
    # The most of both, so that nothing larger is compiled.
    found = grok1.plan(TOY, devices=2, memory=1, batch=32, context=1024, dtype="float32")
    engine = abstract_engine(released_weights(TOY), TOY, make_mesh(TOY, (1, 2)), "float32")
    state = engine.abstract_state(32, 1024)
    num_rows, chunk = largest_call(engine, 32, 1024, "cpu")
    rows = engine.abstract_rows(num_rows)
    prefill = engine.prefill_program(chunk).lower(engine.weights, state, rows).compile()
    # Here with the native kernels, which need less.
    assert found.working_bytes >= prefill.memory_analysis().temp_size_in_bytes > 0
    assert found.cache_bytes == state_bytes(engine, 32, 1024)
    assert (found.batch, found.context, found.mesh) == (32, 1024, (1, 2))


@pytest.mark.parametrize(
    ("platform", "batch", "tokens"), [("tpu", 8, 4096), ("tpu", 32, 4096), ("gpu", 32, 8192)]
)
def test_what_is_compiled_of_prefill_is_as_much_as_a_call_runs(
    monkeypatch, platform, batch, tokens
):
    engine = abstract_engine(released_weights(GROK_1), GROK_1, make_mesh(GROK_1, (1, 8)), "float32")
    compiled = []

    class Program:
        def __init__(self, chunk):
            self.chunk = chunk

        def lower(self, weights, state, rows, *arguments):
            if self.chunk is not None:
                compiled.append(rows.slots.shape[0] * self.chunk)
            return self

        def compile(self):
            return self

        def memory_analysis(self):
            names = "temp_size_in_bytes", "output_size_in_bytes", "alias_size_in_bytes"
            return types.SimpleNamespace(**dict.fromkeys(names, 0))

    monkeypatch.setattr(engine, "prefill_program", Program)
    monkeypatch.setattr(engine, "decode_program", lambda *_: Program(None))
    compiled_memory.working_bytes(engine, batch, 8192, platform)
    assert compiled == [tokens]


def test_the_largest_batch_and_context_are_the_largest_that_fit(monkeypatch):
    asked = []

    def working_bytes(engine, batch, capacity, platform):
        asked.append((batch, capacity))
        return 1000 * batch

    monkeypatch.setattr(compiled_memory, "working_bytes", working_bytes)
    engine = abstract_engine(released_weights(TOY), TOY, make_mesh(TOY, (1, 2)), "float32")
    # Room for 8 rows of 512, with their working memory; or for 2 rows of all 1,024 with theirs.
    room = state_bytes(engine, 8, 512) + 8000
    request = {"config": dataclasses.asdict(TOY), "mesh": [1, 2], "dtype": "float32"}
    request |= {
        "tensors": memory.one_layer(TOY),
        "cache_dtype": None,
        "batch": 4,
        "capacity": 512,
        "rooms": [room, 2 * room],
        "platform": "cpu",
    }
    found = compiled_memory.answer(request)
    assert sorted(found.pop("figures")) == [[4, 512, 4000], [4, 1024, 4000], [8, 512, 8000]]
    assert found == {"working": 4000, "largest_batch": 8, "largest_context": 1024}
    # Nothing is compiled of which the cache alone is too large, and nothing twice.
    assert sorted(asked) == [(4, 512), (4, 1024), (8, 512)]
    request["rooms"] = [room - 1, room - 1]
    assert compiled_memory.answer(request)["largest_batch"] == 4
    # What does not fit in the usual room is planned for all there is.
    request["rooms"] = [0, room]
    assert compiled_memory.answer(request)["largest_batch"] == 8
    request["rooms"] = [0, 0]
    found = compiled_memory.answer(request)
    assert (found["largest_batch"], found["largest_context"]) == (0, 0)


def test_the_child_lays_out_the_tensors_that_it_is_given(monkeypatch):
    def working_bytes(engine, batch, capacity, platform):
        return shard_bytes(engine.params)

    monkeypatch.setattr(compiled_memory, "working_bytes", working_bytes)
    tensors = in_memory(memory.one_layer(TOY), "bfloat16")
    request = {"config": dataclasses.asdict(TOY), "tensors": tensors, "mesh": [1, 1]}
    request |= {"dtype": "float32", "cache_dtype": None, "batch": 1, "capacity": 256}
    request |= {"platform": "cpu"}
    found = compiled_memory.answer(json.loads(json.dumps(request | {"rooms": [0, 0]})))
    whole = abstract_engine(released_weights(TOY), TOY, make_mesh(TOY, (1, 1)), "float32")
    halved = TOY.vocab_size * TOY.emb_size * 2
    assert found["working"] == shard_bytes(whole.params) - halved


@pytest.fixture
def child(monkeypatch, tmp_path):
    """Stands in for the child process; holds how often it was asked, and keeps figures apart."""
    asked = []

    def run(command, **options):
        asked.append(json.loads(command[-1]))
        text = json.dumps(compiled_memory.answer(asked[-1]))
        return types.SimpleNamespace(returncode=0, stdout=text, stderr="")

    monkeypatch.setattr(planning.subprocess, "run", run)
    monkeypatch.setattr(
        compiled_memory, "working_bytes", lambda engine, batch, capacity, platform: 1000 * batch
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return asked


def test_a_second_plan_takes_its_figures_from_the_first(child, tmp_path):
    first = grok1.plan(TOY, devices=1, memory=1)
    assert grok1.plan(TOY, devices=1, memory=1) == first
    assert len(child) == 1
    # Rooms change with every look at the memory; shapes that are not known are compiled.
    tight = grok1.plan(TOY, devices=1, memory=0.03)
    assert len(child) == 2
    assert tight.largest_batch < first.largest_batch
    assert grok1.plan(TOY, devices=1, memory=0.03) == tight
    assert grok1.plan(TOY, devices=1, memory=1) == first
    assert len(child) == 2
    [kept] = (tmp_path / "grok1").glob("plan-*")
    for damaged in ("", "[", "[[1, 2]]", "{}", "3"):
        kept.write_text(damaged)
        assert grok1.plan(TOY, devices=1, memory=1) == first
    assert len(child) == 2 + 5


@pytest.mark.parametrize(
    "change",
    [
        {"cache_dtype": "float32"},
        {"dtype": "float32"},
        {"devices": 2},
        {"layers": 2},
        {"embedding_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_a_plan_of_another_kind_takes_no_figures(child, change):
    usual: dict[str, Any] = {"devices": 1, "memory": 1}
    for _ in range(2):
        grok1.plan(TOY, **usual)
        grok1.plan(TOY, **usual | change)
    assert len(child) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(stored_figures, "source_hash", lambda: "another"),
        lambda patch: patch.setattr(stored_figures, "source_hash", lambda: None),
        lambda patch: patch.setattr(stored_figures, "schedulable_cores", lambda: 77),
        lambda patch: patch.setattr(stored_figures.jax, "__version__", "0.0.1"),
        lambda patch: patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false"),
        lambda patch: patch.setenv("GROK1_COMPILATION_CACHE", "0"),
    ],
)
def test_where_something_else_compiles_nothing_is_taken(child, monkeypatch, change):
    grok1.plan(TOY, devices=1, memory=1)
    change(monkeypatch)
    grok1.plan(TOY, devices=1, memory=1)
    assert len(child) == 2


def test_without_a_place_to_keep_figures_a_plan_is_made_all_the_same(child, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert grok1.plan(TOY, devices=1, memory=1) == grok1.plan(TOY, devices=1, memory=1)
    assert len(child) == 2
