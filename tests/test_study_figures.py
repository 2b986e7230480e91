"""A study's figures and tables: what stands in them, and the same bytes every time."""

import math

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from tests.study_example import COMPARISONS, RATES, find, invent_runs, invent_spread_runs, run_row
from unitnorm.archbn import protocol
from unitnorm.study import figures, report
from unitnorm.study.statistics import budget_means, compare, late_rates, left_by, rate_means


@pytest.fixture(scope="module")
def runs() -> pd.DataFrame:
    return invent_runs()


def test_late_rates_stand_beside_un_of_the_same_name():
    arms = {  # update, late rate, error
        "un": ("un", 0.01, 0.02), "falls": ("b-sgd", 0.002, 0.023),
        "un@3": ("un", 0.03, 0.04), "b-sgd@3": ("b-sgd", 0.06, 0.038),
        "b-sgd@4": ("b-sgd", 0.06, 0.05), "un@4": ("un-adam", 0.01, 0.02),
        "un-carried": ("un-carried", 0.01, 0.03),
    }  # fmt: skip
    start = {"start": "norms", "spread": 2.0}
    levels = [("falls", ("b-sgd", 0.001, 0.024), start)]
    rows = [
        run_row(arm, seed, error + 0.001 * seed, update=update, effective_rate=rate, **more)
        for arm, (update, rate, error), more in [*((*arm, {}) for arm in arms.items()), *levels]
        for seed in range(4)
    ]
    table = late_rates(pd.DataFrame(rows).assign(schedule="cosine")).set_index("arm")
    of = ["falls, start balanced, spread 0", "falls, start norms, spread 2"]
    assert list(table.index) == ["b-sgd@3", *of]
    np.testing.assert_allclose(table["rate_ratio"], [2, 0.2, 0.1])
    np.testing.assert_allclose(table["mean"], [-0.2, 0.3, 0.4])
    drawn = figures.late_rate_rows({"one": table.reset_index(), "two": table.reset_index()})
    assert list(drawn["series"]) == [
        f"{study}: {arm}" for study in ("one", "two") for arm in table.index
    ]
    assert figures.draw("late_rates", drawn)["svg"].startswith(b"<svg")


def test_what_a_warm_up_has_left_is_what_the_protocol_trains_with():
    epochs, base = 10, jnp.float32(1)
    left = protocol.rate_within(jnp.int32(protocol.WARM_UP), base, base, 1 - 1 / epochs)
    found = left_by(["warm-up", "constant"], [epochs] * 2)
    np.testing.assert_allclose(found, [left, 1], rtol=1e-6)


def test_forest_has_each_comparison_of_errors_and_keeps_one_failure_from_hiding_the_rest(runs):
    table = compare(runs, COMPARISONS)
    table.loc[0, ["difference", "ci_low", "ci_high"]] = [70.0, 60.0, 80.0]
    table.loc[1, ["difference", "ci_low", "ci_high"]] = math.nan
    rows = figures.forest_rows(table, 0.05)
    assert len(rows) == 15  # without pairs there is nothing to draw
    assert rows["high"].max() < 10
    # no wider than what is drawn
    ends = rows[["difference", "ci_low", "ci_high", "ci_images_low", "ci_images_high"]]
    np.testing.assert_allclose(rows["low"], 1.06 * ends.min().min())
    assert (rows["high"] >= ends.max().max()).all()
    assert list(rows.index[rows["shape"] == "triangle-right"]) == [0]
    assert rows.loc[0, "text"].startswith("+70.00")
    errors = table.query("metric != 'train_loss'")["difference"].drop([0, 1])
    np.testing.assert_allclose(rows["difference"].drop(0), errors)
    assert rows["title"].loc[4] == "UN against B-SGD, early, test error after epoch 10"


def test_a_summary_has_every_comparison_of_errors_in_its_place(runs):
    found = find(runs)
    table = found.compared
    table.loc[0, ["difference", "ci_low", "ci_high"]] = math.nan
    frame = report.summary_cells(found.plan, table).frame.set_index("comparison")
    places = ["mnist, depth 2", "mnist, depth 4", "fashion, depth 2", "fashion, depth 4"]
    assert list(frame.columns) == places
    after = {"UN against B-SGD, early": ", test error after epoch 10"}
    names = {one.name: one.name + after.get(one.name, "") for one in COMPARISONS[:-1]}
    assert list(frame.index) == list(names.values())
    for row in table[table["metric"] != "train_loss"].itertuples():
        cell = frame.loc[names[row.comparison], f"{row.dataset}, depth {row.depth}"]
        cell = cell.replace("−", "-")
        half = (row.ci_high - row.ci_low) / 2
        told = cell.split()
        assert told == ["–"] if row.Index == 0 else told[1:] == ["±", f"{half:.2f}", row.verdict]
        assert row.Index == 0 or float(told[0]) == round(row.difference, 2)


def test_rates_mark_the_best_and_the_effective_rate_is_that_of_the_same_runs(runs):
    rows = figures.rate_rows(runs)
    table = rate_means(runs)
    best = table[table["is_best"]].set_index(["dataset", "depth", "arm"])["filters_rate"]
    drawn = rows[rows["is_best"]].set_index(["dataset", "depth", "arm"])["x"]
    pd.testing.assert_series_equal(drawn, best, check_names=False)
    assert set(rows["x"]) == set(RATES)
    off = rows[rows["shape"] == "arrow"]  # B-SGD at rate 1 has diverged everywhere
    assert set(zip(off["arm"], off["x"], strict=True)) == {("b-sgd", 1.0)}
    cosine = runs.assign(schedule="cosine")
    rows = figures.effective_rows(cosine, dict.fromkeys(runs["arm"], 25))
    factor = (1 + math.cos(math.pi * 24 / 25)) / 2  # of the 25th of 25 epochs
    np.testing.assert_allclose(rows["y"], rows["x"] / factor)


def test_budgets_are_those_that_were_run(runs):
    table = budget_means(runs)
    assert list(table["budget"].unique()) == ["5", "10", "25", "end"]
    chosen = runs.query("purpose == 'compare' and dataset == 'mnist' and depth == 4")
    part = chosen[(chosen["arm"] == "sgd-wd") & ~chosen["diverged"]]
    row = table.query("dataset == 'mnist' and depth == 4 and arm == 'sgd-wd' and budget == '10'")
    assert row["n"].item() == len(part) == 11
    assert row["mean"].item() == pytest.approx(100 * part["test_error_10"].mean())
    assert list(budget_means(runs.assign(epochs=10))["budget"].unique()) == ["5", "10"]
    assert "un@effective" in set(figures.budget_rows(runs)["series"])  # the arm, not its update


def test_spreads_have_a_line_per_update_that_begins_at_the_balanced_start():
    rows = figures.spread_rows(invent_spread_runs())
    for _, panel in rows.sort_values("spread").groupby(["place", "level"]):
        growth = panel.groupby("update")["y"].agg(lambda y: y.iloc[-1] / y.iloc[0])
        assert growth["un"] == pytest.approx(1, abs=0.1)
        assert growth["b-sgd"] > 2
    assert len(rows) == 2 * 2 * 2 * 2 * 4  # data sets, depths, kinds, updates, spreads
    assert set(rows["lost"]) == {"", "B-SGD: 2"}


def test_filters_that_are_all_of_one_length_are_no_spread():
    """They are trained at another rate, too, beside balanced ones of any rate."""
    runs = invent_spread_runs()
    runs = runs[runs["start"] == "filters"]
    for start, drawn in (("filters", True), ("norms", False)):
        known = find(runs.assign(start=runs["start"].mask(runs["spread"] > 0, start)))
        assert ("spreads" in report.chart_rows(known)) == drawn


def test_no_two_arms_look_the_same_and_an_update_has_its_colour():
    looks = figures.assign_marks({f"un@{i}": "un" for i in range(25)} | {"b-sgd": "b-sgd"})
    assert len({(look["colour"], look["shape"]) for look in looks.values()}) == 26
    assert {looks[f"un@{i}"]["colour"] for i in range(8)} == {looks["un@0"]["colour"]}


def test_the_same_findings_give_the_same_files_and_looks_are_told(runs):
    some = runs[runs["dataset"] == "mnist"]
    found = find(some, looked_at=5)
    files = report.build(found)
    assert files == report.build(found)
    assert files["figures/rates.png"].startswith(b"\x89PNG")
    assert b"mnist, depth 2" in files["figures/comparisons.svg"]
    assert "extended after a look at n = 5: " in files["comparisons.md"].decode()
    assert "Extended after looks at n = 5." in files["summary.md"].decode()
    assert "Plan not committed, first run" in files["comparisons.md"].decode()
    assert "looks" not in report.comparison_cells(find(some)).frame
