"""What a compiled program copies, and what a profile of it sums to."""

import jax
import jax.numpy as jnp

from benchmarks.device import copies_of, summed


def test_copies_of_weights_are_found_in_a_compiled_program():
    stack = jax.ShapeDtypeStruct((3, 40, 24), jnp.int8)
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    for work, array in (
        (lambda w, i: w[i].astype(jnp.float32) * 2, "f32[40,24]"),
        (lambda w, i: w[i], "s8[40,24]"),
    ):
        program = jax.jit(work).lower(stack, layer).compile().as_text()
        assert any(array in found for found in copies_of(program, [(40, 24)]))
        assert not copies_of(program, [(24, 40), (240, 24)])


def test_copies_inside_a_fusion_take_no_memory():
    program = """HloModule step

%fused_dot (param_0: s8[2,40,24]) -> bf16[24] {
  %param_0 = s8[2,40,24]{2,1,0} parameter(0)
  %convert.1 = bf16[2,40,24]{2,1,0} convert(%param_0)
  ROOT %reduce.1 = bf16[24]{0} reduce(%convert.1), dimensions={0,1}
}

ENTRY %main (w: s8[2,40,24], f: f32[40,24]) -> (bf16[24], bf16[8,10,24]) {
  %w = s8[2,40,24]{2,1,0} parameter(0)
  %f = f32[40,24]{1,0} parameter(1)
  %fusion.1 = bf16[24]{0} fusion(%w), kind=kInput, calls=%fused_dot
  %fusion.2 = (bf16[8,10,24]{2,1,0:T(8,128)}, s32[]) fusion(%w), kind=kLoop, calls=%fused_pair
  ROOT %tuple.1 = (bf16[24]{0}, bf16[8,10,24]{2,1,0}) tuple(%fusion.1, %fusion.2)
}
"""
    assert copies_of(program, [(40, 24)]) == ["%fusion.2 = bf16[8,10,24] fusion"]


def test_kernels_of_a_profile_are_summed_and_the_short_ones_are_one():
    runs = [("short", 1.0), *((f"kernel {i}", 10.0 + i) for i in range(15)), ("kernel 3", 5.0)]
    found = summed(runs)
    assert next(iter(found.items())) == ("kernel 14", (1, 24.0))
    assert found["kernel 3"] == (2, 18.0)
    assert found["others"] == (1, 1.0)
    assert sum(seconds for _, seconds in found.values()) == sum(seconds for _, seconds in runs)
