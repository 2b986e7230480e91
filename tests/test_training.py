"""The training program: steps against NumPy, pairing, freezing, norms, evaluation, independence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import reference
from tests.conftest import blobs
from tests.test_model import as_numpy
from unitnorm.table2 import protocol, training
from unitnorm.table2.config import parse
from unitnorm.updates import UPDATES

CLASSES = 4
BASE = {
    "model": {"width": 8, "bn_momentum": 0.9},
    "loss": {"batch_size": 20},
    "train": {"train_images": 410, "validation_images": 150, "min_epochs": 3, "max_epochs": 6},
}


def images(count, seed=0):
    pixels, labels = blobs(np.random.default_rng(seed), count)
    return training.Images(pixels.reshape(count, -1), labels.astype(np.int32))


TRAIN, TEST = images(600), images(203, 1)


def program(seeds=3, updates=("b-sgd", "un"), **changes):
    config = parse({**BASE, **changes})
    return training.Program(
        seeds, config, 2, updates, training.train_phase(config), TRAIN, TEST, CLASSES
    )


@pytest.fixture(scope="module")
def both():
    """B-SGD and UN over three seeds; compiled once for all tests that only run it."""
    return program()


def started(p, seeds=3, rate=1e-2):
    return p.init(np.arange(seeds), np.full((seeds, len(p.updates)), rate))


def run_of(runs, update, seed):
    return jax.tree.map(lambda a: np.asarray(a[seed]), runs[update])


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_an_epoch_is_table_1_step_by_step(both):
    """One epoch of both updates against float64 NumPy that shares nothing but the order."""
    p = both
    splits, runs = started(p)
    start = [run_of(runs, u, 1) for u in (0, 1)]
    split = jax.tree.map(lambda a: a[1], splits)
    key = jax.random.fold_in(training.stream(split.order_seed, training.TRAIN_ORDER), 0)
    order = np.asarray(split.train[jnp.argsort(jax.random.bits(key, (410,)))])
    assert sorted(order) == sorted(np.asarray(split.train))
    after = p.epoch(splits, runs, p.images)
    for which, name in enumerate(("b-sgd", "un")):
        layers, theta = as_numpy(start[which].params)
        losses = 0.0
        for first in range(0, 410, 20):  # the last mini-batch has 10 images
            index = order[first : first + 20]
            x, y = TRAIN.pixels[index].astype(np.float64), TRAIN.labels[index]
            loss, _, _ = reference.forward(layers, theta, x, y, 1e-5)
            losses += loss
            steps, d_theta = reference.gradients(layers, theta, x, y, 1e-5)
            layers = [
                (
                    reference.un_step(W, dW, 1e-2) if name == "un" else W - 1e-2 * dW,
                    scale - 1e-2 * d_scale,
                    shift - 1e-2 * d_shift,
                )
                for (W, scale, shift), (dW, d_scale, d_shift) in zip(layers, steps, strict=True)
            ]
            theta = theta - 1e-2 * d_theta
        run = run_of(after, which, 1)
        found, found_theta = as_numpy(run.params)
        for ours, theirs in zip(found, layers, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(a, b, atol=2e-3)
        np.testing.assert_allclose(found_theta, theta, atol=2e-3)
        assert run.history.train_loss[0] == pytest.approx(losses / 410, rel=1e-3)
        assert run.epoch == 1
        assert run.history.lr[0] == np.float32(1e-2)


def test_runs_of_a_seed_share_start_split_and_order_and_seeds_differ(both):
    splits, runs = started(both)
    assert_same(runs[0].params, runs[1].params)
    assert_same(runs[0].stats, runs[1].stats)
    for part in (splits.train, splits.validation):
        assert len({tuple(np.asarray(row)) for row in part[:3]}) == 3
    assert len({np.asarray(w).tobytes() for w in runs[0].params["theta"]["W"][:3]}) == 3


def test_a_runs_bits_depend_on_its_seed_alone(both):
    """Not on how many runs, devices or other updates are trained along."""
    ends = []
    cases = ((3, ("b-sgd", "un"), both), (5, ("un",), None), (1, ("sm", "un"), None))
    for seeds, updates, p in cases:
        p = p or program(seeds, updates)
        splits, runs = started(p, seeds)
        for _ in range(2):
            runs = p.epoch(splits, runs, p.images)
        ends.append(run_of(runs, updates.index("un"), 0))
    assert_same(ends[0], ends[1])
    assert_same(ends[0], ends[2])


def test_a_stopped_run_is_frozen_and_leaves_the_others_alone(both):
    p = both
    splits, runs = started(p)
    free = runs
    for _ in range(2):
        free = p.epoch(splits, jax.tree.map(jnp.copy, free), p.images)
    stopped = runs[1]._replace(reason=runs[1].reason.at[1].set(protocol.VAL_RISE))
    mixed = (runs[0], stopped)
    before = run_of(mixed, 1, 1)
    for _ in range(2):
        mixed = p.epoch(splits, jax.tree.map(jnp.copy, mixed), p.images)
    assert_same(run_of(mixed, 1, 1), before)
    for update, seed in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 2)):
        assert_same(run_of(mixed, update, seed), run_of(free, update, seed))
        assert run_of(mixed, update, seed).epoch == 2


def test_a_run_that_blows_up_stops_with_its_epoch_and_spares_the_rest(both):
    p = both
    rates = np.array([[1e-2, 1e-2], [1e30, 1e-2], [1e-2, 1e-2]])
    splits, runs = p.init(np.arange(3), rates)
    _, healthy = started(p)
    for _ in range(2):
        runs = p.epoch(splits, runs, p.images)
        healthy = p.epoch(splits, healthy, p.images)
    assert [protocol.STOP_REASONS[r] for r in runs[0].reason[:3]] == [
        "running",
        "non-finite",
        "running",
    ]
    assert list(runs[0].epoch[:3]) == [2, 1, 2]
    for update, seed in ((0, 0), (0, 2), (1, 0), (1, 1), (1, 2)):
        assert_same(run_of(runs, update, seed), run_of(healthy, update, seed))


def test_a_run_without_a_rate_never_starts(both):
    p = both
    splits, runs = p.init(np.arange(3), np.array([[1e-2, 1e-2], [1e-2, np.nan], [1e-2, 1e-2]]))
    runs = p.epoch(splits, runs, p.images)
    assert [list(run.epoch[:3]) for run in runs] == [[1, 1, 1], [1, 0, 1]]
    assert protocol.STOP_REASONS[runs[1].reason[1]] == "no-rate"


def test_every_update_learns_and_keeps_to_its_manifold():
    """A thousand steps: far below chance, and unit norms where promised."""
    p = program(1, tuple(UPDATES), train={**BASE["train"], "min_epochs": 50, "max_epochs": 50})
    splits, runs = started(p, 1, 1e-3)
    for _ in range(48):
        runs = p.epoch(splits, runs, p.images)
    for which, (name, update) in enumerate(UPDATES.items()):
        history = run_of(runs, which, 0).history
        assert history.val_error[47] < 0.25, name
        deviation = history.norm_deviation[:48]
        if update.constrained:
            assert deviation.max() < 1e-6, name
            assert history.norm_mean[47] == pytest.approx(1, abs=1e-6), name
        elif name == "weight-norm":  # the loss does not depend on g, so g = ‖w‖ only rounds
            assert 0 < deviation[-1] < 1e-4
        else:
            assert deviation[-1] > 1e-4, name


def test_errors_count_every_image_once(both):
    p = both
    _, runs = started(p)
    found = p.test_error(runs)
    network = training.archbn(parse(BASE), 36, CLASSES, 2)
    for update in (0, 1):
        run = run_of(runs, update, 2)
        logits, _ = network.apply(run.params, run.stats, TEST.pixels.astype(np.float32), False)
        wrong = int((np.argmax(logits, 1) != TEST.labels).sum())
        assert round(float(found[update][2]) * 203) == wrong


def test_the_rate_follows_the_bold_driver_and_the_history_the_epochs(both):
    p = both
    splits, runs = started(p, rate=0.5)
    for _ in range(6):
        runs = p.epoch(splits, runs, p.images)
    history = run_of(runs, 0, 0).history
    rates, losses = history.lr[:3], history.train_loss
    assert rates[1] == rates[0]
    for epoch in (2,):
        factor = 1.05 if losses[epoch - 1] < losses[epoch - 2] else 0.5
        assert rates[epoch] == pytest.approx(rates[epoch - 1] * factor, rel=1e-6)


def test_the_sweep_has_a_fixed_rate_and_no_early_stop():
    config = parse({**BASE, "sweep": {"train_images": 100, "validation_images": 50, "epochs": 4}})
    phase = training.sweep_phase(config)
    p = training.Program(2, config, 1, ("un",), phase, TRAIN, TEST, CLASSES)
    splits, runs = p.init(np.array([0, 0]), np.array([[1e-2], [1e-3]]))
    assert_same(jax.tree.map(lambda a: a[0], splits), jax.tree.map(lambda a: a[1], splits))
    assert_same(run_of(runs, 0, 0).params, run_of(runs, 0, 1).params)
    for _ in range(4):
        runs = p.epoch(splits, runs, p.images)
    np.testing.assert_array_equal(runs[0].history.lr[0], np.full(4, 1e-2, np.float32))
    np.testing.assert_array_equal(runs[0].history.lr[1], np.full(4, 1e-3, np.float32))
    assert [protocol.STOP_REASONS[r] for r in runs[0].reason] == ["max-epochs"] * 2


def test_mean_and_sum_differ_by_the_batch_size_in_the_rate():
    ends = []
    for reduction, rate in (("sum", 1e-3), ("mean", 2e-2)):
        loss = {"batch_size": 20, "reduction": reduction}
        train = {**BASE["train"], "train_images": 400}
        p = program(1, ("b-sgd",), loss=loss, train=train)
        splits, runs = started(p, 1, rate)
        ends.append(run_of(p.epoch(splits, runs, p.images), 0, 0).params["theta"]["W"])
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-4)
