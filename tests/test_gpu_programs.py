"""What is compiled for NVIDIA GPUs, without one: `tools/gpu_programs.py`.

It takes the wheels of JAX's plugin for CUDA, 1 GB, which an environment for tests may do without.
"""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from grok1.checkpoint import carrying
from grok1.config import GROK_1
from grok1.engine import graphs
from grok1.engine.head_copies import table_bytes
from grok1.ops import forms
from grok1.ops.cpu import bindings
from grok1.ops.cuda import build, presence
from grok1.ops.layers import exact_einsum, split_terms
from tools import gpu_programs
from tools.abstract_steps import lowered

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")

SEQUENCE = """\
000: kCommandBuffer [source | sink]
    001: kCopy         [source       | next=002 (1)] kCopy
    002: kCustomKernel [prev=001 (1) | next=003 (1)] loop_add_fusion grid: [1, 1, 1]
    003: kWhile        [prev=002 (1) | next=010 (1)]
condition:
        004: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1]
      body:
        005: kCustomKernel [source       | next=006 (1)] grok1_norm grid: [1, 1, 1]
        006: kAllReduce    [prev=005 (1) | next=007 (1)] kAllReduce
        007: kWhile        [prev=006 (1) | sink        ]
condition:
            008: kCustomKernel [source | sink] wrapped_compare grid: [1, 1, 1]
          body:
            009: kCustomKernel [source | sink] loop_multiply_fusion grid: [1, 1, 1]
    010: kCustomKernel [prev=003 (1) | sink        ] head grid: [1, 1, 1]
011: kCustomKernel [source | sink] outside grid: [1, 1, 1]
"""


def test_launches_are_counted():
    num_graphs, outside, layer = gpu_programs.launches(SEQUENCE)
    assert (num_graphs, outside) == (1, 1)
    assert layer == ["grok1_norm", "kAllReduce", "wrapped_compare", "loop_multiply_fusion"]


@pytest.fixture(scope="module")
def h200():
    """One device and eight of them, described."""
    if not any(map(importlib.util.find_spec, PLUGINS)):
        pytest.skip("JAX's plugin for CUDA is not installed; tools/gpu_programs.py says how")
    try:
        build.compiler()
    except build.UnavailableError as error:
        pytest.skip(str(error))
    return {count: gpu_programs.mesh_of("h200", count) for count in (1, 8)}


@pytest.fixture(autouse=True)
def no_kernels_of_cpus(monkeypatch):
    monkeypatch.setattr(bindings, "is_available", lambda: False)


def reported(mesh, function, *shapes):
    place = NamedSharding(mesh, P())
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes]
    program = jax.jit(function).lower(*arguments)
    return gpu_programs.report(program, mesh.devices.flatten().tolist())


def split_by_conversions(x, dtype):
    high = x.astype(dtype)
    return high, (x - high.astype(jnp.float32)).astype(dtype)


def test_the_split_into_two_terms_survives_xla(h200):
    shapes = ((4, 256), jnp.float32), ((256, 128), jnp.bfloat16)

    def product(split):
        def run(x, weight):
            return exact_einsum("MK,KN->MN", jnp.concatenate(split(x, jnp.bfloat16)), weight)

        return run

    assert not reported(h200[1], product(split_terms), *shapes).vanished
    # What it is there against: a pair of conversions is dropped, and nothing is left.
    assert reported(h200[1], product(split_by_conversions), *shapes).vanished


@pytest.mark.parametrize("rows", [2, 32, 64])
def test_the_head_of_several_rows_reads_its_table_once_and_copies_no_part_of_it(h200, rows):
    place = NamedSharding(h200[1], P())
    shapes = (rows, 6144), (131072, 6144)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for shape in shapes]
    with presence.assumed():
        product = functools.partial(forms.run, "logits", implementation="three_terms")
        compiled = jax.jit(product).lower(*arguments).compile()
    assert "tf32_tf32_f32_x3" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 25  # parts of the sums at most
    entry = compiled.as_text().split("ENTRY ")[1]
    assert len(re.findall(r" (?:fusion|dot|custom-call)\(", entry)) <= 2


@pytest.mark.parametrize("count", [1, 8])
def test_a_step_of_grok_1_is_one_graph_that_copies_no_weight(h200, count):
    mesh = h200[count]
    with presence.assumed():
        program, engine = lowered(GROK_1, mesh, "decode", 1, 8192)
    found = gpu_programs.report(program, mesh.devices.flatten().tolist(), engine.weights)
    assert not found.unknown_loops
    assert not found.copies
    assert not found.vanished
    if count == 1 or jax.__version_info__ < (0, 12):
        assert (found.graphs, found.outside) == (1, 0)
    else:
        assert found.graphs == 3  # collectives that are no kernels of XLA's own stand between them
    collectives = ("kAllReduce", "kCollective")
    kernels = [name for name in found.layer if not name.startswith(collectives)]
    assert len(kernels) == 8, kernels  # one counts the turns of the loop
    assert len(found.layer) - len(kernels) == (0 if count == 1 else 2)


def test_a_step_whose_layers_are_recorded_one_after_the_other_is_the_same_program(
    h200, monkeypatch
):
    # XLA reads the option when it records the graph, on a device; here it has to know its name.
    monkeypatch.setenv("GROK1_CUDA_GRAPHS", "unrolled")
    devices = h200[1].devices.flatten().tolist()
    assert graphs.compiler_options(devices)["xla_gpu_command_buffer_unroll_loops"] is True
    with presence.assumed():
        program, engine = lowered(GROK_1, h200[1], "decode", 1, 8192)
    found = gpu_programs.report(program, devices, engine.weights)
    assert (found.graphs, found.outside) == (1, 0)
    assert not found.unknown_loops
    assert not found.copies
    assert len(found.layer) == 8, found.layer


@pytest.mark.parametrize("count", [1, 8])
def test_a_step_with_4_bit_experts_is_one_graph_that_copies_no_weight(h200, count):
    mesh = h200[count]
    with presence.assumed():
        program, engine = lowered(GROK_1, mesh, "decode", 1, 8192, experts="int4")
    found = gpu_programs.report(program, mesh.devices.flatten().tolist(), engine.weights)
    assert not found.unknown_loops
    assert not found.copies
    assert not found.vanished
    if count == 1:
        assert (found.graphs, found.outside) == (1, 0)
    kernels = [name for name in found.layer if name.startswith("grok1_")]
    # Those that have a row at a time make its digits themselves.
    assert len(kernels) == 7, found.layer
    assert [name for name in kernels if "int4" in name or "digits" in name] == [
        "grok1_gate_up_int4",
        "grok1_down_int4",
    ]


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (8, 8)])
def test_a_greedy_step_reads_the_copy_of_the_head_in_three_launches_of_the_one_graph(
    h200, count, rows
):
    mesh = h200[count]
    with presence.assumed():
        program, engine = lowered(GROK_1, mesh, "greedy", rows, 8192)
    devices = mesh.devices.flatten().tolist()
    found = gpu_programs.report(program, devices, engine.weights)
    assert not found.unknown_loops
    assert not found.copies
    assert not found.vanished
    if count == 1 or jax.__version_info__ < (0, 12):
        assert (found.graphs, found.outside) == (1, 0)
    compiled = program.compile(compiler_options=graphs.compiler_options(devices))
    text = compiled.as_text().split("ENTRY ")[1]
    head = ("screen_digits", "screen", "choose")
    launched = re.findall(r'custom-call\(.*?name = \\?"grok1_([a-z_]+)_[0-9a-f]{8}', text)
    assert [name for name in launched if name in head] == list(head)
    # Not the head, nor what bounds or products of all its rows for several rows would be many of.
    vocabulary = GROK_1.vocab_size // count
    table = [line for line in text.splitlines() if f"f32[{vocabulary},{GROK_1.emb_size}]" in line]
    assert all(" parameter(" in line or "grok1_choose" in line for line in table[1:]), table
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 25


@pytest.mark.parametrize("count", [1, 8])
def test_making_the_copy_of_the_head_takes_little_more_than_the_copy(h200, count):
    mesh = h200[count]
    with presence.assumed():
        _, engine = lowered(GROK_1, mesh, "decode", 1, 256)
        program = engine.head_copies.table_program().lower(engine.params.embedding)
    devices = mesh.devices.flatten().tolist()
    found = gpu_programs.report(program, devices, engine.weights)
    assert not found.unknown_loops
    compiled = program.compile(compiler_options=graphs.compiler_options(devices))
    memory = compiled.memory_analysis()
    assert memory.output_size_in_bytes - table_bytes(GROK_1.vocab_size // count, 6144) < 100
    assert memory.temp_size_in_bytes < 1 << 25


def test_a_chunk_with_4_bit_experts_converts_them_too(h200):
    with presence.assumed():
        program, engine = lowered(GROK_1, h200[1], "256", 1, 8192, experts="int4")
    found = gpu_programs.report(program, h200[1].devices.flatten().tolist(), engine.weights)
    assert (found.graphs, found.outside) == (1, 0)
    assert not found.vanished
    assert not found.unknown_loops
    kinds = [kind for copy in found.copies for kind in ("bf16", "f16") if f" = {kind}[" in copy]
    assert sorted(kinds) == ["bf16"] * 6 + ["f16"] * 4, found.copies
    assert found.layer.count("grok1_convert_int4") == 6


@pytest.mark.parametrize(("missing", "copies"), [((), 0), (("experts_prompt",), 6)])
def test_a_chunk_of_grok_1_is_one_graph_that_copies_no_weight_twice(missing, copies, h200):
    with presence.assumed(frozenset(presence.OPERATIONS).difference(missing)):
        program, engine = lowered(GROK_1, h200[1], "256", 1, 8192)
    found = gpu_programs.report(program, h200[1].devices.flatten().tolist(), engine.weights)
    assert (found.graphs, found.outside) == (1, 0)
    assert not found.vanished
    assert not found.unknown_loops
    # Attention's four matrices, and without the kernels of many tokens' experts theirs, for each of
    # two sizes of their rows: all by the kernel, none of two matrices.
    assert all(" custom-call" in copy for copy in found.copies), found.copies
    kinds = [kind for copy in found.copies for kind in ("bf16", "f16") if f" = {kind}[" in copy]
    assert sorted(kinds) == ["bf16"] * copies + ["f16"] * 4, found.copies
    assert found.layer.count("grok1_convert") == copies + 4
    # XLA would put the copies of matrices with the same inputs side by side, in one product.
    assert sum("dot" in kernel for kernel in found.layer) == copies + 5
    assert ("grok1_prompt_gate_up" in found.layer) == (not missing)


def test_without_the_kernels_xla_copies_weights_and_asks_for_lengths(h200):
    with presence.assumed(frozenset()):
        program, engine = lowered(GROK_1, h200[1], "decode", 1, 256)
    found = gpu_programs.report(program, h200[1].devices.flatten().tolist(), engine.weights)
    assert found.unknown_loops
    assert found.copies


@pytest.mark.parametrize(
    ("shape", "size", "dtype"),
    [
        ((131072, 6144), (1024, 6144), np.float32),  # the embedding
        ((2, 8, 6144, 32768), (1, 1024, 32768), np.int8),  # some experts
    ],
)
def test_loading_takes_no_second_array(shape, size, dtype, h200):
    dtype, num_bytes = np.dtype(dtype), np.prod(size) * np.dtype(dtype).itemsize
    device = h200[1].devices.flat[0]
    program = carrying._compiled_put(shape, dtype, device, size, int(num_bytes))
    found = program.memory_analysis()
    assert found.alias_size_in_bytes == np.prod(shape) * dtype.itemsize
    assert found.temp_size_in_bytes <= num_bytes
