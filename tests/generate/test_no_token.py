"""Where no token can be drawn a request ends with an error that names what took them all."""

import copy
import json

import jax.numpy as jnp
import numpy as np
import pytest

from grok1.engine.engine import Engine
from tests.helpers import slow


def forbid_six(logits, tokens, length):
    return logits.at[:, 6].set(-jnp.inf)


def keep_one(logits, tokens, length):
    return jnp.where(jnp.arange(logits.shape[-1]) == 9, logits, -jnp.inf)


def forbid_all(logits, tokens, length):
    return jnp.full_like(logits, -jnp.inf)


def one_nan(logits, tokens, length):
    return logits.at[:, 3].set(jnp.nan)


def one_infinity(logits, tokens, length):
    return logits.at[:, 3].set(jnp.inf)


# With allowed tokens and without, greedily and not: each of these is a program.
@pytest.mark.parametrize(
    ("processor", "allowed", "temperature", "message"),
    [
        (forbid_six, [6], 0.7, "forbid_six has set every logit of allowed_tokens to -infinity"),
        (forbid_all, None, 0, "forbid_all has set every logit to -infinity; it has to leave"),
        (one_nan, None, 0.7, "one_nan must return numbers, or -infinity for a token"),
        (one_infinity, None, 0, "one_infinity must return numbers, or -infinity for a token"),
        *(
            pytest.param(*case, marks=slow)
            for case in [
                (forbid_six, [6], 0, "forbid_six has set every logit of allowed_tokens to -inf"),
                (keep_one, [5, 6], 0, "keep_one has set every logit of allowed_tokens to -infin"),
                (keep_one, [5, 6], 0.7, "keep_one has set every logit of allowed_tokens to -inf"),
                (forbid_all, None, 0.7, "forbid_all has set every logit to -infinity; it has to"),
                (one_nan, None, 0, "one_nan must return numbers, or -infinity for a token"),
                (one_nan, [5], 0, "one_nan must return numbers, or -infinity for a token"),
                (one_nan, [5], 0.7, "one_nan must return numbers, or -infinity for a token"),
                (one_infinity, None, 0.7, "one_infinity must return numbers, or -infinity for"),
            ]
        ),
    ],
)
def test_a_processor_that_leaves_nothing_is_named(nano, processor, allowed, temperature, message):
    with pytest.raises(ValueError, match=f"no token can be drawn: logits_processor {message}"):
        nano.generate(
            [5, 7],
            max_new_tokens=2,
            temperature=temperature,
            allowed_tokens=allowed,
            logits_processor=processor,
        )


@pytest.mark.parametrize(
    ("made", "found"),
    [
        (lambda logits: None, "NoneType"),
        (lambda logits: (logits, logits), "tuple"),
        (lambda logits: 0.0, "float"),
        (lambda logits: logits[:, :10], r"float32\[1, 10\]"),
        (lambda logits: logits[0], r"float32\[128\]"),
        (lambda logits: logits > 0, r"bool\[1, 128\]"),
        (lambda logits: logits.astype(jnp.int32), r"int32\[1, 128\]"),
    ],
)
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_a_processor_returns_logits_as_it_gets_them(nano, made, found, temperature):
    def processor(logits, tokens, length):
        return made(logits)

    # JAX adds a note of its own to what is raised while it traces.
    message = rf"^logits_processor .*must return logits .*float32\[1, 128\], found {found}(\n|$)"
    with pytest.raises(ValueError, match=message):
        nano.generate([5, 7], temperature=temperature, logits_processor=processor)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_what_a_processor_rounds_is_drawn_from(nano, dtype):
    options = {"max_new_tokens": 3, "ignore_eos": True}
    rounded = nano.generate([5, 7], **options, logits_processor=lambda x, *_: x.astype(dtype))
    expected = nano.generate(
        [5, 7], **options, logits_processor=lambda x, *_: x.astype(dtype).astype(jnp.float32)
    )
    assert rounded.tokens == expected.tokens


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"logprobs": 2}])
@pytest.mark.parametrize("value", [np.nan, pytest.param(np.inf, marks=slow)])
def test_logits_that_are_not_finite_end_a_request(nano, options, value):
    params = nano.params._replace(final_norm=nano.params.final_norm.at[3].set(value))
    model = copy.copy(nano)
    model.engine = Engine(params, nano.config, nano.engine.mesh, nano.engine.dtype)
    model.engine._programs = nano.engine._programs  # of the same shapes
    with pytest.raises(ValueError, match="the model's logits must be finite, found NaN"):
        model.generate([5, 7], max_new_tokens=2, **options)


def test_log_probabilities_are_the_models_whatever_a_processor_makes_of_its_logits(nano):
    options = {"max_new_tokens": 3, "temperature": 0, "logprobs": 3, "ignore_eos": True}
    plain = nano.generate([5, 7], **options)
    kept = nano.generate([5, 7], **options, logits_processor=keep_one)
    assert kept.tokens == [9, 9, 9]
    assert kept.top_logprobs[0] == pytest.approx(plain.top_logprobs[0], abs=1e-5)
    assert np.all(np.isfinite(kept.logprobs))
    assert "Infinity" not in json.dumps([kept.logprobs, kept.top_logprobs])


@pytest.mark.parametrize("temperature", [8.5e37, 3e38, 1e300])
def test_a_huge_temperature_draws_evenly(nano, temperature):
    allowed = [6, 70, 71, 100]
    drawn = nano.generate(
        [5, 7],
        max_new_tokens=64,
        temperature=temperature,
        top_p=1.0,
        allowed_tokens=allowed,
        ignore_eos=True,
    ).tokens
    counts = [drawn.count(token) for token in allowed]
    assert sum(counts) == 64
    assert min(counts) >= 6
