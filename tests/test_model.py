"""ArchBN against float64 NumPy: shapes, start, forward pass, symmetries, statistics; and what is
measured of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import reference
from unitnorm.archbn import evaluation, model
from unitnorm.archbn.config import Model
from unitnorm.archbn.model import START, ArchBN, archbn, max_pool_pairs

pytestmark = pytest.mark.usefixtures("hurried")
NETWORK = archbn(Model(), 784, 10, 2)
RNG = np.random.default_rng(0)
X = (RNG.integers(0, 256, (50, 784)) * (RNG.random((50, 784)) < 0.3)).astype(np.float32)
Y = RNG.integers(0, 10, 50)


def as_numpy(params):
    """[(W, scale, shift), …] and θ, float64."""
    layers = [
        tuple(np.asarray(a, float) for a in (p["rows"]["W"], p["norm"]["scale"], p["norm"]["bias"]))
        for _, p in sorted(params["layers"].items())
    ]
    return layers, np.asarray(params["theta"]["W"], float)


@pytest.fixture(scope="module")
def start():
    return NETWORK.init(jax.random.key(1))


@pytest.fixture(scope="module")
def loss(start):
    """The summed cross-entropy of the mini-batch, of parameters."""
    apply = NETWORK.apply
    return jax.jit(lambda p: evaluation.cross_entropy(apply(p, start[1], X, True)[0], Y).sum())


def test_the_papers_shapes_and_no_biases(start):
    assert jax.tree.map(jnp.shape, start[0]) == {
        "layers": {
            0: {"norm": {"bias": (64,), "scale": (64,)}, "rows": {"W": (64, 784)}},
            1: {"norm": {"bias": (64,), "scale": (64,)}, "rows": {"W": (64, 32)}},
        },
        "theta": {"W": (10, 32)},
    }
    assert start[1]["layers"][1]["norm"]["mean"].shape == (64,)
    with pytest.raises(ValueError, match="need depth"):
        ArchBN(784, 0, rngs=nnx.Rngs(0))


def test_initial_rows_are_gaussian_directions_of_unit_norm(start):
    layers, theta = as_numpy(start[0])
    for rows in [W for W, *_ in layers] + [theta]:
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
        # a Gaussian direction's entries have variance 1/n and its fourth moment
        scaled = rows * np.sqrt(rows.shape[1])
        assert abs(scaled.mean()) < 0.2
        assert abs((scaled**4).mean() - 3) < 0.9
    assert np.abs(layers[0][0] @ layers[0][0].T - np.eye(64)).max() < 0.2


def test_forward_pass_loss_and_gradient(start, loss):
    known, x = as_numpy(start[0]), X.astype(float)
    total, expected, _ = reference.forward(*known, x, Y, 1e-5)
    np.testing.assert_allclose(NETWORK.apply(*start, X, True)[0], expected, atol=2e-5)
    assert float(loss(start[0])) == pytest.approx(total, rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(b).max()),
        as_numpy(jax.grad(loss)(start[0])), reference.gradients(*known, x, Y, 1e-5),
    )  # fmt: skip


@pytest.mark.parametrize("kind", START)
def test_an_unbalanced_start_computes_the_same_from_other_norms(kind, start, loss):
    params, _ = start
    before = float(loss(params))
    moved = model.unbalance(params, 1.5 * (np.asarray(START) == kind), jax.random.key(3))
    assert float(loss(moved)) == pytest.approx(before, rel=1e-4)
    negative = NETWORK.with_filters(moved, lambda w: -w)
    assert float(loss(negative)) != pytest.approx(before, rel=1e-2)  # a sign is no symmetry
    norms = np.concatenate([np.linalg.norm(w, axis=1) for w in NETWORK.filters(moved)])
    scales = np.concatenate([scale for _, scale, _ in as_numpy(moved)[0]])
    if kind == "norms":
        np.testing.assert_allclose(norms, 10**1.5, rtol=1e-5)
    elif kind == "filters":
        assert norms.min() < 0.3 < 3 < norms.max()
    else:
        assert scales.min() < 0.3 < 3 < scales.max()
        np.testing.assert_array_equal(scales[0::2], scales[1::2])


@pytest.mark.parametrize("update", ["un", "b-sgd"])
def test_the_size_of_a_step_is_that_of_float64(update, start):
    """By layer: λ for UN, λ/‖w‖² for gradient descent; and the angles that filters turn by."""
    rng, rate, rates, angles, steps = np.random.default_rng(0), 1e-4, [], [], []
    scale = np.exp(rng.standard_normal((64, 1)) / 4) if update == "b-sgd" else 1.0
    before = NETWORK.with_filters(start[0], lambda w: jnp.float32(scale) * w)
    for w in NETWORK.filters(before):
        w, g = np.asarray(w, float), rng.standard_normal(w.shape)
        norms = np.linalg.norm(w, axis=1, keepdims=True)
        g -= np.sum(g * w, 1, keepdims=True) * w / norms**2  # as of a loss that no scale changes
        after = reference.un_step(w, g, rate) if update == "un" else w - rate * g
        # the Riemannian gradient at w/‖w‖ is ‖w‖ g, by whose square each filter counts
        rates.append(np.average(rate / norms**2, weights=((norms * g) ** 2).sum(1, keepdims=True)))
        cosine = np.sum(w / norms * after / np.linalg.norm(after, axis=1, keepdims=True), 1)
        angles.append(np.arccos(cosine).mean())
        steps.append((np.float32(g), np.float32(after)))
    gradient, moved = (
        NETWORK.with_filters(before, lambda w, mine=mine: next(mine))
        for mine in map(iter, zip(*steps, strict=True))
    )
    found = evaluation.measure_step(NETWORK, before, gradient, moved)
    np.testing.assert_allclose(found, (rates, angles), rtol=1e-3)


def test_running_statistics_follow_the_batches_and_serve_at_test_time():
    network = ArchBN(784, 1, settings=Model(width=8, bn_momentum=0.75), rngs=nnx.Rngs(0))
    h = np.asarray(X, np.float64) @ np.asarray(network.layers[0].rows.W[...], np.float64).T
    network(X, train=True)
    norm = network.layers[0].norm
    np.testing.assert_allclose(norm.mean[...], 0.25 * h.mean(0), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(norm.var[...], 0.75 + 0.25 * h.var(0), rtol=1e-4)
    before = np.asarray(norm.mean[...])
    np.testing.assert_allclose(network(X[:1])[0], network(X)[0], atol=1e-5)  # no other has a say
    np.testing.assert_array_equal(norm.mean[...], before)


@pytest.mark.parametrize("pairs", ["adjacent", "halves"])
def test_pooling_and_its_gradient(pairs):
    h = jax.random.normal(jax.random.key(0), (5, 8))
    left, right = (h[:, 0::2], h[:, 1::2]) if pairs == "adjacent" else (h[:, :4], h[:, 4:])
    np.testing.assert_array_equal(max_pool_pairs(h, pairs), np.maximum(left, right))
    weights = jnp.arange(20.0).reshape(5, 4) + 1
    found = jax.grad(lambda h: (max_pool_pairs(h, pairs) * weights).sum())(h)
    first = np.asarray(left >= right)
    expected = np.stack([weights * first, weights * ~first], -1 if pairs == "adjacent" else 1)
    np.testing.assert_array_equal(found, expected.reshape(5, 8))
