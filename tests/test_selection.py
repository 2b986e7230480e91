"""Selections on other people's trees: Equinox, Linen, NNX, plain dictionaries."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from unitnorm import updates
from unitnorm.updates import FilterAxes, axes_of_selection, build, examine_kernels

X = jnp.asarray(np.random.default_rng(0).normal(size=(32, 5)), jnp.float32)
PICTURES = jnp.asarray(np.random.default_rng(1).normal(size=(16, 3, 6, 6)), jnp.float32)


def normalised(h, axis=0):
    return (h - h.mean(axis, keepdims=True)) / h.std(axis, keepdims=True)


def random(*shape):
    return jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)


def chosen(selection):
    """Path to what the selection says, for the leaves that it selects."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree.leaves_with_path(selection)
        if leaf
    }


def norms_over(w, axes):
    return np.sqrt((np.asarray(w, float) ** 2).sum(axes))


def one_step(params, selection):
    tx = build("un", 0.1, selection)
    grads = jax.tree.map(jnp.ones_like, params)
    moved, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    return optax.apply_updates(params, moved)


def conv(x, kernel):
    return jax.lax.conv(x, kernel, (1, 1), "SAME")


def test_filters_that_come_first_are_found_and_trained_so():
    params = {"conv": random(4, 3, 3, 3), "bias": jnp.zeros(4), "out": random(4, 2)}

    def apply(p):
        h = conv(PICTURES, p["conv"]) + p["bias"][:, None, None]
        return normalised(h, (0, 2, 3)).clip(0).mean((2, 3)) @ p["out"]

    report = examine_kernels(apply, params)
    assert report.selection == {"conv": FilterAxes((1, 2, 3)), "bias": False, "out": False}
    assert axes_of_selection(report.selection) == {"conv": (1, 2, 3), "bias": None, "out": None}
    new = one_step(params, report.selection)
    np.testing.assert_allclose(norms_over(new["conv"], (1, 2, 3)), 1, atol=1e-6)
    assert np.abs(norms_over(new["out"], 0) - 1).max() > 0.1
    # named by hand, the bias and all that cannot hold such filters are passed over
    by_hand = examine_kernels(apply, params, axis=(1, 2, 3))
    assert by_hand.selection == report.selection
    reasons = {found.name: found.reason for found in by_hand.findings}
    assert reasons["conv"] == "normalised"
    assert "axis=(1, 2, 3)" in reasons["bias"]
    lines = str(report).splitlines()
    assert len(lines) == 1 + len(params)
    assert [line.split()[0] for line in lines] == ["leaf", "bias", "conv", "out"]
    assert "(1, 2, 3)" in lines[2]


def test_a_kernel_that_is_normalised_in_part_is_left_out_with_a_warning():
    params = {"whole": random(5, 8), "part": random(5, 8)}

    def apply(p):
        h = X @ p["part"]
        free = h.at[:, :-1].set(normalised(h)[:, :-1])
        return jnp.concatenate([100 * normalised(X @ p["whole"]), free.at[:, -1].mul(0.02)], 1)

    with pytest.warns(UserWarning, match="part.*examine_kernels"):
        report = examine_kernels(apply, params)
    assert report.selection == {"whole": True, "part": False}


def test_new_statistics_beside_the_output_are_no_output():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.relu(linen.BatchNorm(use_running_average=False)(linen.Dense(8)(x)))
            return linen.Dense(3)(x)

    variables = Net().init(jax.random.key(0), X)
    stats = variables["batch_stats"]

    @jax.jit
    def apply(params):
        return Net().apply({"params": params, "batch_stats": stats}, X, mutable=["batch_stats"])

    assert list(chosen(updates.normalized_kernels(apply, variables["params"]))) == [
        "['Dense_0']['kernel']"
    ]


def test_a_stack_of_layers_has_filters_in_each_layer():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(5, 5, rngs=rngs)
            self.norm = nnx.BatchNorm(5, rngs=rngs)

        def __call__(self, x):
            return nnx.relu(self.norm(self.linear(x)))

    class Stack(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def layers(rngs):
                return Block(rngs)

            self.layers = layers(rngs)
            self.out = nnx.Linear(5, 2, rngs=rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def run(x, layer):
                return layer(x)

            return self.out(run(x, self.layers))

    model = Stack(nnx.Rngs(0))
    selection = updates.normalized_kernels_nnx(model, X)
    (found,) = chosen(selection).items()
    assert "linear" in found[0]
    assert found[1] == FilterAxes((1,))
    params = nnx.state(model, nnx.Param)
    new = one_step(jax.tree.map(jnp.asarray, nnx.to_pure_dict(params)), nnx.to_pure_dict(selection))
    np.testing.assert_allclose(norms_over(new["layers"]["linear"]["kernel"], 1), 1, atol=1e-6)
    unit = updates.normalize_filters(params, selection)
    np.testing.assert_allclose(norms_over(unit["layers"]["linear"]["kernel"][...], 1), 1, atol=1e-6)


def test_an_equinox_module_selects_though_it_can_be_called():
    eqx = pytest.importorskip("equinox", reason="needs equinox: pip install unitnorm[dev]")

    class Net(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.BatchNorm
        out: eqx.nn.Linear

        def __init__(self, key):
            one, two = jax.random.split(key)
            self.conv = eqx.nn.Conv2d(3, 4, 3, key=one)
            self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")
            self.out = eqx.nn.Linear(4, 2, key=two)

        def __call__(self, x, state):
            h, state = self.norm(self.conv(x), state)
            return self.out(jax.nn.relu(h).mean((1, 2))), state

    net, state = eqx.nn.make_with_state(Net)(jax.random.key(0))
    params, static = eqx.partition(net, eqx.is_inexact_array)

    @jax.jit
    def apply(params):
        net = eqx.combine(params, static)
        return jax.vmap(net, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
            PICTURES, state
        )

    selection = updates.normalized_kernels(apply, params)
    assert callable(selection)
    assert chosen(selection) == {".conv.weight": FilterAxes((1, 2, 3))}
    new = one_step(params, selection)
    np.testing.assert_allclose(norms_over(new.conv.weight, (1, 2, 3)), 1, atol=1e-6)


def test_a_partial_is_a_function():
    def by_size(least, params):
        return jax.tree.map(lambda w: w.ndim >= least, params)

    params = {"kernel": random(5, 3), "bias": jnp.ones(3)}
    for selection in (functools.partial(by_size, 2), jax.tree_util.Partial(by_size, 2)):
        new = one_step(params, selection)
        np.testing.assert_allclose(norms_over(new["kernel"], 0), 1, atol=1e-6)
        np.testing.assert_allclose(new["bias"], 0.9, atol=1e-6)


def test_shared_factors_alone_make_no_filters():
    """Layer normalisation bears one factor for a whole kernel, even on an axis of length one."""
    params = {"layer": random(5, 4), "thin": random(1, 4), "good": random(5, 4)}

    def apply(p):
        thin = normalised(X[:, :1] @ p["thin"], 1)
        return jnp.concatenate(
            [normalised(X @ p["layer"], 1), normalised(X @ p["good"]), thin + X[:, :4]], 1
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert updates.normalized_kernels(apply, params) == {
            "layer": False,
            "thin": False,
            "good": True,
        }
