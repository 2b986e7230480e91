"""The training program: steps against NumPy, pairing, freezing, norms, evaluation, independence."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import reference
from tests.idx import blobs
from tests.test_model import as_numpy
from unitnorm.archbn import protocol, run_many
from unitnorm.archbn.batches import ORDER, argsort, draw_split, stream
from unitnorm.archbn.config import Config
from unitnorm.archbn.model import archbn
from unitnorm.archbn.training import Arm, EpochState, Settings, Task, make_training
from unitnorm.data import Dataset
from unitnorm.run.config import parse

TRAIN = {"train_images": 400, "validation_images": 150, "min_epochs": 3, "max_epochs": 6}
BASE = {"model": {"width": 8, "bn_momentum": 0.9}, "loss": {"batch_size": 20}, "train": TRAIN}
BOTH = ("b-sgd", "un")
SPLITS = [draw_split("train", (400, 150), 600, jnp.uint32(seed)) for seed in range(3)]


def dataset(side: int = 6) -> Dataset:
    """600 training and 203 test images of four classes."""
    rng = np.random.default_rng(0)
    parts = [blobs(rng, count, side) for count in (600, 203)]
    arrays = [(x.reshape(len(x), -1), y.astype(np.int32)) for x, y in parts]
    return Dataset("blobs", *arrays[0], *arrays[1], (side, side), 4, "0" * 64)


DATA = dataset()
X, Y = np.float32(DATA.train_images[:20]), DATA.train_labels[:20]


def task_of(depth=1, features=36, config=(), **options) -> Task:
    """What the runs of a program have in common; `options` are of `Task`."""
    parsed = parse({**BASE, **dict(config)}, "", Config)
    return Task(parsed, archbn(parsed.model, features, 4, depth), **options)


TASK = task_of()


def program(seeds=(0, 1, 2), updates=BOTH, rates=1e-2, task=TASK, schedule=0, data=DATA):
    """A program of all seeds with all updates; `rates` broadcasts to (seeds, updates)."""
    rates = np.broadcast_to(rates, (len(seeds), len(updates)))
    arms = [
        (Arm(update), Settings(np.array(seeds), rates[:, column], schedule=schedule))
        for column, update in enumerate(updates)
    ]
    return run_many.Program("train", task, arms, data)


def trained(p, epochs, state=None):
    """The runs on the host after so many epochs, from the start or a state."""
    state = p.start() if state is None else p.put(state)
    for _ in range(epochs):
        state = p.advance(state)
    return p.take(state)


@pytest.fixture(scope="module")
def both():
    """B-SGD and UN over three seeds; compiled once for all tests that only run it."""
    return program()


@pytest.fixture(scope="module")
def healthy(both):
    """Two of its epochs, the first one's state gone over the host."""
    first = trained(both, 1)
    kept = jax.tree.map(np.copy, first)
    both.start()
    second = trained(both, 1, first)
    assert_same(first, kept)  # nothing on the devices shares its memory
    return second


def run_of(taken, update, run):
    """One run of what `trained` gave: of the update's arm."""
    return jax.tree.map(lambda a: np.asarray(a[run]), taken[update]._replace(opt_state=()))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_an_epoch_is_table_1_step_by_step(hurried):
    """One epoch of both updates against float64 NumPy that shares nothing but the order."""
    task = task_of(2, config={"train": {**TRAIN, "train_images": 410}})
    p, split = program([1], task=task), draw_split("train", (410, 150), 600, jnp.uint32(1))
    key = jax.random.fold_in(stream(split.order_seed, ORDER["train"]), 0)
    order = np.asarray(split.train[jnp.argsort(jax.random.bits(key, (410,)))])
    assert sorted(order) == sorted(np.asarray(split.train))
    for which, (start, run) in enumerate(zip(trained(p, 0), trained(p, 1), strict=True)):
        layers, theta = as_numpy(jax.tree.map(lambda w: w[0], start.params))
        losses = 0.0
        for first in range(0, 410, 20):  # the last mini-batch has 10 images
            index = order[first : first + 20]
            x, y = DATA.train_images[index].astype(np.float64), DATA.train_labels[index]
            losses += reference.forward(layers, theta, x, y, 1e-5)[0]
            un = BOTH[which] == "un"
            layers, theta = reference.step(layers, theta, x, y, 1e-5, 1e-2, un=un)
        found = as_numpy(jax.tree.map(lambda w: w[0], run.params))
        assert_close(found, (layers, theta), atol=2e-3)
        assert run.history.train_loss[0, 0] == pytest.approx(losses / 410, rel=1e-3)
        assert (run.epoch, run.history.lr[0, 0]) == (1, np.float32(1e-2))


def test_runs_of_a_seed_share_start_and_split_and_seeds_differ(both):
    runs = both.take(both.start())
    assert_same((runs[0].params, runs[0].stats), (runs[1].params, runs[1].stats))
    assert len({w.tobytes() for w in runs[0].params["theta"]["W"]}) == 3
    assert len({np.asarray(split.train).tobytes() for split in SPLITS}) == 3
    assert len({*SPLITS[0].train.tolist(), *SPLITS[0].validation.tolist()}) == 400 + 150


def test_a_runs_bits_depend_on_its_seed_alone(healthy):
    """Not on how many runs, devices or other updates are trained along."""
    for seeds, updates in (([0], ("sm", "un")), ([2, 0, 2, 4, 1], ("un",))):
        found = trained(program(seeds, updates), 2)
        assert_same(run_of(found, updates.index("un"), seeds.index(0)), run_of(healthy, 1, 0))


def test_a_measured_loss_does_not_depend_on_what_is_trained_along():
    """Nor do norms, in filters as many and as long as Table 2's: there XLA would compute several
    runs' losses together, and a sum over two runs at once rounds in another order."""
    task, data = task_of(1, 784, {"model": {"width": 64}}), dataset(side=28)
    one, two = (
        run_of(trained(program(seeds, updates, task=task, data=data), 1), updates.index("un"), 0)
        for seeds, updates in (([0], ("un",)), ([0, 1], BOTH))
    )
    assert_same(one, two)


def test_a_run_that_blows_up_stops_with_its_epoch_and_spares_the_rest(healthy):
    p = program(rates=[[1e-2, 1e-2], [1e30, 1e-2], [1e-2, np.nan]])
    start = p.take(p.start())
    state = p.advance(p.advance(p.start()))
    runs = p.take(state)
    reasons = [[protocol.STOP_REASONS[r] for r in arm.reason] for arm in runs]
    assert reasons == [["running", "non-finite", "running"], ["running", "running", "no-rate"]]
    assert [arm.epoch.tolist() for arm in runs] == [[2, 1, 2], [2, 2, 0]]
    assert_same(run_of(runs, 1, 2), run_of(start, 1, 2))  # it is frozen
    for update, seed in ((0, 0), (0, 2), (1, 0), (1, 1)):
        assert_same(run_of(runs, update, seed), run_of(healthy, update, seed))
    status = p.status(state)
    assert (status.epoch, status.active) == (2, True)
    assert status.text.startswith("4/6 runs active, val error ")


def measured(run, images, labels):
    """Which images a run gets wrong and its mean cross-entropy, all of them at once."""
    logits, _ = TASK.network.apply(run.params, run.stats, np.float32(images), False)
    loss = -np.asarray(jax.nn.log_softmax(logits))[np.arange(len(labels)), labels].mean()
    return np.argmax(logits, 1) != labels, pytest.approx(loss, rel=1e-5)


def test_errors_and_losses_count_every_image_once(both):
    state = both.advance(both.start())
    found, runs, validation = both.find_wrong(state), both.take(state), SPLITS[2].validation
    for update in (0, 1):
        run, (wrong, loss) = run_of(runs, update, 2), found[update]
        expected, mean = measured(run, DATA.test_images, DATA.test_labels)
        np.testing.assert_array_equal(wrong[2], expected)
        assert loss[2] == mean
        expected, mean = measured(run, DATA.train_images[validation], DATA.train_labels[validation])
        assert run.history.val_loss[0] == mean
        assert run.history.val_error[0] == pytest.approx(expected.mean())


def test_the_order_of_random_bits_is_that_of_a_stable_sort():
    bits = np.random.default_rng(0).integers(0, 2**32, (2, 5000), dtype=np.uint32)
    bits[:, ::3] = bits[:, :1]  # many ties
    bits[0, 7], bits[1, 7] = 0, 2**32 - 1
    found = jax.jit(jax.vmap(argsort))(bits)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, np.argsort(bits, axis=-1, kind="stable"))


def test_statistics_of_images_are_those_of_the_training_images(hurried):
    """And validation is measured with them."""
    runs = trained(program([0], ("un",), task=TASK._replace(statistics="images")), 2)
    run, split = run_of(runs, 0, 0), SPLITS[0]
    layers = run.stats["layers"]
    w = np.asarray(TASK.network.filters(run.params)[0], float)
    h = (DATA.train_images[np.asarray(split.train)] @ w.T)[:400].reshape(20, 20, -1)
    expected = {"mean": h.mean((0, 1)), "var": h.var(1).mean(0)}
    assert_close(layers[min(layers)]["norm"], expected, rtol=1e-4)
    index = split.validation
    wrong, loss = measured(run, DATA.train_images[index], DATA.train_labels[index])
    assert run.history.val_error[1] == pytest.approx(wrong.mean())
    assert run.history.val_loss[1] == loss


@pytest.mark.parametrize("schedule", [protocol.BOLD_DRIVER, protocol.BOLD_DRIVER_BACK])
def test_the_rate_follows_the_bold_driver_and_battitis_takes_an_epoch_back(schedule, both):
    changes = {"rate": np.float32([0.1, 0.2, 0.3]), "schedule": np.full(3, schedule, np.int32)}
    seen = [[arm._replace(**changes) for arm in both.take(both.start())]]
    for _ in range(5):
        seen.append(trained(both, 1, seen[-1]))
    rises = []
    for old, new in itertools.pairwise(seen):
        for before, after in ((run_of(old, *at), run_of(new, *at)) for at in np.ndindex(2, 3)):
            if after.epoch == before.epoch:  # it has ended
                continue
            assert after.history.lr[before.epoch] == before.rate
            rose = after.history.train_loss[before.epoch] > before.watched
            factor = 0.5 if rose else 1.05 if before.epoch else 1.0
            assert after.rate == pytest.approx(before.rate * factor, rel=1e-6)
            kept = jax.tree.map(np.array_equal, after.params, before.params)
            assert jax.tree.all(kept) == (rose and schedule == protocol.BOLD_DRIVER_BACK)
            rises.append(rose)
    assert {True, False} == set(rises)


def test_the_sweep_has_a_fixed_rate_and_no_early_stop(hurried):
    sweep = {"train_images": 100, "validation_images": 50, "epochs": 4}
    task, rates = task_of(config={"sweep": sweep}, part="sweep"), np.float32([[1e-2], [1e-3]])
    p = program([0, 0], ("un",), rates, task, protocol.CONSTANT)
    (start,), (runs,) = trained(p, 0), trained(p, 4)
    assert_same(*(jax.tree.map(lambda w, run=run: w[run], start.params) for run in (0, 1)))
    np.testing.assert_array_equal(runs.history.lr, np.broadcast_to(rates, (2, 4)))
    assert [protocol.STOP_REASONS[r] for r in runs.reason] == ["max-epochs"] * 2
    assert p.status(p.put((runs,)))[:2] == (4, False)


def test_a_step_goes_by_reduction_ratio_layer_and_decay(hurried):
    """Of gradient descent: a ratio scales all filters' steps, a factor those of a layer."""

    def step(arm=Arm("b-sgd"), reduction="sum", rate=1e-3, **given):  # noqa: B008
        task = task_of(2, config={"loss": {"batch_size": 20, "reduction": reduction}})
        training, zero = make_training(task, arm), jnp.asarray(0.0)
        run = training.init(Settings(jnp.uint32(0), jnp.float32(rate), **given))
        at = EpochState(run.params, run.stats, run.opt_state, zero, zero)
        after = training.step(run, at, X, Y)
        trees = (run.params, after.params)
        return [[*task.network.filters(p), p["theta"]["W"]] for p in trees], after.loss

    @jax.jit  # all at once: compiled once
    def steps():
        return (
            step(), step(reduction="mean", rate=2e-2), step(ratio=3.0),
            step(Arm("b-sgd", factors=(0.5, 2.0))),
            step(Arm("sgd-wd"), decay=jnp.float32(50.0)),
        )  # fmt: skip

    ((start, plain), loss), *others = steps()
    assert np.abs(plain[-1] - start[-1]).max() > 1e-3
    expected = ((1, 1, 1), 0), ((3, 3, 1), 0), ((0.5, 2, 1), 0), ((1, 1, 1), 50)
    for ((_, found), same), (factors, decay) in zip(others, expected, strict=True):
        decays = (decay, decay, 0)  # of the filters alone
        for w, moved, after, factor, eta in zip(start, plain, found, factors, decays, strict=True):
            assert_close(after, w + factor * (moved - w) - 1e-3 * eta * w, atol=1e-6)
        assert loss == pytest.approx(same)  # recorded per image either way


def test_to_look_at_the_layers_changes_nothing_else(healthy):
    found = run_of(trained(program([0], ("un",), task=TASK._replace(layers=True)), 2), 0, 0)
    rate, angle = found.history.layer_rate, found.history.layer_angle
    assert rate.shape == angle.shape == (6, 1)
    np.testing.assert_allclose(rate[:2], 1e-2, rtol=0.2)
    assert (angle[:2] > 0).all()
    plain = found._replace(history=found.history._replace(layer_rate=None, layer_angle=None))
    assert_same(plain, run_of(healthy, 1, 0))


def test_a_program_computes_float32_products_in_float32(both):
    """Whatever the process is set to: JAX's default is TF32 on recent GPUs, bfloat16 on TPUs."""
    state, shared = both.start(), (both._images, both._test)
    with jax.default_matmul_precision("bfloat16"):
        epoch = both._epoch.lower(both._splits, state, np.int32(0), *shared)
        texts = epoch.as_text(), both._wrong.lower(state, both._test).as_text()
    for text in texts:
        assert text.count("dot_general") == text.count("precision = [HIGHEST, HIGHEST]") > 0


def test_blocks_are_placed_on_devices_in_turn():
    """No device has more than one block more than another; -1 fills them up."""
    found = run_many.place_runs((7, 2, 3), (2, 2, 3), 3)
    places = [[0, 1, 6, -1, 2, 3, -1, -1, 4, 5, -1, -1], [-1, -1, 0, 1, -1, -1]]
    assert [each.tolist() for each in found] == [*places, [-1] * 6 + [0, 1, 2]]


def test_a_run_that_follows_has_its_leaders_rate():
    """That of its seed's first run in the first arm, wherever the two are computed."""
    driver, constant = protocol.BOLD_DRIVER, protocol.CONSTANT
    rates, schedules = np.full(3, 0.3), np.array([driver, constant, constant])
    leading = Settings(np.array([4, 5, 4]), rates, None, schedules)
    following = Settings(np.array([5, 4, 4]), rates, None, protocol.FOLLOW)
    arms = [(Arm("b-sgd"), leading), (Arm("un"), following)]
    leaders, followers = (
        runs.history.lr[:, :3] for runs in trained(run_many.Program("train", TASK, arms, DATA), 3)
    )
    assert leaders[0, 2] != leaders[1, 2] == leaders[2, 2]
    np.testing.assert_array_equal(followers, leaders[[1, 0, 0]])
