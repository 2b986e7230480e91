"""What is shown of Table 2's records: the table, the paired differences, how the runs went.

Pure functions of data frames: `build` gives the content of every file by name, `show` what is
printed, and the caller writes. `build_comparison` sets two folders of records side by side. To add
a file to the report, add it to `build`; the figures are in `figures`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import pandas as pd
from rich.console import Group, RenderableType
from rich.text import Text

from unitnorm.errors import UserError
from unitnorm.report.statistics import Summary, compare_means, compare_pairs, summarise
from unitnorm.report.style import BASELINE, encode, label, sort_updates
from unitnorm.report.tables import (
    Cells,
    Fitting,
    format_interval,
    format_number,
    format_p,
    format_points,
    format_signed,
    format_spread,
    to_csv,
    to_latex,
    to_markdown,
)
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


def build(
    runs: pd.DataFrame,
    history: pd.DataFrame,
    sweep: pd.DataFrame,
    filters: Mapping[tuple[int, str], np.ndarray],
    image_shape: tuple[int, int] = (28, 28),
    paper: Paper = PAPER,
) -> dict[str, bytes]:
    """Every file of the report: the same records give the same bytes.

    Args:
        runs: one row per run, as recorded.
        history: one row per run and epoch.
        sweep: one row per run and candidate rate.
        filters: per (depth, update) the first layer's filters of one run, shape
            (filters, features); a depth without any has no figure of them.
        image_shape: rows and columns of an image; their product is the number of features.
        paper: (depth, update) to the mean and std to set beside ours; `{}` for runs on other data
            than the paper's.

    Returns:
        Content by file name, relative to the results folder: `table2.csv`, `.md` and `.tex`,
        `differences.csv`, `runs.md`, and `figures/NAME.png` and `.svg`.

    Raises:
        UserError: the records contradict each other, or the filters are not images of that shape.
    """
    runs = prepare_runs(runs)
    history = prepare_history(history, runs)
    texts = build_texts(runs, history, _sort(sweep), paper)
    drawn = {
        "curves": figures.draw_curves(history),
        "learning_rates": figures.draw_rates(history),
        "test_errors": figures.draw_test_errors(runs, paper),
    }
    for depth in sorted({depth for depth, _ in filters}):
        weights = {update: array for (at, update), array in filters.items() if at == depth}
        drawn[f"filters_depth{depth}"] = figures.draw_filters(weights, image_shape, depth)
    files = {name: text.encode() for name, text in texts.items()}
    for name, figure in drawn.items():
        encoded = encode(figure)
        files |= {f"figures/{name}.{ending}": content for ending, content in encoded.items()}
    return files


def build_texts(
    runs: pd.DataFrame, history: pd.DataFrame, sweep: pd.DataFrame, paper: Paper = PAPER
) -> dict[str, str]:
    """The tables among the files of `build`.

    Args:
        runs, history: from `prepare_runs` and `prepare_history`.
        sweep, paper: as in `build`.
    """
    table, differences = summarise_errors(runs, paper), compare_updates(runs)
    failed = _failed_cells(runs)
    main = [_table2_cells(table), *_difference_cells(differences)]
    remarks = "\n".join(f"- {line}" for line in remark(table, differences))
    went = [_conduct_cells(runs, history), _sweep_cells(summarise_sweep(sweep))]
    latex = [to_latex(cells, name) for cells, name in zip(main, ("2", "differences"), strict=False)]
    return {
        "table2.csv": to_csv(table),
        "table2.md": _join([*map(to_markdown, main), remarks, *map(to_markdown, failed)]),
        "table2.tex": "\n".join(["% Needs \\usepackage{booktabs}.", *latex]),
        "differences.csv": to_csv(differences),
        "runs.md": _join([
            *map(to_markdown, [*went, *failed]), *([] if failed else ["No run has failed."])
        ]),
    }  # fmt: skip


def show(runs: pd.DataFrame, paper: Paper = PAPER) -> Group:
    """All that `unitnorm report` prints: both tables, the remarks, and the failed runs."""
    runs = prepare_runs(runs)
    table, differences = summarise_errors(runs, paper), compare_updates(runs)
    tables = [_table2_cells(table), *_difference_cells(differences)]
    remarks = Text("\n".join(remark(table, differences)))
    return Group(*_spaced([*map(Fitting, tables), remarks, *map(Fitting, _failed_cells(runs))]))


# ---------------------------------------------------------------- two folders of records


def build_comparison(
    first: pd.DataFrame, second: pd.DataFrame, names: tuple[str, str]
) -> tuple[dict[str, bytes], Group]:
    """What `unitnorm report A B` writes and prints: `comparison.csv`, `.md`, `.png` and `.svg`.

    Args:
        first, second: the runs of each folder, as recorded.
        names: of the two, as they are to be read.

    Raises:
        UserError: the records contradict themselves, or share no depth and update.
    """
    both = [prepare_runs(runs) for runs in (first, second)]
    table = compare_folders(*both)
    if table.empty:
        raise UserError(f"{names[0]} and {names[1]} share no depth and update with healthy runs")
    parts = [
        compare_updates(runs).assign(folder=name) for name, runs in zip(names, both, strict=True)
    ]
    own = pd.concat([part for part in parts if len(part)] or parts[:1])
    own = own.sort_values(["depth", "update"], kind="stable", ignore_index=True)
    tables = _comparison_cells(table, own, names)
    encoded = encode(figures.draw_comparison(table, own, names), palette=True)
    files = {
        "comparison.csv": to_csv(table).encode(),
        "comparison.md": _join(map(to_markdown, tables)).encode(),
        **{f"comparison.{ending}": content for ending, content in encoded.items()},
    }
    return files, Group(*_spaced(map(Fitting, tables)))


def compare_folders(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """The test errors of two folders, for each depth and update that both have.

    Args:
        first, second: from `prepare_runs`.

    Returns:
        Columns depth, update; `n_first`, `mean_first`, `std_first` and the same of the second;
        then the difference second − first: `test`, "paired" where two or more runs of the same
        number and seed have not failed in either folder, else "Welch" over all runs; `n` pairs
        (0 for Welch), `difference`, `ci_low`, `ci_high`, `p` (t-test, two-sided). NaN where a
        figure is not defined.
    """
    healthy = [dict(_each_update(runs[~runs["failed"]])) for runs in (first, second)]
    rows = []
    for depth, update in (key for key in healthy[0] if key in healthy[1]):
        one, other = (side[depth, update] for side in healthy)
        own = [summarise(side["test_error"].to_numpy(float)) for side in (one, other)]
        pairs = _pair(other, one)
        if len(pairs) > 1:
            found, p, _ = compare_pairs(*_columns(pairs))
            test, n = "paired", len(pairs)
        else:
            found, p = compare_means(own[1], len(other), own[0], len(one))
            test, n = "Welch", 0
        sides = (len(one), *own[0][:2], len(other), *own[1][:2])
        rows.append((depth, update, *sides, test, n, found.mean, *found[2:], p))
    sides_ = [f"{name}_{side}" for side in ("first", "second") for name in ("n", "mean", "std")]
    columns = ["depth", "update", *sides_, "test", "n", "difference", "ci_low", "ci_high", "p"]
    return pd.DataFrame(rows, columns=columns)


def _comparison_cells(
    table: pd.DataFrame, own: pd.DataFrame, names: tuple[str, str]
) -> list[Cells]:
    """Both folders side by side; their difference; what the updates differ by in each."""
    first, second = names
    cells: dict[str, Any] = {
        "depth": table["depth"].map(str),
        "update": table["update"].map(label),
    }
    for side, name in zip(("first", "second"), "AB", strict=True):
        cells[f"n {name}"] = table[f"n_{side}"].map(str)
        cells[f"{name} [%]"] = _zip(_spread_percent, table[f"mean_{side}"], table[f"std_{side}"])
    cells["B − A"] = table["difference"].map(format_points)
    cells["95 % interval"] = _intervals(table)
    cells["p"] = _zip(
        lambda p, n: f"{'equal' if n and math.isnan(p) else format_p(p)} ({n or 'W'})",
        table["p"], table["n"],
    )  # fmt: skip
    note = (
        f"A: {first}. B: {second}. Mean ± std of the runs; B − A in percentage points. p of a "
        "two-sided t-test: paired, with the number of pairs, where runs of the same number and "
        "seed are in both, else (W) Welch's of all runs. equal: all pairs differ by the same."
    )
    shown = [Cells("Test error of two folders of records", pd.DataFrame(cells), note)]
    if len(own):
        (difference,) = _difference_cells(own)
        frame = difference.frame
        frame.insert(2, "in", own["folder"].map({first: "A", second: "B"}))
        shown.append(Cells(f"{difference.title}, in each", frame, difference.note))
    return shown


# ---------------------------------------------------------------- the records


def prepare_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs in the report's order, with a truth value `failed` (left out of every mean).

    A run has failed where it is marked as diverged or stopped for a non-finite or diverged loss.

    Raises:
        UserError: there are none, or a run that has not failed has an error outside 0 to 1.
    """
    if runs.empty:
        raise UserError("runs.csv holds no rows; run `unitnorm train` before `unitnorm report`")
    failed = runs["diverged"].astype(bool) | runs["stop_reason"].isin(FAILED_REASONS)
    runs = _sort(runs.assign(failed=failed))
    for column in ("val_error", "test_error"):
        wrong = runs[~runs["failed"] & ~runs[column].between(0, 1)]
        if len(wrong):
            row = wrong.iloc[0]
            raise UserError(
                f"runs.csv: {column} of depth {row['depth']}, {row['update']}, run {row['run']} is "
                f"{row[column]:g}; expected a fraction from 0 to 1 for a run that has not "
                "diverged; train this run again"
            )
    return runs


def prepare_history(history: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """The history of the given runs (from `prepare_runs`), in their order, with their `failed`.

    Raises:
        UserError: a run has no history or a gap in it, or a value to be drawn of a run that has
            not failed is not finite.
    """
    keys = ["depth", "update", "run"]
    history = runs[[*keys, "failed"]].merge(history, on=keys, how="left")
    epochs = history.groupby(keys, sort=False)["epoch"].agg(["min", "max", "count"]).reset_index()
    gaps = epochs[(epochs["min"] != 1) | (epochs["max"] != epochs["count"])]
    if len(gaps):
        row = gaps.iloc[0]
        found = f"{row['count']} epochs, the last {row['max']:g}" if row["count"] else "none"
        raise UserError(
            f"history.csv: depth {row['depth']}, {row['update']}, run {row['run']} needs a row for "
            f"each epoch from 1, found {found}; restore the records or train again"
        )
    finite = np.isfinite(history[["lr", "train_loss", "val_error"]].to_numpy(float)).all(axis=1)
    wrong = history[~history["failed"] & ~finite]
    if len(wrong):
        row = wrong.iloc[0]
        raise UserError(
            f"history.csv: depth {row['depth']}, {row['update']}, run {row['run']}, epoch "
            f"{row['epoch']:g} holds a value that is not finite, but runs.csv does not call the "
            "run diverged; restore the records or train again"
        )
    return _sort(history.astype({"epoch": int}))


def _sort(frame: pd.DataFrame) -> pd.DataFrame:
    rank = {update: place for place, update in enumerate(sort_updates(frame["update"]))}
    keys = [key for key in ("depth", "update", "run", "epoch") if key in frame]
    return frame.sort_values(
        keys, key=lambda c: c.map(rank) if c.name == "update" else c, kind="stable",
        ignore_index=True,
    )  # fmt: skip


def _each_update(frame: pd.DataFrame) -> Iterator[tuple[tuple[int, str], pd.DataFrame]]:
    """(Depth, update) and their rows, in the order of the frame."""
    for key, rows in frame.groupby(["depth", "update"], sort=False):
        yield cast(tuple[int, str], key), rows


# ---------------------------------------------------------------- numbers


def summarise_errors(runs: pd.DataFrame, paper: Paper = PAPER) -> pd.DataFrame:
    """Table 2: the test error of each depth and update, beside the paper's.

    Args:
        runs: from `prepare_runs`.
        paper: the figures to set beside ours; `{}` for runs on other data than the paper's.

    Returns:
        Columns depth, update, n, diverged, mean, std, ci_low, ci_high, paper_mean, paper_std: `n`
        runs are in the mean, `diverged` runs are left out of it; the std has ddof 1, the interval
        is a 95 % t-interval of the mean. NaN where a figure is not defined (n < 2) or the paper
        has none.
    """
    rows = []
    for key, group in _each_update(runs):
        errors = group.loc[~group["failed"], "test_error"].to_numpy(float)
        theirs = paper.get(key, (math.nan, math.nan))
        rows.append((*key, len(errors), int(group["failed"].sum()), *summarise(errors), *theirs))
    columns = ["depth", "update", "n", "diverged", *Summary._fields, "paper_mean", "paper_std"]
    return pd.DataFrame(rows, columns=columns)


def compare_updates(runs: pd.DataFrame, baseline: str = BASELINE) -> pd.DataFrame:
    """The difference of the test error, update − baseline, run by run.

    Args:
        runs: from `prepare_runs`.
        baseline: the update that all others of the same depth are compared with.

    Returns:
        Columns depth, update, baseline, n, left_out, mean, std, ci_low, ci_high, p_t, p_wilcoxon;
        a row per depth (that has the baseline) and other update: `n` pairs, `left_out` runs
        without a partner (diverged, not trained, or of another seed), then as
        `statistics.compare_pairs` has it.
    """
    groups = dict(_each_update(runs))
    rows = []
    for (depth, update), ours in groups.items():
        theirs = groups.get((depth, baseline))
        if update == baseline or theirs is None:
            continue
        pairs = _pair(ours, theirs)
        left_out = len({*ours["run"], *theirs["run"]}) - len(pairs)
        summary, *p = compare_pairs(*_columns(pairs))
        rows.append((depth, update, baseline, len(pairs), left_out, *summary, *p))
    keys = ["depth", "update", "baseline", "n", "left_out"]
    return pd.DataFrame(rows, columns=[*keys, *Summary._fields, "p_t", "p_wilcoxon"])


def _pair(ours: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame:
    """The runs that both have and that have not failed: run, seed, error_ours, error_theirs.

    Runs of one number and seed began at the same point and saw the same split and order.
    """
    sides = [side.loc[~side["failed"], ["run", "seed", "test_error"]] for side in (ours, theirs)]
    return sides[0].merge(sides[1], on=["run", "seed"], suffixes=("_ours", "_theirs"))


def _columns(pairs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    return pairs["test_error_ours"].to_numpy(float), pairs["test_error_theirs"].to_numpy(float)


def summarise_sweep(sweep: pd.DataFrame) -> pd.DataFrame:
    """The sweep by depth, update and rate, the largest rate first.

    Returns:
        Columns depth, update, base_lr, runs, diverged, val_error (mean of the runs that have not
        diverged, NaN where all have), chosen (number of runs that chose this rate).
    """
    sweep = sweep.assign(val_error=sweep["val_error"].where(~sweep["diverged"]))
    sweep = sweep.sort_values("base_lr", ascending=False, kind="stable")
    keys = ["depth", "update", "base_lr"]
    table = sweep.groupby(keys, sort=False).agg(
        runs=("run", "size"),
        diverged=("diverged", "sum"),
        val_error=("val_error", "mean"),
        chosen=("chosen", "sum"),
    )
    return _sort(table.reset_index())


# ---------------------------------------------------------------- words


def remark(table: pd.DataFrame, differences: pd.DataFrame) -> list[str]:
    """What the table and the differences show, a sentence each, with n, interval and p."""
    lines = [_state(row) for row in differences.to_dict("records")]
    lines = lines or ["No depth has runs of the baseline and of another update to compare."]
    known = table[table["paper_mean"].notna()]
    if known.empty:
        return [*lines, "Not set beside the paper: other cells, another protocol or other data."]
    away = (known["mean"] - known["paper_mean"]) / known["paper_std"]
    outside = [
        f"depth {depth}, {label(update)} ({format_signed(far, 1)} std)"
        for depth, update, far in zip(known["depth"], known["update"], away, strict=True)
        if abs(far) > 1
    ]
    lines.append(
        f"{(away.abs() <= 1).sum()} of {len(known)} means lie within the paper's standard "
        f"deviation of its mean{'; not ' if outside else ''}{', '.join(outside)}."
    )
    return [*lines, *_judge_paper(known)]


def _state(row: dict) -> str:
    """One difference: which update has the lower error, as far as the interval says."""
    ours, theirs = label(row["update"]), label(row["baseline"])
    left_out = f", {row['left_out']} left out" if row["left_out"] else ""
    count = f"n = {row['n']} pair{'' if row['n'] == 1 else 's'}{left_out}"
    start = f"Depth {row['depth']}: {ours} − {theirs} = {format_points(row['mean'])} points"
    if math.isnan(row["p_t"]):
        return f"{start} ({count}); too few pairs or no spread to test."
    interval = f"{format_points(row['ci_low'])} to {format_points(row['ci_high'])}"
    p = format_p(row["p_t"])
    lower = ours if row["mean"] < 0 else theirs
    shown = f"{lower} has the lower error" if row["p_t"] < 0.05 else "no difference shown"
    sign = "" if p.startswith("<") else "= "
    return f"{start} (95 % interval {interval}, {count}, p {sign}{p}): {shown}."


def _judge_paper(known: pd.DataFrame) -> list[str]:
    """How strong the paper's own evidence is, and how its spread compares with ours."""
    cells = {(row["depth"], row["update"]): row for row in known.to_dict("records")}
    found = []
    for depth in sorted({depth for depth, update in cells if update == "un"}):
        if (depth, BASELINE) in cells:
            ours, theirs = (
                Summary(row["paper_mean"], row["paper_std"], math.nan, math.nan)
                for row in (cells[depth, "un"], cells[depth, BASELINE])
            )
            difference, p = compare_means(ours, PAPER_RUNS, theirs, PAPER_RUNS)
            found.append(f"{format_points(difference.mean)} points at depth {depth} (p = {p:.2g})")
    lines = []
    if found:
        lines.append(
            f"The paper's own means and deviations (n = {PAPER_RUNS} each, Welch's t-test) give "
            f"UN − B-SGD = {', '.join(found)}."
        )
    ratios = (known["paper_std"] / known["std"]).replace(math.inf, math.nan)
    if ratios.notna().any():
        most = known.iloc[int(np.nanargmax(ratios))]
        lines.append(
            f"The paper's deviations are {ratios.min():.1f} to {ratios.max():.1f} times ours, most "
            f"at depth {most['depth']} with {label(most['update'])}."
        )
    return lines


# ---------------------------------------------------------------- cells


def _table2_cells(table: pd.DataFrame) -> Cells:
    note = "n: runs in the mean; std with n − 1; t-interval of the mean."
    if table["diverged"].any():
        note += " Diverged runs are counted and left out of the mean."
    if table["paper_mean"].notna().any():
        note += f" Paper: mean ± std over {PAPER_RUNS} runs."
    cells = {
        "depth": table["depth"].map(str),
        "update": table["update"].map(label),
        "n": table["n"].map(str),
        "diverged": table["diverged"].map(str),
        "mean ± std": _zip(format_spread, table["mean"], table["std"]),
        "95 % interval": _intervals(table, format_number),
        "paper": _zip(format_spread, table["paper_mean"], table["paper_std"]),
    }
    title = "Test error after the last training epoch (fraction of the test images)"
    return Cells(title, pd.DataFrame(cells), note)


def _difference_cells(differences: pd.DataFrame) -> list[Cells]:
    """The table of differences, if there are any."""
    if differences.empty:
        return []
    note = (
        "n: pairs of runs with the same start, split and order; p of the paired t-test (t) and of "
        "Wilcoxon's signed-rank test (W), two-sided."
    )
    if differences["left_out"].any():
        note += " Left out: runs without a partner (diverged, not trained, or of another seed)."
    if differences["update"].nunique() > 1:
        note += f" Not corrected for there being {len(differences)} comparisons."
    names = differences[["update", "baseline"]].map(label)
    cells = {
        "depth": differences["depth"].map(str),
        "difference": names["update"] + " − " + names["baseline"],
        "n": differences["n"].map(str),
        "left out": differences["left_out"].map(str),
        "mean ± std": _zip(_spread_points, differences["mean"], differences["std"]),
        "95 % interval": _intervals(differences),
        "p (t)": differences["p_t"].map(format_p),
        "p (W)": differences["p_wilcoxon"].map(format_p),
    }  # fmt: skip
    title = "Paired differences of the test error (percentage points)"
    return [Cells(title, pd.DataFrame(cells), note)]


def _failed_cells(runs: pd.DataFrame) -> list[Cells]:
    """The runs left out of every mean, if any, with the epoch in which each went wrong."""
    failed = runs[runs["failed"]]
    if failed.empty:
        return []
    cells = {
        "depth": failed["depth"].map(str),
        "update": failed["update"].map(label),
        "run": failed["run"].map(str),
        "seed": failed["seed"].map(str),
        "base rate": failed["base_lr"].map("{:g}".format),
        "epoch": failed["epochs"].map(str),
        "reason": failed["stop_reason"],
    }
    return [Cells("Diverged and non-finite runs, left out of every mean", pd.DataFrame(cells))]


def _conduct_cells(runs: pd.DataFrame, history: pd.DataFrame) -> Cells:
    """How the runs of each depth and update went; the worst |‖w‖ − 1| of any filter and epoch."""
    worst = history.groupby(["depth", "update"])["norm_deviation"].max()
    rows = [
        {
            "depth": str(depth),
            "update": label(update),
            "runs": str(len(group)),
            "epochs (median)": f"{group['epochs'].min()}–{group['epochs'].max()} "
            f"({group['epochs'].median():g})",
            "stopped by (runs)": _count(group["stop_reason"]),
            "base rate (runs)": _count(group["base_lr"].map("{:g}".format)),
            "max |‖w‖ − 1|": f"{worst[depth, update]:.2g}".replace("nan", "–"),
        }
        for (depth, update), group in _each_update(runs)
    ]
    return Cells("How the runs went", pd.DataFrame(rows))


def _sweep_cells(sweep: pd.DataFrame) -> Cells:
    cells = {
        "depth": sweep["depth"].map(str),
        "update": sweep["update"].map(label),
        "base rate": sweep["base_lr"].map("{:g}".format),
        "runs": sweep["runs"].map(str),
        "diverged": sweep["diverged"].map(str),
        "mean validation error": sweep["val_error"].map(format_number),
        "chosen by": sweep["chosen"].map(str),
    }
    return Cells("The sweep of the base learning rate", pd.DataFrame(cells))


def _count(values: pd.Series) -> str:
    counts = values.value_counts().sort_index()
    return ", ".join(f"{value} ({count})" for value, count in counts.items())


def _spread_percent(mean: float, std: float) -> str:
    return f"{format_number(100 * mean, 2)} ± {format_number(100 * std, 2)}"


def _spread_points(mean: float, std: float) -> str:
    return "–" if math.isnan(mean) else f"{format_points(mean)} ± {format_number(100 * std, 2)}"


def _zip(form: Callable[..., str], *columns: pd.Series) -> list[str]:
    return [form(*values) for values in zip(*columns, strict=True)]


def _intervals(table: pd.DataFrame, form: Callable[[float], str] = format_points) -> list[str]:
    return _zip(format_interval, table["ci_low"].map(form), table["ci_high"].map(form))


def _join(parts: Iterable[str]) -> str:
    return "\n\n".join(parts) + "\n"


def _spaced(parts: Iterable[RenderableType]) -> list[RenderableType]:
    """With an empty line between each and the next."""
    return [shown for part in parts for shown in (part, Text())][:-1]
