"""The report's figures: the same records give the same bytes, as PNG and as SVG.

One public function per figure, `encode` for its bytes, and `style`, which gives each update its
colour, line and marker in all of them. matplotlib is used through its objects alone (no pyplot, no
state left behind), and a user's own matplotlib settings are shut out. Sizes are meant for a README
800 pixels wide, where a point of the figure is a point of the page.
"""

import io
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from unitnorm.errors import UserError
from unitnorm.report.frames import BASELINE, checked_history, checked_runs, in_order, label
from unitnorm.report.statistics import CONFIDENCE, PAPER, Paper, carried_mean, interval, pairs

WIDTH = 8.3  # inches: 800 pixels at the 96 pixels per inch of a browser
PNG_DPI = 150
FONT = 9.0  # points, the smallest in any figure

_SETTINGS: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": FONT + 1,
    "figure.dpi": PNG_DPI,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": FONT,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.fontsize": FONT,
    "legend.frameon": False,
    "lines.scale_dashes": True,
    "svg.hashsalt": "unitnorm",  # else every SVG has ids of its own
    "xtick.labelsize": FONT,
    "ytick.labelsize": FONT,
}
_NARROW = 6  # with more updates than this in a panel, their names take two lines
_SHADES = 33  # of a filter's image: odd, so that white is zero; fewer make smaller files
_GREY, _PALE = "#666666", "#aaaaaa"


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


def style(updates: Iterable[str]) -> dict[str, Style]:
    """A style for each update: its own where it has one, else one that is still free.

    The styles of the nine updates of the project never change, whichever of them are drawn.
    """
    updates = in_order(updates)
    free = [name for name in _STYLES if name not in updates] or list(_STYLES)
    others = [name for name in updates if name not in _STYLES]
    spare = {name: free[place % len(free)] for place, name in enumerate(others)}
    return {name: _STYLES[spare.get(name, name)] for name in updates}


def encode(figure: Figure) -> dict[str, bytes]:
    """A figure of this module as bytes by file ending, `png` and `svg`; no date, no version."""
    metadata: dict[str, dict] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    files = {}
    with settings():
        for ending, without in metadata.items():
            content = io.BytesIO()
            figure.savefig(content, format=ending, dpi=PNG_DPI, metadata=without)
            files[ending] = content.getvalue()
    return files


def curves(runs: pd.DataFrame, history: pd.DataFrame) -> Figure:
    """Validation error and training loss over the epochs: a row of panels per depth.

    Raises:
        UserError: a frame is empty or damaged.
    """
    runs = checked_runs(runs)
    history = checked_history(history, runs)
    history = history.assign(val_percent=100 * history["val_error"])
    depths, styles = history["depth"].unique(), style(history["update"])
    note = _curve_note("mean of the runs, where a run that has stopped keeps its last value", runs)
    with settings():
        figure, axes = grid(len(depths), 2, 1.9, update_handles(styles), note, sharey="col")
        panels = [("val_percent", "validation error [%]"), ("train_loss", "training loss")]
        for (column, name), axis_column in zip(panels, axes.T, strict=True):
            _scale(axis_column[0], history, column)
            for depth, axis in zip(depths, axis_column, strict=True):
                _draw_curves(axis, history[history["depth"] == depth], column, styles)
                axis.set_title(f"depth {depth}", loc="left")
                axis.set_ylabel(name)
        return figure


def learning_rates(runs: pd.DataFrame, history: pd.DataFrame) -> Figure:
    """The learning rate over the epochs, as the bold driver sets it: a panel per depth.

    Raises as `curves`.
    """
    runs = checked_runs(runs)
    history = checked_history(history, runs)
    depths, styles = history["depth"].unique(), style(history["update"])
    columns = min(2, len(depths))
    rows = math.ceil(len(depths) / columns)
    note = _curve_note("geometric mean, where a run that has stopped keeps its last rate", runs)
    with settings():
        figure, axes = grid(rows, columns, 2.1, update_handles(styles), note)
        _scale(axes[0, 0], history, "lr")
        for depth, axis in _each(depths, axes):
            _draw_curves(axis, history[history["depth"] == depth], "lr", styles, geometric=True)
            axis.set_title(f"depth {depth}", loc="left")
            axis.set_ylabel("learning rate")
        return figure


def errors(runs: pd.DataFrame, paper: Paper = PAPER) -> Figure:
    """Every run's test error, the mean with its 95 % interval, and the paper's mean ± std.

    `paper` is as in `statistics.table2`. Raises as `curves`.
    """
    runs = checked_runs(runs)
    updates = in_order(runs["update"])
    depths = runs["depth"].unique()
    columns = min(2, len(depths)) if len(updates) <= 4 else 1
    rows = math.ceil(len(depths) / columns)
    handles = [
        _handle("o", label="one run", color=_GREY, alpha=0.6, mew=0),
        _handle(
            "+", label=f"mean, {100 * CONFIDENCE:.0f} % interval", color="black", ms=12, mew=1.8
        ),
    ]
    if set(zip(runs["depth"], runs["update"], strict=True)) & set(paper):
        handles.append(_handle("D", label="paper: mean ± std", color=_GREY, mfc="white"))
    note = "n: runs in the mean."
    if _is_paired(updates):
        one, other = label(updates[0]), label(updates[1])
        handles.append(Line2D([], [], color=_PALE, lw=1, label="pair of runs"))
        note += f" A pair of {one} and {other} shares its start, split and order."
    if runs["failed"].any():
        note += " Diverged runs have no point and are not in the mean."
    lines = 2 + bool(runs["failed"].any()) + (len(updates) > _NARROW)
    with settings():
        figure, axes = grid(rows, columns, 2.7, handles, note, xlabel="", tick_lines=lines)
        for depth, axis in _each(depths, axes):
            _draw_errors(axis, runs[runs["depth"] == depth], updates, paper)
            axis.set_title(f"depth {depth}", loc="left")
            axis.set_ylabel("test error [%]")
        return figure


def filters(weights: Mapping[str, np.ndarray], image_shape: tuple[int, int], depth: int) -> Figure:
    """The first layer's filters of one run as images, the updates side by side.

    Each filter is shown divided by its norm, which has no effect on what the network computes.

    Args:
        weights: per update the filters, shape (filters, features).
        image_shape: rows and columns of an image; their product is the number of features.
        depth: of the network, for the title.

    Raises:
        UserError: no filters, or filters that are not images of that shape.
    """
    updates = in_order(weights)
    weights = {name: _unit(np.asarray(array, float)) for name, array in weights.items()}
    mosaics = {name: _mosaic(np.asarray(weights[name]), image_shape, name) for name in updates}
    every = np.concatenate([np.abs(np.asarray(weights[name], float)).ravel() for name in updates])
    finite = every[np.isfinite(every)]
    # A few large weights would leave all others pale: the scale ends where 0.5 % lie beyond.
    limit = float(np.quantile(finite, 0.995)) if finite.size else 1.0
    limit = limit or 1.0
    columns = min(3, max(2, len(updates)))  # one image alone would be twice too large
    rows = math.ceil(len(updates) / columns)
    colours = mpl.colormaps["RdBu_r"].resampled(_SHADES).with_extremes(bad="#bbbbbb")
    height, width = mosaics[updates[0]].shape
    gap, title, foot = 0.12, 0.3, 0.75
    side = (WIDTH - gap * (columns + 1)) / columns
    tall = side * height / width
    total = rows * (tall + title) + foot
    with settings():
        figure = Figure(figsize=(WIDTH, total))
        for place, name in enumerate(updates):
            row, column = divmod(place, columns)
            in_row = min(columns, len(updates) - row * columns)
            left = (WIDTH - in_row * (side + gap) + gap) / 2 + column * (side + gap)
            bottom = total - (row + 1) * (tall + title)
            axis = figure.add_axes(
                (left / WIDTH, bottom / total, side / WIDTH, tall / total), frame_on=False
            )
            axis.set(xticks=[], yticks=[])
            image = axis.imshow(
                mosaics[name], cmap=colours, vmin=-limit, vmax=limit, interpolation="none"
            )
            whole = "" if np.isfinite(weights[name]).all() else " (grey: not finite)"
            axis.set_title(f"depth {depth}, {label(name)}{whole}", loc="left")
        bar = figure.add_axes((0.25, (foot - 0.25) / total, 0.5, 0.12 / total))
        figure.colorbar(image, cax=bar, orientation="horizontal", extend="both")
        bar.grid(visible=False)
        bar.xaxis.set_major_locator(MaxNLocator(4, symmetric=True))
        bar.set_xlabel(
            "weight / norm of its filter; one scale, 0.5 % of the weights beyond its ends"
        )
        return figure


def _unit(filters: np.ndarray) -> np.ndarray:
    """Each row divided by its norm; a row of zeros stays."""
    norms = np.linalg.norm(filters, axis=1, keepdims=True) if filters.ndim == 2 else 1.0
    return filters / np.where(norms == 0, 1, norms)


def _draw_curves(
    axis: Axes,
    history: pd.DataFrame,
    column: str,
    styles: Mapping[str, Style],
    *,
    geometric: bool = False,
) -> None:
    """Each run's curve with its end marked, and the mean of the runs that have not failed."""
    for place, (update, drawn) in enumerate(styles.items()):
        group = history[history["update"] == update]
        for failed, part in group.groupby("failed"):
            table = part.pivot(index="run", columns="epoch", values=column)
            epochs, values = table.columns.to_numpy(), table.to_numpy(float)
            seen = np.where(np.isfinite(values), values, np.nan)
            axis.plot(epochs, seen.T, color=drawn.colour, lw=0.7, alpha=0.4)
            # The last finite value of each run; what is off the axes is marked on their frame.
            row, at = np.nonzero(np.isfinite(seen))
            last = np.flatnonzero(np.diff(row, append=-1))
            ends = np.clip(seen[row[last], at[last]], *axis.get_ylim())
            if len(ends):
                axis.plot(
                    epochs[at[last]],
                    ends,
                    "x" if failed else ".",
                    markersize=6 if failed else 4,
                    color=drawn.colour,
                    alpha=0.8,
                    clip_on=False,
                )
            if not failed:
                step = max(1, len(epochs) // 6)
                axis.plot(
                    epochs,
                    carried_mean(values, geometric=geometric),
                    color=drawn.colour,
                    ls=drawn.line,
                    lw=2,
                    marker=drawn.marker,
                    markersize=5,
                    markevery=(place * step // len(styles), step),
                    zorder=3,
                )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _draw_errors(axis: Axes, runs: pd.DataFrame, updates: list[str], paper: Paper) -> None:
    """A column per update: points of the runs, beside them the mean and the paper's."""
    depth = int(runs["depth"].iloc[0])
    styles = style(updates)
    places: dict[tuple[str, int], float] = {}
    names = []
    paired = _is_paired(updates)
    for place, update in enumerate(updates):
        group = runs[runs["update"] == update]
        healthy = group[~group["failed"]]
        # Golden-ratio steps spread the points evenly, and the same way every time.
        spread = 0.16 * ((healthy["run"] * 0.618034) % 1 - 0.5)
        x = place + spread.to_numpy(float)
        places |= {(update, run): at for run, at in zip(healthy["run"], x, strict=True)}
        percent = 100 * healthy["test_error"].to_numpy(float)
        drawn = styles[update]
        axis.plot(
            x, percent, drawn.marker, color=drawn.colour, markersize=4.5, alpha=0.6, mew=0, zorder=3
        )
        # Away from the lines between the first two columns.
        side = -1 if paired and place == 0 else 1
        mean, _, low, high = interval(percent)
        if len(percent):
            at = place + side * 0.2
            axis.plot([at - 0.05, at + 0.05], [mean, mean], color="black", lw=2, zorder=4)
            axis.plot([at, at], [low, high], color="black", lw=1.2, zorder=4)
        if (depth, update) in paper:
            paper_mean, paper_std = (100 * value for value in paper[depth, update])
            axis.errorbar(
                place + side * 0.34,
                paper_mean,
                yerr=paper_std,
                fmt="D",
                color=_GREY,
                markerfacecolor="white",
                markersize=5,
                capsize=3,
                lw=1.2,
                zorder=2,
            )
        failed = len(group) - len(healthy)
        count = f"n = {len(healthy)}" + (f"\n{failed} diverged" if failed else "")
        name = label(update)
        if len(updates) > _NARROW and len(name) > 8:
            name = name.replace("-", "-\n", 1)
        names.append(f"{name}\n{count if len(group) else 'not run'}")
    if paired:
        both = pairs(runs.drop(columns="failed"), updates[1], updates[0])
        ends = [[places[update, run] for run in both["run"]] for update in (updates[0], updates[1])]
        errors = [100 * both["baseline"], 100 * both["update"]]
        axis.plot(np.array(ends), np.array(errors), color=_PALE, lw=0.8, zorder=1)
    axis.set_xticks(range(len(updates)), names)
    middle, wide = (len(updates) - 1) / 2, max(len(updates), 2)
    axis.set_xlim(middle - wide / 2, middle + wide / 2)
    axis.grid(visible=False, axis="x")
    axis.tick_params(axis="x", length=0)


def _is_paired(updates: list[str]) -> bool:
    return len(updates) > 1 and updates[0] == BASELINE


def _mosaic(weights: np.ndarray, image_shape: tuple[int, int], name: str) -> np.ndarray:
    """The filters as one image, nearly square, with a line of NaN-free zeros between them."""
    if weights.ndim != 2 or len(weights) == 0 or weights.shape[1] != math.prod(image_shape):
        raise UserError(
            f"filters of {name} have shape {weights.shape}; expected (filters, "
            f"{math.prod(image_shape)}) for images of {image_shape[0]} × {image_shape[1]}"
        )
    height, width = image_shape
    columns = math.ceil(math.sqrt(len(weights)))
    rows = math.ceil(len(weights) / columns)
    mosaic = np.zeros((rows * (height + 2) - 2, columns * (width + 2) - 2))
    for place, image in enumerate(weights.astype(float)):
        top, left = (height + 2) * (place // columns), (width + 2) * (place % columns)
        mosaic[top : top + height, left : left + width] = image.reshape(image_shape)
    return np.ma.masked_invalid(mosaic)


def _scale(axis: Axes, history: pd.DataFrame, column: str) -> None:
    """Logarithmic where all values allow it; the limits are those of the runs that have not failed.

    One diverged run would else press all others into a line.
    """
    finite = history[np.isfinite(history[column])]
    values = finite.loc[~finite["failed"], column] if not finite["failed"].all() else finite[column]
    if values.empty:
        return
    low, high = float(values.min()), float(values.max())
    if low <= 0:
        axis.set_ylim(low - 0.03 * (high - low), high + 0.05 * (high - low) or 1)
        return
    axis.set_yscale("log")
    margin = (high / low) ** 0.04 if high > low else 2.0
    axis.set_ylim(low / margin, high * margin)
    decades = math.log10(high / low)
    if decades < 2:  # too few powers of ten to read a value by
        subs = (1, 2, 3, 5, 7) if decades < 1 else (1, 2, 5)
        axis.yaxis.set_major_locator(LogLocator(subs=subs))
        axis.yaxis.set_major_formatter(FuncFormatter(_plain))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _plain(value: float, _: int) -> str:
    return f"{value:g}"


def grid(
    rows: int,
    columns: int,
    height: float,
    handles: list[Line2D],
    note: str,
    *,
    xlabel: str = "epoch",
    tick_lines: int = 1,
    sharey: Literal["all", "col"] = "all",
    legend_columns: int = 5,
) -> tuple[Figure, np.ndarray]:
    """A figure of equal panels, a legend above and a note below; all sizes in inches.

    The layout is reckoned here, for matplotlib's own would double the time of a report.

    Returns:
        The figure and its axes, shape (rows, columns).
    """
    left, right, across, title, line = 0.72, 0.12, 0.85, 0.3, 0.17
    legend_columns = min(len(handles), legend_columns)
    notes = textwrap.wrap(note, 118)
    head = 0.08 + 0.22 * math.ceil(len(handles) / legend_columns) + title
    below = 0.1 + line * tick_lines + (0.22 if xlabel else 0)  # every panel's ticks and label
    foot = below + 0.12 + line * len(notes)
    total = head + rows * height + (rows - 1) * (below + title) + foot
    wide = (WIDTH - left - right - across * (columns - 1)) / columns
    figure = Figure(figsize=(WIDTH, total))
    axes = figure.subplots(
        rows,
        columns,
        squeeze=False,
        sharex=bool(xlabel),  # columns of updates carry their own numbers in each panel
        sharey=sharey,
        gridspec_kw={
            "left": left / WIDTH,
            "right": 1 - right / WIDTH,
            "top": 1 - head / total,
            "bottom": foot / total,
            "wspace": across / wide,
            "hspace": (below + title) / height,
        },
    )
    for axis in axes.ravel():
        axis.set_xlabel(xlabel)
        axis.tick_params(labelleft=True, labelbottom=True)
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.3 / WIDTH, 1 - 0.02 / total),
        ncols=legend_columns,
        handlelength=3.2,
    )
    figure.text(0.1 / WIDTH, 0.05 / total, "\n".join(notes), color=_GREY, linespacing=1.25)
    return figure, axes


def _each(depths: Iterable[int], axes: np.ndarray) -> Iterator[tuple[int, Axes]]:
    """The depths and their axes; the axes left over are taken away."""
    depths = list(depths)
    for axis in axes.ravel()[len(depths) :]:
        axis.remove()
    yield from zip(depths, axes.ravel(), strict=False)


def _curve_note(mean: str, runs: pd.DataFrame) -> str:
    note = f"Thin: each run up to its last epoch (dot). Thick: {mean}."
    if runs["failed"].any():
        note += " Crosses: runs that diverged, not in the mean; on the frame where they left it."
    return note


def update_handles(styles: Mapping[str, Style]) -> list[Line2D]:
    return [
        Line2D([], [], color=s.colour, ls=s.line, marker=s.marker, lw=2, ms=5, label=label(update))
        for update, s in styles.items()
    ]


def _handle(marker: str, **options: object) -> Line2D:
    return Line2D([], [], linestyle="none", marker=marker, **options)  # type: ignore[arg-type]


@contextmanager
def settings() -> Iterator[None]:
    """The project's settings on top of matplotlib's own, for the time of one figure."""
    with mpl.style.context(["default", _SETTINGS]):
        yield
