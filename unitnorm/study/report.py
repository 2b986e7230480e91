"""What a study's records show: comparisons, rates, ranks and figures, from the runs alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.console import Group
from rich.text import Text

from unitnorm.report.style import encode
from unitnorm.report.tables import Cells, Fitting, format_signed, to_csv, to_markdown
from unitnorm.run.config import parse
from unitnorm.run.records import Records
from unitnorm.study import figures, statistics
from unitnorm.study.config import Plan


def plan_of(known: Records) -> Plan:
    """The plan that a folder's records were made by."""
    return parse(known.provenance["config"], "provenance.json", Plan)


def comparisons_of(known: Records) -> pd.DataFrame:
    """The plan's comparisons, as far as there are runs of their arms."""
    plan, runs = plan_of(known), known["runs"]
    there = set(runs.loc[runs["purpose"] == "compare", "arm"])
    planned = [one for one in plan.comparisons if {one.arm, one.baseline} <= there]
    return statistics.compare(runs, planned, plan.margin, plan.alpha)


def build(known: Records, compared: pd.DataFrame) -> dict[str, bytes]:
    """Every file of a study's report: the same records give the same bytes.

    Args:
      compared: from `comparisons_of`.
    """
    plan, runs = plan_of(known), known["runs"]
    files = {}
    if len(compared):
        files["comparisons.csv"] = to_csv(compared).encode()
        files["comparisons.md"] = to_markdown(comparison_cells(known, compared)).encode() + b"\n"
        files["summary.md"] = to_markdown(summary_cells(plan, compared)).encode() + b"\n"
    if (runs["purpose"] == "compare").any():
        files["ranking.csv"] = to_csv(statistics.rank(runs)).encode()
    drawn = {}
    if len(compared):
        drawn["comparisons"] = figures.draw_forest(compared, plan.margin)
    if (runs["purpose"] == "compare").any():
        drawn["budgets"] = figures.draw_budgets(runs)
        if (runs["spread"] > 0).any():
            drawn["spreads"] = figures.draw_spreads(runs)
    if (runs["purpose"] == "tune").any():
        files["rates.csv"] = to_csv(statistics.rate_means(runs)).encode()
        files["chosen_rates.csv"] = to_csv(statistics.choose_rates(runs)).encode()
        rates = runs[runs["purpose"] == "tune"].groupby("arm")[["filters_rate", "rest_rate"]]
        if rates.nunique().to_numpy().max() > 2:  # two points are no curve
            drawn["rates"] = figures.draw_tuning(runs)
    for name, figure in drawn.items():
        encoded = encode(figure, palette=True)
        files |= {f"figures/{name}.{ending}": content for ending, content in encoded.items()}
    return files


def build_index(studies: Mapping[str, Records]) -> bytes:
    """One page to explore several studies, by name."""
    from unitnorm.study.page import StudyFrames, build_page  # which loads the charts' library

    frames = {
        name: StudyFrames(
            known["runs"], comparisons_of(known), plan_of(known).question, plan_of(known).margin
        )
        for name, known in studies.items()
    }
    return build_page(frames)


def show(known: Records, compared: pd.DataFrame) -> Group:
    """What `unitnorm study` prints; arguments as in `build`."""
    if compared.empty:
        return Group(Text("no comparison has runs of both of its arms yet"))
    return Group(Fitting(comparison_cells(known, compared)))


def comparison_cells(known: Records, compared: pd.DataFrame) -> Cells:
    """The comparisons, to be read."""
    plan = plan_of(known)
    rows = [_comparison_row(row) for row in compared.to_dict("records")]
    columns = ["data", "depth", "comparison", "n", "difference", "95 % interval", "p (Holm)"]
    return Cells(plan.question, pd.DataFrame(rows, columns=[*columns, "verdict"]), _note(known))


def summary_cells(plan: Plan, compared: pd.DataFrame) -> Cells:
    """The comparisons of errors at a glance: a row each, a column for each data set and depth."""
    errors = compared[compared["metric"].map(statistics.is_error)]
    places = [(dataset, depth) for dataset in plan.datasets for depth in plan.depths]
    found: dict[str, dict[tuple[str, int], str]] = {}
    for row in errors.to_dict("records"):
        half = (row["ci_high"] - row["ci_low"]) / 2
        text = f"{format_signed(row['difference'], 2)} ± {half:.2f} {row['verdict']}"
        cells = found.setdefault(statistics.name_comparison(row), {})
        cells[row["dataset"], row["depth"]] = "–" if math.isnan(half) else text
    there = [place for place in places if any(place in cells for cells in found.values())]
    rows = [[name, *(cells.get(place, "–") for place in there)] for name, cells in found.items()]
    columns = ["comparison", *(f"{dataset}, depth {depth}" for dataset, depth in there)]
    least, most = errors["n"].min(), errors["n"].max()
    pairs = f"{least}" if least == most else f"{least} to {most}"
    note = (
        f"Test error in percentage points, arm − baseline, ± half of the {100 * (1 - plan.alpha):g}"
        f" % interval, in {pairs} pairs of runs by seed; verdicts by Holm over all; equivalent: "
        f"within ±{plan.margin}."
    )
    return Cells(plan.question, pd.DataFrame(rows, columns=columns), note)


def _comparison_row(row: dict[Any, Any]) -> list[str]:
    left_out = f" (−{row['n_left_out']})" if row["n_left_out"] else ""
    return [
        row["dataset"],
        str(row["depth"]),
        statistics.name_comparison(row),
        f"{row['n']}{left_out}",
        f"{row['difference']:+.3f}",
        f"{row['ci_low']:+.3f} to {row['ci_high']:+.3f}",
        f"{row['p_holm']:.2g}",
        row["verdict"],
    ]


def _note(known: Records) -> str:
    plan, commands = plan_of(known), known.provenance["commands"]
    declared = known.provenance.get("plan_committed") or "not committed"
    first = min((command["started"] for command in commands), default="–")
    return (
        "Difference of the test error in percentage points, arm − baseline, in n pairs by seed "
        "(− those left out, as one of the two diverged); paired t-interval over seeds; p by Holm "
        f"over all rows; equivalent: within ±{plan.margin} points by two one-sided tests. "
        f"Plan committed {declared}, first run {first}."
    )
