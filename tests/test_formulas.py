"""Each update and its options against its formula in float64 NumPy, and what is said of one."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import rivals
from tests.test_updates import (
    arrays,
    assert_close,
    every_update,
    farthest,
    invariant_loss,
    kernels,
    last,
    off_unit,
    one_update,
    train,
)
from unitnorm import updates
from unitnorm.updates import UPDATES, build

STEPS, RATE = 12, 0.05
TARGET = np.random.default_rng(1).normal(size=(4, 15))
START = rivals.towards_sphere(np.random.default_rng(0).normal(size=(4, 15)))
START = rivals.towards_sphere(START - START.mean(1, keepdims=True))  # as Nero wants it


def slanted(W):
    """Far from tangent."""
    return 0.5 * W - TARGET


def radial(W):
    """Nearly along the rows."""
    return 3 * W + 0.1 * slanted(W)


def tangent(W):
    """Of a loss that depends on directions alone."""
    lengths = rivals.lengths(W)
    unit = W / lengths
    return (unit * (unit * TARGET).sum(1, keepdims=True) - TARGET) / lengths


def together(W):
    """Tangent to all rows as one, to none alone."""
    signs = np.array([[1.0], [-1.0], [1.0], [-1.0]])
    return 3 * signs * W / rivals.lengths(W) ** 2 + tangent(W)


def walk(tx, gradient):
    with jax.enable_x64(True):
        w = jnp.asarray(START)
        state, path = tx.init(w), []
        step = jax.jit(tx.update)
        for _ in range(STEPS):
            moved, state = step(jnp.asarray(gradient(np.asarray(w))), state, w)
            w = optax.apply_updates(w, moved)
            path.append(np.asarray(w))
    return np.stack(path)


@functools.cache
def rule(name, gradient=slanted, **options):
    steps = getattr(rivals, name.replace("-", "_"))(START, gradient, RATE, **options)
    with jax.enable_x64(True):
        return np.stack(list(itertools.islice(steps, STEPS)))


@every_update
def test_twelve_steps_as_in_the_formula_and_in_no_other(name):
    path = walk(UPDATES[name].filters(RATE, axis=-1), slanted)
    gaps = {n: np.abs(path - rule(n)).max() for n in UPDATES}
    assert gaps.pop(name) < 1e-12
    assert min(gaps.values()) > 1e-5


OPTIONS = [
    ("sgdp", {"momentum": 0.8, "weight_decay": 0.1, "nesterov": True}),
    ("adamp", {"weight_decay": 0.1, "nesterov": True}),
    ("sgd-g", {"momentum": 0.5, "clip": None}),
    ("adam-g", {"clip": None}),
    ("lars", {"momentum": 0.5, "weight_decay": 0.1}),
    ("rotational-sgd", {"momentum": 0.5, "weight_decay": 0.1}),
    ("rotational-sgd", {"zero_mean": True}),
    ("renorm-sgd", {"momentum": 0.5, "nesterov": False}),
    ("adamwn", {"norm_ratio": 2.0, "update_rate": 0.3}),
    ("muon", {"momentum": 0.8, "weight_decay": 0.1, "nesterov": False}),
    ("manifold-muon", {"dual_steps": 100, "dual_rate": 0.01}),  # as published
    ("un-carried", {"median": True}),
    ("un-momentum", {"momentum": 0.5, "nesterov": True}),
    ("sgd-wd", {"summed_over": 100}),
    ("sgd-momentum", {"weight_decay": 0.1, "nesterov": True}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_options_are_those_of_the_formula(name, options):
    found, expected = UPDATES[name].filters(RATE, axis=-1, **options), rule(name, **options)
    np.testing.assert_allclose(walk(found, slanted), expected, rtol=0, atol=1e-12)
    assert np.abs(expected - rule(name)).max() > 1e-4


ANY = {
    "un-nesterov": updates.on_sphere(optax.sgd(RATE, 0.9, nesterov=True), axis=-1),
    "adam-on-sphere": updates.on_sphere(optax.adam(RATE), axis=-1),
    "hyperball-of-momentum": updates.hyperball(
        RATE, optax.trace(0.9), axis=(0, 1), off_manifold="keep"
    ),
}


@pytest.mark.parametrize("formula", ANY)
def test_any_optimiser_may_move_on_the_sphere(formula):
    np.testing.assert_allclose(walk(ANY[formula], slanted), rule(formula), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gradient", [radial, tangent, together])
@pytest.mark.parametrize(
    ("name", "never"), [("sgdp", optax.sgd(RATE, 0.9)), ("adamp", optax.adam(RATE))]
)
def test_the_projection_is_made_where_weights_look_invariant(name, never, gradient):
    found = walk(UPDATES[name].filters(RATE, axis=-1), gradient)
    np.testing.assert_allclose(found, rule(name, gradient), rtol=0, atol=1e-12)
    assert (np.abs(found - walk(never, gradient)).max() > 1e-4) == (gradient is not radial)


@pytest.mark.parametrize("size", [1, 24, 784])
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_rows_take_the_step_that_columns_take(size, scale):
    random = np.random.default_rng(size)
    rows = scale * rivals.towards_sphere(random.normal(size=(6, size)))
    rows[2] = 0
    gradient = random.normal(size=rows.shape) / scale
    with jax.enable_x64(True):

        def twice(axis, w, g, **options):
            tx = updates.un(lambda count: 0.3 / (1 + count), axis=axis, **options)
            return np.asarray(last(train(tx, jnp.asarray(w), lambda _: jnp.asarray(g), 2)))

        by_row = twice(-1, rows, gradient)
        np.testing.assert_allclose(by_row, twice(0, rows.T, gradient.T).T, rtol=0, atol=1e-14)
        if scale == 1:
            trusted = twice(-1, rows, gradient, off_manifold="trust")
            alive = rows.any(-1)
            np.testing.assert_allclose(trusted[alive], by_row[alive], rtol=0, atol=1e-14)
    assert not by_row[2].any()


@pytest.mark.parametrize("size", [32, 784])
def test_rows_stay_at_unit_norm_over_long_steps_and_radial_gradients(size):
    rng = np.random.default_rng(size)
    start = jnp.asarray(rivals.towards_sphere(rng.normal(size=(64, size))), jnp.float32)

    def norms_after(steps, off_manifold, radial):
        tx = updates.un(0.1, axis=-1, off_manifold=off_manifold)

        def step(w, key):
            g = 10 * jax.random.normal(key, w.shape)  # a step is longer than the filter
            g -= (1 - radial) * jnp.sum(w * g, -1, keepdims=True) * w
            g += radial * w
            return optax.apply_updates(w, tx.update(g, tx.init(w), w)[0]), None

        w, _ = jax.lax.scan(step, start, jax.random.split(jax.random.key(0), steps))
        return np.linalg.norm(np.asarray(w, np.float64), axis=-1)

    np.testing.assert_allclose(norms_after(1, "normalize", 1e5), 1, rtol=0, atol=3e-7)
    np.testing.assert_allclose(norms_after(1000, "normalize", 0.0), 1, rtol=0, atol=3e-7)
    np.testing.assert_allclose(norms_after(1000, "trust", 0.0), 1, rtol=0, atol=5e-7)


def test_un_that_carries_the_norm_points_where_gradient_descent_does():
    with jax.enable_x64(True):
        start, target = kernels(dtype=jnp.float64)["conv"], kernels(5, jnp.float64)["conv"]
        start = 0.5 * start  # the carried norm is that of the start
        gradient = jax.jit(jax.grad(lambda w: invariant_loss(w, target)))
        free, carried, plain = (
            np.asarray(train(tx, start, gradient, 300))
            for tx in (optax.sgd(0.3), updates.un_carried(0.3), updates.un(0.3))
        )
    sizes = np.sqrt(np.sum(free**2, (1, 2, 3), keepdims=True))
    assert sizes[-1].min() > 0.6  # they grow from 0.5 by far
    np.testing.assert_allclose(carried, free / sizes, rtol=0, atol=1e-12)
    assert np.abs(plain - carried).max() > 1e-2


MOMENTUM = ["un-momentum", "un-nesterov", "sgd-momentum", "sgdp", "sgd-g", "lars", "renorm-sgd"]


@pytest.mark.parametrize("update", [*MOMENTUM, "rotational-sgd", "muon"])
def test_momentum_may_be_a_schedule(update):
    def schedule(count):
        return 0.5 * count

    def path(tx):
        return train(tx, kernels(), lambda w: jax.tree.map(lambda x: jnp.sin(9 * x), w), 2)

    factory = UPDATES[update].filters
    found, without = path(factory(0.1, schedule)), path(factory(0.1, 0.0))
    options = {"learning_rate": 0.1, "filters": {"conv": True}, "momentum": schedule}
    assert_close(path(optax.inject_hyperparams(build)(update, **options)), found)
    assert_close(jax.tree.map(lambda w: w[0], found), jax.tree.map(lambda w: w[0], without))
    assert farthest(last(found), last(without)) > 1e-4


def test_every_run_of_a_vmap_has_weight_decay_of_its_own():
    decays, rates = jnp.array([0.0, 0.1, 0.4]), jnp.array([0.1, 0.2, 0.3])
    params = {"layer": kernels()["conv"], "shift": jnp.ones(4)}

    def step(decay, rate):
        selection = {"layer": True, "shift": False}
        tx = build("sgd-wd", rate, selection, weight_decay=decay, summed_over=2)
        return one_update(tx, jax.tree.map(jnp.zeros_like, params), params)

    found = jax.jit(jax.vmap(step))(decays, rates)
    factors = (-2 * decays * rates)[:, None, None, None, None]
    np.testing.assert_allclose(found["layer"], factors * params["layer"], atol=1e-7)
    assert not found["shift"].any()  # the decay is that of the filters alone


def test_what_leaves_the_manifold_is_named():
    params = {"layer": kernels(), "bias": jnp.full(3, 7.0)}
    selection = {"layer": True, "bias": False}
    grads = {"layer": arrays(1), "bias": jnp.ones(3)}
    tx = build("un", 0.1, selection)
    updates.assert_on_manifold(last(train(tx, params, lambda _: grads, 1)), selection)
    doubled = last(train(optax.chain(tx, optax.scale(2)), params, lambda _: grads, 1))
    with pytest.raises(ValueError, match=r"layer/conv of shape .* a filter has norm 1\.1"):
        updates.assert_on_manifold(doubled, selection)
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(updates.assert_on_manifold)(kernels())
    updates.assert_on_manifold(kernels(dtype=jnp.bfloat16))
    updates.assert_on_manifold(jax.tree.map(lambda w: w.at[..., 0].set(0), kernels()))


def test_what_wraps_an_update_has_a_way_that_ends_on_the_sphere():
    """The recipes of .docs/updates.md, each beside what it stands for."""

    def after_steps(tx, **extra):
        params = kernels()
        state = tx.init(params)
        for _ in range(4):
            step, state = tx.update(arrays(1), state, params, **extra)
            params = optax.apply_updates(params, step)
        return params, state

    def off(tx, **extra):
        return off_unit(after_steps(tx, **extra)[0])

    un, plateau = updates.un(0.1), optax.contrib.reduce_on_plateau(patience=1)
    assert off(optax.chain(un, plateau), value=1.0) > 1e-3
    inside = updates.on_sphere(optax.chain(optax.sgd(0.1), plateau))
    assert off(inside, value=1.0) < 1e-6
    assert max(off(optax.MultiSteps(un, 2)), off(optax.apply_if_finite(un, 3))) < 1e-6
    params, state = after_steps(optax.contrib.schedule_free(un, 0.1))
    average = optax.contrib.schedule_free_eval_params(state, params)
    assert off_unit(average) > 1e-3
    updates.assert_on_manifold(updates.normalize_filters(average, True))
    whole = updates.hyperball(1e-2, optax.contrib.scale_by_muon(), axis=(0, 1), off_manifold="keep")
    w = arrays(0, layers=("dense",))["dense"]
    end = last(train(whole, w, jnp.sin, 2))
    np.testing.assert_allclose(jnp.linalg.norm(end), jnp.linalg.norm(w), rtol=1e-6)
    assert farthest(end, w) > 1e-2


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1.0, "0.1", True, None, 1j])
def test_a_rate_that_is_none_is_refused_by_every_update(rate):
    for update in UPDATES.values():
        with pytest.raises(ValueError, match=r"learning_rate = .*: expected a finite number"):
            update.filters(rate)
    for sound in (0.0, 1, np.float32(0.1), jnp.asarray(-1.0), optax.constant_schedule(0.1)):
        UPDATES["un"].filters(sound)
        UPDATES["un"].filters(learning_rate=sound)
