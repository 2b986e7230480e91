"""Each claim about the scaling symmetry, on a small network, so that a wrong update fails it."""

import io
import json

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

from tests import reference
from tests.common import a_line
from tests.test_model import as_numpy
from unitnorm import cli, symmetry
from unitnorm.archbn.config import Config
from unitnorm.data import load_dataset
from unitnorm.report.style import encode
from unitnorm.report.tables import to_csv
from unitnorm.run.config import load
from unitnorm.symmetry import figures, measure, tables
from unitnorm.symmetry.measure import CLAIM, TRAINED, Case, Measured, Subject
from unitnorm.updates import UPDATES

DEPTH, STEPS, EPOCHS, RATE = 2, 25, 2, 0.01
# What the symmetry changes these do not undo.
BLIND = {
    "b-sgd", "sgd-wd", "sgd-momentum", "weight-norm", "un-carried", "b-sgd-median", "sgdp", "adamp",
    "lars", "adam-srt", "renorm-sgd", "adamwn", "muon", "manifold-muon",
}  # fmt: skip


@pytest.fixture(scope="module")
def subject(small_toml, idx_folder):
    return Subject(
        load(small_toml, {"depths": [DEPTH]}, Config), load_dataset(data_dir=str(idx_folder)), DEPTH
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory, idx_folder, small_toml):
    """The command's folder, what it printed, and what it has measured, in full precision."""
    kept, out = [], tmp_path_factory.mktemp("symmetry") / "out"
    measure_all = measure.measure_all
    words = ["symmetry", "--config", small_toml, "--out", out, "--data-dir", idx_folder]
    words += ["--depth", DEPTH, "--update", "b-sgd", "--update", "un"]
    words += ["--steps", STEPS, "--epochs", EPOCHS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "measure_all", lambda *a: kept.append(measure_all(*a)) or kept[0])
        done = CliRunner(env={"COLUMNS": "80"}).invoke(
            cli.main, list(map(str, words)), catch_exceptions=False
        )
    assert (done.exit_code, done.stderr) == (0, "")
    return out, done.output, kept[0]


@pytest.fixture(scope="module")
def measured(ran) -> Measured:
    return ran[2]


def walk_of(subject, name, steps):
    """The trajectory of an update."""
    start, case = subject.initial(), Case(CLAIM, 0.0)
    return measure.compare_trajectories(subject, start, case, [name], RATE, steps)


def of(table, dtype=CLAIM, **columns):
    """The rows of the claim, or of training, with these values."""
    chosen = tables.select(table, dtype)
    for name, value in columns.items():
        chosen = chosen[chosen[name] == value]
    assert len(chosen)
    return chosen


# ---------------------------------------------------------------- (a) the loss


def test_the_loss_is_the_same_over_ten_decades(measured):
    positive = of(measured.scaling)[lambda t: t["alpha"] > 0]
    assert set(positive["filters"]) == {"all", "own"}
    assert positive["alpha"].max() / positive["alpha"].min() == pytest.approx(1e10)
    assert positive["change"].max() < 1e-12
    assert positive["loss"].min() > 0.01


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


@pytest.mark.parametrize("alpha", [1.0, -1.0, 1e-3])
@pytest.mark.parametrize("case", [Case(CLAIM, 0.0), Case(TRAINED, 1e-5)])
def test_loss_and_gradient_are_those_of_numpy(subject, measured, alpha, case):
    (layers, theta), found = as_numpy(subject.initial().params), []
    scaled = [(alpha * W, scale, shift) for W, scale, shift in layers]
    for index in subject.batches(measure.PROBE_BATCHES):
        x, y = subject.data.train_images[index].astype(float), subject.data.train_labels[index]
        loss, *_ = reference.forward(scaled, theta, x, y, case.bn_epsilon)
        gradients, _ = reference.gradients(scaled, theta, x, y, case.bn_epsilon)
        norm = np.sqrt(sum((dW**2).sum() for dW, _, _ in gradients))
        _, _, (kept, *_) = reference.forward(layers, theta, x, y, case.bn_epsilon)
        variances = np.concatenate([(h @ W.T).var(0) for h, W, *_ in kept])
        found.append((loss / len(y), norm, (case.bn_epsilon / (alpha**2 * variances)).max()))
    losses, norms, shares = np.transpose(found)
    columns = {"alpha": alpha, "filters": "all", "point": "start", "compensated": False}
    row = of(measured.scaling, case.dtype, **columns)
    close = 1e-5 if case.bn_epsilon else 1e-12
    assert row["loss"].item() == pytest.approx(losses.mean(), rel=close)
    assert row["epsilon_share"].item() == pytest.approx(shares.max(), rel=close)
    if alpha > 0:
        row = of(measured.gradient, case.dtype, **columns)
        assert row["norm"].item() == pytest.approx(norms.mean(), rel=10 * close)


# ---------------------------------------------------------------- (b) the gradient


def test_the_gradient_falls_as_one_over_alpha(measured):
    every = of(measured.gradient)[lambda t: t["alpha"] != 0]
    assert (every["alpha"] < 0).any()
    assert every["deviation"].max() < 1e-10  # entry by entry, each filter by its own α
    np.testing.assert_allclose(every["norm"], every["expected"], rtol=1e-10)
    alike = every[(every["filters"] == "all") & (every["point"] == "start")]
    scaled = alike["norm"] * alike["alpha"].abs()
    np.testing.assert_allclose(scaled, scaled.iloc[0], rtol=1e-10)


def test_epsilon_ends_the_invariance_at_small_alpha_and_bounds_the_gradient(measured):
    columns = {"filters": "all", "point": "start", "compensated": False}
    change = of(measured.scaling, TRAINED, **columns).set_index("alpha")["change"]
    assert change[1e-5] > 0.01
    assert change[1e5] < 1e-4
    smallest = of(measured.gradient, TRAINED, **columns, alpha=1e-5)
    assert smallest["norm"].item() < 0.1 * smallest["expected"].item()


# ---------------------------------------------------------------- (c) trajectories


@pytest.mark.parametrize("name", UPDATES)
def test_only_updates_that_know_the_symmetry_take_both_starts_the_same_way(name, subject, hurried):
    walk = walk_of(subject, name, STEPS)
    assert walk["steps"].tolist() == [0, 1, 2, 5, 10, 20, 25]
    assert walk["rate"].unique() == [RATE * measure.RATE_SHARE.get(name, 1)]
    assert walk["gap"].iloc[0] < 1e-13  # one network, from both starts
    assert walk["rounding_gap"].max() < 1e-10
    trained = walk[walk["steps"] > 0]
    if name in BLIND:
        later = trained["steps"] > (name == "renorm-sgd")  # whose first step is the same
        assert trained["gap"][later].min() > 1e-3
    else:
        assert trained["gap"].max() < 1e-9
        assert (trained["differing"] == 0).all()


def test_with_epsilon_the_starts_differ_until_they_are_normalised(measured):
    first = of(measured.trajectories, TRAINED, steps=0)
    assert (first["gap"] > 3 * first["rounding_gap"]).all()
    assert first["rounding_gap"].max() < 1e-5


def test_the_gap_after_a_step_is_that_of_numpy(subject, hurried):
    """Of gradient descent; that of the updates without one is zero above."""
    start, theta = as_numpy(subject.initial().params)
    test, factors = subject.data.test_images.astype(float), subject.factors()
    index = subject.batches(1)[0]
    x, y = subject.data.train_images[index].astype(float), subject.data.train_labels[index]

    def logits(alpha):
        layers = [
            (a[:, None] * W / np.linalg.norm(W, axis=1, keepdims=True), scale, shift)
            for a, (W, scale, shift) in zip(alpha, start, strict=True)
        ]
        moved = reference.step(layers, theta, x, y, 0.0, RATE)
        return reference.forward(*moved, test, np.zeros(len(test), int), 0.0)[1]

    plain, scaled = logits(np.ones_like(factors)), logits(factors)
    gap = np.linalg.norm(scaled - plain) / np.linalg.norm(plain)
    differing = np.mean(plain.argmax(-1) != scaled.argmax(-1))
    found = of(walk_of(subject, "b-sgd", 1), steps=1)[["gap", "differing"]].to_numpy()[0]
    assert list(found) == pytest.approx([gap, differing], rel=1e-8)


# ---------------------------------------------------------------- (d) row norms


def test_b_sgd_lengthens_its_rows_and_un_does_not(measured):
    table = measured.norms
    assert set(zip(table["update"], table["layer"], strict=True)) == {
        (update, layer) for update in ("b-sgd", "un") for layer in (1, 2)
    }
    free, held = (table[table["update"] == update] for update in ("b-sgd", "un"))
    end = free[free["epoch"] == EPOCHS]
    assert (end["norm_min"] > 1.0001).all()
    assert (end["effective_max"] < RATE).all()
    assert free["norm_fall"].max() < 1e-5
    for name in ("norm_min", "norm_median", "norm_max"):
        np.testing.assert_allclose(held[name], 1, atol=1e-5)
    for size, rate in (("min", "max"), ("median", "median"), ("max", "min")):
        expected = RATE / table[f"norm_{size}"] ** 2
        np.testing.assert_allclose(table[f"effective_{rate}"], expected, rtol=1e-12)


# ---------------------------------------------------------------- tables, figures, the command


def test_the_tables_hold_the_numbers_of_the_records(measured):
    loss, gaps, norms = tables.list_tables(measured, "Mini-batches")
    shown = loss.frame.set_index("quantity")[f"depth {DEPTH}"]
    positive = of(measured.scaling)[lambda t: t["alpha"] > 0]
    largest = shown["largest |Δ loss| / loss, α > 0"].replace("−", "-")
    assert float(largest) == pytest.approx(positive["change"].max(), rel=0.05)
    negative = of(measured.scaling, point="trained", alpha=-1.0, filters="all", compensated=False)
    assert float(shown["loss, trained, α < 0"]) == pytest.approx(negative["loss"].item(), rel=0.05)
    assert "ε = 1e−5, float32" in shown.index[-1]
    assert gaps.frame["update"].tolist() == ["B-SGD", "UN", "UN, float32"]
    row = gaps.frame.set_index("update").loc["B-SGD"]
    end = of(measured.trajectories, update="b-sgd", steps=STEPS)
    assert float(row[str(STEPS)]) == pytest.approx(end["gap"].item(), rel=0.5)
    assert row["differ"] == f"{100 * end['differing'].item():.1f} %"
    assert norms.frame["λ/‖w‖²"].tolist()[-2:] == ["0.01", "0.01"]
    without = [t.assign(bn_epsilon=0.0) if "bn_epsilon" in t else t for t in measured]
    assert "1e−5, float" not in str(tables.list_tables(Measured(*without), ""))


def test_the_command_writes_what_it_measured(ran):
    out, printed, measured = ran
    for text in ("loss, trained, α < 0", "UN, float32", "‖w‖", "14 files in"):
        assert text in printed
    assert max(map(len, printed.splitlines())) <= max(80, len(f"14 files in {out}/"))
    written = {p.name: p.read_bytes() for p in out.iterdir() if p.name != ".lock"}
    assert set(written) == {
        "summary.md",
        "provenance.json",
        *(f"{n}.{ending}" for n in Measured._fields for ending in ("csv", "png", "svg")),
    }
    assert json.loads(written["provenance.json"])["rate"] == RATE
    for name, figure in figures.draw_all(measured).items():
        assert to_csv(getattr(measured, name), 6) == written[f"{name}.csv"].decode()
        drawn = encode(figure, palette=True)
        assert drawn == {ending: written[f"{name}.{ending}"] for ending in ("png", "svg")}
        assert PIL.Image.open(io.BytesIO(drawn["png"])).width == round(8.3 * 150)
        assert max(map(len, drawn.values())) < 160_000


@pytest.mark.parametrize("rate", ["0", "-0.1", "nan", "inf"])
def test_a_rate_that_is_none_is_refused_in_one_line(rate, subject):
    with a_line("expected a positive number"):
        symmetry.run(subject.config, subject.data, ["un"], float(rate))
