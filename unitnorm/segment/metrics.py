"""What is measured of a segmentation: a confusion matrix on the device, and its figures.

Unlabelled pixels count nowhere. The figures are those of the SegNet papers: global accuracy, class
average, mean intersection over union.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike, NDArray

# Of the SegNet authors' own training on CamVid (segnet_basic_train.prototxt of their tutorial), in
# the order of `palette.NAMES`: median frequency weights of the 367 label images, each within a
# tenth, but for "sign", 9.6, where the images give 3.8; they probably had a narrower class.
PUBLISHED_WEIGHTS = (
    0.2595, 0.1826, 4.5640, 0.1417, 0.9051, 0.3826, 9.6446, 1.8418, 0.6823, 6.2478, 7.3614,
)  # fmt: skip


class Metrics(NamedTuple):
    """Fractions of 1; NaN where a class makes them undefined.

    Attributes:
      global_accuracy: labelled pixels that are right.
      class_accuracy: mean over the classes of the part of their pixels that is right.
      mean_iou: mean over the classes of `iou`.
      iou: per class, right pixels over those that are of the class or predicted to be.
    """

    global_accuracy: float
    class_accuracy: float
    mean_iou: float
    iou: NDArray[np.float64]


def count_confusion(labels: Array, predictions: Array, classes: int) -> Array:
    """Pixels of true class i predicted to be of class j: int32 (classes, classes).

    Labels of `classes` or above are unlabelled pixels. Exact up to 2³¹ pixels.
    """
    cells = labels.astype(jnp.int32) * classes + predictions.astype(jnp.int32)
    cells = jnp.where(labels < classes, cells, classes * classes)
    counts = jnp.bincount(cells.ravel(), length=classes * classes + 1)
    return counts[:-1].reshape(classes, classes).astype(jnp.int32)


def measure(matrix: NDArray[np.integer]) -> Metrics:
    """The figures of a confusion matrix; classes without a pixel are left out of the means."""
    pixels = np.asarray(matrix, np.float64)
    right, true, predicted = np.diag(pixels), pixels.sum(1), pixels.sum(0)
    iou = _ratio(right, true + predicted - right)
    overall = float(_ratio(right.sum(), pixels.sum()))
    return Metrics(overall, _mean(_ratio(right, true)), _mean(iou), iou)


def median_frequency_weights(labels: NDArray[np.uint8], classes: int) -> NDArray[np.float32]:
    """Weights of the classes in the loss: median(f) / f(c), float32 (classes,).

    f(c) is the number of pixels of class c over the number of labelled and unlabelled pixels of the
    images that have it (Eigen and Fergus 2015, as in the SegNet paper). A class that no image has
    weighs nothing. `labels` are those of the training images, (n, height, width).
    """
    counts = np.stack([np.bincount(image.ravel(), minlength=256)[:classes] for image in labels])
    frequency = _ratio(counts.sum(0), labels[0].size * (counts > 0).sum(0))
    known = np.isfinite(frequency)
    median = np.median(frequency[known]) if known.any() else 0.0
    return np.where(known, median / frequency, 0).astype(np.float32)


def _ratio(above: ArrayLike, below: ArrayLike) -> NDArray[np.float64]:
    below = np.asarray(below, np.float64)
    return np.divide(above, below, out=np.full(below.shape, np.nan), where=below > 0)


def _mean(values: NDArray[np.float64]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")
