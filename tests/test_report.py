"""The report from fixed records: numbers against hand-made ones, and what every file must hold."""

import io
import itertools
import math

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from PIL import Image
from rich.console import Console
from scipy import stats

from tests.common import call
from unitnorm.errors import UserError
from unitnorm.report import statistics, style, tables
from unitnorm.report.statistics import Summary
from unitnorm.table2 import figures, report

NINE = tuple(style._STYLES)
SAME = {"config": {"model": {"width": 64}, "seed": 0}, "data": {"name": "mnist", "sha256": "a"}}


def make_runs(errors: dict, failed: tuple = ()) -> pd.DataFrame:
    """Runs from {(depth, update): test errors}; a run in `failed` has met a non-finite loss."""
    names = ["depth", "update", "run", "test_error"]
    rows = [(*key, run, error) for key, each in errors.items() for run, error in enumerate(each)]
    runs = pd.DataFrame(rows, columns=names).assign(seed=7, base_lr=0.01, val_error=0.02)
    bad = np.array([(d, u, r) in failed for d, u, r, _ in rows])
    runs.loc[bad, ["test_error", "val_error"]] = math.nan
    epochs = np.where(bad, 2, 4 - runs["run"] % 2)
    return runs.assign(
        epochs=epochs, diverged=bad, stop_reason=np.where(bad, "non-finite", "val-rise")
    )


def make_history(runs: pd.DataFrame) -> pd.DataFrame:
    """A history for the runs: smooth curves, growing and ending in NaN where a run failed."""
    rows = runs.loc[runs.index.repeat(runs["epochs"]), ["depth", "update", "run", "diverged"]]
    epoch = rows.groupby(["depth", "update", "run"]).cumcount() + 1
    last = rows["diverged"] & (epoch == 2)
    loss = np.where(rows["diverged"], 1000.0, 0.3) / epoch + 0.01 * rows["run"]
    deviation = 1e-7 * epoch * (1 + rows["run"])
    return rows.drop(columns="diverged").assign(
        epoch=epoch, lr=0.01 * 0.5**epoch, train_loss=loss.mask(last),
        val_error=0.02 + 0.05 / epoch + 0.001 * rows["run"], norm_deviation=deviation.mask(last),
    ).reset_index(drop=True)  # fmt: skip


def make_sweep(runs: pd.DataFrame) -> pd.DataFrame:
    rates = pd.Series((0.1, 0.01, 0.00001), name="base_lr")
    table = runs[["depth", "update", "run"]].merge(rates, how="cross")
    chosen = table["base_lr"] == 0.01
    error = (0.1 + 0.01 * table["run"]).where(chosen, 0.5)
    return table.assign(val_error=error, diverged=table["base_lr"] == 0.1, chosen=chosen)


def like_the_paper(failed: tuple = (), updates=("b-sgd", "un"), depths=(2, 4), n=10):
    rng = np.random.default_rng(1)
    means = {"b-sgd": 0.0204, "un": 0.0185}
    cells = itertools.product(depths, updates)
    errors = {(d, u): (means.get(u, 0.02) + rng.normal(0, 0.001, n)).round(4) for d, u in cells}
    return make_runs(errors, failed)


def prepared(runs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    ready = report.prepare_runs(runs)
    return ready, report.prepare_history(make_history(runs), ready)


def summed(runs: pd.DataFrame, **options) -> pd.DataFrame:
    return report.summarise_errors(report.prepare_runs(runs), **options)


def compared(runs: pd.DataFrame) -> pd.DataFrame:
    return report.compare_updates(report.prepare_runs(runs))


def text_of(runs: pd.DataFrame, name: str = "table2.md") -> str:
    """A file of the report, with the padding of its Markdown cells taken away."""
    files, _ = report.build_texts(*prepared(runs), make_sweep(runs))
    return "\n".join(" ".join(line.split()) for line in files[name].decode().splitlines())


def printed(shown, width: int | None = None) -> str:
    out = io.StringIO()
    Console(file=out, width=width, _environ={}).print(shown)
    return out.getvalue()


def test_table2_against_hand_made_numbers_with_the_paper_beside_its_cells():
    errors = [0.0201, 0.0189, 0.0215, 0.0198, 0.0176, 0.0222, 0.0208, 0.0190, 0.0185, 0.0216]
    runs = make_runs({(2, "un"): errors, (3, "un"): errors})
    row, other = summed(runs).drop(columns=["depth", "update"]).to_numpy(float)
    mean = sum(errors) / 10
    std = math.sqrt(sum((e - mean) ** 2 for e in errors) / 9)
    half = 2.2621571627409915 * std / math.sqrt(10)  # Student's t, 9 degrees of freedom, 97.5 %
    expected = [10, 0, mean, std, mean - half, mean + half, 0.0199, 0.0046]
    np.testing.assert_allclose(row, expected, rtol=1e-10)
    assert np.isnan(other[-2:]).all()
    assert summed(runs, paper={})["paper_mean"].isna().all()


def test_the_papers_own_deviations_leave_depth_2_open_and_depth_4_at_the_brink():
    """Welch's test of the paper's means and deviations, ten runs of each."""
    found = {}
    for depth in (2, 4):
        sides = (Summary(*report.PAPER[depth, u], math.nan, math.nan) for u in ("un", "b-sgd"))
        (ours, theirs), n = sides, report.PAPER_RUNS
        difference, p = statistics.compare_means(ours, n, theirs, n)
        found[depth] = (round(100 * difference.mean, 2), round(p, 3))
    assert found == {2: (-0.07, 0.676), 4: (-0.25, 0.046)}


def test_diverged_runs_are_counted_listed_and_left_out_of_the_mean():
    runs = make_runs({(2, "un"): [0.02, 0.5, 0.03, 0.04]}, failed=((2, "un", 1),))
    # A run can end with finite but worthless numbers, and is then left out all the same,
    runs.loc[1, ["test_error", "val_error"]] = 0.9
    # whether its column `diverged` or its stop reason says so.
    for table in (runs, runs.assign(diverged=False), runs.assign(stop_reason="val-rise")):
        row = summed(table).iloc[0]
        assert (row["n"], row["diverged"]) == (3, 1)
        assert row["mean"] == pytest.approx(0.03, abs=1e-15)
    for name in ("table2.md", "runs.md"):
        assert "| 2 | UN | 1 | 7 | 0.01 | 2 | non-finite |" in text_of(runs, name)
        assert "left out of every mean" not in text_of(like_the_paper(n=2), name)


def test_two_runs_one_run_and_none():
    cells = {(2, "b-sgd"): [0.02, 0.03], (2, "un"): [0.5, 0.025], (2, "sm"): [0.5]}
    runs = make_runs(cells, failed=((2, "un", 0), (2, "sm", 0)))
    assert summed(runs).iloc[0]["ci_low"] == 0  # and not −3.9 %
    text = text_of(runs)
    assert "| 2 | UN | 1 | 1 | 0.0250 ± – | – | 0.0199 ± 0.0046 |" in text
    assert "| 2 | sm | 0 | 1 | – | – | – |" in text
    assert "nan" not in text


def test_paired_differences_against_scipy():
    base = np.array([0.0201, 0.0189, 0.0215, 0.0198, 0.0176, 0.0222, 0.0208])
    ours = np.array([0.0195, 0.0190, 0.0199, 0.0180, 0.0170, 0.0210, 0.0211])
    row = compared(make_runs({(4, "un"): ours, (4, "b-sgd"): base})).iloc[0]
    assert tuple(row[["depth", "update", "baseline", "n", "left_out"]]) == (4, "un", "b-sgd", 7, 0)
    test, difference = stats.ttest_rel(ours, base), ours - base
    # 0.0195 − 0.0201 and 0.0170 − 0.0176 are equal, though not in their last bits.
    p = stats.wilcoxon(np.round(1e4 * difference)).pvalue
    expected = [difference.mean(), difference.std(ddof=1), *test.confidence_interval()]
    found = row[["mean", "std", "ci_low", "ci_high", "p_t", "p_wilcoxon"]].to_numpy(float)
    np.testing.assert_allclose(found, [*expected, test.pvalue, p], rtol=1e-8)


@pytest.mark.parametrize(
    "differences",
    [[1, 2, 3, 4, 5], [-1, 2, 3, -4, 5, 6, -7, 8], [1, 1, -1, 2, 2, 3, 0, 0], [5, -5],
     [-3, -3, -3, 1], [2, -7, 1, 8, 2, 8, -1, 8, 2, 8]],
)  # fmt: skip
def test_signed_rank_p_is_scipys_of_all_signs(differences):
    d = np.array(differences, float)
    expected = stats.wilcoxon(d[d != 0], method=stats.PermutationMethod()).pvalue
    assert statistics.signed_rank_p(d) == pytest.approx(expected, rel=1e-12)
    assert statistics.signed_rank_p(-d) == pytest.approx(expected, rel=1e-12)


def test_a_pair_is_left_out_where_either_run_failed_or_the_seeds_differ():
    runs = make_runs(
        {(2, "b-sgd"): [0.02, 0.9, 0.03, 0.02, 0.02], (2, "un"): [0.01, 0.02, 0.9, 0.01, 0.03]},
        failed=((2, "b-sgd", 1), (2, "un", 2)),
    )
    runs.loc[(runs["update"] == "un") & (runs["run"] == 3), "seed"] = 8
    row = compared(runs).iloc[0]
    assert (row["n"], row["left_out"]) == (2, 3)
    assert row["mean"] == pytest.approx(0.0, abs=1e-15)


def test_differences_with_few_or_equal_pairs_are_defined():
    row = compared(make_runs({(2, "b-sgd"): [0.02], (2, "un"): [0.01]})).iloc[0]
    assert (row["n"], row["mean"]) == (1, pytest.approx(-0.01))
    assert row[["std", "ci_low", "ci_high", "p_t", "p_wilcoxon"]].isna().all()
    # The differences are all 0.0005, but float64 has them differ by 1e-18.
    equal = make_runs({(2, "b-sgd"): [0.0200, 0.0210, 0.0220], (2, "un"): [0.0205, 0.0215, 0.0225]})
    row = compared(equal).iloc[0]
    assert row["std"] == pytest.approx(0, abs=1e-12)
    assert row[["p_t", "p_wilcoxon"]].isna().all()
    alone = make_runs({(2, "un"): [0.02, 0.03], (4, "b-sgd"): [0.02], (4, "sm"): [0.01]})
    assert list(compared(alone)["depth"]) == [4]


def test_how_the_runs_went_and_the_sweep_are_summed_up():
    text = text_of(like_the_paper(failed=((4, "un", 3),)), "runs.md")
    # Run 8 has 4 epochs: 1e-7 · 4 · 9; run 9 has 3: 1e-7 · 3 · 10.
    row = "| 4 | UN | 10 | 2–4 (3.5) | non-finite (1), val-rise (9) | 0.01 (10) | 3.6e−6 |"
    assert row in text
    rates = ["| 2 | B-SGD | 0.1 | 10 | 10 | – | 0 |", "| 2 | B-SGD | 0.01 | 10 | 0 | 0.1450 | 10 |"]
    assert "\n".join([*rates, "| 2 | B-SGD | 1e−5 | 10 | 0 | 0.5000 | 0 |"]) in text


def folders(a, b, paired=True):
    first, second = map(report.prepare_runs, (a, b))
    return report.compare_folders(first, second, paired=paired).to_dict("records")


def test_two_folders_are_paired_where_seeds_agree_and_runs_started_alike():
    a = make_runs({(2, "un"): [0.02, 0.03, 0.05, 0.9], (3, "un"): [0.1]}, failed=((2, "un", 3),))
    b = make_runs({(2, "un"): [0.01, 0.04, 0.02], (2, "sm"): [0.1, 0.1]})
    ours, theirs = np.array([0.01, 0.04, 0.02]), np.array([0.02, 0.03, 0.05])
    paired, welch = stats.ttest_rel(ours, theirs), stats.ttest_ind(ours, theirs, equal_var=False)
    for (row,), test, n, name in (
        (folders(a, b), paired, 3, "paired"),
        (folders(a, b, paired=False), welch, 0, "Welch"),
        (folders(a, b.assign(seed=8)), welch, 0, "Welch"),
    ):
        assert (row["depth"], row["update"], row["test"], row["n"]) == (2, "un", name, n)
        assert (row["n_first"], row["n_second"]) == (3, 3)
        found = [row[key] for key in ("mean_first", "difference", "p", "ci_high")]
        end = test.confidence_interval().high
        np.testing.assert_allclose(found, [0.1 / 3, -0.01, test.pvalue, end])
    with pytest.raises(UserError, match="x and y share no depth and update"):
        report.build_comparison((a, make_runs({(5, "un"): [0.1]})), (SAME, SAME), ("x", "y"))


@pytest.mark.parametrize(
    ("change", "row", "paired"),
    [
        ({"data": {"name": "fashion", "sha256": "b"}}, "data.sha256 | a | b", False),
        ({"config": {"model": {"width": 64}, "seed": 5}}, "seed | 0 | 5", True),
        ({}, "", True),
    ],
)
def test_a_comparison_says_what_differs_and_pairs_only_what_are_pairs(
    change, row, paired, monkeypatch
):
    monkeypatch.setattr(report, "encode", lambda figure, palette: {})
    runs = like_the_paper(n=4)
    files, _ = report.build_comparison((runs, runs), (SAME, SAME | change), ("x", "y"))
    text = " ".join(files["comparison.md"].decode().split())
    assert row in text
    assert ("Where the two differ" in text) == bool(change)
    assert ("equal (4)" in text, "1.000 (W)" in text) == (paired, not paired)


def test_a_comparison_tells_both_folders_apart_in_table_terminal_and_figure():
    a = like_the_paper()
    b = a.assign(test_error=a["test_error"] - 0.001 * (a["update"] == "un") * (a["run"] % 2))
    files, both = report.build_comparison((a, b), (SAME, SAME), ("runs/a", "runs/b"))
    assert set(files) == {f"comparison.{ending}" for ending in ("csv", "md", "png", "svg")}
    shown = printed(both, 80)
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
    own = pd.concat([compared(a).assign(folder="A"), compared(b).assign(folder="B")])
    for text in (files["comparison.md"].decode(), shown):
        for part in ("A: runs/a. B: runs/b.", "equal (10)", "−0.05"):  # B-SGD: the same runs
            assert part in text
        for mean in own["mean"]:
            assert f"{100 * mean:.2f} ±".replace("-", "−") in text
    table = pd.DataFrame(folders(a, b))
    left, right = figures.draw_comparison(table, own, ("x", "y")).axes
    errors = 100 * table[["mean_first", "mean_second"]].to_numpy().T
    for axis, expected in ((left, errors), (right, 100 * own["mean"].to_numpy().reshape(2, -1))):
        drawn = [line.get_xdata() for line in axis.lines if line.get_marker() in "os"]
        np.testing.assert_allclose(np.array(drawn, float), expected)


def test_the_command_writes_a_comparison_only_where_it_is_told_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = type("Known", (dict,), {"provenance": SAME})(runs=like_the_paper(n=2))
    monkeypatch.setattr("unitnorm.run.records.read_alone", lambda folder, schema: known)
    assert "A: a. B: b." in call("report", "a", "b")
    assert list(tmp_path.iterdir()) == []
    assert "4 files in both" in call("report", "a", "b", "--out", "both")
    assert (tmp_path / "both" / "comparison.md").exists()
    call("report", "a", "--out", "both", code=2)


def test_markdown_and_latex_escape_their_own_marks():
    frame = pd.DataFrame({"a_b": ["c&d|%", "−1 ± 2"], "‖w‖": ["1", "–"]})
    cells = tables.Cells("x < y", frame, "50 %.")
    latex = tables.to_latex(cells, "2")
    for line in (r"a\_b & $\|$w$\|$", r"c\&d$|$\% & 1", r"$-$1 $\pm$ 2 & --"):
        assert rf"{line} \\" in latex
    for part in (r"\toprule", r"\begin{tabular}{lr}", r"\caption{x $<$ y. 50 \%.}", "tab:2"):
        assert part in latex
    lines = [" ".join(line.split()) for line in tables.to_markdown(cells).splitlines()]
    assert (lines[0], lines[-1]) == ("**x < y**", "50 %.")
    assert {r"| a_b | ‖w‖ |", r"| c&d\|% | 1 |", "| −1 ± 2 | – |"} <= {*lines}


@pytest.mark.parametrize(("width", "updates"), [(80, NINE), (None, ("b-sgd", "un")), (44, NINE)])
def test_the_terminal_gets_tables_of_80_columns_and_a_narrow_one_paragraphs(width, updates):
    runs = like_the_paper(updates=(*updates, "[red]x[/]"), failed=((2, "un", 1),))
    text = printed(report.build_texts(*prepared(runs), make_sweep(runs))[1], width)  # None: piped
    assert max(len(line.rstrip()) for line in text.splitlines()) <= (width or 80)
    assert not {"…", "\x1b"} & {*text}
    assert "[red]x[/]" in text  # a name, not markup
    lines = [" ".join(text.split())] if width == 44 else text.splitlines()
    for row in summed(runs).to_dict("records"):
        cell = f"{row['mean']:.4f} ± {row['std']:.4f}"
        interval = f"{row['ci_low']:.4f} to {row['ci_high']:.4f}"
        assert any(cell in line and interval in line for line in lines)
    assert any("0.0206 ± 0.0024" in line for line in lines)
    assert ("epoch: 2; reason: non-finite" if width == 44 else "non-finite") in " ".join(lines)


def thick(axis) -> list:
    return [line for line in axis.lines if line.get_linewidth() == 2]


def test_curves_show_every_run_to_its_end_and_the_carried_mean():
    runs = make_runs({(2, "b-sgd"): [0.02] * 3, (2, "un"): [0.02] * 3}, failed=((2, "un", 2),))
    history = prepared(runs)[1]
    figure = figures.draw_curves(history)
    error, loss = figure.axes
    # Runs 0 and 2 have 4 epochs, run 1 has 3: 0.3/e + 0.01 run, run 1 keeping 0.1 + 0.01.
    # Of UN, run 2 failed: the mean is that of runs 0 and 1.
    expected = [0.31, 0.16, 0.11, (0.075 + 0.11 + 0.095) / 3], [0.305, 0.155, 0.105, 0.0925]
    np.testing.assert_allclose([line.get_ydata() for line in thick(loss)], expected, rtol=1e-12)
    thin = [line for line in loss.lines if line.get_linewidth() < 1 and len(line.get_xdata()) > 1]
    assert [np.isfinite(line.get_ydata()).sum() for line in thin] == [4, 3, 4, 4, 3, 1]
    (cross,) = [line for line in loss.lines if line.get_marker() == "x" and len(line.get_xdata())]
    # Its loss of 1000 does not press the others flat: the cross sits on the frame.
    assert loss.get_ylim()[1] < 0.5
    np.testing.assert_allclose(cross.get_ydata(), loss.get_ylim()[1])
    assert "Crosses" in figure.get_supxlabel()
    np.testing.assert_allclose(thick(error)[0].get_ydata()[0], 7.1, rtol=1e-12)
    history.loc[0, "val_error"] = 0.0  # takes the logarithm away
    error, loss = figures.draw_curves(history).axes
    assert (error.get_yscale(), loss.get_yscale()) == ("linear", "log")
    assert error.get_ylim()[0] < 0 < error.get_ylim()[1]


def test_learning_rates_have_a_logarithmic_axis_and_a_geometric_mean():
    runs = report.prepare_runs(make_runs({(depth, "un"): [0.02] * 2 for depth in (1, 2, 4)}))
    other = make_runs({(1, "sm"): [0.1]})  # of which there is a history alone
    history = make_history(pd.concat([runs, other], ignore_index=True))
    history.loc[(history["run"] == 1), "lr"] *= 100
    figure = figures.draw_rates(report.prepare_history(history, runs))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["UN"]
    rates = [0.01 * 0.5**e * 10 for e in (1, 2, 3)] + [0.01 * math.sqrt(0.5**4 * 0.5**3) * 10]
    for axis, depth in zip(figure.axes, (1, 2, 4), strict=True):
        assert (axis.get_yscale(), axis.get_title("left")) == ("log", f"depth {depth}")
        np.testing.assert_allclose(thick(axis)[0].get_ydata(), rates, rtol=1e-12)


def test_errors_show_points_means_intervals_pairs_and_the_paper():
    runs = like_the_paper(failed=((2, "un", 4), (4, "b-sgd", 0), (4, "b-sgd", 1)))
    table = summed(runs).set_index(["depth", "update"])
    figure = figures.draw_test_errors(report.prepare_runs(runs), report.PAPER)
    names = [[text.get_text() for text in axis.get_xticklabels()] for axis in figure.axes]
    assert names == [
        ["B-SGD\nn = 10", "UN\nn = 9\n1 diverged"], ["B-SGD\nn = 8\n2 diverged", "UN\nn = 10"]
    ]  # fmt: skip
    for depth, axis, pairs in zip((2, 4), figure.axes, (9, 8), strict=True):
        drawn = np.concatenate([np.ravel(line.get_ydata()) for line in axis.lines])
        healthy = 100 * runs.loc[(runs["depth"] == depth) & ~runs["diverged"], "test_error"]
        means = 100 * table.loc[depth, ["mean", "ci_low", "ci_high", "paper_mean"]].to_numpy()
        for value in [*healthy, *means.ravel()]:
            assert np.isclose(drawn, value, atol=1e-9).any(), (depth, value)
        connecting = [line.get_xdata() for line in axis.lines if line.get_color() == style.PALE]
        # each in the same place of both columns
        np.testing.assert_allclose(np.diff(connecting), np.ones((pairs, 1)))
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["one run", "mean, 95 % interval", "paper: mean ± std", "pair of runs"]


def test_runs_that_lie_apart_are_named_in_the_errors_figure():
    errors = [0.0200, 0.0201, 0.0202, 0.0203, 0.0300, 0.0204, 0.0100]
    axis = figures.draw_test_errors(report.prepare_runs(make_runs({(2, "un"): errors})), {}).axes[0]
    names = {text.get_text(): text.xy[1] for text in axis.texts}
    assert names == pytest.approx({"4": 3.0, "6": 1.0})
    # Quartiles 2 and 4, fences −1 and 7: what lies on one is inside.
    assert not statistics.find_outliers(np.array([2.0, 2, 3, 4, 4, 7, 2, 3, 4])).any()
    assert not statistics.find_outliers(np.array([0.0, 0, 100])).any()  # too few


def test_filters_are_images_in_order_on_one_symmetric_scale():
    weights = {name: np.zeros((5, 6)) for name in ("un", "b-sgd")}
    weights["un"][1] = [1, 2, 3, 4, 5, 6]
    weights["b-sgd"][4] = -6
    left, right = (a for a in figures.draw_filters(weights, (2, 3), 4).axes if a.images)
    assert (left.get_title("left"), right.get_title("left")) == ("depth 4, B-SGD", "depth 4, UN")
    image, flat = (np.asarray(axis.images[0].get_array()) for axis in (right, left))
    assert image.shape == (2 * 2 + 2, 3 * 3 + 2 * 2)  # 5 images in 2 rows and 3 columns
    # each filter divided by its norm: √91, and 6 √6
    np.testing.assert_allclose(image[0:2, 5:8] * 91**0.5, [[1, 2, 3], [4, 5, 6]], rtol=1e-12)
    np.testing.assert_allclose(flat[4:6, 5:8], np.full((2, 3), -(6**-0.5)), rtol=1e-12)
    ((low, high),) = {axis.images[0].get_clim() for axis in (left, right)}
    assert low == -high
    assert 5 / 91**0.5 <= high <= 6 / 91**0.5
    colours = figures.draw_filters({"un": np.arange(6.0).reshape(1, 6)}, (1, 2, 3), 2)
    image = np.asarray(colours.axes[0].images[0].get_array())  # channel after channel
    np.testing.assert_allclose(image * 55**0.5, [[0, 3, 1, 4, 2, 5]], rtol=1e-12)
    broken = figures.draw_filters({"un": np.full((4, 6), np.nan)}, (2, 3), 2)
    assert broken.axes[0].get_title("left") == "depth 2, UN (grey: not finite)"
    broken.draw_without_rendering()
    for shape in ((64, 783), (0, 784), (784,)):
        with pytest.raises(UserError, match=r"filters of un have shape .* 28 × 28"):
            figures.draw_filters({"un": np.zeros(shape)}, (28, 28), 2)


def test_nine_updates_are_told_apart_by_colour_line_and_marker_alike():
    styles = style.assign_styles(NINE)
    for part in zip(*styles.values(), strict=True):
        assert len(set(part)) == len(NINE)
    assert styles["b-sgd"] == style.assign_styles(["b-sgd"])["b-sgd"]
    assert len(set(style.assign_styles(["b-sgd", "mine", "yours"]).values())) == 3
    assert style.sort_updates(["sm", "un", "a", "b-sgd", "un"]) == ["b-sgd", "un", "a", "sm"]


def test_figures_are_readable_in_a_readme():
    runs, history = prepared(like_the_paper(updates=NINE, n=2))
    both = pd.concat([report.compare_updates(runs).assign(folder=name) for name in "AB"])
    for figure in (
        figures.draw_curves(history),
        figures.draw_rates(history),
        figures.draw_test_errors(runs, report.PAPER),
        figures.draw_filters({update: np.eye(4) for update in NINE}, (2, 2), 2),
        figures.draw_comparison(report.compare_folders(runs, runs, paired=True), both, ("x", "y")),
    ):
        figure.draw_without_rendering()
        width, height = figure.get_size_inches()
        assert width == 8.3  # 800 pixels at a browser's 96 per inch: a point is a point there
        edges = figure.get_tightbbox()
        assert min(edges.x0, edges.y0, width - edges.x1, height - edges.y1) >= 0
        assert min(t.get_fontsize() for t in figure.findobj(Text) if t.get_text()) >= 9
        for axis in figure.axes:
            low, high = axis.get_xlim()
            labels = [t for t in axis.get_xticklabels() if low <= t.get_position()[0] <= high]
            names = [label.get_window_extent() for label in labels]
            assert not any(a.overlaps(b) for a, b in itertools.combinations(names, 2))


def test_build_gives_every_file_and_the_same_bytes_whatever_the_order_and_settings():
    runs = like_the_paper(failed=((2, "un", 1),), depths=(2,), n=3)
    frames = runs, make_history(runs), make_sweep(runs)
    rng = np.random.default_rng(0)
    filters = {(2, update): rng.normal(size=(4, 784)) / 28 for update in ("b-sgd", "un")}
    files, _ = report.build(*frames, filters)
    pictures = ("curves", "learning_rates", "test_errors", "filters_depth2")
    assert set(files) == {
        "table2.csv", "table2.md", "table2.tex", "differences.csv", "runs.md",
        *(f"figures/{name}.{ending}" for name in pictures for ending in ("png", "svg")),
    }  # fmt: skip
    assert "Software" not in Image.open(io.BytesIO(files["figures/curves.png"])).info
    assert b"<dc:date>" not in files["figures/curves.svg"]
    before = dict(mpl.rcParams)
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black", "savefig.bbox": "tight"}):
        shuffled = [frame.sample(frac=1, random_state=5) for frame in frames]
        again, _ = report.build(*shuffled, dict(reversed(filters.items())))
    assert [name for name in files if files[name] != again[name]] == []
    assert dict(mpl.rcParams) == before


def test_runs_that_all_failed_are_shown_all_the_same():
    runs = make_runs({(2, "un"): [0.1, 0.1]}, failed=((2, "un", 0), (2, "un", 1)))
    assert "| 2 | UN | 0 | 2 | – | – | 0.0199 ± 0.0046 |" in text_of(runs)
    history = make_history(runs).assign(train_loss=math.nan, val_error=math.inf)
    for table in (history, history[:0]):  # the latter where no rate was found
        ready = report.prepare_history(table, report.prepare_runs(runs))
        figures.draw_curves(ready).draw_without_rendering()
        figures.draw_rates(ready).draw_without_rendering()
