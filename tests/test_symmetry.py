"""Each claim about the scaling symmetry, on a small network, so that a wrong update fails it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import PIL.Image
import pytest

from tests import reference
from unitnorm import symmetry
from unitnorm.archbn import training
from unitnorm.archbn.config import Config
from unitnorm.data import load_dataset
from unitnorm.errors import UserError
from unitnorm.report.style import encode
from unitnorm.report.tables import to_csv
from unitnorm.run.config import load
from unitnorm.symmetry import figures, findings, measure
from unitnorm.symmetry.measure import Case, Measured, Subject
from unitnorm.updates import UPDATES

DEPTH, WIDTH, STEPS, EPOCHS, RATE = 2, 8, 20, 2, 0.01
CLAIM, TRAINED = Case("float64", 0.0), Case("float32", 1e-5)
# What the symmetry changes these do not undo.
BLIND = {
    "b-sgd", "sgd-wd", "weight-norm", "un-carried", "b-sgd-median", "sgdp", "adamp", "lars",
    "adam-srt",
}  # fmt: skip
REQUEST = findings.Request("blobs", 20, 0, RATE, STEPS, EPOCHS)


@pytest.fixture(scope="module")
def config(small_toml):
    return load(small_toml, {"depths": [DEPTH]}, Config)


@pytest.fixture(scope="module")
def images(idx_folder):
    return load_dataset(data_dir=str(idx_folder))


@pytest.fixture(scope="module")
def start(config, images):
    """What is measured, and run 0's initial point."""
    train = training.Images(images.train_images, images.train_labels)
    subject = Subject(config, train, images.classes, DEPTH)
    return subject, subject.initial()


@pytest.fixture(scope="module")
def measured(config, images, start):
    """What `measure.measure_all` measures, with fewer updates where that is enough."""
    subject, point = start
    table, trained = measure.record_norms(subject, point, RATE, EPOCHS)
    points = {"start": point, "trained": trained}
    probed = [measure.probe(subject, points, case) for case in measure.list_cases(config)]
    scaling, gradient = (
        pd.concat(tables, ignore_index=True) for tables in zip(*probed, strict=True)
    )
    walked = [follow(images, start, CLAIM, UPDATES)]
    walked.append(follow(images, start, TRAINED, ["b-sgd", "un"]))
    return Measured(scaling, gradient, pd.concat(walked, ignore_index=True), table)


def follow(images, start, case, updates, steps=STEPS):
    subject, point = start
    test = images.test_images[: measure.EVALUATION_IMAGES]
    return measure.follow(subject, test, point, case, list(updates), RATE, steps)


def of(table, case=CLAIM, **columns):
    """The rows of a case with these values."""
    chosen = (table["dtype"] == case.dtype) & (table["bn_epsilon"] == case.bn_epsilon)
    for name, value in columns.items():
        chosen &= table[name] == value
    assert chosen.any()
    return table[chosen]


def numpy_layers(params, alpha=1.0, gamma=1.0):
    """ArchBN's layers for `reference`, with every filter and scale multiplied."""
    return [
        (
            alpha * np.asarray(layer["rows"]["W"], float),
            gamma * np.asarray(layer["norm"]["scale"], float),
            np.asarray(layer["norm"]["bias"], float),
        )
        for _, layer in sorted(params["layers"].items())
    ]


# ---------------------------------------------------------------- (a) the loss


def test_the_loss_is_the_same_over_ten_decades(measured):
    positive = of(measured.scaling)[lambda t: t["alpha"] > 0]
    for kind in ("all", "own"):
        for point in ("start", "trained"):
            part = positive[(positive["filters"] == kind) & (positive["point"] == point)]
            assert part["alpha"].max() / part["alpha"].min() == pytest.approx(1e10)
            assert part["change"].max() < 1e-12
            assert part["loss"].min() > 0.01


def test_a_negative_alpha_changes_the_loss_unless_the_scale_turns_with_it(measured):
    negative = of(measured.scaling)[lambda t: t["alpha"] < 0]
    assert negative[negative["compensated"]]["change"].max() < 1e-12
    assert negative[~negative["compensated"]]["change"].min() > 1e-3
    # the same network at every negative α, though another one than at α > 0
    plain = negative[~negative["compensated"] & (negative["point"] == "trained")]
    np.testing.assert_allclose(plain["loss"], plain["loss"].iloc[0], rtol=1e-12)


def test_alpha_zero_loses_the_feature(measured):
    assert of(measured.scaling, alpha=0.0)["loss"].isna().all()  # 0/0
    zero = of(measured.scaling, TRAINED, alpha=0.0, filters="all", point="start")
    assert zero["loss"].item() == pytest.approx(np.log(4), rel=1e-6)  # four classes, all alike
    assert (of(measured.scaling, TRAINED, alpha=0.0)["change"] > 1e-4).all()


@pytest.mark.parametrize("alpha", [1.0, -1.0, 1e-3])
@pytest.mark.parametrize("case", [CLAIM, TRAINED])
def test_loss_and_gradient_are_those_of_numpy(start, measured, alpha, case):
    epsilon = case.bn_epsilon
    subject, point = start
    losses, norms, shares = [], [], []
    for index in subject.batches(measure.PROBE_BATCHES):
        x, y = subject.train.pixels[index].astype(float), subject.train.labels[index]
        theta = np.asarray(point.params["theta"]["W"], float)
        layers = numpy_layers(point.params, alpha)
        losses.append(reference.forward(layers, theta, x, y, epsilon)[0] / len(y))
        gradients = reference.gradients(layers, theta, x, y, epsilon)[0]
        norms.append(np.sqrt(sum((dW**2).sum() for dW, _, _ in gradients)))
        kept = reference.forward(numpy_layers(point.params), theta, x, y, epsilon)[2][0]
        variances = np.concatenate([(h @ W.T).var(0) for h, W, *_ in kept])
        shares.append((epsilon / (alpha**2 * variances)).max())
    columns = {"alpha": alpha, "filters": "all", "point": "start", "compensated": False}
    row = of(measured.scaling, case, **columns)
    close = 1e-12 if case == CLAIM else 1e-5
    assert row["loss"].item() == pytest.approx(np.mean(losses), rel=close)
    assert row["epsilon_share"].item() == pytest.approx(max(shares), rel=close)
    if alpha > 0:
        row = of(measured.gradient, case, **columns)
        assert row["norm"].item() == pytest.approx(np.mean(norms), rel=10 * close)


def test_epsilon_ends_the_invariance_at_small_alpha(measured):
    part = of(measured.scaling, TRAINED, filters="all", point="start", compensated=False)
    change = part.set_index("alpha")["change"]
    assert change[1e-5] > 0.01
    assert change[1e5] < 1e-4


# ---------------------------------------------------------------- (b) the gradient


def test_the_gradient_falls_as_one_over_alpha(measured):
    for point in ("start", "trained"):
        part = of(measured.gradient, point=point, filters="all", compensated=False)
        part = part[part["alpha"] > 0]
        slope = np.polyfit(np.log10(part["alpha"]), np.log10(part["norm"]), 1)[0]
        assert slope == pytest.approx(-1, abs=1e-9)
    every = of(measured.gradient)[lambda t: t["alpha"] != 0]
    assert (every["alpha"] < 0).any()
    assert every["deviation"].max() < 1e-10  # entry by entry, each filter by its own α
    np.testing.assert_allclose(every["norm"], every["expected"], rtol=1e-10)


def test_epsilon_bounds_the_gradient(measured):
    part = of(measured.gradient, TRAINED, filters="all", point="start", compensated=False)
    smallest = part[part["alpha"] == 1e-5]
    assert smallest["norm"].item() < 0.1 * smallest["expected"].item()


# ---------------------------------------------------------------- (c) trajectories


@pytest.mark.parametrize("update", UPDATES)
def test_only_updates_that_know_the_symmetry_take_both_starts_the_same_way(measured, update):
    walk = of(measured.trajectories, update=update)
    assert walk["steps"].tolist() == [0, 1, 2, 5, 10, 20]
    assert walk["gap"].iloc[0] < 1e-13  # one network, from both starts
    assert walk["rounding_gap"].max() < 1e-10
    trained = walk[walk["steps"] > 0]
    if update in BLIND:
        assert trained["gap"].min() > 1e-3
        assert findings.judge_walk(walk) == findings.DRIFTS
    else:
        assert trained["gap"].max() < 1e-9
        assert (trained["differing"] == 0).all()
        assert findings.judge_walk(walk) == findings.STAYS


def test_with_epsilon_the_starts_differ_until_they_are_normalised(measured):
    first = of(measured.trajectories, TRAINED, steps=0)
    assert (first["gap"] > 3 * first["rounding_gap"]).all()
    assert first["rounding_gap"].max() < 1e-5


def test_a_step_of_un_from_a_scaled_start_is_that_of_table_1(images, start):
    """What `follow` compares are the updates themselves, by hand in NumPy."""
    subject, point = start
    walks = follow(images, start, CLAIM, ["b-sgd", "un"], 1)
    test = images.test_images.astype(float)
    index = subject.batches(1)[0]
    x, y = subject.train.pixels[index].astype(float), subject.train.labels[index]
    theta = np.asarray(point.params["theta"]["W"], float)
    factors = subject.factors()

    def logits(update, alpha):
        layers = [
            (a[:, None] * W / np.linalg.norm(W, axis=1, keepdims=True), scale, shift)
            for a, (W, scale, shift) in zip(alpha, numpy_layers(point.params), strict=True)
        ]
        gradients, d_theta = reference.gradients(layers, theta, x, y, 0.0)
        moved = []
        for (W, scale, shift), (dW, d_scale, d_shift) in zip(layers, gradients, strict=True):
            norm = np.linalg.norm(W, axis=1, keepdims=True)
            stepped = W - RATE * dW
            if update == "un":
                stepped = reference.un_step(W / norm, norm * dW, RATE)
            moved.append((stepped, scale - RATE * d_scale, shift - RATE * d_shift))
        new_theta = theta - RATE * d_theta
        return reference.forward(moved, new_theta, test, np.zeros(len(test), int), 0.0)[1]

    for update in ("b-sgd", "un"):
        plain, scaled = logits(update, np.ones_like(factors)), logits(update, factors)
        expected = np.linalg.norm(scaled - plain) / np.linalg.norm(plain)
        found = of(walks, update=update, steps=1)["gap"].item()
        assert found == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_verdict_tells_drift_from_grown_rounding():
    def walk(gap, rounding, dtype="float64"):
        steps = [0, 1, 10, 100]
        return pd.DataFrame({"steps": steps, "gap": gap, "rounding_gap": rounding, "dtype": dtype})

    chaos = [1e-16, 1e-15, 1e-9, 1e-2]
    assert findings.judge_walk(walk(chaos, chaos)) == findings.STAYS
    assert findings.judge_walk(walk([1e-16, 1e-15, 3e-8, 0.1], chaos)) == findings.STAYS
    assert findings.judge_walk(walk([1e-16, 1e-2, 1e-2, 1e-2], chaos)) == findings.DRIFTS
    assert findings.judge_walk(walk([1e-16, 1e-15, 1e-6, 1e-2], chaos)) == findings.DRIFTS
    assert findings.judge_walk(walk([0.0, 0.0, 0.0, np.nan], chaos)) == "not finite"
    single = walk([0.0, 1e-7, 1e-7, 1e-6], [0.0] * 4, "float32")
    assert findings.judge_walk(single) == findings.STAYS


# ---------------------------------------------------------------- (d) row norms


def test_b_sgd_lengthens_its_rows_and_un_does_not(measured):
    table = measured.norms
    assert set(table["update"]) == {"b-sgd", "un"}
    assert set(table["layer"]) == {1, 2}
    free, held = (table[table["update"] == update] for update in ("b-sgd", "un"))
    end = free[free["epoch"] == EPOCHS]
    assert len(end) == DEPTH
    assert (end["norm_min"] > 1.0001).all()
    assert (end["effective_max"] < RATE).all()
    assert free["norm_fall"].max() < 1e-5
    for name in ("norm_min", "norm_median", "norm_max"):
        np.testing.assert_allclose(held[name], 1, atol=1e-5)
    for size, rate in (("min", "max"), ("median", "median"), ("max", "min")):
        expected = RATE / table[f"norm_{size}"] ** 2
        np.testing.assert_allclose(table[f"effective_{rate}"], expected, rtol=1e-12)


def test_the_squared_norm_grows_by_the_squared_step(config, start):
    """‖w − λ∇ℓ‖² = ‖w‖² + λ²‖∇ℓ‖²: the gradient is orthogonal to w."""
    subject, point = start
    with jax.enable_x64(True):
        params, stats = measure.cast(point, "float64")
        network = subject.network(CLAIM)
        x, y = training.gather(subject.train, subject.batches(1)[0])
        at = measure.stepping("b-sgd", RATE, *jax.tree.map(jnp.asarray, (params, stats)))
        phase, arm = training.train_phase(config), training.Arm("b-sgd")
        step = jax.jit(partial(training.train_step, network, phase, arm, jnp.asarray(RATE)))
        after = step(at, x, y).params
        for old, new in zip(training.filters(params), training.filters(after), strict=True):
            grown = (new**2).sum(-1) - (old**2).sum(-1)
            np.testing.assert_allclose(grown, ((new - old) ** 2).sum(-1), rtol=1e-8)
            assert (grown > 1e-9).all()


# ---------------------------------------------------------------- what is said of it


def test_the_findings_follow_the_numbers(measured):
    def judge(measured):
        found = findings.find(measured, (CLAIM, TRAINED))
        assert set(found["depth"]) == {DEPTH}
        assert found["quantity"].is_unique
        return dict(zip(found["quantity"], found["finding"], strict=True))

    shown = judge(measured)
    assert shown["loss, α > 0"] == shown["loss, α < 0, γ → −γ"] == "same, to rounding"
    assert shown["loss, α < 0"] == shown["loss, α = 0, ε = 1e-5"] == "changed"
    assert shown["‖∇ℓ(αW)‖, slope"] == "falls as 1/α"
    assert shown["gap, B-SGD"] == "drifts"
    assert shown["gap, UN"] == shown["gap, sm"] == "stays, to rounding"
    assert (shown["‖w‖, B-SGD"], shown["‖w‖, UN"]) == ("only grows", "stays 1")

    walks, losses, steep = (
        table.copy() for table in (measured.trajectories, measured.scaling, measured.gradient)
    )
    walks.loc[(walks["update"] == "un") & (walks["steps"] > 0), "gap"] = 0.1
    losses.loc[losses["alpha"] > 0, "change"] = 0.1
    steep["norm"] = 1.0
    norms = measured.norms.assign(norm_fall=0.1, norm_min=0.5)
    shown = judge(Measured(losses, steep, walks, norms))
    assert shown["loss, α > 0"] == "changed"
    assert shown["‖∇ℓ(αW)‖, slope"] == "does not fall as 1/α"
    assert shown["gap, UN"] == "drifts"
    assert (shown["‖w‖, B-SGD"], shown["‖w‖, UN"]) == ("moves", "moves")


def test_predictions_apart_are_the_largest_share_of_the_drifting_and_of_the_others(measured):
    walks = measured.trajectories.copy()
    end = walks["steps"] == STEPS
    walks.loc[end & (walks["update"] == "b-sgd"), "differing"] = 0.25
    walks.loc[end & (walks["update"] == "weight-norm"), "differing"] = 0.125
    walks.loc[end & (walks["update"] == "sm"), "differing"] = 0.0625
    found = findings.find(measured._replace(trajectories=walks), (CLAIM, TRAINED))
    shown = dict(zip(found["quantity"], found["measured"], strict=True))
    assert shown["predictions, drifting"] == "25.0%"
    assert shown["predictions, others"] == "6.2%"


def test_numbers_are_short():
    shown = [figures.shorten(value) for value in (1e-5, 0.0131, 2.2e-16, 100000.0, 1.0)]
    assert shown == ["1e-5", "0.013", "2.2e-16", "1e5", "1"]


def test_choose_steps():
    assert measure.choose_steps(1000) == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    assert measure.choose_steps(7) == [1, 2, 5, 7]
    assert measure.choose_steps(1) == [1]


def test_the_slower_updates_exist():
    assert set(measure.RATE_SHARE) <= set(UPDATES)


def test_without_epsilon_both_cases_are_told_apart(measured):
    """A config with ε = 0 has nothing to say of ε."""

    def without(table):
        if "bn_epsilon" not in table:
            return table
        kept = table[(table["dtype"] == "float32") | (table["bn_epsilon"] == 0)]
        return kept.assign(bn_epsilon=0.0)

    cases = (CLAIM, Case("float32", 0.0))
    found = findings.find(Measured(*map(without, measured)), cases)
    note = findings.explain(measured.trajectories, cases, REQUEST)
    text = findings.write_summary(found, note)
    assert "ε = 0, float64" in text
    assert "1e-5" not in text


# ---------------------------------------------------------------- the command


def test_command_end_to_end_gives_the_bytes_of_the_library(
    tmp_path, idx_folder, small_toml, measured
):
    out = tmp_path / "out"
    words = [sys.executable, "-m", "unitnorm", "symmetry", "--config", small_toml, "--out", out]
    words += ["--data-dir", idx_folder, "--depth", DEPTH, "--update", "b-sgd", "--update", "un"]
    words += ["--steps", STEPS, "--epochs", EPOCHS]
    done = subprocess.run(
        list(map(str, words)),
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    for text in ("‖w‖, B-SGD", "stays, to rounding", "drifts", "14 files in"):
        assert text in done.stdout
    written = {p.name: p.read_bytes() for p in out.iterdir() if p.name != ".lock"}
    assert set(written) == {
        "summary.md",
        "provenance.json",
        *(f"{n}.{ending}" for n in Measured._fields for ending in ("csv", "png", "svg")),
    }
    assert json.loads(written["provenance.json"])["rate"] == RATE
    for name in Measured._fields:
        ours = to_csv(getattr(measured, name), 6).splitlines()
        theirs = written[f"{name}.csv"].decode().splitlines()
        if name == "trajectories":  # where ours have more updates in one program
            ours, theirs = ([x for x in t if ",float64," not in x] for t in (ours, theirs))
        assert ours == theirs
        picture = PIL.Image.open(io.BytesIO(written[f"{name}.png"]))
        assert picture.width == round(8.3 * 150)
        assert max(len(written[f"{name}.{e}"]) for e in ("png", "svg")) < 160_000


def test_figures_are_the_same_bytes_each_time(measured):
    once, again = (
        {name: encode(f) for name, f in figures.draw_all(measured, (CLAIM, TRAINED)).items()}
        for _ in range(2)
    )
    assert once == again
    assert list(once) == list(Measured._fields)


@pytest.mark.parametrize("rate", ["0", "-0.1", "nan", "inf"])
def test_a_rate_that_is_none_is_refused_in_one_line(rate, config, images):
    with pytest.raises(UserError, match="expected a positive number") as error:
        symmetry.run(config, images, ["un"], float(rate))
    assert "\n" not in str(error.value)
