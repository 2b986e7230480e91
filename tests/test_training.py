"""The training program: steps against NumPy, pairing, freezing, norms, evaluation, independence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import reference
from tests.conftest import blobs
from tests.test_model import as_numpy
from unitnorm.archbn import evaluation, protocol, run_many
from unitnorm.archbn.batches import (
    ORDER,
    START,
    Images,
    argsort,
    draw_split,
    stream,
)
from unitnorm.archbn.config import Config
from unitnorm.archbn.model import FILTER_AXIS, archbn
from unitnorm.archbn.starts import unbalance
from unitnorm.archbn.training import Arm, Batches, Settings, Task, make_training
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


def task_of(depth=2, options=(), **changes):
    """What the runs of a program have in common; `options` are of `Task`."""
    network = archbn(configured(**changes).model, 36, CLASSES, depth)
    return Task(configured(**changes), network)._replace(**dict(options))


def split_of(seed, sizes=(410, 150)):
    return draw_split("train", sizes, 600, jnp.uint32(seed))


def program(
    seeds=3, updates=("b-sgd", "un"), rates=1e-2, depth=2, task=None, schedule=0, **changes
):
    """A program, and its state at the start.

    Args:
      seeds: 0 to seeds − 1, or an array of them.
      rates: of all runs, or an array of shape (seeds, updates).
    """
    seeds = np.arange(seeds) if isinstance(seeds, int) else seeds
    rates = np.broadcast_to(rates, (len(seeds), len(updates)))
    arms = [
        (Arm(update), Settings(seeds, rates[:, which], schedule=schedule))
        for which, update in enumerate(updates)
    ]
    p = run_many.Program("train", task or task_of(depth, **changes), arms, DATA)
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
    split = split_of(1)
    key = jax.random.fold_in(stream(split.order_seed, ORDER["train"]), 0)
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
    splits = [split_of(seed) for seed in range(3)]
    for part in ("train", "validation"):
        assert len({np.asarray(getattr(split, part)).tobytes() for split in splits}) == 3
    assert not set(np.asarray(splits[0].train)) & set(np.asarray(splits[0].validation))


def test_a_runs_bits_depend_on_its_seed_alone(both, healthy):
    """Not on how many runs, devices or other updates are trained along."""
    for seeds, updates in (([0], ("sm", "un")), ([2, 0, 2, 4, 1], ("un",))):
        p, runs = program(np.array(seeds), updates)
        found = p.take(advanced(p, runs, 2))
        assert_same(run_of(found, updates.index("un"), seeds.index(0)), run_of(healthy, 1, 0))


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
        arms = [(Arm(update), Settings(np.arange(1), np.full(1, 1e-2))) for update in updates]
        p = run_many.Program("train", Task(config, archbn(config.model, 784, 10, 2)), arms, data)
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
    network, split = task_of().network, split_of(2)
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
    found = jax.jit(jax.vmap(argsort))(bits)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, np.argsort(bits, axis=-1, kind="stable"))


def test_statistics_computed_anew_are_those_of_the_training_images():
    task = task_of(options={"statistics": "anew"})
    p, runs = program(seeds=1, updates=("un",), task=task)
    run = run_of(p.take(advanced(p, runs, epochs=2)), 0, 0)
    layers = run.stats["layers"]
    found = layers[min(layers)]["norm"]
    split = split_of(0)
    w = np.asarray(task.network.filters(run.params)[0], float)
    h = (DATA.train_images[np.asarray(split.train)] @ w.T)[:400].reshape(20, 20, -1)
    np.testing.assert_allclose(found["mean"], h.mean((0, 1)), rtol=1e-4)
    np.testing.assert_allclose(found["var"], h.var(1).mean(0), rtol=1e-4)
    # and validation is measured with them
    images = Images(DATA.train_images, DATA.train_labels)
    error, loss = evaluation.evaluate(task.network, run.params, run.stats, images, split.validation)
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
    task = task_of(1, {"part": "sweep"}, sweep=sweep)
    rates, fixed = [[1e-2], [1e-3]], protocol.CONSTANT
    p, state = program(np.array([0, 0]), ("un",), rates, 1, task, schedule=fixed)
    start = p.take(state)
    assert_same(run_of(start, 0, 0).params, run_of(start, 0, 1).params)
    state = advanced(p, state, 4)
    (runs,) = p.take(state)
    np.testing.assert_array_equal(runs.history.lr[0], np.full(4, 1e-2, np.float32))
    np.testing.assert_array_equal(runs.history.lr[1], np.full(4, 1e-3, np.float32))
    assert [protocol.STOP_REASONS[r] for r in runs.reason] == ["max-epochs"] * 2
    assert p.status(state)[:2] == (4, False)


def a_step(task, arm, rate, ratio=None, decay=None, start=None):
    """The parameters before and after a mini-batch of a run, and its loss."""
    trained = make_training(task, arm)
    run = trained.init(Settings(jnp.uint32(0), jnp.float32(rate), ratio, decay=decay))
    run = run._replace(params=start or run.params)
    zero = jnp.asarray(0.0)
    at = Batches(run.params, run.stats, run.opt_state, zero, zero)
    x, y = np.float32(DATA.train_images[:20]), DATA.train_labels[:20]
    after = trained.step(run, at, x, y)
    return run.params, after.params, after.loss


def test_mean_and_sum_differ_by_the_batch_size_in_the_rate():
    (start, by_sum, loss), (_, by_mean, same) = (
        a_step(task_of(loss={"batch_size": 20, "reduction": reduction}), Arm("b-sgd"), rate)
        for reduction, rate in (("sum", 1e-3), ("mean", 2e-2))
    )
    moved = np.abs(by_sum["theta"]["W"] - start["theta"]["W"]).max()
    assert moved > 1e-3
    np.testing.assert_allclose(by_sum["theta"]["W"], by_mean["theta"]["W"], atol=1e-4 * moved)
    assert loss == pytest.approx(same)  # recorded per image either way


def test_the_filters_rates_go_by_run_and_by_layer():
    """A ratio scales all filters' steps, factors those of a layer, decay pulls them to zero."""
    task, filters = task_of(), task_of().network.filters
    start, plain, _ = a_step(task, Arm("b-sgd"), 1e-3)
    steps = [after - before for before, after in zip(*map(filters, (start, plain)), strict=True)]
    for arm, settings, factors in (
        (Arm("b-sgd"), {"ratio": 3.0}, (3, 3)),
        (Arm("b-sgd", factors=(0.5, 2.0)), {}, (0.5, 2)),
    ):
        _, found, _ = a_step(task, arm, 1e-3, **settings)
        np.testing.assert_array_equal(found["theta"]["W"], plain["theta"]["W"])
        for w, moved, step, factor in zip(
            filters(start), filters(found), steps, factors, strict=True
        ):
            np.testing.assert_allclose(moved - w, factor * step, atol=1e-6)
    _, found, _ = a_step(task, Arm("sgd-wd"), 1e-3, decay=jnp.float32(50.0))
    for w, moved, step in zip(filters(start), filters(found), steps, strict=True):
        np.testing.assert_allclose(moved - w, step - 1e-3 * 50.0 * w, atol=1e-6)


@pytest.mark.parametrize("update", ["un", "b-sgd", "un-carried"])
def test_the_size_of_a_step_is_measured_layer_by_layer(update):
    """The effective rate is λ at norm 1 and λ/‖w‖² beyond, and the angle that of the filters."""
    task, rate, norm = task_of(), 1e-4, 1.0 if update == "un" else 3.0
    network = task.network
    start = make_training(task, Arm("un")).init(Settings(jnp.uint32(0), jnp.float32(rate))).params
    start = network.with_filters(start, lambda w: norm * w)
    options = (("off_manifold", "normalize"),) if update == "un-carried" else ()
    _, after, _ = a_step(task, Arm(update, options), rate, start=start)
    x, y = np.float32(DATA.train_images[:20]), DATA.train_labels[:20]
    layers, theta = as_numpy(start)
    steps, _ = reference.gradients(layers, theta, x.astype(float), y, 1e-5)
    gradient = network.with_filters(start, lambda w: w)
    grads = iter([np.asarray(d, np.float32) for d, _, _ in steps])
    gradient = network.with_filters(gradient, lambda w: next(grads))
    rates, angles = evaluation.measure_step(network, start, gradient, after)
    expected = rate if update == "un-carried" else rate / norm**2
    np.testing.assert_allclose(rates, expected, rtol=2e-2)
    pairs = zip(network.filters(start), network.filters(after), angles, strict=True)
    for before, moved, angle in pairs:
        units = [w / np.linalg.norm(w, axis=FILTER_AXIS, keepdims=True) for w in (before, moved)]
        chord = np.linalg.norm(np.subtract(*units, dtype=float), axis=FILTER_AXIS)
        np.testing.assert_allclose(angle, (2 * np.arcsin(chord / 2)).mean(), rtol=1e-3)


def test_to_look_at_the_layers_changes_nothing_else(healthy):
    p, runs = program(task=task_of(options={"layers": True}))
    found = run_of(p.take(advanced(p, runs, 2)), 1, 0)
    plain = run_of(healthy, 1, 0)
    assert found.history.layer_rate.shape == found.history.layer_angle.shape == (6, 2)
    np.testing.assert_allclose(found.history.layer_rate[:2], 1e-2, rtol=0.2)
    assert_same(
        found._replace(history=found.history._replace(layer_rate=None, layer_angle=None)), plain
    )


def test_starts_of_one_norm_compute_the_same():
    network = task_of().network
    params, stats = network.init(stream(jnp.uint32(0), 0))
    moved = unbalance(params, jnp.array([0.0, 0.0, 0.0, 1.0]), stream(jnp.uint32(0), START))
    for w in network.filters(moved):
        np.testing.assert_allclose(np.linalg.norm(w, axis=FILTER_AXIS), 10, rtol=1e-5)
    x = np.float32(DATA.train_images[:20])
    (old, _), (new, _) = (network.apply(p, stats, x, True) for p in (params, moved))
    np.testing.assert_allclose(new, old, atol=1e-3)


def test_a_program_computes_float32_products_in_float32(monkeypatch):
    """Whatever the process is set to: JAX's default is TF32 on recent GPUs, bfloat16 on TPUs."""

    class TracedError(Exception):
        pass

    def compute(*_: object) -> None:
        raise TracedError(jax.config.jax_default_matmul_precision)

    run_many.compile_parts.cache_clear()  # what another test has traced would not be traced here
    p, runs = program(1, ("un",))
    for module, name, method in (
        (evaluation, "evaluate", p.advance), (run_many, "find_wrong", p.find_wrong)
    ):  # fmt: skip
        monkeypatch.setattr(module, name, compute)
        with jax.default_matmul_precision("bfloat16"), pytest.raises(TracedError, match="highest"):
            method(runs)


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_blocks_are_dealt_to_devices_in_turn(devices):
    """Every run has one place, and no device has more than one block more than another."""
    counts, blocks = (20, 7, 1, 9), (2, 2, 2, 3)
    dealt = run_many.deal(counts, blocks, devices)
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
    leading = Settings(seeds, np.full(6, 0.3), None, np.repeat([driver, constant], 3))
    following = Settings(seeds[::-1][:5], np.full(5, 0.3), None, follow)
    arms = [(Arm("b-sgd"), leading), (Arm("un"), following)]
    task = task_of(1, train={**BASE["train"], "min_epochs": 6})
    p = run_many.Program("train", task, arms, DATA)
    runs = p.take(advanced(p, p.start(), 5))
    leaders, followers = runs[0].history.lr, runs[1].history.lr
    assert len({rates[:5].tobytes() for rates in leaders[:3]}) > 1  # or any order would pass
    for rates, leader in zip(followers, (2, 1, 0, 2, 1), strict=True):
        np.testing.assert_array_equal(rates[:5], leaders[leader, :5])
