"""What a study's records show: comparisons, rates, ranks and figures, from the runs alone."""

import math
import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from rich.text import Text

from unitnorm.errors import UserError
from unitnorm.report.tables import (
    Cells,
    Fitting,
    format_p,
    format_range,
    format_signed,
    to_csv,
    to_markdown,
)
from unitnorm.run.records import Records
from unitnorm.study import figures, statistics
from unitnorm.study.config import Plan
from unitnorm.study.experiment import plan_of

LOOKS = "looks.csv"  # of a results folder: kept from report to report
_signed = partial(format_signed, digits=3)


class Findings(NamedTuple):
    """Records with what they show so far."""

    known: Records
    plan: Plan
    compared: pd.DataFrame  # see `statistics.with_looks`
    looks: pd.DataFrame  # see `statistics.add_looks`
    answer: str = ""  # in a sentence, see `read_answer`


def look(folder: Path, known: Records) -> Findings:
    """Compare what a folder's records hold, as the next look after those that it keeps."""
    plan = plan_of(known)
    compared = statistics.compare(known["runs"], plan.comparisons, plan.margin, plan.alpha)
    path, before = folder / LOOKS, None
    if path.exists():
        texts = dict.fromkeys(("dataset", "network", "comparison", "level", "metric"), str)
        try:
            before = pd.read_csv(path, dtype=texts, keep_default_na=False)[list(statistics.LOOKS)]
        except (ValueError, KeyError):
            raise UserError(f"{path}: damaged; restore it from a copy") from None
    ends = [
        datetime.fromisoformat(command["started"]) + timedelta(seconds=round(command["wall_s"]))
        for command in known.provenance["commands"]
    ]
    looks = statistics.add_looks(before, compared, max(ends).isoformat())
    compared = statistics.with_looks(compared, looks)
    return Findings(known, plan, compared, looks, read_answer(folder))


def read_answer(folder: Path) -> str:
    """What a folder's README says "**In short:**", up to the next empty line, as plain text."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = re.search(r"\*\*In short:\*\* (.+?)(?:\n\n|\Z)", text, re.DOTALL)
    plain = re.sub(r"<!--.*?-->|\]\([^)]*\)|[*`\[]", "", found[1]) if found else ""
    return " ".join(plain.split())


def build(study: Findings) -> dict[str, bytes]:
    """Every file of a study's report: the same study gives the same bytes."""
    runs, texts = study.known["runs"], {}
    tables: dict[str, pd.DataFrame] = {}
    if len(study.compared):
        tables |= {"comparisons": study.compared, "looks": study.looks}
        texts["comparisons"] = comparison_cells(study)
        texts["summary"] = summary_cells(study.plan, study.compared)
    if (runs["purpose"] == "compare").any():
        tables["ranking"] = statistics.rank(runs)
    if (runs["purpose"] == "tune").any():
        chosen = statistics.choose_rates(runs)
        tables |= {"rates": statistics.rate_means(runs), "chosen_rates": chosen}
        texts["chosen_rates"] = rate_cells(chosen)
    files = {f"{name}.csv": to_csv(table).encode() for name, table in tables.items()}
    files |= {f"{name}.md": to_markdown(cells).encode() + b"\n" for name, cells in texts.items()}
    for name, rows in chart_rows(study).items():
        drawn = figures.draw(name, rows)
        name = "comparisons" if name == "forest" else name
        files |= {f"figures/{name}.{ending}": content for ending, content in drawn.items()}
    return files


def chart_rows(study: Findings) -> dict[str, pd.DataFrame]:
    """What each chart draws, by its name; without those that have nothing to draw."""
    known, plan, compared = study.known, study.plan, study.compared
    runs, rows = known["runs"], {"forest": figures.forest_rows(compared, plan.margin)}
    tuning = runs[runs["purpose"] == "tune"]
    if (tuning.groupby("arm")["filters_rate"].nunique() > 2).any():  # two points are no curve
        rows["rates"] = figures.rate_rows(runs)
        epochs = {name: plan.config_of(name).train.max_epochs for name in plan.arms}
        rows["effective_rates"] = figures.effective_rows(runs, epochs)
    if (runs["purpose"] == "compare").any():
        rows["budgets"] = figures.budget_rows(runs)
        unequal = runs[runs["start"] != "norms"]  # where all lengths are alike, nothing is spread
        if (unequal["spread"] > 0).any():
            rows["spreads"] = figures.spread_rows(unequal)
    return {name: table for name, table in rows.items() if len(table)}


def build_late_rates(studies: Mapping[str, Findings]) -> dict[str, bytes]:
    """The figure of all studies together: see `figures.late_rate_rows`; {} without such arms."""
    tables = {name: statistics.late_rates(study.known["runs"]) for name, study in studies.items()}
    tables = {name: table for name, table in tables.items() if len(table)}
    drawn = figures.draw("late_rates", figures.late_rate_rows(tables)) if tables else {}
    return {f"late_rates.{ending}": content for ending, content in drawn.items()}


def show(study: Findings) -> Text | Fitting:
    """What `unitnorm study` prints."""
    if study.compared.empty:
        return Text("no comparison has runs of both of its arms yet")
    return Fitting(comparison_cells(study))


def comparison_cells(study: Findings) -> Cells:
    """The comparisons, to be read."""
    known, plan, compared = study.known, study.plan, study.compared
    rows = [
        {
            "data": statistics.name_place(row),
            "comparison": statistics.name_comparison(row),
            "n": f"{row['n']}" + (f" (−{row['n_left_out']})" if row["n_left_out"] else ""),
            "difference": _signed(row["difference"]),
            "95 % interval": format_range(row["ci_low"], row["ci_high"], _signed),
            "p (Holm)": format_p(row["p_holm"]),
            "verdict": row["verdict"],
            "looks": describe_looks(row),
        }
        for row in compared.to_dict("records")
    ]
    declared = known.provenance.get("plan_committed") or "not committed"
    committed = "" if declared.startswith("not committed") else "committed "
    first = min(command["started"] for command in known.provenance["commands"])
    note = (
        "Difference of the test error in percentage points, arm − baseline, in n pairs by seed "
        "(− those left out, as one of the two diverged); paired t-interval over seeds; p by Holm "
        f"over all rows; equivalent: within ±{plan.margin} points by two one-sided tests. "
        f"Plan {committed}{declared}, first run {first}."
    )
    frame = pd.DataFrame(rows)
    if frame["looks"].any():
        note += (
            " Looks: seeds were added when a verdict on fewer was known; the interval given there "
            "is valid all the same, whenever one stops (level α/(k(k + 1)) at look k)."
        )
    else:
        frame = frame.drop(columns="looks")
    return Cells(plan.question, frame, note)


def describe_looks(row: Mapping[Any, Any]) -> str:
    """`extended after a look at n = 2: −0.100 to +0.300`; nothing where none was taken before."""
    if not row["looks_before"]:
        return ""
    looks = "looks" if "," in row["looks_before"] else "a look"
    interval = format_range(row["ci_looks_low"], row["ci_looks_high"], _signed)
    return f"extended after {looks} at n = {row['looks_before']}: {interval}"


def summary_cells(plan: Plan, compared: pd.DataFrame) -> Cells:
    """The comparisons of errors at a glance: a row each, a column for each data set and network."""
    errors = compared[compared["metric"].map(statistics.is_error).astype(bool)]
    found: dict[str, dict[str, str]] = {}
    for row in errors.to_dict("records"):
        half = (row["ci_high"] - row["ci_low"]) / 2
        text = f"{format_signed(row['difference'], 2)} ± {half:.2f} {row['verdict']}"
        cells = found.setdefault(statistics.name_comparison(row), {})
        cells[statistics.name_place(row)] = "–" if math.isnan(half) else text
    names = [statistics.name_place(place._asdict()) for place in plan.places()]
    there = [name for name in names if any(name in cells for cells in found.values())]
    rows = [[name, *(cells.get(place, "–") for place in there)] for name, cells in found.items()]
    low, high = errors["n"].min(), errors["n"].max()
    count = f"{low}" if low == high else f"{low} to {high}"
    note = (
        f"Test error in percentage points, arm − baseline, ± half of the 95 % "
        f"interval, in {count} pairs of runs by seed; verdicts by Holm over all; "
        f"equivalent: within ±{plan.margin}."
    )
    looked = sorted({int(n) for text in errors["looks_before"] for n in text.split(", ") if n})
    if looked:
        note += f" Extended after looks at n = {', '.join(map(str, looked))}."
    return Cells(plan.question, pd.DataFrame(rows, columns=["comparison", *there]), note)


def rate_cells(chosen: pd.DataFrame) -> Cells:
    """The rates that tuning chose, and how firmly."""
    rows = [
        {
            "data": statistics.name_place(row),
            "arm": row["arm"],
            **{name.replace("_", " "): f"{row[name]:g}" for name in statistics.RATES},
            "validation error [%]": f"{row['val_error']:.2f}",
            "at the grid's edge": "edge" if row["is_at_edge"] else "",
            "seeds agreeing": f"{row['n_agreeing']} of {row['n']}",
        }
        for row in chosen.to_dict("records")
    ]
    frame = pd.DataFrame(rows)
    alike = int((chosen["n_agreeing"] == chosen["n"]).sum())
    note = (
        f"{int(chosen['is_at_edge'].sum())} of {len(chosen)} lie at an edge of their grid, where "
        f"better ones may be beyond; in {alike} each tuning seed alone would have chosen the same."
    )
    frame = frame if (chosen["decay"] > 0).any() else frame.drop(columns="decay")
    return Cells("The rates that tuning chose", frame, note)
