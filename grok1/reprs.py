"""HTML for notebooks: tables and coloured text, escaped, legible on light and dark pages.

Text keeps the page's own colour and backgrounds are translucent, so that nothing here needs to know
which page it is on.
"""

import decimal
import html
import math
import re
from collections.abc import Iterable, Sequence

SURPRISAL_CEILING = 10.0
"""Bits from which on the colour of a token does not grow: 1 in 1,024. Fixed, so that the colours of
two texts can be compared."""

_HEAT = "213, 94, 0"  # vermilion of Okabe and Ito, which colour-blind readers tell from grey
_STRONGEST = 0.65  # opacity at which black and white text both keep a contrast above 4.5 to 1
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # as SentencePiece spells it
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # what has neither a shape nor a width
_ASCII_BYTE = re.compile("<0x(0A|[2-7][0-9A-F])>")
_CELL = "text-align: left; vertical-align: top; padding: 0.15em 1em 0.15em 0; border: none;"
# Browsers do not let old pages' tables inherit.
_TABLE = "border-collapse: collapse; margin: 0.3em 0; color: inherit; font-size: inherit;"
_TEXT = (
    "white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7; max-width: 60em; "
    "font-family: ui-monospace, monospace;"
)


class Fragment(str):
    """HTML that a notebook shows as such."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return str(self)


def table(title: str, rows: Iterable[tuple[str, object]]) -> str:
    """Returns a titled table of names and values."""
    lines = "".join(
        f'<tr style="background: none;"><th scope="row" style="{_CELL} font-weight: normal; '
        f'opacity: 0.75;">{html.escape(name)}</th>'
        f'<td style="{_CELL}">{html.escape(str(value))}</td></tr>'
        for name, value in rows
    )
    return (
        f'<div><strong>{html.escape(title)}</strong><table style="{_TABLE}">{lines}</table></div>'
    )


def figures(value: float) -> str:
    """Returns a number with three digits, or all of those before the point, and no exponent."""
    text = f"{value:.3g}"
    if "e" not in text:
        return text
    return f"{value:,.0f}" if abs(value) >= 1 else f"{decimal.Decimal(text):f}"


def text_block(text: str) -> str:
    """Returns text with its spaces and line breaks as they are."""
    return f'<div style="{_TEXT}">{html.escape(text)}</div>'


def readable(piece: str) -> str:
    """Returns the text of a SentencePiece piece: "▁the" is " the", "<0x0A>" a line break.

    Bytes that are only part of a character stay as they are spelt.
    """
    byte = _ASCII_BYTE.fullmatch(piece)
    return chr(int(byte[1], 16)) if byte else piece.replace(_SPACE, " ")


def surprisal_text(
    pieces: Sequence[str], bits: Sequence[float], hints: Sequence[str], summary: str
) -> str:
    """Returns text coloured by surprisal, with a legend.

    Args:
      pieces: The tokens' texts.
      bits: Surprisal of each, -log2 of its probability; nan for a token that was not scored.
      hints: What a pointer resting on each token shows.
      summary: The line below the text.
    """
    spans = "".join(
        f'<span title="{html.escape(hint)}" style="{_heat(value)}">{_visible(piece)}</span>'
        for piece, value, hint in zip(pieces, bits, hints, strict=True)
    )
    ramp = ", ".join(f"rgba({_HEAT}, {_STRONGEST * step / 4:.3g})" for step in range(5))
    legend = (
        '<div style="font-size: 85%; margin: 0.4em 0;">surprisal, bits: 0 '
        '<span style="display: inline-block; width: 9em; height: 0.8em; vertical-align: middle; '
        f'border: 1px solid currentColor; background: linear-gradient(to right, {ramp});"></span> '
        f"{SURPRISAL_CEILING:g} or more (1 in {2**SURPRISAL_CEILING:,.0f}); "
        '<span style="border-bottom: 2px dotted;">dotted</span>: not scored</div>'
    )
    return (
        f'<div><div style="{_TEXT}">{spans}</div>{legend}'
        f'<div style="font-size: 85%;">{html.escape(summary)}</div></div>'
    )


def _heat(bits: float) -> str:
    if math.isnan(bits):
        return "border-bottom: 2px dotted;"
    opacity = _STRONGEST * min(bits / SURPRISAL_CEILING, 1)
    return f"background: rgba({_HEAT}, {opacity:.2f}); border-radius: 2px;"


def _visible(piece: str) -> str:
    # A line break has no width to colour, so a sign stands before it.
    return html.escape(_CONTROL.sub(_spelt, piece)).replace("\n", "↵\n")


def _spelt(control: re.Match[str]) -> str:
    return f"<0x{ord(control[0]):02X}>"
