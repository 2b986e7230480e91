"""What every experiment computes of its runs: means, intervals, paired tests and curves."""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

CONFIDENCE = 0.95


class Summary(NamedTuple):
    """Mean, standard deviation (ddof 1) and the two ends of the t-interval of the mean, of 95 %."""

    mean: float
    std: float
    ci_low: float
    ci_high: float

    def cut(self, low: float, high: float) -> "Summary":
        """With the interval cut to what the mean can be: 0 to 1 for an error."""
        return self._replace(ci_low=max(self.ci_low, low), ci_high=min(self.ci_high, high))


def summarise(values: np.ndarray) -> Summary:
    """The summary of values, shape (n,); NaN where n is too small: below 2 for all but the mean."""
    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    if n < 2:
        return Summary(mean, math.nan, math.nan, math.nan)
    std = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * std / math.sqrt(n)
    return Summary(mean, std, mean - half, mean + half)


def summarise_groups(table: pd.DataFrame, keys: list[str], most: float) -> pd.DataFrame:
    """The summary of the column `value`, errors or NaN where a run has diverged, in each group.

    Returns:
        A row per group, in the order of their first rows: `keys`, n and n_diverged, which add up to
        the group's rows, and the fields of `Summary`, the interval cut to 0 to `most`.
    """
    rows = []
    for key, group in table.groupby(keys, sort=False)["value"]:
        values = group.dropna().to_numpy(float)
        found = summarise(values).cut(0.0, most)
        rows.append((*key, len(values), len(group) - len(values), *found))
    return pd.DataFrame(rows, columns=[*keys, "n", "n_diverged", *Summary._fields])


def compare_pairs(ours: np.ndarray, theirs: np.ndarray) -> tuple[Summary, float, float]:
    """The differences ours − theirs of errors of one seed each, shape (n,).

    Returns:
        Their summary, and the two-sided p-values of the paired t-test and of Wilcoxon's
        signed-rank test; NaN where n < 2 or all differences are equal.
    """
    # Errors are k/10000. Without the rounding, 0.0203 − 0.0201 and 0.0205 − 0.0203 differ in the
    # last bit, and the signed-rank test would break ties by rounding noise.
    difference = (ours - theirs).round(12)
    summary = summarise(difference)
    if len(difference) < 2 or np.ptp(difference) == 0:
        return summary, math.nan, math.nan
    return summary, float(stats.ttest_rel(ours, theirs).pvalue), signed_rank_p(difference)


def compare_means(ours: Summary, n: int, theirs: Summary, m: int) -> tuple[Summary, float]:
    """Welch's t-test of the means of n and m independent runs, from mean and std alone.

    Returns:
        The difference ours − theirs (its std is that of a difference of two runs) with its
        interval, and the two-sided p-value; NaN where either has fewer than two runs or no spread.
    """
    mean, std = ours.mean - theirs.mean, math.hypot(ours.std, theirs.std)
    if not (min(n, m) > 1 and std > 0):
        return Summary(mean, std, math.nan, math.nan), math.nan
    a, b = ours.std**2 / n, theirs.std**2 / m
    freedom = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (m - 1))  # Welch and Satterthwaite
    student, error = stats.t(freedom), math.sqrt(a + b)
    half = float(student.ppf((1 + CONFIDENCE) / 2)) * error
    return Summary(mean, std, mean - half, mean + half), 2 * float(student.sf(abs(mean) / error))


def signed_rank_p(differences: np.ndarray) -> float:
    """The exact two-sided p-value of Wilcoxon's signed-rank test of differences, not all zero.

    `scipy.stats.wilcoxon` is exact only without ties, or draws up all 2^n signs. Here the
    distribution of the rank sum grows by one rank at a time.
    """
    differences = differences[differences != 0]
    ranks = (2 * stats.rankdata(np.abs(differences))).astype(int)  # whole numbers, ties too
    chance = np.ones(1)
    for rank in ranks:
        chance = (np.pad(chance, (0, rank)) + np.pad(chance, (rank, 0))) / 2
    positive = ranks[differences > 0].sum()
    return float(min(1.0, 2 * min(chance[: positive + 1].sum(), chance[positive:].sum())))


def find_outliers(values: np.ndarray) -> np.ndarray:
    """Which values, shape (n,), lie over 1.5 interquartile ranges outside the quartiles (Tukey)."""
    if len(values) < 4:
        return np.zeros(len(values), bool)
    low, high = np.quantile(values, [0.25, 0.75])
    reach = 1.5 * (high - low) + 1e-12  # errors are k/10000: what lies on the fence is inside
    return (values < low - reach) | (values > high + reach)


def carry_mean(values: np.ndarray, *, geometric: bool = False) -> np.ndarray:
    """The mean of curves, (runs, epochs), a run that has stopped (NaN) keeping its last value.

    The mean of the runs still active would jump whenever a good or bad run stops; this one, shape
    (epochs,), is of what all runs have reached by that epoch.
    """
    carried = pd.DataFrame(values).ffill(axis=1).to_numpy(float)
    return np.exp(np.log(carried).mean(axis=0)) if geometric else carried.mean(axis=0)
