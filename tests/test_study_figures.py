"""A study's figures: what stands in them, and the same bytes every time."""

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from tests.study_example import COMPARISONS, RATES, invent_runs, invent_spread_runs
from unitnorm.errors import UserError
from unitnorm.report.style import encode
from unitnorm.study.config import Plan
from unitnorm.study.figures import (
    VERDICTS,
    budget_means,
    draw_budgets,
    draw_forest,
    draw_spreads,
    draw_tuning,
)
from unitnorm.study.report import summary_cells
from unitnorm.study.statistics import compare, rate_means


@pytest.fixture(scope="module")
def runs() -> pd.DataFrame:
    return invent_runs()


def line_at(figure: Figure, panel: int, **style: object) -> list[np.ndarray]:
    """The points of the lines of a panel that have the given properties."""
    return [
        line.get_xydata()
        for line in figure.axes[panel].get_lines()
        if all(getattr(line, f"get_{name}")() == value for name, value in style.items())
    ]


def test_forest_draws_each_comparison_of_errors_at_its_difference(runs):
    table = compare(runs, COMPARISONS)
    figure = draw_forest(table)
    errors = table[table["metric"] != "train_loss"]
    drawn = [
        line.get_xdata()[0]
        for line in figure.axes[0].get_lines()
        if line.get_marker() in {marker for _, marker in VERDICTS.values()}
    ]
    limit = figure.axes[0].get_xlim()[1]
    # Within the frame, at the difference itself; what lies beyond it has an arrow instead.
    inside = errors["difference"].abs() <= limit
    np.testing.assert_allclose(drawn, errors.loc[inside, "difference"])
    assert len(errors) == 16


def test_a_summary_has_every_comparison_of_errors_in_its_place(runs):
    plan = Plan.model_construct(
        question="?", datasets=["mnist", "fashion"], depths=[2, 4, 8], margin=0.05, alpha=0.05
    )
    table = compare(runs, COMPARISONS)
    table.loc[0, ["difference", "ci_low", "ci_high"]] = math.nan
    frame = summary_cells(plan, table).frame.set_index("comparison")
    places = ["mnist, depth 2", "mnist, depth 4", "fashion, depth 2", "fashion, depth 4"]
    assert list(frame.columns) == places
    assert list(frame.index) == [one.name for one in COMPARISONS[:-1]]
    for row in table[table["metric"] != "train_loss"].itertuples():
        cell = frame.loc[row.comparison, f"{row.dataset}, depth {row.depth}"]
        half = (row.ci_high - row.ci_low) / 2
        told = cell.replace("−", "-").split()
        assert told == ["–"] if row.Index == 0 else [*told[:2], f"{half:.2f}", row.verdict]
        assert row.Index == 0 or float(told[0]) == round(row.difference, 2)


def test_forest_keeps_one_failure_from_hiding_the_rest(runs):
    table = compare(runs, COMPARISONS)
    table.loc[0, ["difference", "ci_low", "ci_high"]] = [70.0, 60.0, 80.0]
    table.loc[1, ["difference", "ci_low", "ci_high"]] = math.nan
    axis = draw_forest(table).axes[0]
    assert axis.get_xlim()[1] < 10
    assert [line.get_marker() for line in axis.get_lines()].count(">") == 1
    with pytest.raises(UserError, match="no comparison of errors"):
        draw_forest(table[table["metric"] == "train_loss"])


def test_rates_mark_the_best_of_each_arm(runs):
    figure = draw_tuning(runs)
    table = rate_means(runs)
    best = table[table["is_best"] & (table["dataset"] == "fashion") & (table["depth"] == 2)]
    rings = line_at(figure, 0, markersize=11)
    found = sorted(tuple(np.round(ring[0], 6)) for ring in rings)
    expected = zip(best["filters_rate"], best["val_error"].round(6), strict=True)
    assert found == sorted(expected)
    assert len(line_at(figure, 0, marker="^", markersize=5)) == 1  # B-SGD at rate 1: off the scale
    assert {x for line in line_at(figure, 0, linewidth=1.4) for x in line[:, 0]} == set(RATES)


def test_budgets_are_means_of_the_runs_that_have_not_diverged(runs):
    table = budget_means(runs)
    assert list(table["budget"].unique()) == ["5", "10", "25", "end"]
    chosen = runs.query("purpose == 'compare' and dataset == 'mnist' and depth == 4")
    part = chosen[(chosen["arm"] == "sgd-wd") & ~chosen["diverged"]]
    row = table.query("dataset == 'mnist' and depth == 4 and arm == 'sgd-wd' and budget == '10'")
    assert row["n"].item() == len(part) == 11
    assert row["mean"].item() == pytest.approx(100 * part["test_error_10"].mean())
    panel = 2  # MNIST at depth 2
    ends = table.query("dataset == 'mnist' and depth == 2 and budget == 'end'")
    drawn = [line[-1, 1] for line in line_at(draw_budgets(runs), panel, linewidth=1.4)]
    np.testing.assert_allclose(drawn, ends["mean"])


def test_spreads_have_a_line_per_update_that_begins_at_the_balanced_start():
    runs = invent_spread_runs()
    figure = draw_spreads(runs)
    assert len(figure.axes) == 8  # two data sets, two depths, two kinds of start
    for lines in (line_at(figure, 0, linewidth=1.4), line_at(figure, 1, linewidth=1.4)):
        assert [len(line) for line in lines] == [4, 4]
        growth = sorted(line[-1, 1] / line[0, 1] for line in lines)
        assert growth[0] == pytest.approx(1, abs=0.05)
        assert growth[1] > 2
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["B-SGD: 2"]


@pytest.mark.parametrize("draw", [draw_tuning, draw_budgets, draw_spreads])
def test_nothing_to_draw_is_said_in_one_line(draw, runs):
    with pytest.raises(UserError, match="runs to draw"):
        draw(runs.iloc[:0])


def test_the_same_runs_give_the_same_bytes(runs):
    first, second = (encode(draw_budgets(runs[runs["dataset"] == "mnist"])) for _ in range(2))
    assert first == second
