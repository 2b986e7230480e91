"""What a segmentation's records say, as tables to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from unitnorm.report.statistics import compare_pairs, summarise
from unitnorm.report.style import BASELINE, label, sort_updates
from unitnorm.report.tables import Cells, format_interval, format_p, format_points
from unitnorm.run.records import Records
from unitnorm.segment.metrics import measure
from unitnorm.segment.palette import NAMES
from unitnorm.segment.schema import ALL, CELL, FIGURES

TITLES = dict(zip(FIGURES, ("global accuracy", "class average", "mean IoU"), strict=True))
COLUMNS = (*FIGURES, *NAMES)


def select_best(records: Records, split: str = "test") -> pd.DataFrame:
    """Rows of `metrics` of each complete run's best epoch on val."""
    runs = records["runs"].rename(columns={"best_epoch": "epoch"})[[*CELL, "epoch"]]
    rows = runs.merge(records["metrics"], on=[*CELL, "epoch"])
    return rows[rows["split"] == split]


def list_tables(records: Records, columns: Sequence[str] = COLUMNS) -> list[Cells]:
    """All tables that the records have something for.

    Args:
      columns: which figures of the results.
    """
    tables = []
    about = records.provenance["data"]
    size = f"{about['height']}×{about['width']}"
    note = (
        "mean over the runs, ± their standard deviation (n − 1) where there are several; by class "
        "the IoU. The epoch is that with the highest mean IoU on val."
    )
    splits = {split: select_best(records, split) for split in ("test", "val")}
    for split, best in splits.items():
        if not best.empty:
            title = f"SegNet-Basic on {about['name']}, images of {size}: {split}, %"
            tables.append(Cells(title, _by_update(best, columns), note))
    differences = pd.concat(
        [_differences(best, split) for split, best in splits.items()], ignore_index=True
    )
    if not differences.empty:
        tables.append(
            Cells(
                "Paired differences, percentage points", differences,
                "n: pairs of runs with the same start, order and changes of the images; t-interval "
                "of the mean, p of the paired t-test, two-sided.",
            )
        )  # fmt: skip
    if not records["sweep"].empty:
        tables.append(Cells("Base learning rates, on training images held out, %", _sweep(records)))
    return tables


def _by_update(best: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    rows = []
    names = [ALL, *sorted(set(best["sequence"]) - {ALL})]
    for name in names:
        for update in sort_updates(best["update"]):
            chosen = best[(best["update"] == update) & (best["sequence"] == name)]
            row = {"update": label(update), "images": name, "n": str(len(chosen))}
            for column in columns:
                row[TITLES.get(column, column)] = _percent(chosen[column].to_numpy())
            rows.append(row)
    return pd.DataFrame(rows)


def _differences(best: pd.DataFrame, split: str) -> pd.DataFrame:
    rows = []
    whole = best[best["sequence"] == ALL].set_index("run")
    base = whole[whole["update"] == BASELINE]
    for update in sort_updates(whole["update"]):
        mine = whole[whole["update"] == update]
        common = mine.index.intersection(base.index)
        if update == BASELINE or len(common) < 2:
            continue
        for column in FIGURES:
            pair = (frame.loc[common, column].to_numpy(float) for frame in (mine, base))
            found, p, _ = compare_pairs(*pair)
            rows.append(
                {
                    "difference": f"{label(update)} − {label(BASELINE)}",
                    "on": split,
                    "of": TITLES[column],
                    "n": str(len(common)),
                    "mean": format_points(found.mean),
                    "95 % interval": format_interval(*map(format_points, found[2:])),
                    "p": format_p(p),
                }
            )
    return pd.DataFrame(rows)


def _sweep(records: Records) -> pd.DataFrame:
    table = records["sweep"]
    return pd.DataFrame(
        [
            {
                "update": label(update),
                "rate": f"{row.base_lr:g}",
                "loss": _finite(row.train_loss, 3),
                **{title: _finite(100 * getattr(row, name), 1) for name, title in TITLES.items()},
                "chosen": "yes" if row.chosen else "",
            }
            for update in sort_updates(table["update"])
            for row in table[table["update"] == update].itertuples()
        ]
    )


def tabulate(title: str, matrices: Mapping[str, np.ndarray]) -> Cells:
    """The figures of several confusion matrices beside each other, a figure per line."""
    shown: dict[str, list[str]] = {"%": [*TITLES.values(), *(f"IoU {name}" for name in NAMES)]}
    for name, found in ((name, measure(matrix)) for name, matrix in matrices.items()):
        shown[name] = [_finite(100 * value, 1) for value in (*found[:3], *found.iou)]
    return Cells(title, pd.DataFrame(shown))


def _percent(values: np.ndarray) -> str:
    found = summarise(100 * values[np.isfinite(values)])
    return _finite(found.mean, 1) + (f" ± {found.std:.1f}" if np.isfinite(found.std) else "")


def _finite(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if np.isfinite(value) else "–"
