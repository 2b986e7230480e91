"""SegNet-Basic in Flax NNX, and its pooling, unpooling and input normalisation as pure functions.

An encoder is convolution, batch normalisation, ReLU, 2 × 2 max-pooling; a decoder is unpooling at
the indices of its encoder's pooling, convolution, batch normalisation. Badrinarayanan, Kendall and
Cipolla (2015), "SegNet"; the layout, without ReLU in decoders, follows the authors' published
code. Convolutions have no bias, since batch normalisation would take it out again.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from unitnorm.archbn.model import Network, split_network
from unitnorm.geometry import retraction
from unitnorm.segment.config import SegNetConfig
from unitnorm.segment.convolution import fourier_convolution
from unitnorm.segment.palette import CLASSES

FOURIER_PIXELS, FOURIER_CHANNELS = 2000, 16  # below, direct is as fast on 2 cores
LRN_SIZE, LRN_ALPHA, LRN_BETA = 5, 1e-4, 0.75  # of the authors' SegNet-Basic


def local_response_normalisation(x: Array) -> Array:
    """x / (1 + α/n Σ x²)^β over the n = 5 neighbouring channels: (…, channels) → the same.

    Krizhevsky, Sutskever and Hinton (2012), as Caffe computes it (α is divided by n).
    """
    window, strides = (1,) * (x.ndim - 1) + (LRN_SIZE,), (1,) * x.ndim
    squares = jax.lax.reduce_window(x * x, 0.0, jax.lax.add, window, strides, "SAME")
    return x * (1 + LRN_ALPHA / LRN_SIZE * squares) ** -LRN_BETA


def pool_indices(x: Array) -> Array:
    """Where the maximum of each 2 × 2 window is: (n, h, w, c) → uint8 (n, ⌈h/2⌉, ⌈w/2⌉, c).

    0 and 1 are the upper row, 2 and 3 the lower; of equal values the first. Windows over the edge
    of an odd size hold the pixels that exist.
    """
    a, b, c, d = _corners(x, -jnp.inf)
    in_top, in_bottom = jnp.where(a >= b, 0, 1), jnp.where(c >= d, 2, 3)
    is_top = jnp.maximum(a, b) >= jnp.maximum(c, d)
    return jnp.where(is_top, in_top, in_bottom).astype(jnp.uint8)


def pool(x: Array, indices: Array) -> Array:
    """The values at `indices` (of `pool_indices`): (n, h, w, c) → (n, ⌈h/2⌉, ⌈w/2⌉, c)."""
    a, b, c, d = _corners(x, 0)
    upper, lower = jnp.where(indices == 0, a, b), jnp.where(indices == 2, c, d)
    return jnp.where(indices < 2, upper, lower)


def unpool(x: Array, indices: Array, height: int, width: int) -> Array:
    """Values back at their indices, zeros elsewhere; the transpose of `pool`.

    (n, ⌈height/2⌉, ⌈width/2⌉, c) → (n, height, width, c); `indices` are shaped like x.
    """
    n, h, w, c = x.shape
    corners = [jnp.where(indices == corner, x, 0) for corner in range(4)]
    rows = [jnp.stack(corners[i : i + 2], axis=3) for i in (0, 2)]  # (n, h, w, 2, c)
    whole = jnp.stack(rows, axis=2)  # (n, h, 2, w, 2, c)
    return whole.reshape(n, 2 * h, 2 * w, c)[:, :height, :width]


def _corners(x: Array, fill: float) -> list[Array]:
    """The four pixels of each 2 × 2 window, `fill` where the window goes over the edge."""
    _, h, w, _ = x.shape
    x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), constant_values=fill)
    return [x[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]


class Convolution(nnx.Module):
    """Convolution of stride 1 that keeps the size, then batch normalisation.

    The kernel is (k, k, inputs, features); each filter, all but the last axis, starts Gaussian and
    at unit norm.
    """

    def __init__(self, inputs: int, config: SegNetConfig, mesh: Mesh | None, *, rngs: nnx.Rngs):
        rounded = config.dtype == "tensorfloat32"
        dtype = jnp.dtype("float32" if rounded else config.dtype)
        self.conv = nnx.Conv(
            inputs, config.features, (config.kernel_size, config.kernel_size), use_bias=False,
            dtype=dtype, kernel_init=_unit_filters,
            precision=jax.lax.Precision.HIGH if rounded else None,  # None: as the process has it
            conv_general_dilated=choose_convolution(config, mesh), rngs=rngs,
        )  # fmt: skip
        self.norm = nnx.BatchNorm(  # dtype: of the output; statistics are float32 all the same
            config.features, momentum=config.bn_momentum, epsilon=config.bn_epsilon, dtype=dtype,
            rngs=rngs,
        )  # fmt: skip

    def __call__(self, x: Array, *, train: bool) -> Array:
        return self.norm(self.conv(x), use_running_average=not train)


class SegNetBasic(nnx.Module):
    """Images (n, h, w, 3) of values 0 to 255, any h and w → float32 logits (n, h, w, CLASSES).

    `train` normalises with the whole batch and moves the running statistics.
    """

    def __init__(self, config: SegNetConfig, mesh: Mesh | None, *, rngs: nnx.Rngs):
        width = config.features
        inputs = [3] + [width] * (2 * config.stages - 1)
        layers = [Convolution(size, config, mesh, rngs=rngs) for size in inputs]
        self.encoders = nnx.List(layers[: config.stages])
        self.decoders = nnx.List(layers[config.stages :])
        self.classifier = nnx.Conv(width, CLASSES, (1, 1), kernel_init=_unit_filters, rngs=rngs)

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        x = local_response_normalisation(x)
        kept: list[tuple[Array, int, int]] = []
        for encoder in self.encoders:
            x = jax.nn.relu(encoder(x, train=train))
            indices = jax.lax.stop_gradient(pool_indices(x))
            kept.append((indices, x.shape[1], x.shape[2]))
            x = pool(x, indices)
        for decoder in self.decoders:
            x = decoder(unpool(x, *kept.pop()), train=train)
        return self.classifier(x.astype(jnp.float32))


def segnet(config: SegNetConfig, mesh: Mesh | None = None) -> Network:
    """SegNet-Basic as pure functions; the devices of `mesh`, of one axis, share the images."""
    return split_network(
        lambda rngs: SegNetBasic(config, mesh, rngs=rngs), filter_mask, None, config.bn_momentum
    )


def choose_convolution(config: SegNetConfig, mesh: Mesh | None) -> Callable[..., Array]:
    """What computes a layer's convolution, called like `jax.lax.conv_general_dilated`."""
    direct, fourier, way = jax.lax.conv_general_dilated, fourier_convolution, config.convolution
    if way == "auto":
        way = "fourier" if jax.default_backend() == "cpu" else "direct"
    if way == "direct" or config.kernel_size == 1:
        return direct
    if mesh is not None:  # so that devices add their kernels' gradients once, at the end
        images, kernel = PartitionSpec(*mesh.axis_names), PartitionSpec()
        # with check_vma they would do so at every frequency
        fourier = jax.shard_map(
            fourier, mesh=mesh, in_specs=(images, kernel), out_specs=images, check_vma=False
        )

    def same_size_stride_1(x: Array, kernel: Array, *others: Any, **options: Any) -> Array:
        _, height, width, channels = x.shape
        if height * width < FOURIER_PIXELS or channels < FOURIER_CHANNELS:
            return direct(x, kernel, *others, **options)
        return fourier(x, kernel).astype(x.dtype)

    return same_size_stride_1


def filter_mask(params: Any) -> Any:
    """True for every kernel that feeds a batch normalisation, False for all else."""
    layer = jax.tree_util.DictKey("conv")  # the classifier has none
    return jax.tree.map_with_path(lambda path, _: layer in path, params)


def _unit_filters(key: Array, shape: tuple[int, ...], dtype: Any, **_: Any) -> Array:
    return retraction(jax.random.normal(key, shape)).astype(dtype)
