"""A model computes the same numbers whatever settings of JAX the user has chosen."""

import contextlib
import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grok1
from grok1.engine.compilation import Program
from grok1.machine.jax_settings import own_settings, settings_of_thread
from tests.helpers import slow

TINY = dataclasses.replace(grok1.TOY, num_layers=1, vocab_size=64, emb_size=16, key_size=4)
TOKENS = list(range(5, 14))
STRICT = {
    "jax_numpy_rank_promotion": "raise",
    "jax_numpy_dtype_promotion": "strict",
    "jax_transfer_guard": "disallow",
    "jax_check_tracer_leaks": True,
    "jax_debug_nans": True,
    "jax_debug_infs": True,
    "jax_debug_key_reuse": True,
}
RANDOM_NUMBERS = {
    "jax_default_prng_impl": "unsafe_rbg",
    "jax_threefry_partitionable": False,
    "jax_random_seed_offset": 7,
}


@contextlib.contextmanager
def chosen(settings: dict):
    """Settings of the whole process, as a notebook makes them."""
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def load(path) -> grok1.Model:
    return grok1.load(path, mesh=(1, 1), dtype="float32", progress=False)


def computed(model, directory) -> dict[str, np.ndarray]:
    """What a model says, in every way that there is; for a new one all is traced and compiled."""
    options = {"max_new_tokens": 2, "ignore_eos": True}
    greedy = model.generate(TOKENS, temperature=0, **options)
    drawn = model.generate(TOKENS, seed=3, logprobs=2, **options)
    with model.intervene(grok1.AblateExperts(3), grok1.ScaleHeads(1, 0.5)) as changed:
        trace = changed.trace(TOKENS, capture=("router", "logit_lens"))
    grok1.save(model, directory)
    random = grok1.random_model(TINY, mesh=(1, 2), seed=0)
    return {
        "random": np.concatenate(
            [np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(random.params))]
        ),
        "greedy": np.array(greedy.tokens),
        "drawn": np.array(drawn.tokens),
        "log-probabilities": np.array(drawn.logprobs),
        "scores": model.score(TOKENS).logprobs,
        "router": trace.router_probs,
        "lens": trace.lens_logprobs,
        "saved": load(directory).logits(TOKENS),
    }


@pytest.fixture(scope="module")
def expected(nano, tmp_path_factory):
    return computed(nano, tmp_path_factory.mktemp("model") / "saved")


# Each alone says which of them it is, where all at once say that something is amiss.
@pytest.mark.parametrize(
    "settings",
    [
        {"jax_disable_jit": True, "jax_enable_x64": True} | STRICT | RANDOM_NUMBERS,
        *(
            pytest.param(alone, marks=slow)
            for alone in (
                {"jax_disable_jit": True},
                {"jax_enable_x64": True},
                STRICT,
                RANDOM_NUMBERS,
            )
        ),
    ],
    ids=["all", "no jit", "64 bits", "strict", "random numbers"],
)
def test_whatever_is_chosen_the_numbers_are_the_same(tmp_path, nano_path, expected, settings):
    with chosen(settings):
        found = computed(load(nano_path), tmp_path / "saved")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_default_device_is_the_users_own(nano):
    with chosen({"jax_default_device": jax.devices()[3]}):
        logits = nano.logits(TOKENS)
        assert jnp.ones(2).device == jax.devices()[3]
    assert np.array_equal(logits, nano.logits(TOKENS))


# What is made where the package is imported has types of its own.
@slow
def test_64_bits_before_the_import(nano, nano_path):
    program = (
        "import sys, jax, grok1\n"
        "model = grok1.load(sys.argv[1], mesh=(1, 1), dtype='float32', progress=False)\n"
        "print(model.generate([1], max_new_tokens=2, seed=5, ignore_eos=True).tokens)\n"
        "assert jax.numpy.ones(2).dtype == 'float64'\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(nano_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_ENABLE_X64": "1"},
    )
    assert result.returncode == 0, result.stderr
    expected = nano.generate([1], max_new_tokens=2, seed=5, ignore_eos=True).tokens
    assert result.stdout == f"{expected}\n"


def test_a_stream_leaves_the_users_settings_alone_between_pieces(toy):
    with chosen({"jax_enable_x64": True}):
        for _ in toy.stream("The", max_new_tokens=3, temperature=0, stop=["unlikely"]):
            assert jnp.ones(2).dtype == jnp.float64


def test_a_thread_takes_its_settings_along():
    seen = []

    def traced(x):
        seen.append(jax.config.jax_default_matmul_precision)
        return x

    program = Program(jax.jit(traced), jax.devices()[:1], None, str)
    with jax.default_matmul_precision("float32"):
        program(np.ones(2, np.float32))
    assert seen == ["float32"]
    assert settings_of_thread() == []


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad])
def test_a_model_is_not_run_while_jax_traces(transform, nano):
    message = r"^a model runs programs of its own, and cannot be called inside jax\.jit, vmap, grad"
    tokens, vector = [1, 2, 3], np.zeros(64, np.float32)
    for call in (
        lambda x: nano.logits(tokens),
        lambda x: nano.generate(tokens, seed=x),
        lambda x: nano.score(tokens),
        lambda x: nano.choose([1], [[2]]),
        lambda x: nano.trace(tokens),
        lambda x: nano.trace_generation(tokens),
        lambda x: nano.intervene(grok1.AddToResidual(vector * jnp.sum(x))),
        lambda x: grok1.compare(nano, nano, tokens),
        lambda x: grok1.random_model(TINY),
    ):
        with pytest.raises(RuntimeError, match=message):
            transform(call)(jnp.ones(() if transform is jax.grad else 2))


def test_a_model_is_run_by_a_callback(nano):
    shape = jax.ShapeDtypeStruct((3, nano.config.vocab_size), np.float32)
    found = jax.jit(lambda x: jax.pure_callback(nano.logits, shape, x))(np.array([1, 2, 3]))
    np.testing.assert_array_equal(found, nano.logits([1, 2, 3]))


def test_own_settings_end_with_the_block():
    with jax.enable_x64(True), jax.transfer_guard("disallow"):
        with own_settings():
            assert jnp.arange(3.0).dtype == jnp.float32
            assert (jnp.ones(2) + np.ones(2, np.float32)).tolist() == [2, 2]
        assert jax.device_put(np.ones(2)).dtype == np.float64
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            jnp.ones(2) + np.ones(2)
