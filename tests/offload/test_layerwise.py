"""Experts brought to a device layer by layer, as on an accelerator; a CPU can stand for one."""

import collections
import os
import signal
import threading
import weakref

import jax
import numpy as np
import pytest

import grok1
from grok1 import AblateExperts, AddToResidual
from grok1.checkpoint import blocks, pinned, reading, sending
from grok1.machine.cuda_driver import Copier
from grok1.nn.manifest import file_name
from grok1.offload import device_experts, expert_store, runner
from grok1.offload.buffers import PartOfExpert, pageable_buffer
from grok1.planning import budget, memory
from tests.checkpoint import standin_driver
from tests.helpers import relative_error, slow

GREEDY = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
NUM_EXPERTS = 12 * 8

ON_CPU = jax.default_backend() == "cpu"
ROUNDING = 1e-5 if ON_CPU else 2e-5
"""Between programs that round in other places; both are 7e-6 from the float64 evaluation, on GPUs
8e-6."""


@pytest.fixture(autouse=True)
def by_layer(monkeypatch):
    for module in (budget, runner):
        monkeypatch.setattr(module, "WORKING_BYTES", 0)
    monkeypatch.setattr(runner, "runs_by_layer", lambda device: True)


@pytest.fixture(scope="module")
def shared(copied) -> grok1.Model:
    # Once for the module, which is wider than the patches of a test.
    with pytest.MonkeyPatch.context() as patches:
        for module in (budget, runner):
            patches.setattr(module, "WORKING_BYTES", 0)
        patches.setattr(runner, "runs_by_layer", lambda device: True)
        return load(copied)


def load(path, **options):
    options = {"mesh": (1, 1), "progress": False, "dtype": "float32", **options}
    return grok1.load(path, offload="disk", memory=2, **options)


def with_room(model, on_host, on_device, monkeypatch):
    """Empties both memories and leaves room for so many experts, at a batch of one."""
    engine = model.engine
    state = memory.state_bytes(engine, 1, engine.capacity_for(96))
    num_bytes = engine.runner.store.num_bytes
    engine.runner.budget_bytes = (
        runner.fixed_bytes(engine, engine.runner.store) + ON_CPU * state + on_host * num_bytes
    )
    engine.runner.store.resize(0)
    engine.runner.device_experts.cache.shrink(0)
    for name in engine.runner._traffic:
        vars(engine.runner._traffic[name]).update(vars(expert_store.Traffic()))

    def available(device):
        kept = len(engine.runner.device_experts.cache)
        return state + (on_device + runner._NUM_IN_TRANSFER - kept) * num_bytes

    monkeypatch.setattr(runner, "device_bytes_available", available)
    return model


@pytest.mark.parametrize(
    ("on_host", "on_device"), [pytest.param(0, 0, marks=slow), (5, 9), (0, 96)]
)
def test_nano_computes_what_the_resident_model_does(
    shared, nano, nano_reference, on_host, on_device, monkeypatch
):
    model = with_room(shared, on_host, on_device, monkeypatch)
    assert isinstance(model.engine.runner.store._new_buffer().arrays[0], jax.Array)
    tokens = nano_reference["tokens"]
    assert relative_error(model.logits(tokens), nano.logits(tokens)) <= ROUNDING
    for length in (1, 40):  # without prefill, and in a chunk of 64
        prompt = tokens[:length].tolist()
        assert model.generate(prompt, **GREEDY) == nano.generate(prompt, **GREEDY)
    stats = model.offload_stats
    assert (stats.num_held, stats.num_on_device) == (on_host, on_device)
    assert (f"{on_device} on the device" in str(stats)) == (on_device > 0)
    assert stats.decode.num_used == 2 * 8 * 12 * 2
    read = stats.decode.num_used - stats.decode.num_held
    assert stats.decode.bytes_read == read * model.engine.runner.store.num_bytes
    assert (stats.decode.hit_rate == 0) == (on_host + on_device == 0)
    assert (stats.decode.hit_rate > 0.9) == (on_device == NUM_EXPERTS)


@pytest.fixture
def library(monkeypatch):
    """A driver, by which the threads that read send what they read."""
    library = standin_driver.library()
    monkeypatch.setattr(runner, "copier_of", lambda device: Copier(library, device))
    monkeypatch.setattr(sending, "_FREE", collections.deque())
    monkeypatch.setattr(sending, "_SLOT_BYTES", 1 << 11)
    monkeypatch.setattr(blocks, "_SENT_BYTES", 1 << 13)
    return library


@pytest.mark.not_on_gpu("a CPU stands for a device and its driver there")
@pytest.mark.parametrize(
    ("on_host", "on_device"), [(0, 0), (5, 9), pytest.param(0, 96, marks=slow)]
)
def test_experts_that_come_as_they_are_read_are_the_same(
    library, copied, nano, nano_reference, on_host, on_device, monkeypatch
):
    made, alive = [], []

    def noting(*arguments):
        alive.append(sum(array() is not None for array in made) / 3)
        buffer = device_experts.device_buffer(*arguments)
        made.extend(weakref.ref(array) for array in buffer.arrays)
        return buffer

    monkeypatch.setattr(runner, "device_buffer", noting)
    model = with_room(load(copied), on_host, on_device, monkeypatch)
    tokens = nano_reference["tokens"]
    assert relative_error(model.logits(tokens), nano.logits(tokens)) <= ROUNDING
    prompt = tokens[:40].tolist()
    assert model.generate(prompt, **GREEDY) == nano.generate(prompt, **GREEDY)
    stats = model.offload_stats
    assert (stats.num_held, stats.num_on_device) == (on_host, on_device)
    assert made
    # The one that is computed with, and those that are kept.
    assert max(alive) <= 1 + on_device
    assert not any(library.waiting.values())


@pytest.mark.not_on_gpu("a CPU stands for a device and its driver there")
def test_a_file_that_vanishes_is_one_error_where_experts_come_as_they_are_read(
    library, copied, monkeypatch
):
    test_a_file_that_vanishes_is_one_error_and_not_the_end(copied, load(copied), monkeypatch)
    assert not any(library.waiting.values())


@pytest.mark.not_on_gpu("a CPU stands for a device and its driver there")
def test_interrupting_ends_within_a_layer_where_experts_come_as_they_are_read(
    library, copied, monkeypatch
):
    test_interrupting_ends_within_a_layer(load(copied), 0, monkeypatch)
    assert not any(library.waiting.values())


@slow
def test_more_on_the_device_is_never_a_lower_hit_rate(shared, monkeypatch):
    rates = []
    for on_device in (0, 6, 24, 60):
        with_room(shared, 0, on_device, monkeypatch).generate([7], **GREEDY)
        rates.append(shared.offload_stats.decode.hit_rate)
    assert rates == sorted(set(rates))


@slow
def test_bfloat16_is_as_close_as_the_resident_model_is(copied, nano_path, nano_reference):
    resident = grok1.load(nano_path, mesh=(1, 1), dtype="bfloat16", progress=False)
    tokens, expected = nano_reference["tokens"], nano_reference["logits_f64"]
    error = relative_error(load(copied, dtype="bfloat16").logits(tokens), expected)
    assert 1e-4 < error <= 1.5 * relative_error(resident.logits(tokens), expected)


def test_sampled_tokens_and_scores_are_the_resident_models(shared, nano, monkeypatch):
    with_room(shared, 2, 3, monkeypatch)
    drawn = {"max_new_tokens": 8, "temperature": 0.7, "seed": 3, "ignore_eos": True}
    assert shared.generate([5, 6, 7], **drawn).tokens == nano.generate([5, 6, 7], **drawn).tokens
    text = list(range(60))
    found, expected = shared.score(text), nano.score(text)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=0, atol=2 * ROUNDING)


@slow
def test_a_batch_is_the_resident_models(shared, nano, monkeypatch):
    with_room(shared, 2, 3, monkeypatch)
    state = memory.state_bytes(shared.engine, 4, shared.engine.capacity_for(96))
    shared.engine.runner.budget_bytes += ON_CPU * state
    prompts = [[5], [40], [9]]
    assert shared.generate(prompts, **GREEDY) == nano.generate(prompts, **GREEDY)


def test_captures_and_interventions_are_those_of_the_resident_model(shared, nano, monkeypatch):
    with_room(shared, 1, 4, monkeypatch)
    capture = ("router", "residual", "branches", "attention", "logit_lens", "logits")
    acts = [
        AblateExperts(3, layers=2),
        AddToResidual(np.linspace(-1, 1, nano.config.emb_size), layers=4),
    ]
    options = {"capture": capture, "attention_layers": (7, 2)}
    with shared.intervene(*acts) as ours, nano.intervene(*acts) as theirs:
        found, expected = (m.trace(list(range(20)), **options) for m in (ours, theirs))
    assert set(found) == set(expected)
    for name, array in expected.items():
        if array.dtype == np.int32:
            np.testing.assert_array_equal(found[name], array)
        else:
            assert relative_error(found[name], array) <= ROUNDING, name


def test_pinned_memory_is_written_in_place_and_is_no_alias_of_what_was_sent():
    device = jax.devices()[0]
    assert pinned.has_pinned_memory(device)
    buffer = device_experts.pinned_buffer(
        device, [PartOfExpert(shape, np.dtype(np.int8)) for shape in ((3, 5), (5, 3))]
    )
    assert [array.sharding.memory_kind for array in buffer.arrays] == ["pinned_host"] * 2
    buffer.matrices[1][...] = 7
    sent = pinned.sent(buffer.arrays[1], device)
    np.testing.assert_array_equal(jax.block_until_ready(sent), np.full((1, 5, 3), 7))
    buffer.matrices[1][...] = 8
    np.testing.assert_array_equal(sent, np.full((1, 5, 3), 7))


def test_ordinary_memory_that_was_sent_may_be_written_to():
    raw = np.full(1 << 10, 7, np.uint8)
    aligned = raw[-raw.ctypes.data % 64 :][:256]  # what JAX takes as it is
    sent = jax.block_until_ready(pinned.sent(aligned, jax.devices()[0]))
    aligned[...] = 8
    np.testing.assert_array_equal(sent, np.full(256, 7))


def test_without_pinned_memory_it_is_sent_from_ordinary_memory(
    copied, nano, nano_reference, monkeypatch
):
    monkeypatch.setattr(runner, "has_pinned_memory", lambda device: False)
    model = load(copied)
    assert model.engine.runner.store._new_buffer.func is pageable_buffer
    tokens = nano_reference["tokens"]
    assert relative_error(model.logits(tokens), nano.logits(tokens)) <= ROUNDING


def test_the_next_is_read_while_one_is_computed_with(shared, monkeypatch):
    with_room(shared, 0, 0, monkeypatch)
    taken, wanted, begun = [], set(), collections.defaultdict(threading.Event)
    take, prepare = expert_store.ExpertStore.take, expert_store.ExpertStore._prepare

    def noting_take(self, layer, expert, following, in_use):
        key = layer, expert
        if key in wanted:
            # However late its thread gets a processor: it begins before the expert is asked for.
            assert begun[key].wait(20)
        taken.append(key)
        wanted.add((layer, following))
        return take(self, layer, expert, following, in_use)

    def noting_prepare(self, key, plan):
        begun[key].set()
        return prepare(self, key, plan)

    monkeypatch.setattr(expert_store.ExpertStore, "take", noting_take)
    monkeypatch.setattr(expert_store.ExpertStore, "_prepare", noting_prepare)
    shared.logits(list(range(8)))
    layers = {layer for layer, _ in taken}
    # All but each layer's first.
    assert len(wanted.intersection(taken)) == len(taken) - len(layers)


def test_one_that_the_host_holds_is_sent_before_the_one_before_is_computed_with(
    shared, nano, monkeypatch
):
    model, order = with_room(shared, NUM_EXPERTS, 0, monkeypatch), []
    sent, fetch = device_experts.sent, device_experts.DeviceExperts.fetch
    model.logits(list(range(64)))  # after which the host holds all

    def noting_sent(source, device):
        order.append("sent")
        return sent(source, device)

    def noting_fetch(self, layer, chosen):
        for pair in fetch(self, layer, chosen):
            assert len(self._in_transfer) <= 2
            order.append("handed over")
            yield pair

    monkeypatch.setattr(device_experts, "sent", noting_sent)
    monkeypatch.setattr(device_experts.DeviceExperts, "fetch", noting_fetch)
    tokens = list(range(8))
    assert relative_error(model.logits(tokens), nano.logits(tokens)) <= ROUNDING
    assert model.offload_stats.num_held == NUM_EXPERTS
    assert order[:7] == ["sent"] * 6 + ["handed over"]
    assert order[7:11] == ["sent"] * 3 + ["handed over"]


def test_one_on_its_way_keeps_its_place_in_the_host(copied, nano_path, monkeypatch):
    store = load(copied).engine.runner.store
    store.resize(2)
    store.begin(expert_store.Traffic())
    try:
        buffers = [store.take(0, expert, None)[0] for expert in (0, 1)]
        for _ in range(9):  # used so often that others would have to leave
            store._cache.use((0, 2))
        _, is_held = store.take(0, 2, None, in_use=[(0, 0), (0, 1)])
        assert not is_held
        assert store.holds(0, 0)
        assert store.holds(0, 1)
        buffer, is_held = store.take(0, 2, None, in_use=[(0, 1)])
        assert is_held
        assert buffer is buffers[0]
    finally:
        store.end()


@pytest.mark.not_on_gpu("a CPU stands for a device and its driver there")
def test_the_next_is_asked_for_before_one_is_waited_for_where_they_come_as_they_are_read(
    library, copied, monkeypatch
):
    store = load(copied).engine.runner.store
    store.resize(0)
    order, prepare, wait = [], expert_store.ExpertStore._prepare, reading.Reader.wait
    monkeypatch.setattr(
        expert_store.ExpertStore,
        "_prepare",
        lambda self, key, plan: order.append(key) or prepare(self, key, plan),
    )
    monkeypatch.setattr(
        reading.Reader, "wait", lambda self, number: order.append("wait") or wait(self, number)
    )
    for step in range(2):
        store.begin(expert_store.Traffic())
        reader = store._reader
        for expert, following in ((0, 3), (3, 5), (5, None)):
            store.take(step, expert, following)
        store.end()
        assert store._reader is reader  # for the next step
        assert order == [(step, 0), (step, 3), "wait", (step, 5), "wait", "wait"]
        order.clear()
    store.begin(expert_store.Traffic())
    store.take(0, 0, 3)
    store.cancel()
    store.end()
    assert store._reader is None
    assert not any(library.waiting.values())


def test_a_file_that_vanishes_is_one_error_and_not_the_end(copied, shared, monkeypatch):
    with_room(shared, 0, 0, monkeypatch)
    before = shared.generate([1, 2, 3], **GREEDY)
    up = copied / "ckpt-0" / file_name(4)
    up.rename(copied / "away")
    try:
        with pytest.raises(grok1.CheckpointError, match="tensor00004_000: cannot be read: No such"):
            shared.generate([1, 2, 3], **GREEDY)
    finally:
        (copied / "away").rename(up)
    assert shared.generate([1, 2, 3], **GREEDY) == before


@pytest.mark.parametrize("on_device", [0, pytest.param(NUM_EXPERTS, marks=slow)])
def test_interrupting_ends_within_a_layer(shared, on_device, monkeypatch):
    model = with_room(shared, 0, on_device, monkeypatch)
    before = model.generate([1, 2, 3], **GREEDY)
    layers, others = [], set(threading.enumerate())
    say_layer = expert_store.ExpertStore._say_layer

    def interrupt(self, layer):
        layers.append(layer)
        if layer == 5 and not self._cancelled.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            assert self._cancelled.wait(timeout=10)
        say_layer(self, layer)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patches:
            patches.setattr(expert_store.ExpertStore, "_say_layer", interrupt)
            with pytest.raises(KeyboardInterrupt):
                model.generate([1, 2, 3], **GREEDY)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert max(layers) == 5
    # A server of other tests has a thread of its own, and so have other models.
    assert model.engine.runner.store._reader is None
    names = ("grok1-fetch", "grok1-mapping", "grok1-reader", "grok1-experts", "grok1-step")
    assert not [one for one in {*threading.enumerate()} - others if one.name.startswith(names)]
    assert model.generate([1, 2, 3], **GREEDY) == before


def test_a_store_of_mapped_files_has_nothing_to_send(copied, nano_path, monkeypatch):
    monkeypatch.undo()
    mapped = grok1.load(copied, offload="disk", memory=4, mesh=(1, 1), progress=False)
    store = mapped.engine.runner.store
    if not store.is_mapped:
        pytest.skip("this system cannot map experts")
    store.resize(0)
    store.begin(expert_store.Traffic())
    try:
        with pytest.raises(ValueError, match="allow_mapping=False"):
            store.take(0, 0, None)
    finally:
        store.end()
