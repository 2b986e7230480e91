"""The README says what the results say, and points at what exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from unitnorm.run import records
from unitnorm.segment.schema import SCHEMA
from unitnorm.segment.tables import select_best

ROOT = Path(__file__).parent.parent
ENDS = ("ci_low", "ci_high")
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "results/README.md",
    "results/symmetry/README.md",
    "configs/README.md",
)


def words(page):
    """A page on one line, with plain minus signs."""
    return " ".join((ROOT / page).read_text().split()).replace("−", "-")


def best_epochs(folder, split):
    """Figures of all images of a split, a row per run of SegNet."""
    rows = select_best(records.read(folder, SCHEMA), split)
    return rows[rows["sequence"] == "all"]


@pytest.fixture(params=PAGES)
def page(request):
    return request.param


def test_the_tables_are_those_of_the_results(page):
    """Of the published results alone, whatever somebody has run."""
    spec = importlib.util.spec_from_file_location("readme", ROOT / ".ci" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / page).read_text()
    assert module.filled(text) == text
    for name in re.findall(r"<!-- from (\S+) -->", text):
        assert name.startswith("results/")
        assert (ROOT / name).exists()


def test_the_readme_has_the_table():
    assert "<!-- from results/table2/table2.md -->" in (ROOT / "README.md").read_text()


def test_the_answers_figures_are_those_of_the_records():
    readme = words("README.md")
    answer = readme[readme.index("**The answer.**") : readme.index("## Install")]
    rows = pd.read_csv(ROOT / "results" / "study" / "effective-rate" / "comparisons.csv")
    kind = rows["comparison"].str.extract(r"(each|constraint|rate)", expand=False)
    constraint = rows[kind == "constraint"]
    assert set(rows["n"]) == {100}
    assert len(constraint) == 12
    assert constraint["p_holm"].min() > 0.05
    assert constraint[["ci_low", "ci_high"]].abs().to_numpy().max() < 0.20

    def span(of, columns=("difference", "difference")):
        low, high = columns
        return f"{of[low].min():+.2f} to {of[high].max():+.2f}"

    rate, own = rows[kind == "rate"], rows[(kind == "each") & (rows["dataset"] == "fashion")]
    assert f"constraint changes the error by {span(constraint)} (twelve comparisons" in answer
    assert f"{span(rate[rate['dataset'] == 'mnist'])} on MNIST" in answer
    assert f"{span(rate[rate['dataset'] == 'fashion'])} on Fashion-MNIST" in answer
    assert rate["p_holm"].max() < 0.001
    assert f"(25 epochs: {span(own)}, intervals from {span(own, ENDS)})" in answer
    best = pd.read_csv(ROOT / "results" / "study" / "best-rates" / "comparisons.csv")
    assert set(best["n"]) == {100}
    assert len(best) == 12
    schedule = best["comparison"].str.extract(r"(bold|constant|cosine)", expand=False)
    cosine = best[schedule == "cosine"]
    assert set(cosine["verdict"]) == {"better"}
    least, most = -cosine["difference"].max(), -cosine["difference"].min()
    assert f"lower by {least:.2f} to {most:.2f} percentage points" in answer
    verdicts = best.groupby([schedule, "dataset"])["verdict"].agg(list)
    assert verdicts["bold", "mnist"] == ["better"] * 2
    assert verdicts["bold", "fashion"] == ["open"] * 2
    assert sorted(best.loc[schedule == "constant", "verdict"]) == ["better", *["worse"] * 3]
    ranks = pd.read_csv(ROOT / "results" / "study" / "best-rates" / "ranking.csv")
    for update in ("un", "b-sgd"):  # cosine is the best schedule of both, everywhere
        mine = ranks[ranks["update"] == update]
        assert set(mine.groupby(["dataset", "depth"])["arm"].first()) == {f"{update}@cosine"}
    rows = pd.read_csv(ROOT / "results" / "study" / "annealed" / "comparisons.csv")
    kind = rows["comparison"].str.extract(r"^(constraint|rate)", expand=False)
    constraint, rate = rows[kind == "constraint"], rows[kind == "rate"]
    assert len(constraint) == 8
    assert set(constraint["verdict"]) <= {"open", "equivalent"}
    assert set(rate["verdict"]) == {"better"}
    assert f"changes the test error by {span(constraint)} percentage points" in answer
    assert f"eight comparisons of {constraint['n'].min()}" in answer
    assert f"by {span(rate)}: the whole lead" in answer
    starts = pd.read_csv(ROOT / "results" / "study" / "starts" / "comparisons.csv")
    ends = starts["comparison"].str.contains("over 2 decades")
    assert set(starts.loc[ends, "n"]) == {100}
    assert set(starts.loc[~ends, "n"]) == {20}
    name = "filters over 2 decades − balanced"
    for update, text in (
        ("b-sgd", "B-SGD ends higher by {} points at depth 2 ({}) and {} at depth 4 ({})"),
        ("un", "UN by {} ({}) and {} ({})"),
    ):
        mine = starts[
            (starts["comparison"] == f"{update}, {name}") & (starts["dataset"] == "mnist")
        ]
        found = []
        for depth in (2, 4):
            row = mine[mine["depth"] == depth]
            interval = span(row, ENDS).replace("-0.00", "0.00")
            found += [
                f"{row['difference'].item():.2f}",
                interval.replace("+", "") if update == "b-sgd" else interval,
            ]
        assert text.format(*found) in answer
    assert starts.loc[~ends, "p_holm"].min() > 0.5
    filters = starts[ends & starts["comparison"].str.contains("filters")].set_index("arm")
    assert set(filters.loc["un@2", "verdict"]) == {"open"}  # none significant
    fashion, mnist = (filters[filters["dataset"] == name] for name in ("fashion", "mnist"))
    assert set(fashion["verdict"]) == {"open"}
    half = (fashion["ci_high"] - fashion["ci_low"]) / 2
    assert f"over two (100 pairs, ±{half.min():.2f} to ±{half.max():.2f})" in answer
    assert set(mnist.loc["weight-norm@2", "verdict"]) == {"worse"}
    assert mnist.loc["sm@2", "difference"].max() < mnist.loc["un@2", "difference"].max()
    left = starts[ends & starts["comparison"].str.contains("^un, (?:pairs|theta)")]
    low, high = left["difference"].min(), left["difference"].max()
    assert f"over two decades by {low:.2f} to {high:.2f} points, seven of these eight" in answer
    assert sorted(left["verdict"]) == ["open", *["worse"] * 7]
    for row in pd.read_csv(ROOT / "results" / "50-runs" / "differences.csv").itertuples():
        lower, low, high = (-100 * x for x in (row.mean, row.ci_high, row.ci_low))
        assert f"{lower:.2f}" in answer
        assert f"{low:.2f} to {high:.2f}" in answer


def test_what_is_said_of_segnet_is_in_its_records():
    folder = ROOT / "results" / "segnet"
    best = {split: best_epochs(folder, split) for split in ("test", "val")}
    for page in ("README.md", "results/README.md"):
        text = words(page)
        for split, wanted in (
            ("test", "ahead by {} points of mean IoU on test (95 % interval {} to {})"),
            ("val", "by {} on val ({} to {})"),
        ):
            of = best[split].pivot(index="run", columns="update", values="mean_iou")
            gap = 100 * (of["un"] - of["b-sgd"])
            assert len(gap) == 3
            half = stats.t.ppf(0.975, 2) * gap.std() / 3**0.5
            ends = (f"{gap.mean() + sign * half:+.1f}" for sign in (-1, 1))
            assert wanted.format(f"{gap.mean():.2f}", *ends) in text
    table = (folder / "renewed" / "test.md").read_text()
    lines = (re.search(rf"^\| {name} .*$", table, re.M) for name in ("%", "mean IoU", "global"))
    cells = ([cell.strip() for cell in line[0].split("|")] for line in lines if line)
    iou, right = {name: found for name, *found in zip(*cells, strict=True)}["renewed/un"]
    told = f"{iou} % mean IoU on CamVid's test images at 360 × 480 and {right} % of the pixels"
    assert told in words("README.md")
    recorded = 100 * best["test"].set_index(["update", "run"]).loc[("un", 0), "mean_iou"]
    (line,) = re.findall(r"^\| mean IoU.*$", table, re.M)
    # columns: b-sgd as recorded, renewed, un as recorded, renewed; measured on another device
    assert float(line.split("|")[4]) == pytest.approx(recorded, abs=0.3)


def test_what_is_said_of_segnets_trials_is_in_their_records():
    text, trials = words("results/README.md"), ROOT / "results" / "segnet-trials"

    def held_out(name):
        (row,) = pd.read_csv(trials / name / "sweep.csv").itertuples()
        assert (row.update, row.base_lr) == ("un", 0.3)
        return row

    weights = [f"{100 * held_out(f'weights-{w}-prior-labels').mean_iou:.1f}" for w in
               ("median", "published", "none")]  # fmt: skip
    told = "median frequency {} % mean IoU, the authors' numbers {}, none {}"
    assert told.format(*weights) in text
    weighted = held_out("weights-median-prior-weights")
    divided = held_out("weights-median-prior-labels")
    told = "mean IoU from {:.1f} to {:.1f} % and global accuracy from {:.1f} to {:.1f}"
    figures = weighted.mean_iou, divided.mean_iou, weighted.global_accuracy, divided.global_accuracy
    assert told.format(*(100 * x for x in figures)) in text
    black = held_out("black-weights-median")
    told = "with black pixels {:.1f} % mean IoU, without {:.1f}"
    assert told.format(100 * black.mean_iou, 100 * weighted.mean_iou) in text
    for name, told in (
        ("black-whole", "{} % mean IoU on test for both updates"),
        ("black-whole-unweighted", "without class weights {}, and {} global accuracy"),
        ("black-whole-stronger", "with stronger changes of the images, {}."),
    ):
        rows = best_epochs(trials / name, "test")
        (iou,) = {f"{100 * x:.1f}" for x in rows["mean_iou"]}
        assert told.format(iou, f"{100 * rows['global_accuracy'].iloc[0]:.1f}") in text
    rates = pd.read_csv(trials / "rates" / "sweep.csv")
    assert set(rates[rates["chosen"]]["base_lr"]) == {0.3}
    assert sorted(rates["base_lr"].unique()) == [0.1, 0.3, 1, 3]
    longer = pd.read_csv(trials / "rates-30-epochs" / "sweep.csv")
    assert longer.set_index("base_lr")["chosen"].idxmax() == 0.3


def test_every_link_leads_somewhere(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not link.startswith("http"):
            assert (ROOT / page).parent.joinpath(link).exists(), link


def test_every_promise_names_tests_that_exist():
    promised = set(re.findall(r"`(test_\w+)`", (ROOT / "CONTRIBUTING.md").read_text()))
    assert len(promised) > 20
    defined = {
        name
        for path in Path(__file__).parent.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert promised <= defined, promised - defined
