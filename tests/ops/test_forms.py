"""The table of forms: complete, in order, and clear about what a form cannot do."""

import functools
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grok1 import ops
from grok1.ops import forms
from grok1.ops.attention import KVCache, Place
from grok1.ops.cpu import bindings
from grok1.ops.cuda import calls, presence
from grok1.ops.experts import ExpertWeights, experts_cuda_int4
from grok1.ops.int4 import Int4Array
from grok1.ops.quantized import quantize
from grok1.ops.routing import choose_experts
from grok1.ops.screening import ScreeningTable

# Forms are there once their modules are.
for module in pkgutil.iter_modules(ops.__path__):
    importlib.import_module(f"grok1.ops.{module.name}")


@pytest.fixture(autouse=True)
def without_a_device():
    """Has no CUDA kernels, on a GPU neither, but where a test assumes some."""
    with presence.assumed(frozenset()):
        yield


NO_KERNELS = "the native kernels are not available here"
NO_CUDA = "its CUDA kernels are not available here"


def test_every_form_of_the_table_exists():
    named = {
        (operation, name)
        for operation, by_platform in forms.PREFERRED.items()
        for names in by_platform.values()
        for name in names
    }
    assert named <= set(forms._FORMS)
    # Where nothing is known of a device, something runs.
    assert all(by_platform["default"] for by_platform in forms.PREFERRED.values())


def arguments_of(operation, quantized_weights=True, cache_dtype=jnp.float32):
    x = jnp.ones((3, 8))
    if operation == "matmul":
        return x, quantize(jnp.ones((8, 5))), (), 3
    if operation == "experts":
        stack = jnp.ones((4, 8, 8))
        weights = ExpertWeights(*(quantize(stack) if quantized_weights else stack for _ in "gud"))
        return x, weights, (), choose_experts(jnp.ones((3, 4)), 2), jnp.ones(3, bool)
    weight = quantize(jnp.ones((16, 16)))
    weight = weight if quantized_weights else jnp.ones((16, 16))
    if operation == "convert":
        return weight, (), None
    if operation == "convert_int4":
        return int4_weight((), 16, 16), ()
    if operation == "project":
        return jnp.ones((3, 16)), (weight,), ((),)
    scales = jnp.ones((2, 8))
    if operation == "norm":
        return x, scales, jnp.int32(0)
    if operation == "add_norm":
        return x, x, (scales,), jnp.int32(0)
    if operation == "route":
        return x, jnp.ones((2, 8, 4)), jnp.int32(0)
    if operation == "add_and_route":
        return x, x, (scales, scales), jnp.ones((2, 8, 4)), jnp.int32(0)
    if operation == "logits":
        return x, jnp.ones((4, 8))
    if operation == "exponential_sums":
        return (-x,)
    if operation == "log":
        return (jnp.ones(3),)
    if operation == "most_probable":
        table = ScreeningTable(jnp.ones((4, 16), jnp.int8), jnp.ones(4), jnp.ones(4))
        return jnp.ones((3, 16)), jnp.ones((4, 16)), table, jnp.ones(4, bool)
    size = 8 if operation == "attend_cache" else 16
    k = jnp.ones((1, 1, 1, 6, size), cache_dtype)
    cache = KVCache(k, k, jnp.zeros(1, jnp.int32))
    zeros = jnp.zeros((1, 1), jnp.int32)
    place = Place(jnp.zeros(1, jnp.int32), zeros, zeros == 0)
    if operation in ("append_heads", "append_and_attend"):
        projections = ((weight,) * 3, ((),) * 3, ())
        return jnp.ones((1, 1, 16)), projections, cache, jnp.int32(0), place
    return jnp.ones((1, 1, 1, 1, 8)), cache, jnp.int32(0), place


def int4_weight(lead, rows, columns):
    return Int4Array(
        jnp.zeros((*lead, rows // 2, columns), jnp.uint8),
        jnp.zeros((*lead, 6, columns), jnp.uint8),
        jnp.ones((*lead, 1, columns), jnp.float16),
    )


@pytest.mark.parametrize("operation", list(forms.PREFERRED))
@pytest.mark.parametrize("available", [True, False])
def test_the_first_form_that_can_is_chosen(monkeypatch, operation, available):
    monkeypatch.setattr(bindings, "is_available", lambda: available)
    table, arguments = forms.PREFERRED[operation], arguments_of(operation)
    names = table.get("cpu", (table["default"] * 2))
    assert forms.chosen(operation, "cpu", *arguments) == names[0 if available else -1]
    for platform in ("cuda", "tpu", "a later one"):
        # On NVIDIA GPUs the last form is the one without kernels.
        expected = table.get(platform, table["default"])[-1]
        assert forms.chosen(operation, platform, *arguments) == expected
        assert not forms.has_kernels(platform)
    assert forms.has_kernels("cpu") == available


@pytest.mark.parametrize("operation", [of for of in presence.OPERATIONS if of in forms.PREFERRED])
def test_on_nvidia_gpus_the_kernels_that_are_there_are_chosen(operation):
    table, arguments = forms.PREFERRED[operation], arguments_of(operation)
    if operation == "attend_cache":
        assert forms.refusal(operation, "cuda", *arguments) == NO_CUDA
        with presence.assumed():
            narrow = (jnp.ones((1, 1, 1, 1, 4)), arguments[1]._replace(k=jnp.ones((1, 1, 1, 6, 4))))
            reason = forms.refusal(operation, "cuda", *narrow, *arguments[2:])
            assert reason == "heads must be 8 or a multiple of 16 wide, up to 256, not 4"
        arguments = arguments_of("append_heads")
        arguments = (jnp.ones((1, 1, 1, 1, 16)), *arguments[2:])
    if operation == "experts":
        stack = quantize(jnp.ones((4, 16, 16)))
        arguments = (jnp.ones((3, 16)), ExpertWeights(stack, stack, stack), *arguments[2:])
    with presence.assumed():
        assert forms.chosen(operation, "cuda", *arguments) == "cuda"
        assert forms.chosen(operation, "cpu", *arguments) != "cuda"
        assert forms.prepare("gpu") == " ".join(sorted(presence.OPERATIONS))
    with presence.assumed(frozenset(presence.OPERATIONS) - {operation}):
        assert forms.chosen(operation, "cuda", *arguments) == table["cuda"][-1]
    assert forms.prepare("gpu") == forms.prepare("tpu") == ""
    with pytest.raises(NotImplementedError, match=NO_CUDA):
        forms.run(operation, *arguments, implementation="cuda")


def test_on_nvidia_gpus_experts_in_4_bits_have_kernels_of_their_own():
    def chosen(tokens=3, width=32, platform="cuda", dtype=jnp.float32):
        stack = int4_weight((4,), width, width)
        weights = ExpertWeights(stack, stack, stack)
        choice = choose_experts(jnp.ones((tokens, 4)), 2)
        x = jnp.ones((tokens, width), dtype)
        return forms.chosen("experts", platform, x, weights, (), choice, jnp.ones(tokens, bool))

    assert chosen() == "sparse"
    with presence.assumed():
        assert chosen() == chosen(tokens=64) == "cuda_int4"
        assert chosen(tokens=65) == chosen(width=16) == chosen(platform="tpu") == "sparse"
        assert chosen(tokens=65, dtype=jnp.bfloat16) == "grouped"
    # Those of int8 may be refused, and these be there.
    with presence.assumed(frozenset({"experts_int4"})):
        assert chosen() == "cuda_int4"
    with presence.assumed(frozenset(presence.OPERATIONS) - {"experts_int4"}):
        assert chosen() == "sparse"


@pytest.mark.parametrize("is_there", [True, False])
def test_4_bit_experts_of_one_token_run_in_the_kernel_that_is_there(is_there, monkeypatch):
    seen = []
    x, routing = jnp.ones((1, 256)), choose_experts(jnp.ones((1, 4)), 2)
    monkeypatch.setattr(calls, "experts_int4", lambda *arguments: seen.append(arguments[-1]) or x)
    missing = set() if is_there else {"experts_int4_of_one"}
    with presence.assumed(frozenset(presence.OPERATIONS) - missing):
        experts_cuda_int4(x, ExpertWeights(None, None, None), (), routing, jnp.ones(1, bool))
    assert seen == [is_there]


def test_on_nvidia_gpus_attention_of_many_queries_has_a_kernel_of_its_own():
    def chosen(dtype=jnp.float16, length=65, size=64):
        k = jnp.ones((1, 1, 1, 80, size), dtype)
        positions = jnp.arange(length)[None]
        place = Place(jnp.zeros(1, jnp.int32), positions, positions >= 0)
        query = jnp.ones((1, length, 1, 1, size), dtype)
        cache = KVCache(k, k, jnp.zeros(1, jnp.int32))
        return forms.chosen("attend_cache", "cuda", query, cache, jnp.int32(0), place)

    with presence.assumed():
        assert chosen() == "cuda_tiles"
        assert chosen(length=64) == "cuda"
        assert chosen(jnp.float32) == chosen(size=32) == "blocked"
    # Each of the two is refused for itself.
    for operation, few, many in (
        ("attend_cache", "cuda_tiles", "cuda_tiles"),
        ("attend_prompt", "cuda", "blocked"),
    ):
        with presence.assumed(frozenset(presence.OPERATIONS) - {operation}):
            assert (chosen(length=64), chosen()) == (few, many)


def test_on_nvidia_gpus_logits_of_several_rows_come_from_tensor_cores():
    table = jnp.ones((4, 8))
    with presence.assumed():
        assert forms.chosen("logits", "cuda", jnp.ones((2, 8)), table) == "three_terms"
        traced = jax.jit(lambda x: forms.run("logits", x, table)).trace(jnp.ones((2, 8)))
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "rhs_precision_type = tf32" in lowered
        assert "primitive_operations = 3" in lowered
        assert forms.chosen("logits", "cpu", jnp.ones((2, 8)), table) != "three_terms"
        for rows, its_table in ((1, table), (2, table.astype(jnp.bfloat16))):
            assert forms.chosen("logits", "cuda", jnp.ones((rows, 8)), its_table) == "direct"
    with presence.assumed(frozenset()):
        reason = forms.refusal("logits", "three_terms", jnp.ones((2, 8)), table)
        assert reason == "it takes an NVIDIA device of compute capability 8.0, on which kernels run"


def test_on_nvidia_gpus_the_most_probable_of_a_few_rows_is_screened():
    def chosen(rows=8, width=16, dtype=jnp.float32, platform="cuda"):
        scales = jnp.ones(4)
        table = ScreeningTable(jnp.ones((4, width), jnp.int8), scales, scales)
        embedding = jnp.ones((4, width), dtype)
        x = jnp.ones((rows, width))
        return forms.chosen("most_probable", platform, x, embedding, table, jnp.ones(4, bool))

    with presence.assumed():
        assert chosen() == "cuda"
        assert chosen(rows=9) == chosen(width=24) == chosen(dtype=jnp.bfloat16) == "direct"
        assert chosen(platform="tpu") == chosen(platform="rocm") == "direct"


@pytest.mark.parametrize(
    ("num_tokens", "dtype", "expected"),
    [
        (32, jnp.bfloat16, "cuda"),
        (33, jnp.bfloat16, "cuda_tiles"),
        (2048, jnp.bfloat16, "cuda_tiles"),
        (64, jnp.float32, "cuda"),
        (65, jnp.float32, "sparse"),
    ],
)
def test_experts_of_many_tokens_run_by_tiles_where_there_are_kernels(num_tokens, dtype, expected):
    stack = quantize(jnp.ones((4, 64, 64)))
    x, valid = jnp.ones((num_tokens, 64), dtype), jnp.ones(num_tokens, bool)
    choice = choose_experts(jnp.ones((num_tokens, 4)), 2)
    arguments = x, ExpertWeights(stack, stack, stack), (), choice, valid
    with presence.assumed():
        assert forms.chosen("experts", "cuda", *arguments) == expected
    with presence.assumed(frozenset(presence.OPERATIONS) - {"experts_prompt"}):
        assert forms.chosen("experts", "cuda", *arguments) != "cuda_tiles"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_on_nvidia_gpus_many_rows_of_bfloat16_are_multiplied_by_copies(dtype):
    stack = quantize(jnp.ones((4, 8, 8)))
    choice = choose_experts(jnp.ones((65, 4)), 2)
    experts = ExpertWeights(stack, stack, stack), (), choice, jnp.ones(65, bool)
    for operation, named, arguments in (
        ("experts", ("grouped", "sparse"), experts),  # its groups are of 8 rows, too few for tiles
        ("matmul", ("converted", "direct"), (stack, (0,), 65)),
        ("matmul_int4", ("converted", "blocked"), (int4_weight((4,), 8, 8), (0,), 65)),
    ):
        x = jnp.ones((65, 8), dtype)
        expected = named[0] if dtype == jnp.bfloat16 else named[1]
        assert forms.chosen(operation, "cuda", x, *arguments) == expected
        assert forms.chosen(operation, "rocm", x, *arguments) == named[1]
    for weights in ((stack,) * 3, (stack,)):
        arguments = jnp.ones((65, 8)), weights, ((),) * len(weights)
        assert forms.chosen("project", "cuda", *arguments) == "halves"


@pytest.mark.parametrize(
    ("operation", "options", "reason"),
    [
        ("experts", {"quantized_weights": False}, "it reads quantised weights, .*"),
        ("attend_cache", {"cache_dtype": jnp.float16}, "it reads float32, not float16"),
        ("attend_cache", {"cache_dtype": jnp.bfloat16}, "it reads float32, not bfloat16"),
    ],
)
def test_a_form_says_what_it_cannot_compute(monkeypatch, operation, options, reason):
    monkeypatch.setattr(bindings, "is_available", lambda: True)
    arguments = arguments_of(operation, **options)
    second = forms.PREFERRED[operation]["cpu"][1]
    assert forms.chosen(operation, "cpu", *arguments) == second
    with pytest.raises(NotImplementedError, match=f"^{operation} in the form 'cpp': {reason}$"):
        forms.run(operation, *arguments, implementation="cpp", scale=1.0)


def test_a_form_that_is_not_there(monkeypatch):
    monkeypatch.setattr(bindings, "is_available", lambda: False)
    arguments = arguments_of("matmul")
    with pytest.raises(NotImplementedError, match=NO_KERNELS):
        forms.run("matmul", *arguments, implementation="cpp")
    message = "^matmul has no form 'sparse'; its forms are converted, cpp, direct, of_rows, tiled$"
    with pytest.raises(ValueError, match=message):
        forms.run("matmul", *arguments, implementation="sparse")


def test_the_program_of_a_platform_runs_its_form():
    arguments = arguments_of("matmul")
    expected = np.asarray(forms.run("matmul", *arguments, implementation="direct"))
    found = jax.jit(lambda *rest: forms.run("matmul", *rest, 3))(*arguments[:3])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_what_tpus_have_forms_of_their_own_for():
    def text(operation, form, *arguments, **static):
        run = functools.partial(forms.run, operation, implementation=form, **static)
        return jax.jit(run).lower(*arguments).as_text()

    stack = quantize(jnp.ones((4, 8, 8)))
    one_row = jnp.ones((1, 8)), stack, (0,), 1
    assert "(tensor<2x8xf32>, tensor<8x8xf32>)" in text("matmul", "of_rows", *one_row)
    assert "(tensor<1x8xf32>, tensor<8x8xf32>)" in text("matmul", "direct", *one_row)
    in_4_bits = jnp.ones((1, 8)), int4_weight((4,), 8, 8), (0,), 1
    for form, products in (("halves", 2), ("blocked", 1)):
        assert text("matmul_int4", form, *in_4_bits).count("stablehlo.dot_general") == products
    attention = arguments_of("attend_cache")
    assert "stablehlo.gather" not in text("attend_cache", "sliced", *attention, scale=1.0)
    assert "stablehlo.gather" in text("attend_cache", "blocked", *attention, scale=1.0)
