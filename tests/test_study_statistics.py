"""A study's numbers: against separately written references and simulations of known truth."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tests.study_example import plan_comparison, run_row
from unitnorm.errors import UserError
from unitnorm.report.statistics import summarise
from unitnorm.study.statistics import (
    COMPARISONS,
    add_looks,
    choose_rates,
    compare,
    crossed_interval,
    holm,
    metric_values,
    name_place,
    pack_wrong,
    paired_tests,
    profile_rates,
    rank,
    rate_means,
    unpack_wrong,
    with_looks,
)


def make_runs(errors: dict[str, list[float]], purpose: str = "compare", **columns: object):
    """A run per arm and error (a fraction; NaN is a diverged run); seeds count from 0."""
    runs = [(arm, *run) for arm, values in errors.items() for run in enumerate(values)]
    return pd.DataFrame([run_row(*run, purpose=purpose, **columns) for run in runs])


UN = plan_comparison("constraint", "un", "b-sgd")


def only(table: pd.DataFrame) -> pd.Series:
    assert len(table) == 1
    return table.iloc[0]


def test_difference_interval_and_p_against_formulas_written_out():
    un, sgd = [0.0180, 0.0190, 0.0200, 0.0185], [0.0210, 0.0200, 0.0222, 0.0190]
    table = compare(make_runs({"un": un, "b-sgd": sgd}), [UN])
    assert list(table.columns) == list(COMPARISONS)
    row = only(table)
    d = np.array([-0.30, -0.10, -0.22, -0.05])
    mean, std = d.sum() / 4, math.sqrt(((d - d.sum() / 4) ** 2).sum() / 3)
    se, half = std / 2, 3.182446 * std / 2  # t table, 3 degrees
    figures = row[["difference", "std", "ci_low", "ci_high", "p", "p_equivalence"]]
    p = 2 * stats.t.cdf(-abs(mean / se), 3)
    p_equivalence = max(stats.t.sf((mean + 0.05) / se, 3), stats.t.cdf((mean - 0.05) / se, 3))
    expected = [mean, std, mean - half, mean + half, p, p_equivalence]
    assert list(figures) == pytest.approx(expected, rel=1e-5)
    assert (row["n"], row["n_left_out"], row["update"], row["verdict"]) == (4, 0, "un", "open")
    assert math.isnan(row["ci_images_low"])  # no images kept


def test_pairs_are_made_by_seed_whatever_the_order_and_runs_that_diverged_are_counted():
    runs = make_runs({"un": [0.01, 0.02, math.nan, 0.04], "b-sgd": [0.02, math.nan, 0.05, 0.03]})
    alone = make_runs({"un": [0.5]}).assign(seed=99)  # un has more seeds than b-sgd
    row = only(compare(pd.concat([runs, alone]).sample(frac=1, random_state=3), [UN]))
    assert row["difference"] == pytest.approx(0.0)  # (−1 + 1) / 2: seeds 0 and 3
    assert (row["n"], row["n_left_out"]) == (2, 2)
    assert (row["n_diverged"], row["n_diverged_baseline"]) == (1, 1)


@pytest.mark.parametrize(("un", "n"), [([math.nan] * 3, 0), ([0.02, math.nan, math.nan], 1)])
def test_too_few_pairs_leave_the_comparison_open(un, n):
    row = only(compare(make_runs({"un": un, "b-sgd": [0.03] * 3}), [UN]))
    assert (row["n"], row["n_left_out"], row["n_diverged"]) == (n, 3 - n, 3 - n)
    assert row["verdict"] == "open"
    assert np.isnan([row["p"], row["p_holm"], row["p_equivalence"], row["ci_low"]]).all()
    assert math.isnan(row["difference"]) == (n == 0)


def test_equal_differences_are_tested_by_their_signs():
    same = only(compare(make_runs({"un": [0.02] * 10, "b-sgd": [0.02] * 10}), [UN]))
    assert (same["p"], same["p_equivalence"], same["verdict"]) == (1, 2**-10, "equivalent")
    lower = only(compare(make_runs({"un": [0.02] * 10, "b-sgd": [0.023] * 10}), [UN]))
    assert (lower["p"], lower["p_equivalence"], lower["verdict"]) == (2**-9, 1, "better")
    two = only(compare(make_runs({"un": [0.02] * 2, "b-sgd": [0.02] * 2}), [UN]))
    assert two["verdict"] == "open"


def test_verdicts_of_known_differences():
    rng = np.random.default_rng(0)
    base = 0.02 + 0.001 * rng.standard_normal(100)
    arms = {  # mean and deviation of the differences; 0.05 points are 0.0005
        "better": (-0.002, 0.0004),
        "worse": (0.002, 0.0004),
        "equivalent": (0.0001, 0.0004),
        "open": (0.0001, 0.004),
        "worse, by as much as the margin": (0.0005, 0.0004),
    }
    errors = {"b-sgd": list(base)}
    for arm, (mean, std) in arms.items():
        errors[arm] = list(base + mean + std * stats.zscore(rng.standard_normal(100)))
    plans = [plan_comparison(name, name, "b-sgd") for name in arms]
    loss = plan_comparison("loss", "equivalent", "b-sgd", "train_loss")
    table = compare(make_runs(errors), [*plans, loss])
    assert list(table["verdict"][:5]) == [arm.split(",")[0] for arm in arms]
    assert math.isnan(table["p_equivalence"][5])  # points are no unit of losses
    assert table["difference"][5] == pytest.approx(0.0001)


def test_holm_against_the_closed_test_it_is_a_shortcut_of():
    """Adjusted p of i: the largest Bonferroni p over all sets of hypotheses that hold i."""
    rng = np.random.default_rng(2)
    for _ in range(20):
        p = rng.uniform(0, 0.3, 5).round(2)
        sets = [s for k in range(1, 6) for s in itertools.combinations(range(5), k)]
        closed = [max(min(1, len(s) * p[list(s)].min()) for s in sets if i in s) for i in range(5)]
        np.testing.assert_allclose(holm(p), closed)
    np.testing.assert_allclose(holm(np.array([0.02, math.nan, 0.01])), [0.04, math.nan, 0.03])
    arms = {"un": [0.02, 0.021, 0.0205], "a": [0.022] * 3, "b": [0.022] * 3}
    family = [UN, *(plan_comparison(arm, arm, "b-sgd") for arm in "ab")]
    row = compare(make_runs(arms | {"b-sgd": [0.022] * 3}), family).iloc[0]
    assert row["p_holm"] == pytest.approx(3 * row["p"])  # over all comparisons of the plan


def test_familywise_error_of_both_kinds_of_verdict_by_simulation():
    """With five true nulls, a false verdict anywhere is rarer than alpha; at the margin as well."""
    rng = np.random.default_rng(3)
    trials, zero, wrong = 100, np.zeros(12), np.zeros(2)
    for _ in range(trials):
        null, edge = rng.standard_normal((2, 5, 12))
        apart = [paired_tests(d, zero, 1)[0] for d in null]
        alike = [paired_tests(0.3 * d + 1, zero, 1)[1] for d in edge]  # as far as the margin
        wrong += [(holm(np.array(p)) < 0.05).any() for p in (apart, alike)]
    assert (wrong > 0.02 * trials).all()
    assert (wrong / trials < 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)).all()


def test_looks_are_kept_and_the_interval_of_the_kth_spends_its_share_of_the_level():
    """α/(k(k + 1)), which all looks together spend once: the interval holds whenever one stops."""
    un, sgd = [0.018, 0.019, 0.02, 0.0185, 0.0181], [0.021, 0.02, 0.0222, 0.019, 0.019]
    runs, looks = make_runs({"un": un, "b-sgd": sgd}), None
    for k, n in enumerate((2, 4, 5), 1):
        table = compare(runs[runs["seed"] < n], [UN])
        looks = add_looks(add_looks(looks, table, f"day {k}"), table, "tomorrow")  # is no new look
        row = only(with_looks(table, looks))
        assert row["looks_before"] == ["", "2", "2, 4"][k - 1]
        ends = row[["ci_looks_low", "ci_looks_high"]].to_numpy(float)
        half = stats.t.ppf(1 - 0.05 / (k * (k + 1)) / 2, n - 1) * row["std"] / math.sqrt(n)
        expected = [row["difference"] - half, row["difference"] + half]
        assert list(ends) == pytest.approx(expected if k > 1 else [math.nan] * 2, nan_ok=True)
    assert list(looks["time"]) == ["day 1", "day 2", "day 3"]
    assert list(looks["n"]) == [2, 4, 5]


def test_crossed_interval_against_the_linear_model_written_out():
    rng = np.random.default_rng(4)
    matrix = rng.standard_normal((6, 1)) + 2 * rng.standard_normal((1, 9)) + rng.random((6, 9))
    # Mean squares by projections of the data, one matrix at a time.
    one_s, one_i = np.full((6, 6), 1 / 6), np.full((9, 9), 1 / 9)
    rest_s, rest_i = np.eye(6) - one_s, np.eye(9) - one_i
    parts = ((rest_s, one_i, 5), (one_s, rest_i, 8), (rest_s, rest_i, 40))
    a, b, e = (matrix.ravel() @ np.kron(s, i) @ matrix.ravel() / df for s, i, df in parts)
    df = (a + b - e) ** 2 / (a**2 / 5 + b**2 / 8 + e**2 / 40)
    half = stats.t.ppf(0.975, df) * math.sqrt((a + b - e) / 54)
    expected = matrix.mean() - half, matrix.mean() + half
    assert crossed_interval(matrix) == pytest.approx(expected)
    matrix -= matrix.mean(axis=0)  # no image differs from another: the interval of the runs
    assert crossed_interval(matrix) == pytest.approx(summarise(matrix.mean(axis=1))[2:])


@pytest.mark.parametrize("images", [1000, 1003])
def test_images_interval_from_the_bits_of_the_runs(images):
    rng = np.random.default_rng(7)
    hard, luck = rng.beta(0.2, 2, images), rng.random((2, 10, images))
    un, sgd = luck[0] < 0.8 * hard, luck[1] < hard
    runs = make_runs({"un": list(un.mean(axis=1)), "b-sgd": list(sgd.mean(axis=1))})
    runs["wrong"] = [pack_wrong(bits) for bits in (*un, *sgd)]
    row = only(compare(runs, [UN]))
    low, high = row["ci_images_low"], row["ci_images_high"]
    assert (low, high) == pytest.approx(crossed_interval(100 * (un.astype(float) - sgd)))
    assert low < row["ci_low"] < row["difference"] < row["ci_high"] < high
    early = only(compare(runs, [plan_comparison("early", "un", "b-sgd", "test_error_10")]))
    assert math.isnan(early["ci_images_low"])  # the bits are of the end


def test_bits_go_through_text_and_damage_is_named():
    wrong = np.random.default_rng(8).random(10_000) < 0.02
    text = pack_wrong(wrong)
    np.testing.assert_array_equal(unpack_wrong(text), wrong)
    assert len(text) < 1000
    with pytest.raises(UserError, match="damaged"):
        unpack_wrong(text[:-8])
    runs = make_runs({"un": [0.02, 0.03], "b-sgd": [0.02, 0.03]}, wrong=text)
    with pytest.raises(UserError, match="do not agree"):
        compare(runs, [UN])


def test_arms_beside_one_baseline_are_ranked_and_named_comparisons_stay_where_they_are():
    errors = {"base": [0.5, 0.5], "a": [0.6, 0.62], "b": [0.3, 0.32], "c": [0.4, 0.42]}
    both = pd.concat([make_runs(errors), make_runs(errors | {"b": [0.7, 0.72]}, dataset="x")])
    plans = [plan_comparison("first", "a", "base")]
    plans += [plan_comparison(f"{arm} − base", arm, "base") for arm in "abc"]
    plans += [plan_comparison("last", "b", "base")]
    found = compare(both, plans)
    # b is better in one place and worse in the other: behind c by the mean
    assert list(found["arm"]) == ["a", "a", "c", "c", "b", "b", "a", "a", "b", "b"]
    assert list(found["dataset"]) == ["mnist", "x"] * 5


def test_a_factor_that_varies_within_an_arm_makes_a_comparison_of_each_level():
    near = make_runs({"un": [0.01, 0.02], "b-sgd": [0.02, 0.02]}, spread=0.0)
    far = make_runs({"un": [0.01, 0.02], "b-sgd": [0.05, 0.06]}, spread=2.0)
    table = compare(pd.concat([near, far]), [UN])
    assert list(table["level"]) == ["spread 0", "spread 2"]
    np.testing.assert_allclose(table["difference"], [-0.5, -4.0])
    fixed = pd.concat([near, far[far["arm"] == "un"]])  # the baseline at one level alone
    np.testing.assert_allclose(compare(fixed, [UN])["difference"], [-0.5, -0.5])
    assert list(rank(pd.concat([near, far]))["level"]) == ["spread 0", "spread 2"] * 2


def test_each_data_set_and_network_has_its_row_where_there_are_runs():
    one = make_runs({"un": [0.01, 0.02], "b-sgd": [0.02, 0.02]})
    other = make_runs({"un": [0.03, 0.02], "b-sgd": [0.01, 0.01]}, network="lenet", depth=0)
    third = make_runs({"un": [0.03, 0.02]}, dataset="fashion", depth=4)
    tuning = make_runs({"un": [0.9], "b-sgd": [0.9]}, purpose="tune", depth=8)
    unknown = plan_comparison("x", "sm", "b-sgd")  # which has no runs yet
    table = compare(pd.concat([one, other, third, tuning]), [UN, unknown])
    names = [name_place(row) for row in table.to_dict("records")]
    assert names == ["fashion, depth 4", "mnist, depth 2", "mnist, lenet"]
    assert list(table["n"]) == [0, 2, 2]
    assert list(table["n_left_out"]) == [0, 0, 0]


def test_two_runs_of_one_seed_are_named():
    runs = make_runs({"un": [0.02], "b-sgd": [0.02]})
    with pytest.raises(UserError, match=r"'b-sgd' has more than one .* seed 0"):
        compare(pd.concat([runs, runs[runs["arm"] == "b-sgd"]]), [UN])


def test_a_run_that_stopped_before_the_budget_keeps_its_last_value():
    runs = make_runs({"un": [0.02, 0.03, 0.04]})
    runs = runs.assign(epochs=[8, 12, 12], test_error_10=[math.nan, 0.05, math.nan])
    np.testing.assert_allclose(metric_values(runs, "test_error_10"), [2, 5, math.nan])


def tuning(errors: dict[tuple[float, ...], list[float]]) -> pd.DataFrame:
    """Runs by the filters' rate, the rest's and the decay (0 if not given)."""
    return pd.concat(
        make_runs({"un": values}, "tune", filters_rate=f, rest_rate=r, decay=sum(eta))
        for (f, r, *eta), values in errors.items()
    )


def test_best_rates_have_the_lowest_mean_validation_error():
    runs = tuning({
        (0.1, 0.1): [0.01, math.nan],  # diverged once: (1 + 100) / 2
        (0.1, 0.01): [0.03, 0.03], (0.01, 0.1): [0.02, 0.03], (0.01, 0.01): [0.02, 0.02],
        (0.001, 0.01): [0.05, 0.01],
    })  # fmt: skip
    best = only(choose_rates(runs))
    assert (best["filters_rate"], best["rest_rate"], best["val_error"]) == (0.01, 0.01, 2.0)
    assert best["is_at_edge"]  # the smallest rate of the rest
    assert best["n_agreeing"] == 0  # alone, one seed would have diverged, one have been misled
    table = rate_means(runs).set_index(["filters_rate", "rest_rate"])
    found = table.loc[(0.1, 0.1), ["val_error", "healthy_error", "n_diverged"]]
    assert list(found) == pytest.approx([50.5, 1.0, 1])
    assert table["is_best"].sum() == 1
    assert table["ci_low"].min() == 0  # no error is below it


def test_ties_go_to_the_larger_rate_and_one_rate_alone_has_no_edge():
    middle = tuning({(r, 0.1): [0.02, 0.04] for r in (0.01, 0.1)} | {(1.0, 0.1): [0.05, 0.05]})
    best = only(choose_rates(middle))
    assert (best["filters_rate"], best["is_at_edge"], best["n_agreeing"]) == (0.1, False, 2)
    lost = only(choose_rates(tuning({(r, r): [math.nan] * 2 for r in (0.1, 1.0)})))
    assert (lost["filters_rate"], lost["n"], lost["n_diverged"]) == (1.0, 2, 2)
    assert lost["is_at_edge"]


@pytest.mark.parametrize(("best", "edge"), [(0.0, False), (0.1, False), (0.5, True)])
def test_a_decay_is_chosen_with_the_rates_and_no_decay_is_no_edge(best, edge):
    runs = tuning({(0.1, 0.1, eta): [0.02 + abs(eta - best)] * 2 for eta in (0.0, 0.1, 0.5)})
    row = only(choose_rates(runs))
    assert (row["decay"], row["is_at_edge"]) == (best, edge)


def test_rank_puts_the_lowest_mean_first_and_what_always_diverged_last():
    runs = make_runs(
        {"b-sgd": [0.03, 0.05], "un": [0.01, 0.02, math.nan], "sm": [math.nan], "sgd": [0.04, 0.04]}
    )
    table = rank(runs)
    assert list(table["arm"]) == ["un", "b-sgd", "sgd", "sm"]
    assert list(table["rank"]) == [1, 2, 2, 4]
    assert list(table["n"]) == [2, 2, 2, 0]
    assert list(table["n_diverged"]) == [1, 0, 0, 1]
    assert table["mean"].iloc[0] == pytest.approx(1.5)
    half = 12.706205 * math.sqrt(0.5) / math.sqrt(2)  # t table, one degree
    assert table["ci_high"].iloc[0] == pytest.approx(1.5 + half, abs=1e-6)
    assert table["ci_low"].iloc[0] == 0  # 1.5 − half is no error


def test_what_halving_has_kept_stands_for_a_rate_of_the_filters():
    """Not what was lucky with its one seed, which would hide the chosen rates in the figure."""
    lucky = make_runs({"un": [0.01]}, "tune", rest_rate=0.1)
    kept = make_runs({"un": [0.02, 0.02]}, "tune", rest_rate=1.0)
    (row,) = profile_rates(rate_means(pd.concat([lucky, kept]))).to_dict("records")
    assert (row["rest_rate"], row["n"], row["is_best"]) == (1.0, 2, True)
