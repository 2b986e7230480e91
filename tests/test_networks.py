"""Kernels found in networks of Flax, and trained at unit norm beside all other parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from tests.test_updates import assert_close, off_unit, train
from unitnorm import updates
from unitnorm.updates import (
    build,
    normalize_filters,
    normalized_kernels,
    normalized_kernels_nnx,
    partition,
)


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
