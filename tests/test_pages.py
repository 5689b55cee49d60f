"""What the pages show of Python runs on the toy, and prints what they say it prints."""

import pathlib
import re
from typing import Any

import pytest

import grok1
from tests.conftest import TOY

ROOT = pathlib.Path(__file__).parent.parent
PYTHON = re.compile(
    r"^```python\n(.*?)^```\n(?:\n((?:    [^\n]*\n|\n(?=    ))+))?", re.DOTALL | re.M
)
NUMBER = re.compile(r"-?\d+\.\d+(?:e[+-]\d+)?")


def blocks(page: str) -> list[tuple[str, str]]:
    """The Python of a page, block by block, each with the output that is shown below it."""
    found = PYTHON.findall((ROOT / page).read_text(encoding="utf-8"))
    return [(code, re.sub("^    ", "", shown, flags=re.M)) for code, shown in found]


def check(printed: str, shown: str) -> None:
    """Compares outputs: text as it is, fractions as far as machines round alike."""
    # NumPy fills a column up with spaces.
    printed, shown = (re.sub(" +", " ", text).replace(" ]", "]") for text in (printed, shown))
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True)
    for found, expected in pairs:
        # Of what has an exponent, a difference of roundings, the size alone.
        tolerance = 0.2 if "e" in expected else 1e-3
        assert float(found) == pytest.approx(float(expected), rel=tolerance)


def test_blocks_are_found_with_their_output():
    assert len(blocks("docs/laboratory.md")) == 10
    assert sum(bool(shown) for _, shown in blocks("docs/laboratory.md")) == 5


def test_the_laboratory_shows_what_is_printed(monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(ROOT)
    # One of the devices that tests have.
    load = grok1.load
    monkeypatch.setattr(grok1, "load", lambda path, **more: load(path, mesh=(1, 1), **more))
    names = {}
    for code, shown in blocks("docs/laboratory.md"):
        exec(code, names)
        printed = capsys.readouterr().out
        check(printed, shown or printed)


def test_what_the_readme_says_can_be_asked_for_can_be(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    load = grok1.load

    def load_on_one(path, **options: Any):
        options["mesh"] = (1, 1)
        return load(path, **options)

    monkeypatch.setattr(grok1, "load", load_on_one)
    first, everything = (code for code, _ in blocks("README.md"))
    exec(first, {})
    assert capsys.readouterr().out.startswith(' the same as for the "for" statement.')
    changed = everything.replace("grok1.save(model, path)", "grok1.save(model, saved)")
    changed = changed.replace(
        "grok1.random_model(grok1.TOY)", "made = grok1.random_model(grok1.TOY)"
    )
    assert changed.count("saved") == changed.count("made") == 1
    names = {
        "grok1": grok1,
        "path": TOY,
        "prompt": "The first argument is",
        "text": "The file is opened for reading.",
        "tokens": [5, 6, 7],
        "saved": tmp_path / "saved",
    }
    exec(changed, names)
    assert names["model"].dtype == "bfloat16"
    assert names["trace"].router_probs.ndim == 3
    assert (tmp_path / "saved" / "ckpt-0" / "tensor00000_000").exists()
