"""What a model takes of memory: counted by shapes, refused where there is less."""

import types

import jax
import jax.numpy as jnp
import pytest

import grok1
from grok1.config import GROK_1, TOY
from grok1.engine.steps import Draw
from grok1.nn.manifest import in_memory, manifest
from grok1.nn.sharding import make_mesh
from grok1.planning import memory
from grok1.planning.memory import abstract_engine, least_bytes, released_weights, shard_bytes
from tests.conftest import TOY as TOY_PATH
from tests.helpers import skip_unless_it_runs_here

DRAW = Draw(allowed=None, sampling=None, num_top=0)


def test_released_weights_are_those_of_the_manifest():
    alike = memory.abstract_weights(manifest(TOY), TOY)
    assert jax.tree.map(str, released_weights(TOY)) == jax.tree.map(str, alike)


def test_weights_are_counted_as_they_lie_in_memory(toy):
    weights = memory.abstract_weights(toy.tensors, TOY)
    engine = abstract_engine(weights, TOY, toy.mesh, "float32")
    assert shard_bytes(engine.params) == sum(leaf.nbytes for leaf in jax.tree.leaves(toy.params))


def test_the_least_is_weights_and_the_smallest_cache():
    engine = abstract_engine(released_weights(TOY), TOY, make_mesh(TOY, (1, 1)), "float32")
    # 2 (keys and values) x 6 layers x 256 positions x 4 heads of 16 numbers, of 4 bytes each.
    cache = 2 * 6 * 256 * 4 * 16 * 4
    assert least_bytes(engine) - shard_bytes(engine.params) == pytest.approx(cache, rel=0.01)


def test_the_output_heads_table_and_working_memory_are_needed_too(monkeypatch):
    monkeypatch.setattr(memory.forms, "has_kernels", lambda platform: True)
    mesh = make_mesh(GROK_1, (1, 1))
    engine = abstract_engine(released_weights(GROK_1), GROK_1, mesh, "float32")
    assert memory.working_bytes(engine) == 131072 * (6144 + 6144 // 2 + 12) + 10**9
    toy = abstract_engine(released_weights(TOY), TOY, mesh, "float32")
    assert memory.working_bytes(toy) < 2e6


def test_copies_of_the_output_head_are_counted_where_they_are_made(kernels):
    skip_unless_it_runs_here("cpp")
    tensors = manifest(TOY)
    for mesh, embedding in (((1, 1), "float32"), ((1, 1), "bfloat16"), ((1, 2), "float32")):
        weights = memory.abstract_weights(in_memory(tensors, jnp.dtype(embedding)), TOY)
        abstract = abstract_engine(weights, TOY, make_mesh(TOY, mesh), "float32")
        model = grok1.load(TOY_PATH, mesh=mesh, embedding_dtype=embedding, progress=False)
        copies = model.engine.head_copies
        made = [copies.table, copies.remainders if model.engine.is_screened(DRAW) else None]
        assert memory.head_copies_bytes(abstract) == shard_bytes(made)


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
@pytest.mark.parametrize("text", ["90%", "1.5", "0", "nan"])
def test_a_share_that_is_none_names_its_variable(name, text, monkeypatch):
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=f"{name} must be a share .* found '{text}'"):
        memory.preallocated_share()


def test_load_refuses_what_cannot_fit_before_it_reads(monkeypatch):
    engine = abstract_engine(released_weights(TOY), TOY, make_mesh(TOY, (1, 2)), "float32")
    needed = 2 * (least_bytes(engine) + memory.working_bytes(engine))

    def read(*arguments):
        raise AssertionError("weights were read")

    monkeypatch.setattr("grok1.factory.load_params", read)
    monkeypatch.setattr(memory, "host_bytes_available", lambda: needed - 1)
    message = (
        r"the model does not fit: it takes 0\.00 GB of weights, 0\.00 GB of cache and 0\.00 GB of "
        rf"working memory on each of 2 CPU devices, {needed:,} bytes together, and {needed - 1:,} "
        r"bytes of memory are available; use a machine with more memory, or more machines\. "
        r"`python -m grok1 plan` says what fits"
    )
    with pytest.raises(ValueError, match=message):
        grok1.load(TOY_PATH, mesh=(1, 2), progress=False)
    for enough in (needed, None):
        monkeypatch.setattr(memory, "host_bytes_available", lambda enough=enough: enough)
        with pytest.raises(AssertionError, match="weights were read"):
            grok1.load(TOY_PATH, mesh=(1, 2), progress=False)


def test_accelerators_are_asked_one_by_one(monkeypatch):
    needed = 4 * 10**9
    monkeypatch.setattr(memory, "least_bytes", lambda engine: needed - 10**9)
    monkeypatch.setattr(memory, "working_bytes", lambda engine: 10**9)
    monkeypatch.setattr(memory, "_least_state_bytes", lambda engine: 10**9)

    def gpu(limit):
        stats = limit and {"bytes_limit": limit, "bytes_in_use": 1000}
        return types.SimpleNamespace(
            platform="gpu", device_kind="NVIDIA A100", memory_stats=lambda: stats
        )

    def require(*limits, sizes=(1, 4)):
        mesh = types.SimpleNamespace(
            local_devices=[gpu(limit) for limit in limits],
            shape=dict(zip(("data", "model"), sizes, strict=True)),
            size=sizes[0] * sizes[1],
        )
        memory.require_memory(types.SimpleNamespace(mesh=mesh, config=GROK_1))

    require(needed + 1000, needed + 1000)
    require(None, None)  # an allocator that does not say
    message = (
        r"takes 2\.00 GB of weights, 1\.00 GB of cache and 1\.00 GB of working memory, "
        r"4,000,000,000 bytes together, on each of 4 devices, and 3,999,999,999 bytes are "
        r"available on NVIDIA A100; JAX takes 75% of a GPU's memory: "
        r"set XLA_PYTHON_CLIENT_MEM_FRACTION=\.95 if that is enough; otherwise use more devices"
    )
    with pytest.raises(ValueError, match=message):
        require(needed + 1000, needed + 999)
    # Copies side by side that do not fit, where one would: by default, and as it was asked for.
    for sizes in (3, 4), (2, 4):
        helps = (
            r"; give mesh='1x8', which shares one copy .* among 8 of these devices, or JAX takes"
        )
        with pytest.raises(ValueError, match=helps):
            require(needed // 2 + 2000, sizes=sizes)
        with pytest.raises(ValueError, match=r"on NVIDIA A100; JAX takes 75%"):
            require(needed // 2 + 500, sizes=sizes)


def test_a_cpu_that_holds_one_copy_and_not_two_is_told(monkeypatch):
    engine = abstract_engine(released_weights(TOY), TOY, make_mesh(TOY, (2, 1)), "float32")
    one = least_bytes(engine) + memory.working_bytes(engine)
    for available, helps in (one, "give mesh='1x2', which"), (one - 1, "use a machine with more"):
        monkeypatch.setattr(memory, "host_bytes_available", lambda: available)  # noqa: B023
        with pytest.raises(ValueError, match=rf"of memory are available; {helps}"):
            memory.require_memory(engine)
