"""A study's charts, each defined once in Vega-Lite: for the figures, and for the page to explore.

A chart draws rows: a frame of what `statistics` found, with `x`, `y`, the ends of the interval, and
a look. `draw` gives PNG and SVG; `page` puts the same chart into a browser.
"""

import json
import math
import textwrap
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import vl_convert

from unitnorm.report.style import GREY, assign_styles, label, quantize
from unitnorm.report.tables import format_signed
from unitnorm.study import statistics
from unitnorm.study.statistics import name_comparison, name_place

WIDTH, HEIGHT, SCALE = 800, 180, 1.5  # pixels of a page, of a panel, and of the PNG to each
_RANGE = 6.0  # how many times its lowest error a panel shows: worse ones do not matter

# Okabe and Ito's colours; every verdict has a shape of its own as well.
VERDICTS = {
    "better": {"colour": "#0072B2", "shape": "circle", "letter": "●"},
    "worse": {"colour": "#D55E00", "shape": "square", "letter": "■"},
    "equivalent": {"colour": "#009E73", "shape": "diamond", "letter": "◆"},
    "open": {"colour": "#666666", "shape": "circle", "letter": "○", "fill": "white"},
}
# matplotlib's markers as Vega has them, and as letters of the page
_SHAPES = {
    "o": ("circle", "●"), "s": ("square", "■"), "D": ("diamond", "◆"), "P": ("cross", "✚"),
    "^": ("triangle-up", "▲"), "v": ("triangle-down", "▼"), "<": ("triangle-left", "◀"),
    ">": ("triangle-right", "▶"),
}  # fmt: skip


# ---------------------------------------------------------------- rows


def assign_marks(updates: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """How each arm is drawn, by name: in its update's colour as long as shapes last."""
    styles = assign_styles(updates.values())
    own = [style.colour for style in styles.values()]
    spare = [style.colour for style in assign_styles(map(str, range(9))).values()]
    assigned, taken = {}, set()
    for arm, update in updates.items():
        style = styles[update]
        marks = [_SHAPES.get(style.marker, _SHAPES["P"]), *_SHAPES.values()]
        colours = [style.colour, *(c for c in spare if c not in own), *own]
        free = ((c, m) for c in colours for m in marks if (c, m) not in taken)
        colour, mark = next(free, (style.colour, marks[0]))
        taken.add((colour, mark))
        assigned[arm] = {"update": update, "colour": colour, "shape": mark[0], "letter": mark[1]}
    return assigned


def _marked(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """With the mark of each row's arm (or update, as `column` says), and the name of its place."""
    marks = assign_marks(dict(zip(table[column], table["update"], strict=True)))
    return table.assign(
        series=table[column].map(label),
        place=[name_place(row) for row in table.to_dict("records")],
        **{key: [marks[name][key] for name in table[column]] for key in ("colour", "shape")},
    )


def _cut(table: pd.DataFrame) -> pd.DataFrame:
    """With `y` and its interval inside the scale of its data set; an arrow is off the scale."""
    lowest = table["y"].where(table["y"] > 0).groupby(table["dataset"]).transform("min")
    top = _RANGE * lowest
    on = table["y"] <= top
    ends = {name: table[name].clip(lowest / 1.2, top).where(on) for name in ("ci_low", "ci_high")}
    shape = table["shape"].where(on, "arrow")
    return table.assign(y=np.minimum(table["y"], top), shape=shape, **ends)[table["y"] > 0]


def rate_rows(runs: pd.DataFrame) -> pd.DataFrame:
    """Validation error of the tuning runs against the filters' rate, all else at its best."""
    table = _marked(statistics.profile_rates(statistics.rate_means(runs)), "arm")
    ends = table[["ci_low", "ci_high"]].where(table["n_diverged"] == 0)
    level = table["schedule"] if table["schedule"].nunique() > 1 else ""
    return _cut(table.assign(x=table["filters_rate"], y=table["val_error"], level=level, **ends))


def effective_rows(runs: pd.DataFrame, epochs: Mapping[str, int]) -> pd.DataFrame:
    """The last epoch's λ/‖w‖² of the runs of `rate_rows`, with what cosine took off λ put back.

    `epochs` are those that the schedule of each arm is made for.
    """
    table = rate_rows(runs)
    left = statistics.left_by(table["schedule"], table["arm"].map(epochs).to_numpy(float))
    table = table.assign(y=table["effective_rate"] / left, ci_low=math.nan, ci_high=math.nan)
    return _marked(table, "arm")[table["y"] > 0]


def budget_rows(runs: pd.DataFrame) -> pd.DataFrame:
    """The error after 5, 10, 25, … epochs and at the end; of many starts the balanced alone."""
    alone = runs["spread"] == 0
    table = statistics.budget_means(runs[alone] if alone.any() else runs)
    return _cut(_marked(table.assign(x=table["budget"], y=table["mean"], level=""), "arm"))


def spread_rows(runs: pd.DataFrame) -> pd.DataFrame:
    """The error of full trainings against the spread of the start: a line per update."""
    table = _marked(statistics.spread_means(runs), "update")
    names = list(dict.fromkeys(table["series"]))
    shift = 0.02 * max(1.0, float(table["spread"].max()))  # else the intervals overlap
    x = table["spread"] + shift * (table["series"].map(names.index) - (len(names) - 1) / 2)
    table = _cut(table.assign(x=x, y=table["mean"], level=table["kind"], lost=""))
    for _, part in table[table["n_diverged"] > 0].groupby(["level", "place", "spread"]):
        lost = [f"{row.series}: {row.n_diverged}" for row in part.itertuples()]
        table.loc[part.index[0], "lost"] = "\n".join(lost)
    return table.sort_values("place", kind="stable")  # a row of panels for each


def late_rate_rows(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """What `statistics.late_rates` finds in several studies, by name: all in one figure."""
    found = [table.assign(arm=f"{study}: " + table["arm"]) for study, table in tables.items()]
    table = pd.concat(found, ignore_index=True)
    return _marked(table, "arm").assign(x=table["rate_ratio"], y=table["mean"], level="")


def forest_rows(compared: pd.DataFrame, margin: float) -> pd.DataFrame:
    """Every comparison of errors; an arm that fails badly stands at the frame, out of the way."""
    rows = compared[compared["metric"].map(statistics.is_error).astype(bool)]
    rows = rows[rows["difference"].notna()]
    ends = ["difference", "ci_low", "ci_high", "ci_images_low", "ci_images_high"]
    sizes = rows[ends].abs().to_numpy(float)
    sizes = sizes[np.isfinite(sizes)]
    limit = min(sizes.max(), 5 * np.quantile(sizes, 0.8)) if sizes.size else 0.0
    limit = 1.06 * max(limit, 2 * margin)
    records = rows.to_dict("records")
    marks = [VERDICTS[row["verdict"]] for row in records]
    beyond = np.where(rows["difference"] > limit, "triangle-right", "triangle-left")
    inside = rows["difference"].abs() <= limit
    drawn = rows[ends].clip(-limit, limit)
    low = 1.06 * np.nanmin([-2 * margin, *drawn.min()])
    high = 1.06 * np.nanmax([2 * margin, *drawn.max()])
    return rows.assign(
        **drawn,
        title=[name_comparison(row) for row in records],
        place=[name_place(row) for row in records],
        text=[_tell(row) for row in records],
        colour=[mark["colour"] for mark in marks],
        fill=[mark.get("fill", mark["colour"]) for mark in marks],
        shape=np.where(inside, [mark["shape"] for mark in marks], beyond),
        low=max(-limit, low), high=min(limit, high), margin_low=-margin, margin_high=margin,
    )  # fmt: skip


def _tell(row: Mapping) -> str:
    text = f"{format_signed(row['difference'], 2)} {row['verdict']}, n = {row['n']}"
    return text + (f" ({row['n_left_out']} left out)" if row["n_left_out"] else "")


# ---------------------------------------------------------------- charts


def _field(name: str, kind: str = "quantitative", **options: object) -> dict:
    return {"field": name, "type": kind, **options}


def _raw(name: str) -> dict:
    return _field(name, "nominal", scale=None)


def _layer(mark: str, encoding: dict, only: str = "", **options: object) -> dict:
    layer = {"mark": {"type": mark, **options}, "encoding": encoding}
    return layer | ({"transform": [{"filter": only}]} if only else {})


def _tooltip(columns: str) -> dict:
    return {"tooltip": [{"field": name} for name in columns.split()]}


def _lines(x: dict, title: str, columns: str, ticks: int = 8) -> dict:
    """A line with intervals for each series, a ring around the best points, and how many are lost.

    `x` is the horizontal axis, `title` that of the other; a tooltip shows `columns`.
    """
    scale = {"type": "log", "nice": False, "padding": 10}
    axis: dict = {"scale": scale, "title": title, "axis": {"tickCount": ticks, "format": "~g"}}
    y = {"y": _field("y", **axis)}
    interval = {"y": _field("ci_low", **axis), "y2": {"field": "ci_high"}}
    point = y | {"shape": _raw("shape")} | _tooltip(columns)
    lost = {"y": {"value": 2}, "color": {"value": GREY}, "text": {"field": "lost"}}
    at_top = {"lineBreak": "\n", "baseline": "top", "align": "right", "color": GREY}
    return {
        "encoding": {
            "x": {"field": "x", **x}, "color": _raw("colour"), "detail": {"field": "series"},
        },
        "layer": [
            _layer("line", y, strokeWidth=1.5),
            _layer("rule", interval, opacity=0.7),
            _layer("point", point, filled=True, size=40, opacity=1),
            _layer("point", y, "datum.is_best", size=160, shape="circle", strokeWidth=2),
            _layer("text", lost, "datum.lost", **at_top),
        ],
    }  # fmt: skip


def _forest() -> dict:
    """A difference with both of its intervals for each place, on the margin's band."""

    def span(low: str, high: str) -> dict:
        axis = {"format": "~g", "tickCount": 7, "labelOverlap": True}
        scale = {"nice": False, "zero": False}
        x = _field(low, title="difference [percentage points]", scale=scale, axis=axis)
        return {"x": x, "x2": {"field": high}}

    place = {"y": _field("place", "nominal", sort=None, title=None)}
    row = place | {"color": _raw("colour")}
    point = {"x": span("difference", "")["x"], **place, **_tooltip("title place text")}
    point |= {"shape": _raw("shape"), "stroke": _raw("colour"), "fill": _raw("fill")}
    return {
        "layer": [
            _layer("rect", span("low", "high"), opacity=0),
            _layer("rect", span("margin_low", "margin_high"), color="#e3e3e3"),
            _layer("rule", {"x": {"datum": 0}}, color="black"),
            _layer("rule", span("ci_images_low", "ci_images_high") | row),
            _layer("rule", span("ci_low", "ci_high") | row, strokeWidth=3),
            _layer("point", point, size=55, opacity=1),
        ]
    }


def _late_rates() -> dict:
    """A point with its interval for each arm, and the level of UN, which stands at 1 and 0."""
    x = _field(
        "x", title="late effective rate / UN's",
        scale={"type": "log", "nice": False, "padding": 12},
        axis={"format": "~g", "tickCount": 5, "grid": False},
    )  # fmt: skip
    y = _field("y", title="test error − UN's [points]", scale={"zero": True})
    at, un = {"x": x, "color": _raw("colour")}, {"color": {"value": "#888888"}}
    point = at | {"y": y, "shape": _raw("shape")} | _tooltip("arm rate_ratio mean ci_low ci_high n")
    interval = at | {"y": y | {"field": "ci_low"}, "y2": {"field": "ci_high"}}
    return {
        "layer": [
            _layer("rule", un | {"y": {"datum": 0}}, strokeDash=[3, 3]),
            _layer("rule", un | {"x": {"datum": 1}}, strokeDash=[3, 3]),
            _layer("rule", interval, strokeWidth=1.5),
            _layer("point", point, filled=True, size=60, opacity=1),
        ]
    }


_RATE = {
    "type": "quantitative", "title": "base rate of the filters",
    "scale": {"type": "log", "nice": False, "padding": 12},
    "axis": {
        "format": "~g", "tickCount": 4, "labelOverlap": True, "labelSeparation": 6, "grid": False,
    },
}  # fmt: skip
_BUDGET = {"type": "ordinal", "sort": None, "title": "after epoch", "axis": {"labelAngle": 0}}
_SPREAD = {
    "type": "quantitative", "title": "spread of the start [decades]",
    "axis": {"tickCount": 5, "format": "~g", "grid": False},
}  # fmt: skip
_AT = "arm filters_rate rest_rate decay"

# By name, each a panel of Vega-Lite without its data, which are the rows of that name.
CHARTS = {
    "forest": _forest(),
    "rates": _lines(_RATE, "validation error [%]", f"{_AT} val_error n n_diverged"),
    "effective_rates": _lines(_RATE, "λ/‖w‖² of the last epoch", f"{_AT} effective_rate", 4),
    "budgets": _lines(_BUDGET, "test error [%]", "arm budget mean ci_low ci_high n"),
    "late_rates": _late_rates(),
    "spreads": _lines(_SPREAD, "test error [%]", "update spread mean ci_low ci_high n n_diverged"),
}
_CUT = "Arrows: off the scale, at six times the lowest."
_MEAN = "Mean and 95 % interval, cut where an error ends; diverged runs are left out."
_RING = "All else at its best for each rate of the filters. Ring: the best rates."
# What stands below a figure, and above the charts of the page.
NOTES = {
    "forest": (
        "Difference of an arm and its baseline in pairs of runs with one seed; left of 0 the arm "
        "is better. Thick: 95 % interval over runs; thin: over runs and test images. Grey band: "
        "too small to matter. A triangle: off the scale."
    ),
    "rates": (
        "Mean validation error of the tuning runs, where a diverged run counts as 100 %; 95 % "
        f"interval where none has, cut off at the scale's ends. {_RING} {_CUT}"
    ),
    "effective_rates": (
        "Median of λ/‖w‖² over all filters in the last epoch, mean of the tuning runs that have "
        f"not diverged; what cosine has taken off λ by then is put back. {_RING}"
    ),
    "budgets": (
        f"{_MEAN} A run that stopped earlier keeps its last value; of many starts the balanced "
        f"alone. {_CUT}"
    ),
    "late_rates": (
        "Gradient descent under cosine, in all studies that have UN beside it. Across: its "
        "effective rate λ/‖w‖² of the last epoch, median over all filters, over UN's; up: the "
        "difference of the test error to UN, in pairs by seed, with its 95 % interval. UN is "
        "where the dashed lines cross. With momentum, UN with momentum. If the late rate alone "
        "explained the difference, all would lie on one line."
    ),
    "spreads": (
        f"{_MEAN} Spread: decades between the largest and the smallest scale of a start that "
        f"computes the same. In the frame: how many runs diverged. {_CUT}"
    ),
}
CONFIG = {
    "font": "DejaVu Sans, Verdana, sans-serif", "background": "white", "view": {"stroke": None},
    "axis": {
        "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal",
        "gridColor": "#e5e5e5", "domainColor": "#888888",
    },
    "axisY": {"labelLimit": 200, "minExtent": 40},
    "header": {
        "title": None, "labelAnchor": "start", "labelFontSize": 13, "labelFontWeight": "bold",
    },
    "text": {"fontSize": 11},
}  # fmt: skip


# ---------------------------------------------------------------- figures


def draw(name: str, rows: pd.DataFrame) -> dict[str, bytes]:
    """A chart of all rows, with legend and note: PNG and SVG by ending."""
    if name == "forest":  # all comparisons below each other, their numbers beside them
        at = {"x": {"value": WIDTH - 335}, "y": _field("place", "nominal", sort=None)}
        texts = _layer("text", at | {"text": {"field": "text"}}, align="left")
        spec = {"layer": [*CHARTS[name]["layer"], texts], "width": WIDTH - 345}
        panels = [_facet(rows, "title", 1, spec | {"height": {"step": 19}})]
        shape = rows["verdict"].map({verdict: mark["shape"] for verdict, mark in VERDICTS.items()})
        legend = rows.assign(series=rows["verdict"], shape=shape)
    else:
        levels = rows["level"].nunique()  # a row of panels for each data set and network, or two
        columns = levels if levels > 1 else 2
        rows = rows.assign(panel=rows["place"] + (", " + rows["level"] if levels > 1 else ""))
        spec = {**CHARTS[name], "width": WIDTH // columns - 85, "height": HEIGHT}
        panels = [_facet(part, "panel", columns, spec) for _, part in rows.groupby("dataset")]
        # off the scale a point is an arrow, which is not the shape of its series
        legend = rows.sort_values("shape", key=lambda shape: shape == "arrow", kind="stable")
    title = {
        "text": textwrap.wrap(NOTES[name], 120), "orient": "bottom", "anchor": "start",
        "color": GREY, "fontSize": 12, "fontWeight": "normal", "offset": 12,
    }  # fmt: skip
    page = {"vconcat": [_legend(legend), *panels], "title": title, "padding": 8, "spacing": 14}
    page["config"] = {**CONFIG, "aria": False}
    _register_letters()
    svg = vl_convert.vegalite_to_svg(page)  # compiled once, for both
    return {"png": quantize(vl_convert.svg_to_png(svg, scale=SCALE)), "svg": svg.encode()}


@cache
def _register_letters() -> None:
    """Those of `CONFIG`, the same on every machine."""
    vl_convert.register_font_directory(str(Path(mpl.get_data_path()) / "fonts" / "ttf"))


def _facet(rows: pd.DataFrame, by: str, columns: int, spec: dict) -> dict:
    """A panel for each value of a column; below each other they have one x axis, else own ones."""
    own = {"axis": {"x": "independent", "y": "independent"}}
    resolve = {"scale": {"y": "independent"}} if columns == 1 else own
    return {
        "data": {"values": _to_values(rows)},
        "facet": _field(by, "nominal", sort=list(rows[by].unique())),
        "columns": columns,
        "spec": spec,
        "resolve": resolve,
    }


def _legend(rows: pd.DataFrame) -> dict:
    """The shape and name of each series, in lines of as many as fit."""
    entries = rows.drop_duplicates("series").sort_index()[["series", "colour", "shape"]]
    widest = 40 + 7 * int(entries["series"].str.len().max())
    fit = max(1, min(len(entries), WIDTH // widest))
    place = np.arange(len(entries))
    values = _to_values(entries.assign(x=place % fit * widest, y=place // fit * 18))
    shown = {"shape": _raw("shape"), "color": _raw("colour")}
    return {
        "data": {"values": values},
        "encoding": {axis: _field(axis, scale=None, axis=None) for axis in "xy"},
        "layer": [
            _layer("point", shown, filled=True, size=60, opacity=1),
            _layer("text", {"text": {"field": "series"}}, dx=9, align="left", fontSize=12),
        ],
        "width": WIDTH - 140,
        "height": 18 * ((len(entries) - 1) // fit),
    }


def _to_values(rows: pd.DataFrame) -> list[dict]:
    """NaN is None."""
    return json.loads(rows.to_json(orient="records", double_precision=10))
