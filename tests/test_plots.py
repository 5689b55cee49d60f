"""The plots show the numbers of the trace, with labels and legends, on small and large models."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import AxesImage

from grok1 import plots
from grok1.study.router_interventions import ForceExperts
from grok1.study.tracing import Trace
from tests.helpers import slow

CAPTURE = ("router", "attention", "logit_lens")


@pytest.fixture(scope="module")
def trace(toy) -> Trace:
    return toy.trace("Returns $x$ and $y$\n  日本 if the file is open, and", CAPTURE)


def synthetic(num_layers: int, length: int, num_heads: int, num_experts: int = 8) -> Trace:
    generator = np.random.default_rng(0)
    probs = generator.dirichlet(np.ones(num_experts), (num_layers, length)).astype(np.float32)
    attention = np.tril(generator.random((1, num_heads, length, length), np.float32))
    tokens = generator.integers(0, 50, length, np.int32)
    return Trace(
        tokens=tokens,
        pieces=None,
        arrays={
            "router_probs": probs,
            "expert_indices": np.argsort(-probs, axis=-1)[..., :2].astype(np.int32),
            "expert_weights": -np.sort(-probs, axis=-1)[..., :2],
            "attention_probs": attention / attention.sum(axis=-1, keepdims=True),
            "lens_tokens": generator.integers(0, 50, (num_layers, length, 1), np.int32),
            "lens_logprobs": np.log(generator.random((num_layers, length, 1), np.float32)),
        },
        num_prompt_tokens=length,
        attention_layers=(num_layers - 1,),
        num_experts=num_experts,
        tokenizer=None,
    )


def images(figure: plots.Plot) -> list[AxesImage]:
    return [image for axes in figure.axes for image in axes.images]


def words(figure: plots.Plot) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def legend(figure: plots.Plot) -> list[str]:
    return [text.get_text() for found in figure.legends for text in found.get_texts()]


def draw_all(trace: Trace) -> list[plots.Plot]:
    layer = trace.attention_layers[-1]
    return [
        plots.expert_load(trace),
        plots.routing_ribbon(trace),
        plots.logit_lens(trace),
        plots.attention_map(trace, layer, 1),
        plots.attention_map(trace, layer),
    ]


# Warnings are errors here: a missing glyph or a layout that does not fit would fail.
@pytest.mark.parametrize(
    ("num_layers", "length", "num_heads", "num_experts"),
    # A map of each head costs most; Grok-1 has 48.
    [
        (3, 41, 2, 11),
        pytest.param(64, 60, 4, 8, marks=slow),
        pytest.param(64, 200, 48, 8, marks=slow),
    ],
)
def test_every_size_is_drawn(num_layers, length, num_heads, num_experts):
    for figure in draw_all(synthetic(num_layers, length, num_heads, num_experts)):
        assert figure._repr_png_().startswith(b"\x89PNG")
        width, height = figure.get_size_inches()
        assert 3 < width < 20
        assert 2 < height < 20


def test_every_axis_of_the_toy_is_labelled(trace):
    figures = draw_all(trace)
    # Of the longest labels.
    assert figures[1]._repr_png_().startswith(b"\x89PNG")
    for figure in figures:
        main = figure.axes[0]
        titles = [main.get_title(), main.get_title(loc="left"), figure.get_suptitle()]
        assert any(titles)
        assert main.get_xlabel() or figure.get_supxlabel()
        assert main.get_ylabel() or figure.get_supylabel()
    for figure in (figures[i] for i in (0, 2, 3, 4)):
        assert figure.axes[-1].get_ylabel()  # of the colour bar


def test_expert_load_shows_percentages_of_a_layer(trace):
    figure = plots.expert_load(trace)
    (image,) = images(figure)[:1]
    np.testing.assert_allclose(image.get_array().sum(axis=1), 100)
    np.testing.assert_allclose(image.get_array(), 100 * trace.expert_load())
    assert words(figure)[0] == f"{100 * trace.expert_load()[0, 0]:.0f}"
    assert "%" in figure.axes[1].get_ylabel()


def test_routing_ribbon_puts_the_first_choice_on_top(trace):
    figure = plots.routing_ribbon(trace)
    shown = np.asarray(images(figure)[0].get_array())
    length = min(len(trace.tokens), 40)
    assert shown.shape == (12, length)
    np.testing.assert_array_equal(shown[1::2], trace.expert_indices[:, :length, 0])
    np.testing.assert_array_equal(shown[0::2], trace.expert_indices[:, :length, 1])
    assert legend(figure) == [str(expert) for expert in range(8)]
    labels = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert labels[:2] == ["Return", "s"]
    assert "↵" in labels
    assert "␣and" in labels
    assert not any(" " in label or "\n" in label for label in labels)


def test_routing_ribbon_says_where_no_expert_ran(toy):
    tokens = toy.tokenizer.encode("The file is")
    nobody = np.full((6, len(tokens), 2), -1)
    with toy.intervene(ForceExperts(nobody)) as changed:
        figure = plots.routing_ribbon(changed.trace(tokens, ("router",)))
    assert legend(figure)[-1] == "none"
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_logit_lens_names_and_frames_tokens(trace, toy):
    figure = plots.logit_lens(trace, slice(2, 7))
    best = trace.lens_tokens[:, 2:7, 0]
    assert len(words(figure)) == best.size
    spelt = toy.tokenizer.piece(best[0, 0]).replace("▁", "␣")
    assert words(figure)[0] == spelt
    hits = best == trace.tokens[None, 3:8]
    assert len(figure.axes[0].patches) == hits.sum()
    probabilities = np.asarray(images(figure)[0].get_array())
    np.testing.assert_allclose(probabilities, np.exp(trace.lens_logprobs[:, 2:7, 0]))
    assert "positions 2 to 6" in figure.axes[0].get_xlabel()
    with pytest.raises(ValueError, match=r"picks none of the \d+ positions"):
        plots.logit_lens(trace, slice(500, 600))


def test_logit_lens_draws_one_position_and_several(trace):
    length = len(trace.tokens)
    expected = np.exp(trace.lens_logprobs[:, :, 0])
    for positions, drawn in (
        (3, [3]),
        (-1, [length - 1]),
        (np.array([1, 4]), [1, 4]),
        (range(2, 4), [2, 3]),
    ):
        (image, *_) = images(plots.logit_lens(trace, positions))
        np.testing.assert_allclose(np.asarray(image.get_array()), expected[:, drawn])
    for positions in (length, -length - 1, 2.0, [1, "a"], True):
        with pytest.raises(ValueError, match=rf"^positions must be from 0 to {length - 1}, or neg"):
            plots.logit_lens(trace, positions)


def test_attention_map_hides_the_future(trace):
    figure = plots.attention_map(trace, 3, 5)
    shown = images(figure)[0].get_array()
    assert np.ma.getmaskarray(shown)[0].sum() == len(trace.tokens) - 1
    np.testing.assert_allclose(shown.filled(0), trace.attention_probs[3, 5], atol=1e-7)
    np.testing.assert_allclose(shown.sum(axis=1), 1, rtol=1e-5)
    assert len([axes for axes in plots.attention_map(trace, 3).axes if axes.images]) == 8


def test_attention_map_says_what_is_missing(toy, trace):
    partial = toy.trace("The file", ("attention",), attention_layers=[1, 4])
    message = r"layers \[1, 4\], not of layer 2.*\(.attention.,\) and attention_layers=\[2\]"
    with pytest.raises(ValueError, match=message):
        plots.attention_map(partial, 2)
    with pytest.raises(ValueError, match="head must be from 0 to 7, found 8"):
        plots.attention_map(trace, 0, 8)
    with pytest.raises(ValueError, match="head must be from 0 to 7, found True"):
        plots.attention_map(trace, 0, True)
    with pytest.raises(ValueError, match=r"layer must be one layer's number, .*found \[0\]"):
        plots.attention_map(trace, [0])
    with pytest.raises(ValueError, match=r"layer must be one layer's number, .*found -1$"):
        plots.attention_map(trace, -1)


def test_what_was_not_captured_is_named(toy):
    with pytest.raises(AttributeError, match=r"no lens_tokens.*capture=\('logit_lens',\)"):
        plots.logit_lens(toy.trace("The file", ("router",)))


def test_surprisal_is_the_score_in_colours(toy):
    score = toy.score("The file <b>is</b> open")
    shown = plots.surprisal(score)
    assert shown == shown._repr_html_() == score._repr_html_()
    assert "surprisal, bits" in shown
    assert "<b>" not in shown


def test_a_missing_extra_is_one_clear_message_and_importing_plots_leaves_pyplot_alone():
    program = (
        "import sys\n"
        "sys.modules['matplotlib'] = None\n"
        "try:\n    import grok1.plots\n"
        "except ImportError as error:\n    print(error)\n"
        "del sys.modules['matplotlib']\n"
        "import grok1.plots\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    message = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert message.startswith("grok1.plots needs Matplotlib (")
    assert message.endswith("install it with: pip install 'grok1[plots]'")
