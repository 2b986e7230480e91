"""Small networks of every kind, from layers that others wrote, with what can be scaled in each.

Each function gives (apply, parameters, expected). `expected` says of every selected leaf over which
axes a block runs, of which view if an axis is split, and what it is joint with.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from unitnorm.updates import FilterAxes

NEEDS_DEV = "needs what is in unitnorm[dev]"
CONV, WHOLE = FilterAxes((0, 1, 2)), FilterAxes((0, 1))
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8, 8, 3)), jnp.float32)
WORDS = jnp.asarray(np.random.default_rng(0).integers(0, 7, (4, 6)))


def joint(layer, kernel, bias, names=("kernel", "bias")):
    """A kernel and its bias, which share their factors."""
    name = f"{layer}/{names[0]}"
    return {
        name: FilterAxes(kernel.axes, kernel.view, name),
        f"{layer}/{names[1]}": FilterAxes(bias.axes, bias.view, name),
    }


def of_linen(net: Any, *inputs: Any, **options: Any) -> tuple[Any, Any]:
    variables = dict(jax.jit(functools.partial(net.init, **options))(jax.random.key(0), *inputs))
    params = variables.pop("params")

    @jax.jit
    def apply(params):
        return net.apply({"params": params, **variables}, *inputs, **options, mutable=[*variables])

    return apply, params


def of_nnx(model: Any, *inputs: Any) -> tuple[Any, Any]:
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return jax.jit(lambda p: nnx.merge(graphdef, p, rest, copy=True)(*inputs)), params


def of_haiku(forward: Any, *inputs: Any) -> tuple[Any, Any]:
    """Of a function of Haiku itself and the inputs."""
    hk = pytest.importorskip("haiku", reason=NEEDS_DEV)
    net = hk.without_apply_rng(hk.transform_with_state(functools.partial(forward, hk)))
    params, state = jax.jit(net.init)(jax.random.key(0), *inputs)
    return jax.jit(lambda params: net.apply(params, state, *inputs)), params


def jax_resnet():
    jax_resnet = pytest.importorskip("jax_resnet", reason=NEEDS_DEV)

    net = jax_resnet.ResNet50(stage_sizes=[1, 1], hidden_sizes=(2, 4), n_classes=10)
    names = ["layers_0/ConvBlock_0/Conv_0/kernel"]
    for block in ("layers_2", "layers_3"):
        names += [f"{block}/ConvBlock_{i}/Conv_0/kernel" for i in range(3)]
        names.append(f"{block}/ResNetSkipConnection_0/ConvBlock_0/Conv_0/kernel")
    return *of_linen(net, jnp.tile(IMAGES, (2, 2, 2, 1))), dict.fromkeys(names, CONV)


def haiku_mobilenet():
    """Depthwise kernels (3, 3, 1, channels) and pointwise ones, each before a normalisation."""

    def forward(hk, images):
        net = hk.nets.MobileNetV1((1, 2), (4, 6), 5)
        return net(images, is_training=True)

    apply, params = of_haiku(forward, jnp.tile(IMAGES, (2, 2, 2, 1)))
    kernels = [n for n, layer in params.items() if "w" in layer and layer["w"].ndim == 4]
    return apply, params, {f"{name}/w": CONV for name in kernels}


def nnx_transformer():
    """QK-norm with biases: each head's kernel and bias together, as nnx gives it."""

    class Transformer(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(7, 8, rngs=rngs)
            self.norm = nnx.RMSNorm(8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(
                2, 8, normalize_qk=True, decode=False, rngs=rngs
            )
            self.out = nnx.Linear(8, 7, rngs=rngs)

        def __call__(self, words):
            x = self.embed(words)
            return self.out(x + self.attention(self.norm(x)))

    expected = {}
    for name in ("query", "key"):
        expected |= joint(f"attention/{name}", FilterAxes((0, 2)), FilterAxes((1,)))
    return *of_nnx(Transformer(nnx.Rngs(0)), WORDS), expected


def linen_transformer():
    """QK-norm without biases, in two layers by linen.scan."""

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            h = linen.LayerNorm()(x)
            x = x + linen.MultiHeadDotProductAttention(2, use_bias=False, normalize_qk=True)(h)
            return x + linen.Dense(8)(linen.gelu(linen.Dense(12)(linen.LayerNorm()(x)))), None

    class Transformer(linen.Module):
        @linen.compact
        def __call__(self, words):
            x = linen.Embed(7, 8)(words)
            layers = linen.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            return linen.Dense(7)(layers(name="layers")(x, None)[0])

    attention = "layers/MultiHeadDotProductAttention_0"
    expected = {f"{attention}/{n}/kernel": FilterAxes((1, 3)) for n in ("query", "key")}
    return *of_linen(Transformer(), WORDS), expected


def equinox_transformer():
    """Post-norm, as in Vaswani et al. (2017): a block ends in LayerNorm of a sum."""
    eqx = pytest.importorskip("equinox", reason=NEEDS_DEV)

    class Block(eqx.Module):
        attention: eqx.nn.MultiheadAttention
        norm1: eqx.nn.LayerNorm
        up: eqx.nn.Linear
        norm2: eqx.nn.LayerNorm
        down: eqx.nn.Linear
        out: eqx.nn.Linear
        embed: eqx.nn.Embedding

        def __init__(self, key):
            keys = jax.random.split(key, 5)
            self.attention = eqx.nn.MultiheadAttention(2, 8, key=keys[0])
            self.norm1, self.norm2 = eqx.nn.LayerNorm(8), eqx.nn.LayerNorm(12)
            self.up = eqx.nn.Linear(8, 12, key=keys[1])
            self.down = eqx.nn.Linear(12, 8, key=keys[2])
            self.out = eqx.nn.Linear(8, 7, key=keys[3])
            self.embed = eqx.nn.Embedding(7, 8, key=keys[4])

        def __call__(self, words):
            x = jax.vmap(self.norm1)(jax.vmap(self.embed)(words))
            x = x + self.attention(x, x, x)
            h = jax.vmap(self.norm2)(jax.vmap(self.up)(x))
            return jax.vmap(self.out)(x + jax.vmap(self.down)(jax.nn.relu(h)))

    params, static = eqx.partition(Block(jax.random.key(0)), eqx.is_inexact_array)
    apply = jax.jit(lambda p: jax.vmap(eqx.combine(p, static))(WORDS))
    expected = joint("up", WHOLE, FilterAxes((0,)), ("weight", "bias"))
    return apply, params, {"embed/weight": FilterAxes((1,)), **expected}


def unet():
    """GroupNorm behind every convolution: a factor for each group of each."""

    class UNet(linen.Module):
        @linen.compact
        def __call__(self, x):
            def block(x, features):
                x = linen.Conv(features, (3, 3), use_bias=False)(x)
                return linen.silu(linen.GroupNorm(2)(x))

            skip = block(x, 4)
            x = block(linen.avg_pool(skip, (2, 2), (2, 2)), 8)
            x = jax.image.resize(x, skip.shape[:3] + x.shape[3:], "nearest")
            x = block(jnp.concatenate([x, skip], -1), 4)
            return linen.Conv(2, (1, 1))(x)

    def grouped(before, after):
        return FilterAxes((0, 1, 2, 4), (3, 3, before, 2, after // 2))

    sizes = [(3, 4), (4, 8), (12, 4)]
    expected = {f"Conv_{i}/kernel": grouped(*size) for i, size in enumerate(sizes)}
    return *of_linen(UNet(), IMAGES), expected


def vit():
    """Dosovitskiy et al. (2021), pre-norm, no QK-norm: only the patches are normalised."""

    class ViT(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Conv(8, (4, 4), (4, 4), name="patches")(x)
            x = linen.LayerNorm()(x.reshape(len(x), -1, 8))
            x = x + self.param("positions", linen.initializers.normal(0.02), (1, x.shape[1], 8))
            h = linen.LayerNorm()(x)
            x = x + linen.MultiHeadDotProductAttention(2)(h, h)
            x = x + linen.Dense(8)(linen.gelu(linen.Dense(12)(linen.LayerNorm()(x))))
            return linen.Dense(3)(x.mean(1))

    expected = joint("patches", FilterAxes((0, 1, 2, 3)), FilterAxes((0,)))
    return *of_linen(ViT(), IMAGES), expected


def lstm():
    """LSTM with LayerNorm, of each product, as Ba, Kiros and Hinton (2016), equation 20."""

    class Cell(nnx.Module):
        def __init__(self, rngs):
            self.recurrent = nnx.Linear(6, 24, use_bias=False, rngs=rngs)
            self.inward = nnx.Linear(5, 24, use_bias=False, rngs=rngs)
            self.norms = nnx.List([nnx.LayerNorm(6, rngs=rngs) for _ in range(5)])
            self.norm = nnx.LayerNorm(24, rngs=rngs)

        def __call__(self, carry, x):
            c, h = carry
            gates = jnp.split(self.inward(x), 4, -1)
            gates = [norm(gate) for norm, gate in zip(self.norms[:4], gates, strict=True)]
            i, f, g, o = jnp.split(jnp.concatenate(gates, -1) + self.norm(self.recurrent(h)), 4, -1)
            c = nnx.sigmoid(f) * c + nnx.sigmoid(i) * jnp.tanh(g)
            h = nnx.sigmoid(o) * jnp.tanh(self.norms[4](c))
            return (c, h), h

    class Lstm(nnx.Module):
        def __init__(self, rngs):
            self.cell, self.out = Cell(rngs), nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            zero = jnp.zeros((x.shape[0], 6))
            carry = (zero, zero)
            for t in range(x.shape[1]):
                carry, h = self.cell(carry, x[:, t])
            return self.out(h)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3, 5)), jnp.float32)
    expected = {"cell/inward/kernel": FilterAxes((0, 2), (5, 4, 6)), "cell/recurrent/kernel": WHOLE}
    return *of_nnx(Lstm(nnx.Rngs(0)), x), expected


def decoder():
    """Transposed convolutions, as in DCGAN; in Haiku their kernels are (h, w, out, in)."""

    def forward(hk, codes):
        x = hk.Linear(2 * 2 * 6)(codes).reshape(-1, 2, 2, 6)
        x = hk.Conv2DTranspose(4, 3, stride=2)(jax.nn.relu(x))
        x = hk.BatchNorm(True, True, 0.9)(x, is_training=True)
        x = hk.Conv2DTranspose(3, 3, stride=2, with_bias=False)(jax.nn.relu(x))
        x = hk.GroupNorm(1)(x)
        return jnp.tanh(hk.Conv2D(1, 3)(x))

    codes = jnp.asarray(np.random.default_rng(0).normal(size=(16, 5)), jnp.float32)
    return *of_haiku(forward, codes), {
        "conv2_d_transpose/w": FilterAxes((0, 1, 3)),
        "conv2_d_transpose_1/w": FilterAxes((0, 1, 2, 3)),
        # its bias is there for every place, so that kernel and bias go together
        **joint("linear", WHOLE, FilterAxes((0,)), ("w", "b")),
    }


def weight_standardisation():
    """Qiao et al. (2019): each filter is normalised itself, and then the layer by groups."""

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            w = self.param("kernel", linen.initializers.lecun_normal(), (3, 3, 3, 4))
            w = (w - w.mean((0, 1, 2))) / jnp.sqrt(w.var((0, 1, 2)) + 1e-5)
            dims = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims)
            return linen.Dense(3)(linen.relu(linen.GroupNorm(2)(x)).mean((1, 2)))

    return *of_linen(Net(), IMAGES), {"kernel": CONV}


def group_norm_ensemble():
    """Three U-Nets side by side: what one has, in each of the three."""
    one, params, expected = unet()
    stacked = jax.tree.map(
        lambda w: w + 0.1 * jax.random.normal(jax.random.key(1), (3, *w.shape)), params
    )
    return jax.jit(jax.vmap(one)), stacked, {
        name: FilterAxes(tuple(a + 1 for a in b.axes), (3, *b.view)) for name, b in expected.items()
    }  # fmt: skip


NETWORKS = {
    "jax-resnet": jax_resnet,
    "haiku-mobilenet": haiku_mobilenet,
    "nnx-transformer": nnx_transformer,
    "linen-transformer": linen_transformer,
    "equinox-transformer": equinox_transformer,
    "unet": unet,
    "unet-ensemble": group_norm_ensemble,
    "vit": vit,
    "lstm": lstm,
    "decoder": decoder,
    "weight-standardisation": weight_standardisation,
}
