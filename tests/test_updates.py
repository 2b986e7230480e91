"""One contract for every update, and each update against its formula in float64 NumPy."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from unitnorm import updates
from unitnorm.updates import UPDATES, build, normalize_filters

every_update = pytest.mark.parametrize("name", UPDATES)
CONSTRAINED = [name for name, update in UPDATES.items() if update.constrained]
# All but these leave a zero filter where it is.
MOVES_DEAD_FILTERS = {
    "b-sgd", "sgd-wd", "sgd-momentum", "b-sgd-median", "sgdp", "adamp", "lars", "adam-srt",
    "renorm-sgd", "adamwn", "muon", "manifold-muon",
}  # fmt: skip
# These move every entry alike, so they need neither axes nor two of them.
WITH_AXIS = [name for name in UPDATES if name not in {"b-sgd", "sgd-wd", "sgd-momentum", "lars"}]
# These go the same way from every scaling of their filters.
INVARIANT = {*CONSTRAINED, "sm"} - {"un-carried"}
ADAMS = {"un-adam", "adamp", "adam-g", "nero", "adam-srt", "hyperball", "ngpt", "adamwn", "muon"}
STATELESS = {"b-sgd", "un", "sm", "normalize", "sgd-wd", "b-sgd-median", "manifold-muon"}

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


def one_update(tx, grads, params):
    return tx.update(grads, tx.init(params), params)[0]


def train_compiled(tx, params, gradient, steps):
    """Parameters after `steps` updates, compiled as one scan."""

    def step(carry, _):
        params, state = carry
        displacement, state = tx.update(gradient(params), state, params)
        return (optax.apply_updates(params, displacement), state), None

    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps)[0][0])(params)


def last(path):
    return jax.tree.map(lambda w: w[-1], path)


def assert_close(actual, expected, rtol=0.0, atol=1e-6):
    close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(close, actual, expected)


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
def test_one_compilation_serves_every_step_and_rate_and_extra_arguments_are_taken(name):
    traces = []

    @jax.jit
    def step(params, state, rate):
        traces.append(name)
        tx = build(name, rate, True)
        displacement, state = tx.update(arrays(1), state, params, value=1.0, more=jnp.ones(3))
        return optax.apply_updates(params, displacement), state

    params, state = kernels(), build(name, 0.1, True).init(kernels())
    for rate in (0.1, 0.2, 0.4):
        params, state = step(params, state, jnp.float32(rate))
    assert len(traces) == 1
    doubling = build(name, lambda count: 0.1 * 2.0**count, True)
    assert_close(params, last(train(doubling, kernels(), lambda _: arrays(1), 3)), rtol=1e-5)


@every_update
def test_a_state_is_empty_where_it_can_be_and_tells_what_is_shaped_like_parameters(name):
    tx = UPDATES[name].filters(0.1)
    state = tx.init(kernels())
    jax.tree.map(
        np.testing.assert_array_equal, optax.tree.map_params(tx, lambda v: v, state), state
    )
    shapes = []
    optax.tree.map_params(tx, lambda v: shapes.append(jnp.shape(v)), state)
    assert set(shapes) <= {LAYERS["conv"], (1, 1, 1, LAYERS["conv"][-1])}
    assert bool(shapes) == bool(jax.tree.leaves(state)) == (name not in STATELESS)
    traced = jax.eval_shape(lambda rate, p: build(name, rate, True).init(p), 0.1, kernels())
    whole = build(name, 0.1, True)
    assert jax.eval_shape(whole.init, kernels()) == traced  # whatever the rate
    assert whole.init(jax.eval_shape(kernels)) == traced  # shapes alone give those of a state


@every_update
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtypes_are_kept_and_stable_under_cond(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        tx = UPDATES[name].filters(0.1)
        params, grads = kernels(dtype=dtype), arrays(1, dtype)

        @jax.jit
        def maybe(go, state):
            return jax.lax.cond(go, lambda: tx.update(grads, state, params), lambda: (grads, state))

        state = tx.init(params)
        displacement, after = maybe(True, state)
        assert dtypes(displacement) == [jnp.dtype(dtype)]
        same = maybe(False, state)[1]
        jax.tree.map(np.testing.assert_array_equal, same, state)
        assert dtypes(after) == dtypes(same) == dtypes(state)
    if dtype == "bfloat16":  # gradients and rates in float32 change neither parameters nor state
        tx = build(name, jnp.float32(0.1), True)
        displacement, after = tx.update(arrays(1), tx.init(params), params)
        assert dtypes(after) == dtypes(tx.init(params))
        moved = optax.apply_updates(params, displacement)
        assert dtypes(moved) == [jnp.dtype(dtype)]
        exact = one_update(UPDATES[name].filters(0.1), arrays(1), kernels())
        exact = optax.apply_updates(kernels(), exact)
        # Rounded as parameters, as a displacement and as their sum, none of them above two.
        room = 10 if name == "manifold-muon" else 3  # its start is not orthonormal
        assert farthest(moved, exact) < room * 2 * float(jnp.finfo(dtype).eps)


@every_update
def test_vmap_over_starts_and_rates_is_a_loop(name):
    def stack(trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    starts, grads = [kernels(s) for s in range(3)], [arrays(s) for s in (7, 8, 9)]

    def two_steps(params, grads, rate):
        return last(train(build(name, rate, True), params, lambda _: grads, 2))

    rates = jnp.array([0.05, 0.1, 0.2])
    together = jax.jit(jax.vmap(two_steps))(stack(starts), stack(grads), rates)
    single = jax.jit(two_steps)
    assert_close(together, stack(list(map(single, starts, grads, rates))), rtol=1e-5)


@every_update
def test_inject_hyperparams(name):
    injected = optax.inject_hyperparams(UPDATES[name].filters)(learning_rate=0.1)
    state = injected.init(kernels())
    for rate in (0.1, 0.3):
        state.hyperparams["learning_rate"] = jnp.float32(rate)
        displacement, after = injected.update(arrays(1), state, kernels())
        alone = UPDATES[name].filters(rate)
        expected, inner = alone.update(arrays(1), alone.init(kernels()), kernels())
        assert_close(after.inner_state, inner, atol=1e-5)
        # A decay of 0.999 in float32 is 0.001 to four digits.
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
def test_partition_sends_filters_and_the_rest_to_their_own(name):
    """Each after its own clipping, and filters at a learning rate of their own."""
    rest = {"theta": arrays(3)["conv"], "shift": jnp.ones(4)}
    params = {"layer": kernels(), **rest}
    grads = {"layer": arrays(1), "theta": arrays(4)["conv"], "shift": jnp.full(4, 2.0)}
    tx = build(name, 0.1, {key: key == "layer" for key in params}, filters_learning_rate=0.02)
    together = train(optax.chain(optax.clip(0.5), tx), params, lambda _: grads, 2)
    clipped = jax.tree.map(lambda g: jnp.clip(g, -0.5, 0.5), grads)
    filters = train(UPDATES[name].filters(0.02), kernels(), lambda _: clipped["layer"], 2)
    others = train(UPDATES[name].rest(0.1), rest, lambda _: {k: clipped[k] for k in rest}, 2)
    assert_close(together, {"layer": filters, **others})


def by_size(least, params):
    return jax.tree.map(lambda w: w.ndim >= least, params)


@pytest.mark.parametrize(
    "selection",
    [
        {"conv": "filters", "dense": "rest"},
        {"conv": True, "dense": None},
        functools.partial(by_size, 3),
        jax.tree_util.Partial(by_size, 3),
    ],
    ids=["labels", "mask", "function", "pytree"],
)
def test_a_selection_has_several_forms(selection):
    params = arrays(0, layers=BOTH)
    moved = last(train(build("un", 0.1, selection), params, lambda _: arrays(1, layers=BOTH), 1))
    unit = normalize_filters(params, selection)
    for tree in (moved, unit):
        assert off_unit(tree["conv"]) < 1e-6
    assert_close(unit["dense"], params["dense"], atol=0)
    rows = normalize_filters({"w": params["dense"]}, True, axis=1)["w"]
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


@every_update
def test_converges_on_a_scale_invariant_function(name):
    start, target = kernels()["conv"], kernels(5)["conv"]
    if name == "manifold-muon":  # what it can reach
        target = jnp.linalg.qr(target.reshape(18, 4))[0].reshape(start.shape)
    rate = {"lars": 0.01, "rotational-sgd": 1.0}.get(name, 0.1)
    tx = UPDATES[name].filters(optax.cosine_decay_schedule(rate, 300))
    end = train_compiled(tx, start, jax.grad(lambda w: invariant_loss(w, target)), 300)
    np.testing.assert_allclose(end / norms(end), target, atol=2e-3)


@every_update
def test_on_the_manifold_after_1000_steps_if_and_only_if_constrained(name):
    random = np.random.default_rng(0)
    start, target = (jnp.asarray(w, jnp.float32) for w in random.normal(size=(2, 28, 28, 8)))
    start, target = start / norms(start), 2 * target / norms(target)
    steps = 50 if name == "manifold-muon" else 1000
    # The gradient is not tangent, as large as the filters, and changes all along.
    end = train_compiled(
        UPDATES[name].filters(0.01), start, lambda w: w - target + jnp.sin(40 * w) / 2, steps
    )
    assert farthest(end, start) > 0.05
    if name == "manifold-muon":
        matrix = np.asarray(end, float).reshape(-1, 8)
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(8), atol=1e-5)
    else:
        bound = 1e-3 if name == "renorm-sgd" else 1e-2  # one step of 0.01 from unit norm
        assert off_unit(end) < 1e-6 if UPDATES[name].constrained else off_unit(end) > bound


@every_update
def test_dead_filters_and_zero_gradients_give_no_nan(name):
    dead = jax.tree.map(lambda w: w.at[..., 1].set(0), kernels())
    for grads in (arrays(1), jax.tree.map(jnp.zeros_like, dead)):
        path = train(UPDATES[name].filters(0.1), dead, lambda _, g=grads: g, 3)
        for w, g in zip(jax.tree.leaves(path), jax.tree.leaves(grads), strict=True):
            assert np.all(np.isfinite(w))
            stays = name not in MOVES_DEAD_FILTERS or not np.any(g)
            assert np.all(np.abs(w[..., 1]) < 1e-6) == stays
    if name not in {"sgd-wd", "sgd-momentum", "manifold-muon"}:
        assert_close(path, jax.tree.map(lambda w: jnp.stack([w] * 3), dead), atol=2e-7)


@every_update
def test_a_gradient_of_none_moves_nothing_and_counts_as_zero(name):
    params = {"frozen": kernels(3)["conv"], "layer": kernels()["conv"]}
    grads = {"frozen": None, "layer": arrays(1)["conv"]}
    zeros = {"frozen": jnp.zeros_like(params["frozen"]), "layer": grads["layer"]}
    tx = UPDATES[name].filters(0.1)
    start = tx.init(params)
    found, state = tx.update(grads, start, params)
    expected, after = tx.update(zeros, start, params)
    assert found["frozen"] is None
    assert_close(found["layer"], expected["layer"])
    assert_close(state, after)


@pytest.mark.parametrize("axis", [0, -1])  # entries of filters on several devices, or filters
@pytest.mark.parametrize("name", [n for n in UPDATES if "muon" not in n])  # optax's reshapes
def test_on_a_mesh_with_explicit_axes_it_moves_as_on_one_device(name, axis):
    random = np.random.default_rng(0)
    w, g = random.normal(size=(2, 64, 128)).astype("f4")
    w /= np.linalg.norm(w, axis=axis, keepdims=True)
    expected = last(train(UPDATES[name].filters(0.1, axis=axis), jnp.asarray(w), lambda _: g, 2))
    mesh = jax.make_mesh((2,), ("x",), (AxisType.Explicit,))
    with jax.set_mesh(mesh):
        w, g = (jax.device_put(a, NamedSharding(mesh, PartitionSpec("x"))) for a in (w, g))
        tx = UPDATES[name].filters(0.1, axis=axis)
        found = jax.jit(lambda w: last(train(tx, w, lambda _: g, 2)))(w)
        assert jax.typeof(found).sharding.spec == jax.typeof(w).sharding.spec
    np.testing.assert_allclose(found, expected, atol=2e-6)
    if UPDATES[name].constrained:
        lengths = np.linalg.norm(np.asarray(found, float), axis=axis)
        np.testing.assert_allclose(lengths, 1, atol=1e-6)


@pytest.mark.parametrize("axis", [-1, {"a": (1,), "b": 0}, lambda path: {"a": 1, "b": -1}[path]])
def test_axes_have_several_forms(axis):
    params = {"a": kernels(layers=BOTH)["dense"].T, "b": jnp.array([0.6, 0.8])}
    grads = jax.tree.map(jnp.ones_like, params)
    moved = last(train(updates.un(0.1, axis=axis), params, lambda _: grads, 1))
    np.testing.assert_allclose(np.linalg.norm(moved["a"], axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(moved["b"]), 1, atol=1e-6)


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
    assert gap < 1e-5 if name in INVARIANT else gap > 1e-3


@pytest.mark.parametrize("name", CONSTRAINED)
def test_filters_may_keep_the_norms_that_they_start_with(name):
    off = scaled(kernels())
    tx = UPDATES[name].filters(0.1, off_manifold="keep")
    end = last(train(tx, off, lambda _: arrays(1), 5))
    np.testing.assert_allclose(norms(end["conv"]), norms(off["conv"]), rtol=1e-6)
    unit = last(train(UPDATES[name].filters(0.1), off, lambda _: arrays(1), 1))
    once = last(train(tx, off, lambda _: arrays(1), 1))
    assert_close(jax.tree.map(lambda w: w / norms(w), once), unit, atol=1e-4)


@pytest.mark.parametrize("name", CONSTRAINED)
def test_filters_off_the_manifold_are_normalised_or_refused(name):
    off = scaled(kernels())
    moved = optax.apply_updates(off, one_update(UPDATES[name].filters(0.1), arrays(1), off))
    # Rounding is that of the start, a hundred times the manifold's.
    assert off_unit(moved) < 1e-4
    moved = optax.apply_updates(moved, one_update(UPDATES[name].filters(0.1), arrays(1), moved))
    assert off_unit(moved) < 1e-6

    strict = UPDATES[name].filters(0.1, off_manifold="raise")
    strict.init(kernels(dtype=jnp.bfloat16))
    strict.init(jax.tree.map(lambda w: w.at[..., 0].set(0), kernels()))
    with pytest.raises(ValueError, match=r"conv of shape \(3, 3, 2, 4\).*norm 100"):
        strict.init(off)
    with pytest.raises(ValueError, match=r"conv.* norm nan"):
        strict.init(jax.tree.map(lambda w: w.at[0, 0, 0, 0].set(jnp.nan), kernels()))
    with pytest.raises(ValueError, match="raise, trust, keep; got 'warn'"):
        UPDATES[name].filters(0.1, off_manifold="warn")
    trusting = one_update(UPDATES[name].filters(0.1, off_manifold="trust"), arrays(1), kernels())
    assert_close(trusting, one_update(UPDATES[name].filters(0.1), arrays(1), kernels()))


# --- Errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_AXIS)
def test_what_cannot_be_moved_is_refused_before_training(name):
    tx = UPDATES[name].filters(0.1)
    for bad in (jnp.ones(64), jnp.ones(())):
        with pytest.raises(ValueError, match=r"bn/scale of shape \((64,)?\).*optax.partition"):
            tx.init({"bn": {"scale": bad}})
    with pytest.raises(ValueError, match="layer/kernel is complex64"):
        tx.init({"layer": {"kernel": jnp.ones((3, 2), jnp.complex64)}})
    with pytest.raises(ValueError, match=r"update\(grads, state, params\)"):
        tx.update(arrays(1), tx.init(kernels()))
    for size in (1e-25, 1e25):
        params = {"conv": kernels()["conv"].at[..., 1].multiply(size)}
        assert_close(normalize_filters(params, True), kernels())
        if name != "muon":  # which looks at no norm
            with pytest.raises(ValueError, match=r"conv of shape .*norm 1e.25.*normalize_filters"):
                tx.init(params)


def test_an_injected_axis_is_refused_with_the_remedy():
    injected = optax.inject_hyperparams(updates.un)(0.1, axis=0)
    with pytest.raises(ValueError, match="static_args"):
        jax.jit(injected.init)(kernels())
    static = optax.inject_hyperparams(updates.un, static_args=("axis",))(0.1, axis=0)
    static.init(kernels())


@pytest.mark.parametrize(
    ("tx", "complaint"),
    [
        (build("un", 0.1, {"conv": True}), "selection of filters does not fit"),
        (build("un", 0.1, {"conv": True, "dense": "kernel"}), "got 'kernel'"),
        (updates.un(0.1, axis={"conv": 0}), "axis does not fit"),
    ],
)
def test_selections_and_axes_that_do_not_fit_are_refused(tx, complaint):
    with pytest.raises(ValueError, match=complaint):
        tx.init(kernels(layers=BOTH))


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


def test_a_compiled_training_may_close_over_its_start():
    params, tx = kernels(), updates.un(0.1)

    def step(grads):
        return tx.update(grads, tx.init(params), params)[0]

    assert_close(jax.jit(step)(arrays(1)), step(arrays(1)))
    tiny = jax.tree.map(lambda w: 1e-30 * w, params)
    with pytest.raises(ValueError, match="out of the range of float32"):
        jax.jit(lambda rate: updates.un(rate).init(tiny))(0.1)
    with pytest.raises(ValueError, match="look outside jit"):
        jax.jit(lambda rate: updates.un(rate, off_manifold="raise").init(params))(0.1)
