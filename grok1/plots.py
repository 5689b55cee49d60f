"""Plots of what a trace or a score holds, as Matplotlib figures; `pip install 'grok1[plots]'`.

Figures stand alone, outside of pyplot: they need no display, a notebook draws them as they are, and
`figure.savefig` saves them. Layers go up, as the residual stream does, and the palettes are for
colour-blind readers too.

Dimension key: L layer, T position, E expert, A chosen expert, N head.
"""

import functools
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from grok1 import reprs
from grok1.keywords import as_python, is_whole, shown
from grok1.study.scores import Score
from grok1.study.tracing import Trace

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, ListedColormap, PowerNorm, TwoSlopeNorm
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties, findfont, get_font
    from matplotlib.patches import Patch, Rectangle
except ImportError as error:
    raise ImportError(
        f"grok1.plots needs Matplotlib ({error}); install it with: pip install 'grok1[plots]'"
    ) from None

# Okabe and Ito, "Color Universal Design" (2008): colours that colour-blind readers tell apart.
_OKABE_ITO = (
    "#e69f00",
    "#56b4e9",
    "#009e73",
    "#f0e442",
    "#0072b2",
    "#d55e00",
    "#cc79a7",
    "#000000",
)
_MARK = "#d55e00"
_NONE = "#dddddd"
_FEW_LAYERS = 16  # up to here each layer has room for its number and a line around it
_LENS_POSITIONS = 16  # columns of words that fit on a page
_SMALL = 8  # points


class Plot(Figure):
    """A Matplotlib figure that notebooks draw without any set-up."""

    def _repr_png_(self) -> bytes:
        data = io.BytesIO()
        self.savefig(data, format="png", dpi=110)
        return data.getvalue()


def expert_load(trace: Trace) -> Plot:
    """Draws how often the router of each layer chose each expert.

    Args:
      trace: A trace with "router" captured.

    Returns:
      A map of layers by experts; white is the even share, 1 / E of the choices in a layer.
    """
    percent_LE = 100 * trace.expert_load()
    num_layers, num_experts = percent_LE.shape
    even = 100 / num_experts
    # Both arms of the palette have room even where the load is even.
    norm = TwoSlopeNorm(even, 0, max(percent_LE.max(), 2 * even))
    figure = _figure(0.6 * num_experts + 2.4, min(0.3 * num_layers, 9) + 1.5)
    axes = figure.subplots()
    image = axes.imshow(percent_LE, cmap="PuOr_r", norm=norm, aspect="auto", origin="lower")
    if num_layers <= 2 * _FEW_LAYERS:
        for (layer, expert), percent in np.ndenumerate(percent_LE):
            # The palette is dark at both ends.
            dark = abs(float(norm(percent)) - 0.5) > 0.35
            _write(axes, expert, layer, f"{percent:.0f}", "white" if dark else "black")
    _layer_axis(axes, num_layers)
    axes.set_xticks(range(num_experts))
    axes.set(xlabel="expert", title=f"Expert load over {len(trace.tokens):,} tokens")
    ticks = [0, even / 2, even, norm.vmax]
    bar = figure.colorbar(image, ticks=ticks, label="share of the choices in the layer, %")
    bar.ax.set_yticklabels(["0", f"{even / 2:.3g}", f"{even:.3g} (even)", f"{norm.vmax:.3g}"])
    return figure


def routing_ribbon(trace: Trace) -> Plot:
    """Draws a text, token by token, in the colours of the experts that each layer chose.

    Args:
      trace: A trace with "router" captured.

    Returns:
      A ribbon, wrapped like text. Each layer has a stripe for each of its A choices, the expert
      with the largest router probability uppermost.
    """
    indices_LTA = trace.expert_indices
    num_layers, length = indices_LTA.shape[:2]
    num_experts = trace.num_experts
    # From the bottom up, so that a layer's first choice is its uppermost stripe.
    stripes = indices_LTA[:, :, ::-1].transpose(0, 2, 1).reshape(-1, length)
    few = num_layers <= _FEW_LAYERS
    columns, cell_width, layer_height = (40, 0.25, 0.24) if few else (100, 0.12, 0.09)
    columns = min(columns, length)
    num_lines = math.ceil(length / columns)
    figure = _figure(
        max(cell_width * columns, 3) + 1.8, (layer_height * num_layers + 1.1) * num_lines + 0.3
    )
    palette = _palette(num_experts)
    labels = _token_labels(trace)
    lines = figure.subplots(num_lines, 1, squeeze=False).ravel()
    for begin, axes in zip(range(0, length, columns), lines, strict=True):
        here = stripes[:, begin : begin + columns]
        axes.imshow(
            here,
            cmap=palette,
            vmin=-0.5,
            vmax=num_experts - 0.5,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
            extent=(-0.5, here.shape[1] - 0.5, -0.5, num_layers - 0.5),
        )
        axes.set_xlim(-0.5, columns - 0.5)
        for boundary in range(1, num_layers):
            axes.axhline(boundary - 0.5, color="white", linewidth=1.5 if few else 0.4)
        _layer_axis(axes, num_layers)
        _token_axis(axes, labels[begin : begin + columns], size=_SMALL if few else 6)
        axes.spines[:].set_visible(False)
    lines[0].set_title(f"Experts chosen for {length:,} tokens", loc="left")
    lines[-1].set_xlabel("token")
    keys = [Patch(color=palette(index), label=str(index)) for index in range(num_experts)]
    if (stripes < 0).any():
        keys.append(Patch(color=_NONE, label="none"))
    figure.legend(
        handles=keys,
        title="expert (upper\nstripe: first)",
        loc="outside right upper",
        fontsize=_SMALL,
        title_fontsize=_SMALL,
    )
    return figure


def logit_lens(trace: Trace, positions: slice | Sequence[int] | int | None = None) -> Plot:
    """Draws which token each layer would predict, if the output head came right after it.

    Args:
      trace: A trace with "logit_lens" captured.
      positions: Which positions to draw, as a slice, one or several; negative ones count from the
        end. None for the last 16.

    Returns:
      A table of layers by positions: the most probable next token, coloured by its probability,
      and framed where the text goes on with it.

    Raises:
      ValueError: If there is no such position.
    """
    length = len(trace.tokens)
    drawn = _positions(slice(-_LENS_POSITIONS, None) if positions is None else positions, length)
    tokens_LT, probs_LT = trace.lens_tokens[:, drawn, 0], np.exp(trace.lens_logprobs[:, drawn, 0])
    num_layers = len(tokens_LT)
    figure = _figure(0.75 * len(drawn) + 2.4, 0.25 * num_layers + 1.9)
    axes = figure.subplots()
    image = axes.imshow(probs_LT, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
    words = _spellings(trace, np.unique(tokens_LT))
    for (layer, column), token in np.ndenumerate(tokens_LT):
        dark = probs_LT[layer, column] > 0.55
        _write(axes, column, layer, words[token], "white" if dark else "black")
        following = drawn[column] + 1
        if following < length and trace.tokens[following] == token:
            corner = (column - 0.47, layer - 0.45)
            axes.add_patch(Rectangle(corner, 0.94, 0.9, fill=False, edgecolor=_MARK, linewidth=1.5))
    _layer_axis(axes, num_layers)
    labels = _token_labels(trace)
    _token_axis(axes, [labels[position] for position in drawn])
    axes.set(
        xlabel=f"token read, positions {drawn[0]} to {drawn[-1]} of {length}",
        title="Logit lens: the most probable next token after each layer",
    )
    figure.colorbar(image, label="its probability")
    frame = Patch(fill=False, edgecolor=_MARK, label="the text goes on with this token")
    figure.legend(handles=[frame], loc="outside lower right", fontsize=_SMALL)
    return figure


def attention_map(trace: Trace, layer: int, head: int | None = None) -> Plot:
    """Draws which tokens each token attends to.

    Args:
      trace: A trace with "attention" captured in this layer.
      layer: One of `trace.attention_layers`.
      head: A query head; None for all of the layer, side by side.

    Returns:
      A map of tokens by the tokens they attend to; each row sums to 1, and grey is the future.

    Raises:
      ValueError: If the layer was not captured or has no such head.
    """
    layer, head = as_python(layer), as_python(head)
    if not is_whole(layer) or layer < 0:
        raise ValueError(f"layer must be one layer's number, from 0, found {shown(layer)}")
    layers = [int(index) for index in trace.attention_layers]
    if layer not in layers:
        raise ValueError(
            f"this trace has the attention of layers {layers}, not of layer {layer}; trace again "
            f'with capture=("attention",) and attention_layers=[{layer}]'
        )
    probs_NTT = trace.attention_probs[layers.index(layer)]
    num_heads, length, _ = probs_NTT.shape
    if head is not None and not (is_whole(head) and 0 <= head < num_heads):
        raise ValueError(f"head must be from 0 to {num_heads - 1}, found {shown(head)}")
    heads = range(num_heads) if head is None else [head]
    columns = min(len(heads), 4 if len(heads) <= _FEW_LAYERS else 8)
    rows = math.ceil(len(heads) / columns)
    side = 2.2 if head is None else min(max(0.19 * length, 2.5), 9)
    figure = _figure(side * columns + 1.6, side * rows + 1.3)
    figure.set_layout_engine("compressed")  # panels are square
    future_TT = np.triu(np.ones((length, length), bool), 1)
    # A square root: the many small probabilities are to be seen beside the few large ones.
    norm = PowerNorm(0.5, 0, 1)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for index, axes in zip(heads, panels, strict=False):
        probs_TT = np.ma.masked_array(probs_NTT[index], future_TT)
        axes.imshow(probs_TT, cmap="cividis", norm=norm, interpolation="nearest")
        axes.set_facecolor(_NONE)
        axes.set_title(f"head {index}", size=_SMALL)
    for axes in panels[len(heads) :]:
        axes.set_visible(False)
    if head is None:
        figure.suptitle(f"Attention in layer {layer}")
        figure.supxlabel("position attended to", size=10)
        figure.supylabel("position", size=10)
    else:
        every, labels = math.ceil(length / 50), _token_labels(trace)
        _token_axis(panels[0], labels, every=every)
        panels[0].set_yticks(
            range(0, length, every), labels[::every], parse_math=False, size=_SMALL
        )
        panels[0].set(xlabel="token attended to", ylabel="token")
        panels[0].set_title(f"Attention in layer {layer}, head {head}")
    figure.colorbar(
        panels[0].images[0],
        ax=panels,
        ticks=[0, 0.01, 0.1, 0.25, 0.5, 1],
        label="attention probability",
    )
    return figure


def surprisal(score: Score) -> reprs.Fragment:
    """Draws a text in HTML, each token coloured by how little the model expected it.

    Args:
      score: A score, which a notebook shows in the same way by itself.

    Returns:
      HTML that a notebook shows, and `str` returns: surprisal in bits, with a legend.
    """
    return reprs.Fragment(score._repr_html_())


def _positions(given: Any, length: int) -> list[int]:
    if isinstance(given, slice):
        drawn = list(range(length)[given])
    else:
        found = as_python(given)
        drawn = list(found) if isinstance(found, Iterable) else [found]
        for position in map(as_python, drawn):
            if not is_whole(position) or not -length <= position < length:
                raise ValueError(
                    f"positions must be from 0 to {length - 1}, or negative and from the end, "
                    f"found {shown(position)}"
                )
        drawn = [int(position) % length for position in drawn]
    if not drawn:
        raise ValueError(f"{given} picks none of the {length} positions of this trace")
    return drawn


def _figure(width: float, height: float) -> Plot:
    # White on every page: labels are black.
    return Plot(figsize=(width, height), layout="constrained", facecolor="white")


def _palette(num_experts: int) -> Colormap:
    if num_experts <= len(_OKABE_ITO):
        colors = list(_OKABE_ITO[:num_experts])
    else:
        colors = list(colormaps["viridis"](np.linspace(0, 1, num_experts)))
    # Expert -1 stands for none, where an intervention took a choice away.
    return ListedColormap(colors).with_extremes(under=_NONE)


def _layer_axis(axes: Axes, num_layers: int) -> None:
    axes.set_yticks(range(0, num_layers, 1 if num_layers <= _FEW_LAYERS else 8))
    axes.tick_params(axis="y", labelsize=_SMALL)
    axes.set_ylabel("layer")


def _token_axis(axes: Axes, labels: Sequence[str], *, size: float = _SMALL, every: int = 1) -> None:
    ticks = range(0, len(labels), every)
    axes.set_xticks(ticks, labels[::every], rotation=90, size=size, parse_math=False)


def _write(axes: Axes, column: int, row: int, word: str, color: str) -> None:
    text = axes.text(
        column, row, word, color=color, size=7, ha="center", va="center", parse_math=False
    )
    text.set_in_layout(False)  # it lies within its cell; asking a thousand of them takes seconds


def _token_labels(trace: Trace) -> list[str]:
    pieces = trace.tokens.tolist() if trace.pieces is None else trace.pieces
    return [_drawable(str(piece)) for piece in pieces]


def _spellings(trace: Trace, tokens: Iterable[int]) -> dict[int, str]:
    spell = str if trace.tokenizer is None else trace.tokenizer.piece
    return {int(token): _drawable(spell(int(token))) for token in tokens}


def _drawable(piece: str) -> str:
    """A piece as it can be drawn: visible spaces, and codes for what the font does not have."""
    known = _characters()
    text = reprs.readable(piece).replace("\n", "↵").replace(" ", "␣")
    return "".join(
        char if ord(char) in known else char.encode("unicode_escape").decode() for char in text
    )


@functools.cache
def _characters() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties())).get_charmap())
