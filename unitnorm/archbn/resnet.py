"""ResNet-9, a small convolutional network with batch normalisation, for studies on natural images.

The network of David Page's "How to train your ResNet" (2018): eight convolutions of 3 × 3, each
followed by batch normalisation and ReLU, two residual blocks, and a linear classifier. To add a
network, write its module and give it a name in `NETWORKS`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from unitnorm.archbn.model import Network, split_network

PAD = 4  # pixels that a crop may move an image by
BN_MOMENTUM = 0.9  # of the running statistics


class Conv(nnx.Module):
    """Convolution 3 × 3 without bias, as one product of matrices.

    From and to (channels, height, width, images). With a kernel for each run of a program, XLA's
    own convolution takes the runs one by one, and on a CPU many times as long. With the images
    last, all that is moved are long rows.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, rngs: nnx.Rngs):
        make = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(make(rngs.params(), (3, 3, inputs, outputs)))
        self.stride = stride

    def __call__(self, x: Array) -> Array:
        height, width = x.shape[1:3]
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        moved = jnp.concatenate([
            padded[:, i : i + height : self.stride, j : j + width : self.stride]
            for i in range(3)
            for j in range(3)
        ])  # fmt: skip
        filters = self.kernel[...].reshape(-1, self.kernel.shape[-1]).T
        return (filters @ moved.reshape(len(moved), -1)).reshape(-1, *moved.shape[1:])


class ConvBlock(nnx.Module):
    """Convolution, batch normalisation, ReLU; `halve` the images by a "stride" or by "pool"ing."""

    def __init__(self, inputs: int, outputs: int, halve: str = "", *, rngs: nnx.Rngs):
        self.conv = Conv(inputs, outputs, 2 if halve == "stride" else 1, rngs)
        self.norm = nnx.BatchNorm(
            outputs, axis=0, momentum=BN_MOMENTUM, use_fast_variance=False, rngs=rngs
        )
        self.pool = halve == "pool"

    def __call__(self, x: Array, *, train: bool) -> Array:
        x = nnx.relu(self.norm(self.conv(x), use_running_average=not train))
        if not self.pool:
            return x
        channels, height, width, images = x.shape
        return x.reshape(channels, height // 2, 2, width // 2, 2, images).max((2, 4))


class ResNet9(nnx.Module):
    """Images (batch, height · width · channels), 0 to 255, to logits (batch, classes).

    Args:
      shape: of an image: (height, width) or (height, width, channels), divisible by 8.
      width: filters of the first convolution; the widest have eight times as many.
      strided: the first convolution has a stride of 2, too, and strides stand for pooling; it takes
        a seventh of the operations. Images then have to be divisible by 16.
    """

    def __init__(
        self, shape: tuple[int, ...], classes: int, *, width: int, strided: bool, rngs: nnx.Rngs
    ):
        self.shape = (*shape, 1)[:3]
        block = partial(ConvBlock, rngs=rngs)
        early, later = ("stride", "stride") if strided else ("", "pool")
        self.prepare = block(self.shape[2], width, early)
        self.first = block(width, 2 * width, later)
        self.residual = nnx.List([block(2 * width, 2 * width) for _ in range(2)])
        self.second = block(2 * width, 4 * width, later)
        self.third = block(4 * width, 8 * width, later)
        self.residual_last = nnx.List([block(8 * width, 8 * width) for _ in range(2)])
        self.classifier = nnx.Linear(8 * width, classes, use_bias=False, rngs=rngs)

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        def through(x: Array, *blocks: ConvBlock) -> Array:
            for block in blocks:
                x = block(x, train=train)
            return x

        x = ((x.reshape(-1, *self.shape) / 255 - 0.5) / 0.25).transpose(3, 1, 2, 0)
        x = through(x, self.prepare, self.first)
        x = x + through(x, *self.residual)
        x = through(x, self.second, self.third)
        x = x + through(x, *self.residual_last)
        return 0.125 * self.classifier(x.max((1, 2)).T)


NETWORKS: dict[str, Callable[..., nnx.Module]] = {
    "resnet9-narrow": partial(ResNet9, width=8, strided=True),
    "resnet9": partial(ResNet9, width=64, strided=False),
}


@lru_cache(maxsize=16)
def convolutional(name: str, shape: tuple[int, ...], classes: int) -> Network:
    """A network of `NETWORKS` as pure functions, its mini-batches flipped and shifted at random."""
    make = partial(NETWORKS[name], shape, classes)
    network = split_network(lambda rngs: make(rngs=rngs), kernel_mask, None, BN_MOMENTUM)
    return network._replace(augment=partial(augment, (*shape, 1)[:3]), together=1)


def kernel_mask(params: Any) -> Any:
    """True for every kernel of a convolution, all of which feed a normalisation."""
    return jax.tree.map(lambda w: w.ndim == 4, params)


def augment(shape: tuple[int, ...], key: Array, x: Array) -> Array:
    """Each image of (batch, features) mirrored or not, and moved by up to `PAD` pixels."""
    images = x.reshape(-1, *shape)
    padded = jnp.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)), mode="reflect")

    def one(key: Array, image: Array) -> Array:
        move, flip = jax.random.split(key)
        start = jax.random.randint(move, (2,), 0, 2 * PAD + 1)
        crop = jax.lax.dynamic_slice(image, (*start, 0), shape)
        return jnp.where(jax.random.bernoulli(flip), crop[:, ::-1], crop)

    changed = jax.vmap(one)(jax.random.split(key, len(images)), padded)
    return changed.reshape(x.shape)
