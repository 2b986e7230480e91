"""What is measured: confusion matrices of whole images, their figures, and batch statistics.

Unlabelled pixels count nowhere. The figures are those of the SegNet papers: global accuracy, class
average, intersection over union (IoU).
"""

from collections.abc import Iterable, Iterator
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
from unitnorm.segment.model import segnet
from unitnorm.segment.palette import CLASSES, UNLABELLED
from unitnorm.segment.schema import ALL, COLUMNS
from unitnorm.segment.weights import Weights


def measure(matrix: NDArray[np.integer]) -> dict[str, float]:
    """The figures of a confusion matrix of all classes, by their columns of the records.

    Global accuracy: the part of all pixels that is right; class average: its mean over the classes;
    IoU of a class: right pixels over those that are of the class or taken for it. Classes without a
    pixel are NaN, and left out of the means.
    """
    pixels = np.asarray(matrix, np.float64)
    right, true, predicted = np.diag(pixels), pixels.sum(1), pixels.sum(0)
    with np.errstate(invalid="ignore"):  # 0 / 0
        whole, each = right.sum() / pixels.sum(), right / true
        iou = right / (true + predicted - right)
    means = [float(x[np.isfinite(x)].mean()) if pixels.any() else np.nan for x in (each, iou)]
    return dict(zip(COLUMNS, (float(whole), *means, *iou), strict=True))


def count_confusion(labels: Array, predictions: Array) -> Array:
    """Pixels of true class i predicted to be of class j: int32 (CLASSES, CLASSES).

    Labels of no class are unlabelled pixels. Exact up to 2³¹ pixels.
    """
    cells = labels.astype(jnp.int32) * CLASSES + predictions.astype(jnp.int32)
    cells = jnp.where(labels < CLASSES, cells, CLASSES * CLASSES)
    counts = jnp.bincount(cells.ravel(), length=CLASSES * CLASSES + 1)
    return counts[:-1].reshape(CLASSES, CLASSES).astype(jnp.int32)


def make_mesh() -> Mesh:
    """All devices, along the axis "image"."""
    return Mesh(np.asarray(jax.devices()), ("image",), axis_types=(AxisType.Auto,))


class Evaluator:
    """Compiled measurements of networks of one kind, `batch` images at a time over all devices."""

    def __init__(self, config: SegNetConfig, batch: int = 8):
        mesh = make_mesh()
        self.by_image = NamedSharding(mesh, PartitionSpec("image"))
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self.network = network = segnet(config, mesh)

        def confusion(weights: Weights, images: Array, labels: Array) -> Array:
            logits, _ = network.apply(*weights, images.astype(jnp.float32), False)
            return jax.vmap(count_confusion)(labels, jnp.argmax(logits, -1))

        def add_statistics(total: Any, params: Any, images: Array) -> Any:
            found = batch_statistics(network, params, total, images.astype(jnp.float32))
            return jax.tree.map(lambda sum, x: sum + x / (1 - network.bn_momentum), total, found)

        self._batch = -(-batch // mesh.size) * mesh.size
        self._confusion = jax.jit(confusion, out_shardings=self.everywhere)
        self._add = jax.jit(add_statistics, out_shardings=self.everywhere)

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

    def by_sequence(self, weights: Weights, scenes: Scenes) -> dict[str, NDArray[np.int64]]:
        """Confusion matrices added over all images and, if there are several, over each drive's."""
        matrices, drives = self.confusion(weights, scenes), scenes.sequences
        chosen = {str(drive): drives == drive for drive in np.unique(drives)}
        several = {drive: matrices[mask].sum(0) for drive, mask in chosen.items() if not mask.all()}
        return {ALL: matrices.sum(0)} | several

    def recompute_statistics(self, weights: Weights, batches: Iterable[Array]) -> Weights:
        """With batch statistics that are the mean over mini-batches (n, height, width, 3).

        Of their means and of their variances, as in the SegNet authors' code.
        """
        total, count = jax.tree.map(jnp.zeros_like, weights.stats), 0
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
            yield jax.device_put((np.pad(images, missing), labels), self.by_image)
