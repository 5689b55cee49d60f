"""`grok1.plan` and `python -m grok1 plan`."""

import dataclasses
import json
import pathlib
import re
import types

import jax
import numpy as np
import pytest

import grok1
from grok1.__main__ import main
from grok1.care.conversion import convert
from grok1.checkpoint.directory import open_tensors
from grok1.config import GROK_1, TOY
from grok1.engine.head_copies import LEFT_FREE
from grok1.files import CheckpointError
from grok1.nn.sharding import abstract_mesh
from grok1.planning import devices, planning, report
from grok1.planning.memory import abstract_engine, fewest_devices, released_weights
from tests.conftest import TOY as TOY_PATH
from tests.helpers import slow

ROOM = {"working": 210_000_000, "largest_batch": 32, "largest_context": 8192}


@pytest.fixture
def compiled(monkeypatch):
    """Stands in for the child process; holds the rooms that it was asked about."""
    asked = []

    def compile_nothing(engine, tensors, mesh, shape, rooms, platform):
        asked.append(rooms)
        return ROOM

    monkeypatch.setattr(planning, "_compile", compile_nothing)
    return asked


def test_the_bound_on_the_speed_is_what_a_token_reads(compiled, capsys):
    assert main(["plan", "--devices", "8", "--memory", "80", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    dim, width, layers = 6144, 32768, 64
    experts = 2 * 3 * dim * width
    attention = 2 * dim * dim + 2 * dim * 1024
    head = 131072 * (dim + 8)  # the copy in int8, with a scale and a bound for each row
    cache = 2 * layers * 8192 * 1024 * 2
    expected = (layers * (experts + attention) + head + cache) / 8
    # Above it are scales, norms and the router.
    assert expected <= found["decode_bytes"] <= 1.005 * expected
    h100 = next(estimate for estimate in found["estimates"] if estimate["name"] == "H100 SXM")
    assert h100["tokens_per_second"] == pytest.approx(3350e9 / found["decode_bytes"])
    fits = {estimate["name"]: estimate["fits"] for estimate in found["estimates"]}
    assert fits["H200 SXM"]
    assert not fits["TPU v6e"]


def test_what_does_not_fit_as_asked_says_what_does(compiled):
    text = "\n".join(grok1.plan(devices=8, memory=45, batch=32).lines())
    assert "It does not fit: " in text
    assert "A smaller batch or context does, or perhaps --cache-dtype int8." in text
    assert (
        "Largest batch at context 8192 with 95% of the memory: all 32 that run side by side;\n"
        "largest context at batch 32: the model's whole 8192." in text
    )


def test_what_fits_only_beyond_three_quarters_says_what_to_set(compiled, monkeypatch):
    found = grok1.plan(devices=8, memory=48)
    assert not found.fits
    assert found.needed_share == 0.95
    usual, most = compiled[0]
    assert usual < 0 < most == int(0.95 * 48e9 - found.weights_bytes)
    text = "\n".join(found.lines())
    assert "It fits only where JAX takes more: set XLA_PYTHON_CLIENT_MEM_FRACTION=.95." in text
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".95")
    again = grok1.plan(devices=8, memory=48)
    assert again.fits
    assert again.needed_share is None


def test_too_few_devices_are_told_how_many_would_do(compiled, monkeypatch):
    monkeypatch.setitem(ROOM, "largest_batch", 0)
    monkeypatch.setitem(ROOM, "largest_context", 0)
    found = grok1.plan(devices=4, memory=80)
    assert found.fewest_devices == 8
    assert "8 devices of this memory would hold the weights." in found.lines()
    small = grok1.plan(devices=4, memory=2)
    assert small.fewest_devices is None
    assert "Devices with more memory are needed." in small.lines()
    host = grok1.plan(devices=4, device="cpu", memory=80, mesh=(1, 4))
    total = f"{4 * host.needed_bytes / 1e9:.2f}"
    assert f"The machine needs {total} GB of memory for this." in host.lines()
    weights = released_weights(GROK_1)
    engine = abstract_engine(weights, GROK_1, abstract_mesh((1, 1)), "bfloat16")
    assert fewest_devices(weights, engine, "gpu", 21e9) == 16


@pytest.mark.parametrize(("device", "usable"), [("tpu-v5p", 95e9), ("h200", 0.75 * 141e9)])
def test_only_gpus_are_preallocated(compiled, device, usable):
    found = grok1.plan(TOY, devices=8, device=device)
    assert found.usable_bytes == int(usable)


def test_a_cpu_shares_its_memory_and_bandwidth_between_devices(compiled):
    found = grok1.plan(TOY, device="cpu", devices=4, memory=400, bandwidth=200, mesh=(1, 2))
    assert found.memory_bytes == 200e9
    assert (found.dtype, found.cache_dtype) == ("float32", "float32")
    (estimate,) = found.estimates
    assert estimate.tokens_per_second == pytest.approx(100e9 / found.decode_bytes)
    # A GPU's is its own, however many of them are used.
    assert grok1.plan(TOY, devices=4, memory=80, mesh=(1, 2)).memory_bytes == 80e9
    silent = grok1.plan(TOY, device="cpu", memory=400)
    assert not silent.estimates
    assert "--bandwidth" in silent.lines()[-2]


def test_the_devices_present_are_the_default(compiled, monkeypatch):
    monkeypatch.setattr(devices, "host_bytes_available", lambda: 16 * 10**9)
    found = grok1.plan(TOY)
    assert found.num_devices == len(jax.devices())
    assert found.memory_bytes * found.num_devices == 16e9
    stats = {"bytes_limit": 60 * 10**9, "bytes_in_use": 0}
    gpu = types.SimpleNamespace(platform="cuda", process_index=0, memory_stats=lambda: stats)
    assert grok1.plan(TOY, devices=[gpu]).memory_bytes == 80e9
    gpu.memory_stats = lambda: None
    with pytest.raises(ValueError, match=r"memory of a device is not known; give memory= \(GB\)"):
        grok1.plan(TOY, devices=[gpu])


def test_on_gpus_the_heads_copy_is_planned_where_it_is_made(compiled, monkeypatch):
    config = {"devices": 8, "device": "h100", "context": 256}
    copy = 131072 // 8 * (6144 + 8)

    def planned(memory, **options):
        found = grok1.plan(memory=memory, **config | options)
        return found.working_bytes - ROOM["working"], found

    made, found = planned(80)
    assert made == copy
    # Just enough stays free beside it, and not quite.
    enough = (found.weights_bytes + found.cache_bytes + copy + LEFT_FREE) / 0.75e9
    assert planned(enough + 0.01)[0] == copy
    without, tight = planned(enough - 0.01)
    assert without == 0
    assert tight.decode_bytes - found.decode_bytes == 131072 // 8 * 4 * 6144 - copy
    # A bfloat16 head has no copy; more rows than the kernels take read the head.
    assert planned(80, embedding_dtype="bfloat16")[0] == 0
    made, many = planned(80, batch=16)
    assert made == copy
    few = planned(80, batch=8)[1]
    monkeypatch.setenv("GROK1_NATIVE", "0")
    assert planned(80)[0] == 0
    assert planned(80, batch=16)[1].decode_bytes == many.decode_bytes
    assert planned(80, batch=8)[1].decode_bytes > few.decode_bytes


def test_beyond_one_device_a_head_only_its_own_key_columns_are_read():
    eight, sixteen = (
        abstract_engine(released_weights(GROK_1), GROK_1, abstract_mesh((1, n)), "bfloat16")
        for n in (8, 16)
    )
    read = [planning._decode_bytes(engine, 1, 256, 0) for engine in (eight, sixteen)]
    # Half of everything, but for two matrices of one head in each layer and the router.
    assert read[0] / 2 < read[1] < read[0] / 2 + 64 * 2 * 6144 * 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": []}, "devices must be at least one of JAX's devices, found none"),
        ({"layers": 0}, "layers must be from 1 to 6, found 0"),
        ({"devices": 0}, "devices must be a whole number above 0, found 0"),
        ({"memory": -1, "devices": 8}, "memory must be a number above 0, found -1"),
        ({"disk": 0, "devices": 8}, "disk must be a number above 0, found 0"),
        ({"memory": "80", "devices": 8}, "memory must be a number above 0, found '80'"),
        (
            {"memory": 1e300, "devices": 8},
            "memory must be in GB, from 1e-09 to 1e.09, found 1e.300",
        ),
        ({"disk": 5e-324, "devices": 8}, "disk must be in GB, from 1e-09 to 1e.09, found 5e-324"),
        (
            {"memory": 80, "devices": 1 << 20},
            "has 1048576 devices, and programs can be compiled for",
        ),
        ({"devices": 8.0}, "devices must be a whole number above 0, found 8.0"),
        ({"batch": 2.5}, "batch must be between 1 and 32, .* found 2.5"),
        ({"context": 2.5}, "context must be between 1 and 1024, the model's, found 2.5"),
        ({"batch": 33}, "batch must be between 1 and 32, the most prompts that run side by side"),
        ({"context": 1025}, "context must be between 1 and 1024, the model's, found 1025"),
        ({"device": "k80"}, "device must be one of a100-80, h100, .*, cpu, found 'k80'"),
        ({"devices": 8}, r"memory of a device is not known; give memory= \(GB\), or device=,"),
        ({"devices": 8, "memory": 80, "mesh": (1, 16)}, "mesh 1x16 needs 16 devices, found 8"),
        ({"devices": 3, "memory": 80, "mesh": (1, 3)}, "mesh 1x3 does not divide the model"),
        ({"devices": 8, "memory": 80, "dtype": "int4"}, 'dtype must be "float32" or "bfloat16"'),
        ({"devices": 8, "memory": 80, "cache_dtype": "int4"}, "cache_dtype must be"),
    ],
    ids=str,
)
def test_impossible_plans_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        grok1.plan(TOY, **options)


def test_a_failed_compilation_says_why(monkeypatch):
    monkeypatch.setattr(planning.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended with status 1: it said nothing"):
        grok1.plan(TOY, devices=1, memory=1)


def test_the_command_prints_a_table_for_another_model(compiled, capsys):
    assert main(["plan", str(TOY_PATH), "--devices", "2", "--memory", "1", "--batch", "3"]) == 0
    text = capsys.readouterr().out
    assert "weights on 2 devices (GPU), mesh 1x2,\nproducts in bfloat16, cache in float16" in text
    assert "cache of 1024 positions, batch 4" in text
    assert "2 x H100 SXM" in text
    assert all(len(line) <= 100 for line in text.splitlines())
    assert main(["plan", str(TOY_PATH / "absent"), "--devices", "2"]) == 1
    assert "absent: there is no such directory" in capsys.readouterr().err


def test_small_models_are_told_in_small_units(compiled, monkeypatch):
    monkeypatch.setitem(ROOM, "working", 4096)
    found = grok1.plan(TOY, devices=2, memory=1)
    text = str(found)
    sizes = [line[40:].strip() for line in text.split("on each device\n")[1].splitlines()[:5]]
    weights, cache, needed = found.weights_bytes, found.cache_bytes, found.needed_bytes
    assert sizes == [
        f"{weights / 1e6:.2f} MB",
        f"{cache / 1e3:.2f} kB",
        "4.10 kB",
        f"{needed / 1e6:.2f} MB",
        "750.00 MB",
    ]
    assert " 0.00 " not in text
    assert report._size(999) == "999 bytes"
    # One unit for all where it shows all.
    monkeypatch.setitem(ROOM, "working", 210_000_000)
    large = str(grok1.plan(devices=8, memory=80))
    assert "GB\n  weights                                    39.80\n" in large


def test_what_does_not_fit_has_no_speed(compiled):
    found = grok1.plan(devices=8, memory=80)
    speeds = {estimate.name: estimate.tokens_per_second for estimate in found.estimates}
    assert speeds["TPU v6e"] is None
    assert speeds["A100 80GB SXM"] > 100
    text = str(found)
    assert "  8 x TPU v6e               32    1638      no           -" in text
    assert "An upper bound: the time to read 10.76 GB" in text
    nowhere = str(grok1.plan(devices=1, memory=80))
    assert "An upper bound" not in nowhere
    assert "\nIt would read 88.37 GB on each device for a step of decoding.\n" in nowhere
    # What fits once more is taken of a GPU's memory has one.
    raised = grok1.plan(devices=8, memory=48, bandwidth=1000).estimates[0]
    assert (raised.needed_share, raised.tokens_per_second > 0) == (0.95, True)


@pytest.mark.parametrize(
    ("number", "mesh", "wider"), [(7, (7, 1), (1, 4)), (12, (3, 4), (1, 8)), (24, (3, 8), (1, 16))]
)
def test_devices_that_cannot_share_one_model_are_told(compiled, number, mesh, wider):
    found = grok1.plan(devices=number, memory=80)
    assert (found.mesh, found.wider_mesh) == (mesh, wider)
    each = f"each {mesh[1]} of them hold" if mesh[1] > 1 else "each of them holds"
    assert (
        f"The model does not divide over {number} devices: {each} a whole copy;\n"
        f"--mesh {wider[0]}x{wider[1]} shares one among {wider[1]}.\n" in str(found)
    )
    assert grok1.plan(devices=number, memory=80, mesh=mesh).wider_mesh is None
    assert grok1.plan(devices=8, memory=80).wider_mesh is None


def test_a_plan_prints_as_its_table(compiled):
    found = grok1.plan(TOY, devices=2, memory=1)
    assert str(found) == "\n".join(found.lines())
    assert repr(found).startswith("Plan(fits, ")
    assert repr(found).endswith(" MB needed of 750.00 MB on each of 2 devices, mesh 1x2 gpu)")
    assert found._repr_html_().startswith("<pre>4 million weights on 2 devices (GPU), mesh 1x2,")


def _but_for_working_memory(text: str) -> str:
    """Without the digits in which versions of XLA differ: tenths of a GB of working memory."""
    return re.sub(
        r"(working memory +|needed +|with )(\d+\.\d)\d",
        lambda found: f"{found[1]}{round(float(found[2]))}",
        text,
    )


@slow
def test_the_readme_shows_what_is_printed(on_eight_gpus):
    found = on_eight_gpus
    fields = {field.name for field in dataclasses.fields(report.Plan)}
    read = {name: value for name, value in found.items() if name in fields}
    estimates = tuple(report.Estimate(**estimate) for estimate in found["estimates"])
    text = str(report.Plan(**read | {"estimates": estimates}))
    shown = "".join(f"    {line}\n" if line else "\n" for line in text.splitlines())
    root = pathlib.Path(grok1.__file__).parent.parent
    for page in ("README.md", "docs/running-grok-1.md"):
        written = (root / page).read_text()
        assert _but_for_working_memory(shown) in _but_for_working_memory(written), page


def test_a_plan_round_trips_through_json(compiled):
    found = grok1.plan(TOY, devices=2, memory=1)
    read = json.loads(json.dumps(found.to_dict()))
    names = {field.name for field in dataclasses.fields(found)}
    assert set(read) == names | {"needed_bytes"}
    assert read["needed_bytes"] == found.weights_bytes + found.cache_bytes + found.working_bytes


def test_a_plan_of_a_directory_counts_what_load_holds(compiled, tmp_path, capsys, monkeypatch):
    path = tmp_path / "bf"
    convert(TOY_PATH, path, to="safetensors", dtype="bfloat16", progress=False)
    for options in {}, {"layers": 2, "embedding_dtype": "bfloat16"}:
        found = grok1.plan(checkpoint=path, device="cpu", memory=1, mesh=(1, 1), **options)
        model = grok1.load(path, mesh=(1, 1), progress=False, **options)
        assert found.weights_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
        assert found.num_weights == sum(np.prod(spec.shape) for spec in model.tensors)
    whole = grok1.plan(checkpoint=path, device="cpu", memory=1)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert grok1.plan(checkpoint="~/bf", device="cpu", memory=1) == whole
    stored, _ = open_tensors(path, TOY)
    assert whole.checkpoint_bytes == sum(tensor.values.nbytes for tensor in stored)
    assert grok1.plan(checkpoint=path, device="cpu", memory=0.001).streaming is None
    capsys.readouterr()
    (path / "model.safetensors.index.json").write_text("{}")
    damaged = grok1.plan(checkpoint=path, device="cpu", memory=1)
    assert damaged.weights_bytes < whole.weights_bytes
    said = capsys.readouterr().err
    assert "model.safetensors.index.json: expected a weight_map" in said
    assert said.endswith(
        "until the files are whole, the plan counts weights as released, in int8\n"
    )


def test_a_plan_of_a_directory_that_is_not_there_is_none_of_what_was_released(tmp_path):
    for config in None, TOY:
        with pytest.raises(CheckpointError, match="absent: there is no such directory"):
            grok1.plan(config, checkpoint=tmp_path / "absent", device="cpu", memory=1)


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_weights_that_are_asked_for_are_counted_whatever_a_directory_has(
    compiled, tmp_path, weights
):
    convert(TOY_PATH, tmp_path / "bf", to="safetensors", dtype="bfloat16", progress=False)
    options = {"device": "cpu", "memory": 1, "weights": weights}
    of_files = grok1.plan(checkpoint=tmp_path / "bf", **options)
    as_released = grok1.plan(TOY, **options)
    assert (of_files.weights_bytes == as_released.weights_bytes) == (weights is not None)
    assert (of_files.checkpoint_bytes == as_released.checkpoint_bytes) == (weights is not None)


def test_a_plan_of_a_configuration_alone_says_nothing(compiled, tmp_path, capsys):
    (tmp_path / "config.json").write_text(TOY.to_json())
    grok1.plan(checkpoint=tmp_path, device="cpu", memory=1)
    assert capsys.readouterr().err == ""


def test_the_types_in_memory_are_compiled(monkeypatch):
    asked = []

    def run(command, **options):
        asked.append(json.loads(command[-1]))
        return types.SimpleNamespace(
            returncode=0, stdout=json.dumps(ROOM | {"figures": []}), stderr=""
        )

    monkeypatch.setattr(planning.subprocess, "run", run)
    grok1.plan(TOY, devices=1, memory=1, layers=3, embedding_dtype="bfloat16")
    assert asked[0]["config"]["num_layers"] == 3
    kinds = {name: (dtype, scales) for name, _, dtype, scales in asked[0]["tensors"]}
    assert kinds["language_model/in_out_embed/embeddings"] == ("bfloat16", None)


def test_the_first_layers_of_the_real_model_fit_where_all_do_not(compiled):
    assert not grok1.plan(devices=1, device="h100").fits
    found = grok1.plan(devices=1, device="h100", layers=8)
    assert found.fits
    assert found.checkpoint_bytes == pytest.approx(8 / 64 * 315e9 + 3.2e9, rel=0.01)
    with pytest.raises(ValueError, match="layers must be from 1 to 64, found 65"):
        grok1.plan(devices=1, device="h100", layers=65)


def test_what_is_measured_is_said_and_what_is_given_is_not_measured(compiled, monkeypatch):
    monkeypatch.setattr(planning, "file_bandwidth", lambda arrays: 3e9)
    monkeypatch.setattr(planning, "memory_bandwidth", lambda: 20e9)
    options = {"checkpoint": TOY_PATH, "device": "cpu", "memory": 0.001}
    streaming = grok1.plan(**options).streaming
    assert (streaming.files, streaming.memory) == (3, 20)
    assert streaming.note("files") == streaming.note("memory") == " (measured here)"
    streaming = grok1.plan(**options, disk=5, bandwidth=50).streaming
    assert (streaming.files, streaming.memory, streaming.measured) == (5, 50, ())


def test_a_cpu_too_small_is_told_how_it_would_run_from_disk(compiled):
    found = grok1.plan(device="cpu", memory=24, context=256, disk=2.0)
    streaming = found.streaming
    assert not found.fits
    assert streaming.budget_bytes == 19.2e9
    # 64 layers of two experts of 604 MB, but for those that fit beside 10.9 GB.
    assert streaming.least_bytes == pytest.approx(11.1e9, rel=0.02)
    assert streaming.num_held == 13
    assert streaming.read_bytes == pytest.approx(128 * 603979776 * (1 - 13 / 512))
    assert streaming.seconds == pytest.approx(
        streaming.read_bytes / 2e9 + found.decode_bytes / streaming.memory / 1e9
    )
    lines = "\n".join(found.lines())
    assert f"(--offload disk --memory 19.2GB) it runs: {streaming.seconds:.3g} s a token" in lines
    assert found.to_dict()["streaming"]["num_held"] == 13
    assert streaming.measured == ("memory",)
    assert "from files at 2 GB/s, and memory at" in "\n".join(found.lines())
    # The budget that is named is one that load takes.
    assert (
        streaming._replace(budget_bytes=11_440_000_000, least_bytes=11_432_100_000).budget == 11.433
    )
    given = grok1.plan(device="cpu", memory=24, context=256, bandwidth=100)
    assert (given.streaming.files, given.streaming.memory) == (2, 100)
    assert given.streaming.measured == ()
    assert "from files at 2 GB/s, and memory at 100 GB/s." in "\n".join(given.lines())
    small = grok1.plan(device="cpu", memory=8, context=256)
    assert "With its experts on disk it takes 10.94 GB at least" in "\n".join(small.lines())
    assert grok1.plan(device="cpu", memory=400, context=256).streaming is None


def test_long_times_and_large_memories_are_shown_without_exponents(compiled):
    found = grok1.plan(TOY, device="cpu", devices=1, memory=1, bandwidth=100)
    slow = report.Streaming(13 * 10**9, 11 * 10**9, 0, 77 * 10**9, 0.05, 1234.5, (), 1536.4)
    large = report.Estimate("yours", 1152.0, 1000.0, True, None, 11.4)
    shown = dataclasses.replace(
        found, load_seconds=6364.8, disk=0.05, streaming=slow, estimates=(large,)
    )
    lines = "\n".join(shown.lines())
    assert "it runs: 1,536 s a token,\n" in lines
    assert " from files at 0.05 GB/s, and memory at 1,234 GB/s.\n" in lines
    assert "Loading takes 6,365 s if the disk delivers 0.05 GB/s" in lines
    assert "  1 x yours              1,152    1000     yes        11.4" in lines
    assert "e+" not in lines
