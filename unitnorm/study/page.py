"""The studies as one page: a single HTML file that needs no network.

The charts are those of `figures`; Vega's own script, the rows and `page.html` around them are
inlined, and the page's content policy forbids it to load anything. Of the runs only the pairs of
the comparisons, the means of the rates and of the budgets are kept, rounded.
"""

import json
import re
from collections.abc import Mapping
from importlib.resources import files

import numpy as np
import pandas as pd
import vl_convert

from unitnorm.errors import UserError
from unitnorm.study import figures
from unitnorm.study.report import Findings, chart_rows, describe_looks
from unitnorm.study.statistics import (
    is_error,
    name_comparison,
    name_place,
    pair_runs,
    rank,
    sides_of,
)

_DIGITS = 5  # significant, of every number of the page
_TITLE = b"<title>unitnorm: the studies</title>"


def is_page(content: bytes) -> bool:
    """Whether a file is such a page, which may be replaced by a newer one."""
    return _TITLE in content[:2000]


def build_page(studies: Mapping[str, Findings]) -> bytes:
    """The page of the studies, by name and in this order; the same ones give the same bytes."""
    if not studies:
        raise UserError("no study to show: run `unitnorm study` first")
    page = files("unitnorm.study").joinpath("page.html").read_text(encoding="utf-8")
    parts = {
        "VEGA": vl_convert.javascript_bundle().replace("</script", "<\\/script"),  # type: ignore[call-arg] # its types lack the default
        "DATA": _script_json({name: _pack(study) for name, study in studies.items()}),
        "CHARTS": _script_json(figures.CHARTS),
        "CONFIG": _script_json(figures.CONFIG),
        "NOTES": _script_json(figures.NOTES),
        "VERDICTS": _script_json(figures.VERDICTS),
    }
    # in one pass: what is filled in may hold anything
    return re.sub(r"/\*\{(\w+)\}\*/", lambda match: parts[match[1]], page).encode()


def _pack(study: Findings) -> dict:
    """A study as plain lists: see `page.html` for what becomes of each."""
    runs, plan, comparisons = study.known["runs"], study.plan, []
    found = list(sides_of(runs, plan.comparisons))
    for row in study.compared.to_dict("records"):
        ours, theirs = next(both for named, *both in found if named.items() <= row.items())
        both = pair_runs(ours, theirs, row["metric"]).reset_index()
        for side, part in (("arm", ours), ("baseline", theirs)):
            both[f"{side}_epochs"] = both["seed"].map(part.set_index("seed")["epochs"])
        comparisons.append(
            {
                **{str(name): _round(value) for name, value in row.items()},
                "title": name_comparison(row),
                "place": name_place(row),
                "looks": describe_looks(row),
                "is_error": is_error(row["metric"]),
                "pairs": _columns(both),
            }
        )
    ranks = rank(runs) if (runs["purpose"] == "compare").any() else pd.DataFrame()
    ranks = ranks.assign(place=[name_place(row) for row in ranks.to_dict("records")])
    updates = dict(zip(runs["arm"], runs["update"], strict=True))
    return {
        "question": plan.question,
        "answer": study.answer,
        "arms": figures.assign_marks(updates),
        "comparisons": comparisons,
        "ranks": _columns(ranks),
        "charts": {name: _columns(rows) for name, rows in chart_rows(study).items()},
        "runs": len(runs),
    }


def _columns(frame: pd.DataFrame) -> dict[str, list]:
    """A frame column by column, which needs half the bytes of rows."""
    return {str(name): [_round(value) for value in frame[name].tolist()] for name in frame.columns}


def _round(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None
    return value


def _script_json(value: object) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
