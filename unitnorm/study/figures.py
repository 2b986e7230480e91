"""A study's figures: all comparisons, error against rate, against budget and against the start.

Drawn in `unitnorm.report.style`: the same letters, colours and bytes on every machine. An
update keeps the colour, line and marker that it has in the report; names beyond the nine styles
have hollow markers.
"""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from unitnorm.errors import UserError
from unitnorm.report.statistics import summarise_groups
from unitnorm.report.style import WIDTH, Style, assign_styles, label, settings
from unitnorm.report.tables import format_points
from unitnorm.study.statistics import (
    is_error,
    metric_values,
    name_comparison,
    profile_rates,
    rate_means,
)

_GREY, _BAND = "#666666", "#e3e3e3"
_RANGE = 6.0  # how many times its lowest error a panel of rates shows: worse rates do not matter

# Okabe and Ito's colours; every verdict has a marker of its own as well.
VERDICTS = {
    "better": ("#0072B2", "o"),
    "worse": ("#D55E00", "s"),
    "equivalent": ("#009E73", "D"),
    "open": ("#666666", "o"),
}


class _Drawn(NamedTuple):
    style: Style
    hollow: bool


def draw_forest(comparisons: pd.DataFrame, margin: float = 0.05) -> Figure:
    """Every comparison in points of error: difference, both intervals, verdict, the margin's band.

    Args:
        comparisons: as `statistics.compare` returns it; comparisons of losses are not drawn, as
            they have another unit.
        margin: of equivalence, in percentage points.

    Raises:
        UserError: no comparison of errors.
    """
    rows = comparisons[comparisons["metric"].map(is_error).astype(bool)]
    if rows.empty:
        raise UserError("no comparison of errors to draw: the study has runs of none yet")
    rows = rows.assign(name=_titles(rows))
    ends = rows[["difference", "ci_low", "ci_high", "ci_images_low", "ci_images_high"]]
    sizes = ends.abs().to_numpy(float)
    sizes = sizes[np.isfinite(sizes)]
    # One arm that fails badly must not press all others into a line: it is drawn at the frame.
    limit = min(sizes.max(), 5 * np.quantile(sizes, 0.8)) if sizes.size else margin
    limit = 1.06 * max(limit, 2 * margin)
    groups = list(rows.groupby("name", sort=False))
    count = len(rows) + 0.9 * len(groups)
    with settings():
        figure = Figure(figsize=(WIDTH, 1.15 + 0.2 * count), layout="constrained")
        axis = figure.subplots()
        axis.axvspan(-margin, margin, color=_BAND, lw=0, zorder=0)
        axis.axvline(0, color="black", lw=0.8, zorder=1)
        ticks, names, texts, y = [], [], [], 0.0
        for name, group in groups:
            axis.text(
                -0.01, y, str(name), transform=axis.get_yaxis_transform(), ha="right", va="center",
                weight="bold",
            )  # fmt: skip
            y += 1
            for row in group.to_dict("records"):
                _draw_difference(axis, y, row, limit)
                ticks.append(y)
                names.append(f"{row['dataset']}, depth {row['depth']}")
                texts.append(_forest_text(row))
                y += 1
            y += 0.4
        axis.set_yticks(ticks, names)
        axis.set_ylim(y - 0.7, -0.6)
        axis.set_xlim(-limit, limit)
        axis.grid(visible=False, axis="y")
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.xaxis.set_major_formatter(FuncFormatter(_plain_number))
        axis.set_xlabel("difference of the error [percentage points]; left of 0 the arm is better")
        right = axis.secondary_yaxis("right")
        right.set_yticks(ticks, texts)
        right.tick_params(length=0)
        right.spines["right"].set_visible(False)
        used = [name for name in VERDICTS if name in set(rows["verdict"])]
        handles: list[Line2D | Patch] = [
            Line2D(
                [], [], color=VERDICTS[name][0], marker=VERDICTS[name][1], ls="none", label=name,
                mfc="white" if name == "open" else VERDICTS[name][0],
            )
            for name in used
        ]  # fmt: skip
        handles += [
            Line2D([], [], color=_GREY, lw=2.4, label="interval over runs"),
            Line2D([], [], color=_GREY, lw=0.9, label="… and test images"),
            Patch(color=_BAND, label=f"equivalent: ±{margin:g}"),
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=4 if len(handles) > 6 else 6)
        return figure


def draw_tuning(runs: pd.DataFrame) -> Figure:
    """Validation error of the tuning runs against the filters' rate, each arm's best rates marked.

    A row of panels per data set and depth, a column per schedule. Where the rates of the rest vary
    apart, each point has the rest's best rate for that rate of the filters.

    Raises:
        UserError: no tuning runs.
    """
    tuning = runs[runs["purpose"] == "tune"]
    _refuse_empty(tuning, "tuning")
    arms = tuning[["arm", "schedule"]].drop_duplicates("arm")
    table = profile_rates(rate_means(tuning)).merge(arms, on="arm")
    cells, schedules = _cells(table), list(table["schedule"].unique())
    column, drawn = _lines(table, ["dataset", "depth", "schedule"])
    note = (
        f"Mean over {_count(table['n'])} tuning runs, where a diverged run counts as 100 %; 95 % "
        "interval where none has, cut off at the scale's ends. Ring: the best rates. Triangles: "
        "off the scale."
    )
    if (table["filters_rate"] != table["rest_rate"]).any():
        note += " The rate of γ, β and θ is the best one for each rate of the filters."
    with settings():
        figure, panels = _panels(cells, schedules, drawn, note)
        for (dataset, depth, schedule), axis in panels.items():
            part = _at(table, dataset=dataset, depth=depth, schedule=schedule)
            top = _RANGE * _at(table, dataset=dataset)["val_error"].min()
            for name, group in _by(part, column):
                group = group.sort_values("filters_rate")
                x, y = group["filters_rate"].to_numpy(), group["val_error"].to_numpy()
                whole = group["n_diverged"].to_numpy() == 0
                ends = group[["ci_low", "ci_high"]].to_numpy(float)
                _draw_line(axis, x, y, np.where(whole[:, None], ends, np.nan), drawn[name])
                if len(beyond := x[y > top]):
                    axis.plot(
                        beyond, np.full(len(beyond), top), "^", color=drawn[name].style.colour,
                        ms=5, clip_on=False,
                    )  # fmt: skip
                best = group[group["is_best"] & (group["val_error"] <= top)]
                axis.plot(
                    best["filters_rate"], best["val_error"], "o", mfc="none", mew=1.4, ms=11,
                    color=drawn[name].style.colour, zorder=5,
                )  # fmt: skip
            axis.set_xscale("log")
            axis.set_ylabel("validation error [%]")
            axis.set_xlabel("base rate of the filters")
        # By the means alone: intervals of two runs would leave them a tenth of the height.
        for dataset, part in _by(table, "dataset"):
            errors = part["val_error"].to_numpy(float)
            _scale_log(panels, dataset, errors, _RANGE * errors.min())
        return figure


def draw_budgets(runs: pd.DataFrame, metric: str = "test_error") -> Figure:
    """The error of the comparison runs after 5, 10, 25, … epochs and at the end: a line per arm.

    A panel per data set and depth. A run that stopped earlier keeps its last value. Of many starts
    the balanced ones alone are drawn: `draw_spreads` shows the others.

    Raises:
        UserError: no comparison runs, or none that has not diverged.
    """
    alone = (runs["spread"] != 0).any()
    table = budget_means(runs[runs["spread"] == 0] if alone else runs, metric)
    _refuse_empty(table, "healthy comparison")
    cells, budgets = _cells(table), list(table["budget"].unique())
    column, drawn = _lines(table, ["dataset", "depth"])
    note = (
        f"Mean and 95 % interval over {_count(table['n'])} runs. A run that stopped earlier keeps "
        "its last value; diverged runs are left out." + (" Balanced starts alone." if alone else "")
    )
    with settings():
        figure, panels = _panels(cells, [""], drawn, note)
        for (dataset, depth, _), axis in panels.items():
            part = _at(table, dataset=dataset, depth=depth)
            for place, (name, group) in enumerate(_by(part, column)):
                shift = 0.16 * (place / max(1, len(drawn) - 1) - 0.5)  # else the intervals overlap
                x = np.array([budgets.index(b) for b in group["budget"]]) + shift
                ends = group[["ci_low", "ci_high"]].to_numpy(float)
                _draw_line(axis, x, group["mean"].to_numpy(), ends, drawn[name])
            axis.set_xticks(range(len(budgets)), budgets)
            axis.set_xlabel("after epoch")
            axis.set_ylabel(name_metric(metric))
        _scale_means(panels, table)
        return figure


def draw_spreads(runs: pd.DataFrame, metric: str = "test_error") -> Figure:
    """The error of full trainings against the spread of the starts: a line per update.

    A row of panels per data set and depth, a column per kind of start. At spread 0 every kind is
    the balanced start, so that runs of one serve all. An update that no start can change gives a
    flat line.

    Raises:
        UserError: no comparison runs, or none that has not diverged.
    """
    chosen = runs[runs["purpose"] == "compare"]
    chosen = chosen.assign(value=metric_values(chosen, metric))
    kinds = [kind for kind in chosen["start"].unique() if kind != "balanced"] or ["balanced"]
    keys = ["kind", "dataset", "depth", "update", "spread"]
    parts = []
    for kind in kinds:
        own = chosen["start"] == kind
        part = chosen[own | (chosen["spread"] == 0)].assign(kind=kind)
        part = part[part["update"].isin(chosen.loc[own, "update"])]
        # where each kind has balanced runs of its own, these come first and stay
        part = part.iloc[np.argsort(part["start"] != kind, kind="stable")]
        parts.append(part.drop_duplicates([*keys, "seed"]))
    table = summarise_groups(pd.concat(parts), keys, "value")
    _refuse_empty(table[table["n"] > 0], "healthy comparison")
    cells, drawn = _cells(table), _styles(table["update"])
    note = (
        f"Mean and 95 % interval over {_count(table.loc[table['n'] > 0, 'n'])} runs. Spread: "
        "decades between the largest and the smallest scale of a start that computes the same."
    )
    if table["n_diverged"].any():
        note += " Above the frame: how many runs diverged; they are left out."
    with settings():
        figure, panels = _panels(cells, kinds, drawn, note)
        step = 0.02 * max(1.0, float(table["spread"].max()))
        for (dataset, depth, kind), axis in panels.items():
            part = _at(table, dataset=dataset, depth=depth, kind=kind)
            groups = _by(part, "update")
            lost: dict[float, list[str]] = {}
            for place, (name, group) in enumerate(groups):
                group = group.sort_values("spread")
                x = group["spread"].to_numpy() + step * (place - (len(groups) - 1) / 2)
                ends = group[["ci_low", "ci_high"]].to_numpy(float)
                _draw_line(axis, x, group["mean"].to_numpy(), ends, drawn[name])
                for level, count in zip(group["spread"], group["n_diverged"], strict=True):
                    if count:
                        lost.setdefault(level, []).append(f"{label(name)}: {count}")
            for level, texts in lost.items():
                axis.text(
                    level, 1, "\n".join(texts), transform=axis.get_xaxis_transform(),
                    ha="right" if level == table["spread"].max() else "center", va="bottom",
                    color=_GREY, size=7.5,
                )  # fmt: skip
            axis.set_xticks(sorted(table["spread"].unique()))
            axis.xaxis.set_major_formatter(FuncFormatter(_plain_number))
            axis.set_xlabel("spread of the start [decades]")
            axis.set_ylabel(name_metric(metric))
        _scale_means(panels, table)
        return figure


def budget_means(runs: pd.DataFrame, metric: str = "test_error") -> pd.DataFrame:
    """The metric of the comparison runs by data set, depth, arm and budget, with t-intervals.

    Returns:
        Columns dataset, depth, arm, update, budget ("5", …, "end"), n, mean, ci_low, ci_high;
        errors in percent, cells of which all runs diverged left out.
    """
    chosen = runs[runs["purpose"] == "compare"]
    prefix = f"{metric}_"
    budgets = sorted(int(c[len(prefix) :]) for c in runs.columns if c.startswith(prefix))
    keys = ["dataset", "depth", "arm", "update", "budget"]
    parts = [
        chosen.assign(
            budget="end" if budget is None else str(budget),
            value=metric_values(chosen, metric if budget is None else f"{prefix}{budget}"),
        )
        for budget in [*budgets, None]
    ]
    table = summarise_groups(pd.concat(parts), keys, "value")
    table = table[table["n"] > 0].drop(columns=["n_diverged", "std"])
    return table.reset_index(drop=True)


def _draw_difference(axis: Axes, y: float, row: Mapping, limit: float) -> None:
    colour, marker = VERDICTS[row["verdict"]]
    for low, high, width in (
        (row["ci_images_low"], row["ci_images_high"], 0.9),
        (row["ci_low"], row["ci_high"], 2.4),
    ):
        if math.isfinite(low):
            ends = np.clip([low, high], -limit, limit)
            axis.plot(ends, [y, y], color=colour, lw=width, solid_capstyle="butt", zorder=2)
    value = row["difference"]
    if not math.isfinite(value):
        return
    if abs(value) > limit:
        marker = ">" if value > 0 else "<"
    axis.plot(
        np.clip(value, -limit, limit), y, marker, color=colour, ms=6, zorder=3, clip_on=False,
        mfc="white" if row["verdict"] == "open" else colour, mew=1.3,
    )  # fmt: skip


def _forest_text(row: Mapping) -> str:
    value = row["difference"]
    text = "no pairs" if math.isnan(value) else f"{format_points(value / 100)} {row['verdict']}"
    text += f", n = {row['n']}"
    return text + (f" ({row['n_left_out']} left out)" if row["n_left_out"] else "")


def _titles(rows: pd.DataFrame) -> list[str]:
    names = []
    for row in rows.to_dict("records"):
        name = name_comparison(row)
        if row["metric"] != "test_error":
            name += f", {name_metric(row['metric']).removesuffix(' [%]')}"
        names.append(name)
    return names


def name_metric(metric: str) -> str:
    stem, _, budget = metric.partition("_")
    words = {"val": "validation", "train": "training", "test": "test"}
    what, _, budget = budget.partition("_")
    name = f"{words[stem]} {what}" + (f" after epoch {budget}" if budget else "")
    return f"{name} [%]" if what == "error" else name


def _styles(names: Iterable[str]) -> dict[str, _Drawn]:
    """A style for each name, in the report's order; hollow where the style is taken already."""
    taken: set[Style] = set()
    styles = {}
    for name, one in assign_styles(names).items():
        styles[name] = _Drawn(one, one in taken)
        taken.add(one)
    return styles


def _lines(table: pd.DataFrame, panel: list[str]) -> tuple[str, dict[str, _Drawn]]:
    """Lines by update where each panel has one arm of each, else by arm; and their styles."""
    arms = table.drop_duplicates([*panel, "arm"])
    column = "arm" if arms.duplicated([*panel, "update"]).any() else "update"
    return column, _styles(table[column])


def _by(table: pd.DataFrame, column: str) -> list[tuple[str, pd.DataFrame]]:
    return [(str(name), group) for name, group in table.groupby(column, sort=False)]


def _cells(table: pd.DataFrame) -> list[tuple[str, int]]:
    pairs = table[["dataset", "depth"]].drop_duplicates().sort_values(["dataset", "depth"])
    return list(pairs.itertuples(index=False, name=None))


def _at(table: pd.DataFrame, **values: object) -> pd.DataFrame:
    for name, value in values.items():
        table = table[table[name] == value]
    return table


def _count(numbers: pd.Series) -> str:
    low, high = int(numbers.min()), int(numbers.max())
    return str(low) if low == high else f"{low} to {high}"


def _draw_line(axis: Axes, x: np.ndarray, y: np.ndarray, ends: np.ndarray, drawn: _Drawn) -> None:
    """A line through (x, y), shape (n,), and the intervals `ends`, shape (n, 2)."""
    one = drawn.style
    axis.vlines(x, ends[:, 0], ends[:, 1], color=one.colour, lw=1.2, alpha=0.7)
    axis.plot(
        x, y, color=one.colour, ls=one.line, lw=1.4, marker=one.marker, ms=4.5, zorder=3,
        mfc="white" if drawn.hollow else one.colour,
    )  # fmt: skip


def _panels(
    cells: Sequence[tuple[str, int]],
    levels: Sequence[str],
    drawn: Mapping[str, _Drawn],
    note: str,
) -> tuple[Figure, dict[tuple[str, int, str], Axes]]:
    """A panel for each data set, depth and level, a legend above and a note below.

    One level takes two panels a row, several take a row for each data set and depth.
    """
    keys = [(*cell, level) for cell in cells for level in levels]
    columns = len(levels) if len(levels) > 1 else min(2, len(cells))
    rows = math.ceil(len(keys) / columns)
    handles = [
        Line2D(
            [], [], color=one.style.colour, ls=one.style.line, marker=one.style.marker, lw=1.4,
            ms=5, mfc="white" if one.hollow else one.style.colour, label=label(name),
        )
        for name, one in drawn.items()
    ]  # fmt: skip
    lines = textwrap.wrap(note, 112)
    height = 2.4 * rows + 0.2 * math.ceil(len(handles) / 5) + 0.17 * len(lines) + 0.2
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(keys) :]:
        axis.remove()
    for (dataset, depth, level), axis in zip(keys, axes, strict=False):
        title = f"{dataset}, depth {depth}" + (f", {level}" if len(levels) > 1 else "")
        axis.set_title(title, loc="left")
    figure.legend(handles=handles, loc="outside upper left", ncols=min(5, len(handles)))
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", size="medium", color=_GREY)
    return figure, dict(zip(keys, axes, strict=False))


def _scale_means(panels: Mapping[tuple[str, int, str], Axes], table: pd.DataFrame) -> None:
    for dataset, part in _by(table, "dataset"):
        values = part[["mean", "ci_low", "ci_high"]].to_numpy(float).ravel()
        _scale_log(panels, dataset, values, math.inf)


def _scale_log(
    panels: Mapping[tuple[str, int, str], Axes], dataset: str, values: np.ndarray, top: float
) -> None:
    """One logarithmic axis for a data set's panels, up to `top`, its ticks in plain numbers."""
    values = values[np.isfinite(values) & (values > 0)]
    if not values.size:
        return
    low = values.min()
    top = top if top > low else values.max()  # the lowest mean may be 0
    high = min(values.max(), top)
    margin = (high / low) ** 0.05 if high > low else 1.5
    low, high = low / margin, high if high == top else high * margin
    if high / low < 4:
        ticks = list(MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high))
    else:
        digits = (1, 2, 5) if high / low > 20 else (1, 1.5, 2, 3, 5, 7)
        ticks = [digit * 10.0**power for power in range(-9, 9) for digit in digits]
    for key, axis in panels.items():
        if key[0] == dataset:
            axis.set_yscale("log")
            axis.set_ylim(low, high)
            axis.yaxis.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
            axis.yaxis.set_major_formatter(FuncFormatter(_plain_number))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_minor_formatter(NullFormatter())


def _plain_number(value: float, _: int) -> str:
    return f"{value:g}".replace("-", "−")


def _refuse_empty(table: pd.DataFrame, what: str) -> None:
    if table.empty:
        raise UserError(f"no {what} runs to draw; run the study first")
