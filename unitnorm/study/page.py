"""The studies as one page: a single HTML file that needs no network.

Vega-Altair describes the charts; Vega's own script, the data and `page.html` around them are
inlined, and the page's content policy forbids it to load anything. Tables, filters and buttons are
plain HTML, so that keyboards and screen readers know them. Of the runs only the pairs of the
comparisons, the means of the rates and of the budgets are kept, rounded.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import altair as alt
import numpy as np
import pandas as pd
import vl_convert

from unitnorm.errors import UserError
from unitnorm.report.style import assign_styles
from unitnorm.study.figures import VERDICTS, budget_means, name_metric
from unitnorm.study.statistics import (
    is_error,
    metric_values,
    pair_runs,
    profile_rates,
    rank,
    rate_means,
    select_runs,
)

# matplotlib's markers as Vega has them, and as letters of the legend
_SHAPES = {
    "o": ("circle", "●"), "s": ("square", "■"), "D": ("diamond", "◆"), "P": ("cross", "✚"),
    "^": ("triangle-up", "▲"), "v": ("triangle-down", "▼"), "<": ("triangle-left", "◀"),
    ">": ("triangle-right", "▶"),
}  # fmt: skip
_RANGE = 6.0  # how many times its lowest error a chart of rates shows
_DIGITS = 5  # significant, of every number of the page


@dataclass(frozen=True)
class StudyFrames:
    """A study as the page shows it.

    Attributes:
        runs: a row per run, see `statistics`.
        comparisons: as `statistics.compare` returns them.
        about: a sentence or two: what is asked, when the plan was committed.
        margin: of equivalence, in percentage points.
    """

    runs: pd.DataFrame
    comparisons: pd.DataFrame
    about: str = ""
    margin: float = 0.05


def build_page(studies: Mapping[str, StudyFrames]) -> bytes:
    """The page of all studies, UTF-8; the same frames give the same bytes.

    Args:
        studies: by name, in the order of the page.

    Raises:
        UserError: no study.
    """
    if not studies:
        raise UserError("no study to show: run `unitnorm study` first")
    data = {name: _pack_study(frames) for name, frames in studies.items()}
    page = files("unitnorm.study").joinpath("page.html").read_text(encoding="utf-8")
    parts = {
        "VEGA": vl_convert.javascript_bundle().replace("</script", "<\\/script"),  # type: ignore[call-arg] # its types lack the default
        "DATA": _script_json(data),
        "CHARTS": _script_json(build_charts()),
        "VERDICTS": _script_json(
            {
                name: {"colour": colour, "letter": _SHAPES[marker][1]}
                for name, (colour, marker) in VERDICTS.items()
            }
        ),
    }
    # One pass, from the left: what is filled in may hold anything.
    head, *rest = page.split("/*{")
    filled = [head]
    for part in rest:
        name, after = part.split("}*/", 1)
        filled += [parts[name], after]
    return "".join(filled).encode()


def build_charts() -> dict[str, dict]:
    """The Vega-Lite specifications by name, each of the data set `rows` that the page puts in."""
    rows = alt.NamedData("rows")
    by_arm = {"color": alt.Color("colour:N", scale=None), "detail": "arm:N"}
    shape = alt.Shape("shape:N", scale=None)
    base = alt.Chart(rows)
    difference = alt.X("difference:Q", title="difference [percentage points]")
    y = alt.Y("label:N", sort=None, title=None)
    verdict = alt.Color("colour:N", scale=None)
    forest = alt.layer(
        base.mark_rect(color="#e3e3e3").encode(x="margin_low:Q", x2="margin_high:Q"),
        alt.Chart(alt.InlineData([{"zero": 0}])).mark_rule(color="black").encode(x="zero:Q"),
        base.mark_rule(clip=True).encode(
            x="ci_images_low:Q", x2="ci_images_high:Q", y=y, color=verdict
        ),
        base.mark_rule(strokeWidth=3, clip=True).encode(
            x="ci_low:Q", x2="ci_high:Q", y=y, color=verdict
        ),
        base.mark_point(filled=True, size=60, opacity=1).encode(
            x=difference, y=y, color=verdict, shape=shape, tooltip=["label:N", "text:N"]
        ),
    ).properties(width="container", height=alt.Step(20))
    rate_y = alt.Y("shown:Q", scale=alt.Scale(type="log", nice=False, padding=8))
    rate_y = rate_y.title("validation error [%]")
    rate_x = alt.X("filters_rate:Q", scale=alt.Scale(type="log", nice=False, padding=12))
    rate_x = rate_x.title("base rate of the filters")
    rate_x = rate_x.axis(format="~g", labelOverlap=True, tickCount=4, grid=False)
    tooltip = [
        "arm:N", "filters_rate:Q", "rest_rate:Q", "val_error:Q", "n:Q", "n_diverged:Q",
    ]  # fmt: skip
    rates = alt.layer(
        base.mark_line(strokeWidth=1.5).encode(x=rate_x, y=rate_y, **by_arm),
        base.mark_point(filled=True, size=45, opacity=1).encode(
            x=rate_x, y=rate_y, shape=shape, tooltip=tooltip, **by_arm
        ),
        base.mark_point(size=190, shape="circle", strokeWidth=2)
        .encode(x=rate_x, y=rate_y, **by_arm)
        .transform_filter("datum.is_best"),
    ).properties(width="container", height=220)
    budget_x = alt.X("budget:N", sort=None, title="after epoch", axis=alt.Axis(labelAngle=0))
    budget_y = alt.Y("mean:Q", scale=alt.Scale(zero=False), title="test error [%]")
    budgets = alt.layer(
        base.mark_line(strokeWidth=1.5).encode(x=budget_x, y=budget_y, **by_arm),
        base.mark_rule(opacity=0.7).encode(x=budget_x, y="ci_low:Q", y2="ci_high:Q", **by_arm),
        base.mark_point(filled=True, size=45, opacity=1).encode(
            x=budget_x,
            y=budget_y,
            shape=shape,
            tooltip=["arm:N", "budget:N", "mean:Q", "ci_low:Q", "ci_high:Q", "n:Q"],
            **by_arm,
        ),
    ).properties(width="container", height=220)
    pairs = (
        base.mark_circle(size=40, opacity=0.6, color="#0072B2")
        .encode(
            x=alt.X("baseline:Q", scale=alt.Scale(zero=False)),
            y=alt.Y("difference:Q", title="difference of the pair"),
            tooltip=["seed:Q", "arm:Q", "baseline:Q", "difference:Q"],
        )
        .properties(width="container", height=220)
    )
    pairs = alt.layer(
        alt.Chart(alt.InlineData([{"zero": 0}])).mark_rule(color="black").encode(y="zero:Q"), pairs
    ).properties(width="container", height=220)
    charts = {"forest": forest, "rates": rates, "budgets": budgets, "pairs": pairs}
    return {name: chart.to_dict() for name, chart in charts.items()}


def _pack_study(frames: StudyFrames) -> dict:
    """A study as plain lists: see `page.html` for what becomes of each."""
    runs = frames.runs
    comparisons = []
    for row in frames.comparisons.to_dict("records"):
        ours, theirs = select_runs(runs, row)
        both = pair_runs(ours, theirs, row["metric"]).reset_index()
        for side, part in (("arm", ours), ("baseline", theirs)):
            epochs = part.set_index("seed")["epochs"]
            both[f"{side}_epochs"] = both["seed"].map(epochs)
        comparisons.append(
            {
                **{name: _round_value(value) for name, value in row.items()},
                "is_error": is_error(row["metric"]),
                "metric_name": name_metric(row["metric"]).removesuffix(" [%]"),
                "shape": _SHAPES[VERDICTS[row["verdict"]][1]][0],
                "pairs": _table(both),
            }
        )
    rates = profile_rates(rate_means(runs)) if (runs["purpose"] == "tune").any() else None
    if rates is not None:
        lowest = rates.groupby("dataset")["val_error"].transform("min")
        rates["shown"] = np.minimum(rates["val_error"], _RANGE * lowest)
        rates = rates.drop(columns=["healthy_error", "ci_low", "ci_high"])
    has_error = metric_values(runs, "test_error").notna()
    return {
        "about": frames.about,
        "margin": frames.margin,
        "arms": _arm_looks(runs),
        "comparisons": comparisons,
        "ranks": _table(rank(runs)),
        "rates": _table(rates),
        "budgets": _table(budget_means(runs) if has_error.any() else None),
        "runs": len(runs),
    }


def _arm_looks(runs: pd.DataFrame) -> dict[str, dict[str, str]]:
    """Update, colour, shape and letter of each arm; no two arms look the same."""
    first = runs.drop_duplicates("arm")
    arms = dict(zip(first["arm"].astype(str), first["update"].astype(str), strict=True))
    alone = len(set(arms.values())) == len(arms)  # then an arm looks as its update does elsewhere
    styles = assign_styles(list(arms.values()) if alone else list(arms))
    taken: set[tuple[str, tuple[str, str]]] = set()
    looks = {}
    for arm, update in arms.items():
        drawn = styles[update if alone else arm]
        marks = [_SHAPES.get(drawn.marker, _SHAPES["P"]), *_SHAPES.values()]
        mark = next((m for m in marks if (drawn.colour, m) not in taken), marks[0])
        taken.add((drawn.colour, mark))
        shape, letter = mark
        looks[arm] = {"update": update, "colour": drawn.colour, "shape": shape, "letter": letter}
    return looks


def _table(frame: pd.DataFrame | None) -> dict[str, Sequence]:
    """A frame column by column, which needs half the bytes of rows."""
    if frame is None:
        return {}
    return {str(name): [_round_value(v) for v in frame[name].tolist()] for name in frame.columns}


def _round_value(value: object) -> object:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None
    return value


def _script_json(value: object) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
