"""The four arrays of a data set, the checks that every source must pass, and their hashes.

Change here what counts as a sound data set. Where the arrays come from is the business of `idx.py`
(IDX files) and `from_tfds.py`.
"""

import hashlib
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unitnorm.errors import UserError

MAX_CLASSES = 256  # a label is one byte, here as in the IDX format
ALIGNMENT = 64  # bytes; what XLA asks of its own arrays on CPUs
MAX_BYTES = 1 << 30  # of images in one split; MNIST has 47 million


class Arrays(NamedTuple):
    """A data set as read: images (n, *image_shape) and labels (n,), all uint8."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.uint8]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]
    classes: int


def check(arrays: Arrays, names: Sequence[str]) -> Arrays:
    """Returns `arrays` if the four fit together.

    Args:
      arrays: what was read.
      names: what an error calls the train images, train labels, test images and test labels.

    Raises:
      UserError: on empty or unequal counts, images without pixels, different image shapes in train
        and test, fewer than 2 or more than 256 classes, or a label outside 0 … classes − 1.
    """
    train_images, train_labels, test_images, test_labels, classes = arrays
    for images, labels, images_name, labels_name in (
        (train_images, train_labels, names[0], names[1]),
        (test_images, test_labels, names[2], names[3]),
    ):
        if not images.size:
            raise UserError(
                f"{images_name}: expected at least one image of at least one pixel, "
                f"found shape {images.shape}"
            )
        if len(images) != len(labels):
            raise UserError(
                f"{labels_name}: expected {len(images)} labels, one for each image of "
                f"{images_name}, found {len(labels)}"
            )
    if test_images.shape[1:] != train_images.shape[1:]:
        raise UserError(
            f"{names[2]}: expected images of {_size(train_images)} pixels as in {names[0]}, "
            f"found {_size(test_images)}"
        )
    if not 2 <= classes <= MAX_CLASSES:
        raise UserError(f"{names[1]}: expected 2 to {MAX_CLASSES} classes, found {classes}")
    for labels, name in ((train_labels, names[1]), (test_labels, names[3])):
        if labels.max() >= classes:
            index = int(np.argmax(labels >= classes))
            raise UserError(
                f"{name}: expected labels 0 to {classes - 1}, the classes of {names[1]}, "
                f"found {labels[index]} at position {index}"
            )
    return arrays


def hashes(arrays: Arrays) -> list[str]:
    """SHA-256 of the four IDX files (not compressed) that hold these arrays, whatever their source.

    In the order train images, train labels, test images, test labels. For MNIST these are the
    well-known hashes of its files.
    """
    found = []
    for array in arrays[:4]:
        digest = hashlib.sha256(bytes([0, 0, 8, array.ndim]))  # 8: unsigned bytes
        digest.update(struct.pack(f">{array.ndim}I", *array.shape))
        digest.update(np.ascontiguousarray(array).reshape(-1).data)
        found.append(digest.hexdigest())
    return found


def aligned(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A copy that is only read, at an address that `ALIGNMENT` divides.

    JAX on CPUs uses such an array in place: one for all devices, in the large pages that NumPy asks
    for, which spares a training step on two cores a twentieth. Others it copies to each device.
    """
    memory = np.empty(images.nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    copy = memory[start : start + images.nbytes].reshape(images.shape)
    copy[:] = images
    copy.flags.writeable = False
    return copy


def _size(images: NDArray[Any]) -> str:
    return " x ".join(map(str, images.shape[1:]))
