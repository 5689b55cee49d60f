"""Files to devices by the driver, whose place a stand-in takes: see `standin_driver`."""

import collections
import ctypes
import shutil
import threading
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest

import grok1
from grok1.checkpoint import blocks, carrying, loading, native, reading, sending
from grok1.checkpoint.blocks import Target
from grok1.checkpoint.reading import Reader
from grok1.checkpoint.tensor_file import open_unchanged
from grok1.files import CheckpointError
from grok1.machine import cuda_driver
from grok1.machine.cuda_driver import Copier, DriverError, copier_of, place_of
from grok1.nn.manifest import file_name
from tests.checkpoint import standin_driver
from tests.checkpoint.test_loading import spoil
from tests.checkpoint.test_reading import SHAPE, SLICES, stored
from tests.helpers import named_params, slow


@pytest.fixture
def library():
    return standin_driver.library()


@pytest.fixture(autouse=True)
def small_slots(monkeypatch):
    monkeypatch.setattr(sending, "_FREE", collections.deque())
    monkeypatch.setattr(sending, "_SLOT_BYTES", 48)  # two rows of an array, or three of a part's
    monkeypatch.setattr(blocks, "_SENT_BYTES", 110)  # five


@pytest.fixture(params=["native", "by the interpreter"])
def form(request, monkeypatch):
    """Native code does all that it can, or nothing."""
    if request.param != "native":
        monkeypatch.setattr(native, "is_available", lambda: False)
    elif not native.is_available():
        pytest.skip("no C++ compiler on this machine")
    before = native.spent().get("copying", 0.0)
    yield request.param
    has_sent = native.spent().get("copying", 0.0) > before
    assert has_sent <= (request.param == "native")


@pytest.fixture
def direct(library, monkeypatch):
    """Loads as to a GPU."""
    copiers = {device: Copier(library, device) for device in jax.local_devices()}
    monkeypatch.setattr(loading, "copier_of", copiers.get)
    monkeypatch.setattr(loading, "_adopts_memory", lambda device: False)
    monkeypatch.setattr(loading, "_MOST_IN_HOST", 1 << 12)  # norms alone
    monkeypatch.setattr(sending, "_SLOT_BYTES", 1 << 11)
    monkeypatch.setattr(blocks, "_SENT_BYTES", 1 << 13)


def on_device(array: np.ndarray) -> jax.Array:
    # Of a copy: JAX may take the memory of what it is given.
    return jax.block_until_ready(jax.device_put(array.copy(), jax.local_devices()[0]))


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("dtype", [np.int8, np.float32], ids=["as it is", "converted"])
@pytest.mark.parametrize("slices", SLICES.values(), ids=SLICES)
def test_every_slice_arrives(slices, dtype, transposed, library, form, tmp_path):
    values = np.arange(np.prod(SHAPE)).astype(np.int8).reshape(SHAPE)
    array = stored(tmp_path, values, transposed, apart=transposed)
    copier = Copier(library, jax.local_devices()[0])
    sizes = [[stop - start for start, stop in bounds] for bounds in slices]
    outs = [on_device(np.full((2, *size), 55, dtype)) for size in sizes]
    placed = []
    with Reader(placed.append) as reader:
        targets = [
            Target(bounds, place_of(out)[1], copier)
            for bounds, out in zip(slices, outs, strict=True)
        ]
        reader.submit(array, targets)
        reader.wait()
        for bounds, out in zip(slices, outs, strict=True):
            np.testing.assert_array_equal(out[1], values[tuple(slice(*pair) for pair in bounds)])
            assert (np.asarray(out[0]) == 55).all()
        assert reader.bytes_read == sum(
            np.prod([stop - start for start, stop in bounds]) for bounds in set(slices)
        )
    assert sum(placed) == sum(out[1].nbytes for out in outs)


def test_vectors_rows_longer_than_a_slot_and_wider_types(library, form, tmp_path):
    copier = Copier(library, jax.local_devices()[0])
    vector = np.linspace(-1, 1, 70).astype(ml_dtypes.bfloat16)
    matrix = np.arange(5 * 90).astype(np.int16).reshape(5, 90).astype(np.float32)
    narrow = matrix[:, :6].copy()
    outs = [on_device(np.zeros(shape, np.float32)) for shape in (40, (5, 31), (5, 59), (5, 4))]
    for name in ("vector", "matrix", "narrow"):
        (tmp_path / name).mkdir()
    with Reader(lambda _: None) as reader:
        for name, values, wanted in (
            ("vector", vector, {0: ((10, 50),)}),
            ("matrix", matrix, {1: ((0, 5), (0, 31)), 2: ((0, 5), (31, 90))}),
            ("narrow", narrow, {3: ((0, 5), (2, 6))}),
        ):
            array = stored(tmp_path / name, values)
            targets = [
                Target(bounds, place_of(outs[number]), copier) for number, bounds in wanted.items()
            ]
            reader.submit(array, targets)
        reader.wait()
    np.testing.assert_array_equal(outs[0], vector[10:50].astype(np.float32))
    np.testing.assert_array_equal(np.concatenate(outs[1:3], axis=1), matrix)
    np.testing.assert_array_equal(outs[3], narrow[:, 2:])


def test_columns_of_a_place_are_filled_and_nothing_beside_them(library, tmp_path, form):
    values = np.arange(np.prod(SHAPE)).astype(np.int8).reshape(SHAPE)
    copier = Copier(library, jax.local_devices()[0])
    out = on_device(np.full((14, 40), 55, np.int8))
    with Reader(lambda _: None) as reader:
        target = Target(((1, 2), (0, 14), (0, 22)), place_of(out)[None, :, 7:29], copier)
        reader.submit(stored(tmp_path, values), [target])
        reader.wait()
    expected = np.full((14, 40), 55, np.int8)
    expected[:, 7:29] = values[1]
    np.testing.assert_array_equal(out, expected)


def test_a_block_is_read_while_what_was_read_before_is_copied(library, tmp_path, form):
    values = np.arange(4 * 22).astype(np.int8).reshape(1, 4, 22)  # two slots of two rows
    copier = Copier(library, jax.local_devices()[0])
    out = on_device(np.zeros((4, 22), np.int8))
    array = stored(tmp_path, values)
    target = Target(((0, 1), (0, 4), (0, 22)), place_of(out)[None], copier)
    (block,) = blocks.blocks(array, [target])
    sender = sending.Sender()
    with open_unchanged(block.file) as descriptor:
        sender.send(block, descriptor)
    assert sorted(size for copies in library.waiting.values() for *_, size in copies) == [44, 44]
    sender.wait()
    np.testing.assert_array_equal(out, values[0])


def test_what_is_read_is_looked_at_once_at_its_place(library, tmp_path):
    values = np.arange(np.prod(SHAPE)).astype(np.int8).reshape(SHAPE)
    bounds = ((1, 3), (3, 9), (5, 16))
    for name, copier in (("host", None), ("device", Copier(library, jax.local_devices()[0]))):
        for transposed in (False, True):
            (path := tmp_path / f"{name}{transposed}").mkdir()
            array = stored(path, values, transposed, apart=transposed)
            out = on_device(np.zeros((2, 6, 11), np.int8))
            seen, lock = np.zeros(SHAPE, int), threading.Lock()

            def look(part, origin, seen=seen, lock=lock):
                place = tuple(origin[:-2]) + tuple(
                    slice(start, start + size)
                    for start, size in zip(origin[-2:], part.shape, strict=True)
                )
                np.testing.assert_array_equal(part, values[place])
                with lock:
                    seen[place] += 1

            where = place_of(out) if copier else np.zeros((2, 6, 11), np.int8)
            with Reader(lambda _: None) as reader:
                reader.submit(array, [Target(bounds, where, copier)], look)
                reader.wait()
            inside = np.zeros(SHAPE, int)
            inside[tuple(slice(*pair) for pair in bounds)] = 1
            np.testing.assert_array_equal(seen, inside)


@pytest.mark.parametrize("mesh", [(1, 1), (1, 2), pytest.param((2, 4), marks=slow)])
def test_the_loaded_model_is_the_same(mesh, direct, form, nano_path, nano):
    built = grok1.load(nano_path, mesh=mesh, progress=False)
    for found, expected in zip(
        jax.tree.leaves(named_params(built)), jax.tree.leaves(named_params(nano)), strict=True
    ):
        np.testing.assert_array_equal(found, np.asarray(expected))


def test_the_embedding_is_halved_on_its_way(direct, nano_path, nano):
    model = grok1.load(nano_path, mesh=(1, 2), embedding_dtype="bfloat16", progress=False)
    expected = np.asarray(nano.params.embedding).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(model.params.embedding), expected)


def test_a_part_of_a_place_holds_the_array():
    array = on_device(np.zeros((4, 5), np.int8))
    held, part = weakref.ref(array), place_of(array)[1:, 2:]
    del array
    assert held() is not None
    assert part.shape == (3, 3)
    del part
    assert held() is None


def test_a_load_has_no_other_arrays_than_it_returns(direct, nano_path, monkeypatch):
    # Nor does anything else know them that could see them change.
    made, compiled = [], loading.Programs.empty
    monkeypatch.setattr(
        loading.Programs, "empty", lambda self, stack: made.append(stack) or compiled(self, stack)
    )
    model = grok1.load(nano_path, mesh=(1, 1), progress=False)
    arrays = {id(leaf) for leaf in jax.tree.leaves(model.params)}
    held = {stack.array.unsafe_buffer_pointer() for stack in made}
    shards = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(model.params)]
    assert held <= {shard.unsafe_buffer_pointer() for shard in shards}
    assert len(held) == len(set(made)) < len(arrays)


def test_what_the_host_makes_is_on_its_way_before_the_rest_is_read(direct, nano_path, monkeypatch):
    order = []

    def noting(owner, name):
        function = getattr(owner, name)

        def noted(*arguments):
            order.append(name)
            return function(*arguments)

        monkeypatch.setattr(owner, name, noted)

    for owner, name in (
        (loading, "_fill_devices"),
        (loading, "_read_scales"),
        (loading, "_placed"),
        (carrying.DirectCarrier, "finish"),
    ):
        noting(owner, name)
    grok1.load(nano_path, mesh=(1, 2), progress=False)
    # Readers are busy when small arrays come, and while they are made.
    assert order.index("_fill_devices") < order.index("_read_scales")
    placed = [i for i, name in enumerate(order) if name == "_placed"]
    assert placed
    assert placed[-1] < order.index("finish")


def test_what_is_not_finite_is_named_by_its_place(direct, form, nano_path, tmp_path):
    path = spoil(nano_path, tmp_path, "embeddings", "nan")
    with pytest.raises(grok1.CheckpointError, match=rf"^{path}: .* nan at \[127, 63\]"):
        grok1.load(tmp_path, progress=False, mesh=(1, 2))


def test_a_file_that_vanishes_is_an_error_and_nothing_is_copied_afterwards(
    direct, library, nano_path, tmp_path, monkeypatch, form
):
    shutil.copytree(nano_path, tmp_path / "nano")
    fill = loading._fill_devices

    def remove_and_fill(*arguments):
        (tmp_path / "nano" / "ckpt-0" / file_name(50)).unlink(missing_ok=True)
        return fill(*arguments)

    monkeypatch.setattr(loading, "_fill_devices", remove_and_fill)
    with pytest.raises(CheckpointError, match="tensor00050_000: cannot be read: No such"):
        grok1.load(tmp_path / "nano", mesh=(1, 2), progress=False)
    assert not any(library.waiting.values())


def test_an_interrupt_ends_with_nothing_under_way(direct, library, nano_path, monkeypatch, form):
    send, calls = sending.Sender.send, []

    def note(*arguments):
        calls.append(arguments)
        return send(*arguments)

    def interrupt(self):
        if len(calls) > 20:
            raise KeyboardInterrupt
        return collect(self)

    collect = reading.Reader._collect
    monkeypatch.setattr(sending.Sender, "send", note)
    monkeypatch.setattr(reading.Reader, "_collect", interrupt)
    with pytest.raises(KeyboardInterrupt):
        grok1.load(nano_path, mesh=(1, 2), progress=False)
    assert not any(library.waiting.values())
    assert not [thread for thread in threading.enumerate() if "grok1-reader" in thread.name]


def test_the_next_load_takes_the_same_memory(direct, form, nano_path, monkeypatch):
    pinned, sizes = Copier.pinned, []
    monkeypatch.setattr(
        Copier, "pinned", lambda self, size: sizes.append(size) or pinned(self, size)
    )
    grok1.load(nano_path, mesh=(1, 2), progress=False)
    most = 2 * reading._num_threads()
    assert 0 < len(sizes) <= most
    grok1.load(nano_path, mesh=(1, 2), progress=False)
    assert len(sizes) <= most
    assert len(sending._FREE) <= most


@pytest.mark.parametrize(
    "refused",
    ["cuMemcpyHtoDAsync_v2", "cuMemcpy2DAsync_v2", "cuStreamSynchronize", "cuCtxSetCurrent"],
)
def test_a_copy_that_is_refused_is_an_error(refused, nano_path, form, direct, monkeypatch):
    library = standin_driver.library(refused)
    refusing = {d: Copier(library, d) for d in jax.local_devices()}
    monkeypatch.setattr(loading, "copier_of", refusing.get)
    if form == "native":  # which does not ask the driver again
        monkeypatch.setattr(sending, "_send_rows", None)
    with pytest.raises(DriverError, match=f"{refused} of CUDA's driver failed with error 700"):
        grok1.load(nano_path, mesh=(1, 2), progress=False)


class Nvidia:
    """A CPU's device that says it is another."""

    platform, compute_capability = "gpu", "9.0"

    def __str__(self):
        return "cuda:0"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, None),
        ({"refuse": "cuInit"}, "cuInit of CUDA's driver failed with error 700"),
        ({"refuse": "cuMemHostAlloc"}, "cuMemHostAlloc of"),
        ({"damage": True}, "what was copied is not what arrived"),
        (None, "libcuda.so.1: cannot open"),
    ],
    ids=["good", "no driver", "no memory", "damaged", "no library"],
)
def test_a_device_is_copied_to_by_a_driver_that_was_tried(options, problem, monkeypatch, capfd):
    def load_library(name):
        if options is None:
            raise OSError(f"{name}: cannot open shared object file")
        return standin_driver.library(**options)

    device, put = Nvidia(), jax.device_put
    monkeypatch.setattr(ctypes, "CDLL", load_library)
    monkeypatch.setattr(jax, "device_put", lambda array, to: put(array, jax.local_devices()[0]))
    cuda_driver.hint.cache_clear()
    copier = copier_of(device)
    said = capfd.readouterr().err
    if problem is None:
        assert isinstance(copier, Copier)
        assert said == ""
    else:
        assert copier is None
        assert said.startswith("grok1: copying to cuda:0 through JAX, which is slower: " + problem)
        assert said.count("\n") == 1


def test_only_nvidias_devices_have_one_unless_it_is_turned_off(monkeypatch):
    assert copier_of(jax.local_devices()[0]) is None
    other = Nvidia()
    other.compute_capability = "gfx942"
    assert copier_of(other) is None
    monkeypatch.setenv("GROK1_NATIVE", "0")
    assert copier_of(Nvidia()) is None
