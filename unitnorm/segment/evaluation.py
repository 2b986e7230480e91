"""Measurements on whole images: confusion matrices, and statistics of batch normalisation.

Images go through the network a few at a time, shared among all devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from unitnorm.archbn.evaluation import batch_statistics
from unitnorm.segment.config import SegNetConfig
from unitnorm.segment.data import Scenes
from unitnorm.segment.metrics import count_confusion
from unitnorm.segment.model import segnet
from unitnorm.segment.palette import CLASSES, UNLABELLED
from unitnorm.segment.weights import Weights


def make_mesh() -> Mesh:
    """All devices, along the axis "image"."""
    return Mesh(np.asarray(jax.devices()), ("image",), axis_types=(AxisType.Auto,))


class Evaluator:
    """Compiled measurements of networks of one kind.

    Args:
      config: of the network.
      batch: images at a time, rounded up to a multiple of the devices.
    """

    def __init__(self, config: SegNetConfig, batch: int = 8):
        mesh = make_mesh()
        network = segnet(config, CLASSES, mesh)

        def confusion(weights: Weights, images: Array, labels: Array) -> Array:
            logits, _ = network.apply(*weights, images.astype(jnp.float32), False)
            count = partial(count_confusion, classes=CLASSES)
            return jax.vmap(count)(labels, jnp.argmax(logits, -1))

        def add_statistics(total: Any, params: Any, images: Array) -> Any:
            found = batch_statistics(network, params, total, images.astype(jnp.float32))
            return jax.tree.map(lambda sum, x: sum + x / (1 - config.bn_momentum), total, found)

        self._batch = -(-batch // mesh.size) * mesh.size
        self._by_image = NamedSharding(mesh, PartitionSpec("image"))
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._confusion = jax.jit(confusion, out_shardings=everywhere)
        self._add = jax.jit(add_statistics, out_shardings=everywhere)

    def confusion(self, weights: Weights, scenes: Scenes) -> NDArray[np.int64]:
        """Confusion matrix of each image, with running statistics: (n, classes, classes)."""
        found = []
        for images, labels in self._batches(scenes):
            # one after another: CPU devices that sum for several batches at once can wait for each
            # other for ever, as each sum in waiting holds one of XLA's threads. To read a result
            # waits for the first device alone.
            counted = jax.block_until_ready(self._confusion(weights, images, labels))
            found.append(np.asarray(counted, np.int64))
        return np.concatenate(found)[: len(scenes.labels)]

    def recompute_statistics(self, weights: Weights, batches: Iterable[Array]) -> Weights:
        """With batch statistics that are the mean over mini-batches (n, height, width, 3).

        Of their means and of their variances, as in the SegNet authors' code.
        """
        total = jax.tree.map(jnp.zeros_like, weights.stats)
        count = 0
        for images in batches:
            total = jax.block_until_ready(self._add(total, weights.params, images))
            count += 1
        return Weights(weights.params, jax.tree.map(lambda x: x / count, total))

    def whole_images(self, scenes: Scenes) -> Iterator[Array]:
        """Mini-batches of whole images; the last is filled up with the first images."""
        whole = np.arange(-(-len(scenes.labels) // self._batch) * self._batch)
        return (images for images, _ in self._batches(scenes.only(whole % len(scenes.labels))))

    def _batches(self, scenes: Scenes) -> Iterator[tuple[Array, Array]]:
        for start in range(0, len(scenes.labels), self._batch):
            images, labels = (array[start : start + self._batch] for array in scenes[:2])
            missing = [(0, self._batch - len(labels)), (0, 0), (0, 0), (0, 0)]
            # pixels without a label count nowhere
            labels = np.pad(labels, missing[:3], constant_values=UNLABELLED)
            yield jax.device_put((np.pad(images, missing), labels), self._by_image)
