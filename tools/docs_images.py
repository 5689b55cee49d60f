"""Draws the pictures of the documentation from the toy: python -m tools.docs_images.

The plots are Matplotlib's; the HTML of notebooks is photographed, light and dark, where there is a
Chromium to do it.
"""

import argparse
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

import grok1
from grok1 import plots, reprs

ROOT = pathlib.Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
TEXT = """The function open() returns a file object. If the file cannot be opened, an
exception is raised.

>>> with open("spam.txt", mode="r") as file:
...     for line in file:
...         print(len(line), line.strip())
"""
SCORED = (
    "If the optional argument is omitted, the file is opened for reading.\n"
    "If the optional elephant is omitted, the file is eaten for breakfast."
)


def draw_plots(model: grok1.Model) -> None:
    """Saves the four figures."""
    trace = model.trace(TEXT, capture=("router", "logit_lens"))
    quoted = model.trace('The string "name', capture=("attention",))
    figures = {
        "expert-load": plots.expert_load(trace),
        "routing-ribbon": plots.routing_ribbon(trace),
        "logit-lens": plots.logit_lens(trace, slice(2, 16)),
        "attention-map": plots.attention_map(quoted, 3, 5),
    }
    for name, figure in figures.items():
        figure.savefig(IMAGES / f"{name}.png", dpi=90)


def photograph(name: str, fragments: Sequence[str], size: tuple[int, int], browser: str) -> None:
    """Saves HTML as a picture: the same fragments on a light page and, below it, on a dark one.

    Args:
      name: Of the picture.
      fragments: The HTML.
      size: Width and height in pixels of a page, of which the picture has two for each; as wide as
        the documentation's text, so that letters keep their size there.
      browser: The Chromium.
    """
    themes = {"#ffffff": "#111111", "#111111": "#e0e0e0"}
    pages = "".join(
        f'<div style="background: {background}; color: {text}; padding: 12px; height: 50vh; '
        f'box-sizing: border-box;">{"<hr>".join(fragments)}</div>'
        for background, text in themes.items()
    )
    with tempfile.TemporaryDirectory() as private:
        page = pathlib.Path(private) / "page.html"
        page.write_text(
            '<!DOCTYPE html><meta charset="utf-8">'
            '<body style="margin: 0; font: 15px sans-serif;">'
            f"{pages}</body>",
            encoding="utf-8",
        )
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        subprocess.run(
            [
                browser,
                *options,
                f"--user-data-dir={private}/profile",
                "--force-device-scale-factor=2",
                f"--window-size={size[0]},{2 * size[1]}",
                f"--screenshot={IMAGES / name}.png",
                page.as_uri(),
            ],
            check=True,
            capture_output=True,
        )


def main() -> None:
    """Draws them all."""
    argparse.ArgumentParser(description="Draws the pictures of docs/images anew.").parse_args()
    IMAGES.mkdir(exist_ok=True)
    model = grok1.load(ROOT / "checkpoints" / "toy", mesh=(1, 1), progress=False)
    draw_plots(model)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print("no Chromium: surprisal.png, reprs.png and config.png stay as they are")
        return
    score = model.score(SCORED)
    photograph("surprisal", [plots.surprisal(score)], (920, 160), browser)
    completion = model.generate(
        "The first argument is", max_new_tokens=40, temperature=0, logprobs=0
    )
    trace = model.trace(TEXT, capture=("router", "attention"), attention_layers=[3])
    shown = [reprs.Fragment(each._repr_html_()) for each in (model, completion, trace)]
    photograph("reprs", shown, (920, 680), browser)
    photograph("config", [reprs.Fragment(grok1.GROK_1._repr_html_())], (920, 520), browser)


if __name__ == "__main__":
    main()
