"""Traces against golden numbers and against each other, and what an untraced program is."""

import copy
import gc
import pickle
import tracemalloc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grok1 import AblateExperts, CapLayers
from grok1.engine import base
from grok1.engine.engine import Engine
from grok1.nn import decoder
from grok1.nn.capture import Capture
from grok1.ops.attention import SOFT_CAP
from grok1.ops.cpu import bindings
from grok1.ops.layers import apply_rope, rms_norm
from grok1.ops.quantized import QuantizedArray, dequantize
from grok1.study import tracing
from tests import one_device
from tests.helpers import SLOW_TESTS, relative_error, slow
from tests.one_device import within

ALL = ("router", "residual", "branches", "attention", "logit_lens", "logits")
TEXT = "The sun rises in the east — and sets in the west."


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)], ids=["1x1", "2x4"])
def test_golden_numbers(mesh, nano_on_mesh, nano_reference):
    model = nano_on_mesh(mesh)
    trace = model.trace(nano_reference["tokens"], ALL)
    for layer in range(model.config.num_layers):
        for name in ("router_probs", "residual"):
            error = relative_error(trace[name][layer], nano_reference[name][layer])
            assert error <= 2e-5, (name, layer)
    np.testing.assert_array_equal(
        np.sort(trace.expert_indices), np.sort(nano_reference["selected_experts"])
    )
    assert relative_error(trace.logits, nano_reference["logits_f64"]) <= 2e-5
    np.testing.assert_array_equal(
        trace.expert_weights, np.take_along_axis(trace.router_probs, trace.expert_indices, -1)
    )


def test_arrays_fit_together(nano_on_mesh, nano_reference):
    model = nano_on_mesh(within((2, 4)))
    trace = model.trace(nano_reference["tokens"], ALL)
    np.testing.assert_array_equal(trace.residual_in[1:], trace.residual[:-1])
    # To the last bit but one: the compiler may fuse a sum with the product before it.
    assert relative_error(trace.residual_mid, trace.residual_in + trace.attention_out) <= 1e-6
    assert relative_error(trace.residual, trace.residual_mid + trace.moe_out) <= 1e-6
    # The lens of the last layer is the model itself.
    logprobs = np.asarray(jax.nn.log_softmax(trace.logits))
    np.testing.assert_array_equal(trace.lens_tokens[-1, :, 0], trace.logits.argmax(axis=-1))
    np.testing.assert_allclose(
        trace.lens_logprobs[-1],
        np.take_along_axis(logprobs, trace.lens_tokens[-1], axis=-1),
        atol=1e-5,
    )
    count = len(trace.tokens)
    assert trace.attention_probs.shape == (12, 16, count, count)
    np.testing.assert_allclose(trace.attention_probs.sum(axis=-1), 1, rtol=1e-5)
    assert not np.triu(trace.attention_probs, 1).any()


@pytest.mark.parametrize("mesh", [(1, 1), pytest.param((1, 16), marks=slow)])
def test_attention_maps_by_hand(mesh, nano, nano_on_mesh, nano_reference):
    config, layer = nano.config, 5
    trace = nano_on_mesh(mesh).trace(
        nano_reference["tokens"], ("attention", "residual"), attention_layers=(7, layer)
    )
    assert trace.attention_layers == (7, layer)
    params = jax.tree.map(lambda leaf: leaf[layer], nano.params.layers)
    normed = rms_norm(jnp.asarray(trace.residual_in[layer]), params.attention_pre_norm)

    def heads(weight):
        weight = dequantize(weight) if isinstance(weight, QuantizedArray) else weight
        flat = jnp.matmul(normed, weight, precision="highest")
        rotated = jax.jit(apply_rope)(
            flat.reshape(1, len(normed), -1, config.key_size), np.arange(len(normed))[None]
        )
        return np.asarray(rotated[0], np.float64)

    query, key = heads(params.query), heads(params.key)
    key = np.repeat(key, config.queries_per_kv_head, axis=1)
    scores = np.einsum("tnh,snh->nts", query, key) * config.attn_output_multiplier
    weights = np.tril(np.exp(SOFT_CAP * np.tanh(scores / SOFT_CAP)))
    expected = weights / weights.sum(axis=-1, keepdims=True)
    assert relative_error(trace.attention_probs[1], expected) <= 2e-5


def test_chunks_change_nothing(nano, nano_reference, monkeypatch):
    tokens = nano_reference["tokens"]
    whole = nano.trace(tokens, ALL)
    monkeypatch.setattr(base, "_CAPTURED_BYTES", 1)
    in_chunks = nano.trace(tokens, ALL)
    without_logits = nano.trace(tokens, ALL[:-1])
    assert set(whole) - set(without_logits) == {"logits"}
    for name in whole:
        assert in_chunks[name].shape == whole[name].shape
        assert relative_error(in_chunks[name], whole[name]) <= 2e-5
        if name != "logits":
            assert relative_error(without_logits[name], whole[name]) <= 2e-5


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ((1, 1), {"temperature": 0, "logprobs": 2}),
        pytest.param((2, 4), {"seed": 3}, marks=slow),
    ],
    ids=["with logprobs", "sampled on 2x4"],
)
def test_generation_is_traced_as_it_goes(mesh, options, nano_on_mesh, nano_reference):
    model = nano_on_mesh(mesh)
    prompt = nano_reference["greedy_prompt"]
    options = options | {"max_new_tokens": 9, "ignore_eos": True}
    completion, trace = model.trace_generation(prompt, ALL[:-1], **options)
    expected = model.generate(prompt, **options)
    if one_device.PLATFORM == "cuda":
        # What is captured is fused with what it is made of, and rounded otherwise.
        assert completion.tokens == expected.tokens
        assert completion.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    else:
        assert completion == expected
    assert trace.num_prompt_tokens == len(prompt)
    np.testing.assert_array_equal(trace.tokens, [*prompt, *completion.tokens[:-1]])
    again = model.trace(trace.tokens, ALL)
    assert again.num_prompt_tokens == len(trace.tokens)
    for name in trace:
        assert trace[name].shape == again[name].shape
        assert relative_error(trace[name], again[name]) <= 2e-5, name
    drawn = again.logits[trace.num_prompt_tokens - 1 :].argmax(axis=-1)
    if "seed" not in options:
        assert drawn.tolist() == completion.tokens


def test_a_generation_that_stops_is_traced_up_to_there(nano, nano_reference):
    prompt, whole = nano_reference["greedy_prompt"], nano_reference["greedy_tokens"].tolist()
    stop = whole[4]
    completion, trace = nano.trace_generation(
        prompt, ALL[:-1], max_new_tokens=20, temperature=0, ignore_eos=True, stop=stop
    )
    assert completion.tokens == whole[: whole.index(stop) + 1]
    assert trace.residual.shape[1] == len(prompt) + whole.index(stop) == len(trace.tokens)
    assert trace.attention_probs.shape[-2:] == (len(trace.tokens),) * 2


@slow
def test_bfloat16(nano_on_mesh, nano_reference):
    model = nano_on_mesh(within((2, 4)), "bfloat16")
    tokens = nano_reference["tokens"]
    trace = model.trace(tokens, ALL)
    np.testing.assert_array_equal(trace.logits, model.logits(tokens))
    assert all(trace[name].dtype in (np.float32, np.int32) for name in trace)
    np.testing.assert_allclose(trace.attention_probs.sum(axis=-1), 1, rtol=1e-4)
    # The first layer has seen no rounding but its own.
    assert relative_error(trace.router_probs[0], nano_reference["router_probs"][0]) <= 1e-2


def test_a_trace_is_a_mapping_with_attributes_and_axes(toy):
    trace = toy.trace(TEXT)
    names = ["router_probs", "expert_indices", "expert_weights"]
    names += ["residual_in", "residual_mid", "residual"]
    assert list(trace) == names
    assert len(trace) == 6
    assert trace.axes["router_probs"] == ("layer", "token", "expert")
    assert trace.router_probs is trace["router_probs"]
    assert "residual" in dir(trace)
    assert trace == trace
    assert trace in {trace}
    count = len(trace.tokens)
    assert repr(trace).startswith(
        f"Trace({count} tokens: router_probs [layer 6, token {count}, expert 8], "
    )
    for same in (copy.deepcopy(trace), pickle.loads(pickle.dumps(trace))):
        np.testing.assert_array_equal(same.residual, trace.residual)
    with pytest.raises(AttributeError, match=r"no lens_tokens.*capture=\('logit_lens',\)"):
        _ = trace.lens_tokens
    with pytest.raises(KeyError, match=r"no attention_out.*capture=\('branches',\)"):
        _ = trace["attention_out"]
    with pytest.raises(AttributeError, match=r"no logits.*capture=\('logits',\)"):
        _ = trace.logits
    with pytest.raises(AttributeError, match="a Trace has no router"):
        _ = trace.router


def test_expert_load_and_pieces(toy):
    trace = toy.trace(TEXT, ("router",))
    load = trace.expert_load()
    assert load.shape == (6, 8)
    np.testing.assert_allclose(load.sum(axis=1), 1)
    expected = np.bincount(trace.expert_indices[2].ravel(), minlength=8)
    np.testing.assert_allclose(load[2], expected / expected.sum())
    assert trace.tokens.tolist() == toy.tokenizer.encode(TEXT)
    assert len(trace.pieces) == len(trace.tokens)
    assert all(trace.pieces)
    # A dash of three bytes comes with the last, and the other two are spelled.
    assert [piece for piece in trace.pieces if piece[:3] == "<0x"] in ([], ["<0xE2>", "<0x80>"])
    assert "".join(p for p in trace.pieces if p[:3] != "<0x").lstrip() == TEXT


def test_ablated_experts_are_no_load(toy):
    with toy.intervene(AblateExperts(3)) as changed:
        trace = changed.trace(TEXT, ("router",))
    assert (trace.expert_indices != 3).all()
    np.testing.assert_array_equal(trace.expert_indices == -1, trace.expert_weights == 0)
    load = trace.expert_load()
    assert not load[:, 3].any()
    np.testing.assert_allclose(load.sum(axis=1), 1)


def test_nothing_captured(nano):
    trace = nano.trace([1, 2, 3], ())
    assert dict(trace) == {}
    assert trace.pieces is None
    assert repr(trace) == "Trace(3 tokens: nothing captured)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capture": ("routers",)}, "^capture takes any of router, residual, .* found 'routers'$"),
        ({"capture": "router"}, r"^capture takes a sequence.*give \('router',\)$"),
        (
            {"capture": ("attention",), "attention_layers": (3, 6)},
            "^attention_layers must be from 0 to 5, found 6$",
        ),
        (
            {"capture": ("attention",), "attention_layers": ()},
            r"^attention_layers must name different layers, found \(\)$",
        ),
        (
            {"capture": ("attention",), "attention_layers": slice(1, 3)},
            r"^attention_layers must be from 0 to 5, found slice\(1, 3, None\)$",
        ),
        (
            {"capture": ("attention",), "attention_layers": True},
            "^attention_layers must be from 0 to 5, found True$",
        ),
        ({"capture": ("logit_lens",), "lens_top": 0}, "^lens_top must be from 1 to 1280, found 0$"),
        (
            {"capture": ("logit_lens",), "lens_top": 2.0},
            "^lens_top must be from 1 to 1280, found 2.0$",
        ),
        (
            {"attention_layers": 3},
            '^attention_layers says nothing without "attention" in capture=; add it, or leave',
        ),
        ({"lens_top": 3}, '^lens_top says nothing without "logit_lens" in capture=; add it'),
        ({"lens_top": -1}, "^lens_top must be from 1 to 1280, found -1$"),
        ({"text": [5], "add_bos": True}, r"^add_bos puts \[BOS\] before text, and token ids are"),
        ({"text": []}, "^there is no prompt in an empty sequence"),
        ({"text": [5] * 1025}, "^1025 tokens are 1 more than the context of 1024; give fewer$"),
        ({"text": [1280]}, "must be token ids from 0 to 1279, found 1280"),
    ],
)
def test_bad_input(toy, options, message):
    with pytest.raises(ValueError, match=message):
        toy.trace(**({"text": TEXT} | options))


def test_numbers_are_those_of_any_library(toy):
    for number in (np.uint8, np.array, jnp.int32):
        trace = toy.trace(
            [5, 6], ("attention", "logit_lens"), attention_layers=number(3), lens_top=number(2)
        )
        assert trace.attention_layers == (3,)
        assert trace.lens_tokens.shape == (6, 2, 2)


def test_the_trace_of_a_generation_has_its_bos_once(toy):
    completion, trace = toy.trace_generation("The", (), add_bos=True, max_new_tokens=2)
    prompt = toy.tokenizer.encode("The", add_bos=True)
    assert trace.tokens.tolist() == [*prompt, *completion.tokens[:-1]]


@pytest.mark.parametrize("trace", ["trace", "trace_generation"])
def test_what_is_captured_is_a_sequence(toy, trace):
    with pytest.raises(TypeError, match=r"^capture takes a sequence of names, found None$"):
        getattr(toy, trace)(TEXT, None)


def test_attention_maps_that_are_too_large_are_refused(toy, monkeypatch):
    monkeypatch.setattr(tracing, "ATTENTION_BYTES", 10_000)
    message = "^attention maps of 6 layers, 8 heads and 20 tokens take 76,800 bytes, more than .*"
    with pytest.raises(ValueError, match=message + "attention_layers="):
        toy.trace([5] * 20, ("attention",))
    assert toy.trace([5] * 10, ("attention",), attention_layers=2).attention_probs.shape[0] == 1


def test_a_trace_that_the_host_cannot_hold_is_refused(toy, monkeypatch):
    kept = toy.trace([5] * 20, ALL)
    size = sum(array.nbytes for array in kept.values())
    monkeypatch.setattr(tracing, "host_bytes_available", lambda: size)
    toy.trace([5] * 20, ALL)
    monkeypatch.setattr(tracing, "host_bytes_available", lambda: size - 1)
    with pytest.raises(ValueError, match=r"^a trace of router, residual, .* over 20 tokens takes "):
        toy.trace([5] * 20, ALL)


def test_arrays_are_filled_in_place(toy):
    tokens = np.resize(toy.tokenizer.encode(TEXT), 1000)
    toy.trace(tokens, ("residual",))
    tracemalloc.start()
    try:
        trace = toy.trace(tokens, ("residual",))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = sum(array.nbytes for array in trace.values())
    assert size <= peak < 1.3 * size


def test_one_text_at_a_time_and_no_logits_of_a_generation(toy):
    with pytest.raises(TypeError, match=r"^a trace is of one text"):
        toy.trace([TEXT, TEXT])
    with pytest.raises(ValueError, match=r"^the text is empty; .* or use add_bos=True$"):
        toy.trace("")
    with pytest.raises(ValueError, match=r"^logits are not kept during a generation"):
        toy.trace_generation(TEXT, ("logits",))


def test_a_finished_trace_is_let_go(nano):
    class Observer:
        def __call__(self, count, captured):
            self.seen = captured["moe_out"].shape

    observer = Observer()
    capture = Capture(("moe_out",))
    state = nano.engine.new_state(np.zeros((1, 96), np.int32))
    nano.engine.observed(capture, 96, observer).prefill(state, np.array([3], np.int32), 16)
    assert observer.seen == (12, 1, 16, 64)
    reference = weakref.ref(observer)
    del observer
    gc.collect()
    assert reference() is None


PROGRAMS = {"decode", "prefill"}
if SLOW_TESTS:
    PROGRAMS |= {"score", "score tokens", "decode greedily"}


def lowered(engine: Engine) -> dict[str, str]:
    """Programs as text, of two rows and the smallest cache."""
    state = engine.abstract_state(2, 256)

    def rows(dtype, *shape):
        return jax.ShapeDtypeStruct((2, *shape), dtype)

    num_steps, ends, allowed, sampling = engine.abstract_decode_arguments(2)
    run = engine.abstract_rows(2)
    programs = {
        "decode": (engine.decode_program(None, None), num_steps, ends, allowed, sampling),
        "prefill": (engine.prefill_program(64), run),
        "score": (engine.score_program(64, ()), run),
        "score tokens": (
            engine.token_score_program(64, 2),
            run,
            rows(jnp.int32, 64),
        ),
    }
    if engine.screening_table is not None:
        greedy = engine.greedy_program()
        programs["decode greedily"] = (greedy, num_steps, ends, engine.screening_table, allowed)
    return {
        name: program.lower(engine.weights, state, *arguments).as_text()
        for name, (program, *arguments) in programs.items()
        if name in PROGRAMS
    }


@pytest.mark.parametrize("mesh", [(1, 1), pytest.param((2, 4), marks=slow)])
def test_what_is_off_costs_nothing(mesh, nano_on_mesh, monkeypatch):
    model = nano_on_mesh(mesh)
    model.trace([1, 2, 3], ALL)
    with model.intervene(AblateExperts(1), CapLayers(3)) as changed:
        intervened = lowered_prefill(changed.engine)
    after = lowered(model.engine)
    greedily = set() if bindings.is_available() else {"decode greedily"}
    assert set(after) == PROGRAMS - greedily
    # The same as if this code were not there.
    with monkeypatch.context() as gone:
        gone.setattr(decoder, "apply", lambda prepared, point, value, *_: value)
        gone.setattr(decoder, "redirect", lambda prepared, logits, routing, *_: routing)
        gone.setattr(decoder, "lens", lambda *_: {})
        before = lowered(Engine(model.params, model.config, model.mesh, "float32"))
    assert after == before
    # A program with captures, and one with interventions, are others.
    observed = model.engine.observed(tracing._capture(model.config, ALL, None, 5, 8), 256, print)
    assert (
        observed.prefill_program(64)
        .lower(observed.weights, observed.abstract_state(2, 256), observed.abstract_rows(2))
        .as_text()
        != before["prefill"]
    )
    assert intervened != before["prefill"]
    # Its results are the grown cache and the tokens, and nothing else.
    assert before["prefill"].count("jax.result_info") == len(
        jax.tree.leaves(model.engine.abstract_state(2, 256))
    )


def lowered_prefill(engine: Engine) -> str:
    program = engine.prefill_program(64)
    rows = engine.abstract_rows(2)
    return program.lower(engine.weights, engine.abstract_state(2, 256), rows).as_text()
