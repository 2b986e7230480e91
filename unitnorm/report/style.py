"""How every figure of the project looks: settings, colours, layout, and the bytes of a figure.

matplotlib is used through its objects alone: no pyplot, no state left behind. Sizes are for a
README 800 pixels wide, where a point of the figure is a point of the page.
"""

import io
import itertools
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter
from PIL import Image

WIDTH = 8.3  # inches: 800 pixels at the 96 pixels per inch of a browser
PNG_DPI = 150
FONT = 9.0  # points, the smallest in any figure
GREY, PALE = "#666666", "#aaaaaa"
BASELINE = "b-sgd"  # the update that the others are compared with

_SETTINGS: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": FONT + 1,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.dpi": PNG_DPI,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": FONT,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.hashsalt": "unitnorm",  # else every SVG has ids of its own
}


class Style(NamedTuple):
    """How an update is drawn; told apart by any one of the three."""

    colour: str
    line: str | tuple[int, tuple[float, ...]]
    marker: str


# Okabe and Ito's colours, which colour-blind readers can tell apart; their yellow, too pale for
# lines on white, is replaced by a dark olive, and grey is the ninth.
_STYLES = {
    "b-sgd": Style("#D55E00", (0, (5, 1.5)), "s"),
    "un": Style("#0072B2", "-", "o"),
    "un-momentum": Style("#56B4E9", (0, (6, 1.5, 1, 1.5)), "^"),
    "un-nesterov": Style("#009E73", (0, (1, 1)), "v"),
    "un-adam": Style("#CC79A7", (0, (3, 1, 1, 1, 1, 1)), "D"),
    "sm": Style("#E69F00", (0, (8, 2)), "P"),
    "normalize": Style("#000000", (0, (3, 1)), "X"),
    "weight-norm": Style("#999999", (0, (2, 2)), "<"),
    "sgd-wd": Style("#6B6100", (0, (10, 2, 2, 2)), ">"),
}
_LABELS = {"b-sgd": "B-SGD", "un": "UN"}  # as the paper prints them


def label(update: str) -> str:
    """The name of an update in tables and figures: the paper's where it has one, on one line."""
    return _LABELS.get(update, re.sub(r"\s+", " ", update))


def sort_updates(updates: Iterable[str]) -> list[str]:
    """Each update once: the baseline first, UN next, the others by name."""
    return sorted(set(updates), key=lambda name: (name != BASELINE, name != "un", name))


def assign_styles(updates: Iterable[str]) -> dict[str, Style]:
    """A style for each update: always the same for one of the nine, else one that is still free."""
    updates = sort_updates(updates)
    free = itertools.cycle([name for name in _STYLES if name not in updates] or _STYLES)
    return {name: _STYLES[name if name in _STYLES else next(free)] for name in updates}


def tell_apart(updates: Iterable[str]) -> tuple[list[str], list[str]]:
    """The updates to draw each in a style of its own, and those that are too many for it."""
    updates = sort_updates(updates)
    if len(updates) <= len(_STYLES):
        return updates, []
    own = [name for name in updates if name in _STYLES]
    return own, [name for name in updates if name not in own]


# On top of matplotlib's own settings, not the user's, for the time of one figure.
settings = partial(mpl.style.context, ["default", _SETTINGS])


def encode(figure: Figure, *, palette: bool = False) -> dict[str, bytes]:
    """A figure as bytes by file ending, `png` and `svg`: the same each time, no date, no version.

    With `palette` the PNG is in 256 colours, see `quantize`.
    """
    metadata: dict[str, dict] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    files = {}
    with settings():
        if layout := figure.get_layout_engine():
            layout.execute(figure)  # once, and not for each of the files
            figure.set_layout_engine("none")
        for ending, without in metadata.items():
            content = io.BytesIO()
            figure.savefig(content, format=ending, dpi=PNG_DPI, metadata=without)
            files[ending] = content.getvalue()
    if palette:
        files["png"] = quantize(files["png"], dpi=(PNG_DPI, PNG_DPI))
    return files


def quantize(png: bytes, **options: Any) -> bytes:
    """A PNG in 256 colours, enough for lines: a third of the size; `options` are for saving it."""
    content = io.BytesIO()
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(content, "PNG", optimize=True, **options)
    return content.getvalue()


def lay_out(
    shape: tuple[int, int],
    height: float,
    handles: list[Line2D],
    note: str,
    *,
    sharex: bool = True,
    sharey: bool | Literal["none", "all", "row", "col"] = True,
    legend_columns: int = 5,
) -> tuple[Figure, np.ndarray]:
    """A figure of equal panels and its axes, (rows, columns); a legend above and a note below.

    A row of panels, with its title and its ticks, is `height` inches. Panels that share an axis
    show their own numbers all the same.
    """
    notes = textwrap.wrap(note, 118)
    legend_columns = min(len(handles), legend_columns)
    above = 0.24 * math.ceil(len(handles) / legend_columns)
    rows, columns = shape
    tall = rows * height + above + 0.17 * len(notes) + 0.15
    figure = Figure(figsize=(WIDTH, tall), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)
    for axis in axes.ravel():
        axis.tick_params(labelleft=True, labelbottom=True)
    figure.legend(handles=handles, loc="outside upper left", ncols=legend_columns, handlelength=3.2)
    figure.supxlabel(
        "\n".join(notes), x=0.01, ha="left", color=GREY, fontsize=FONT, linespacing=1.25
    )
    return figure, axes


def match_axes(panels: Iterable[Any], axes: np.ndarray) -> Iterator[tuple[Any, Axes]]:
    """The panels and their axes; the axes left over are taken away."""
    panels = list(panels)
    for axis in axes.ravel()[len(panels) :]:
        axis.remove()
    yield from zip(panels, axes.ravel(), strict=False)


def make_handle(marker: str = "", line: Any = "none", **options: Any) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], linestyle=line, marker=marker, **options)


def make_handles(styles: Mapping[str, Style], *, markers: bool = True) -> list[Line2D]:
    """An entry of the legend for each update."""
    return [
        make_handle(markers * s.marker, s.line, color=s.colour, lw=2, ms=5, label=label(update))
        for update, s in styles.items()
    ]


def set_log_scale(axis: Axes, low: float, high: float) -> None:
    """A logarithmic vertical axis from low to high (> 0), with numbers enough to read."""
    axis.set_yscale("log")
    margin = (high / low) ** 0.04 if high > low else 2.0
    axis.set_ylim(low / margin, high * margin)
    decades = math.log10(high / low)
    if decades < 2:  # too few powers of ten
        few, more = (1, 2, 5), (1, 2, 3, 5, 7)
        subs = few if decades > 1 else more if decades > 0.7 else (1, 1.5, 2, 3, 5, 7)
        axis.yaxis.set_major_locator(LogLocator(subs=subs))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def set_log_axes(axes: Iterable[Axes], low: float | None = None) -> None:
    """Both axes logarithmic, with no more numbers than fit; the vertical one from `low` on."""
    for axis in axes:
        axis.set(xscale="log", yscale="log")
        for side, ticks in ((axis.xaxis, 6), (axis.yaxis, 7)):
            side.set_major_locator(LogLocator(numticks=ticks))
            side.set_minor_locator(NullLocator())
        axis.set_ylim(bottom=low)
