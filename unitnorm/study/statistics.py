"""From a study's table of runs to its comparisons: numbers only, no layout.

Errors are fractions in `runs`; in what is returned, errors and their differences are in percentage
points. The test set is the same in all runs, so a t-interval over seeds speaks of this test set
alone; `ci_images_low` to `ci_images_high` count the test images as random as well.
"""

import base64
import binascii
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import special

from unitnorm.archbn.config import WARM
from unitnorm.errors import UserError
from unitnorm.report.statistics import (
    CONFIDENCE,
    Summary,
    compare_pairs,
    summarise,
    summarise_groups,
)
from unitnorm.study.config import ARCHBN, ComparisonPlan, Place, Rates
from unitnorm.study.schema import BUDGETS, FACTORS

PLACE, RATES = list(Place._fields), list(Rates._fields)
COMPARISONS = (
    *PLACE, "comparison", "level", "arm", "update", "baseline", "metric", "n", "n_left_out",
    "n_diverged", "n_diverged_baseline", "difference", "std", "ci_low", "ci_high",
    "ci_images_low", "ci_images_high", "p", "p_holm", "p_equivalence", "p_equivalence_holm",
    "verdict",
)  # fmt: skip
_LOOKED_AT = [*PLACE, "comparison", "level", "metric"]
LOOKS = (*_LOOKED_AT, "n", "time", "difference", "p_holm", "verdict")
DESCENT = ("b-sgd", "b-sgd-median", "sgd-wd", "sgd-momentum")  # updates along the gradient
_TIES = {"val_error": 10}  # decimals, in percent: what differs by less was rounded
_WORST = 100.0  # the validation error in percent that a diverged tuning run counts with


def is_error(metric: str) -> bool:
    """Whether a metric is counted in percentage points."""
    return "_error" in metric


def metric_values(runs: pd.DataFrame, metric: str) -> pd.Series:
    """The metric of each run: errors in percent, losses as they are; NaN where it has diverged.

    A run that stopped before the epoch of a budget keeps its last value, as it would in use.
    """
    values = runs[metric].astype(float)
    stem, what, *budget = metric.split("_")
    if budget:
        there = values.notna() | (runs["epochs"] >= int(budget[0]))
        values = values.where(there, runs[f"{stem}_{what}"])
    healthy = ~runs["diverged"].astype(bool) & np.isfinite(values)
    return values.where(healthy) * (100 if is_error(metric) else 1)


# ---------------------------------------------------------------- names


def name_place(row: Mapping) -> str:
    """Data set and network of a row: `mnist, depth 2`; networks other than ArchBN by name."""
    network = f"depth {row['depth']}" if row["network"] == ARCHBN else row["network"]
    return f"{row['dataset']}, {network}"


def name_comparison(row: Mapping) -> str:
    """What a row of `compare` is called: its comparison, the level where it has several, and the
    metric where that is another than the test error, `validation error after epoch 10`."""
    stem, what, *budget = row["metric"].split("_")
    words = {"val": "validation", "train": "training", "test": "test"}
    metric = " ".join([words[stem], what, *(f"after epoch {epoch}" for epoch in budget)])
    parts = row["comparison"], row["level"], "" if metric == "test error" else metric
    return ", ".join(part for part in parts if part)


# ---------------------------------------------------------------- comparisons


def compare(
    runs: pd.DataFrame,
    comparisons: Sequence[ComparisonPlan],
    margin: float = 0.05,
    alpha: float = 0.05,
) -> pd.DataFrame:
    """The comparisons of which there are runs, see `sides_of`; columns `COMPARISONS`.

    A pair of arms is `equivalent` where two one-sided t-tests put the mean difference within
    ±margin (Schuirmann 1987; losses have no margin), else `better` or `worse` where the two-sided
    paired t-test tells it from 0, else `open`. Both p-values are adjusted by Holm's method, each
    over all rows, so that the verdicts have the familywise level alpha. `n_left_out`: pairs of
    which a run diverged. NaN where a figure is not defined: n < 2, and images that are not kept.
    Several arms beside one baseline, with no name but theirs, are a ranking: the best comes first.
    """
    rows = [
        {**named, **_compare_arms(ours, theirs, named["metric"], margin)}
        for named, ours, theirs in sides_of(runs, comparisons)
    ]
    table = pd.DataFrame(rows, columns=list(COMPARISONS))
    table["p_holm"] = holm(table["p"].to_numpy(float))
    errors = table["metric"].map(is_error).astype(bool)
    table.loc[errors, "p_equivalence_holm"] = holm(
        table.loc[errors, "p_equivalence"].to_numpy(float)
    )
    told_apart, above = table["p_holm"] <= alpha, table["difference"] > 0
    cases = [table["p_equivalence_holm"] <= alpha, told_apart & ~above, told_apart & above]
    table["verdict"] = np.select(cases, ["equivalent", "better", "worse"], "open")
    return _best_first(table)


def _best_first(table: pd.DataFrame) -> pd.DataFrame:
    """Rankings in the order of their mean difference over all places, all else as it stands."""
    unnamed = table["comparison"] == table["arm"] + " − " + table["baseline"]
    kind = table[["baseline", "metric"]].assign(unnamed=unnamed)
    block = kind.ne(kind.shift()).any(axis=1).cumsum()
    mean = table["difference"].groupby([block, table["comparison"]]).transform("mean")
    order = table.assign(block=block, mean=mean.where(unnamed, 0.0))
    order = order.sort_values(["block", "mean"], kind="stable", ignore_index=True)
    return order.drop(columns=["block", "mean"])


def sides_of(
    runs: pd.DataFrame, comparisons: Sequence[ComparisonPlan]
) -> Iterator[tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]]:
    """What names each row of `compare`, and the runs of its arm and of its baseline.

    A comparison of which both arms have runs has one for each data set and network with runs of
    either, and for each level of the factors that vary within an arm.
    """
    runs = runs[runs["purpose"] == "compare"]
    for plan in comparisons:
        both = runs[runs["arm"].isin([plan.arm, plan.baseline])]
        if not {plan.arm, plan.baseline} <= {*both["arm"]}:
            continue
        named = {"comparison": plan.name, "arm": plan.arm, "baseline": plan.baseline}
        for place, part in both.groupby(PLACE):
            sides = (part[part["arm"] == arm] for arm in (plan.arm, plan.baseline))
            for level, ours, theirs in _levels(*sides):
                at = dict(zip(PLACE, place, strict=True)) | {"level": level, "metric": plan.metric}
                yield named | at, ours, theirs


def _compare_arms(
    ours: pd.DataFrame, theirs: pd.DataFrame, metric: str, margin: float
) -> dict[str, object]:
    paired = pair_runs(ours, theirs, metric).dropna()
    mean, std, low, high = summarise(paired["difference"].to_numpy(float))
    images = (math.nan, math.nan)
    if metric == "test_error" and len(paired) > 1:
        mine, other = (_wrong_images(part, paired.index) for part in (ours, theirs))
        if mine is not None and other is not None:
            images = crossed_interval(100 * (mine.astype(float) - other))
    sides = paired["arm"].to_numpy(float), paired["baseline"].to_numpy(float)
    p, p_equivalence = paired_tests(*sides, margin if is_error(metric) else math.nan)
    return {
        "update": "" if ours.empty else ours["update"].iloc[0], "n": len(paired),
        "n_left_out": len({*ours["seed"]} & {*theirs["seed"]}) - len(paired),
        "n_diverged": int(ours["diverged"].sum()),
        "n_diverged_baseline": int(theirs["diverged"].sum()),
        "difference": mean, "std": std, "ci_low": low, "ci_high": high,
        "ci_images_low": images[0], "ci_images_high": images[1],
        "p": p, "p_equivalence": p_equivalence,
    }  # fmt: skip


def paired_tests(ours: np.ndarray, theirs: np.ndarray, margin: float) -> tuple[float, float]:
    """p of the paired t-test, and the larger p of the one-sided ones against −margin and +margin.

    Differences that are all equal have no t-test: the sign test stands in for it, with p = 2^(1−n)
    and 2^−n for each side of the equivalence. NaN for n < 2; a margin of NaN gives NaN.
    """
    (mean, std, *_), p, _ = compare_pairs(ours, theirs)
    n = len(ours)
    if n > 1 and math.isnan(p):
        p_equivalence = 2.0**-n if abs(mean) < margin else 1.0
        p = 1.0 if mean == 0 else 2.0 ** (1 - n)
        return p, math.nan if math.isnan(margin) else p_equivalence
    # max(P(t < (mean − margin)/error), P(t > (mean + margin)/error)); NaN stays NaN
    return p, float(special.stdtr(n - 1, (abs(mean) - margin) / std * math.sqrt(n)))


def pair_runs(ours: pd.DataFrame, theirs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The metric of two arms side by side, a row per seed of either, and their difference."""
    sides = {}
    for name, part in (("arm", ours), ("baseline", theirs)):
        for row in part[part["seed"].duplicated()].to_dict("records"):
            raise UserError(
                f"{name_place(row)}, arm {row['arm']!r} has more than one comparison run of seed "
                f"{row['seed']}; expected one for each level of the factors"
            )
        sides[name] = metric_values(part, metric).set_axis(part["seed"])
    both = pd.DataFrame(sides).rename_axis("seed").sort_index()
    # Errors are counts / images: without rounding, equal differences would differ in the last bit.
    return both.assign(difference=(both["arm"] - both["baseline"]).round(10))


def _levels(
    ours: pd.DataFrame, theirs: pd.DataFrame
) -> Iterator[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """Both arms' runs for each combination of the factors that vary within either, and its name.

    An arm in which a factor does not vary is the same at all its levels: a fixed baseline stands
    against every level of the arm.
    """
    both = ours, theirs
    varying = [[name for name in FACTORS if side[name].nunique() > 1] for side in both]
    names = [name for name in FACTORS if name in varying[0] + varying[1]]
    if not names:
        yield "", ours, theirs
        return
    either = pd.concat([side for side, own in zip(both, varying, strict=True) if own])
    for values, _ in either.groupby(names):
        texts, at = [], list(both)
        for name, value in zip(names, values, strict=True):
            texts.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
            for place, own in enumerate(varying):
                if name in own:
                    at[place] = at[place][at[place][name] == value]
        yield ", ".join(texts), at[0], at[1]


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's (1979) adjusted p-values, shape (m,); NaN stays NaN and counts as 1 in the family."""
    ordered = pd.Series(p).fillna(1.0).sort_values()
    adjusted = (ordered * np.arange(len(p), 0, -1)).cummax().clip(upper=1)
    return adjusted.sort_index().where(~np.isnan(p)).to_numpy()


def crossed_interval(matrix: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a mean over runs and images, both drawn at random (crossed effects).

    With x_si = μ + a_s + b_i + e_si the variance of the mean is σ_a²/S + σ_b²/I + σ_e²/SI, which
    (MS_runs + MS_images − MS_rest) / SI estimates without bias from the mean squares of the two-way
    table; the degrees of freedom are Satterthwaite's (Searle, Casella and McCulloch 1992, ch. 4).
    Where the images' component comes out negative it is taken as 0: the interval is then that of
    the runs alone, and never narrower. The matrix of differences is (runs, images), both over 1.
    """
    runs, images = matrix.shape
    mean, flat = float(matrix.mean()), matrix.ravel()
    by_run, by_image = matrix.mean(axis=1) - mean, matrix.mean(axis=0) - mean
    squares = [images * (by_run @ by_run), runs * (by_image @ by_image)]
    squares.append(max(0.0, flat @ flat - flat.size * mean**2 - sum(squares)))
    freedom = np.array([runs - 1, images - 1, (runs - 1) * (images - 1)])
    parts = np.array(squares) / freedom / matrix.size
    variance, degrees = parts[0], float(runs - 1)
    if parts[1] > parts[2]:
        variance = parts[0] + parts[1] - parts[2]
        degrees = float(variance**2 / (parts**2 / freedom).sum())
    half = float(special.stdtrit(degrees, (1 + CONFIDENCE) / 2)) * math.sqrt(variance)
    return mean - half, mean + half


# ---------------------------------------------------------------- looks


def add_looks(looks: pd.DataFrame | None, compared: pd.DataFrame, time: str) -> pd.DataFrame:
    """The looks so far and this one, at `time`; at the same pairs again it is none."""
    new = compared[compared["n"] > 1].assign(time=time)[list(LOOKS)]
    known = new if looks is None else pd.concat([looks, new], ignore_index=True)
    return known.drop_duplicates([*_LOOKED_AT, "n"], ignore_index=True)


def with_looks(compared: pd.DataFrame, looks: pd.DataFrame) -> pd.DataFrame:
    """Comparisons with what was looked at before, and an interval that is valid all the same.

    Pairs added because of what was seen spoil the level of an interval. That of look k is given the
    level α/(k(k + 1)), which all looks together spend once (Bonferroni): whenever one stops, it
    misses the mean with a chance of at most α = 5 %. `looks_before` are the numbers of pairs before
    ("2, 5").
    """
    known = looks.groupby(_LOOKED_AT)["n"].apply(list).to_dict()
    rows = []
    for row in compared.to_dict("records"):
        looked_at = known.get(tuple(row[name] for name in _LOOKED_AT), [])
        before = sorted(n for n in looked_at if n < row["n"])
        k, half = len(before) + 1, math.nan
        if before:
            quantile = special.stdtrit(row["n"] - 1, 1 - (1 - CONFIDENCE) / (k * (k + 1)) / 2)
            half = quantile * row["std"] / math.sqrt(row["n"])
        ends = row["difference"] - half, row["difference"] + half
        rows.append((", ".join(map(str, before)), *ends))
    columns = ["looks_before", "ci_looks_low", "ci_looks_high"]
    return compared.join(pd.DataFrame(rows, columns=columns, index=compared.index))


# ---------------------------------------------------------------- the images behind an error


def pack_wrong(wrong: np.ndarray) -> str:
    """Which test images a run gets wrong, shape (images,), as text for a column of a table."""
    return base64.b64encode(zlib.compress(np.packbits(wrong.astype(bool)).tobytes(), 9)).decode()


def unpack_wrong(text: str) -> np.ndarray:
    """The inverse of `pack_wrong`: booleans, shape (images,), with up to 7 `False` at the end."""
    try:
        content = zlib.decompress(base64.b64decode(text, validate=True))
    except (binascii.Error, zlib.error) as error:
        raise UserError(f"column wrong is damaged ({error}); restore the records") from None
    return np.unpackbits(np.frombuffer(content, np.uint8)).astype(bool)


def _wrong_images(runs: pd.DataFrame, seeds: pd.Index) -> np.ndarray | None:
    """The wrong images of the runs with these seeds, shape (seeds, images); None where not kept."""
    chosen = runs.set_index("seed").loc[seeds]
    if not all(chosen["wrong"]):
        return None
    wrong = np.array([unpack_wrong(text) for text in chosen["wrong"]])
    errors, counts, size = chosen["test_error"].to_numpy(float), wrong.sum(axis=1), wrong.shape[1]
    # Bits come in eights: how many of the last are images follows from the errors themselves.
    images = round(counts.sum() / errors.sum()) if errors.sum() else size
    close = np.allclose(counts / max(images, 1), errors, atol=0.5 / max(images, 1))
    if close and size - 8 < images <= size:
        return wrong[:, :images]
    raise UserError("columns wrong and test_error do not agree; restore the records")


# ---------------------------------------------------------------- rates, budgets, starts, ranks


def rate_means(runs: pd.DataFrame) -> pd.DataFrame:
    """The tuning runs by place, arm and rates, with the best rates of each arm marked.

    The best has the lowest mean validation error (`val_error`, percent), where a diverged run
    counts as 100 %. Of equal means the larger rate of the filters wins, then that of the rest, as
    it needs fewer epochs; then the larger decay. Interval, `healthy_error` and `effective_rate` are
    of the runs that have not diverged. `is_at_edge`: the filters' rate, the rest's or the decay is
    the smallest or largest tried; an axis with one value has no edge, and nothing is below no
    decay. `n_agreeing`: of the `n` tuning seeds, those that would have chosen these rates alone.
    Where tuning was by halving, the best is one of those with the most seeds.
    """
    cell = [*PLACE, "arm", "update", "schedule"]
    keys = [*cell, *RATES]
    runs = runs[runs["purpose"] == "tune"].sort_values(keys)
    value = metric_values(runs, "val_error")
    reached = runs["effective_rate"].where(value.notna())
    runs = runs.assign(value=value, val_error=value.fillna(_WORST), effective_rate=reached)
    means = runs.groupby(keys)[["val_error", "effective_rate"]].mean().round(_TIES)
    table = summarise_groups(runs, keys, 100.0)
    table = table.rename(columns={"mean": "healthy_error"}).join(means, on=keys)
    edge = pd.Series(False, index=table.index)
    for name in RATES:
        axis = table.groupby(cell)[name]
        least, most = axis.transform("min"), axis.transform("max")
        edge |= (least < most) & (((table[name] == least) & (least > 0)) | (table[name] == most))
    agreeing = _best(runs, [*cell, "seed"]).groupby(keys).size().rename("n_agreeing")
    table["n"] += table["n_diverged"]
    best = table.index.isin(_best(_longest(table, cell), cell).index)
    table = table.assign(is_best=best, is_at_edge=edge)
    table = table.join(agreeing, on=keys).fillna({"n_agreeing": 0})
    return table.drop(columns="std").astype({"n_agreeing": int})


def _by_rule(table: pd.DataFrame) -> pd.DataFrame:
    """The best first, by the rule of `rate_means`."""
    return table.sort_values(["val_error", *RATES], ascending=[True, False, False, False])


def _best(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Of each group the row that wins."""
    return _by_rule(table).groupby(keys).head(1)


def _longest(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Of each group the settings with the most seeds, whom halving has kept."""
    return table[table["n"] == table.groupby(keys)["n"].transform("max")]


def best_rates(runs: pd.DataFrame, count: int) -> list[tuple[float, ...]]:
    """The best settings of an arm by its tuning runs in one place, the best first."""
    runs = runs.assign(val_error=metric_values(runs, "val_error").fillna(_WORST))
    means = runs.groupby(RATES)[["val_error"]].mean().round(_TIES)
    return list(_by_rule(means.reset_index())[RATES].head(count).itertuples(index=False, name=None))


def profile_rates(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `rate_means` with all else at its best, for each rate of an arm's filters.

    As there, the best is one of those with the most seeds.
    """
    keys = [*PLACE, "arm", "filters_rate"]
    return _best(_longest(table, keys), keys).sort_values(keys, ignore_index=True)


def choose_rates(runs: pd.DataFrame) -> pd.DataFrame:
    """The best rates by the tuning runs: of `rate_means` a row for each place and arm."""
    table = rate_means(runs)
    return table[table["is_best"]].drop(columns="is_best").reset_index(drop=True)


def budget_means(runs: pd.DataFrame) -> pd.DataFrame:
    """The test error by place, arm and budget of epochs; the last is "end" where runs differ."""
    chosen = runs[runs["purpose"] == "compare"]
    epochs = chosen.loc[metric_values(chosen, "test_error").notna(), "epochs"]
    columns = {str(b): f"test_error_{b}" for b in BUDGETS if b < epochs.max()}
    columns["end" if epochs.nunique() != 1 else str(epochs.max())] = "test_error"
    parts = [
        chosen.assign(budget=budget, value=metric_values(chosen, column))
        for budget, column in columns.items()
    ]
    table = summarise_groups(pd.concat(parts), [*PLACE, "arm", "update", "budget"], 100.0)
    return table[table["n"] > 0].reset_index(drop=True)


def spread_means(runs: pd.DataFrame) -> pd.DataFrame:
    """The test error by kind of start, place, update and spread; at 0 each is the balanced one."""
    chosen = runs[runs["purpose"] == "compare"]
    chosen = chosen.assign(value=metric_values(chosen, "test_error"))
    kinds = [kind for kind in chosen["start"].unique() if kind != "balanced"] or ["balanced"]
    keys = ["kind", *PLACE, "update", "spread"]
    parts = []
    for kind in kinds:
        own = chosen["start"] == kind
        part = chosen[own | (chosen["spread"] == 0)].assign(kind=kind)
        part = part[part["update"].isin(chosen.loc[own, "update"])]
        # where each kind has balanced runs of its own, these come first and stay
        part = part.iloc[np.argsort(part["start"] != kind, kind="stable")]
        parts.append(part.drop_duplicates([*keys, "seed"]))
    return summarise_groups(pd.concat(parts), keys, 100.0)


def left_by(schedule: ArrayLike, epochs: ArrayLike) -> np.ndarray:
    """What a schedule leaves of a base rate in the last of so many epochs, as a factor; 1 where
    that is not fixed. A warm-up is measured at the start of the epoch."""
    last, schedule = np.pi / np.asarray(epochs), np.asarray(schedule)
    angles = [last, last / (1 - WARM)]
    angle = np.select([schedule == "cosine", schedule == "warm-up"], angles, np.pi)
    return 0.5 - 0.5 * np.cos(angle)


def late_rates(runs: pd.DataFrame) -> pd.DataFrame:
    """How each arm's late effective rate compares with UN's, and its error with UN's, under cosine.

    An arm stands beside UN, or SGD with momentum beside UN with momentum, of the same name behind
    an @, in pairs by seed.

    Returns:
        A row for each place, arm that descends along the gradient, and level of its factors, with
        three pairs or more: `rate_ratio`, its mean effective rate of the last epoch over UN's; and
        of the difference of the test error, arm − UN in percentage points, `mean`, `ci_low`,
        `ci_high`, `n`.
    """
    known = runs["start"].isin(["norms", "balanced"])
    known &= runs["schedule"].isin(["cosine", "warm-up"]) & ~runs["diverged"]
    runs, rows = runs[known & (runs["purpose"] == "compare")], []
    for place, here in runs.groupby(PLACE):
        for (arm, update), mine in here[here["update"].isin(DESCENT)].groupby(["arm", "update"]):
            beside = "un-momentum" if update == "sgd-momentum" else "un"
            name = beside + "".join(str(arm).partition("@")[1:])
            theirs = here[(here["arm"] == name) & (here["update"] == beside)]
            for level, ours, other in _levels(mine, theirs):
                both = pair_runs(ours, other, "test_error").dropna()
                if len(both) >= 3:
                    ratio = ours["effective_rate"].mean() / other["effective_rate"].mean()
                    named = ", ".join(filter(None, (str(arm), level)))
                    found = summarise(both["difference"].to_numpy())
                    rows.append((*place, named, update, ratio, len(both), *found))
    columns = [*PLACE, "arm", "update", "rate_ratio", "n", *Summary._fields]
    return pd.DataFrame(rows, columns=columns)


def rank(runs: pd.DataFrame) -> pd.DataFrame:
    """All arms of each place by their mean test error, the best first, and their levels.

    Diverged runs are not in the mean, and an interval is cut where an error ends. Equal means share
    the better rank; an arm that always diverged comes last.
    """
    runs = runs[runs["purpose"] == "compare"]
    levels = [
        part.assign(level=level, value=metric_values(part, "test_error"))
        for _, group in runs.groupby([*PLACE, "arm"])
        for level, part, _ in _levels(group, group)
    ]
    table = summarise_groups(pd.concat(levels), [*PLACE, "arm", "update", "level"], 100.0)
    means = table["mean"].round(10).fillna(math.inf)
    places = means.groupby([table[name] for name in PLACE]).rank(method="min").astype(int)
    table.insert(len(PLACE), "rank", places)
    return table.sort_values([*PLACE, "rank", "arm"], ignore_index=True)
