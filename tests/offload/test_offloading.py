"""A model whose experts stay on disk: the same numbers, within a budget, and clean ends."""

import errno
import gc
import io
import os
import pathlib
import re
import signal
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import grok1
from grok1.care import conversion
from grok1.checkpoint import mapping, native
from grok1.machine import announcement, progress
from grok1.nn.manifest import file_name
from grok1.offload import expert_store, runner
from grok1.ops.cpu import bindings
from grok1.planning import budget, memory
from tests.conftest import TOY
from tests.helpers import relative_error, slow

pytestmark = pytest.mark.not_on_gpu(
    "experts that kernels ask for are of the CPU's form; test_layerwise.py has the other"
)

GREEDY = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture(autouse=True)
def no_reserve(monkeypatch):
    """Budgets of these tests are of kilobytes: nothing is set apart for Python and JAX."""
    for module in (budget, runner):
        monkeypatch.setattr(module, "WORKING_BYTES", 0)


@pytest.fixture(scope="module")
def shared(copied) -> grok1.Model:
    return load(copied)


@pytest.fixture
def offloaded(shared) -> grok1.Model:
    """A model without experts in memory, or room for them, that has been used before."""
    return with_room(shared, 0)


def load(path, num_experts=0, **options):
    """Loads a model with room for so many experts beside everything else."""
    options = {"mesh": (1, 1), "progress": False, "dtype": "float32", **options}
    return with_room(grok1.load(path, offload="disk", memory=2, **options), num_experts)


def with_room(model, num_experts, context=96, batch=1):
    """Empties the memory and leaves room for so many experts at a context and batch."""
    engine = model.engine
    engine.runner.budget_bytes = (
        runner.fixed_bytes(engine, engine.runner.store)
        + memory.state_bytes(engine, batch, engine.capacity_for(context))
        + num_experts * engine.runner.store.num_bytes
    )
    engine.runner.store.resize(0)
    for name in engine.runner._traffic:
        vars(engine.runner._traffic[name]).update(vars(expert_store.Traffic()))
    return model


def threads():
    """Those that run for an offloaded model; a server of other tests has one of its own."""
    names = ("grok1-fetch", "grok1-mapping", "grok1-reader", "grok1-step")
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(names)]


def mapped_files(path):
    return [
        line for line in pathlib.Path("/proc/self/maps").read_text().splitlines() if path in line
    ]


@pytest.mark.parametrize("num_experts", [0, 7, 96])
def test_nano_computes_what_the_resident_model_does(nano, nano_reference, offloaded, num_experts):
    with_room(offloaded, num_experts)
    tokens = nano_reference["tokens"]
    np.testing.assert_array_equal(offloaded.logits(tokens), nano.logits(tokens))
    for length in (1, 40):  # without prefill, and in a chunk of 64
        prompt = tokens[:length].tolist()
        assert offloaded.generate(prompt, **GREEDY) == nano.generate(prompt, **GREEDY)
    stats = offloaded.offload_stats
    assert stats.num_held == num_experts
    assert stats.decode.steps == 2 * 12
    assert stats.decode.num_used == 2 * 12 * 12 * 2
    read = stats.decode.num_used - stats.decode.num_held
    assert stats.decode.bytes_read == read * offloaded.engine.runner.store.num_bytes
    assert (stats.decode.hit_rate > 0.9) == (num_experts == 96)


@slow
def test_products_in_bfloat16_are_those_of_the_resident_model(nano_path, nano_reference):
    tokens = nano_reference["tokens"]
    found, expected = (
        model.logits(tokens)
        for model in (
            load(nano_path, 7, dtype="bfloat16"),
            grok1.load(nano_path, mesh=(1, 1), dtype="bfloat16", progress=False),
        )
    )
    np.testing.assert_array_equal(found, expected)


def test_it_says_where_the_experts_are(nano, offloaded):
    with_room(offloaded, 7)
    offloaded.logits([1, 2, 3])
    assert ", experts on disk)" in repr(offloaded)
    shown = offloaded._repr_html_()
    assert "on disk, 7 slots in memory for 96 of them" in shown
    assert "without the experts" in shown
    parameters = r"parameters</th>.*?>([\d,]+)<"
    assert re.findall(parameters, shown) == re.findall(parameters, nano._repr_html_())
    assert "on disk" not in nano._repr_html_()


@slow
def test_the_toy_computes_what_the_resident_model_does(toy):
    offloaded = with_room(load(TOY), 5, context=256)
    tokens = np.arange(40) * 11 % toy.config.vocab_size
    assert relative_error(offloaded.logits(tokens), toy.logits(tokens)) <= 1e-6
    prompt = "The first argument "
    assert offloaded.generate(prompt, **GREEDY) == toy.generate(prompt, **GREEDY)
    drawn = {"max_new_tokens": 8, "temperature": 0.7, "seed": 3, "logprobs": 2}
    found, expected = (model.generate(prompt, **drawn) for model in (offloaded, toy))
    assert (found.text, found.tokens) == (expected.text, expected.tokens)
    # The resident model draws from what it keeps of the output head, in sums of another order.
    np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=0, atol=5e-6)
    for ours, theirs in zip(found.top_logprobs, expected.top_logprobs, strict=True):
        assert list(ours) == list(theirs)
        np.testing.assert_allclose([*ours.values()], [*theirs.values()], rtol=0, atol=5e-6)
    assert "remainders" not in vars(offloaded.engine.head_copies)
    text = "".join(offloaded.stream(prompt, **drawn))
    assert text == toy.generate(prompt, **drawn).text


def test_a_batch_computes_what_the_resident_model_does(offloaded, nano):
    with_room(offloaded, 5, batch=4)
    prompts = [[5, 6, 7], list(range(40, 60)), [9]]
    assert offloaded.generate(prompts, **GREEDY) == nano.generate(prompts, **GREEDY)


def test_captures_are_those_of_the_resident_model(offloaded, nano):
    def capture(model):
        state = model.engine.new_state(np.arange(96, dtype=np.int32)[None])
        names = ("residual", "expert_indices")
        _, _, captured = model.engine.score(state, np.array([16], np.int32), 16, names)
        return captured

    found, expected = capture(offloaded), capture(nano)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_without_kernels_it_goes_through_xla(copied, nano_reference, monkeypatch):
    monkeypatch.setattr(bindings, "is_available", lambda: False)
    offloaded = load(copied, 4)
    # As many as one chunk takes, in which the prompt runs too: other chunks are other programs.
    tokens = nano_reference["tokens"][:16]
    assert relative_error(offloaded.logits(tokens), nano_reference["logits_f64"][:16]) <= 2e-5
    greedy = offloaded.generate(
        nano_reference["greedy_prompt"].tolist(),
        **{**GREEDY, "max_new_tokens": 4},
    )
    assert greedy.tokens == nano_reference["greedy_tokens"].tolist()[:4]
    assert offloaded.offload_stats.decode.num_held > 0
    up = copied / "ckpt-0" / file_name(4)
    up.rename(copied / "away")
    with pytest.raises(grok1.CheckpointError, match="tensor00004_000: cannot be read: No such"):
        offloaded.logits(tokens)
    (copied / "away").rename(up)
    assert threads() == []


@pytest.mark.parametrize("how", ["transposed", pytest.param("old system", marks=slow)])
def test_what_cannot_be_mapped_is_read_into_buffers(nano_path, nano, tmp_path, monkeypatch, how):
    path = nano_path
    if how == "transposed":
        path = tmp_path / "converted"
        conversion.convert(nano_path, path, to="safetensors")
    else:
        monkeypatch.setattr(mapping, "is_available", lambda: False)
    offloaded = load(path, 4)
    assert not offloaded.engine.runner.store.is_mapped
    prompt = list(range(30, 60))
    assert offloaded.generate(prompt, **GREEDY) == nano.generate(prompt, **GREEDY)


def test_more_memory_is_never_a_lower_hit_rate(offloaded):
    rates = []
    for num_experts in (0, 6, 24, 60):
        with_room(offloaded, num_experts).generate([7], **GREEDY)
        rates.append(offloaded.offload_stats.decode.hit_rate)
    assert rates == sorted(set(rates))
    assert rates[0] == 0
    assert rates[1] > 0.02


def test_a_larger_cache_takes_its_memory_from_the_experts(offloaded):
    model = with_room(offloaded, 40)
    prompt = list(range(20))
    model.generate(prompt, **GREEDY)
    assert model.offload_stats.num_held == 40
    row = memory.state_bytes(model.engine, 1, 96)
    needed = -(-row // model.engine.runner.store.num_bytes)
    model.generate([prompt] * 2, **GREEDY)
    assert model.offload_stats.num_held == 40 - needed
    with pytest.raises(ValueError, match=r"budget of 0\.\d+ GB is too small: .* fewer or shorter"):
        model.generate([prompt] * 4, **GREEDY)


def test_host_keeps_what_was_read(nano_path):
    model = grok1.load(nano_path, mesh=(1, 1), offload="host", progress=False)
    for _ in range(2):
        model.generate(list(range(20)), **GREEDY)
    assert model.offload_stats.decode.hit_rate > 0.9
    with pytest.raises(ValueError, match="memory must be left out, or given as a budget"):
        grok1.load(nano_path, mesh=(1, 1), offload="host", memory=1, progress=False)


def test_auto_offloads_what_does_not_fit(nano_path, nano, monkeypatch, capfd):
    assert grok1.load(nano_path, mesh=(1, 1), progress=False).offload_stats is None
    model = grok1.load(nano_path, mesh=(1, 1), memory="0.0025GB", progress=False)
    assert model.offload_stats is not None
    said = capfd.readouterr().err
    assert said == "grok1: the model takes 0.00 GB: experts are read when they are needed\n"
    monkeypatch.setattr(memory, "host_bytes_available", lambda: 2_600_000)
    monkeypatch.setattr(budget, "host_bytes_available", lambda: 3_000_000)
    model = grok1.load(nano_path, mesh=(1, 1), dtype="float32", progress=False)
    assert "the model does not fit: it takes 0.00 GB of weights" in capfd.readouterr().err
    assert model.engine.runner.budget_bytes == 2_400_000
    tokens = np.arange(8)
    np.testing.assert_array_equal(model.logits(tokens), nano.logits(tokens))
    none = r"the model does not fit: .* available; leave out offload='none', so that .*, or use a"
    with pytest.raises(ValueError, match=none):
        grok1.load(nano_path, mesh=(1, 1), offload="none", progress=False)
    for options in {}, {"offload": "none"}:
        with pytest.raises(
            ValueError, match=r"the model does not fit: .* available; use a machine"
        ):
            grok1.load(nano_path, mesh=(1, 2), progress=False, **options)


def test_impossible_wishes_are_refused(nano_path, offloaded, tmp_path):
    def refused(match, **options):
        with pytest.raises(ValueError, match=match):
            grok1.load(nano_path, progress=False, **options)

    refused("offload must be 'auto', 'none', 'host' or 'disk', found 'gpu'", offload="gpu")
    refused(
        r"offloading runs on one device, found mesh 1x2; give mesh=.1x1.$",
        offload="disk",
        mesh=(1, 2),
    )
    refused("given as a budget for offload='disk' or offload='auto'", offload="none", memory="16GB")
    refused(
        "^memory takes one device, as .* on disk, found it with mesh 1x2; give mesh='1x1' with it",
        memory="16GB",
        mesh=(1, 2),
    )
    on_disk = {"offload": "disk", "mesh": (1, 1)}
    refused("memory must be a number of GB above 0, as 16 or '16GB', found 'all'",
            memory="all", **on_disk)  # fmt: skip
    for wrong in -1, [4], {}:
        refused("memory must be a number of GB above 0", memory=wrong, **on_disk)
    refused(
        r"a memory budget of 1000000.00 GB is more than the .* available", memory=1e6, **on_disk
    )
    refused(r"a memory budget of 0\.0+ GB is too small: .* give at least", memory=1e-6, **on_disk)
    given = 1e-6
    for _ in range(3):
        with pytest.raises(ValueError, match="is too small") as caught:
            grok1.load(nano_path, memory=given, progress=False, **on_disk)
        found = re.fullmatch(
            r"a memory budget of (\d\.\d+) GB is too small: (\d\.\d+) GB have to be in memory, "
            r"0\.00 GB of them for keys and values; give at least (0\.\d\d\d) GB, or fewer or .*",
            str(caught.value),
        )
        assert found
        assert float(found[1]) < float(found[2]) <= float(found[3])
        given += 0.9 * (float(found[2]) - given)  # ever closer to enough
    grok1.load(nano_path, memory=found[3], progress=False, **on_disk)
    with pytest.raises(ValueError, match="save needs the whole model in memory"):
        grok1.save(offloaded, tmp_path / "saved")


def test_a_file_that_vanishes_is_one_error_and_not_the_end(copied, offloaded):
    model = with_room(offloaded, 2)
    prompt = list(range(20))
    before = model.generate(prompt, **GREEDY)
    gate = copied / "ckpt-0" / file_name(2)
    gate.rename(copied / "away")
    with pytest.raises(grok1.CheckpointError, match="tensor00002_000: cannot be read: No such"):
        model.generate(prompt, **GREEDY)
    assert threads() == []
    (copied / "away").rename(gate)
    assert model.generate(prompt, **GREEDY) == before


def times_of(path):
    return path.stat().st_atime_ns, path.stat().st_mtime_ns


def as_it_is(path):
    """A file as its header's reader has found it."""
    return SimpleNamespace(
        path=path, file_size=path.stat().st_size, modified=path.stat().st_mtime_ns
    )


@pytest.mark.parametrize("way", ["replaced", "written to"])
def test_another_file_of_the_same_size_is_an_error_and_not_its_tokens(copied, offloaded, way):
    path = copied / "ckpt-0" / file_name(3)
    whole, times = path.read_bytes(), times_of(path)
    try:
        if way == "replaced":
            path.with_name("new").write_bytes(whole)
            path.with_name("new").rename(path)
        else:
            path.write_bytes(whole)
        os.utime(path, ns=(0, times[1] + 1))
        with pytest.raises(grok1.CheckpointError, match="tensor00003_000: has been written to sin"):
            offloaded.generate([1, 2, 3], **GREEDY)
    finally:
        os.utime(path, ns=times)
    assert threads() == []
    offloaded.generate([1, 2, 3], **GREEDY)


@pytest.mark.parametrize("held", [0, 64])
def test_the_last_expert_is_written_to_while_it_is_computed_with(
    copied, offloaded, monkeypatch, held
):
    populate, populated, touched = mapping.Window.populate, [], {}

    def written_to(window, place):
        populate(window, place)
        populated.append(window)
        path = window._file.path
        if len(populated) == 2 * num_blocks:
            touched[path] = times_of(path)
            os.utime(path, ns=(0, touched[path][1] + 1))

    monkeypatch.setattr(mapping.Window, "populate", written_to)
    num_blocks = 0
    with_room(offloaded, held).logits([1])
    num_blocks = len(populated)
    try:
        with pytest.raises(grok1.CheckpointError, match="has been written to since its header"):
            with_room(offloaded, held).logits([1])
    finally:
        for path, times in touched.items():
            os.utime(path, ns=times)
    assert len(touched) == 1
    assert threads() == []


def test_a_file_that_is_cut_off_is_an_error(copied, offloaded):
    path = copied / "ckpt-0" / file_name(4)
    whole, times = path.read_bytes(), times_of(path)
    try:
        os.truncate(path, 1000)
        with pytest.raises(grok1.CheckpointError, match="tensor00004_000: has 1000 bytes, expec"):
            offloaded.generate([1, 2, 3], **GREEDY)
    finally:
        path.write_bytes(whole)
        os.utime(path, ns=times)
    assert threads() == []


def test_a_file_that_is_cut_off_after_it_was_mapped_is_an_error(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    window = mapping.Window(as_it_is(path), 5000, 900_000)
    os.truncate(path, 4096)
    [(_, place)] = window.blocks()
    with pytest.raises(grok1.CheckpointError, match="file: has 4096 bytes, expected the 1048576"):
        window.populate(place)
    window.close()


def test_a_file_that_cannot_be_mapped_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(10_000))

    def refused(*_, **__):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(mapping.mmap, "mmap", refused)
    with pytest.raises(grok1.CheckpointError, match="file: cannot be mapped: Cannot allocate mem"):
        mapping.Window(as_it_is(tmp_path / "file"), 5000, 100)


@pytest.mark.parametrize(
    ("offset", "nbytes"), [(5000, 90_000_000), (2 << 24, 1 << 24), ((1 << 24) - 1, 2), (0, 5)]
)
def test_a_window_is_populated_once_in_blocks_that_end_where_huge_pages_do(
    tmp_path, monkeypatch, offset, nbytes
):
    path, size = tmp_path / "file", 6 << 24
    with path.open("wb") as file:
        file.truncate(size)
    asked = {mapping._MADV_HUGEPAGE: [], mapping._MADV_POPULATE_READ: []}

    def advise(address, length, advice):
        asked[advice].append((address, length))
        return 0

    monkeypatch.setattr(mapping, "_madvise", advise)
    window = mapping.Window(as_it_is(path), offset, nbytes)
    for of_window, place in window.blocks():
        of_window.populate(place)
    [whole] = asked[mapping._MADV_HUGEPAGE]
    populated = asked[mapping._MADV_POPULATE_READ]
    ends = [address + length for address, length in populated]
    assert [address for address, _ in populated] == [whole[0], *ends[:-1]]
    assert ends[-1] == whole[0] + whole[1] == window.address + nbytes
    assert all((end - window.address + offset) % (1 << 24) == 0 for end in ends[:-1])
    assert all(0 < length <= 1 << 24 for _, length in populated)
    window.close()


@pytest.mark.parametrize("is_mapped", [True, False])
def test_a_disk_error_is_an_error(copied, offloaded, monkeypatch, is_mapped):
    monkeypatch.setattr(offloaded.engine.runner.store, "is_mapped", is_mapped)
    with_room(offloaded, 0)
    monkeypatch.setattr(mapping, "_madvise", lambda *_: errno.EFAULT)

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    monkeypatch.setattr(native, "is_available", lambda: False)
    with pytest.raises(grok1.CheckpointError, match=r"cannot be read at byte .*Input/output error"):
        offloaded.generate([1, 2, 3], **GREEDY)
    assert threads() == []
    assert mapped_files(str(copied)) == []


def test_interrupting_ends_within_a_layer_and_releases_everything(copied, monkeypatch):
    model = load(copied, 3)
    prompt = list(range(20))
    before = model.generate(prompt, **GREEDY)
    store, prepare = model.engine.runner.store, expert_store.ExpertStore._prepare
    asked, still_held = [], []

    def interrupt(self, key, in_use):
        asked.append(key)
        if key[0] == 5:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            assert self._cancelled.wait(timeout=10)
            # An impatient user's second one must not take from the program what it computes with.
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.2)
            still_held.append(self.lock.locked() and bool(self._pools))
        return prepare(self, key, in_use)

    # A shell may have started this process with the signal ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr(expert_store.ExpertStore, "_prepare", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.generate(prompt, **GREEDY)
    finally:
        signal.signal(signal.SIGINT, handler)
        monkeypatch.undo()
    assert max(asked)[0] == 5
    assert still_held
    assert all(still_held)
    assert threads() == []
    assert mapped_files(str(copied)) == []
    for module in (budget, runner):
        monkeypatch.setattr(module, "WORKING_BYTES", 0)
    assert model.generate(prompt, **GREEDY) == before
    buffers = [weakref.ref(buffer.matrices[0]) for buffer in store._cache._held.values()]
    assert len(buffers) == 3
    del model, store
    gc.collect()
    assert [buffer() for buffer in buffers] == [None] * 3


def test_a_long_prompt_shows_its_layers_on_a_terminal(offloaded, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    class Bar(progress.tqdm):
        def close(self):
            if not self.disable:
                reached.append(self.n)
            super().close()

    reached: list[int] = []
    monkeypatch.setattr(progress, "tqdm", Bar)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(announcement, "PATIENCE", 0)
    offloaded.generate(list(range(20)), **GREEDY)
    # A bar for each chunk of the prompt, none for tokens, and nothing left on the line.
    assert reached == [12] * offloaded.offload_stats.prompt.steps
    shown = sys.stderr.getvalue()
    assert re.search(r"prompt: .*/12 \[.*layer", shown)
    assert shown.split("\r")[-2].strip() == ""


def test_between_steps_nothing_is_mapped_and_no_thread_runs(copied, offloaded):
    offloaded.generate([1, 2, 3], **GREEDY)
    assert threads() == []
    assert mapped_files(str(copied)) == []


def test_two_threads_take_turns(offloaded, nano):
    with_room(offloaded, 3, batch=2)
    prompts = [[1, 2, 3], [60, 50, 40]]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda prompt: offloaded.generate(prompt, **GREEDY), prompts))
    assert found == [nano.generate(prompt, **GREEDY) for prompt in prompts]


def test_a_stopped_request_runs_no_further_token(offloaded):
    model = offloaded
    first = model.generate([1, 2, 3], max_new_tokens=1, temperature=0).tokens[0]
    steps = model.offload_stats.decode.steps
    model.generate([1, 2, 3], max_new_tokens=20, temperature=0, stop=[first])
    assert model.offload_stats.decode.steps == steps + 1


def test_the_stats_say_what_a_token_costs(offloaded):
    model = with_room(offloaded, 4)
    model.generate(list(range(20)), max_new_tokens=2, temperature=0)
    assert "s a chunk of the prompt" in str(model.offload_stats)
    assert str(model.offload_stats).endswith("4 of 96 experts in memory")
    assert "FetchedExperts" in str(jax.tree.structure(model.params))
