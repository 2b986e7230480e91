"""Which images a run sees, and in which order: its split, its epochs' orders, its mini-batches.

All of it is drawn from the run's seed, so that runs of one seed see the same images under every
update. To draw something else at random, give it a stream of its own below.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# One stream of random numbers for each use, so that adding one leaves the others as they are.
INIT, SWEEP_SPLIT, SWEEP_ORDER, TRAIN_SPLIT, TRAIN_ORDER, START, AUGMENT = range(7)
SPLIT = {"sweep": SWEEP_SPLIT, "train": TRAIN_SPLIT}
ORDER = {"sweep": SWEEP_ORDER, "train": TRAIN_ORDER}


class Images(NamedTuple):
    """Pixels uint8 (N, features) and labels int32 (N,), on the device or on the host."""

    pixels: Array | np.ndarray
    labels: Array | np.ndarray


class Split(NamedTuple):
    """What a run's seed decides of its data: the indices of its images and the order's key."""

    train: Array  # int32 (train_images,)
    validation: Array  # int32 (validation_images,)
    order_seed: Array  # uint32 (), the seed of which the epochs' orders are drawn


def stream(seed: Array, use: int) -> Array:
    """The key of one use of a run's seed."""
    return jax.random.fold_in(jax.random.key(seed), use)


def draw_split(part: str, sizes: tuple[int, int], images: int, seed: Array) -> Split:
    """A seed's random training and validation images, disjoint, `sizes` of so many `images`.

    Args:
      part: "sweep" or "train".
    """
    train, validation = sizes
    order = jax.random.permutation(stream(seed, SPLIT[part]), images).astype(jnp.int32)
    return Split(order[validation : validation + train], order[:validation], seed)


def draw_order(part: str, split: Split, epoch: Array) -> Array:
    """The training images in the order of an epoch, int32 (train_images,)."""
    key = jax.random.fold_in(stream(split.order_seed, ORDER[part]), epoch)
    # one sort of random bits, where jax.random.permutation takes two to be safe from ties; with
    # 50,000 images about one epoch in four has a single tie, broken by the order of the split
    return split.train[argsort(jax.random.bits(key, split.train.shape))]


def gather(images: Images, index: Array) -> tuple[Array, Array]:
    """The mini-batch at `index`: float32 pixels 0 to 255 as they are, and labels."""
    # the indices come from a permutation; a bounds check would cost a third of the gather
    pixels, labels = (
        jnp.asarray(array).at[index].get(mode="promise_in_bounds") for array in images
    )
    return pixels.astype(jnp.float32), labels


def argsort(bits: Array) -> Array:
    """The order of uint32 (n,), int32 (n,): `jnp.argsort`, in a fifth of the time on a CPU."""

    def of_one_array(bits: Array) -> Array:
        # XLA's sort is fast for one array of numbers, not for two: the place is their lower half
        with jax.enable_x64(True):
            places = jnp.arange(len(bits), dtype=jnp.uint64)
            return jnp.sort((bits.astype(jnp.uint64) << 32) | places).astype(jnp.int32)

    return jax.lax.platform_dependent(bits, cpu=of_one_array, default=jnp.argsort)
