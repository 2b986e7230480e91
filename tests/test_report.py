"""The report from fixed records: numbers against hand-made ones, and what every file must hold.

The expected numbers are written out separately in float64 (sums, a numerical integral for
Student's t, all signs by enumeration for Wilcoxon), never by the library calls of the report.
"""

import io
import itertools
import math
import xml.etree.ElementTree as ET

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image
from rich.console import Console

from unitnorm.errors import UserError
from unitnorm.report import statistics, style, tables
from unitnorm.report.statistics import Summary
from unitnorm.table2 import figures, report

NINE = (
    "b-sgd", "un", "un-momentum", "un-nesterov", "un-adam", "sm", "normalize", "weight-norm",
    "sgd-wd",
)  # fmt: skip


def make_runs(errors: dict, failed: tuple = (), epochs: int = 4) -> pd.DataFrame:
    """Runs from {(depth, update): test errors}; a run in `failed` has met a non-finite loss."""
    rows = []
    for (depth, update), values in errors.items():
        for run, error in enumerate(values):
            bad = (depth, update, run) in failed
            rows.append(
                {
                    "depth": depth, "update": update, "run": run, "seed": 7, "base_lr": 0.01,
                    "epochs": 2 if bad else epochs - run % 2,
                    "train_loss": math.nan if bad else 0.01,
                    "val_error": math.nan if bad else 0.02,
                    "test_error": math.nan if bad else error,
                    "diverged": bad, "stop_reason": "non-finite" if bad else "val-rise",
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def make_history(runs: pd.DataFrame) -> pd.DataFrame:
    """A history for the runs: smooth curves, growing and ending in NaN where a run failed."""
    rows = []
    for run in runs.to_dict("records"):
        for epoch in range(1, run["epochs"] + 1):
            last = run["diverged"] and epoch == run["epochs"]
            loss = (1000.0 if run["diverged"] else 0.3) / epoch + 0.01 * run["run"]
            rows.append(
                {
                    "depth": run["depth"], "update": run["update"], "run": run["run"],
                    "epoch": epoch, "lr": 0.01 * 0.5**epoch,
                    "train_loss": math.nan if last else loss,
                    "train_error": 0.01, "val_error": 0.02 + 0.05 / epoch + 0.001 * run["run"],
                    "norm_deviation": math.nan if last else 1e-7 * epoch * (1 + run["run"]),
                    "norm_mean": 1.0,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def make_sweep(runs: pd.DataFrame) -> pd.DataFrame:
    rows = [
        {
            "depth": run["depth"], "update": run["update"], "run": run["run"], "seed": run["seed"],
            "base_lr": rate, "val_error": 0.1 + 0.01 * run["run"] if rate == 0.01 else 0.5,
            "train_loss": 0.2, "diverged": rate == 0.1, "chosen": rate == 0.01,
        }
        for run in runs.to_dict("records")
        for rate in (0.1, 0.01, 0.001)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def make_filters(runs: pd.DataFrame, shape: tuple[int, int] = (28, 28)) -> dict:
    rng = np.random.default_rng(0)
    keys = dict.fromkeys(zip(runs["depth"], runs["update"], strict=True))
    return {key: rng.normal(size=(64, math.prod(shape))) / math.prod(shape) ** 0.5 for key in keys}


def records(runs: pd.DataFrame) -> tuple:
    return runs, make_history(runs), make_sweep(runs), make_filters(runs)


def like_the_paper(failed: tuple = (), updates=("b-sgd", "un"), depths=(2, 4), n=10, epochs=4):
    rng = np.random.default_rng(1)
    means = {"b-sgd": 0.0204, "un": 0.0185}
    return make_runs(
        {
            (depth, update): (means.get(update, 0.02) + rng.normal(0, 0.001, n)).round(4)
            for depth in depths
            for update in updates
        },
        failed,
        epochs,
    )


def student_p(t: float, df: int) -> float:
    """The two-sided p-value of Student's t by Simpson's rule, in float64."""
    x = np.linspace(0.0, abs(t), 20001)
    density = (1 + x**2 / df) ** (-(df + 1) / 2)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    h = x[1]
    area = (
        h / 3 * (density[0] + density[-1] + 4 * density[1:-1:2].sum() + 2 * density[2:-1:2].sum())
    )
    return 1 - 2 * scale * area


def signed_rank_p_by_enumeration(differences) -> float:
    """Two-sided: the share of all 2^n sign patterns whose rank sum is at least as far out."""
    d = [x for x in differences if x != 0]
    size = [abs(x) for x in d]
    rank = [
        sum(b < a for b in size) + (sum(b == a for b in size) + 1) / 2 for a in size
    ]  # middle ranks of ties
    total, centre = sum(r for r, x in zip(rank, d, strict=True) if x > 0), sum(rank) / 2
    patterns = itertools.product((0, 1), repeat=len(d))
    far = [
        abs(sum(r for r, up in zip(rank, p, strict=True) if up) - centre)
        >= abs(total - centre) - 1e-9
        for p in patterns
    ]
    return sum(far) / len(far)


def prepared(runs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    ready = report.prepare_runs(runs)
    return ready, report.prepare_history(make_history(runs), ready)


def summed(runs: pd.DataFrame, **options) -> pd.DataFrame:
    return report.summarise_errors(report.prepare_runs(runs), **options)


def compared(runs: pd.DataFrame) -> pd.DataFrame:
    return report.compare_updates(report.prepare_runs(runs))


def text_of(runs: pd.DataFrame, name: str = "table2.md", **options) -> str:
    """A file of the report, with the padding of its Markdown cells taken away."""
    content = report.build_texts(*prepared(runs), make_sweep(runs), **options)[name]
    return "\n".join(" ".join(line.split()) for line in content.splitlines())


# --- Table 2 ---------------------------------------------------------------------------------


def test_table2_against_hand_made_numbers():
    errors = [0.0201, 0.0189, 0.0215, 0.0198, 0.0176, 0.0222, 0.0208, 0.0190, 0.0185, 0.0216]
    row = summed(make_runs({(2, "un"): errors})).iloc[0]
    mean = sum(errors) / 10
    std = math.sqrt(sum((e - mean) ** 2 for e in errors) / 9)
    half = 2.2621571627409915 * std / math.sqrt(10)  # Student's t, 9 degrees of freedom, 97.5 %
    expected = [10, 0, mean, std, mean - half, mean + half, 0.0199, 0.0046]
    got = row[["n", "diverged", "mean", "std", "ci_low", "ci_high", "paper_mean", "paper_std"]]
    np.testing.assert_allclose(got.to_numpy(float), expected, rtol=1e-10)


def test_table2_has_the_paper_beside_its_four_cells_and_nothing_beside_others():
    runs = like_the_paper(updates=("b-sgd", "un", "un-adam"), depths=(2, 3, 4), n=2)
    table = summed(runs)
    paper = {(r.depth, r.update): (r.paper_mean, r.paper_std) for r in table.itertuples()}
    printed = {
        (2, "b-sgd"): (0.0206, 0.0024), (2, "un"): (0.0199, 0.0046),
        (4, "b-sgd"): (0.0204, 0.0027), (4, "un"): (0.0179, 0.0025),
    }  # fmt: skip
    assert {key: value for key, value in paper.items() if not math.isnan(value[0])} == printed
    assert len(paper) == 9
    columns = "depth,update,n,diverged,mean,std,ci_low,ci_high,paper_mean,paper_std"
    assert ",".join(table.columns) == columns
    assert summed(runs, paper={})["paper_mean"].isna().all()
    assert "Not set beside the paper" in text_of(runs, paper={})


def test_diverged_runs_are_counted_listed_and_left_out_of_the_mean():
    runs = make_runs({(2, "un"): [0.02, 0.5, 0.03, 0.04]}, failed=((2, "un", 1),))
    # A run can end with finite but worthless numbers, and is then left out all the same.
    runs.loc[1, ["test_error", "val_error"]] = 0.9
    row = summed(runs).iloc[0]
    assert (row["n"], row["diverged"]) == (3, 1)
    assert row["mean"] == pytest.approx(0.03, abs=1e-15)
    # 'non-finite' alone is enough, whatever the column `diverged` says.
    assert summed(runs.assign(diverged=False)).iloc[0]["n"] == 3
    assert summed(runs.assign(stop_reason="val-rise")).iloc[0]["n"] == 3
    for name in ("table2.md", "runs.md"):
        assert "| 2 | UN | 1 | 7 | 0.01 | 2 | non-finite |" in text_of(runs, name)
    assert text_of(like_the_paper(), "runs.md").endswith("No run has failed.")


def test_two_runs_one_run_and_none():
    failed = ((2, "un", 0), (2, "sm", 0))
    runs = make_runs(
        {(2, "b-sgd"): [0.02, 0.03], (2, "un"): [0.5, 0.025], (2, "sm"): [0.5]}, failed
    )
    two, one, none = summed(runs).to_dict("records")
    assert two["std"] == pytest.approx(0.01 / math.sqrt(2))
    assert two["ci_high"] - two["mean"] == pytest.approx(12.706204736432095 * 0.005)
    assert (one["n"], one["mean"]) == (1, 0.025)
    assert all(math.isnan(one[key]) for key in ("std", "ci_low", "ci_high"))
    assert (none["n"], none["diverged"]) == (0, 1)
    assert all(math.isnan(none[key]) for key in ("mean", "std", "ci_low", "ci_high"))
    text = text_of(runs)
    assert "| 2 | UN | 1 | 1 | 0.0250 ± – | – | 0.0199 ± 0.0046 |" in text
    assert "| 2 | sm | 0 | 1 | – | – | – |" in text
    assert "nan" not in text


# --- paired differences ----------------------------------------------------------------------


def test_paired_differences_against_hand_made_numbers():
    base = [0.0201, 0.0189, 0.0215, 0.0198, 0.0176, 0.0222, 0.0208]
    ours = [0.0195, 0.0190, 0.0199, 0.0180, 0.0170, 0.0210, 0.0211]
    row = compared(make_runs({(4, "un"): ours, (4, "b-sgd"): base})).iloc[0]
    d = [a - b for a, b in zip(ours, base, strict=True)]
    mean = sum(d) / 7
    std = math.sqrt(sum((x - mean) ** 2 for x in d) / 6)
    half = 2.4469118511449692 * std / math.sqrt(7)  # Student's t, 6 degrees of freedom, 97.5 %
    assert (row["depth"], row["update"], row["baseline"]) == (4, "un", "b-sgd")
    assert (row["n"], row["left_out"]) == (7, 0)
    np.testing.assert_allclose(
        row[["mean", "std", "ci_low", "ci_high"]].to_numpy(float),
        [mean, std, mean - half, mean + half],
        rtol=1e-9,
    )
    assert row["p_t"] == pytest.approx(student_p(mean / std * math.sqrt(7), 6), rel=1e-8)
    # 0.0195 − 0.0201 and 0.0170 − 0.0176 are equal, though not in their last bits.
    tenths = [round(x * 1e4) for x in d]
    assert row["p_wilcoxon"] == pytest.approx(signed_rank_p_by_enumeration(tenths), rel=1e-12)


@pytest.mark.parametrize(
    "differences",
    [[1, 2, 3, 4, 5], [-1, 2, 3, -4, 5, 6, -7, 8], [1, 1, -1, 2, 2, 3, 0, 0], [5, -5],
     [-3, -3, -3, 1], [2, -7, 1, 8, 2, 8, -1, 8, 2, 8]],
)  # fmt: skip
def test_signed_rank_p_is_the_enumeration_of_all_signs(differences):
    expected = signed_rank_p_by_enumeration(differences)
    got = statistics.signed_rank_p(np.array(differences, float))
    assert got == pytest.approx(expected, rel=1e-12)
    assert statistics.signed_rank_p(-np.array(differences, float)) == pytest.approx(got, rel=1e-12)


def test_welch_of_two_summaries_is_welch_of_equal_sizes_written_out():
    # With equal n and std the degrees of freedom are 2(n − 1) and t = Δ/(std √(2/n)).
    ours, theirs = (Summary(mean, 0.5, math.nan, math.nan) for mean in (1.0, 1.4))
    found, p = statistics.compare_means(ours, 8, theirs, 8)
    assert found.mean == pytest.approx(-0.4)
    assert p == pytest.approx(student_p(0.4 / (0.5 * math.sqrt(2 / 8)), 14), rel=1e-8)
    half = 2.1447866879169273 * 0.5 * math.sqrt(2 / 8)  # Student's t, 14 degrees, 97.5 %
    assert (found.ci_low, found.ci_high) == pytest.approx((-0.4 - half, -0.4 + half))
    # Only one of the two varies: as many degrees of freedom as it has.
    fixed = Summary(1.4, 0.0, math.nan, math.nan)
    _, p = statistics.compare_means(ours, 8, fixed, 3)
    assert p == pytest.approx(student_p(0.4 / (0.5 / math.sqrt(8)), 7), rel=1e-8)
    assert math.isnan(statistics.compare_means(ours, 1, theirs, 8)[1])


def test_a_pair_is_left_out_where_either_run_failed_or_the_seeds_differ():
    runs = make_runs(
        {(2, "b-sgd"): [0.02, 0.9, 0.03, 0.02, 0.02], (2, "un"): [0.01, 0.02, 0.9, 0.01, 0.03]},
        failed=((2, "b-sgd", 1), (2, "un", 2)),
    )
    row = compared(runs).iloc[0]
    assert (row["n"], row["left_out"]) == (3, 2)
    assert row["mean"] == pytest.approx((-0.01 - 0.01 + 0.01) / 3)
    runs.loc[(runs["update"] == "un") & (runs["run"] == 3), "seed"] = 8
    row = compared(runs).iloc[0]
    assert (row["n"], row["left_out"]) == (2, 3)
    assert row["mean"] == pytest.approx(0.0, abs=1e-15)


def test_differences_with_few_or_equal_pairs_are_defined():
    one = make_runs({(2, "b-sgd"): [0.02], (2, "un"): [0.01]})
    row = compared(one).iloc[0]
    assert row["n"] == 1
    assert row["mean"] == pytest.approx(-0.01)
    assert row[["std", "ci_low", "ci_high", "p_t", "p_wilcoxon"]].isna().all()
    # The differences are all 0.0005, but float64 has them differ by 1e-18.
    equal = make_runs({(2, "b-sgd"): [0.0200, 0.0210, 0.0220], (2, "un"): [0.0205, 0.0215, 0.0225]})
    row = compared(equal).iloc[0]
    assert row["std"] == pytest.approx(0, abs=1e-12)
    assert row[["p_t", "p_wilcoxon"]].isna().all()
    failed = compared(make_runs({(2, "b-sgd"): [0.1], (2, "un"): [0.1]}, ((2, "un", 0),)))
    assert failed.iloc[0]["n"] == 0
    assert math.isnan(failed.iloc[0]["mean"])


def test_without_the_baseline_there_is_nothing_to_compare():
    runs = make_runs({(2, "un"): [0.02, 0.03], (4, "b-sgd"): [0.02], (4, "sm"): [0.01]})
    assert list(compared(runs)["depth"]) == [4]
    assert compared(runs[runs["depth"] == 2]).empty
    assert "- No depth has runs of the baseline" in text_of(runs[runs["depth"] == 2])


# --- what is said ----------------------------------------------------------------------------


def test_the_remarks_say_no_more_than_the_interval_does():
    base = np.full(10, 0.02)
    noise = np.array([1, -1, 2, -2, 3, -3, 4, -4, 5, -5]) * 1e-4
    runs = make_runs(
        {
            (2, "b-sgd"): base, (2, "un"): base - 2e-4 + noise,
            (4, "b-sgd"): base, (4, "un"): base - 8e-4 + noise,
            (6, "b-sgd"): base, (6, "un"): base + 8e-4 + noise,
            (7, "b-sgd"): base, (7, "un"): base - 8e-4,
            (8, "b-sgd"): base[:1], (8, "un"): base[:1],
        },
        failed=((4, "un", 9),),
    )  # fmt: skip
    said = report.remark(summed(runs, paper={}), compared(runs))
    # std 1e-4·√(110/9); half width 2.262 std/√10 = 2.50e-4; t = −2/1.106
    assert said[0] == (
        "Depth 2: UN − B-SGD = −0.02 points (95 % interval −0.05 to +0.01, n = 10 pairs, "
        "p = 0.104): no difference shown."
    )
    assert said[1].startswith("Depth 4: UN − B-SGD = −0.07 points (95 % interval ")
    assert "n = 9 pairs, 1 left out" in said[1]
    assert said[1].endswith("UN has the lower error.")
    assert said[2].endswith("p < 0.001): B-SGD has the lower error.")
    assert "(n = 10 pairs); too few pairs or no spread to test." in said[3]
    assert "(n = 1 pair); too few pairs" in said[4]


def test_agreement_with_the_paper_is_stated_either_way():
    close = make_runs({(2, "un"): [0.0199, 0.0201], (3, "un"): [0.9, 0.9]})
    assert "- 1 of 1 means lie within the paper's standard deviation" in text_of(close)
    far = make_runs({(2, "un"): [0.0199, 0.0201], (4, "un"): [0.0229, 0.0229], (4, "b-sgd"): [0.0]})
    said = text_of(far)
    assert "- 1 of 3 means lie within" in said
    assert "not depth 4, B-SGD (−7.6 std), depth 4, UN (+2.0 std)" in said


def test_the_papers_own_evidence_is_computed_from_its_means_and_deviations():
    """The t of Welch's test and its degrees of freedom by hand; p by a numerical integral."""
    said = text_of(like_the_paper())
    for depth, (a, sa), (b, sb) in (
        (2, (0.0199, 0.0046), (0.0206, 0.0024)),
        (4, (0.0179, 0.0025), (0.0204, 0.0027)),
    ):
        va, vb = sa**2 / 10, sb**2 / 10
        df = (va + vb) ** 2 / (va**2 / 9 + vb**2 / 9)
        p = student_p((a - b) / math.sqrt(va + vb), df)
        assert (
            f"{100 * (a - b):.2f} points at depth {depth} (p = {p:.2g})".replace("-", "−") in said
        )
    assert "(p = 0.68)" in said
    assert "(p = 0.046)" in said
    row = summed(like_the_paper()).set_index(["depth", "update"])
    ratio = (row["paper_std"] / row["std"]).max()
    assert f"to {ratio:.1f} times ours, most at depth 2 with UN" in said


def test_several_comparisons_are_said_not_to_be_corrected():
    assert "Not corrected for there being 4 comparisons" in text_of(
        like_the_paper(updates=("b-sgd", "un", "sm"))
    )
    assert "corrected" not in text_of(like_the_paper())


def test_how_the_runs_went_and_the_sweep_are_summed_up():
    runs = like_the_paper(failed=((4, "un", 3),))
    text = text_of(runs, "runs.md")
    # Run 8 has 4 epochs: 1e-7 · 4 · 9; run 9 has 3: 1e-7 · 3 · 10.
    row = "| 4 | UN | 10 | 2–4 (3.5) | non-finite (1), val-rise (9) | 0.01 (10) | 3.6e-06 |"
    assert row in text
    sweep = report.summarise_sweep(make_sweep(runs)).iloc[:3]
    assert list(sweep["base_lr"]) == [0.1, 0.01, 0.001]
    assert list(sweep["diverged"]) == [10, 0, 0]
    assert list(sweep["chosen"]) == [0, 10, 0]
    assert math.isnan(sweep["val_error"].iloc[0])
    assert sweep["val_error"].iloc[1] == pytest.approx(0.145)
    assert "| 2 | B-SGD | 0.1 | 10 | 10 | – | 0 |" in text


def test_carried_mean_keeps_the_last_value_of_a_stopped_run():
    values = np.array([[4.0, 2.0, 1.0], [8.0, 8.0, np.nan], [1.0, np.nan, np.nan]])
    np.testing.assert_allclose(statistics.carry_mean(values), [13 / 3, 11 / 3, 10 / 3])
    np.testing.assert_allclose(
        statistics.carry_mean(values, geometric=True), np.cbrt([32.0, 16.0, 8.0])
    )


def test_outliers_lie_beyond_tukeys_fences():
    # Quartiles 2 and 4, fences −1 and 7: what lies on one is inside.
    found = statistics.find_outliers(np.array([2.0, 2, 3, 4, 4, 7, 2, 3, 4]))
    assert not found.any()
    found = statistics.find_outliers(np.array([2.0, 2, 3, 4, 4, 7.1, -1.1, 3]))
    assert list(np.flatnonzero(found)) == [5, 6]
    assert not statistics.find_outliers(np.array([0.0, 0, 100])).any()


# --- two folders -----------------------------------------------------------------------------


def test_two_folders_are_paired_where_seeds_agree():
    a = make_runs({(2, "un"): [0.02, 0.03, 0.05, 0.9], (3, "un"): [0.1]}, failed=((2, "un", 3),))
    b = make_runs({(2, "un"): [0.01, 0.04, 0.02], (2, "sm"): [0.1, 0.1]})
    table = report.compare_folders(*map(report.prepare_runs, (a, b)))
    (row,) = table.to_dict("records")
    assert (row["depth"], row["update"], row["test"], row["n"]) == (2, "un", "paired", 3)
    assert (row["n_first"], row["n_second"]) == (3, 3)
    assert row["mean_first"] == pytest.approx(0.1 / 3)
    d = np.array([-0.01, 0.01, -0.03])
    std = math.sqrt(((d + 0.01) ** 2).sum() / 2)
    assert row["difference"] == pytest.approx(-0.01)
    assert row["p"] == pytest.approx(student_p(0.01 / std * math.sqrt(3), 2), rel=1e-7)
    half = 4.302652729696142 * std / math.sqrt(3)  # Student's t, 2 degrees of freedom, 97.5 %
    assert row["ci_high"] - row["difference"] == pytest.approx(half)


def test_two_folders_of_other_seeds_are_not_paired():
    a, b = (make_runs({(2, "un"): errors}) for errors in ([0.02, 0.03], [0.04, 0.05, 0.06]))
    b["seed"] = 8
    (row,) = report.compare_folders(*map(report.prepare_runs, (a, b))).to_dict("records")
    assert (row["test"], row["n"]) == ("Welch", 0)
    assert row["difference"] == pytest.approx(0.025)
    va, vb = 5e-5 / 2, 1e-4 / 3
    df = (va + vb) ** 2 / (va**2 / 1 + vb**2 / 2)
    assert row["p"] == pytest.approx(student_p(0.025 / math.sqrt(va + vb), df), rel=1e-6)
    with pytest.raises(UserError, match="x and y share no depth and update"):
        report.build_comparison(a, make_runs({(3, "un"): [0.1]}), ("x", "y"))


def test_a_comparison_tells_both_folders_apart_in_table_terminal_and_figure():
    a = like_the_paper()
    b = a.assign(test_error=a["test_error"] - 0.001 * (a["update"] == "un") * (a["run"] % 2))
    files, both = report.build_comparison(a, b, ("runs/a", "runs/b"))
    assert set(files) == {f"comparison.{ending}" for ending in ("csv", "md", "png", "svg")}
    shown = printed(both, 80)
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
    for text in (files["comparison.md"].decode(), shown):
        assert "A: runs/a. B: runs/b." in text
        assert "equal (10)" in text  # B-SGD: the same runs
        assert "−0.05" in text
        for row in pd.concat([compared(a), compared(b)]).to_dict("records"):
            assert f"{100 * row['mean']:.2f} ±".replace("-", "−") in text
    own = pd.concat([compared(a).assign(folder="x"), compared(b).assign(folder="y")])
    table = report.compare_folders(*map(report.prepare_runs, (a, b)))
    left, right = figures.draw_comparison(table, own, ("x", "y")).axes
    drawn = [
        np.asarray(line.get_xdata(), float) for line in left.lines if line.get_marker() in "os"
    ]
    np.testing.assert_allclose(drawn, 100 * table[["mean_first", "mean_second"]].to_numpy().T)
    drawn = [
        np.asarray(line.get_xdata(), float) for line in right.lines if line.get_marker() in "os"
    ]
    np.testing.assert_allclose(drawn, [100 * compared(runs)["mean"] for runs in (a, b)])


# --- text files and terminal ------------------------------------------------------------------


def test_csv_holds_every_digit_and_empty_fields_for_nan():
    runs = like_the_paper(updates=("b-sgd", "un", "sm"))
    for frame in (summed(runs), compared(runs)):
        text = tables.to_csv(frame)
        back = pd.read_csv(io.StringIO(text)).astype(frame.dtypes)
        pd.testing.assert_frame_equal(back, frame, rtol=1e-14, atol=0)
        assert "nan" not in text.lower()
        assert "\r" not in text


def test_markdown_and_latex_hold_the_same_cells():
    runs = like_the_paper(updates=("b-sgd", "un", "a_b&c|%"))
    files = report.build_texts(*prepared(runs), make_sweep(runs))
    markdown, latex = files["table2.md"], files["table2.tex"]
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    lines = [line.replace("\\|", "¦").strip("|").split("|") for line in lines]
    lines = [[cell.strip() for cell in line] for line in lines if "---" not in line[0]]
    assert sorted({len(line) for line in lines}) == [7, 8]
    rows = [line.strip()[:-3].split(" & ") for line in latex.splitlines() if line.endswith(r"\\")]
    plain = [
        [
            cell.replace("¦", "|").replace("%", r"\%").replace("&", r"\&").replace("_", r"\_")
            .replace("±", r"$\pm$").replace("−", "$-$").replace("–", "--").replace("|", "$|$")
            .replace("<", "$<$")
            for cell in line
        ]
        for line in lines
    ]  # fmt: skip
    assert len(rows) == 12
    assert rows == plain
    for word in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}", r"\end{table}"):
        assert latex.count(word) == 2
    assert latex.count("{") == latex.count("}")
    assert latex.isascii()
    assert "0.0206 ± 0.0024" in markdown
    assert "| depth | update |" in " ".join(markdown.split())


def printed(shown, width: int | None = None) -> str:
    out = io.StringIO()
    Console(file=out, width=width, _environ={}).print(shown)
    return out.getvalue()


@pytest.mark.parametrize("updates", [("b-sgd", "un"), NINE])
def test_the_terminal_tables_fit_80_columns_with_no_cell_broken(updates):
    runs = like_the_paper(updates=updates, failed=((2, "un", 1),))
    for text in (printed(report.show(runs), 80), printed(report.show(runs))):  # as if piped
        assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
        assert "…" not in text
        assert "\x1b" not in text
        for row in summed(runs).to_dict("records"):
            cell = f"{row['mean']:.4f} ± {row['std']:.4f}"
            interval = f"{row['ci_low']:.4f} to {row['ci_high']:.4f}"
            assert any(cell in line and interval in line for line in text.splitlines())
        assert "0.0206 ± 0.0024" in text
        assert "non-finite" in text
        assert "UN has the lower error" in " ".join(text.split())


def test_a_narrow_terminal_gets_paragraphs_and_loses_nothing():
    runs = like_the_paper(failed=((2, "un", 1),))
    text = printed(report.show(runs), 44)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 44
    words = " ".join(text.split())
    for row in summed(runs).to_dict("records"):
        assert f"mean ± std: {row['mean']:.4f} ± {row['std']:.4f}" in words
        assert f"{row['ci_low']:.4f} to {row['ci_high']:.4f}" in words
    assert "epoch: 2; reason: non-finite" in words


def test_an_update_named_like_markup_is_printed_as_it_is():
    runs = like_the_paper(updates=("b-sgd", "[red]x[/]"), depths=(2,))
    assert "[red]x[/]" in printed(report.show(runs), 80)


# --- figures ----------------------------------------------------------------------------------


def thick(axis) -> list:
    return [line for line in axis.lines if line.get_linewidth() == 2]


def test_curves_show_every_run_to_its_end_and_the_carried_mean():
    runs = make_runs({(2, "b-sgd"): [0.02] * 3, (2, "un"): [0.02] * 3}, failed=((2, "un", 2),))
    figure = figures.draw_curves(prepared(runs)[1])
    error, loss = figure.axes
    assert (error.get_ylabel(), loss.get_ylabel()) == ("validation error [%]", "training loss")
    assert loss.get_xlabel() == "epoch"
    b_sgd, un = thick(loss)
    # Runs 0 and 2 have 4 epochs, run 1 has 3: 0.3/e + 0.01 run, run 1 keeping 0.1 + 0.01.
    expected = [0.3 + 0.01, 0.15 + 0.01, 0.1 + 0.01, (0.075 + 0.11 + 0.095) / 3]
    np.testing.assert_allclose(b_sgd.get_ydata(), expected, rtol=1e-12)
    # Of UN, run 2 failed: the mean is that of runs 0 and 1.
    np.testing.assert_allclose(
        un.get_ydata(), [0.305, 0.155, 0.105, (0.075 + 0.11) / 2], rtol=1e-12
    )
    thin = [line for line in loss.lines if line.get_linewidth() < 1 and len(line.get_xdata()) > 1]
    ends = [np.isfinite(line.get_ydata()).sum() for line in thin]
    assert ends == [4, 3, 4, 4, 3, 1]
    (cross,) = [line for line in loss.lines if line.get_marker() == "x" and len(line.get_xdata())]
    # Its loss of 1000 does not press the others flat: the cross sits on the frame.
    assert loss.get_ylim()[1] < 0.5
    np.testing.assert_allclose(cross.get_ydata(), loss.get_ylim()[1])
    assert "Crosses" in figure.get_supxlabel()
    percent = thick(error)[0].get_ydata()
    np.testing.assert_allclose(percent[0], 100 * (0.07 + 0.001), rtol=1e-12)


def test_learning_rates_have_a_logarithmic_axis_and_a_geometric_mean():
    runs = report.prepare_runs(make_runs({(depth, "un"): [0.02] * 2 for depth in (1, 2, 4)}))
    history = make_history(runs)
    history.loc[(history["run"] == 1), "lr"] *= 100
    figure = figures.draw_rates(report.prepare_history(history, runs))
    assert [axis.get_title("left") for axis in figure.axes] == ["depth 1", "depth 2", "depth 4"]
    for axis in figure.axes:
        assert axis.get_yscale() == "log"
        rates = [0.01 * 0.5**e * 10 for e in (1, 2, 3)] + [0.01 * math.sqrt(0.5**4 * 0.5**3) * 10]
        np.testing.assert_allclose(thick(axis)[0].get_ydata(), rates, rtol=1e-12)


def test_errors_show_points_means_intervals_pairs_and_the_paper():
    runs = like_the_paper(failed=((2, "un", 4), (4, "b-sgd", 0), (4, "b-sgd", 1)))
    table = summed(runs).set_index(["depth", "update"])
    figure = figures.draw_test_errors(report.prepare_runs(runs), report.PAPER)
    for depth, axis in zip((2, 4), figure.axes, strict=True):
        assert axis.get_ylabel() == "test error [%]"
        labels = [text.get_text() for text in axis.get_xticklabels()]
        assert labels == (
            ["B-SGD\nn = 10", "UN\nn = 9\n1 diverged"]
            if depth == 2
            else ["B-SGD\nn = 8\n2 diverged", "UN\nn = 10"]
        )
        drawn = np.concatenate([np.ravel(line.get_ydata()) for line in axis.lines])
        for update in ("b-sgd", "un"):
            row = table.loc[depth, update]
            mask = (runs["depth"] == depth) & (runs["update"] == update)
            healthy = 100 * runs.loc[mask & ~runs["diverged"], "test_error"]
            for value in [*healthy, *(100 * row[["mean", "ci_low", "ci_high", "paper_mean"]])]:
                assert np.isclose(drawn, value, atol=1e-9).any(), (depth, update, value)
        bars = [tuple(line.get_ydata()) for line in thick(axis)]
        means = [100 * table.loc[depth, update]["mean"] for update in ("b-sgd", "un")]
        np.testing.assert_allclose(bars, [(mean, mean) for mean in means], rtol=1e-12)
        connecting = [line for line in axis.lines if line.get_color() == style.PALE]
        assert len(connecting) == compared(runs).set_index("depth").loc[depth, "n"]
        for line in connecting:
            x, y = line.get_data()
            assert np.isclose(100 * runs["test_error"], y[0]).any()
            assert x[1] - x[0] == pytest.approx(1)  # the same place in both columns
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["one run", "mean, 95 % interval", "paper: mean ± std", "pair of runs"]
    elsewhere = figures.draw_test_errors(report.prepare_runs(runs), {})
    assert "paper" not in " ".join(text.get_text() for text in elsewhere.legends[0].get_texts())


def test_runs_that_lie_apart_are_named_in_the_errors_figure():
    errors = [0.0200, 0.0201, 0.0202, 0.0203, 0.0300, 0.0204, 0.0100]
    runs = report.prepare_runs(make_runs({(2, "b-sgd"): errors, (2, "un"): [0.02] * 3}))
    figure = figures.draw_test_errors(runs, {})
    names = {text.get_text(): text.xy[1] for text in figure.axes[0].texts}
    assert names == pytest.approx({"4": 3.0, "6": 1.0})
    assert "1.5 interquartile ranges" in figure.get_supxlabel()


def test_filters_are_images_in_order_on_one_symmetric_scale():
    weights = {name: np.zeros((5, 6)) for name in ("un", "b-sgd")}
    weights["un"][1] = [1, 2, 3, 4, 5, 6]
    weights["b-sgd"][4] = -6
    figure = figures.draw_filters(weights, (2, 3), 4)
    left, right = [axis for axis in figure.axes if axis.images]
    assert (left.get_title("left"), right.get_title("left")) == ("depth 4, B-SGD", "depth 4, UN")
    image = np.asarray(right.images[0].get_array())
    assert image.shape == (2 * 2 + 2, 3 * 3 + 2 * 2)  # 5 images in 2 rows and 3 columns
    # each filter divided by its norm: √91, and 6 √6
    shown = image[0:2, 5:8] * 91**0.5
    np.testing.assert_allclose(shown, [[1, 2, 3], [4, 5, 6]], rtol=1e-12)
    flat = np.asarray(left.images[0].get_array())[4:6, 5:8]
    np.testing.assert_allclose(flat, np.full((2, 3), -(6**-0.5)), rtol=1e-12)
    ((low, high),) = {axis.images[0].get_clim() for axis in (left, right)}
    assert low == -high
    assert 5 / 91**0.5 <= high <= 6 / 91**0.5


def test_filters_that_are_not_finite_are_grey_and_said_so():
    broken = np.full((4, 6), np.nan)
    figure = figures.draw_filters({"un": broken, "b-sgd": np.ones((4, 6))}, (2, 3), 2)
    titles = [axis.get_title("left") for axis in figure.axes if axis.images]
    assert titles == ["depth 2, B-SGD", "depth 2, UN (grey: not finite)"]
    alone = figures.draw_filters({"un": broken}, (2, 3), 2)
    assert set(style.encode(alone)) == {"png", "svg"}


@pytest.mark.parametrize("shape", [(64, 783), (0, 784), (784,)])
def test_filters_of_another_shape_are_refused(shape):
    with pytest.raises(UserError, match=r"filters of un have shape .* 28 × 28"):
        figures.draw_filters({"un": np.zeros(shape)}, (28, 28), 2)


def test_nine_updates_are_told_apart_by_colour_line_and_marker_alike():
    styles = style.assign_styles(NINE)
    for part in zip(*styles.values(), strict=True):
        assert len(set(part)) == 9
    assert styles["b-sgd"] == style.assign_styles(["b-sgd"])["b-sgd"]
    # As seen without red-green or without blue-yellow vision (Machado et al. 2009, severity 1).
    vision = {
        "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
        "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
        "tritan": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
    }
    for matrix in vision.values():
        seen = [np.array(matrix) @ to_rgb(styles[name].colour) for name in ("b-sgd", "un")]
        assert np.linalg.norm(seen[0] - seen[1]) > 0.4
    own = style.assign_styles(["b-sgd", "mine", "yours"])
    assert len(set(own.values())) == 3
    assert style.sort_updates(["sm", "un", "a", "b-sgd", "un"]) == ["b-sgd", "un", "a", "sm"]


@pytest.mark.parametrize(
    ("depths", "updates", "n"),
    [((2, 4), ("b-sgd", "un"), 10), ((1, 2, 3), NINE, 1), ((2,), ("un",), 1)],
)
def test_figures_are_readable_in_a_readme(depths, updates, n):
    runs, history = prepared(like_the_paper(depths=depths, updates=updates, n=n))
    own = report.compare_updates(runs)
    both = pd.concat([own.assign(folder=name) for name in "xy"])
    for figure in (
        figures.draw_curves(history),
        figures.draw_rates(history),
        figures.draw_test_errors(runs, report.PAPER),
        figures.draw_filters({update: np.eye(4) for update in updates}, (2, 2), 2),
        figures.draw_comparison(report.compare_folders(runs, runs), both, ("x", "y")),
    ):
        figure.draw_without_rendering()
        width, height = figure.get_size_inches()
        assert width == 8.3  # 800 pixels at a browser's 96 per inch: a point is a point there
        edges = figure.get_tightbbox()
        assert edges.x0 >= 0
        assert edges.y0 >= 0
        assert edges.x1 <= width
        assert edges.y1 <= height
        sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text()]
        assert min(sizes) >= 9
        for axis in figure.axes:
            low, high = axis.get_xlim()
            names = [
                label.get_window_extent()
                for label in axis.get_xticklabels()
                if low <= label.get_position()[0] <= high
            ]
            assert not any(a.overlaps(b) for a, b in itertools.combinations(names, 2))


def test_figures_of_runs_that_all_failed_are_drawn():
    runs = make_runs({(2, "un"): [0.1, 0.1]}, failed=((2, "un", 0), (2, "un", 1)))
    assert "| 2 | UN | 0 | 2 | – | – | 0.0199 ± 0.0046 |" in text_of(runs)
    history = prepared(runs)[1].assign(train_loss=math.nan, val_error=math.inf)
    assert style.encode(figures.draw_curves(history))["png"][:4] == b"\x89PNG"


def test_an_error_of_zero_takes_the_logarithm_away():
    history = prepared(make_runs({(2, "un"): [0.0]}))[1]
    history.loc[0, "val_error"] = 0.0
    error, loss = figures.draw_curves(history).axes
    assert (error.get_yscale(), loss.get_yscale()) == ("linear", "log")
    assert error.get_ylim()[0] < 0 < error.get_ylim()[1]


# --- the whole ---------------------------------------------------------------------------------


def test_build_gives_every_file_and_the_same_bytes_whatever_the_order_and_settings():
    runs = like_the_paper(failed=((2, "un", 1),), n=3)
    frames = records(runs)
    copies = [frame.copy(deep=True) for frame in frames[:3]]
    files = report.build(*frames)
    pictures = ("curves", "learning_rates", "test_errors", "filters_depth2", "filters_depth4")
    assert set(files) == {
        "table2.csv", "table2.md", "table2.tex", "differences.csv", "runs.md",
        *(f"figures/{name}.{ending}" for name in pictures for ending in ("png", "svg")),
    }  # fmt: skip
    for name, content in files.items():
        if name.endswith(".png"):
            image = Image.open(io.BytesIO(content))
            image.load()
            assert "Software" not in image.info
        elif name.endswith(".svg"):
            root = ET.fromstring(content)
            assert root.tag == "{http://www.w3.org/2000/svg}svg"
            assert b"<dc:date>" not in content
        else:
            assert content.decode().endswith("\n")
            assert not content.endswith(b"\n\n")
    for frame, copy in zip(frames, copies, strict=False):
        pd.testing.assert_frame_equal(frame, copy)  # build leaves its arguments as they were
    before = dict(mpl.rcParams)
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black", "savefig.bbox": "tight"}):
        shuffled = [frame.sample(frac=1, random_state=5) for frame in frames[:3]]
        again = report.build(*shuffled, dict(reversed(frames[3].items())))
    assert [name for name in files if files[name] != again[name]] == []
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.iloc[:0], r"runs.csv holds no rows; run `unitnorm train`"),
        (lambda f: f.assign(test_error=2.06), r"test_error of depth 2, b-sgd, run 0 is 2.06"),
        (lambda f: f.assign(val_error=math.nan), r"run 0 is nan; expected a fraction"),
    ],
)
def test_damaged_runs_end_in_one_clear_line(damage, message):
    runs = damage(like_the_paper(n=2))
    for function in (report.prepare_runs, report.show):
        with pytest.raises(UserError, match=message) as caught:
            function(runs)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f[f["run"] == 0], r"b-sgd, run 1 needs .* found none"),
        (lambda f: f.drop(index=1), r"run 0 needs a row .* found 3 epochs, the last 4"),
        (
            lambda f: f.assign(train_loss=f["train_loss"].where(f.index != 2)),
            r"b-sgd, run 0, epoch 3 holds a value that is not",
        ),
    ],
)
def test_damaged_history_ends_in_one_clear_line(damage, message):
    runs, history, sweep, filters = records(like_the_paper(n=2))
    with pytest.raises(UserError, match=message):
        report.build(runs, damage(history), sweep, filters)


def test_history_of_runs_that_are_not_in_the_records_is_not_shown():
    runs = like_the_paper(n=2)
    ready = report.prepare_runs(runs[runs["update"] == "un"])
    figure = figures.draw_curves(report.prepare_history(make_history(runs), ready))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["UN"]
