"""The figures of Table 2's records, from the frames of `report.prepare_runs` and of
`report.prepare_history`: a public function for each, and here alone what it shows."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from unitnorm.errors import UserError
from unitnorm.report import style
from unitnorm.report.statistics import carry_mean, find_outliers, summarise
from unitnorm.report.style import BASELINE, GREY, PALE, WIDTH, Style, label, sort_updates

_COURSES = {
    "val_percent": "validation error [%]", "train_loss": "training loss", "lr": "learning rate"
}  # fmt: skip
_NARROW = 6  # with more updates than this in a panel, their names take two lines
_SHADES = 33  # of a filter's image: odd, so that white is zero; fewer make smaller files


def draw_curves(history: pd.DataFrame) -> Figure:
    """Validation error and training loss over the epochs: a row of panels per depth."""
    history = history.assign(val_percent=100 * history["val_error"])
    panels = itertools.product(history["depth"].unique(), ("val_percent", "train_loss"))
    mean = "mean of the runs, where a run that has stopped keeps its last value"
    return _draw_courses(history, list(panels), mean, 2.6)


def draw_rates(history: pd.DataFrame) -> Figure:
    """The learning rate over the epochs, as the bold driver sets it: a panel per depth."""
    panels = [(depth, "lr") for depth in history["depth"].unique()]
    mean = "geometric mean, where a run that has stopped keeps its last rate"
    return _draw_courses(history, panels, mean, 2.7)


def draw_test_errors(
    runs: pd.DataFrame, paper: Mapping[tuple[int, str], tuple[float, float]]
) -> Figure:
    """Every run's test error, the mean with its 95 % interval, and the paper's mean ± std.

    Runs that lie apart (`statistics.find_outliers`) have their number beside them. `paper` is
    (depth, update) to mean and std.
    """
    updates, depths = sort_updates(runs["update"]), runs["depth"].unique()
    columns = min(2, len(depths)) if len(updates) <= 4 else 1
    handles = [
        style.make_handle("o", label="one run", color=GREY, alpha=0.6, mew=0),
        style.make_handle("+", label="mean, 95 % interval", color="black", ms=12, mew=1.8),
    ]
    if set(zip(runs["depth"], runs["update"], strict=True)) & set(paper):
        handles.append(style.make_handle("D", label="paper: mean ± std", color=GREY, mfc="white"))
    note = (
        "n: runs in the mean. Numbered: runs over 1.5 interquartile ranges outside the quartiles "
        "of their column."
    )
    if len(updates) > 1 and updates[0] == BASELINE:
        handles.append(style.make_handle("", "-", color=PALE, lw=1, label="pair of runs"))
        one, other = label(updates[0]), label(updates[1])
        note += f" A pair of {one} and {other} shares its start, split and order."
    rows = math.ceil(len(depths) / columns)
    with style.settings():
        figure, axes = style.lay_out((rows, columns), 3.4, handles, note, sharex=False)
        for depth, axis in style.match_axes(depths, axes):
            theirs = {update: paper[at, update] for at, update in paper if at == depth}
            _draw_depth(axis, runs[runs["depth"] == depth], updates, theirs)
            axis.set(title=f"depth {depth}", ylabel="test error [%]")
        return figure


def draw_filters(
    weights: Mapping[str, np.ndarray], image_shape: tuple[int, ...], depth: int
) -> Figure:
    """The first layer's filters of one run as images, the updates side by side.

    Each filter is shown divided by its norm, which has no effect on what the network computes.

    Args:
        weights: per update the filters, shape (filters, features).
        image_shape: rows and columns of an image, and its channels, drawn side by side, if any.
        depth: of the network, for the title.

    Raises:
        UserError: filters that are not images of that shape.
    """
    mosaics = {
        name: _lay_mosaic(weights[name], image_shape, name) for name in sort_updates(weights)
    }
    every = np.concatenate([np.abs(mosaic.compressed()) for mosaic in mosaics.values()])
    every = every[every > 0]  # without the lines between the filters
    # A few large weights would leave all others pale: the scale ends where 0.5 % lie beyond.
    limit = float(np.quantile(every, 0.995)) if every.size else 1.0
    columns = min(3, max(2, len(mosaics)))  # one image alone would be twice too large
    rows = math.ceil(len(mosaics) / columns)
    colours = mpl.colormaps["RdBu_r"].resampled(_SHADES).with_extremes(bad="#bbbbbb")
    height, width = next(iter(mosaics.values())).shape
    tall = rows * (WIDTH / columns * height / width + 0.25) + 0.8
    with style.settings():
        figure = Figure(figsize=(WIDTH, tall), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis in axes.ravel():
            axis.set_axis_off()
        for (name, mosaic), axis in zip(mosaics.items(), axes.ravel(), strict=False):
            image = axis.imshow(mosaic, cmap=colours, vmin=-limit, vmax=limit, interpolation="none")
            whole = " (grey: not finite)" if np.ma.getmaskarray(mosaic).any() else ""
            axis.set_title(f"depth {depth}, {label(name)}{whole}")
        bar = figure.colorbar(
            image, ax=axes, location="bottom", shrink=0.5, aspect=50, extend="both",
            ticks=MaxNLocator(4, symmetric=True),
            label="weight / norm of its filter; one scale, 0.5 % of the weights beyond its ends",
        )  # fmt: skip
        bar.ax.grid(visible=False)
        return figure


def draw_comparison(table: pd.DataFrame, own: pd.DataFrame, names: tuple[str, str]) -> Figure:
    """Two folders of records side by side: their errors, and what the updates differ by in each.

    Args:
        table: from `report.compare_folders`.
        own: from `report.compare_updates` for both folders, with "A" or "B" as `folder`.
        names: of the two folders.
    """
    cells = [f"depth {d}, {label(u)}" for d, u in zip(table["depth"], table["update"], strict=True)]
    parts = zip(own["depth"], own["update"], own["baseline"], strict=True)
    own = own.assign(cell=[f"depth {d}, {label(u)} − {label(b)}" for d, u, b in parts])
    rows = list(own["cell"].unique())
    sides: list[tuple[str, str, float, dict[str, Any]]] = [
        ("A", "first", -0.13, {"color": "black", "marker": "o", "ms": 5}),
        ("B", "second", 0.13, {"color": "#CC79A7", "marker": "s", "ms": 5}),
    ]
    handles = [
        style.make_handle(line="-", lw=1.5, label=f"{letter}: {name}", **form)
        for (letter, _, _, form), name in zip(sides, names, strict=True)
    ]
    note = (
        "Left: test error of each folder's runs, mean ± std. Right: paired difference of the "
        "updates in each, in percentage points, with its 95 % interval."
    )
    height = 0.9 + 0.36 * max(len(cells), len(rows))
    with style.settings():
        figure, axes = style.lay_out((1, 2), height, handles, note, sharex=False, sharey=False)
        left, right = axes[0]
        for letter, side, shift, form in sides:
            form = form | {"ls": "none", "elinewidth": 1.5}
            mean, std = 100 * table[f"mean_{side}"], 100 * table[f"std_{side}"].fillna(0)
            left.errorbar(mean, np.arange(len(table)) + shift, xerr=std, **form)
            part = own[own["folder"] == letter]
            places = np.array([rows.index(cell) for cell in part["cell"]], float) + shift
            ends = [part["mean"] - part["ci_low"], part["ci_high"] - part["mean"]]
            right.errorbar(100 * part["mean"], places, xerr=100 * np.nan_to_num(ends), **form)
        right.axvline(0, color=GREY, lw=1)
        titles = "test error [%]", "difference of the updates [points]"
        for axis, ticks, title in zip((left, right), (cells, rows), titles, strict=True):
            axis.set_yticks(range(len(ticks)), ticks)
            axis.set_ylim(len(ticks) - 0.4, -0.6)
            axis.set_xlabel(title)
        return figure


def _draw_courses(
    history: pd.DataFrame, panels: list[tuple[int, str]], mean: str, height: float
) -> Figure:
    """A panel for each depth and column of the history, in two columns."""
    styles = style.assign_styles(history["update"])
    note = f"Thin: each run up to its last epoch (dot). Thick: {mean}."
    if history["failed"].any():
        note += " Crosses: runs that diverged, not in the mean; on the frame where they left it."
    rows, columns = math.ceil(len(panels) / 2), min(2, len(panels))
    with style.settings():
        handles = style.make_handles(styles)
        figure, axes = style.lay_out((rows, columns), height, handles, note, sharey="col")
        for (depth, column), axis in style.match_axes(panels, axes):
            _set_scale(axis, history, column)
            _draw_runs(axis, history[history["depth"] == depth], column, styles)
            axis.set(title=f"depth {depth}", ylabel=_COURSES[column], xlabel="epoch")
        return figure


def _draw_runs(axis: Axes, history: pd.DataFrame, column: str, styles: Mapping[str, Style]) -> None:
    """Each run's curve with its end marked, and the mean of the runs that have not failed."""
    for place, (update, drawn) in enumerate(styles.items()):
        for failed, part in history[history["update"] == update].groupby("failed"):
            table = part.pivot(index="run", columns="epoch", values=column)
            epochs, values = table.columns.to_numpy(), table.to_numpy(float)
            seen = np.where(np.isfinite(values), values, np.nan)
            axis.plot(epochs, seen.T, color=drawn.colour, lw=0.7, alpha=0.4)
            # The last finite value of each run; what is off the axes is marked on their frame.
            row, at = np.nonzero(np.isfinite(seen))
            last = np.flatnonzero(np.diff(row, append=-1))
            ends = np.clip(seen[row[last], at[last]], *axis.get_ylim())
            marker, size = ("x", 6) if failed else (".", 4)
            if len(ends):
                axis.plot(
                    epochs[at[last]], ends, marker, ms=size, color=drawn.colour, alpha=0.8,
                    clip_on=False,
                )  # fmt: skip
            if not failed:
                step, mean = max(1, len(epochs) // 6), carry_mean(values, geometric=column == "lr")
                axis.plot(
                    epochs, mean, color=drawn.colour, ls=drawn.line, lw=2, marker=drawn.marker,
                    ms=5, markevery=(place * step // len(styles), step), zorder=3,
                )  # fmt: skip
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _draw_depth(
    axis: Axes, runs: pd.DataFrame, updates: list[str], paper: Mapping[str, tuple[float, float]]
) -> None:
    """A column per update: points of the runs, beside them the mean and the paper's."""
    styles, paired = style.assign_styles(updates), len(updates) > 1 and updates[0] == BASELINE
    # Golden-ratio steps spread the points evenly, and the same way every time.
    runs = runs.assign(y=100 * runs["test_error"], x=0.16 * ((runs["run"] * 0.618034) % 1 - 0.5))
    names, columns = [], []
    for place, update in enumerate(updates):
        group = runs[runs["update"] == update]
        points = group[~group["failed"]].assign(x=group["x"] + place)
        columns.append(points)
        colour, y = styles[update].colour, points["y"].to_numpy(float)
        axis.plot(
            points["x"], y, styles[update].marker, color=colour, ms=4.5, alpha=0.6, mew=0, zorder=3
        )
        # Away from the lines between the first two columns.
        side = -1 if paired and place == 0 else 1
        for point in points[find_outliers(y)].itertuples():
            axis.annotate(
                str(point.run), (point.x, point.y), (5 * side, 0), textcoords="offset points",
                va="center", ha="left" if side > 0 else "right", color=colour, zorder=4,
            )  # fmt: skip
        mean, _, *ends = summarise(y).cut(0, 100)
        at = place + side * 0.2
        axis.plot([at - 0.05, at + 0.05], [mean, mean], color="black", lw=2, zorder=4)
        axis.plot([at, at], ends, color="black", lw=1.2, zorder=4)
        if update in paper:
            mean, std = (100 * value for value in paper[update])
            axis.errorbar(
                place + side * 0.34, mean, yerr=std, fmt="D", color=GREY, mfc="white", ms=5,
                capsize=3, lw=1.2, zorder=2,
            )  # fmt: skip
        name, failed = label(update), len(group) - len(points)
        if len(updates) > _NARROW and len(name) > 8:
            name = name.replace("-", "-\n", 1)
        count = f"n = {len(points)}" + (f"\n{failed} diverged" if failed else "")
        names.append(f"{name}\n{count if len(group) else 'not run'}")
    if paired:
        both = columns[0].merge(columns[1], on=["run", "seed"])
        xs, ys = (both[[f"{name}_x", f"{name}_y"]].to_numpy().T for name in "xy")
        axis.plot(xs, ys, color=PALE, lw=0.8, zorder=1)
    axis.set_xticks(range(len(updates)), names)
    middle, wide = (len(updates) - 1) / 2, max(len(updates), 2)
    axis.set_xlim(middle - wide / 2, middle + wide / 2)
    axis.grid(visible=False, axis="x")
    axis.tick_params(axis="x", length=0)


def _lay_mosaic(weights: np.ndarray, image_shape: tuple[int, ...], name: str) -> np.ma.MaskedArray:
    """The filters, each divided by its norm, as one image, nearly square, with lines between them.

    What is not finite is masked.
    """
    weights, features = np.asarray(weights, float), math.prod(image_shape)
    if weights.ndim != 2 or len(weights) == 0 or weights.shape[1] != features:
        raise UserError(
            f"filters of {name} have shape {weights.shape}; expected (filters, {features}) for "
            f"images of {' × '.join(map(str, image_shape))}"
        )
    norms = np.linalg.norm(weights, axis=1, keepdims=True)
    images = (weights / np.where(norms == 0, 1, norms)).reshape(-1, *(*image_shape, 1)[:3])
    images = np.concatenate(np.moveaxis(images, 3, 0), axis=2)  # the channels side by side
    columns = math.ceil(math.sqrt(len(images)))
    tiles = np.pad(images, ((0, -len(images) % columns), (0, 2), (0, 2)))
    _, height, width = tiles.shape
    grid = tiles.reshape(-1, columns, height, width).swapaxes(1, 2)
    return np.ma.masked_invalid(grid.reshape(-1, columns * width)[:-2, :-2])


def _set_scale(axis: Axes, history: pd.DataFrame, column: str) -> None:
    """Logarithmic where all values allow it; the limits are those of the runs that have not failed.

    One diverged run would else press all others into a line.
    """
    finite = history[np.isfinite(history[column])]
    values = finite.loc[~finite["failed"], column] if not finite["failed"].all() else finite[column]
    if values.empty:
        return
    low, high = float(values.min()), float(values.max())
    if low > 0:
        style.set_log_scale(axis, low, high)
    else:
        axis.set_ylim(low - 0.03 * (high - low), high + 0.05 * (high - low) or 1)
