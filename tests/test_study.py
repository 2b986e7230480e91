"""Studies: the runs are what the plan declares, can be gone on with, and controls are controls."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.common import ROOT, a_line, call
from tests.study_example import run_row
from unitnorm.cli import study
from unitnorm.data import load_dataset
from unitnorm.errors import UserError
from unitnorm.run.config import PRESETS, load, presets
from unitnorm.run.loop import Session
from unitnorm.run.planner import add
from unitnorm.run.records import Records, read
from unitnorm.study import experiment
from unitnorm.study.config import ArmPlan, ComparisonPlan, Plan, Seeds
from unitnorm.study.schema import SCHEMA
from unitnorm.study.statistics import choose_rates, unpack_wrong

PLAN = """
question = "Does it work?"
datasets = ["blobs"]
depths = [2]
tune = { first = 100, count = 2 }
compare = { first = 200, count = 3 }
[training]
model = { width = 8, bn_momentum = 0.9 }
loss = { batch_size = 20 }
train = { train_images = 400, validation_images = 150, min_epochs = 5, max_epochs = 5 }
[all_arms]
rates = [0.01]
[arms]
b-sgd = {}
un = { rates = [0.01, 0.001] }
carried = { update = "un-carried", schedule = "follow" }
constant = { update = "un", rates = [0.002], filters_rates = [0.01], schedule = "constant" }
spread = { update = "un", start = "filters", spreads = [0.0, 2.0] }
[[comparisons]]
name = "UN − B-SGD"
arm = "un"
baseline = "b-sgd"
"""
RESULTS = ROOT / "results" / "study"


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "small.toml"
    path.write_text(PLAN)
    return path


@pytest.fixture(scope="module")
def plan(plan_file) -> Plan:
    return load(plan_file, {}, Plan)


@pytest.fixture(scope="module")
def blobs(idx_folder):
    return load_dataset("blobs", idx_folder)


@pytest.fixture(scope="module", autouse=True)
def two_seeds_at_once():
    """So that all groups of an arm have as many blocks, and are compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "SEEDS_AT_ONCE", 2)
        yield


@pytest.fixture(scope="module")
def done(plan, blobs) -> Records:
    records, trials = Records.empty(SCHEMA), experiment.Study(plan)
    while groups := list(trials.missing(records)):
        records = add(records, trials.compute(groups[0], blobs, Session()))
    return records


def missing(plan: Plan, runs: pd.DataFrame) -> list[tuple[list[str], tuple[int, ...]]]:
    """The arms and seeds of each group that is to be computed."""
    known = replace(Records.empty(SCHEMA), tables={"runs": runs})
    groups = [group.cells for group in experiment.Study(plan).missing(known)]
    return [([*cells["arm"].unique()], (*cells["seed"].unique(),)) for cells in groups]


def test_every_declared_run_is_there_and_no_other(done, plan):
    runs = done["runs"]
    assert runs.groupby(["arm", "purpose"]).size().to_dict() == {
        ("b-sgd", "compare"): 3, ("un", "tune"): 4, ("un", "compare"): 3,
        ("carried", "compare"): 3, ("constant", "compare"): 3, ("spread", "compare"): 6,
    }  # fmt: skip
    assert set(runs.loc[runs["purpose"] == "tune", "seed"]) == {100, 101}
    assert experiment.count_runs(plan) == {"tune": 4, "compare": 18}
    assert experiment.count_recorded(plan, runs) == {"tune": 4, "compare": 18}
    fewer = plan.model_copy(update={"compare": Seeds(first=plan.compare.first, count=1)})
    assert experiment.count_recorded(fewer, runs) == {"tune": 4, "compare": 6}
    tuned = (runs["arm"] == "un") & (runs["purpose"] == "compare")
    other = runs.assign(rest_rate=runs["rest_rate"].mask(tuned, 7.0))
    assert experiment.count_recorded(plan, other)["compare"] == 15  # not at the chosen rate


def test_what_is_recorded_of_a_run_agrees_with_itself(done):
    compared = done["runs"].query("purpose == 'compare'")
    for row in compared.to_dict("records"):
        assert unpack_wrong(row["wrong"]).mean() == pytest.approx(row["test_error"])
        assert row["epochs"] == 5
        assert row["test_error_5"] == pytest.approx(row["test_error"])
        assert np.isnan(row["test_error_10"])
    constant = compared.query("arm == 'constant'").iloc[0]
    # unit filters at a constant rate have that effective rate
    found = constant[["effective_rate", "filters_rate"]]
    assert list(found) == pytest.approx([0.01, 0.01], rel=1e-5)
    tuned = done["runs"].query("purpose == 'tune'").groupby("rest_rate")["val_error"].mean()
    assert set(compared.query("arm == 'un'")["rest_rate"]) == {tuned.idxmin()}


def test_controls_are_controls(done):
    runs = done["runs"].set_index(["arm", "seed"])
    spread = done["runs"].query("arm == 'spread'").set_index(["seed", "spread"])["test_error_5"]
    for seed in (200, 201, 202):
        b_sgd, carried = runs.loc[("b-sgd", seed)], runs.loc[("carried", seed)]
        # UN at B-SGD's rates is B-SGD; float32 and ε part them in time, five epochs do not
        assert carried["train_loss_5"] == pytest.approx(b_sgd["train_loss_5"], rel=2e-2)
        # UN does not see how the filters are scaled
        assert spread[seed, 2.0] == pytest.approx(spread[seed, 0.0], abs=0.03)


def test_a_plan_takes_more_seeds_and_keeps_its_arms(plan_file, done):
    recorded = json.loads(json.dumps(load(plan_file, {}, Plan).protocol()))
    more = load(plan_file, {"compare.count": 4}, Plan)
    assert [seeds for _, seeds in missing(more, done["runs"])] == [(203,)]
    some = load(plan_file, {"arms.un.count": 5}, Plan)  # more of one arm than of the others
    assert missing(some, done["runs"]) == [(["un"], (203, 204))]
    assert experiment.count_runs(some) == {"tune": 4, "compare": 20}
    assert more.conflict(recorded) is some.conflict(recorded) is None
    changed = load(plan_file, {"arms.un.rates": [0.1]}, Plan)
    assert "arm un" in str(changed.conflict(recorded))
    wider = load(plan_file, {"arms.un.rates": [0.1, 0.01, 0.001]}, Plan)
    assert wider.conflict(recorded) is None
    assert missing(wider, done["runs"]) == [(["un"], (100, 101))]
    runs = done["runs"][done["runs"]["arm"] == "un"]
    new = runs[(runs["purpose"] == "tune") & (runs["filters_rate"] == 0.01)]
    better = pd.concat([done["runs"], new.assign(filters_rate=0.1, rest_rate=0.1, val_error=0.0)])
    with pytest.raises(UserError, match="un in blobs was compared at other rates"):
        missing(wider, better)


@pytest.mark.parametrize(
    ("lost", "trained"),
    [
        (["constant"], ["constant"]),
        (["carried"], ["b-sgd", "carried"]),
        (["b-sgd", "carried"], ["b-sgd", "carried"]),
    ],
)
def test_of_a_seed_what_is_missing_is_trained_and_the_arm_that_it_follows(
    lost, trained, plan, done
):
    runs = done["runs"]
    kept = runs[~(runs["arm"].isin(lost) & (runs["seed"] == 201))]
    assert missing(plan, kept) == [(trained, (201,))]


def test_the_command_trains_reports_and_verifies(plan_file, idx_folder, tmp_path, done):
    """In two steps, between which it was looked at; a page that is there is kept up to date."""
    out, page = tmp_path / "study", tmp_path / "index.html"
    words = ("study", plan_file, "--data", f"blobs={idx_folder}", "--out", out)
    assert "compare: 18 runs, 0 recorded" in call(*words, "--dry-run")
    assert not out.exists()
    page.write_text("my own page")
    call(*words, "--set", "compare.count=2")
    assert page.read_text() == "my own page"  # which is nobody's to replace
    call(*words, "--report-only", "--page")
    assert "extended" not in (out / "comparisons.md").read_text()
    before, looks = page.read_bytes(), (out / "looks.csv").read_text()
    assert len(looks.splitlines()) == 2  # the same pairs again are no new look

    said = " ".join(call(*words).split())
    assert "22 of 22 runs" in said
    assert "extended after a look at n = 2: " in said
    assert b"extended after a look at n = 2: " in page.read_bytes() != before
    pd.testing.assert_frame_equal(read(out, SCHEMA)["runs"], done["runs"])
    assert (out / "plan.toml").read_text() == PLAN
    assert list(pd.read_csv(out / "comparisons.csv")["n"]) == [3]
    assert "| comparison   |   blobs, depth 2 |" in (out / "summary.md").read_text()
    assert (out / "looks.csv").read_text().startswith(looks)
    assert "verified" in call("verify", "--out", out, "--data-dir", idx_folder, "--run", 7)

    (out / "looks.csv").write_text("dataset,n\nblobs,2\n")
    said = call("study", plan_file, "--report-only", "--out", out, code=2)
    assert "looks.csv: damaged" in said


def test_a_plan_that_was_changed_after_its_first_runs_says_so():
    empty = Records.empty(SCHEMA)
    assert study.tell_when_declared(empty, b"50 seeds", "monday") == "monday"
    known = replace(
        empty.with_files({"plan.toml": b"50 seeds"}), provenance={"plan_committed": "monday"}
    )
    assert study.tell_when_declared(known, b"50 seeds", "sunday") == "monday"
    assert study.tell_when_declared(known, b"99 seeds", "sunday") == "monday, changed sunday"
    late = replace(known, provenance={"plan_committed": None})
    told = study.tell_when_declared(late, b"99 seeds", None)
    assert told == "not committed, changed not committed"


def test_the_time_of_a_run_is_that_of_one_that_goes_on(plan, blobs, monkeypatch, hurried):
    """The first rate of a grid may end every run at once, which takes no time."""
    told = []
    status = experiment.run_many.Program.status
    monkeypatch.setattr(
        experiment.run_many.Program,
        "status",
        lambda self, state: told.append(status(self, state)) or told[-1],
    )
    alone = {"b-sgd": ArmPlan(update="b-sgd", rates=[1e6, 0.01])}
    changed = plan.model_copy(update={"arms": alone, "depths": [1]})
    assert min(experiment.measure_pace(changed, blobs, images=100)) > 0
    assert [one.active for one in told] == [True] * 2  # two epochs


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms.un.update": "nothing"}, "nothing"),
        ({"compare.first": 100}, "share seeds"),
        ({"compare.first": 50, "arms.un.count": 51}, "share seeds"),
        ({"arms.carried.count": 5}, "carried follows the first arm, but has another"),
        ({"halving": [[2, 1]]}, "after 2 of 2 tuning seeds"),
        ({"tune.count": 0, "arms.un": {"decays": [0.0, 0.1]}}, "several rates"),
        ({"depths": []}, "nothing to train"),
        ({"training.loss.batch": 3}, "unknown key loss.batch"),
        ({"arms.un.schedule": "linear"}, "schedule"),
        ({"arms.un": 3}, "arms.un = 3"),
        ({"arms.un.rates": [0.1, 0.1000000001]}, "arm un: a rate, decay or spread stands twice"),
        ({"arms.un.spreads": [0.0, 1.0]}, 'arm un: start = "balanced" has no spread but 0'),
        ({"all_arms": 3}, "all_arms = 3"),
        ({"comparisons": [{"name": "x", "arms": ["un", "b-sgd"], "baseline": "un"}]}, "named by"),
        ({"comparisons": [{"arms": ["sm"], "baseline": "un"}]}, "no arm 'sm'"),
        ({"comparisons": [{"arm": "un", "baseline": "b-sgd", "metric": "test_error_7"}]}, "a text"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_in_a_line(changes, said, plan_file):
    with a_line(said):
        load(plan_file, changes, Plan)


def test_a_data_set_without_a_place_names_the_option_of_studies():
    said = call("study", "study/annealed", "--out", "nowhere", code=2)
    assert "--data fashion=FOLDER" in said
    assert "--data-dir" not in said


def test_arms_share_what_is_said_once_and_several_may_have_one_baseline(plan_file):
    several = [{"arms": ["un", "constant"], "baseline": "b-sgd", "metric": "test_loss"}]
    plan = load(plan_file, {"comparisons": several, "arms.un@slow": {"rates": [0.1]}}, Plan)
    assert (plan.arms["un@slow"].update, plan.arms["un@slow"].rates) == ("un", [0.1])
    assert plan.arms["spread"].rates == [0.01]
    told = [(c.name, c.arm, c.metric) for c in plan.comparisons]
    assert told == [(f"{arm} − b-sgd", arm, "test_loss") for arm in ("un", "constant")]
    assert "all_arms" not in plan.protocol()  # the records hold each arm as it is


def test_a_decay_is_an_axis_of_the_grid():
    arm = ArmPlan(update="un", rates=[1.0], filters_rates=[2.0, 3.0], decays=[0.0, 0.5])
    assert set(arm.grid()) == {(f, 1.0, eta) for f in (2.0, 3.0) for eta in (0.0, 0.5)}


def test_a_plan_names_its_runs_by_the_float32_that_the_records_hold():
    arm = ArmPlan(update="un", rates=[1 / 3], decays=[0.1], spreads=[0.47712125471966244])
    assert (arm.rates, arm.decays, arm.spreads) == ([0.33333334], [0.1], [0.47712126])
    with pytest.raises(ValueError, match="greater than 0"):
        ArmPlan(update="un", rates=[1e-50])


def test_halving_gives_more_seeds_to_the_best_settings_and_chooses_among_those(plan_file):
    changes = {"arms": {"un": {"rates": [0.1, 0.2, 0.3, 0.4]}}, "comparisons": []}
    plan = load(plan_file, {**changes, "tune.count": 4, "halving": [[1, 3], [2, 2]]}, Plan)
    assert experiment.count_runs(plan) == {"tune": 4 + 3 + 2 * 2, "compare": 3}
    # the first is lucky with one seed, the second with two, the third never runs with more
    errors = {0.1: (1, 9), 0.2: (2, 2, 9, 9), 0.3: (8,), 0.4: (3, 5, 1, 1)}
    runs, rungs = SCHEMA.frame("runs", []), []
    while (groups := missing_rates(plan, runs))[0][0] == "tune":
        rungs.append({(rate, seed) for _, rate, seed in groups})
        rows = [
            run_row("un", seed, errors[rate][seed - 100] / 100, filters_rate=rate, rest_rate=rate)
            for _, rate, seed in groups
        ]
        found = pd.DataFrame(rows).assign(dataset="blobs", purpose="tune", schedule="cosine")
        runs = pd.concat([runs, found.reindex(columns=runs.columns)])
    assert rungs == [
        {(rate, 100) for rate in errors},
        {(rate, 101) for rate in (0.1, 0.2, 0.4)},
        {(rate, seed) for rate in (0.2, 0.4) for seed in (102, 103)},
    ]
    assert groups == [("compare", 0.4, seed) for seed in (200, 201, 202)]
    assert list(choose_rates(runs)["filters_rate"]) == [0.4]


def missing_rates(plan: Plan, runs: pd.DataFrame) -> list[tuple[str, float, int]]:
    """Purpose, rate and seed of every run that can be trained now."""
    known = replace(Records.empty(SCHEMA), tables={"runs": runs})
    cells = pd.concat([group.cells for group in experiment.Study(plan).missing(known)])
    return [*cells[["purpose", "filters_rate", "seed"]].itertuples(index=False, name=None)]


@pytest.mark.parametrize("name", [path.name for path in sorted(RESULTS.iterdir()) if path.is_dir()])
def test_a_plan_of_the_package_means_the_arms_and_comparisons_of_its_records(name):
    plan = load(f"study/{name}", {}, Plan)
    recorded = experiment.plan_of(read(RESULTS / name, SCHEMA))
    assert plan.arms == recorded.arms
    assert plan.comparisons == recorded.comparisons
    assert plan.conflict(recorded.model_dump()) is None


def test_every_plan_of_the_package_can_be_read_and_the_template_has_every_key():
    plans = [name for name in presets() if name.startswith("study/")]
    # so declared before its results; to be quick; dear
    fewer = {
        "study/starts": 20, "study/template": 3, "study/cifar": 30, "study/cifar-gpu": 30,
        "study/rivals": 40, "study/depth": 60, "study/readings": 40, "study/growth": 40,
        "study/rivals-wide": 40,
    }  # fmt: skip
    for name in plans:
        plan = load(name, {}, Plan)
        assert plan.compare.count >= fewer.get(name, 100)
        assert missing(plan, SCHEMA.frame("runs", []))
    template = (PRESETS / "study" / "template.toml").read_text()
    for section in (Plan, ArmPlan, ComparisonPlan, Seeds):
        for key in section.model_fields:
            assert re.search(rf"(^|[\s\[{{`]){key}\b", template, re.M), key
