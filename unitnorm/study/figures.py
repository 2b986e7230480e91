"""A study's charts, each defined once in Vega-Lite: for the figures, and for the page to explore.

A chart draws rows: a frame of what `statistics` found, with `x`, `y`, the ends of the interval, and
a look. `draw` sets its panels side by side and gives PNG and SVG, in letters that travel with
matplotlib; `page` puts the same chart into a browser.
"""

import io
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import vl_convert
from PIL import Image

from unitnorm.report.style import GREY, assign_styles, label
from unitnorm.report.tables import format_points
from unitnorm.study.statistics import (
    budget_means,
    is_error,
    name_comparison,
    name_metric,
    name_place,
    profile_rates,
    rate_means,
    spread_means,
)

WIDTH, HEIGHT, SCALE = 800, 180, 1.5  # pixels of a page, of a panel, and of the PNG to each
_RANGE = 6.0  # how many times its lowest error a panel shows: worse ones do not matter
_BAND = "#e3e3e3"

# Okabe and Ito's colours; every verdict has a shape of its own as well.
VERDICTS = {
    "better": {"colour": "#0072B2", "shape": "circle", "letter": "●"},
    "worse": {"colour": "#D55E00", "shape": "square", "letter": "■"},
    "equivalent": {"colour": "#009E73", "shape": "diamond", "letter": "◆"},
    "open": {"colour": "#666666", "shape": "circle", "letter": "○"},
}
# matplotlib's markers as Vega has them, and as letters of the page
_SHAPES = {
    "o": ("circle", "●"), "s": ("square", "■"), "D": ("diamond", "◆"), "P": ("cross", "✚"),
    "^": ("triangle-up", "▲"), "v": ("triangle-down", "▼"), "<": ("triangle-left", "◀"),
    ">": ("triangle-right", "▶"),
}  # fmt: skip


# ---------------------------------------------------------------- rows


def assign_looks(updates: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Update, colour, shape and letter of each arm: in its update's colour as long as shapes last.

    Args:
        updates: of the arms, by name.
    """
    styles = assign_styles(updates.values())
    own = [style.colour for style in styles.values()]
    spare = [s.colour for s in assign_styles(()).values()]
    looks: dict[str, dict[str, str]] = {}
    taken = set()
    for arm, update in updates.items():
        style = styles[update]
        marks = [_SHAPES.get(style.marker, _SHAPES["P"]), *_SHAPES.values()]
        colours = [style.colour, *(c for c in spare if c not in own), *own]
        free = [(c, m) for c in colours for m in marks if (c, m) not in taken]
        colour, mark = free[0] if free else (style.colour, marks[0])
        taken.add((colour, mark))
        looks[arm] = {"update": update, "colour": colour, "shape": mark[0], "letter": mark[1]}
    return looks


def _looking(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """With the look of each row's arm (or update, as `column` says), and the name of its place."""
    looks = assign_looks(dict(zip(table[column], table["update"], strict=True)))
    return table.assign(
        series=table[column].map(label),
        place=[name_place(row) for row in table.to_dict("records")],
        **{key: [looks[name][key] for name in table[column]] for key in ("colour", "shape")},
    )


def _cut(table: pd.DataFrame) -> pd.DataFrame:
    """With `y` and its interval inside the scale of its data set; a triangle is off the scale."""
    lowest = table["y"].where(table["y"] > 0).groupby(table["dataset"]).transform("min")
    top = np.maximum(_RANGE * lowest, 0)
    off = table["y"] > top
    ends = {
        name: np.clip(table[name], lowest / 1.2, top).where(~off & table[name].notna())
        for name in ("ci_low", "ci_high")
    }
    shape = table["shape"].where(~off, "triangle-up")
    return table.assign(y=np.minimum(table["y"], top), shape=shape, **ends)[table["y"] > 0]


def rate_rows(runs: pd.DataFrame) -> pd.DataFrame:
    """Validation error of the tuning runs against the filters' rate, all else at its best."""
    table = _looking(profile_rates(rate_means(runs)), "arm")
    whole = {name: table[name].where(table["n_diverged"] == 0) for name in ("ci_low", "ci_high")}
    level = table["schedule"] if table["schedule"].nunique() > 1 else ""
    return _cut(table.assign(x=table["filters_rate"], y=table["val_error"], level=level, **whole))


def effective_rows(runs: pd.DataFrame, epochs: Mapping[str, int]) -> pd.DataFrame:
    """The last epoch's λ/‖w‖² of the runs of `rate_rows`, with what cosine took off λ put back.

    Args:
        epochs: that the schedule of each arm is made for.
    """
    table = _looking(profile_rates(rate_means(runs)), "arm")
    left = 0.5 - 0.5 * np.cos(np.pi / table["arm"].map(epochs))  # of cosine, in the last epoch
    rate = table["effective_rate"] / left.where(table["schedule"] == "cosine", 1.0)
    level = table["schedule"] if table["schedule"].nunique() > 1 else ""
    none = {"ci_low": math.nan, "ci_high": math.nan}
    return table.assign(x=table["filters_rate"], y=rate, level=level, **none)[rate > 0]


def budget_rows(runs: pd.DataFrame, metric: str = "test_error") -> pd.DataFrame:
    """The error after 5, 10, 25, … epochs and at the end; of many starts the balanced alone."""
    alone = runs["spread"] == 0
    table = budget_means(runs[alone] if alone.any() else runs, metric)
    return _cut(_looking(table.assign(x=table["budget"], y=table["mean"], level=""), "arm"))


def spread_rows(runs: pd.DataFrame) -> pd.DataFrame:
    """The error of full trainings against the spread of the start: a line per update."""
    table = _looking(spread_means(runs), "update")
    names = list(dict.fromkeys(table["series"]))
    shift = 0.02 * max(1.0, float(table["spread"].max()))  # else the intervals overlap
    x = table["spread"] + shift * (table["series"].map(names.index) - (len(names) - 1) / 2)
    table = _cut(table.assign(x=x, y=table["mean"], level=table["kind"], lost=""))
    for _, part in table[table["n_diverged"] > 0].groupby(["level", "place", "spread"]):
        told = [f"{row.series}: {row.n_diverged}" for row in part.itertuples()]
        table.loc[part.index[0], "lost"] = "\n".join(told)
    return table


def forest_rows(compared: pd.DataFrame, margin: float) -> pd.DataFrame:
    """Every comparison of errors: its difference, both intervals and the verdict.

    One arm that fails badly must not press all others into a line: it stands at the frame.
    """
    rows = compared[compared["metric"].map(is_error).astype(bool) & compared["difference"].notna()]
    ends = ["difference", "ci_low", "ci_high", "ci_images_low", "ci_images_high"]
    sizes = rows[ends].abs().to_numpy(float)
    sizes = sizes[np.isfinite(sizes)]
    limit = min(sizes.max(), 5 * np.quantile(sizes, 0.8)) if sizes.size else 0.0
    limit = 1.06 * max(limit, 2 * margin)
    records = rows.to_dict("records")
    looks = [VERDICTS[row["verdict"]] for row in records]
    beyond = np.where(rows["difference"] > limit, "triangle-right", "triangle-left")
    inside = rows["difference"].abs() <= limit
    return rows.assign(
        **rows[ends].clip(-limit, limit),
        title=[name_title(row) for row in records],
        place=[name_place(row) for row in records],
        text=[_tell(row) for row in records],
        colour=[look["colour"] for look in looks],
        fill=["white" if row["verdict"] == "open" else VERDICTS[row["verdict"]]["colour"] for row in records],
        shape=np.where(inside, [look["shape"] for look in looks], beyond),
        low=-limit, high=limit, margin_low=-margin, margin_high=margin,
    )  # fmt: skip


def name_title(row: Mapping) -> str:
    """A comparison with its level, and its metric where that is another than the test error."""
    metric = "" if row["metric"] == "test_error" else name_metric(row["metric"]).removesuffix(" [%]")
    return ", ".join(part for part in (name_comparison(row), metric) if part)


def _tell(row: Mapping) -> str:
    text = f"{format_points(row['difference'] / 100)} {row['verdict']}, n = {row['n']}"
    return text + (f" ({row['n_left_out']} left out)" if row["n_left_out"] else "")


# ---------------------------------------------------------------- charts


def _field(name: str, kind: str = "quantitative", **options: object) -> dict:
    return {"field": name, "type": kind, **options}


_COLOUR = _field("colour", "nominal", scale=None)
_SHAPE = _field("shape", "nominal", scale=None)


def _lines(x: dict, y: str, tooltip: Sequence[str]) -> dict:
    """A line with intervals for each series; a ring around the points that are chosen."""
    rate = {"type": "log", "nice": False, "padding": 10}
    x = {"field": "x", **x}
    across = {"x": x, "y": _field("y", scale=rate, title=y, axis={"tickCount": 5, "format": "~g"})}
    across |= {"color": _COLOUR, "detail": {"field": "series"}}
    ends = {"y": _field("ci_low", scale=rate, title=y), "y2": {"field": "ci_high"}}
    point = {"type": "point", "filled": True, "size": 40, "opacity": 1}
    return {
        "layer": [
            {"mark": {"type": "line", "strokeWidth": 1.5}, "encoding": across},
            {"mark": {"type": "rule", "opacity": 0.7}, "encoding": across | ends},
            {"mark": point, "encoding": across | {"shape": _SHAPE, "tooltip": [{"field": f} for f in tooltip]}},
            {
                "transform": [{"filter": "datum.is_best"}],
                "mark": {"type": "point", "size": 160, "shape": "circle", "strokeWidth": 2},
                "encoding": across,
            },
            {
                "transform": [{"filter": "datum.lost"}],
                "mark": {"type": "text", "lineBreak": "\n", "baseline": "top", "color": GREY, "dx": -4, "align": "right"},
                "encoding": {"x": x, "y": {"value": 2}, "text": {"field": "lost"}},
            },
        ]
    }  # fmt: skip


@cache
def charts() -> dict[str, dict]:
    """The Vega-Lite specifications by name, each of one panel and of the rows of that name."""
    rates = {"type": "quantitative", "title": "base rate of the filters"}
    rates |= {"scale": {"type": "log", "nice": False, "padding": 12}}
    rates |= {"axis": {"format": "~g", "tickCount": 4, "labelOverlap": True, "grid": False}}
    budget = {"type": "ordinal", "sort": None, "title": "after epoch", "axis": {"labelAngle": 0}}
    spread = {"type": "quantitative", "title": "spread of the start [decades]"}
    spread |= {"axis": {"tickCount": 5, "grid": False}}
    at = ["arm", "filters_rate", "rest_rate", "decay"]
    means = ["mean", "ci_low", "ci_high", "n"]
    place = {"y": _field("place", "nominal", sort=None, title=None)}
    ends = {"nice": False, "zero": False}
    x = _field("difference", title="difference [percentage points]", scale=ends, axis={"format": "~g"})

    def span(low: str, high: str) -> dict:
        return {"x": {**x, "field": low}, "x2": {"field": high}}

    forest = [
        {"mark": {"type": "rect", "opacity": 0}, "encoding": span("low", "high")},
        {"mark": {"type": "rect", "color": _BAND}, "encoding": span("margin_low", "margin_high")},
        {"mark": {"type": "rule", "color": "black"}, "encoding": {"x": {"datum": 0}}},
        {"mark": "rule", "encoding": span("ci_images_low", "ci_images_high") | place | {"color": _COLOUR}},
        {"mark": {"type": "rule", "strokeWidth": 3}, "encoding": span("ci_low", "ci_high") | place | {"color": _COLOUR}},
        {
            "mark": {"type": "point", "size": 55, "opacity": 1},
            "encoding": {
                "x": x, **place, "shape": _SHAPE, "stroke": _COLOUR,
                "fill": _field("fill", "nominal", scale=None),
                "tooltip": [{"field": "title"}, {"field": "place"}, {"field": "text"}],
            },
        },
    ]  # fmt: skip
    pairs = {"x": _field("baseline", scale={"zero": False}), "y": _field("difference", title="difference of the pair")}
    pairs |= {"tooltip": [{"field": name} for name in ("seed", "arm", "baseline", "difference")]}
    return {
        "forest": {"layer": forest},
        "rates": _lines(rates, "validation error [%]", [*at, "val_error", "n", "n_diverged"]),
        "effective_rates": _lines(rates, "λ/‖w‖² of the last epoch", [*at, "effective_rate"]),
        "budgets": _lines(budget, "test error [%]", ["arm", "budget", *means]),
        "spreads": _lines(spread, "test error [%]", ["update", "spread", *means, "n_diverged"]),
        "pairs": {
            "layer": [
                {"mark": {"type": "rule", "color": "black"}, "encoding": {"y": {"datum": 0}}},
                {"mark": {"type": "circle", "opacity": 0.6, "color": "#0072B2"}, "encoding": pairs},
            ]
        },
    }  # fmt: skip


CONFIG = {
    "font": "DejaVu Sans, Verdana, sans-serif",
    "axis": {
        "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal",
        "gridColor": "#e5e5e5", "domainColor": "#888888",
    },
    "axisY": {"labelLimit": 140, "minExtent": 40},
    "header": {"title": None, "labelAnchor": "start", "labelFontSize": 13, "labelFontWeight": "bold"},
    "view": {"stroke": None}, "text": {"fontSize": 11}, "background": "white",
}  # fmt: skip


# ---------------------------------------------------------------- figures


def draw(name: str, rows: pd.DataFrame, note: str) -> dict[str, bytes]:
    """A chart of all rows: PNG and SVG by ending, a row of panels or two for each data set."""
    levels = rows["level"].nunique()
    columns = levels if levels > 1 else 2
    rows = rows.assign(panel=rows["place"] + (", " + rows["level"] if levels > 1 else ""))
    size = {"width": WIDTH // columns - 85, "height": HEIGHT}
    panels = [
        _facet(part, "panel", columns, {**charts()[name], **size}) for _, part in rows.groupby("dataset")
    ]
    entries = rows.drop_duplicates("series")[["series", "colour"]]
    shapes = dict(zip(rows["series"], rows["shape"], strict=True))
    for series, shape in zip(rows["series"], rows["shape"], strict=True):
        if shape != "triangle-up":  # which is off the scale, where it is no shape of the series
            shapes[series] = shape
    return _encode([_legend(entries.assign(shape=entries["series"].map(shapes)))] + panels, note)


def draw_forest(rows: pd.DataFrame, note: str) -> dict[str, bytes]:
    """All comparisons below each other, with their numbers beside them."""
    chart = charts()["forest"]
    told = {"x": {"value": WIDTH - 385}, "y": _field("place", "nominal", sort=None), "text": {"field": "text"}}
    text = {"mark": {"type": "text", "align": "left"}, "encoding": told}
    spec = {"layer": [*chart["layer"], text], "width": WIDTH - 395, "height": {"step": 19}}
    used = [{"series": name, **VERDICTS[name]} for name in VERDICTS if name in set(rows["verdict"])]
    return _encode([_legend(pd.DataFrame(used)), _facet(rows, "title", 1, spec)], note)


def to_values(rows: pd.DataFrame) -> list[dict]:
    """Rows as plain values; NaN is None."""
    return json.loads(rows.to_json(orient="records", double_precision=6))


def _facet(rows: pd.DataFrame, by: str, columns: int, spec: dict) -> dict:
    alone = {} if columns == 1 else {"axis": {"x": "independent", "y": "independent"}}
    return {
        "data": {"values": to_values(rows)}, "facet": _field(by, "nominal", sort=None), "columns": columns,
        "spec": spec, "resolve": {**alone, "scale": {"y": "independent"} if columns == 1 else {}},
    }  # fmt: skip


def _legend(entries: pd.DataFrame) -> dict:
    """The shape and name of each series, in rows of as many as fit."""
    widest = 40 + 8 * int(entries["series"].str.len().max())
    fit = max(1, min(len(entries), WIDTH // widest))
    place = np.arange(len(entries))
    values = to_values(entries.assign(x=place % fit * widest, y=place // fit * 18))
    at = {"x": _field("x", scale=None, axis=None), "y": _field("y", scale=None, axis=None)}
    point = {"type": "point", "filled": True, "size": 60, "opacity": 1}
    text = {"type": "text", "align": "left", "dx": 9, "fontSize": 12}
    return {
        "data": {"values": values}, "width": WIDTH - 20, "height": 18 * (len(entries) - 1) // fit,
        "layer": [
            {"mark": point, "encoding": at | {"color": _COLOUR, "shape": _SHAPE}},
            {"mark": text, "encoding": at | {"text": {"field": "series"}}},
        ],
    }  # fmt: skip


@cache
def _register_letters() -> None:
    vl_convert.register_font_directory(str(Path(mpl.get_data_path()) / "fonts" / "ttf"))


def _encode(parts: list[dict], note: str) -> dict[str, bytes]:
    _register_letters()
    title = {"text": textwrap.wrap(note, 120), "orient": "bottom", "anchor": "start", "color": GREY}
    title |= {"fontSize": 12, "fontWeight": "normal", "offset": 12}
    spec = {"vconcat": parts, "title": title, "config": CONFIG, "padding": 8, "spacing": 14}
    picture = Image.open(io.BytesIO(vl_convert.vegalite_to_png(spec, scale=SCALE))).convert("RGB")
    content = io.BytesIO()  # lines need no more than 256 colours: a third of the size
    picture.quantize(256, dither=Image.Dither.NONE).save(content, "PNG", optimize=True)
    return {"png": content.getvalue(), "svg": vl_convert.vegalite_to_svg(spec).encode()}
