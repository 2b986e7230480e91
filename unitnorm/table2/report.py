"""What is shown of Table 2's records: the table, the paired differences, how the runs went.

Pure functions of data frames: `build` gives the content of every file by name and what is printed,
`build_comparison` the same for two folders. To add a file, add it to `build`.
"""

import math
from collections.abc import Mapping
from functools import partial

import numpy as np
import pandas as pd
from rich.console import Group

from unitnorm.errors import UserError
from unitnorm.report import statistics, tables
from unitnorm.report.style import BASELINE, encode, label, sort_updates
from unitnorm.report.tables import Cells, format_columns, format_points, format_short, to_page
from unitnorm.table2 import figures

FAILED_REASONS = ("diverged", "non-finite", "no-rate")

# Badrinarayanan, Mishra and Cipolla (2015), "Understanding symmetries in deep networks", Table 2:
# the test error after the last training epoch, mean and standard deviation over 10 runs on MNIST.
Paper = Mapping[tuple[int, str], tuple[float, float]]  # (depth, update) to mean and std
PAPER: Paper = {
    (2, "b-sgd"): (0.0206, 0.0024),
    (2, "un"): (0.0199, 0.0046),
    (4, "b-sgd"): (0.0204, 0.0027),
    (4, "un"): (0.0179, 0.0025),
}
PAPER_RUNS = 10
KEY = ["depth", "update"]
CELL: dict[str, tuple] = {"depth": (str, "depth"), "update": (label, "update")}
# Runs of one seed have the same start, split and mini-batches where these agree.
PAIRED_BY = {
    "data.sha256", "model.width", "loss.batch_size", "train.train_images", "train.validation_images"
}  # fmt: skip
_spread_of_points = partial(tables.format_spread, form=format_points)
_range_of_points = partial(tables.format_range, form=format_points)


def build(
    runs: pd.DataFrame,
    history: pd.DataFrame,
    sweep: pd.DataFrame,
    filters: Mapping[tuple[int, str], np.ndarray],
    image_shape: tuple[int, ...] = (28, 28),
    paper: Paper = PAPER,
) -> tuple[dict[str, bytes], Group]:
    """Every file of the report by its name, and what `unitnorm report` prints: both tables and the
    failed runs. The same records give the same bytes.

    Args:
        runs, history, sweep: as recorded.
        filters: per (depth, update) the first layer's filters of one run, (filters, features).
        image_shape: rows and columns of an image, and its channels if it has any.
        paper: the figures to set beside ours; `{}` for runs on other data than the paper's.

    Raises:
        UserError: the filters are not images of that shape.
    """
    runs = prepare_runs(runs)
    history = prepare_history(history, runs)
    drawn = {
        "curves": figures.draw_curves(history),
        "learning_rates": figures.draw_rates(history),
        "test_errors": figures.draw_test_errors(runs, paper),
    }
    for depth in sorted({depth for depth, _ in filters}):
        weights = {update: array for (at, update), array in filters.items() if at == depth}
        drawn[f"filters_depth{depth}"] = figures.draw_filters(weights, image_shape, depth)
    files, shown = build_texts(runs, history, sweep, paper)
    for name, figure in drawn.items():
        files |= {f"figures/{name}.{end}": content for end, content in encode(figure).items()}
    return files, shown


def build_texts(
    runs: pd.DataFrame, history: pd.DataFrame, sweep: pd.DataFrame, paper: Paper = PAPER
) -> tuple[dict[str, bytes], Group]:
    """`build` without its figures; runs and history are the prepared ones."""
    errors, differences = summarise_errors(runs, paper), compare_updates(runs)
    main, failed = [_error_cells(errors), _difference_cells(differences)], _failed_cells(runs)
    latex = map(tables.to_latex, main, ("2", "differences"))
    texts = {
        "table2.csv": tables.to_csv(errors),
        "table2.md": to_page([*main, failed]),
        "table2.tex": "\n".join(["% Needs \\usepackage{booktabs}.", *latex]),
        "differences.csv": tables.to_csv(differences),
        "runs.md": to_page([_conduct_cells(runs, history), _sweep_cells(sweep), failed]),
    }
    encoded = {name: text.encode() for name, text in texts.items()}
    return encoded, tables.to_screen([*main, failed])


# ---------------------------------------------------------------- the records


def prepare_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs in the report's order, with a truth value `failed` (left out of every mean).

    A run has failed where it is marked as diverged or stopped for a non-finite or diverged loss.
    """
    failed = runs["diverged"].astype(bool) | runs["stop_reason"].isin(FAILED_REASONS)
    return _sort(runs.assign(failed=failed))


def prepare_history(history: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """The history of the given runs (from `prepare_runs`), in their order, with their `failed`.

    One that found no rate has had no epoch: a row without values stands for it.
    """
    keys = [*KEY, "run"]
    history = runs[[*keys, "failed"]].merge(history, on=keys, how="left")
    return _sort(history.fillna({"epoch": 1}).astype({"epoch": int}))


def _sort(frame: pd.DataFrame) -> pd.DataFrame:
    rank = {update: place for place, update in enumerate(sort_updates(frame["update"]))}
    keys = [key for key in (*KEY, "run", "epoch") if key in frame]
    return frame.sort_values(
        keys, key=lambda c: c.map(rank) if c.name == "update" else c, kind="stable",
        ignore_index=True,
    )  # fmt: skip


# ---------------------------------------------------------------- numbers


def summarise_errors(runs: pd.DataFrame, paper: Paper = PAPER) -> pd.DataFrame:
    """Table 2: the test error of each depth and update of prepared runs, beside the paper's.

    `n` runs are in the mean, `diverged` runs are left out of it; the std has ddof 1, the interval
    is a 95 % t-interval of the mean, cut to 0 to 1. NaN where a figure is not defined (n < 2) or
    the paper has none.
    """
    healthy = runs.assign(value=runs["test_error"].mask(runs["failed"]))
    table = statistics.summarise_groups(healthy, KEY, 1.0)
    table = table.rename(columns={"n_diverged": "diverged"})
    keys = zip(table["depth"], table["update"], strict=True)
    table[["paper_mean", "paper_std"]] = [paper.get(key, (math.nan, math.nan)) for key in keys]
    return table


def compare_updates(runs: pd.DataFrame) -> pd.DataFrame:
    """The difference of the test error, update − baseline, of pairs of prepared runs.

    A row per depth (that has the baseline) and other update: `n` pairs, `left_out` runs without a
    partner (diverged, not trained, or of another seed), then as `statistics.compare_pairs` has it,
    the interval cut to −1 to 1.
    """
    groups, rows = dict(iter(runs.groupby(KEY, sort=False))), []
    for (depth, update), ours in groups.items():
        theirs = groups.get((depth, BASELINE))
        if update != BASELINE and theirs is not None:
            pairs = _pair(ours, theirs)
            left_out = len({*ours["run"], *theirs["run"]}) - len(pairs)
            found, *p = statistics.compare_pairs(*pairs.T)
            rows.append((depth, update, BASELINE, len(pairs), left_out, *found.cut(-1, 1), *p))
    columns = [*KEY, "baseline", "n", "left_out", *statistics.Summary._fields, "p_t", "p_wilcoxon"]
    return pd.DataFrame(rows, columns=columns)


def _pair(ours: pd.DataFrame, theirs: pd.DataFrame) -> np.ndarray:
    """The errors of the runs that both have and that have not failed, shape (pairs, 2)."""
    sides = [side.loc[~side["failed"], ["run", "seed", "test_error"]] for side in (ours, theirs)]
    return sides[0].merge(sides[1], on=["run", "seed"]).iloc[:, 2:].to_numpy(float)


# ---------------------------------------------------------------- tables to be read


def _error_cells(errors: pd.DataFrame) -> Cells:
    shown = {
        **CELL, "n": (str, "n"), "diverged": (str, "diverged"),
        "mean ± std": (tables.format_spread, "mean", "std"),
        "95 % interval": (tables.format_range, "ci_low", "ci_high"),
        "paper": (tables.format_spread, "paper_mean", "paper_std"),
    }  # fmt: skip
    note = (
        "n: runs in the mean, without those that diverged; std with n − 1; t-interval of the mean, "
        f"cut at 0 and 1. Paper: mean ± std over {PAPER_RUNS} runs."
    )
    title = "Test error after the last training epoch (fraction of the test images)"
    return Cells(title, format_columns(errors, shown), note)


def _difference_cells(differences: pd.DataFrame) -> Cells:
    """The differences of one folder, or of two with a column `folder`."""
    shown = {
        "depth": (str, "depth"),
        **({"in": (str, "folder")} if "folder" in differences else {}),
        "difference": (lambda one, other: f"{label(one)} − {label(other)}", "update", "baseline"),
        "n": (str, "n"), "left out": (str, "left_out"),
        "mean ± std": (_spread_of_points, "mean", "std"),
        "95 % interval": (_range_of_points, "ci_low", "ci_high"),
        "p (t)": (tables.format_p, "p_t"), "p (W)": (tables.format_p, "p_wilcoxon"),
    }  # fmt: skip
    note = (
        "n: pairs of runs with the same start, split and order; left out: runs without a partner "
        "(diverged, not trained, or of another seed); t-interval, cut at ±100; p of the paired "
        "t-test (t) and of Wilcoxon's signed-rank test (W), two-sided, of each row alone."
    )
    title = "Paired differences of the test error (percentage points)"
    return Cells(title, format_columns(differences, shown), note)


def _failed_cells(runs: pd.DataFrame) -> Cells:
    """The runs left out of every mean, with the epoch in which each went wrong."""
    shown = {
        **CELL, "run": (str, "run"), "seed": (str, "seed"), "base rate": (format_short, "base_lr"),
        "epoch": (str, "epochs"), "reason": (str, "stop_reason"),
    }  # fmt: skip
    title = "Diverged and non-finite runs, left out of every mean"
    return Cells(title, format_columns(runs[runs["failed"]], shown))


def _conduct_cells(runs: pd.DataFrame, history: pd.DataFrame) -> Cells:
    """How the runs of each depth and update went; the worst |‖w‖ − 1| of any filter and epoch."""

    def count(values: pd.Series) -> str:
        counts = values.value_counts().sort_index()
        return ", ".join(f"{value} ({count})" for value, count in counts.items())

    groups = runs.assign(rate=runs["base_lr"].map(format_short)).groupby(KEY, sort=False)
    table = groups.agg(
        runs=("run", "size"), least=("epochs", "min"), most=("epochs", "max"),
        middle=("epochs", "median"), reasons=("stop_reason", count), rates=("rate", count),
    )  # fmt: skip
    table["worst"] = history.groupby(KEY)["norm_deviation"].max()
    shown = {
        **CELL, "runs": (str, "runs"),
        "epochs (median)": ("{}–{} ({:g})".format, "least", "most", "middle"),
        "stopped by (runs)": (str, "reasons"), "base rate (runs)": (str, "rates"),
        "max |‖w‖ − 1|": (partial(format_short, digits=2), "worst"),
    }  # fmt: skip
    return Cells("How the runs went", format_columns(table.reset_index(), shown))


def _sweep_cells(sweep: pd.DataFrame) -> Cells:
    """The sweep by depth, update and rate, the largest rate first."""
    sweep = sweep.assign(val_error=sweep["val_error"].where(~sweep["diverged"]))
    rates = sweep.sort_values("base_lr", ascending=False, kind="stable")
    table = rates.groupby([*KEY, "base_lr"], sort=False).agg(
        runs=("run", "size"), diverged=("diverged", "sum"), chosen=("chosen", "sum"),
        val_error=("val_error", "mean"),  # of the runs that have not diverged
    )  # fmt: skip
    shown = {
        **CELL, "base rate": (format_short, "base_lr"), "runs": (str, "runs"),
        "diverged": (str, "diverged"),
        "mean validation error": (tables.format_number, "val_error"), "chosen by": (str, "chosen"),
    }  # fmt: skip
    title = "The sweep of the base learning rate"
    return Cells(title, format_columns(_sort(table.reset_index()), shown))


# ---------------------------------------------------------------- two folders of records


def build_comparison(
    runs: tuple[pd.DataFrame, pd.DataFrame],
    provenances: tuple[Mapping, Mapping],
    names: tuple[str, str],
) -> tuple[dict[str, bytes], Group]:
    """What `unitnorm report A B` writes and prints: `comparison.csv`, `.md`, `.png` and `.svg`.

    Args:
        runs, provenances: of each folder, as recorded.
        names: of the two, as they are to be read.

    Raises:
        UserError: the two share no depth and update with runs that have not failed.
    """
    first, second = map(prepare_runs, runs)
    differing = find_differences(*provenances)
    table = compare_folders(first, second, paired=PAIRED_BY.isdisjoint(differing["key"]))
    if table.empty:
        raise UserError(f"{names[0]} and {names[1]} share no depth and update with healthy runs")
    sides = zip("AB", (first, second), strict=True)
    own = _sort(pd.concat([compare_updates(side).assign(folder=name) for name, side in sides]))
    cells = [*_comparison_cells(table, differing, names), _difference_cells(own)]
    encoded = encode(figures.draw_comparison(table, own, names), palette=True)
    files = {f"comparison.{ending}": content for ending, content in encoded.items()}
    files["comparison.csv"] = tables.to_csv(table).encode()
    return files | {"comparison.md": to_page(cells).encode()}, tables.to_screen(cells)


def find_differences(first: Mapping, second: Mapping) -> pd.DataFrame:
    """Where data and config of two provenances differ: columns key, first, second, of text."""
    flat = [
        pd.json_normalize({**about["config"], "data": about["data"]}).iloc[0].map(str)
        for about in (first, second)
    ]
    both = pd.concat(flat, axis=1, keys=["first", "second"]).fillna("–").rename_axis("key")
    return both[both["first"] != both["second"]].reset_index()


def compare_folders(first: pd.DataFrame, second: pd.DataFrame, *, paired: bool) -> pd.DataFrame:
    """The test errors of the prepared runs of two folders, for each depth and update of both.

    After n, mean and std of either comes the difference second − first: `test` is "paired" where
    two pairs or more have not failed in either folder, else "Welch" over all runs; `n` pairs (0 for
    Welch). NaN where a figure is not defined.

    Args:
        paired: whether runs of the same number and seed are pairs, see `PAIRED_BY`.
    """
    healthy = [dict(iter(t[~t["failed"]].groupby(KEY, sort=False))) for t in (first, second)]
    rows = []
    for depth, update in (key for key in healthy[0] if key in healthy[1]):
        one, other = (side[depth, update] for side in healthy)
        own = [statistics.summarise(side["test_error"].to_numpy(float)) for side in (one, other)]
        pairs = _pair(other, one)
        if paired and len(pairs) > 1:
            found, p, _ = statistics.compare_pairs(*pairs.T)
            test = "paired", len(pairs)
        else:
            found, p = statistics.compare_means(own[1], len(other), own[0], len(one))
            test = "Welch", 0
        sides = (len(one), *own[0][:2], len(other), *own[1][:2])
        rows.append((depth, update, *sides, *test, found.mean, *found.cut(-1, 1)[2:], p))
    columns = [f"{name}_{side}" for side in ("first", "second") for name in ("n", "mean", "std")]
    columns += ["test", "n", "difference", "ci_low", "ci_high", "p"]
    return pd.DataFrame(rows, columns=[*KEY, *columns])


def _comparison_cells(
    table: pd.DataFrame, differing: pd.DataFrame, names: tuple[str, str]
) -> tuple[Cells, Cells]:
    """Both folders side by side, and where they differ."""

    def format_percent(mean: float, std: float) -> str:
        return tables.format_spread(100 * mean, 100 * std, partial(tables.format_number, digits=2))

    def format_test(p: float, pairs: int) -> str:
        return f"{'equal' if pairs and math.isnan(p) else tables.format_p(p)} ({pairs or 'W'})"

    shown = {
        **CELL,
        "n A": (str, "n_first"), "A [%]": (format_percent, "mean_first", "std_first"),
        "n B": (str, "n_second"), "B [%]": (format_percent, "mean_second", "std_second"),
        "B − A": (format_points, "difference"),
        "95 % interval": (_range_of_points, "ci_low", "ci_high"), "p": (format_test, "p", "n"),
    }  # fmt: skip
    note = (
        f"A: {names[0]}. B: {names[1]}. Mean ± std of the runs; B − A in percentage points. p of a "
        "two-sided t-test: paired, with the number of pairs, where runs of the same number and "
        "seed share data, start, split and mini-batches, else (W) Welch's of all runs. equal: all "
        "pairs differ by the same."
    )
    main = Cells("Test error of two folders of records", format_columns(table, shown), note)
    rows = {"data or config": (str, "key"), "A": (str, "first"), "B": (str, "second")}
    short = differing.map(lambda text: text if len(text) <= 24 else f"{text[:23]}…")
    return main, Cells("Where the two differ", format_columns(short, rows))
