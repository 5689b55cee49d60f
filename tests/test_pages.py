"""What the pages show of Python runs on the toy, and prints what they say it prints.

The commands that they show are ones that there are.
"""

import argparse
import contextlib
import pathlib
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest

import grok1
from grok1.command import model_options, parser
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


PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
COMMAND = re.compile(
    r"(?<![\w.'-])(?<!--model )(?:python -m grok1|python (run\.py)|grok1) (?!import)(?=[a-z-])"
)


def commands(page: str) -> Iterator[tuple[str, list[str]]]:
    """The commands of the command line that a page shows: (whole text, arguments)."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    for found in COMMAND.finditer(text):
        lines = text[found.end() :].splitlines()
        if text[: found.end()].rpartition("\n")[2].count("`") % 2:
            lines = [lines[0].partition("`")[0]]
        for count in range(1, len(lines) + 1):
            # A prompt in quotes may have several lines.
            try:
                words = shlex.split("\n".join(lines[:count]), comments=True)
            except ValueError:
                continue
            yield found[0] + lines[0], (["generate"] if found[1] else []) + words
            break


def test_commands_are_found():
    found = [words for page in PAGES for _, words in commands(page)]
    assert len(found) > 30
    assert {words[0] for words in found} >= set(parser._COMMANDS)
    assert any("def is_prime" in word for words in found for word in words)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_have_the_options_that_it_shows(page, capsys):
    for shown, words in commands(page):
        given = [word for word in words if word not in ("...", ";")]
        with contextlib.suppress(SystemExit):
            parser.parse(given, "grok1")
        assert capsys.readouterr().err == "", shown


def test_every_option_of_the_server_is_told_on_its_page():
    options = argparse.ArgumentParser()
    model_options.serve(options)
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    told = set(re.findall(r"--[a-z-]+", page))
    model = argparse.ArgumentParser()
    model_options._model(model)
    model_options._hosts(model)
    names = set(options._option_string_actions) - set(model._option_string_actions)
    assert {name for name in names if name.startswith("--")} <= told
