"""One contract for every update, and each update against its formula in float64 NumPy."""

import functools
import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from tests import rivals
from unitnorm import updates
from unitnorm.updates import (
    UPDATES,
    build,
    normalize_filters,
    normalized_kernels,
    normalized_kernels_nnx,
    partition,
)

every_update = pytest.mark.parametrize("name", UPDATES)
CONSTRAINED = [name for name, update in UPDATES.items() if update.constrained]
# All but these leave a zero filter where it is.
MOVES_DEAD_FILTERS = {
    "b-sgd", "sgd-wd", "b-sgd-median", "sgdp", "adamp", "lars", "adam-srt",
}  # fmt: skip
# These move every entry alike, so they need neither axes nor two of them.
WITH_AXIS = [name for name in UPDATES if name not in {"b-sgd", "sgd-wd", "lars"}]
# These go the same way from every scaling of their filters.
INVARIANT = {*CONSTRAINED, "sm"} - {"un-carried"}
ADAMS = {"un-adam", "adamp", "adam-g", "nero", "adam-srt"}
STATELESS = {"b-sgd", "un", "sm", "normalize", "sgd-wd", "b-sgd-median"}

LAYERS = {"conv": (3, 3, 2, 4), "dense": (12, 5)}
BOTH = tuple(LAYERS)


def arrays(seed, dtype=jnp.float32, layers=("conv",)):
    """Random kernels, neither at unit norm nor tangent to anything."""
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.normal(size=LAYERS[name]), dtype) for name in layers}


def kernels(seed=0, dtype=jnp.float32, layers=("conv",)):
    """Random kernels whose filters have unit norm, and mean zero as Nero wants them."""
    wide = arrays(seed, jnp.promote_types(dtype, jnp.float32), layers)
    wide = jax.tree.map(lambda w: w - jnp.mean(w, range(w.ndim - 1)), wide)
    return jax.tree.map(lambda w: (w / norms(w)).astype(dtype), wide)


def norms(w):
    return jnp.sqrt(jnp.sum(jnp.square(w), range(w.ndim - 1)))


def invariant_loss(params, targets):
    """Squared distance of each normalised filter from a target, whatever the filter's norm."""
    distances = jax.tree.map(lambda w, t: jnp.sum((w / norms(w) - t) ** 2), params, targets)
    return sum(jax.tree.leaves(distances)) / 2


def train(tx, params, gradient, steps):
    """Parameters after each of `steps` updates, stacked."""
    state, path = tx.init(params), []
    for _ in range(steps):
        displacement, state = tx.update(gradient(params), state, params)
        params = optax.apply_updates(params, displacement)
        path.append(params)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *path)


def train_compiled(tx, params, gradient, steps):
    """Parameters after `steps` updates, compiled as one scan."""

    def step(carry, _):
        params, state = carry
        displacement, state = tx.update(gradient(params), state, params)
        return (optax.apply_updates(params, displacement), state), None

    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps)[0][0])(params)


def one_update(tx, grads, params):
    return tx.update(grads, tx.init(params), params)[0]


def last(path):
    return jax.tree.map(lambda w: w[-1], path)


def assert_close(actual, expected, rtol=0.0, atol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected
    )


def farthest(a, b):
    """Largest difference between two trees, in float64."""
    gaps = jax.tree.map(
        lambda x, y: np.abs(np.asarray(x, float) - np.asarray(y, float)).max(), a, b
    )
    return max(jax.tree.leaves(gaps))


def dtypes(tree):
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


def off_unit(params):
    """Largest distance of a filter's norm from one, in float64."""
    squares = [
        (np.asarray(w, float) ** 2).sum(tuple(range(w.ndim - 1))) for w in jax.tree.leaves(params)
    ]
    return max(np.abs(np.sqrt(s) - 1).max() for s in squares)


# --- The contract -------------------------------------------------------------------------------
# It holds all that optax's contrib/_common_test.py (0.2.8) asks of an optimiser: convergence,
# states that map_params walks, extra arguments, no second compilation, inject_hyperparams,
# MultiSteps, schedules, dtypes kept and stable. But for the targets: optax's parameters are vectors
# and their minima off the manifold, so that a scale-invariant function of kernels stands for them.


@every_update
def test_extra_arguments_are_taken_and_the_second_call_compiles_nothing(name):
    tx, traces = UPDATES[name].filters(0.1), []

    @jax.jit
    def update(grads, state, params):
        traces.append(name)
        return tx.update(grads, state, params, value=1.0, unexpected=jnp.ones(3))

    params, state = kernels(), jax.jit(tx.init)(kernels())
    for _ in range(2):
        displacement, state = update(arrays(1), state, params)
        params = jax.tree.map(jnp.add, params, displacement)
    assert len(traces) == 1
    assert_close(params, last(train(tx, kernels(), lambda _: arrays(1), 2)))


@every_update
def test_a_state_tells_what_of_it_is_shaped_like_parameters(name):
    tx = UPDATES[name].filters(0.1)
    state = tx.init(kernels())
    jax.tree.map(
        np.testing.assert_array_equal, optax.tree.map_params(tx, lambda v: v, state), state
    )
    shapes = []
    optax.tree.map_params(tx, lambda v: shapes.append(jnp.shape(v)), state)
    assert set(shapes) <= {LAYERS["conv"], (1, 1, 1, LAYERS["conv"][-1])}
    assert bool(shapes) == (name not in STATELESS)


@every_update
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_states_are_stable_under_cond(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        tx = UPDATES[name].filters(0.1)
        params, grads = kernels(dtype=dtype), arrays(1, dtype)

        @jax.jit
        def maybe(go, state):
            return jax.lax.cond(go, lambda: tx.update(grads, state, params), lambda: (grads, state))

        state = tx.init(params)
        for go in (True, False):
            displacement, after = maybe(go, state)
            assert dtypes(displacement) == [jnp.dtype(dtype)]
            state = jax.lax.cond(go, lambda after=after: after, lambda state=state: state)


@every_update
def test_one_compilation_serves_every_step_and_every_rate(name):
    traces = []

    @jax.jit
    def step(params, state, rate):
        traces.append(name)
        displacement, state = build(name, rate, True).update(arrays(1), state, params)
        return optax.apply_updates(params, displacement), state

    params, state = kernels(), build(name, 0.1, True).init(kernels())
    for rate in (0.1, 0.2, 0.4):
        params, state = step(params, state, jnp.float32(rate))
    assert len(traces) == 1
    doubling = build(name, lambda count: 0.1 * 2.0**count, True)
    assert_close(params, last(train(doubling, kernels(), lambda _: arrays(1), 3)), rtol=1e-5)


@every_update
def test_the_state_does_not_depend_on_the_rate_and_is_empty_where_it_can_be(name):
    tx = build(name, 0.1, True)
    state = jax.eval_shape(tx.init, kernels())
    traced = jax.eval_shape(lambda rate, p: build(name, rate, True).init(p), 0.1, kernels())
    assert state == traced
    assert bool(jax.tree.leaves(state)) == (name not in STATELESS)


@every_update
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtypes_are_kept(name, dtype):
    params, grads = kernels(dtype=dtype), arrays(1, dtype)
    tx = UPDATES[name].filters(0.1)
    state = tx.init(params)
    displacement, new_state = tx.update(grads, state, params)
    assert {u.dtype for u in jax.tree.leaves(displacement)} == {jnp.dtype(dtype)}
    assert dtypes(new_state) == dtypes(state)
    # Gradients and rates of another dtype change that of parameters and state no more.
    tx = build(name, jnp.float32(0.1), True)
    displacement, new_state = tx.update(arrays(1), tx.init(params), params)
    assert dtypes(new_state) == dtypes(tx.init(params))
    moved = optax.apply_updates(params, displacement)
    assert {w.dtype for w in jax.tree.leaves(moved)} == {jnp.dtype(dtype)}
    exact = optax.apply_updates(
        kernels(), one_update(UPDATES[name].filters(0.1), arrays(1), kernels())
    )
    # Rounded as parameters, as a displacement and as their sum, none of them above two.
    assert farthest(moved, exact) < 3 * 2 * float(jnp.finfo(dtype).eps)


@every_update
def test_under_cond(name):
    tx = UPDATES[name].filters(0.1)
    params, grads = kernels(), arrays(1)

    @jax.jit
    def maybe(go):
        state = tx.init(params)
        still = jax.tree.map(jnp.zeros_like, params)
        update = jax.lax.cond(go, lambda: tx.update(grads, state, params), lambda: (still, state))
        return update[0]

    assert_close(maybe(True), one_update(tx, grads, params))
    assert farthest(maybe(False), jax.tree.map(jnp.zeros_like, params)) == 0


@every_update
def test_vmap_is_a_loop(name):
    def stack(trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    starts, grads = [kernels(s) for s in range(3)], [arrays(s) for s in (7, 8, 9)]
    rates = [0.05, 0.1, 0.2]

    def two_steps(params, grads, rate):
        tx = build(name, rate, True)
        state = tx.init(params)
        for _ in range(2):
            displacement, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, displacement)
        return params

    together = jax.jit(jax.vmap(two_steps))(stack(starts), stack(grads), jnp.array(rates))
    single = jax.jit(two_steps)
    assert_close(together, stack(list(map(single, starts, grads, rates))), rtol=1e-5)


@every_update
def test_a_constant_schedule_is_a_constant(name):
    constant = train(UPDATES[name].filters(0.1), kernels(), lambda _: arrays(1), 4)
    schedule = optax.constant_schedule(0.1)
    scheduled = train(UPDATES[name].filters(schedule), kernels(), lambda _: arrays(1), 4)
    assert_close(scheduled, constant, rtol=1e-6)


@every_update
def test_inject_hyperparams(name):
    injected = optax.inject_hyperparams(UPDATES[name].filters)(learning_rate=0.1)
    state = injected.init(kernels())

    for rate in (0.1, 0.3):
        state.hyperparams["learning_rate"] = jnp.float32(rate)
        expected = one_update(UPDATES[name].filters(rate), arrays(1), kernels())
        displacement, after = injected.update(arrays(1), state, kernels())
        alone = UPDATES[name].filters(rate)
        _, inner = alone.update(arrays(1), alone.init(kernels()), kernels())
        assert_close(after.inner_state, inner, atol=1e-5)
        # optax corrects the bias of Adam by 1 - b2, which in float32 has lost four digits.
        assert_close(displacement, expected, atol=1e-4 if name in ADAMS else 1e-6)


@every_update
def test_multi_steps_moves_by_the_mean_gradient(name):
    tx = optax.MultiSteps(UPDATES[name].filters(0.1), every_k_schedule=2)
    params, first, second = kernels(), arrays(1), arrays(2)
    nothing, state = tx.update(first, tx.init(params), params)
    displacement, _ = tx.update(second, state, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    assert farthest(nothing, jax.tree.map(jnp.zeros_like, params)) == 0
    assert_close(displacement, one_update(UPDATES[name].filters(0.1), mean, params))


@every_update
def test_last_in_a_chain(name):
    plain = UPDATES[name].filters(0.1)
    chained = optax.chain(optax.clip_by_global_norm(0.5), plain)
    clipped = one_update(optax.clip_by_global_norm(0.5), arrays(1), kernels())
    displacement = one_update(chained, arrays(1), kernels())
    assert_close(displacement, one_update(plain, clipped, kernels()))
    moved = optax.apply_updates(kernels(), displacement)
    assert (off_unit(moved) < 1e-6) == UPDATES[name].constrained


@every_update
@pytest.mark.parametrize(
    "selection",
    [
        {"layer": True, "theta": False, "shift": False},
        {"layer": "filters", "theta": "rest", "shift": "rest"},
        lambda params: {**dict.fromkeys(params, False), "layer": True},
    ],
    ids=["mask", "labels", "function"],
)
def test_partition_sends_filters_and_the_rest_to_their_own(name, selection):
    rest = {"theta": arrays(3)["conv"], "shift": jnp.ones(4)}
    params = {"layer": kernels(), **rest}
    grads = {"layer": arrays(1), "theta": arrays(4)["conv"], "shift": jnp.full(4, 2.0)}
    together = train(build(name, 0.1, selection), params, lambda _: grads, 2)
    filters = train(UPDATES[name].filters(0.1), kernels(), lambda _: grads["layer"], 2)
    others = train(UPDATES[name].rest(0.1), rest, lambda _: {k: grads[k] for k in rest}, 2)
    assert_close(together, {"layer": filters, **others})


@every_update
def test_converges_on_a_scale_invariant_function(name):
    start, target = kernels()["conv"], kernels(5)["conv"]
    rate = {"lars": 0.01, "rotational-sgd": 1.0}.get(name, 0.1)
    tx = UPDATES[name].filters(optax.cosine_decay_schedule(rate, 300))
    end = train_compiled(tx, start, jax.grad(lambda w: invariant_loss(w, target)), 300)
    np.testing.assert_allclose(end / norms(end), target, atol=1e-3)


@every_update
def test_on_the_manifold_after_1000_steps_if_and_only_if_constrained(name):
    random = np.random.default_rng(0)
    start, target = (jnp.asarray(w, jnp.float32) for w in random.normal(size=(2, 28, 28, 8)))
    start, target = start / norms(start), 2 * target / norms(target)
    # The gradient is not tangent, as large as the filters, and changes all along.
    end = train_compiled(
        UPDATES[name].filters(0.01), start, lambda w: w - target + jnp.sin(40 * w) / 2, 1000
    )
    assert off_unit(end) < 1e-6 if UPDATES[name].constrained else off_unit(end) > 1e-2
    assert farthest(end, start) > 0.05


@every_update
def test_dead_filters_and_zero_gradients_give_no_nan(name):
    dead = jax.tree.map(lambda w: w.at[..., 1].set(0), kernels())
    for grads in (arrays(1), jax.tree.map(jnp.zeros_like, dead)):
        path = train(UPDATES[name].filters(0.1), dead, lambda _, g=grads: g, 3)
        for w, g in zip(jax.tree.leaves(path), jax.tree.leaves(grads), strict=True):
            assert np.all(np.isfinite(w))
            stays = name not in MOVES_DEAD_FILTERS or not np.any(g)
            assert np.all(w[..., 1] == 0) == stays
    if name != "sgd-wd":
        assert_close(path, jax.tree.map(lambda w: jnp.stack([w] * 3), dead), atol=2e-7)


@pytest.mark.parametrize("name", WITH_AXIS)
@pytest.mark.parametrize(
    "axis",
    [
        {"conv": (1, 2, 3), "dense": -1},
        lambda path: {"conv": (-3, -2, -1), "dense": 1}[path],
    ],
    ids=["tree", "function"],
)
def test_explicit_axes(name, axis):
    def filters_first(tree):
        return jax.tree.map(lambda w: jnp.moveaxis(w, -1, 0), tree)

    grads, params = arrays(1, layers=BOTH), kernels(layers=BOTH)
    expected = filters_first(one_update(UPDATES[name].filters(0.1), grads, params))
    grads, params = filters_first(grads), filters_first(params)
    assert_close(one_update(build(name, 0.1, True, axis=axis), grads, params), expected)
    if name in {"sgdp", "adamp"}:
        return  # these look at the filters alone where the gradient is nearly tangent
    # The axes matter: by default this is another update.
    assert farthest(one_update(UPDATES[name].filters(0.1), grads, params), expected) > 1e-3


def test_one_explicit_axis_serves_every_leaf():
    params = {"a": kernels(layers=BOTH)["dense"].T, "b": jnp.array([0.6, 0.8])}
    moved = optax.apply_updates(
        params, one_update(updates.un(0.1, axis=-1), jax.tree.map(jnp.ones_like, params), params)
    )
    np.testing.assert_allclose(np.linalg.norm(moved["a"], axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(moved["b"]), 1, atol=1e-6)


# --- Each update against its formula ------------------------------------------------------------
# With the paper's rows as filters, float64, generators of W after each step.


def project(W, Z):
    return Z - np.diag(np.diag(Z @ W.T)) @ W


def orth(W):
    return W / np.sqrt(np.diag(W @ W.T))[:, None]


def reference_b_sgd(W, gradient, rate):
    while True:
        W = W - rate * gradient(W)
        yield W


def reference_un(W, gradient, rate):
    while True:
        W = orth(W - rate * project(W, gradient(W)))
        yield W


def reference_un_momentum(W, gradient, rate):
    M = np.zeros_like(W)
    while True:
        M = 0.9 * project(W, M) + project(W, gradient(W))
        W = orth(W - rate * M)
        yield W


def reference_un_nesterov(W, gradient, rate):
    M = np.zeros_like(W)
    while True:
        R = project(W, gradient(W))
        M = 0.9 * project(W, M) + R
        W = orth(W - rate * (R + 0.9 * M))
        yield W


def reference_un_adam(W, gradient, rate):
    M, v = np.zeros_like(W), np.zeros(len(W))
    for t in itertools.count(1):
        R = project(W, gradient(W))
        M = 0.9 * project(W, M) + 0.1 * R
        v = 0.999 * v + 0.001 * np.diag(R @ R.T)
        size = np.sqrt(v / (1 - 0.999**t)) + 1e-8
        W = orth(W - rate * M / (1 - 0.9**t) / size[:, None])
        yield W


def reference_sm(W, gradient, rate):
    while True:
        W = W - rate * np.diag(np.diag(W @ W.T)) @ gradient(W)
        yield W


def reference_normalize(W, gradient, rate):
    while True:
        W = orth(W - rate * gradient(W))
        yield W


def reference_weight_norm(W, gradient, rate):
    """Descent on v and g by automatic differentiation through W(v, g)."""

    def of(v, g):
        return g[:, None] * v / jnp.linalg.norm(v, axis=1, keepdims=True)

    v, g = jnp.asarray(W), jnp.linalg.norm(W, axis=1)
    while True:
        G = gradient(np.asarray(of(v, g)))
        dv, dg = jax.grad(lambda v, g, G=G: jnp.sum(of(v, g) * G), (0, 1))(v, g)
        v, g = v - rate * dv, g - rate * dg
        yield np.asarray(of(v, g))


def reference_sgd_wd(W, gradient, rate):
    while True:
        W = W - rate * (gradient(W) + 5e-4 * W)
        yield W


def reference_un_carried(W, gradient, rate, median=False):
    n = np.diag(W @ W.T)
    while True:
        R = project(W, gradient(W))
        size = np.full_like(n, np.median(n)) if median else n
        W = orth(W - rate * R / size[:, None])
        n = n + rate**2 * np.diag(R @ R.T) / n
        yield W


def reference_b_sgd_median(W, gradient, rate):
    while True:
        norms = np.sqrt(np.diag(W @ W.T))
        W = W - rate * np.median(norms) ** 2 * gradient(W)
        W = W / np.median(np.sqrt(np.diag(W @ W.T)))
        yield W


REFERENCES = {
    name: globals().get(f"reference_{name.replace('-', '_')}")
    or getattr(rivals, name.replace("-", "_"))
    for name in UPDATES
}


@every_update
@pytest.mark.parametrize("layer", LAYERS)
def test_ten_steps_as_in_the_formula(name, layer):
    shape = LAYERS[layer]
    random = np.random.default_rng(0)

    def rows(kernel):
        return np.asarray(kernel).reshape(-1, shape[-1]).T

    start = orth(rows(random.normal(size=shape)))
    slope, shift = random.normal(size=(2, *start.shape))

    def gradient(W):
        return slope * W + shift

    def kernel_gradient(kernel):
        return kernel * slope.T.reshape(shape) + shift.T.reshape(shape)

    with jax.enable_x64(True):
        tx = UPDATES[name].filters(0.02)
        kernel = jnp.asarray(start.T.reshape(shape))
        path = np.asarray(train(tx, kernel, kernel_gradient, 10))
        others = {
            n: list(itertools.islice(r(start, gradient, 0.02), 10)) for n, r in REFERENCES.items()
        }
    actual = np.stack([rows(kernel) for kernel in path])
    gaps = {n: np.abs(actual - np.stack(steps)).max() for n, steps in others.items()}
    assert gaps.pop(name) < 1e-13
    # The reference tells this update from every other.
    assert min(gaps.values()) > 1e-5


@pytest.mark.parametrize("size", [1, 5, 8, 24, 784, 1032])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rows_take_the_step_that_columns_take(size, scale):
    random = np.random.default_rng(size)
    rows = scale * orth(random.normal(size=(6, size)))
    rows[2] = 0
    gradient = random.normal(size=rows.shape) / scale

    def schedule(count):
        return 0.3 / (1 + count)

    with jax.enable_x64(True):

        def twice(axis, w, g, **options):
            tx = updates.un(schedule, axis=axis, **options)
            w, state = jnp.asarray(w), tx.init(jnp.asarray(w))
            for _ in range(2):
                step, state = tx.update(jnp.asarray(g), state, w)
                w = w + step
            return np.asarray(w)

        by_row = twice(-1, rows, gradient)
        np.testing.assert_allclose(by_row, twice(0, rows.T, gradient.T).T, rtol=0, atol=1e-14)
        chain = optax.chain(updates.riemannian_gradient(-1), optax.scale(-0.3), updates.retract(-1))
        links, _ = chain.update(jnp.asarray(gradient), chain.init(rows), jnp.asarray(rows))
        step = one_update(updates.un(0.3, axis=-1), jnp.asarray(gradient), jnp.asarray(rows))
        np.testing.assert_allclose(rows + step, rows + links, rtol=0, atol=1e-14)
        if scale == 1:
            trusted = twice(-1, rows, gradient, off_manifold="trust")
            alive = rows.any(-1)
            np.testing.assert_allclose(trusted[alive], by_row[alive], rtol=0, atol=1e-14)
    assert not by_row[2].any()


@pytest.mark.parametrize("size", [32, 784])
def test_rows_stay_at_unit_norm_over_long_steps_and_radial_gradients(size):
    rng = np.random.default_rng(size)
    start = jnp.asarray(orth(rng.normal(size=(64, size))), jnp.float32)

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


def test_un_is_the_chain_of_its_links_bit_for_bit_where_filters_are_no_rows():
    chain = optax.chain(updates.riemannian_gradient(), optax.scale(-0.3), updates.retract())
    params, gradient = arrays(0, layers=BOTH), arrays(1, layers=BOTH)
    links, _ = jax.jit(chain.update)(gradient, chain.init(params), params)
    assert (
        farthest(jax.jit(one_update, static_argnums=0)(updates.un(0.3), gradient, params), links)
        == 0
    )


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("push", [1.0, 1e3, 1e6])
def test_a_gradient_along_the_filter_does_not_spoil_its_norm(axis, push):
    # ‖w − λΠ(g)‖² = ⟨w, w⟩ + λ²(⟨g, g⟩ − ⟨w, g⟩²) would cancel here
    rows = orth(np.random.default_rng(0).normal(size=(6, 32)))
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
    start = orth(random.normal(size=(6, 12)))
    slope, shift = random.normal(size=(2, *start.shape))

    def gradient(W):
        return slope * W + shift

    with jax.enable_x64(True):
        tx = updates.un_carried(0.3, median=True, axis=-1)
        found = np.asarray(train(tx, jnp.asarray(start), gradient, 20))
    for median, close in ((True, True), (False, False)):
        steps = reference_un_carried(start, gradient, 0.3, median)
        expected = np.stack(list(itertools.islice(steps, 20)))
        assert (np.abs(found - expected).max() < 1e-12) == close


@every_update
def test_filters_may_have_a_learning_rate_of_their_own(name):
    params = {"layer": kernels()["conv"], "shift": jnp.ones(4)}
    grads = {"layer": arrays(1)["conv"], "shift": jnp.full(4, 2.0)}
    selection = {"layer": True, "shift": False}
    found = one_update(build(name, 0.1, selection, filters_learning_rate=0.02), grads, params)
    for leaf, rate in (("layer", 0.02), ("shift", 0.1)):
        assert_close(found[leaf], one_update(build(name, rate, selection), grads, params)[leaf])


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
            buffer = state[1].mu if factory is updates.un_adam else state[1].momentum
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


# --- Scaling ------------------------------------------------------------------------------------


def scaled(params):
    """Every filter times a factor of its own, over four decades."""
    factors = {
        name: jnp.geomspace(0.01, 100, s[-1]) for name, s in LAYERS.items() if name in params
    }
    return jax.tree.map(jnp.multiply, params, factors)


def directions(path):
    return jax.tree.map(
        lambda w: w / jnp.sqrt(jnp.sum(w**2, range(1, w.ndim - 1), keepdims=True)), path
    )


@every_update
def test_only_b_sgd_and_its_kin_notice_the_scale_of_the_start(name):
    gradient = jax.grad(lambda p: invariant_loss(p, kernels(5)))
    tx = UPDATES[name].filters(0.1)
    from_unit = directions(train(tx, kernels(), gradient, 5))
    from_scaled = directions(train(tx, scaled(kernels()), gradient, 5))
    gap = farthest(from_unit, from_scaled)
    # Weight normalisation moves v by g/‖v‖ and g by what is left: not invariant either.
    assert gap < 1e-5 if name in INVARIANT else gap > 1e-2


def test_three_updates_are_one_on_a_scale_invariant_loss():
    gradient = jax.grad(lambda p: invariant_loss(p, kernels(5)))
    paths = {
        n: directions(train(UPDATES[n].filters(0.1), kernels(), gradient, 10)) for n in UPDATES
    }
    gaps = {n: farthest(path, paths["un"]) for n, path in paths.items()}
    assert {n for n, gap in gaps.items() if gap < 1e-5} == {"un", "sm", "normalize"}


@pytest.mark.parametrize("name", CONSTRAINED)
def test_filters_off_the_manifold_are_normalised_or_refused(name):
    off = scaled(kernels())
    moved = optax.apply_updates(off, one_update(UPDATES[name].filters(0.1), arrays(1), off))
    # Rounding is that of the start, a hundred times the manifold's.
    assert off_unit(moved) < 1e-4
    path = train(UPDATES[name].filters(0.1), off, lambda _: arrays(1), 2)
    assert off_unit(last(path)) < 1e-6

    strict = UPDATES[name].filters(0.1, off_manifold="raise")
    strict.init(kernels())
    strict.init(kernels(dtype=jnp.bfloat16))
    strict.init(jax.tree.map(lambda w: w.at[..., 0].set(0), kernels()))
    with pytest.raises(ValueError, match=r"conv of shape \(3, 3, 2, 4\).*\(0, 1, 2\).*norm 100"):
        strict.init(off)
    with pytest.raises(ValueError, match=r"conv.* norm nan"):
        strict.init(jax.tree.map(lambda w: w.at[0, 0, 0, 0].set(jnp.nan), kernels()))
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(strict.init)(kernels())
    with pytest.raises(ValueError, match="normalize, raise, trust; got 'warn'"):
        UPDATES[name].filters(0.1, off_manifold="warn")
    trusting = one_update(UPDATES[name].filters(0.1, off_manifold="trust"), arrays(1), kernels())
    assert_close(trusting, one_update(UPDATES[name].filters(0.1), arrays(1), kernels()))
    updates.retract().init(off)  # the default, here as in every update, is to normalise
    UPDATES[name].filters(0.1).init(off)


# --- Errors -------------------------------------------------------------------------------------


def test_an_unknown_name_is_answered_with_all_names():
    with pytest.raises(ValueError, match="'nu'.*" + ", ".join(UPDATES)):
        build("nu", 0.1, True)


@pytest.mark.parametrize("name", WITH_AXIS)
@pytest.mark.parametrize("bad", [jnp.ones(64), jnp.ones(())], ids=["vector", "scalar"])
def test_leaves_without_filters_are_refused_before_training(name, bad):
    with pytest.raises(ValueError, match=r"bn/scale of shape \((64,)?\).*optax.partition"):
        UPDATES[name].filters(0.1).init({"bn": {"scale": bad}})


@pytest.mark.parametrize("name", [*WITH_AXIS, "lars"])
def test_params_are_needed(name):
    tx = UPDATES[name].filters(0.1)
    state = tx.init(kernels())
    with pytest.raises(ValueError, match=r"update\(grads, state, params\)"):
        tx.update(arrays(1), state)


def test_an_injected_axis_is_refused_with_the_remedy():
    injected = optax.inject_hyperparams(updates.un)(0.1, axis=0)
    with pytest.raises(ValueError, match="static_args"):
        jax.jit(injected.init)(kernels())
    static = optax.inject_hyperparams(updates.un, static_args=("axis",))(0.1, axis=0)
    static.init(kernels())


@pytest.mark.parametrize(
    ("selection", "complaint"),
    [
        ({"conv": True}, "selection of filters does not fit"),
        ({"conv": True, "dense": "kernel"}, "got 'kernel'"),
        ({"conv": True, "dense": [True, False]}, "selection of filters does not fit"),
    ],
)
def test_selections_that_do_not_fit_are_refused(selection, complaint):
    with pytest.raises(ValueError, match=complaint):
        build("un", 0.1, selection).init(kernels(layers=BOTH))


def test_axes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="axis does not fit"):
        updates.un(0.1, axis={"conv": 0}).init(kernels(layers=BOTH))


# --- Choosing the kernels that feed a normalisation ----------------------------------------------


class Cnn(nnx.Module):
    """No name tells a normalised kernel from another, and some start at zero."""

    def __init__(self, rngs):
        zeros, ones = nnx.initializers.zeros_init(), nnx.initializers.ones_init()
        self.classifier = nnx.Conv(2, 4, (3, 3), use_bias=False, rngs=rngs)  # ReLU, normalised
        self.norm0 = nnx.BatchNorm(4, rngs=rngs)
        self.b = nnx.Linear(4, 4, rngs=rngs)  # its bias, a ReLU, normalised
        self.norm1 = nnx.BatchNorm(4, rngs=rngs)
        self.a = nnx.Conv(4, 4, (3, 3), rngs=rngs)  # normalised with a scale that starts at zero
        self.norm2 = nnx.BatchNorm(4, scale_init=zeros, bias_init=ones, rngs=rngs)
        self.batchnorm = nnx.Linear(4, 4, rngs=rngs)  # its bias, normalised by layer
        self.norm3 = nnx.LayerNorm(4, rngs=rngs)
        self.filters = nnx.Linear(4, 3, kernel_init=zeros, rngs=rngs)  # not normalised

    def __call__(self, x):
        x = self.norm0(nnx.relu(self.classifier(x)))
        x = self.norm1(nnx.relu(self.b(x)))
        x = nnx.relu(self.norm2(nnx.max_pool(self.a(x), (2, 2), (2, 2))))
        return self.filters(self.norm3(self.batchnorm(jnp.mean(x, (1, 2)))))


IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6, 6, 2)), jnp.float32)
NORMALIZED = {"a": (0, 1, 2), "classifier": (0, 1, 2)}
WITH_BIAS = {"b": (0,), "batchnorm": (0, 1)}  # each kernel and its bias as one, over these axes


def test_normalized_kernels_of_an_nnx_model_train_at_unit_norm():
    model = Cnn(nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(model))
    mask = normalized_kernels_nnx(model, IMAGES)
    assert_close(nnx.state(model), before, atol=0)  # its running statistics too
    params = nnx.state(model, nnx.Param)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    found = {path[0].key for path, chosen in jax.tree.leaves_with_path(mask) if chosen}
    assert found == NORMALIZED.keys() | WITH_BIAS.keys()
    pure = nnx.to_pure_dict(mask)
    assert pure["a"] == {"kernel": True, "bias": False}
    assert pure["classifier"] == {"kernel": True}

    nnx.update(model, normalize_filters(params, mask))
    optimizer = nnx.Optimizer(model, build("un-adam", 0.05, mask), wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.mean((model(IMAGES) - 1) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(6):
        step(model, optimizer)
    for layer in NORMALIZED:
        kernel = getattr(model, layer).kernel[...]
        assert off_unit(kernel) < 1e-6
        assert np.abs(kernel - before[layer]["kernel"][...]).max() > 1e-3
    for layer, axes in WITH_BIAS.items():
        kernel, bias = getattr(model, layer).kernel[...], getattr(model, layer).bias[...]
        squares = jnp.sum(kernel**2, axes), bias**2 if axes == (0,) else jnp.sum(bias**2)
        np.testing.assert_allclose(jnp.sqrt(sum(squares)), 1, atol=1e-6)
    assert np.abs(model.filters.kernel[...]).max() > 1e-3


class Mlp(linen.Module):
    """A residual network of which two kernels are normalised, one is gated and one is unused."""

    @linen.compact
    def __call__(self, x, train=True):
        def norm(y):
            return linen.BatchNorm(use_running_average=not train)(y)

        h = linen.relu(norm(linen.Dense(8, name="first")(x)))
        h = h + norm(linen.Dense(8, name="skipped")(h))
        h = h * self.param("gate", linen.initializers.ones, (1, 8))
        self.param("unused", linen.initializers.ones, (3, 3))
        return linen.Dense(3, name="norm_kernel")(h)


def test_normalized_kernels_of_a_linen_model():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(32, 5)), jnp.float32)
    variables = jax.jit(Mlp().init)(jax.random.key(0), x)

    @functools.partial(jax.jit, static_argnames="train")
    def apply(params, train=True):
        state = {"params": params, "batch_stats": variables["batch_stats"]}
        return Mlp().apply(state, x, train=train, mutable=["batch_stats"])[0]

    mask = normalized_kernels(apply, variables["params"])
    chosen = {path[0].key for path, leaf in jax.tree.leaves_with_path(mask) if leaf}
    assert chosen == {"first", "skipped"}
    moved = train(
        partition(updates.un(0.1), optax.adam(0.1), mask),
        normalize_filters(variables["params"], mask),
        jax.grad(lambda p: jnp.mean((apply(p) - 1) ** 2)),
        3,
    )
    for layer in ("first", "skipped"):
        assert off_unit(moved[layer]["kernel"][-1]) < 1e-6
    with pytest.raises(ValueError, match="training mode"):
        normalized_kernels(lambda p: apply(p, train=False), variables["params"])
    with pytest.raises(ValueError, match="not finite"):
        normalized_kernels(lambda p: apply(p) / 0, variables["params"])


def test_normalized_kernels_over_an_explicit_axis():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(32, 5)), jnp.float32)
    params = {"rows": jnp.ones((8, 5)), "out": jnp.ones((8, 3))}

    def apply(params):
        h = x @ params["rows"].T
        return ((h - h.mean(0)) / h.std(0)) @ params["out"]

    axis = {"rows": 1, "out": None}
    rows = {"rows": updates.FilterAxes((1,)), "out": False}
    assert normalized_kernels(apply, params, axis=axis) == rows
    assert normalized_kernels(apply, params) == {"rows": updates.FilterAxes((1,)), "out": False}
    with pytest.raises(ValueError, match="no kernel"):
        normalized_kernels(apply, params, axis={"rows": 0, "out": 0})


def test_normalize_filters_touches_the_selected_alone():
    params = {**arrays(1, layers=BOTH), "bias": jnp.ones(3)}
    unit = normalize_filters(params, lambda p: {n: n == "dense" for n in p})
    assert off_unit(unit["dense"]) < 1e-6
    assert_close(
        {n: unit[n] for n in ("conv", "bias")}, {n: params[n] for n in ("conv", "bias")}, atol=0
    )
    rows = normalize_filters({"w": params["dense"]}, True, axis=1)["w"]
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


def test_another_update_takes_the_lines_that_the_documentation_shows():
    code = re.search(r"\n\n((?:    .*\n|\n)+)\nAn update takes", inspect.getdoc(updates)).group(1)
    assert len(code.strip().splitlines()) < 15
    namespace = {**vars(updates), "optax": optax}
    function, entry = inspect.cleandoc(code).split("\n\n")
    exec(function, namespace)
    update = eval(entry.strip().rstrip(","), namespace)
    moved = last(train(update.filters(0.01), kernels(), lambda _: arrays(1), 3))
    assert update.constrained
    assert off_unit(moved) < 1e-6
    assert farthest(moved, kernels()) > 1e-2
