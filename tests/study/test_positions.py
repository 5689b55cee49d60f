"""Positions that interventions name: those of a text, those to come, and those that it has not."""

from typing import Any

import numpy as np
import pytest

import grok1
from grok1.study.router_interventions import AblateExperts, ForceExperts
from grok1.study.stream_interventions import AddToResidual, Patch, ScaleHeads
from tests.helpers import relative_error
from tests.study.helpers import ALL


def test_positions_are_refused_where_a_text_is_cut(nano, tokens):
    text = np.resize(tokens, 64)
    message = "^{}: it acts at positions counted from .* of 64 tokens is cut into pieces that begin"
    trace = nano.trace(text, ALL)
    for intervention in (
        ScaleHeads(1, positions=3),
        Patch("residual", trace, layers=3),
        Patch("router", trace, positions=3),
        ForceExperts(trace.expert_indices),
        ForceExperts((1, 2), positions=3),
    ):
        expected = message.format(type(intervention).__name__)
        with nano.intervene(intervention) as changed, pytest.raises(ValueError, match=expected):
            changed.score(text, window=16)
    with nano.intervene(ScaleHeads(1)) as changed:
        changed.score(text, window=16)
    # A window of all but the last token holds what is run.
    with nano.intervene(ScaleHeads(1, positions=3)) as changed:
        np.testing.assert_array_equal(
            changed.score(text, window=63).logprobs, changed.score(text).logprobs
        )


def test_a_patch_of_another_length_is_refused(nano, tokens):
    message = "^{}: {} are of 10 tokens and the text has 12; take them from a text of the same"
    trace = nano.trace(tokens[:10], ALL)
    for intervention, what in (
        (Patch("residual", trace, layers=3), "values"),
        (Patch("residual", trace, positions=slice(2, None)), "values"),
        (Patch("router", trace), "values"),
        (ForceExperts(trace.expert_indices), "experts"),
    ):
        expected = message.format(type(intervention).__name__, what)
        with nano.intervene(intervention) as changed:
            for call in (
                changed.logits,
                changed.trace,
                changed.score,
                changed.generate,
                changed.trace_generation,
                lambda text: changed.choose(text[:7], [text[7:]]),
                lambda text: changed.score(text, window=11),
            ):
                with pytest.raises(ValueError, match=expected):
                    call(tokens[:12])
    # Named positions say what is meant.
    with nano.intervene(Patch("residual", trace, layers=11, positions=range(10))) as changed:
        found = changed.trace(tokens[:12], ALL)
    np.testing.assert_array_equal(found.residual[11, :10], trace.residual[11])


def test_positions_that_a_text_has_not_are_refused(nano, tokens):
    recorded = nano.trace(tokens[:20], ALL)
    text, longer = tokens[:12], tokens[:14]
    message = (
        "^{}: positions must be from 0 to 11, since the text has 12 tokens, found {}; give a "
        r"longer text, or name all from one on as slice\(10, None\)$"
    )
    for intervention, found in (
        (ScaleHeads(1, positions=12), 12),
        (AblateExperts(3, positions=range(10, 14)), 13),
        (AddToResidual(np.ones(64), positions=slice(12, None)), 12),
        (Patch("residual", recorded, positions=(3, 13)), 13),
        (Patch("router", recorded, positions=13), 13),
    ):
        expected = message.format(type(intervention).__name__, found)
        with nano.intervene(intervention) as changed:
            for call in (
                changed.logits,
                changed.trace,
                changed.score,
                lambda text: changed.score([longer, text]),
                lambda text: changed.choose(text[:7], [text[7:]]),
                lambda text: changed.choose(text[:7], [longer[7:], text[7:]]),
                lambda text: grok1.compare(nano, changed, text),
            ):
                with pytest.raises(ValueError, match=expected):
                    call(text)
    # The last token that there is.
    for last in (11, slice(11, None)):
        with nano.intervene(AddToResidual(np.ones(64), positions=last)) as changed:
            assert relative_error(changed.logits(text)[11], nano.logits(text)[11]) > 1e-3


def test_positions_may_be_of_tokens_to_come_and_of_no_others(nano, tokens):
    prompt, longer = tokens[:12], tokens[:14]
    options = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}
    # The fourth new token is drawn and not run.
    with nano.intervene(ScaleHeads(1, positions=14)) as changed:
        changed.generate(prompt, **options)
    message = (
        "^ScaleHeads: positions must be from 0 to 14, since the text has 12 tokens and at most 3 "
        "new ones are run, found 15; give a longer text"
    )
    with nano.intervene(ScaleHeads(1, positions=15)) as changed:
        changed.generate(longer, **options)
        for call in (changed.generate, changed.trace_generation):
            with pytest.raises(ValueError, match=message):
                call(prompt, **options)
        with pytest.raises(ValueError, match=message):
            changed.generate([longer, prompt], **options)


def test_a_position_that_was_not_generated_is_told(nano, tokens):
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
    prompts = [tokens[:18], tokens[:12]]
    with nano.intervene(ScaleHeads(1, positions=(3, 16))) as changed:
        first = changed.generate(prompts[1], **options).tokens[0]
        message = (
            "^ScaleHeads: nothing was changed at position 16, which prompt {} did not reach: it "
            "ended by 'stop' with 12 tokens run; give ignore_eos=True or fewer stops, or name all "
        )
        for call, number in (
            (lambda: changed.generate(prompts[1], **options, stop=[first]), 0),
            (lambda: changed.trace_generation(prompts[1], **options, stop=[first]), 0),
            (lambda: changed.generate(prompts, **options, stop=[first]), 1),
        ):
            with pytest.warns(UserWarning, match=message.format(number)) as told:
                call()
            # Told of the caller's line, whatever lies between.
            assert [one.filename for one in told] == [__file__]
    # What is from one on to the end may begin behind it, as long as it may begin.
    with nano.intervene(ScaleHeads(1, positions=slice(3, None))) as changed:
        changed.generate(prompts[1], **options, stop=[first])
