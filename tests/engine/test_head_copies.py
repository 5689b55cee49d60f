"""Where the copy of the output head is made, and greedy decoding by way of the CUDA kernels."""

import threading

import jax
import numpy as np
import pytest

import grok1
from grok1.engine import head_copies
from grok1.engine.base import Resident
from grok1.engine.engine import Engine
from grok1.engine.head_copies import LEFT_FREE, HeadCopies, fits_beside, table_bytes
from grok1.ops import forms
from grok1.ops.cuda import calls, presence
from tests.conftest import TOY as TOY_PATH
from tests.helpers import skip_unless_it_runs_here, slow
from tests.ops import standin

pytestmark = pytest.mark.not_on_gpu("a CPU stands for a device there")


@pytest.fixture(scope="module")
def toy():
    return grok1.load(TOY_PATH, mesh=(1, 1), dtype="float32", progress=False)


@pytest.fixture
def on_gpu(monkeypatch):
    """Makes the devices say that they are GPUs, with as much free memory as is asked for."""
    monkeypatch.setattr(HeadCopies, "_platform", "gpu")

    def with_free(num_bytes):
        monkeypatch.setattr(head_copies, "device_bytes_available", lambda device: num_bytes)

    with presence.assumed():
        yield with_free


def engine_like(model, runner=None):
    engine = model.engine
    return Engine(engine.params, engine.config, engine.mesh, "float32", "float32", runner=runner)


def test_on_a_gpu_the_copy_is_made_where_memory_stays_free(toy, on_gpu):
    needed = table_bytes(toy.config.vocab_size, toy.config.emb_size)
    on_gpu(needed + LEFT_FREE)
    engine = engine_like(toy)
    table = engine.screening_table
    assert table is not None
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(table)) == needed
    # It is for the most probable token alone, and for as many rows as the kernels take.
    assert not engine.head_copies.draws
    assert engine.head_copies.is_read_by(8)
    assert not engine.head_copies.is_read_by(9)
    for free in (needed + LEFT_FREE - 1, None):
        on_gpu(free)
        assert engine_like(toy).screening_table is None
    assert fits_beside(10, LEFT_FREE + 10)
    assert not fits_beside(10, LEFT_FREE + 9.5)


def test_on_a_gpu_without_the_kernels_or_with_experts_that_are_fetched_there_is_none(toy, on_gpu):
    on_gpu(1 << 40)
    with presence.assumed(frozenset(presence.OPERATIONS) - {"most_probable"}):
        assert engine_like(toy).screening_table is None

    class Fetching(Resident):
        has_room = False

    assert engine_like(toy, Fetching()).screening_table is None
    assert engine_like(toy).screening_table is not None


def test_processes_make_the_copy_where_all_have_room(toy, on_gpu, monkeypatch):
    on_gpu(1 << 40)
    said = {0: {"free": str(1 << 40)}, 1: {"free": "1000"}}
    monkeypatch.setattr(head_copies, "exchange", lambda what, words, mesh: said)
    assert engine_like(toy).screening_table is None
    said[1] = said[0]
    assert engine_like(toy).screening_table is not None


@pytest.mark.parametrize("mesh", [(1, 1), pytest.param((1, 2), marks=slow)])
def test_greedy_decoding_by_way_of_the_cuda_kernels(monkeypatch, mesh):
    skip_unless_it_runs_here("cpp")
    lock, launched = threading.Lock(), []

    def call(kernel, *inputs):
        library = standin._library(kernel)
        shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in kernel.outputs]

        def on_host(*arrays):
            with lock:  # what stands for a device is not for several threads
                launched.append(kernel.call)
                return standin.run_once(library, kernel, *map(np.asarray, arrays))

        return jax.pure_callback(on_host, shapes, *inputs)

    prompts = [[5, 6, 7], [9, 10, 11, 12]]

    def generated():
        model = grok1.load(TOY_PATH, mesh=mesh, dtype="float32", progress=False)
        answers = model.generate(prompts, max_new_tokens=4, temperature=0, ignore_eos=True)
        return [answer.tokens for answer in answers]

    expected = generated()
    monkeypatch.setattr(calls, "call", call)
    monkeypatch.setitem(
        forms.PREFERRED, "most_probable", {"cpu": ("cuda",), "default": ("direct",)}
    )
    with presence.assumed(frozenset({"most_probable"})):
        assert generated() == expected
    assert {"screen_digits<S>", "screen<S>", "choose<S>"} == set(launched)
