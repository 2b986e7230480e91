"""Table 2, the paired differences and what may be said of them: numbers only, no layout.

Every function is pure. Errors are fractions of the 10,000 test images (0.02 is 2 %); verdicts
speak of percentage points. The paper's figures and the level of confidence are the constants at
the top.
"""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy import stats

from unitnorm.report.frames import (
    BASELINE,
    by_update,
    checked_history,
    checked_runs,
    checked_sweep,
    label,
)

CONFIDENCE = 0.95

# Badrinarayanan, Mishra and Cipolla (2015), "Understanding symmetries in deep networks", Table 2:
# the test error after the last training epoch, mean and standard deviation over 10 runs on MNIST.
Paper = Mapping[tuple[int, str], tuple[float, float]]  # (depth, update) to mean and std
PAPER: Paper = {
    (2, "b-sgd"): (0.0206, 0.0024),
    (2, "un"): (0.0199, 0.0046),
    (4, "b-sgd"): (0.0204, 0.0027),
    (4, "un"): (0.0179, 0.0025),
}

TABLE2 = (
    "depth", "update", "n", "diverged", "mean", "std", "ci_low", "ci_high",
    "paper_mean", "paper_std",
)  # fmt: skip
DIFFERENCES = (
    "depth", "update", "baseline", "n", "left_out", "mean", "std", "ci_low", "ci_high",
    "p_t", "p_wilcoxon",
)  # fmt: skip


def interval(values: np.ndarray) -> tuple[float, float, float, float]:
    """Mean, standard deviation (ddof 1) and the two ends of the 95 % t-interval of the mean.

    Args:
        values: shape (n,). Of one value only the mean is known, of none nothing: the rest is NaN.
    """
    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    if n < 2:
        return mean, math.nan, math.nan, math.nan
    std = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * std / math.sqrt(n)
    return mean, std, mean - half, mean + half


def table2(runs: pd.DataFrame, paper: Paper = PAPER) -> pd.DataFrame:
    """Table 2: the test error of each depth and update, beside the paper's.

    Args:
        runs: one row per run, see `frames.RUNS`.
        paper: the figures to set beside ours; `{}` for runs on other data than the paper's.

    Returns:
        Columns `TABLE2`: `n` runs are in the mean, `diverged` runs are left out of it; the std has
        ddof 1, the interval is a 95 % t-interval of the mean. NaN where a figure is not defined
        (n < 2) or the paper has none.

    Raises:
        UserError: the frame is empty or damaged.
    """
    rows = []
    for depth, update, group in by_update(checked_runs(runs)):
        errors = group.loc[~group["failed"], "test_error"].to_numpy(float)
        theirs = paper.get((depth, update), (math.nan, math.nan))
        failed = int(group["failed"].sum())
        rows.append((depth, update, len(errors), failed, *interval(errors), *theirs))
    return pd.DataFrame(rows, columns=list(TABLE2))


def pairs(runs: pd.DataFrame, update: str, baseline: str = BASELINE) -> pd.DataFrame:
    """The runs of `update` and `baseline` that share depth, run and seed, and have not failed.

    Only these began at the same point and saw the same split and order.

    Returns:
        Columns depth, run, seed, update (its test error) and baseline (its test error).
    """
    healthy = checked_runs(runs).query("~failed")[["depth", "update", "run", "seed", "test_error"]]
    ours, theirs = (
        healthy[healthy["update"] == name].drop(columns="update") for name in (update, baseline)
    )
    ours = ours.rename(columns={"test_error": "update"})
    theirs = theirs.rename(columns={"test_error": "baseline"})
    return ours.merge(theirs, on=["depth", "run", "seed"])


def paired_differences(runs: pd.DataFrame, baseline: str = BASELINE) -> pd.DataFrame:
    """The difference of the test error, update − baseline, run by run.

    Args:
        runs: one row per run, see `frames.RUNS`.
        baseline: the update that all others of the same depth are compared with.

    Returns:
        Columns `DIFFERENCES`, a row per depth (that has the baseline) and other update: `n` pairs,
        `left_out` runs without a partner (diverged, not trained, or of another seed); mean, std
        (ddof 1) and 95 % t-interval of the difference; p-values of the paired t-test and of
        Wilcoxon's signed-rank test, both two-sided. NaN where a figure is not defined: n < 2, and
        for p also differences that are all equal.

    Raises:
        UserError: the frame is empty or damaged.
    """
    runs = checked_runs(runs)
    rows = []
    for depth, group in runs.groupby("depth", sort=False):
        if baseline not in set(group["update"]):
            continue
        for update in group["update"].unique():
            if update == baseline:
                continue
            both = pairs(group, update, baseline)
            every = group.loc[group["update"].isin([update, baseline]), "run"].nunique()
            # Errors are k/10000. Without the rounding, 0.0203 − 0.0201 and 0.0205 − 0.0203 differ
            # in the last bit, and the signed-rank test would break ties by rounding noise.
            difference = (both["update"] - both["baseline"]).round(12).to_numpy(float)
            summary = interval(difference)
            p_t = p_wilcoxon = math.nan
            if len(difference) > 1 and np.ptp(difference) > 0:
                p_t = float(stats.ttest_rel(both["update"], both["baseline"]).pvalue)
                p_wilcoxon = signed_rank_p(difference)
            n, left_out = len(both), every - len(both)
            rows.append((depth, update, baseline, n, left_out, *summary, p_t, p_wilcoxon))
    return pd.DataFrame(rows, columns=list(DIFFERENCES))


def signed_rank_p(differences: np.ndarray) -> float:
    """The exact two-sided p-value of Wilcoxon's signed-rank test; zeros are dropped.

    Like `scipy.stats.wilcoxon`, which for ties draws up all 2^n signs: half a second for n = 10.
    Here the distribution of the rank sum grows by one rank at a time, exactly and at once.

    Args:
        differences: shape (n,), not all zero.
    """
    differences = differences[differences != 0]
    ranks = (2 * stats.rankdata(np.abs(differences))).astype(int)  # whole numbers, ties too
    chance = np.ones(1)
    for rank in ranks:
        chance = (np.pad(chance, (0, rank)) + np.pad(chance, (rank, 0))) / 2
    positive = ranks[differences > 0].sum()
    return float(min(1.0, 2 * min(chance[: positive + 1].sum(), chance[positive:].sum())))


def verdict(differences: pd.DataFrame) -> list[str]:
    """What the paired differences show: one sentence per row, with its uncertainty.

    Args:
        differences: as `paired_differences` returns it.
    """
    if differences.empty:
        return ["no difference to show: no depth has runs of the baseline and of another update"]
    return [_sentence(row) for row in differences.to_dict("records")]


def _sentence(row: dict) -> str:
    ours, theirs = label(row["update"]), label(row["baseline"])
    n = row["n"]
    count = f"n = {n} pair{'' if n == 1 else 's'}"
    if row["left_out"]:
        count += f", {row['left_out']} left out"
    start = f"depth {row['depth']}: "
    if n == 0:
        return f"{start}nothing can be said of {ours} against {theirs} ({count})"
    mean = points(row["mean"])
    if n == 1:
        return f"{start}one pair shows nothing: {ours} − {theirs} = {mean} points ({count})"
    bounds = f"95 % interval {points(row['ci_low'])} to {points(row['ci_high'])}"
    evidence = f"({bounds}, {count}, {p_value(row['p_t'])})"
    if np.isnan(row["p_t"]):
        return (
            f"{start}all differences are equal, {ours} − {theirs} = {mean} points, "
            f"so no test applies ({count})"
        )
    if row["ci_low"] <= 0 <= row["ci_high"]:
        return f"{start}no difference shown, {ours} − {theirs} = {mean} points {evidence}"
    way = "lower" if row["mean"] < 0 else "higher"
    size = f"{100 * abs(row['mean']):.2f}"
    return f"{start}{ours}'s test error is {size} points {way} than {theirs}'s {evidence}"


def against_paper(table: pd.DataFrame) -> str:
    """One sentence: which means of Table 2 lie within the paper's own std of the paper's mean."""
    known = table[table["paper_mean"].notna()]
    if known.empty:
        return "nothing here is set beside the paper: other cells, another protocol or other data"
    away = (known["mean"] - known["paper_mean"]) / known["paper_std"]
    outside = known[~(away.abs() <= 1)]
    if outside.empty:
        which = "the mean lies" if len(known) == 1 else f"all {len(known)} means lie"
        return f"{which} within the paper's own standard deviation of its mean"
    cells = []
    for row, distance in zip(outside.to_dict("records"), away[outside.index], strict=True):
        far = "no mean" if np.isnan(distance) else f"{_signed(distance, 1)} of them away"
        cells.append(f"depth {row['depth']}, {label(row['update'])} ({far})")
    return (
        f"{len(outside)} of {len(known)} means do not lie within the paper's own standard "
        f"deviation of its mean: {'; '.join(cells)}"
    )


def failed_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs left out of every mean: depth, update, run, seed, base_lr, epoch, stop_reason.

    `epoch` is the last one that the run went through: the one in which it went wrong.
    """
    failed = checked_runs(runs).query("failed").rename(columns={"epochs": "epoch"})
    columns = ["depth", "update", "run", "seed", "base_lr", "epoch", "stop_reason"]
    return failed[columns].reset_index(drop=True)


def conduct(runs: pd.DataFrame, history: pd.DataFrame) -> pd.DataFrame:
    """How the runs of each depth and update went.

    Returns:
        Columns depth, update, runs, epochs_min, epochs_median, epochs_max, stop_reasons and
        base_lrs (value to number of runs), norm_deviation (the largest |‖w‖ − 1| of any filter
        after any epoch; NaN ignored, for a non-finite run is listed by itself).

    Raises:
        UserError: a frame is empty or damaged.
    """
    runs = checked_runs(runs)
    history = checked_history(history, runs)
    worst = {
        (depth, update): rows["norm_deviation"].max() for depth, update, rows in by_update(history)
    }
    rows = []
    for depth, update, group in by_update(runs):
        rows.append(
            {
                "depth": depth,
                "update": update,
                "runs": len(group),
                "epochs_min": int(group["epochs"].min()),
                "epochs_median": float(group["epochs"].median()),
                "epochs_max": int(group["epochs"].max()),
                "stop_reasons": _counts(group["stop_reason"]),
                "base_lrs": _counts(group["base_lr"]),
                "norm_deviation": float(worst[depth, update]),
            }
        )
    return pd.DataFrame(rows)


def sweep_summary(sweep: pd.DataFrame) -> pd.DataFrame:
    """The sweep by depth, update and rate.

    Returns:
        Columns depth, update, base_lr, runs, diverged, val_error (mean of the runs that have not
        diverged, NaN where all have), chosen (number of runs that chose this rate).

    Raises:
        UserError: the frame is empty or damaged.
    """
    sweep = checked_sweep(sweep)
    sweep["healthy_error"] = sweep["val_error"].where(~sweep["diverged"])
    keys = ["depth", "update"]
    parts = [
        group.groupby("base_lr", sort=False)
        .agg(
            runs=("run", "size"),
            diverged=("diverged", "sum"),
            val_error=("healthy_error", "mean"),
            chosen=("chosen", "sum"),
        )
        .reset_index()
        .sort_values("base_lr", ascending=False)
        .assign(depth=depth, update=update)
        for depth, update, group in by_update(sweep)
    ]
    columns = [*keys, "base_lr", "runs", "diverged", "val_error", "chosen"]
    return pd.concat(parts, ignore_index=True)[columns]


def carried_mean(values: np.ndarray, *, geometric: bool = False) -> np.ndarray:
    """The mean of curves of unequal length, a run that has stopped keeping its last value.

    The mean of the runs still active would jump whenever a good or bad run stops; this one is the
    mean of what all runs have reached by that epoch.

    Args:
        values: shape (runs, epochs), NaN after a run's last epoch; first column finite.
        geometric: the geometric mean, for what is drawn on a logarithmic axis.

    Returns:
        Shape (epochs,).
    """
    carried = pd.DataFrame(values).ffill(axis=1).to_numpy(float)
    return np.exp(np.log(carried).mean(axis=0)) if geometric else carried.mean(axis=0)


def points(value: float) -> str:
    """A difference of errors in percentage points, signed: −0.0012 is "−0.12"."""
    if np.isnan(value):
        return "–"
    return _signed(100 * value, 2)


def p_value(value: float) -> str:
    """A p-value as a sentence has it: "p = 0.012", "p < 0.001"."""
    if np.isnan(value):
        return "p –"
    return f"p = {value:.3f}" if value >= 0.001 else "p < 0.001"


def _signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def _counts(values: pd.Series) -> dict:
    return {value: int((values == value).sum()) for value in sorted(values.unique())}
