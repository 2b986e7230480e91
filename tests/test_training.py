"""The training program: steps against NumPy, pairing, freezing, norms, evaluation, independence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import reference
from tests.conftest import blobs
from tests.test_model import as_numpy
from unitnorm.archbn import protocol, training
from unitnorm.archbn.config import Config
from unitnorm.data import Dataset, load_dataset
from unitnorm.run.config import load, parse
from unitnorm.updates import UPDATES, rivals

CLASSES = 4
BASE = {
    "model": {"width": 8, "bn_momentum": 0.9},
    "loss": {"batch_size": 20},
    "train": {"train_images": 410, "validation_images": 150, "min_epochs": 3, "max_epochs": 6},
}


def dataset() -> Dataset:
    rng = np.random.default_rng(0)
    (train, labels), (test, test_labels) = blobs(rng, 600), blobs(rng, 203)
    return Dataset(
        "blobs", train.reshape(600, -1), labels.astype(np.int32), test.reshape(203, -1),
        test_labels.astype(np.int32), (6, 6), CLASSES, "0" * 64,
    )  # fmt: skip


DATA = dataset()


def configured(**changes):
    return parse({**BASE, **changes}, "", Config)


def program(seeds=3, updates=("b-sgd", "un"), rates=1e-2, depth=2, phase=None, **changes):
    """A program, and its state at the start.

    Args:
      seeds: 0 to seeds − 1, or an array of them.
      rates: of all runs, or an array of shape (seeds, updates).
    """
    config = configured(**changes)
    seeds = np.arange(seeds) if isinstance(seeds, int) else seeds
    rates = np.broadcast_to(rates, (len(seeds), len(updates)))
    arms = [
        (training.Arm(update), training.Settings(seeds, rates[:, which]))
        for which, update in enumerate(updates)
    ]
    phase = phase or training.train_phase(config)
    p = training.Program("train", config, depth, phase, arms, DATA)
    return p, p.start()


def advanced(p, runs, epochs=1):
    for _ in range(epochs):
        runs = p.advance(runs)
    return runs


@pytest.fixture(scope="module")
def both():
    """B-SGD and UN over three seeds; compiled once for all tests that only run it."""
    return program()[0]


@pytest.fixture(scope="module")
def healthy(both):
    """Two of its epochs."""
    return both.take(advanced(both, both.start(), 2))


def run_of(taken, update, run):
    """One run of what `take` gave: of the update's arm."""
    return jax.tree.map(lambda a: np.asarray(a[run]), taken[update]._replace(opt_state=()))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_an_epoch_is_table_1_step_by_step(both):
    """One epoch of both updates against float64 NumPy that shares nothing but the order."""
    runs = both.start()
    start = [run_of(both.take(runs), u, 1) for u in (0, 1)]
    split = training.init_split(training.train_phase(configured()), jnp.uint32(1), 600)
    key = jax.random.fold_in(training.stream(split.order_seed, training.TRAIN_ORDER), 0)
    order = np.asarray(split.train[jnp.argsort(jax.random.bits(key, (410,)))])
    assert sorted(order) == sorted(np.asarray(split.train))
    after = both.take(both.advance(runs))
    for which, name in enumerate(("b-sgd", "un")):
        layers, theta = as_numpy(start[which].params)
        losses = 0.0
        for first in range(0, 410, 20):  # the last mini-batch has 10 images
            index = order[first : first + 20]
            x, y = DATA.train_images[index].astype(np.float64), DATA.train_labels[index]
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
    runs = both.take(both.start())
    for seed in range(3):
        assert_same(run_of(runs, 0, seed).params, run_of(runs, 1, seed).params)
        assert_same(run_of(runs, 0, seed).stats, run_of(runs, 1, seed).stats)
    assert len({np.asarray(w).tobytes() for w in runs[0].params["theta"]["W"]}) == 3
    phase = training.train_phase(configured())
    splits = [training.init_split(phase, jnp.uint32(seed), 600) for seed in range(3)]
    for part in ("train", "validation"):
        assert len({np.asarray(getattr(split, part)).tobytes() for split in splits}) == 3
    assert not set(np.asarray(splits[0].train)) & set(np.asarray(splits[0].validation))


def test_a_runs_bits_depend_on_its_seed_alone(both, healthy):
    """Not on how many runs, devices or other updates are trained along."""
    for seeds, updates in ((5, ("un",)), (1, ("sm", "un")), (np.array([2, 0, 2]), ("un",))):
        p, runs = program(seeds, updates)
        first = list(np.arange(3) if isinstance(seeds, int) else seeds).index(0)
        found = p.take(advanced(p, runs, 2))
        assert_same(run_of(found, updates.index("un"), first), run_of(healthy, 1, 0))


def test_a_measured_loss_does_not_depend_on_what_is_trained_along():
    """Of a network wide enough that XLA would compute several runs' losses together."""
    found = []
    for updates in (("un",), ("b-sgd", "un")):
        p, runs = program(1, updates, depth=1, model={"width": 32, "bn_momentum": 0.9})
        runs = p.take(advanced(p, runs, 3))
        found.append(run_of(runs, updates.index("un"), 0).history)
    assert_same(*found)


def test_what_is_said_of_the_norms_does_not_depend_on_what_is_trained_along():
    """At the size of Table 2, where a sum over two runs at once rounds in another order."""
    config, data, found = load("quick", {"train.train_images": 500}, Config), load_dataset(), []
    for updates in (("un",), ("b-sgd", "un")):
        settings = training.Settings(np.arange(1), np.full(1, 1e-2))
        arms = [(training.Arm(update), settings) for update in updates]
        p = training.Program("train", config, 2, training.train_phase(config), arms, data)
        history = run_of(p.take(p.advance(p.start())), updates.index("un"), 0).history
        found.append((history.norm_deviation, history.norm_mean, history.effective_rate))
    assert_same(*found)


def test_a_stopped_run_is_frozen_and_leaves_the_others_alone(both, healthy):
    sgd, un = both.take(both.start())
    reason = np.where(np.arange(3) == 1, protocol.VAL_RISE, un.reason)
    stopped = (sgd, un._replace(reason=reason))
    before = run_of(stopped, 1, 1)
    mixed = both.take(advanced(both, both.put(stopped), 2))
    assert_same(run_of(mixed, 1, 1), before)
    for update, seed in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 2)):
        assert_same(run_of(mixed, update, seed), run_of(healthy, update, seed))
        assert run_of(mixed, update, seed).epoch == 2


def test_a_run_that_blows_up_stops_with_its_epoch_and_spares_the_rest(healthy):
    p, runs = program(rates=[[1e-2, 1e-2], [1e30, 1e-2], [1e-2, np.nan]])
    state = advanced(p, runs, 2)
    runs = p.take(state)
    reasons = [[protocol.STOP_REASONS[r] for r in arm.reason] for arm in runs]
    assert reasons == [["running", "non-finite", "running"], ["running", "running", "no-rate"]]
    assert [arm.epoch.tolist() for arm in runs] == [[2, 1, 2], [2, 2, 0]]
    for update, seed in ((0, 0), (0, 2), (1, 0), (1, 1)):
        assert_same(run_of(runs, update, seed), run_of(healthy, update, seed))
    status = p.status(state)
    assert (status.epoch, status.active) == (2, True)
    assert status.text.startswith("4/6 runs active, val error ")


def test_a_state_that_went_over_the_host_goes_on_with_the_same_bits(both, healthy):
    runs = both.take(both.advance(both.start()))
    kept = jax.tree.map(np.copy, runs)
    both.start()
    again = both.take(both.advance(both.put(runs)))
    assert_same(again, healthy)
    assert_same(runs, kept)  # nothing on the devices shares its memory


def test_every_update_learns_and_keeps_to_its_manifold():
    """A thousand steps: far below chance, and unit norms where promised."""
    train = {**BASE["train"], "min_epochs": 50, "max_epochs": 50}
    # the rivals' rates have other scales; they learn in test_rivals
    updates = {n: u for n, u in UPDATES.items() if u.filters.__module__ != rivals.__name__}
    assert len(updates) >= 11
    p, runs = program(1, tuple(updates), 1e-3, depth=1, train=train)
    runs = p.take(advanced(p, runs, 48))
    for which, (name, update) in enumerate(updates.items()):
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


def test_errors_and_losses_count_every_image_once(both):
    state = both.advance(both.start())
    found, runs = both.find_wrong(state), both.take(state)
    network = training.archbn(configured().model, 36, CLASSES, 2)
    split = training.init_split(training.train_phase(configured()), jnp.uint32(2), 600)
    for update in (0, 1):
        run = run_of(runs, update, 2)
        logits, _ = network.apply(run.params, run.stats, np.float32(DATA.test_images), False)
        wrong, loss = found[update]
        np.testing.assert_array_equal(wrong[2], np.argmax(logits, 1) != DATA.test_labels)
        log_p = np.asarray(jax.nn.log_softmax(logits))[np.arange(203), DATA.test_labels]
        assert loss[2] == pytest.approx(-log_p.mean(), rel=1e-5)
        x, y = DATA.train_images[split.validation], DATA.train_labels[split.validation]
        logits, _ = network.apply(run.params, run.stats, np.float32(x), False)
        log_p = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(y)), y]
        assert run.history.val_loss[0] == pytest.approx(-log_p.mean(), rel=1e-5)
        assert run.history.val_error[0] == pytest.approx((np.argmax(logits, 1) != y).mean())


def test_the_order_of_random_bits_is_that_of_a_stable_sort():
    bits = np.random.default_rng(0).integers(0, 2**32, (2, 5000), dtype=np.uint32)
    bits[:, ::3] = bits[:, :1]  # many ties
    bits[0, 7], bits[1, 7] = 0, 2**32 - 1
    found = jax.jit(jax.vmap(training.argsort))(bits)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, np.argsort(bits, axis=-1, kind="stable"))


def test_statistics_computed_anew_are_those_of_the_training_images():
    phase = training.train_phase(configured())._replace(statistics="anew")
    p, runs = program(seeds=1, updates=("un",), phase=phase)
    run = run_of(p.take(advanced(p, runs, epochs=2)), 0, 0)
    layers = run.stats["layers"]
    found = layers[min(layers)]["norm"]
    split = training.init_split(phase, jnp.uint32(0), 600)
    w = np.asarray(training.filters(run.params)[0], float)
    h = (DATA.train_images[np.asarray(split.train)] @ w.T)[:400].reshape(20, 20, -1)
    np.testing.assert_allclose(found["mean"], h.mean((0, 1)), rtol=1e-4)
    np.testing.assert_allclose(found["var"], h.var(1).mean(0), rtol=1e-4)
    # and validation is measured with them
    network = training.archbn(configured().model, 36, CLASSES, 2)
    images = training.Images(DATA.train_images, DATA.train_labels)
    error, loss = training.evaluate(network, run.params, run.stats, images, split.validation)
    assert float(error) == run.history.val_error[1]
    np.testing.assert_allclose(loss, run.history.val_loss[1], rtol=1e-5)


def test_the_rate_follows_the_bold_driver_and_the_history_the_epochs(both):
    fast = [arm._replace(rate=np.full(3, 0.5, np.float32)) for arm in both.take(both.start())]
    runs = advanced(both, both.put(fast), 6)
    history = run_of(both.take(runs), 0, 0).history
    rates, losses = history.lr, history.train_loss
    assert rates[1] == rates[0] == 0.5
    epochs = range(2, int(np.isfinite(losses).sum()))
    assert len(epochs) >= 1
    for epoch in epochs:
        factor = 1.05 if losses[epoch - 1] < losses[epoch - 2] else 0.5
        assert rates[epoch] == pytest.approx(rates[epoch - 1] * factor, rel=1e-6)


def test_the_sweep_has_a_fixed_rate_and_no_early_stop():
    sweep = {"train_images": 100, "validation_images": 50, "epochs": 4}
    phase = training.sweep_phase(configured(sweep=sweep))
    p, state = program(np.array([0, 0]), ("un",), [[1e-2], [1e-3]], 1, phase, sweep=sweep)
    start = p.take(state)
    assert_same(run_of(start, 0, 0).params, run_of(start, 0, 1).params)
    state = advanced(p, state, 4)
    (runs,) = p.take(state)
    np.testing.assert_array_equal(runs.history.lr[0], np.full(4, 1e-2, np.float32))
    np.testing.assert_array_equal(runs.history.lr[1], np.full(4, 1e-3, np.float32))
    assert [protocol.STOP_REASONS[r] for r in runs.reason] == ["max-epochs"] * 2
    assert p.status(state)[:2] == (4, False)


def test_mean_and_sum_differ_by_the_batch_size_in_the_rate(both):
    run = jax.tree.map(jnp.asarray, run_of(both.take(both.start()), 0, 0))
    zero, arm = jnp.asarray(0.0), training.Arm("b-sgd")
    state = training.transformation(arm, zero, run.params).init(run.params)
    at = training.Stepping(run.params, run.stats, state, zero, zero)
    network, phase = (
        training.archbn(configured().model, 36, CLASSES, 2),
        training.train_phase(configured()),
    )
    x, y = np.float32(DATA.train_images[:20]), DATA.train_labels[:20]
    by_sum, by_mean = (
        training.train_step(
            network, phase._replace(reduction=reduction), arm, jnp.float32(rate), at, x, y
        )
        for reduction, rate in (("sum", 1e-3), ("mean", 2e-2))
    )
    moved = np.abs(by_sum.params["theta"]["W"] - run.params["theta"]["W"]).max()
    assert moved > 1e-3
    np.testing.assert_allclose(
        by_sum.params["theta"]["W"], by_mean.params["theta"]["W"], atol=1e-4 * moved
    )
    assert by_sum.loss == pytest.approx(by_mean.loss)  # recorded per image either way


def test_a_program_computes_float32_products_in_float32(monkeypatch):
    """Whatever the process is set to: JAX's default is TF32 on recent GPUs, bfloat16 on TPUs."""

    class TracedError(Exception):
        pass

    def compute(*_: object) -> None:
        raise TracedError(jax.config.jax_default_matmul_precision)

    training.compile_parts.cache_clear()  # what another test has traced would not be traced here
    p, runs = program(1, ("un",))
    for name, method in (("train_step", p.advance), ("find_wrong", p.find_wrong)):
        monkeypatch.setattr(training, name, compute)
        with jax.default_matmul_precision("bfloat16"), pytest.raises(TracedError, match="highest"):
            method(runs)


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_blocks_are_dealt_to_devices_like_cards(devices):
    """Every run has one place, and no device has more than one block more than another."""
    counts, blocks = (20, 7, 1, 9), (2, 2, 2, 3)
    dealt = training.deal(counts, blocks, devices)
    load = np.zeros(devices, int)
    for places, count, block in zip(dealt, counts, blocks, strict=True):
        assert sorted(places[places >= 0]) == list(range(count))
        cards = places.reshape(devices, -1, block)
        assert all(len(set(card[card >= 0] // block)) <= 1 for hand in cards for card in hand)
        load += (cards >= 0).any(-1).sum(-1)
    assert load.max() - load.min() <= 1


def test_a_run_that_follows_has_its_leaders_rate():
    """That of its seed's first run in the first arm, wherever the two are computed."""
    driver, follow, constant = protocol.BOLD_DRIVER, protocol.FOLLOW, protocol.CONSTANT
    seeds = np.array([4, 5, 6, 4, 5, 6])
    leading = training.Settings(seeds, np.full(6, 0.3), None, np.repeat([driver, constant], 3))
    following = training.Settings(seeds[::-1][:5], np.full(5, 0.3), None, follow)
    config = configured()
    arms = [(training.Arm("b-sgd"), leading), (training.Arm("un"), following)]
    phase = training.train_phase(config)._replace(min_epochs=6)
    p = training.Program("train", config, 1, phase, arms, DATA)
    runs = p.take(advanced(p, p.start(), 5))
    leaders, followers = runs[0].history.lr, runs[1].history.lr
    assert len({rates[:5].tobytes() for rates in leaders[:3]}) > 1  # or any order would pass
    for rates, leader in zip(followers, (2, 1, 0, 2, 1), strict=True):
        np.testing.assert_array_equal(rates[:5], leaders[leader, :5])
