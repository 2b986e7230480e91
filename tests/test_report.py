"""The report from fixed records: numbers against hand-made ones, and what every file must hold.

The expected numbers are written out separately in float64 (sums, a numerical integral for
Student's t, all signs by enumeration for Wilcoxon), never by the library calls of the report.
"""

import io
import itertools
import math
import subprocess
import sys
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
from unitnorm.report import (
    build,
    figures,
    paired_differences,
    statistics,
    table2,
    tables,
    terminal,
    verdict,
    write,
)
from unitnorm.report.frames import checked_history, checked_runs, checked_sweep, in_order

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


# --- Table 2 ---------------------------------------------------------------------------------


def test_table2_against_hand_made_numbers():
    errors = [0.0201, 0.0189, 0.0215, 0.0198, 0.0176, 0.0222, 0.0208, 0.0190, 0.0185, 0.0216]
    row = table2(make_runs({(2, "un"): errors})).iloc[0]
    mean = sum(errors) / 10
    std = math.sqrt(sum((e - mean) ** 2 for e in errors) / 9)
    half = 2.2621571627409915 * std / math.sqrt(10)  # Student's t, 9 degrees of freedom, 97.5 %
    expected = [10, 0, mean, std, mean - half, mean + half, 0.0199, 0.0046]
    got = row[["n", "diverged", "mean", "std", "ci_low", "ci_high", "paper_mean", "paper_std"]]
    np.testing.assert_allclose(got.to_numpy(float), expected, rtol=1e-10)


def test_table2_has_the_paper_beside_its_four_cells_and_nothing_beside_others():
    table = table2(like_the_paper(updates=("b-sgd", "un", "un-adam"), depths=(2, 3, 4), n=2))
    paper = {(r.depth, r.update): (r.paper_mean, r.paper_std) for r in table.itertuples()}
    printed = {
        (2, "b-sgd"): (0.0206, 0.0024), (2, "un"): (0.0199, 0.0046),
        (4, "b-sgd"): (0.0204, 0.0027), (4, "un"): (0.0179, 0.0025),
    }  # fmt: skip
    assert {key: value for key, value in paper.items() if not math.isnan(value[0])} == printed
    assert len(paper) == 9
    columns = "depth,update,n,diverged,mean,std,ci_low,ci_high,paper_mean,paper_std"
    assert ",".join(table.columns) == columns
    assert table2(like_the_paper(), paper={})["paper_mean"].isna().all()


def test_diverged_runs_are_counted_and_left_out_of_the_mean():
    runs = make_runs({(2, "un"): [0.02, 0.5, 0.03, 0.04]}, failed=((2, "un", 1),))
    # A run can end with finite but worthless numbers, and is then left out all the same.
    runs.loc[1, ["test_error", "val_error"]] = 0.9
    row = table2(runs).iloc[0]
    assert (row["n"], row["diverged"]) == (3, 1)
    assert row["mean"] == pytest.approx(0.03, abs=1e-15)
    # 'non-finite' alone is enough, whatever the column `diverged` says.
    assert table2(runs.assign(diverged=False)).iloc[0]["n"] == 3
    assert table2(runs.assign(stop_reason="val-rise")).iloc[0]["n"] == 3


def test_two_runs_one_run_and_none():
    failed = ((2, "un", 0), (2, "sm", 0))
    runs = make_runs(
        {(2, "b-sgd"): [0.02, 0.03], (2, "un"): [0.5, 0.025], (2, "sm"): [0.5]}, failed
    )
    two, one, none = table2(runs).to_dict("records")
    assert two["std"] == pytest.approx(0.01 / math.sqrt(2))
    assert two["ci_high"] - two["mean"] == pytest.approx(12.706204736432095 * 0.005)
    assert (one["n"], one["mean"]) == (1, 0.025)
    assert all(math.isnan(one[key]) for key in ("std", "ci_low", "ci_high"))
    assert (none["n"], none["diverged"]) == (0, 1)
    assert all(math.isnan(none[key]) for key in ("mean", "std", "ci_low", "ci_high"))
    text = tables.table2_markdown(table2(runs), paired_differences(runs), pd.DataFrame())
    assert "| 2 | UN | 1 | 1 | 0.0250 ± – | – | 0.0199 ± 0.0046 |" in text
    assert "| 2 | sm | 0 | 1 | – | – | – |" in text
    assert "nan" not in text


def test_order_of_rows_does_not_matter():
    runs = like_the_paper(updates=("un", "sm", "b-sgd"))
    shuffled = runs.sample(frac=1, random_state=3)
    pd.testing.assert_frame_equal(table2(runs), table2(shuffled))
    pd.testing.assert_frame_equal(paired_differences(runs), paired_differences(shuffled))
    assert list(table2(shuffled)["update"][:3]) == ["b-sgd", "un", "sm"]
    assert in_order(["sm", "un", "a", "b-sgd", "un"]) == ["b-sgd", "un", "a", "sm"]


# --- paired differences ----------------------------------------------------------------------


def test_paired_differences_against_hand_made_numbers():
    base = [0.0201, 0.0189, 0.0215, 0.0198, 0.0176, 0.0222, 0.0208]
    ours = [0.0195, 0.0190, 0.0199, 0.0180, 0.0170, 0.0210, 0.0211]
    row = paired_differences(make_runs({(4, "un"): ours, (4, "b-sgd"): base})).iloc[0]
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
    [
        [1, 2, 3, 4, 5],
        [-1, 2, 3, -4, 5, 6, -7, 8],
        [1, 1, -1, 2, 2, 3, 0, 0],
        [5, -5],
        [-3, -3, -3, 1],
        [2, -7, 1, 8, 2, 8, -1, 8, 2, 8],
    ],
)
def test_signed_rank_p_is_the_enumeration_of_all_signs(differences):
    expected = signed_rank_p_by_enumeration(differences)
    got = statistics.signed_rank_p(np.array(differences, float))
    assert got == pytest.approx(expected, rel=1e-12)
    assert statistics.signed_rank_p(-np.array(differences, float)) == pytest.approx(got, rel=1e-12)


def test_a_pair_is_left_out_where_either_run_failed_or_the_seeds_differ():
    runs = make_runs(
        {(2, "b-sgd"): [0.02, 0.9, 0.03, 0.02, 0.02], (2, "un"): [0.01, 0.02, 0.9, 0.01, 0.03]},
        failed=((2, "b-sgd", 1), (2, "un", 2)),
    )
    row = paired_differences(runs).iloc[0]
    assert (row["n"], row["left_out"]) == (3, 2)
    assert row["mean"] == pytest.approx((-0.01 - 0.01 + 0.01) / 3)
    runs.loc[(runs["update"] == "un") & (runs["run"] == 3), "seed"] = 8
    row = paired_differences(runs).iloc[0]
    assert (row["n"], row["left_out"]) == (2, 3)
    assert row["mean"] == pytest.approx(0.0, abs=1e-15)


def test_differences_with_few_or_equal_pairs_are_defined():
    one = make_runs({(2, "b-sgd"): [0.02], (2, "un"): [0.01]})
    row = paired_differences(one).iloc[0]
    assert row["n"] == 1
    assert row["mean"] == pytest.approx(-0.01)
    assert row[["std", "ci_low", "ci_high", "p_t", "p_wilcoxon"]].isna().all()
    # The differences are all 0.0005, but float64 has them differ by 1e-18.
    equal = make_runs({(2, "b-sgd"): [0.0200, 0.0210, 0.0220], (2, "un"): [0.0205, 0.0215, 0.0225]})
    row = paired_differences(equal).iloc[0]
    assert row["std"] == pytest.approx(0, abs=1e-12)
    assert row[["p_t", "p_wilcoxon"]].isna().all()
    failed = paired_differences(make_runs({(2, "b-sgd"): [0.1], (2, "un"): [0.1]}, ((2, "un", 0),)))
    assert failed.iloc[0]["n"] == 0
    assert math.isnan(failed.iloc[0]["mean"])


def test_without_the_baseline_there_is_nothing_to_compare():
    runs = make_runs({(2, "un"): [0.02, 0.03], (4, "b-sgd"): [0.02], (4, "sm"): [0.01]})
    assert list(paired_differences(runs)["depth"]) == [4]
    assert list(paired_differences(runs, baseline="un")["depth"]) == []
    alone = paired_differences(runs[runs["depth"] == 2])
    assert alone.empty
    assert list(alone.columns) == list(statistics.DIFFERENCES)
    assert verdict(alone)[0].startswith("no difference to show")


def test_the_verdict_says_no_more_than_the_interval_does():
    base = np.full(10, 0.02)
    noise = np.array([1, -1, 2, -2, 3, -3, 4, -4, 5, -5]) * 1e-4
    runs = make_runs(
        {
            (2, "b-sgd"): base, (2, "un"): base - 2e-4 + noise,
            (4, "b-sgd"): base, (4, "un"): base - 8e-4 + noise,
            (6, "b-sgd"): base, (6, "un"): base + 8e-4 + noise,
            (7, "b-sgd"): base, (7, "un"): base - 8e-4,
            (8, "b-sgd"): base[:1], (8, "un"): base[:1],
            (9, "b-sgd"): base[:1], (9, "un"): base[:1],
        },
        failed=((4, "un", 9), (9, "un", 0)),
    )  # fmt: skip
    said = dict(zip((2, 4, 6, 7, 8, 9), verdict(paired_differences(runs)), strict=True))
    # std 1e-4·√(110/9); half width 2.262 std/√10 = 2.50e-4; t = −2/1.106
    assert said[2] == (
        "depth 2: no difference shown, UN − B-SGD = −0.02 points "
        "(95 % interval −0.05 to +0.01, n = 10 pairs, p = 0.104)"
    )
    assert said[4].startswith("depth 4: UN's test error is 0.07 points lower than B-SGD's (95 %")
    assert "n = 9 pairs, 1 left out" in said[4]
    assert said[6].startswith("depth 6: UN's test error is 0.08 points higher than B-SGD's")
    assert said[6].endswith("p < 0.001)")
    assert "all differences are equal" in said[7]
    assert "one pair shows nothing" in said[8]
    assert "nothing can be said" in said[9]
    assert "1 left out" in said[9]


def test_agreement_with_the_paper_is_stated_either_way():
    close = make_runs({(2, "un"): [0.0199, 0.0201], (3, "un"): [0.9, 0.9]})
    assert statistics.against_paper(table2(close)).startswith("the mean lies within")
    far = make_runs({(2, "un"): [0.0199, 0.0201], (4, "un"): [0.0229, 0.0229], (4, "b-sgd"): [0.0]})
    said = statistics.against_paper(table2(far))
    assert said.startswith("2 of 3 means do not lie within")
    assert "depth 4, UN (+2.0 of them away)" in said
    assert "depth 4, B-SGD (−7.6 of them away)" in said
    none = make_runs({(2, "un"): [0.0199]}, failed=((2, "un", 0),))
    assert "depth 2, UN (no mean)" in statistics.against_paper(table2(none))


# --- how the runs went ------------------------------------------------------------------------


def test_failed_runs_are_listed_with_epoch_and_reason():
    runs = like_the_paper(failed=((4, "un", 3), (2, "b-sgd", 1)))
    failed = statistics.failed_runs(runs)
    assert failed[["depth", "update", "run", "epoch", "stop_reason"]].to_numpy().tolist() == [
        [2, "b-sgd", 1, 2, "non-finite"],
        [4, "un", 3, 2, "non-finite"],
    ]
    conduct = statistics.conduct(runs, make_history(runs))
    sweep = statistics.sweep_summary(make_sweep(runs))
    for text in (
        tables.runs_markdown(conduct, sweep, failed),
        tables.table2_markdown(table2(runs), paired_differences(runs), failed),
    ):
        assert "| 4 | UN | 3 | 7 | 0.01 | 2 | non-finite |" in text
    assert tables.runs_markdown(conduct, sweep, failed[:0]).endswith("None.\n")


def test_conduct_and_sweep_are_summed_up():
    runs = like_the_paper(failed=((4, "un", 3),))
    conduct = statistics.conduct(runs, make_history(runs)).set_index(["depth", "update"])
    row = conduct.loc[4, "un"]
    assert (row["epochs_min"], row["epochs_max"], row["runs"]) == (2, 4, 10)
    assert row["stop_reasons"] == {"non-finite": 1, "val-rise": 9}
    assert row["base_lrs"] == {0.01: 10}
    # Run 8 has 4 epochs: 1e-7 · 4 · 9; run 9 has 3: 1e-7 · 3 · 10.
    assert row["norm_deviation"] == pytest.approx(36e-7)
    sweep = statistics.sweep_summary(make_sweep(runs)).iloc[:3]
    assert list(sweep["base_lr"]) == [0.1, 0.01, 0.001]
    assert list(sweep["diverged"]) == [10, 0, 0]
    assert list(sweep["chosen"]) == [0, 10, 0]
    assert math.isnan(sweep["val_error"].iloc[0])
    assert sweep["val_error"].iloc[1] == pytest.approx(0.145)


def test_carried_mean_keeps_the_last_value_of_a_stopped_run():
    values = np.array([[4.0, 2.0, 1.0], [8.0, 8.0, np.nan], [1.0, np.nan, np.nan]])
    np.testing.assert_allclose(statistics.carried_mean(values), [13 / 3, 11 / 3, 10 / 3])
    np.testing.assert_allclose(
        statistics.carried_mean(values, geometric=True), np.cbrt([32.0, 16.0, 8.0])
    )


# --- text files and terminal ------------------------------------------------------------------


def test_csv_holds_every_digit_and_empty_fields_for_nan():
    runs = like_the_paper(updates=("b-sgd", "un", "sm"))
    for frame in (table2(runs), paired_differences(runs)):
        text = tables.to_csv(frame)
        back = pd.read_csv(io.StringIO(text)).astype(frame.dtypes)
        pd.testing.assert_frame_equal(back, frame, rtol=1e-14, atol=0)
        assert "nan" not in text.lower()
        assert "\r" not in text


def test_markdown_and_latex_hold_the_same_cells():
    runs = like_the_paper(updates=("b-sgd", "un", "a_b&c|%"))
    table, differences = table2(runs), paired_differences(runs)
    markdown = tables.table2_markdown(table, differences, statistics.failed_runs(runs))
    latex = tables.table2_latex(table, differences)
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    lines = [line.replace("\\|", "¦").strip("| ").split(" | ") for line in lines]
    assert sorted({len(line) for line in lines}) == [7, 8]
    rows = [line.strip()[:-3].split(" & ") for line in latex.splitlines() if line.endswith(r"\\")]
    assert len(rows) == len([line for line in lines if not line[0].startswith("---")]) == 12
    plain = [
        [
            cell.replace("¦", "|").replace("%", r"\%").replace("&", r"\&").replace("_", r"\_")
            .replace("±", r"$\pm$").replace("−", "$-$").replace("–", "--").replace("|", "$|$")
            .replace("<", "$<$")
            for cell in line
        ]
        for line in lines
        if not line[0].startswith("---")
    ]  # fmt: skip
    assert rows == plain
    for word in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}", r"\end{table}"):
        assert latex.count(word) == 2
    assert latex.count("{") == latex.count("}")
    assert latex.isascii()
    assert "0.0206 ± 0.0024" in markdown


def test_several_comparisons_are_said_not_to_be_corrected():
    def text(updates):
        runs = like_the_paper(updates=updates)
        return tables.table2_markdown(table2(runs), paired_differences(runs), pd.DataFrame())

    assert "Not corrected for there being 4 comparisons" in text(("b-sgd", "un", "sm"))
    assert "corrected" not in text(("b-sgd", "un"))


def printed(runs: pd.DataFrame, width: int | None = None) -> str:
    out = io.StringIO()
    Console(file=out, width=width, _environ={}).print(terminal(runs))
    return out.getvalue()


@pytest.mark.parametrize("updates", [("b-sgd", "un"), NINE])
def test_the_terminal_tables_fit_80_columns_with_no_cell_broken(updates):
    runs = like_the_paper(updates=updates, failed=((2, "un", 1),))
    for text in (printed(runs, 80), printed(runs)):  # printed(runs): as if piped
        assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
        assert "…" not in text
        assert "\x1b" not in text
        for row in table2(runs).to_dict("records"):
            cell = f"{row['mean']:.4f} ± {row['std']:.4f}"
            interval = f"{row['ci_low']:.4f} to {row['ci_high']:.4f}"
            assert any(cell in line and interval in line for line in text.splitlines())
        assert "0.0206 ± 0.0024" in text
        assert "non-finite" in text
        assert "lower than B-SGD's" in text.replace("\n", " ").replace("  ", " ")


def test_a_narrow_terminal_gets_paragraphs_and_loses_nothing():
    runs = like_the_paper(failed=((2, "un", 1),))
    text = printed(runs, 44)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 44
    words = " ".join(text.split())
    for row in table2(runs).to_dict("records"):
        assert f"mean ± std: {row['mean']:.4f} ± {row['std']:.4f}" in words
        assert f"{row['ci_low']:.4f} to {row['ci_high']:.4f}" in words
    assert "epoch: 2; reason: non-finite" in words


def test_an_update_named_like_markup_is_printed_as_it_is():
    runs = like_the_paper(updates=("b-sgd", "[red]x[/]"), depths=(2,))
    assert "[red]x[/]" in printed(runs, 80)


# --- figures ----------------------------------------------------------------------------------


def thick(axis) -> list:
    return [line for line in axis.lines if line.get_linewidth() == 2]


def test_curves_show_every_run_to_its_end_and_the_carried_mean():
    runs = make_runs({(2, "b-sgd"): [0.02] * 3, (2, "un"): [0.02] * 3}, failed=((2, "un", 2),))
    history = make_history(runs)
    figure = figures.curves(runs, history)
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
    assert any("Crosses" in text.get_text() for text in figure.texts)
    percent = thick(error)[0].get_ydata()
    np.testing.assert_allclose(percent[0], 100 * (0.07 + 0.001), rtol=1e-12)


def test_learning_rates_have_a_logarithmic_axis_and_a_geometric_mean():
    runs = make_runs({(depth, "un"): [0.02] * 2 for depth in (1, 2, 4)})
    history = make_history(runs)
    history.loc[(history["run"] == 1), "lr"] *= 100
    figure = figures.learning_rates(runs, history)
    assert [axis.get_title("left") for axis in figure.axes] == ["depth 1", "depth 2", "depth 4"]
    for axis in figure.axes:
        assert axis.get_yscale() == "log"
        rates = [0.01 * 0.5**e * 10 for e in (1, 2, 3)] + [0.01 * math.sqrt(0.5**4 * 0.5**3) * 10]
        np.testing.assert_allclose(thick(axis)[0].get_ydata(), rates, rtol=1e-12)


def test_errors_show_points_means_intervals_pairs_and_the_paper():
    runs = like_the_paper(failed=((2, "un", 4), (4, "b-sgd", 0), (4, "b-sgd", 1)))
    table = table2(runs).set_index(["depth", "update"])
    figure = figures.errors(runs)
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
        connecting = [line for line in axis.lines if line.get_color() == "#aaaaaa"]
        assert len(connecting) == paired_differences(runs).set_index("depth").loc[depth, "n"]
        for line in connecting:
            x, y = line.get_data()
            assert np.isclose(100 * runs["test_error"], y[0]).any()
            assert x[1] - x[0] == pytest.approx(1)  # the same place in both columns
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["one run", "mean, 95 % interval", "paper: mean ± std", "pair of runs"]
    elsewhere = figures.errors(runs, paper={})
    assert "paper" not in " ".join(text.get_text() for text in elsewhere.legends[0].get_texts())


def test_filters_are_images_in_order_on_one_symmetric_scale():
    weights = {name: np.zeros((5, 6)) for name in ("un", "b-sgd")}
    weights["un"][1] = [1, 2, 3, 4, 5, 6]
    weights["b-sgd"][4] = -6
    figure = figures.filters(weights, (2, 3), 4)
    left, right = [axis for axis in figure.axes if axis.images]
    assert (left.get_title("left"), right.get_title("left")) == ("depth 4, B-SGD", "depth 4, UN")
    image = np.asarray(right.images[0].get_array())
    assert image.shape == (2 * 2 + 2, 3 * 3 + 2 * 2)  # 5 images in 2 rows and 3 columns
    # each filter divided by its norm: √91, and 6 √6
    shown = image[0:2, 5:8] * 91**0.5
    np.testing.assert_allclose(shown, [[1, 2, 3], [4, 5, 6]], rtol=1e-12)
    flat = np.asarray(left.images[0].get_array())[4:6, 5:8]
    np.testing.assert_allclose(flat, np.full((2, 3), -(6**-0.5)), rtol=1e-12)
    limits = {axis.images[0].get_clim() for axis in (left, right)}
    ((low, high),) = limits
    assert low == -high
    assert 5 / 91**0.5 <= high <= 6 / 91**0.5


def test_filters_that_are_not_finite_are_grey_and_said_so():
    broken = np.full((4, 6), np.nan)
    figure = figures.filters({"un": broken, "b-sgd": np.ones((4, 6))}, (2, 3), 2)
    titles = [axis.get_title("left") for axis in figure.axes if axis.images]
    assert titles == ["depth 2, B-SGD", "depth 2, UN (grey: not finite)"]
    assert set(figures.encode(figures.filters({"un": broken}, (2, 3), 2))) == {"png", "svg"}


@pytest.mark.parametrize("shape", [(64, 783), (0, 784), (784,)])
def test_filters_of_another_shape_are_refused(shape):
    with pytest.raises(UserError, match=r"filters of un have shape .* 28 × 28"):
        figures.filters({"un": np.zeros(shape)}, (28, 28), 2)


def test_nine_updates_are_told_apart_by_colour_line_and_marker_alike():
    styles = figures.style(NINE)
    for part in zip(*styles.values(), strict=True):
        assert len(set(part)) == 9
    assert styles["b-sgd"] == figures.style(["b-sgd"])["b-sgd"]
    # As seen without red-green or without blue-yellow vision (Machado et al. 2009, severity 1).
    vision = {
        "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
        "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
        "tritan": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
    }
    for matrix in vision.values():
        seen = [np.array(matrix) @ to_rgb(styles[name].colour) for name in ("b-sgd", "un")]
        assert np.linalg.norm(seen[0] - seen[1]) > 0.4
    own = figures.style(["b-sgd", "mine", "yours"])
    assert len(set(own.values())) == 3


@pytest.mark.parametrize(
    ("depths", "updates", "n"),
    [((2, 4), ("b-sgd", "un"), 10), ((1, 2, 3), NINE, 1), ((2,), ("un",), 1)],
)
def test_figures_are_readable_in_a_readme(depths, updates, n):
    runs = like_the_paper(depths=depths, updates=updates, n=n)
    history = make_history(runs)
    for figure in (
        figures.curves(runs, history),
        figures.learning_rates(runs, history),
        figures.errors(runs),
        figures.filters({update: np.eye(4) for update in updates}, (2, 2), 2),
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
    files = build(*records(runs)[:3], {})
    assert "| 2 | UN | 0 | 2 | – | – | 0.0199 ± 0.0046 |" in files["table2.md"].decode()
    assert len(files["figures/curves.png"]) > 1000
    history = make_history(runs).assign(train_loss=math.nan, val_error=math.inf)
    assert figures.encode(figures.curves(runs, history))["png"][:4] == b"\x89PNG"


def test_an_error_of_zero_takes_the_logarithm_away():
    runs = make_runs({(2, "un"): [0.0]})
    history = make_history(runs)
    history.loc[0, "val_error"] = 0.0
    error, loss = figures.curves(runs, history).axes
    assert (error.get_yscale(), loss.get_yscale()) == ("linear", "log")
    assert error.get_ylim()[0] < 0 < error.get_ylim()[1]


# --- the whole ---------------------------------------------------------------------------------


def test_build_gives_every_file_and_the_same_bytes_each_time():
    runs = like_the_paper(failed=((2, "un", 1),), n=3)
    frames = records(runs)
    copies = [frame.copy(deep=True) for frame in frames[:3]]
    files = build(*frames)
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
        again = build(*shuffled, dict(reversed(frames[3].items())))
    assert [name for name in files if files[name] != again[name]] == []
    assert dict(mpl.rcParams) == before
    written = {}
    write(files, written.__setitem__)
    assert written == files


def test_without_filters_there_is_no_figure_of_them():
    runs = make_runs({(2, "un"): [0.02]})
    names = build(*records(runs)[:3], {})
    assert not any("filters" in name for name in names)


def change(column, value, row=0):
    def damaged(frame):
        frame = frame.copy()
        frame[column] = frame[column].astype(object) if isinstance(value, str) else frame[column]
        frame.loc[row, column] = value
        return frame

    return damaged


RUNS_FAULTS = {
    "no rows": (lambda f: f.iloc[:0], r"runs.csv holds no rows; run `unitnorm train`"),
    "no column": (lambda f: f.drop(columns="test_error"), r"runs.csv: no column test_error"),
    "text": (change("test_error", "x"), r"column test_error does not hold numbers"),
    "not whole": (lambda f: f.assign(depth=2.5), r"column depth does not hold whole numbers"),
    "no depth": (lambda f: f.assign(depth=math.nan), r"column depth does not hold whole numbers"),
    "no truth": (lambda f: f.assign(diverged="no"), r"column diverged does not hold true or false"),
    "no name": (lambda f: f.assign(update=None), r"column update does not hold text"),
    "twice": (lambda f: pd.concat([f, f[:1]]), r"depth 2, update b-sgd, run 0 stands there twice"),
    "percent": (change("test_error", 2.06), r"test_error of depth 2, b-sgd, run 0 is 2.06"),
    "no error": (change("test_error", math.nan), r"run 0 is nan; expected a fraction"),
}


@pytest.mark.parametrize("fault", RUNS_FAULTS)
def test_damaged_runs_end_in_one_clear_line(fault):
    damage, message = RUNS_FAULTS[fault]
    runs = like_the_paper(n=2)
    for function in (table2, paired_differences, statistics.failed_runs, terminal, checked_runs):
        with pytest.raises(UserError, match=message) as caught:
            function(damage(runs))
        assert "\n" not in str(caught.value)


HISTORY_FAULTS = {
    "no rows": (lambda f: f.iloc[:0], r"history.csv holds no rows"),
    "no column": (lambda f: f.drop(columns="lr"), r"history.csv: no column lr"),
    "a run missing": (lambda f: f[f["run"] == 0], r"b-sgd, run 1 needs .* found none"),
    "a gap": (lambda f: f.drop(index=1), r"run 0 needs a row .* found 3 epochs, the last 4"),
    "twice": (lambda f: pd.concat([f, f[:1]]), r"run 0, epoch 1 stands there twice"),
    "nan": (change("train_loss", math.nan, 2), r"b-sgd, run 0, epoch 3 holds a value that is not"),
}


@pytest.mark.parametrize("fault", HISTORY_FAULTS)
def test_damaged_history_ends_in_one_clear_line(fault):
    damage, message = HISTORY_FAULTS[fault]
    runs = like_the_paper(n=2)
    history = make_history(runs)
    assert len(checked_history(history, checked_runs(runs))) == len(history)
    for function in (figures.curves, figures.learning_rates, statistics.conduct):
        with pytest.raises(UserError, match=message):
            function(runs, damage(history))


def test_damaged_sweep_ends_in_one_clear_line():
    runs = like_the_paper(n=2)
    runs_, history, sweep, filters = records(runs)
    for damaged, message in (
        (sweep.iloc[:0], "sweep.csv holds no rows"),
        (sweep.drop(columns="chosen"), "sweep.csv: no column chosen"),
        (pd.concat([sweep, sweep[:1]]), "base_lr 0.1 stands there twice"),
    ):
        with pytest.raises(UserError, match=message):
            build(runs_, history, damaged, filters)
    assert len(checked_sweep(sweep)) == len(sweep)


def test_history_of_runs_that_are_not_in_the_records_is_not_shown():
    runs = like_the_paper(n=2)
    history = make_history(runs)
    table = figures.curves(runs[runs["update"] == "un"], history)
    legend = [text.get_text() for text in table.legends[0].get_texts()]
    assert legend == ["UN"]


def test_a_full_report_takes_under_five_seconds_and_leaves_pyplot_alone(tmp_path):
    runs = like_the_paper(epochs=60)
    for name, frame in zip(("runs", "history", "sweep"), records(runs)[:3], strict=True):
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
    np.savez(
        tmp_path / "filters.npz", **{f"{d} {u}": w for (d, u), w in make_filters(runs).items()}
    )
    program = """
import sys, time, numpy, pandas
from unitnorm.report import build
frames = [pandas.read_csv(f"{sys.argv[1]}/{n}.csv") for n in ("runs", "history", "sweep")]
with numpy.load(f"{sys.argv[1]}/filters.npz") as stored:
    filters = {(int(k.split()[0]), k.split()[1]): stored[k] for k in stored}
files = build(*frames, filters, (28, 28))
assert len(files) == 15, sorted(files)
unwanted = {"matplotlib.pyplot", "jax"} & set(sys.modules)
assert not unwanted, unwanted
print(time.process_time())
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # The processor's time from the start of the process, imports included: unlike the clock's it
    # does not grow because something else is running.
    assert float(done.stdout) < 5
