"""What a segmentation's records say, as tables to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from unitnorm.report.statistics import compare_pairs, summarise
from unitnorm.report.style import BASELINE, label, sort_updates
from unitnorm.report.tables import Cells, format_interval, format_p, format_points
from unitnorm.run.records import Records
from unitnorm.segment.metrics import measure
from unitnorm.segment.palette import NAMES
from unitnorm.segment.schema import ALL, CELL, COLUMNS, FIGURES

TITLES = dict(zip(FIGURES, ("global accuracy", "class average", "mean IoU"), strict=True))


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
    about = records.provenance["data"]
    where = f"SegNet-Basic on {about['name']}, images of {about['height']}×{about['width']}"
    note = (
        "mean over the runs, ± their standard deviation (n − 1) where there are several; by class "
        "the IoU. The epoch is that with the highest mean IoU on val."
    )
    paired = (
        "n: pairs of runs with the same start, order and changes of the images; t-interval of the "
        "mean, p of the paired t-test, two-sided."
    )
    splits = {split: select_best(records, split) for split in ("test", "val")}
    differences = pd.concat([_differences(best, split) for split, best in splits.items()])
    tables = [
        *(
            Cells(f"{where}: {split}, %", _results(splits[split], columns), note)
            for split in splits
        ),
        Cells("Paired differences, percentage points", differences, paired),
        Cells("Base learning rates, on training images held out, %", _sweep(records["sweep"])),
    ]
    return [cells for cells in tables if len(cells.frame)]


def tabulate(title: str, matrices: Mapping[str, np.ndarray]) -> Cells:
    """The figures of several confusion matrices beside each other, a figure per line."""
    shown: dict[str, list[str]] = {"%": [*TITLES.values(), *(f"IoU {name}" for name in NAMES)]}
    for name, found in ((name, measure(matrix)) for name, matrix in matrices.items()):
        shown[name] = [_finite(100 * value, 1) for value in (*found[:3], *found.iou)]
    return Cells(title, pd.DataFrame(shown))


def _results(best: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    rows = []
    for sequence in sorted(set(best["sequence"]), key=lambda name: (name != ALL, name)):
        for update in sort_updates(best["update"]):
            chosen = best[(best["update"] == update) & (best["sequence"] == sequence)]
            figures = {TITLES.get(c, c): _percent(chosen[c].to_numpy()) for c in columns}
            row = {"update": label(update), "images": sequence, "n": str(len(chosen))}
            rows.append(row | figures)
    return pd.DataFrame(rows)


def _differences(best: pd.DataFrame, split: str) -> pd.DataFrame:
    rows = []
    whole = best[best["sequence"] == ALL].pivot(index="run", columns="update", values=list(FIGURES))
    first, *others = sort_updates(best["update"]) or [""]
    for update in others if first == BASELINE else ():
        for column in FIGURES:
            pairs = whole[column][[update, BASELINE]].dropna().to_numpy()
            if len(pairs) < 2:
                continue
            found, p, _ = compare_pairs(*pairs.T)
            rows.append(
                {
                    "difference": f"{label(update)} − {label(BASELINE)}", "on": split,
                    "of": TITLES[column], "n": str(len(pairs)), "mean": format_points(found.mean),
                    "95 % interval": format_interval(*map(format_points, found[2:])),
                    "p": format_p(p),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def _sweep(table: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {"update": label(row["update"]), "rate": f"{row['base_lr']:g}",
         "loss": _finite(row["train_loss"], 3),
         **{title: _finite(100 * row[name], 1) for name, title in TITLES.items()},
         "chosen": "yes" if row["chosen"] else ""}
        for update in sort_updates(table["update"])
        for row in table[table["update"] == update].to_dict("records")
    )  # fmt: skip


def _percent(values: np.ndarray) -> str:
    found = summarise(100 * values[np.isfinite(values)])
    return _finite(found.mean, 1) + (f" ± {found.std:.1f}" if np.isfinite(found.std) else "")


def _finite(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if np.isfinite(value) else "–"
