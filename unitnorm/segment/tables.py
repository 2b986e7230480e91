"""What a segmentation's records say, as tables to be read."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from unitnorm.report.statistics import compare_pairs, summarise
from unitnorm.report.style import BASELINE, label, sort_updates
from unitnorm.report.tables import Cells, format_number, format_p, format_points, format_range
from unitnorm.run.records import Records
from unitnorm.segment.evaluation import measure
from unitnorm.segment.schema import ALL, CELL, COLUMNS, FIGURES

TITLES = dict(zip(FIGURES, ("global accuracy", "class average", "mean IoU"), strict=True))
NOTE = (
    "mean over the runs, ± their standard deviation (n − 1) where there are several; by class the "
    "IoU. The epoch is that with the highest mean IoU on val."
)
PAIRED = (
    "n: pairs of runs with the same start, order and changes of the images; t-interval of the "
    "mean, p of the paired t-test, two-sided."
)


def select_best(records: Records, split: str = "test") -> pd.DataFrame:
    """Rows of `metrics` of each complete run's best epoch on val."""
    runs = records["runs"].rename(columns={"best_epoch": "epoch"})[[*CELL, "epoch"]]
    rows = runs.merge(records["metrics"], on=[*CELL, "epoch"])
    return rows[rows["split"] == split]


def list_tables(records: Records, columns: Sequence[str] = COLUMNS) -> list[Cells]:
    """All tables that the records have something for, with these figures of the results."""
    about = records.provenance["data"]
    where = f"SegNet-Basic on {about['name']}, images of {about['height']}×{about['width']}"
    best = {split: select_best(records, split) for split in ("test", "val")}
    differences = pd.DataFrame([row for split in best for row in _compare(best[split], split)])
    tables = [
        *(Cells(f"{where}: {s}, %", _results(rows, columns), NOTE) for s, rows in best.items()),
        Cells("Paired differences, percentage points", differences, PAIRED),
        Cells("Base learning rates, on training images held out, %", _sweep(records["sweep"])),
    ]
    return [cells for cells in tables if len(cells.frame)]


def tabulate(title: str, matrices: Mapping[str, np.ndarray]) -> Cells:
    """The figures of several confusion matrices beside each other, a figure per line."""
    titles = [TITLES.get(column, f"IoU {column}") for column in COLUMNS]
    shown = {name: map(_percent, measure(matrix).values()) for name, matrix in matrices.items()}
    return Cells(title, pd.DataFrame({"%": titles} | shown))


def _results(best: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    rows = []
    for sequence in sorted(set(best["sequence"]), key=lambda name: (name != ALL, name)):
        for update in sort_updates(best["update"]):
            chosen = best[(best["update"] == update) & (best["sequence"] == sequence)]
            row = {"update": label(update), "images": sequence, "n": str(len(chosen))}
            for column in columns:
                found = summarise(100 * chosen[column].dropna().to_numpy())
                spread = f" ± {found.std:.1f}" if np.isfinite(found.std) else ""
                row[TITLES.get(column, column)] = format_number(found.mean, 1) + spread
            rows.append(row)
    return pd.DataFrame(rows)


def _compare(best: pd.DataFrame, split: str) -> Iterator[dict[str, str]]:
    """What each update's runs on a split differ by from the baseline's."""
    whole = best[best["sequence"] == ALL]
    others = sort_updates({*best["update"]} - {BASELINE})
    for update, column in itertools.product(others, FIGURES):
        table = whole.pivot(index="run", columns="update", values=column)
        pairs = table.reindex(columns=[update, BASELINE]).dropna().to_numpy()
        if len(pairs) >= 2:
            found, p, _ = compare_pairs(*pairs.T)
            yield {
                "difference": f"{label(update)} − {label(BASELINE)}", "on": split,
                "of": TITLES[column], "n": str(len(pairs)), "mean": format_points(found.mean),
                "95 % interval": format_range(*found[2:], format_points),
                "p": format_p(p),
            }  # fmt: skip


def _sweep(table: pd.DataFrame) -> pd.DataFrame:
    rows = table.to_dict("records")
    return pd.DataFrame(
        {"update": label(update), "rate": f"{row['base_lr']:g}",
         "loss": format_number(row["train_loss"], 3),
         **{title: _percent(row[name]) for name, title in TITLES.items()},
         "chosen": "yes" if row["chosen"] else ""}
        for update in sort_updates(table["update"])
        for row in rows if row["update"] == update
    )  # fmt: skip


def _percent(value: float) -> str:
    return format_number(100 * value, 1)
