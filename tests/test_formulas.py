"""Each update against its formula in float64 NumPy, and what is said of one update alone."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

from tests import rivals
from tests.test_updates import (
    LAYERS,
    arrays,
    assert_close,
    every_update,
    farthest,
    invariant_loss,
    kernels,
    last,
    norms,
    off_unit,
    one_update,
    train,
)
from unitnorm import updates
from unitnorm.updates import UPDATES, build


@every_update
@pytest.mark.parametrize("layer", LAYERS)
def test_ten_steps_as_in_the_formula(name, layer):
    shape = LAYERS[layer]
    rules = {n: getattr(rivals, n.replace("-", "_")) for n in UPDATES}
    random = np.random.default_rng(0)

    def rows(kernel):
        return np.asarray(kernel).reshape(-1, shape[-1]).T

    start = rivals.towards_sphere(rows(random.normal(size=shape)))
    slope, shift = random.normal(size=(2, *start.shape))

    def gradient(W):
        return slope * W + shift

    def kernel_gradient(kernel):
        return kernel * slope.T.reshape(shape) + shift.T.reshape(shape)

    with jax.enable_x64(True):
        tx = UPDATES[name].filters(0.02)
        kernel = jnp.asarray(start.T.reshape(shape))
        path = np.asarray(train(tx, kernel, kernel_gradient, 10))
        others = {n: list(itertools.islice(r(start, gradient, 0.02), 10)) for n, r in rules.items()}
    actual = np.stack([rows(kernel) for kernel in path])
    gaps = {n: np.abs(actual - np.stack(steps)).max() for n, steps in others.items()}
    assert gaps.pop(name) < 1e-13
    # The reference tells this update from every other.
    assert min(gaps.values()) > 1e-5


@pytest.mark.parametrize("size", [1, 5, 8, 24, 784, 1032])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
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


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("push", [1.0, 1e3, 1e6])
def test_a_gradient_along_the_filter_does_not_spoil_its_norm(axis, push):
    # ‖w − λΠ(g)‖² = ⟨w, w⟩ + λ²(⟨g, g⟩ − ⟨w, g⟩²) would cancel here
    rows = rivals.towards_sphere(np.random.default_rng(0).normal(size=(6, 32)))
    w = jnp.asarray(rows if axis == -1 else rows.T, jnp.float32)
    step = one_update(updates.un(1.0, axis=axis), push * w, w)
    norms = np.linalg.norm(np.asarray(w + step, np.float64), axis=axis)
    np.testing.assert_allclose(norms, 1, rtol=0, atol=1e-6)


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


def test_b_sgd_that_keeps_its_median_norm_goes_where_the_rate_would_take_it():
    """Norms that grow, at a rate that grows with them, turn the filters alike."""
    with jax.enable_x64(True):
        start, target = kernels(dtype=jnp.float64)["conv"], kernels(5, jnp.float64)["conv"]
        gradient = jax.jit(jax.grad(lambda w: invariant_loss(w, target)))
        found = np.asarray(train(updates.b_sgd_median(0.3), start, gradient, 20))
        w, free = start, []
        for _ in range(20):
            w = w - 0.3 * np.median(norms(w)) ** 2 * gradient(w)
            free.append(w)
    free = np.stack(free)
    sizes = np.sqrt(np.sum(free**2, (1, 2, 3), keepdims=True))
    assert np.median(sizes[-1]) > 1.1
    np.testing.assert_allclose(found, free / np.median(sizes, -1, keepdims=True), atol=1e-12)


def test_un_that_carries_the_norm_may_share_its_median():
    random = np.random.default_rng(0)
    start = rivals.towards_sphere(random.normal(size=(6, 12)))
    slope, shift = random.normal(size=(2, *start.shape))

    def gradient(W):
        return slope * W + shift

    with jax.enable_x64(True):
        tx = updates.un_carried(0.3, median=True, axis=-1)
        found = np.asarray(train(tx, jnp.asarray(start), gradient, 20))
    for median, close in ((True, True), (False, False)):
        steps = rivals.un_carried(start, gradient, 0.3, median)
        expected = np.stack(list(itertools.islice(steps, 20)))
        assert (np.abs(found - expected).max() < 1e-12) == close


def test_the_first_step_with_momentum_is_that_of_un():
    heavy_ball = one_update(updates.un_momentum(0.1), arrays(1), kernels())
    plain = one_update(updates.un(0.1), arrays(1), kernels())
    assert farthest(heavy_ball, plain) == 0
    nesterov = one_update(updates.un_nesterov(0.1, momentum=0.5), arrays(1), kernels())
    assert_close(nesterov, one_update(updates.un(0.15), arrays(1), kernels()))


@pytest.mark.parametrize("factory", [updates.un_momentum, updates.un_nesterov, updates.un_adam])
def test_buffers_are_tangent_where_they_are_used(factory):
    with jax.enable_x64(True):
        tx, w = factory(0.3), kernels(dtype=jnp.float64)["conv"]
        state = tx.init(w)
        for seed in (1, 2, 3):
            displacement, state = tx.update(arrays(seed, w.dtype)["conv"], state, w)
            buffer = state.inner[0].memory[0]
            assert np.abs(jnp.sum(w * buffer, (0, 1, 2))).max() < 1e-14
            assert np.abs(buffer).max() > 1e-2
            w = optax.apply_updates(w, displacement)


def test_the_first_step_of_un_adam_is_an_angle():
    with jax.enable_x64(True):
        w = kernels(dtype=jnp.float64)["conv"]
        moved = w + one_update(updates.un_adam(0.01), arrays(1, w.dtype)["conv"], w)
        cosines = jnp.sum(w * moved, (0, 1, 2))
        np.testing.assert_allclose(jnp.arccos(cosines), np.arctan(0.01), rtol=1e-8)


def test_weight_norm_is_training_a_flax_weight_norm_layer():
    random = np.random.default_rng(0)
    kernel, x, y = (
        jnp.asarray(random.normal(size=s), jnp.float32) for s in [(12, 5), (9, 12), (9, 5)]
    )
    kernel = kernel / norms(kernel)  # flax starts its scale at one
    layer = linen.WeightNorm(linen.Dense(5, use_bias=False))
    params = layer.init(jax.random.key(0), x)["params"]
    params["layer_instance"]["kernel"] = kernel

    def loss(outputs):
        return jnp.mean((outputs - y) ** 2)

    flax = last(
        train(optax.sgd(0.2), params, jax.grad(lambda p: loss(layer.apply({"params": p}, x))), 5)
    )
    ours = last(train(updates.weight_norm(0.2), kernel, jax.grad(lambda w: loss(x @ w)), 5))
    np.testing.assert_allclose(x @ ours, layer.apply({"params": flax}, x), atol=1e-5)
    assert np.abs(x @ ours - x @ kernel).max() > 0.1


# --- Any optimiser on the sphere -----------------------------------------------------------------


def test_momentum_of_optax_on_the_sphere_is_un_with_momentum():
    with jax.enable_x64(True):
        start = kernels(dtype=jnp.float64)
        for nesterov, ours in ((False, updates.un_momentum), (True, updates.un_nesterov)):
            inner = optax.sgd(0.3, momentum=0.9, nesterov=nesterov)
            path = [train(tx, start, lambda w: jax.tree.map(jnp.sin, w), 10)
                    for tx in (updates.on_sphere(inner), ours(0.3))]  # fmt: skip
            assert farthest(*path) < 1e-14


def test_adam_on_the_sphere_moves_tangentially():
    """And at 3 w as at w, which Adam alone does not."""
    with jax.enable_x64(True):
        w, g = (x["conv"] for x in (kernels(dtype=jnp.float64), arrays(1, jnp.float64)))
        for scale in (1, 3):
            tx = updates.on_sphere(optax.adam(0.1), off_manifold="keep")
            moved = scale * w + one_update(tx, g / scale, scale * w)
            np.testing.assert_allclose(norms(moved), scale, rtol=1e-14)
            step = moved / jnp.sum(moved * w, (0, 1, 2)) - w  # undoes the retraction
            r = g - w * jnp.sum(w * g, (0, 1, 2))
            expected = -0.1 * r / (jnp.abs(r) + 1e-8)
            np.testing.assert_allclose(
                step, expected - w * jnp.sum(w * expected, (0, 1, 2)), atol=1e-12
            )


@pytest.mark.parametrize(
    "factory",
    [updates.un_momentum, updates.un_nesterov, updates.sgdp, updates.sgd_g, updates.renorm_sgd],
)
def test_momentum_may_be_a_schedule(factory):
    def schedule(count):
        return 0.5 * count

    def path(tx):
        return train(tx, kernels(), lambda w: jax.tree.map(lambda x: jnp.sin(9 * x), w), 2)

    name = next(n for n, update in UPDATES.items() if update.filters is factory)
    found, without = path(factory(0.1, schedule)), path(factory(0.1, 0.0))
    options = {"learning_rate": 0.1, "filters": {"conv": True}, "momentum": schedule}
    assert_close(path(optax.inject_hyperparams(build)(name, **options)), found)
    assert_close(jax.tree.map(lambda w: w[0], found), jax.tree.map(lambda w: w[0], without))
    assert farthest(last(found), last(without)) > 1e-3


@pytest.mark.parametrize("factory", [updates.lars, updates.muon, updates.rotational_sgd])
def test_where_momentum_is_a_number_the_call_that_takes_a_schedule_is_named(factory):
    with pytest.raises(ValueError, match=r"inject_hyperparams\(update\)\(..., momentum=schedule\)"):
        factory(0.1, momentum=lambda count: 0.5)
    injected = optax.inject_hyperparams(factory)(0.1, momentum=lambda count: 0.5)
    assert_close(
        one_update(injected, arrays(1), kernels()),
        one_update(factory(0.1, momentum=0.5), arrays(1), kernels()),
    )


def test_every_run_of_a_vmap_has_weight_decay_of_its_own():
    decays, params = jnp.array([0.0, 0.1, 0.4]), {"layer": kernels()["conv"], "shift": jnp.ones(4)}
    grads = jax.tree.map(jnp.zeros_like, params)

    def step(decay, rate):
        tx = build(
            "sgd-wd", rate, {"layer": True, "shift": False}, weight_decay=decay, summed_over=2
        )
        return one_update(tx, grads, params)

    found = jax.jit(jax.vmap(step))(decays, jnp.array([0.1, 0.2, 0.3]))
    factors = -2 * decays * jnp.array([0.1, 0.2, 0.3])
    np.testing.assert_allclose(
        found["layer"], jnp.einsum("r,hwio->rhwio", factors, params["layer"]), atol=1e-7
    )
    assert not found["shift"].any()  # the decay is that of the filters alone
    scheduled = updates.sgd_wd(0.1, lambda count: 0.1 * count)
    path = train(scheduled, kernels(), lambda w: jax.tree.map(jnp.zeros_like, w), 2)
    assert_close(
        jax.tree.map(lambda w: w[1] / w[0], path), {"conv": jnp.full(LAYERS["conv"], 0.99)}
    )


def test_what_leaves_the_manifold_is_named():
    params = {"layer": kernels(), "bias": jnp.full(3, 7.0)}
    selection = {"layer": True, "bias": False}
    tx = build("un", 0.1, selection)
    grads = {"layer": arrays(1), "bias": jnp.ones(3)}
    for scale, raises in ((1.0, False), (2.0, True)):
        chain = optax.chain(tx, optax.scale(scale))
        moved = last(train(chain, params, lambda _: grads, 1))
        if raises:
            with pytest.raises(ValueError, match=r"layer/conv of shape .* a filter has norm 1\.1"):
                updates.assert_on_manifold(moved, selection)
        else:
            updates.assert_on_manifold(moved, selection)
    with pytest.raises(ValueError, match="bias"):
        updates.assert_on_manifold({"bias": jnp.full((3, 1), 7.0)})
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(updates.assert_on_manifold)(kernels())
    bf16 = jax.tree.map(lambda w: w.astype(jnp.bfloat16), kernels())
    updates.assert_on_manifold(bf16)
    updates.assert_on_manifold(jax.tree.map(lambda w: w.at[..., 0].set(0), kernels()))


def test_what_wraps_an_update_has_a_way_that_ends_on_the_sphere():
    """The recipes of .docs/updates.md, each beside what it stands for."""

    def off(tx, **extra):
        params = kernels()
        state = tx.init(params)
        for _ in range(8):
            step, state = tx.update(arrays(1), state, params, **extra)
            params = optax.apply_updates(params, step)
        return off_unit(params)

    un, plateau = updates.un(0.1), optax.contrib.reduce_on_plateau(patience=1)
    assert off(optax.chain(un, plateau), value=1.0) > 1e-3
    inside = updates.on_sphere(optax.chain(optax.sgd(0.1), plateau))
    assert off(inside, value=1.0) < 1e-6
    assert off(optax.chain(un, optax.scale(2))) > 1e-3
    assert max(off(optax.MultiSteps(un, 2)), off(optax.apply_if_finite(un, 3))) < 1e-6
    free = optax.contrib.schedule_free(un, 0.1)
    params, state = kernels(), free.init(kernels())
    for _ in range(8):
        step, state = free.update(arrays(1), state, params)
        params = optax.apply_updates(params, step)
    average = optax.contrib.schedule_free_eval_params(state, params)
    assert off_unit(average) > 1e-3
    updates.assert_on_manifold(updates.normalize_filters(average, True))
    whole = updates.hyperball(1e-2, optax.contrib.scale_by_muon(), axis=(0, 1), off_manifold="keep")
    w = arrays(0, layers=("dense",))["dense"]
    end = last(train(whole, w, jnp.sin, 5))
    np.testing.assert_allclose(jnp.linalg.norm(end), jnp.linalg.norm(w), rtol=1e-6)
    assert farthest(end, w) > 1e-2


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1.0, "0.1", True, None, 1j])
def test_a_rate_that_is_none_is_refused_by_every_update(rate):
    for update in (*UPDATES.values(), UPDATES["un"]):
        with pytest.raises(ValueError, match=r"learning_rate = .*: expected a finite number"):
            update.filters(rate)
    for sound in (0.0, 1, np.float32(0.1), jnp.asarray(-1.0), optax.constant_schedule(0.1)):
        UPDATES["un"].filters(sound)
        UPDATES["un"].filters(learning_rate=sound)
