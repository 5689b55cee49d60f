"""What is compiled for TPUs, without one: `tools/tpu_programs.py`.

It takes libtpu, 0.2 GB, which an environment for tests may do without.
"""

import dataclasses
import importlib.util

import jax.numpy as jnp
import pytest

import grok1
from grok1.config import GROK_1
from grok1.ops import forms
from grok1.ops.cpu import bindings
from tests.helpers import slow
from tools import tpu_programs
from tools.abstract_steps import lowered

PROGRAM = """\
%fused (x: s8[4,8]) -> s8[4,8] {
  ROOT %c.1 = s8[4,8]{1,0} copy(%x), backend_config={"estimated_cycles":"5"}
}
ENTRY %main (x: s8[4,8]) -> s8[4,8] {
  %f = s8[4,8]{1,0} fusion(%x), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%fused
  %c.2 = s8[4,8]{0,1:T(4)S(1)} copy(%f)
  %a = f32[2]{0} add(%x, %x), backend_config={"estimated_cycles":"7"}
  %b = f32[2]{0} add(%x, %a), backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %d = f32[2]{0} add(%x, %b), backend_config={"estimated_cycles":"4"}
}
"""

LAYERS = 2
CAPACITY = 8192


def test_cycles_are_counted_where_they_are_known():
    assert tpu_programs.cycles_of(PROGRAM) == {"fused": 5, "main": 11}


def test_copies_within_a_fusion_write_nothing():
    assert [*tpu_programs.copied(PROGRAM)] == [("c.2 = s8[4,8] copy", 32)]


@pytest.fixture(scope="module")
def meshes():
    """Eight devices of one kind and sixteen of another, described."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed; tools/tpu_programs.py says how")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in tpu_programs.ENVIRONMENT.items():
            patch.setenv(name, value)
        return {name: tpu_programs.mesh_of(name) for name in ("v5p:2x2x2", "v6e:4x4")}


@pytest.fixture(autouse=True)
def no_kernels_of_cpus(monkeypatch):
    monkeypatch.setattr(bindings, "is_available", lambda: False)


def reported(mesh, step, rows, config=GROK_1, **types):
    program, engine = lowered(config, mesh, step, rows, CAPACITY, **types)
    cache = engine.abstract_state(rows, CAPACITY).cache
    return tpu_programs.report(program, engine.weights, (cache.k,))


@pytest.mark.parametrize(
    ("rows", "cache_dtype", "experts"),
    [
        pytest.param(1, "float16", "int8", marks=slow),
        (8, "int8", "int8"),
        pytest.param(8, "float16", "int4", marks=slow),
    ],
)
def test_a_step_copies_neither_weights_nor_what_is_cached(meshes, rows, cache_dtype, experts):
    config = dataclasses.replace(GROK_1, num_layers=LAYERS)
    mesh = meshes["v5p:2x2x2"]
    found = reported(mesh, "decode", rows, config, cache_dtype=cache_dtype, experts=experts)
    assert not found.copies
    assert found.temporary < 0.1e9


@slow
def test_reading_all_rows_in_one_gather_copies_what_is_cached(meshes, monkeypatch):
    table = {**forms.PREFERRED["attend_cache"], "tpu": ("blocked",)}
    monkeypatch.setitem(forms.PREFERRED, "attend_cache", table)
    config = dataclasses.replace(GROK_1, num_layers=LAYERS)
    found = reported(meshes["v5p:2x2x2"], "decode", 8, config, cache_dtype="int8")
    assert any("s8[2,8,1,8192,128] copy" in copy for copy in found.copies)


@slow
@pytest.mark.parametrize(
    ("topology", "step", "rows"),
    [("v5p:2x2x2", "decode", 32), ("v6e:4x4", "decode", 32), ("v6e:4x4", "256", 8)],
)
def test_grok_1_needs_no_more_memory_than_planned(meshes, topology, step, rows):
    mesh = meshes[topology]
    found = reported(mesh, step, rows, cache_dtype="int8", dtype=jnp.bfloat16)
    planned = grok1.plan(devices=mesh.size, batch=rows, cache_dtype="int8", device="tpu-v6e")
    assert found.needed <= planned.weights_bytes + planned.cache_bytes + planned.working_bytes
