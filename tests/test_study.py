"""Studies: the runs are what the plan declares, can be gone on with, and controls are controls."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from unitnorm import cli
from unitnorm.cli import study
from unitnorm.data import load_dataset
from unitnorm.errors import UserError
from unitnorm.run.config import load, presets
from unitnorm.run.loop import Session
from unitnorm.run.records import Records, read
from unitnorm.study import experiment
from unitnorm.study.config import Plan, Seeds
from unitnorm.study.schema import SCHEMA
from unitnorm.study.statistics import unpack_wrong

PLAN = """
question = "Does it work?"
datasets = ["blobs"]
depths = [2]
tune = { first = 100, count = 2 }
compare = { first = 200, count = 3 }
[training]
model = { width = 8, bn_momentum = 0.9 }
loss = { batch_size = 20 }
train = { train_images = 400, validation_images = 150, min_epochs = 6, max_epochs = 6 }
[arms.b-sgd]
update = "b-sgd"
rates = [0.01]
[arms.un]
update = "un"
rates = [0.01, 0.001]
[arms.carried]
update = "un-carried"
rates = [0.01]
schedule = "follow"
[arms.constant]
update = "un"
rates = [0.002]
filters_rates = [0.01]
schedule = "constant"
[arms.spread]
update = "un"
rates = [0.01]
start = "filters"
spreads = [0.0, 2.0]
[[comparisons]]
name = "UN − B-SGD"
arm = "un"
baseline = "b-sgd"
"""
SESSION = Session()


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "small.toml"
    path.write_text(PLAN)
    return path


@pytest.fixture(scope="module")
def blobs(idx_folder):
    return load_dataset("blobs", idx_folder)


@pytest.fixture(scope="module")
def done(plan_file, blobs) -> Records:
    plan = load(plan_file, {}, Plan)
    *_, records = experiment.run_study(plan, {"blobs": blobs}, Records.empty(SCHEMA), SESSION)
    return records


def command(plan_file, idx_folder, out, *more) -> str:
    words = ["study", str(plan_file), "--data", f"blobs={idx_folder}", "--out", str(out), *more]
    result = CliRunner().invoke(cli.main, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_every_declared_run_is_there_and_no_other(done, plan_file):
    runs = done["runs"]
    counts = runs.groupby(["arm", "purpose"]).size().to_dict()
    assert counts == {
        ("b-sgd", "compare"): 3, ("un", "tune"): 4, ("un", "compare"): 3,
        ("carried", "compare"): 3, ("constant", "compare"): 3, ("spread", "compare"): 6,
    }  # fmt: skip
    plan = load(plan_file, {}, Plan)
    assert experiment.count_runs(plan) == {"tune": 4, "compare": 18}
    assert experiment.count_recorded(plan, runs) == {"tune": 4, "compare": 18}
    fewer = plan.model_copy(update={"compare": Seeds(first=plan.compare.first, count=1)})
    assert experiment.count_recorded(fewer, runs) == {"tune": 4, "compare": 6}
    elsewhere = plan.model_copy(update={"depths": [7]})
    assert experiment.count_recorded(elsewhere, runs) == {"tune": 0, "compare": 0}
    assert set(runs.loc[runs["purpose"] == "tune", "seed"]) == {100, 101}


def test_the_tuned_rate_is_the_one_of_the_lowest_mean_validation_error(done):
    tuned = done["runs"].query("purpose == 'tune'").groupby("rest_rate")["val_error"].mean()
    compared = done["runs"].query("purpose == 'compare' and arm == 'un'")
    assert set(compared["rest_rate"]) == {tuned.idxmin()}


def test_what_is_recorded_of_a_run_agrees_with_itself(done):
    for row in done["runs"].query("purpose == 'compare'").to_dict("records"):
        assert unpack_wrong(row["wrong"]).mean() == pytest.approx(row["test_error"])
        assert row["epochs"] == 6
        assert np.isfinite(row["test_error_5"])
        assert np.isnan(row["test_error_10"])
    constant = done["runs"].query("arm == 'constant'").iloc[0]
    # unit filters at a constant rate have that effective rate
    assert constant["effective_rate"] == pytest.approx(0.01, rel=1e-5)
    assert constant["filters_rate"] == pytest.approx(0.01)


def test_un_that_carries_the_norms_is_b_sgd_and_follows_its_rate(done):
    runs = done["runs"].set_index(["arm", "seed"])
    for seed in (200, 201, 202):
        b_sgd, carried = runs.loc[("b-sgd", seed)], runs.loc[("carried", seed)]
        # float32 and ε part them in time; five epochs of a small network do not
        assert carried["train_loss_5"] == pytest.approx(b_sgd["train_loss_5"], rel=2e-2)


def test_un_does_not_see_how_the_filters_are_scaled(done):
    spread = done["runs"].query("arm == 'spread'").set_index(["seed", "spread"])["test_error_5"]
    for seed in (200, 201, 202):
        assert spread[seed, 2.0] == pytest.approx(spread[seed, 0.0], abs=0.03)


def test_a_plan_goes_on_where_it_was_and_takes_more_seeds(plan_file, blobs, done):
    plan = load(plan_file, {}, Plan)
    first = next(experiment.run_study(plan, {"blobs": blobs}, Records.empty(SCHEMA), SESSION))
    *_, resumed = experiment.run_study(plan, {"blobs": blobs}, first, SESSION)
    pd.testing.assert_frame_equal(resumed["runs"], done["runs"])
    more = load(plan_file, {"compare.count": 4}, Plan)
    batches = list(experiment.list_batches(more, done["runs"]))
    assert [batch.seeds for batch in batches] == [(203,)]
    assert more.conflict(json.loads(json.dumps(plan.protocol()))) is None


def test_an_arm_may_have_more_seeds_than_the_others(plan_file, done):
    plan = load(plan_file, {}, Plan)
    more = load(plan_file, {"arms.un.count": 5}, Plan)
    (batch,) = experiment.list_batches(more, done["runs"])
    assert ([variant.arm for variant in batch.variants], batch.seeds) == (["un"], (203, 204))
    assert experiment.count_runs(more) == {"tune": 4, "compare": 20}
    assert experiment.count_recorded(more, done["runs"]) == {"tune": 4, "compare": 18}
    assert more.conflict(json.loads(json.dumps(plan.protocol()))) is None
    assert plan.conflict(json.loads(json.dumps(more.protocol()))) is None


def test_of_a_seed_what_is_missing_is_trained_and_the_arm_that_it_follows(plan_file, done):
    plan = load(plan_file, {}, Plan)
    runs = done["runs"]
    for missing, trained in (
        (["constant"], ["constant"]),
        (["carried"], ["b-sgd", "carried"]),
        (["b-sgd", "carried"], ["b-sgd", "carried"]),
    ):
        kept = runs[~(runs["arm"].isin(missing) & (runs["seed"] == 201))]
        (batch,) = experiment.list_batches(plan, kept)
        assert ([variant.arm for variant in batch.variants], batch.seeds) == (trained, (201,))


def test_only_runs_at_the_chosen_rate_count_as_recorded(plan_file, done):
    plan, runs = load(plan_file, {}, Plan), done["runs"].copy()
    other = (runs["purpose"] == "compare") & (runs["arm"] == "un") & (runs["seed"] == 200)
    runs.loc[other, ["filters_rate", "rest_rate"]] = 7.0
    assert experiment.count_recorded(plan, runs) == {"tune": 4, "compare": 17}


def test_the_command_trains_reports_and_verifies(plan_file, idx_folder, tmp_path, done):
    out = tmp_path / "study"
    assert "compare: 18 runs, 0 recorded" in command(plan_file, idx_folder, out, "--dry-run")
    assert not out.exists()
    said = command(plan_file, idx_folder, out)
    assert "22 of 22 runs" in said
    pd.testing.assert_frame_equal(read(out, SCHEMA)["runs"], done["runs"])
    assert (out / "plan.toml").read_text() == PLAN
    compared = pd.read_csv(out / "comparisons.csv")
    assert list(compared["n"]) == [3]
    assert {"ci_low", "ci_high", "p", "p_holm", "verdict", "dataset"} <= set(compared.columns)
    assert "| comparison   |   blobs, depth 2 |" in (out / "summary.md").read_text()
    words = ["verify", "--out", str(out), "--data-dir", str(idx_folder), "--run", "7"]
    result = CliRunner().invoke(cli.main, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "verified" in result.output


def test_a_plan_that_was_changed_after_its_first_runs_says_so():
    empty = Records.empty(SCHEMA)
    assert study.tell_when_declared(empty, b"50 seeds", "monday") == "monday"
    assert study.tell_when_declared(empty, b"50 seeds", None) is None
    known = replace(
        empty.with_files({"plan.toml": b"50 seeds"}), provenance={"plan_committed": "monday"}
    )
    assert study.tell_when_declared(known, b"50 seeds", "sunday") == "monday"
    assert study.tell_when_declared(known, b"99 seeds", "sunday") == "monday, changed sunday"
    late = replace(known, provenance={"plan_committed": None})
    assert study.tell_when_declared(late, b"50 seeds", "sunday") is None
    more = study.tell_when_declared(late, b"99 seeds", None)
    assert more == "not committed, changed not committed"


def test_the_time_of_a_run_is_that_of_one_that_goes_on(tmp_path, blobs, monkeypatch):
    """The first rate of a grid may end every run at once, which takes no time."""
    told = []
    status = experiment.training.Program.status
    monkeypatch.setattr(
        experiment.training.Program,
        "status",
        lambda self, state: told.append(status(self, state)) or told[-1],
    )
    path = tmp_path / "plan.toml"
    alone = PLAN.split("[arms.b-sgd]")[0] + "[arms.b-sgd]\nupdate = 'b-sgd'\nrates = [1e6, 0.01]\n"
    path.write_text(alone.replace("depths = [2]", "depths = [1, 2]"))
    assert experiment.time_run(load(path, {}, Plan), blobs, images=100) > 0
    assert [one.active for one in told] == [True] * 4  # two epochs of each depth


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms.un.update": "nothing"}, "nothing"),
        ({"compare.first": 100}, "share seeds"),
        ({"compare.first": 50, "arms.un.count": 51}, "share seeds"),
        ({"arms.carried.count": 5}, "carried follows the first arm, but has another"),
        ({"tune.count": 0}, "several rates"),
        ({"training.loss.batch": 3}, "unknown key loss.batch"),
        ({"arms.un.schedule": "linear"}, "schedule"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_in_a_line(changes, said, plan_file):
    with pytest.raises(UserError, match=said) as refused:
        load(plan_file, changes, Plan)
    assert "\n" not in str(refused.value)


def test_an_arm_that_is_recorded_must_stay_what_it_was(plan_file):
    recorded = json.loads(json.dumps(load(plan_file, {}, Plan).protocol()))
    changed = load(plan_file, {"arms.un.rates": [0.1]}, Plan)
    assert "arm un" in str(changed.conflict(recorded))


def test_an_arm_with_lists_stands_for_one_of_each_combination(plan_file, tmp_path):
    written = tmp_path / "each.toml"
    written.write_text(
        PLAN
        + """
[[comparisons]]
each = { update = ["un", "sm"], spread = [0.5, 2] }
name = "{update} over {spread} decades"
arm = "{update}@{spread}"
baseline = "b-sgd"
[arms."{update}@{spread}"]
each = { update = ["un", "sm"], spread = [0.5, 2] }
update = "{update}"
rates = [0.01]
start = "filters"
spreads = ["{spread}"]
"""
    )
    plan, plain = load(written, {"arms.sm@2.rates": [0.1]}, Plan), load(plan_file, {}, Plan)
    arms = {name: arm for name, arm in plan.arms.items() if name not in plain.arms}
    told = {name: (arm.update, arm.spreads, arm.rates) for name, arm in arms.items()}
    assert told == {
        "un@0.5": ("un", [0.5], [0.01]), "un@2": ("un", [2.0], [0.01]),
        "sm@0.5": ("sm", [0.5], [0.01]), "sm@2": ("sm", [2.0], [0.1]),
    }  # fmt: skip
    assert [(c.name, c.arm) for c in plan.comparisons[-2:]] == [
        ("sm over 0.5 decades", "sm@0.5"), ("sm over 2 decades", "sm@2"),
    ]  # fmt: skip
    with pytest.raises(UserError, match="expected lists by name"):
        load(written, {"arms.un.each": 3}, Plan)


def test_every_plan_of_the_package_can_be_read():
    plans = [name for name in presets() if name.startswith("study/")]
    assert len(plans) >= 5
    fewer = {"study/starts": 20}  # so declared before its results
    for name in plans:
        plan = load(name, {}, Plan)
        assert plan.compare.count >= fewer.get(name, 100)
        assert list(experiment.list_batches(plan, SCHEMA.frame("runs", [])))
