"""ArchBN against float64 NumPy: shapes, initial point, forward pass, symmetry, statistics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import reference
from unitnorm.archbn.config import Config
from unitnorm.archbn.minibatch import cross_entropy
from unitnorm.archbn.model import ArchBN, archbn, filter_mask, max_pool_pairs


def as_numpy(params):
    layers = [
        tuple(
            np.asarray(a, np.float64)
            for a in (p["rows"]["W"], p["norm"]["scale"], p["norm"]["bias"])
        )
        for _, p in sorted(params["layers"].items())
    ]
    return layers, np.asarray(params["theta"]["W"], np.float64)


@pytest.fixture(scope="module")
def network():
    return archbn(Config().model, 784, 10, 2)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (50, 784)) * (rng.random((50, 784)) < 0.3)
    return x.astype(np.float32), rng.integers(0, 10, 50)


def test_the_papers_shapes_and_no_biases(network):
    params, stats = network.init(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == {
        "layers": {
            0: {"norm": {"bias": (64,), "scale": (64,)}, "rows": {"W": (64, 784)}},
            1: {"norm": {"bias": (64,), "scale": (64,)}, "rows": {"W": (64, 32)}},
        },
        "theta": {"W": (10, 32)},
    }
    assert stats["layers"][1]["norm"]["mean"].shape == (64,)


@pytest.mark.parametrize("depth", [1, 4])
def test_initial_rows_are_gaussian_directions_of_unit_norm(depth):
    params, _ = archbn(Config().model, 784, 10, depth).init(jax.random.key(3))
    layers, theta = as_numpy(params)
    assert len(layers) == depth
    for rows in [W for W, *_ in layers] + [theta]:
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
        # a Gaussian direction's entries have variance 1/n and its fourth moment
        scaled = rows * np.sqrt(rows.shape[1])
        assert abs(scaled.mean()) < 0.2
        assert abs((scaled**4).mean() - 3) < 0.9
    gram = layers[0][0] @ layers[0][0].T - np.eye(64)
    assert np.abs(gram).max() < 0.2


def test_forward_pass_and_loss(network, batch):
    x, y = batch
    params, stats = network.init(jax.random.key(1))
    logits, _ = network.apply(params, stats, x, True)
    loss, expected, _ = reference.forward(*as_numpy(params), x.astype(np.float64), y, 1e-5)
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    assert float(cross_entropy(logits, y).sum()) == pytest.approx(loss, rel=1e-5)


def test_gradient(network, batch):
    x, y = batch
    params, stats = network.init(jax.random.key(1))
    found, found_theta = as_numpy(
        jax.grad(lambda p: cross_entropy(network.apply(p, stats, x, True)[0], y).sum())(params)
    )
    expected, theta = reference.gradients(*as_numpy(params), x.astype(np.float64), y, 1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(b).max())
    np.testing.assert_allclose(found_theta, theta, atol=1e-4 * np.abs(theta).max())


def test_loss_unchanged_under_positive_scaling_of_filters(network, batch):
    x, y = batch
    params, stats = network.init(jax.random.key(1))
    alpha = jnp.exp(jax.random.normal(jax.random.key(2), (2, 64, 1)))
    mask = filter_mask(params)

    def loss(change):
        moved = jax.tree.map(lambda w, m: change(w) if m else w, params, mask)
        return float(cross_entropy(network.apply(moved, stats, x, True)[0], y).sum())

    before = loss(lambda w: w)
    factors = iter(alpha)
    assert loss(lambda w: next(factors) * w) == pytest.approx(before, rel=1e-4)
    assert loss(lambda w: -w) != pytest.approx(before, rel=1e-2)  # a negative factor is no symmetry
    assert loss(lambda w: w.at[:, 0].add(1.0)) != pytest.approx(before, rel=1e-2)


def test_running_statistics_follow_the_batches_and_serve_at_test_time(batch):
    x, _ = batch
    model = ArchBN(784, 1, 8, bn_momentum=0.75, rngs=nnx.Rngs(0))
    h = np.asarray(x, np.float64) @ np.asarray(model.layers[0].rows.W[...], np.float64).T
    model(x, train=True)
    norm = model.layers[0].norm
    np.testing.assert_allclose(norm.mean[...], 0.25 * h.mean(0), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(norm.var[...], 0.75 + 0.25 * h.var(0), rtol=1e-4)
    before = np.asarray(norm.mean[...])
    one, both = model(x[:1]), model(x)
    np.testing.assert_allclose(one[0], both[0], atol=1e-5)  # no other image has a say
    np.testing.assert_array_equal(norm.mean[...], before)


@pytest.mark.parametrize("pairs", ["adjacent", "halves"])
def test_pooling_and_its_gradient(pairs):
    h = jax.random.normal(jax.random.key(0), (5, 8))
    left, right = (h[:, 0::2], h[:, 1::2]) if pairs == "adjacent" else (h[:, :4], h[:, 4:])
    np.testing.assert_array_equal(max_pool_pairs(h, pairs), np.maximum(left, right))
    weights = jnp.arange(20.0).reshape(5, 4) + 1
    found = jax.grad(lambda h: (max_pool_pairs(h, pairs) * weights).sum())(h)
    expected = np.zeros((5, 8))
    for i in range(5):
        for j in range(4):
            a, b = (2 * j, 2 * j + 1) if pairs == "adjacent" else (j, j + 4)
            expected[i, a if h[i, a] >= h[i, b] else b] = weights[i, j]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("depth", "width"), [(0, 64), (2, 63), (2, 0)])
def test_impossible_networks_are_refused(depth, width):
    with pytest.raises(ValueError, match="need depth"):
        ArchBN(784, depth, width, rngs=nnx.Rngs(0))
