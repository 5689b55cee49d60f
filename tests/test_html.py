"""What notebooks show: escaped, complete, the same numbers as the objects."""

import dataclasses
import html.parser
import math

import numpy as np
import pytest

import grok1
from grok1.reprs import figures, readable, surprisal_text, table


class Checker(html.parser.HTMLParser):
    """Collects text, and the elements that are open, so that unbalanced markup shows."""

    def __init__(self, markup: str):
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.titles: list[str] = []
        self.feed(markup)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert tag in ("div", "span", "strong", "table", "td", "th", "tr"), tag
        self.open.append(tag)
        self.titles += [value for name, value in attrs if name == "title"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def cells(markup: str) -> dict[str, str]:
    words = Checker(markup).words[1:]
    return dict(zip(words[::2], words[1::2], strict=True))


def test_table_escapes_names_and_values():
    checked = Checker(table("<i>", [("a & b", "<script>alert(1)</script>")]))
    assert checked.words == ["<i>", "a & b", "<script>alert(1)</script>"]


@pytest.mark.parametrize(
    ("piece", "text"),
    [
        ("▁the", " the"),
        ("<0x0A>", "\n"),
        ("<0x3C>", "<"),
        ("<0xE2>", "<0xE2>"),
        ("<0x07>", "<0x07>"),
        ("plain", "plain"),
    ],
)
def test_readable(piece, text):
    assert readable(piece) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0000512, "0.0000512"), (0.00234, "0.00234"), (46.71, "46.7"), (318.24, "318"),
     (999.6, "1,000"), (1262.35, "1,262"), (-1262.35, "-1,262"), (float("inf"), "inf")],
)  # fmt: skip
def test_figures_have_no_exponent(value, text):
    assert figures(value) == text


def test_surprisal_text_escapes_and_scales():
    pieces = [" <b>", "\n", ' "x"', "y"]
    markup = surprisal_text(pieces, [math.nan, 0.0, 5.0, 40.0], ['"', "<", "&", "y"], "a < b")
    checked = Checker(markup)
    assert checked.text.startswith(' <b>↵\n "x"y')
    assert checked.titles == ['"', "<", "&", "y"]
    assert checked.text.endswith("a < b")
    assert "bits" in checked.text
    spans = markup.split("<span")[1:5]
    assert "dotted" in spans[0]
    assert "0.00)" in spans[1]
    assert "0.33)" in spans[2]  # half of the ceiling is half of the strongest colour
    assert "0.65)" in spans[3]  # never stronger


def test_model_shows_size_memory_and_mesh(toy):
    shown = cells(toy._repr_html_())
    assert shown["parameters"] == "4,007,040"
    assert shown["weights"] == "4.68 MB, 4.68 MB on each device"
    assert shown["mesh"] == "1x1 (data x model), 1 CPU device"
    assert shown["products with weights"] == "float32"
    assert shown["key/value cache"] == "float32"
    assert shown["experts"] == "8, 2 for a token"


def test_model_on_a_mesh_shows_the_share_of_a_device(nano_path):
    model = grok1.load(nano_path, mesh=(2, 4), cache_dtype="int8", progress=False)
    shown = cells(model._repr_html_())
    total, share = (float(part.split()[0]) for part in shown["weights"].split(", "))
    assert total / 4 < share < total / 2
    assert shown["mesh"] == "2x4 (data x model), 8 CPU devices"
    assert shown["key/value cache"] == "int8"
    assert shown["vocabulary"] == "128, no tokenizer"


def test_config_shows_every_field():
    shown = cells(dataclasses.replace(grok1.GROK_1, renormalize_gates=True)._repr_html_())
    assert shown["renormalize_gates"] == "True"
    assert shown["emb_size (D)"] == "6,144"
    assert shown["ffn_size (F)"] == "32,768"
    assert shown["embedding_multiplier_scale"] == "78.38367177"


def test_completion_shows_its_text_and_perplexity():
    completion = grok1.Completion(
        text=" <b>&\n  x",
        tokens=[1, 2],
        logprobs=[-1.0, -3.0],
        top_logprobs=[{}, {}],
        stop_reason="length",
    )
    checked = Checker(completion._repr_html_())
    assert checked.words[0] == " <b>&\n  x"
    assert dict(zip(checked.words[2::2], checked.words[3::2], strict=True)) == {
        "tokens": "2",
        "ended by": "length",
        "mean log-probability": "-2.000 nats a token",
        "perplexity": "7.39",
    }
    assert repr(completion) == "Completion(text=' <b>&\\n  x', 2 tokens, stop_reason='length')"
    unlikely = dataclasses.replace(completion, logprobs=[-1000.0, -3000.0])
    assert "inf" in Checker(unlikely._repr_html_()).words


def test_score_shows_its_text_and_numbers(toy):
    score = toy.score("The file <b>")
    checked = Checker(score._repr_html_())
    assert checked.text.startswith("The file <b>")
    assert f"perplexity {score.perplexity:.4g}" in checked.text
    assert (
        f"{-score.logprobs[1] / math.log(2):.2f} bits, rank {score.ranks[1]}" in checked.titles[1]
    )


def test_a_score_shows_whole_characters_and_spells_what_has_no_shape(toy):
    score = toy.score("é \x07 a")
    # The space that encoding puts before a text has no text of its own.
    texts = [piece for piece in score.pieces if piece[:3] != "<0x"]
    assert "".join(texts).removeprefix("▁") == "é \x07 a"
    assert "é <0x07> a" in Checker(score._repr_html_()).text


def test_model_says_what_sets_it_apart(toy):
    assert repr(toy).endswith(", float32, mesh 1x1 cpu)")
    config = dataclasses.replace(toy.config, router_softcap=30, renormalize_gates=True)
    model = grok1.Model(toy.params, config, toy.mesh, "float32", [], cache_dtype="int8")
    with model.intervene(
        grok1.AblateExperts((3, 4), layers=iter((1, 2)), reroute=True),
        grok1.AddToResidual(np.zeros(128, np.float32)),
    ) as changed:
        assert repr(changed).endswith(
            ", mesh 1x1 cpu, cache int8, router soft cap 30, gates renormalised, with "
            "AblateExperts(experts=(3, 4), reroute=True, layers=(1, 2)), "
            "AddToResidual(vector=float32[128], point='residual'))"
        )
        shown = cells(changed._repr_html_())
    assert shown["routing"] == "router soft cap 30, gates renormalised"
    assert shown["interventions"] == (
        "AblateExperts(experts=(3, 4), reroute=True, layers=(1, 2)), "
        "AddToResidual(vector=float32[128], point='residual')"
    )
    assert not {"routing", "interventions"} & set(cells(toy._repr_html_()))


def test_choice_shows_every_option(toy):
    choice = toy.choose("The file", [" is", " <b>"])
    shown = cells(choice._repr_html_())
    assert list(shown) == [" is", " <b>"]
    assert shown[" is"].startswith(f"{choice.logprobs[0]:.2f} nats")
    assert repr(choice).startswith("Choice(best=' is', logprobs=[")


def test_trace_shows_its_arrays(toy):
    trace = toy.trace("The file", ("router", "attention"), attention_layers=[4])
    shown = cells(trace._repr_html_())
    assert shown["tokens"] == "2"
    assert shown["router_probs"] == "6 layer x 2 token x 8 expert, float32, 0.4 kB"
    assert shown["attention of layers"] == "4"
