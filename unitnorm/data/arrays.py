"""A data set in memory, and the checks that every source must pass."""

import hashlib
import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unitnorm.errors import expect

MAX_CLASSES = 256  # a label is one byte, here as in the IDX format
ALIGNMENT = 64  # bytes; what XLA asks of its own arrays on CPUs
MAX_BYTES = 1 << 30  # of images in one split; MNIST has 47 million


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory, ready to be put on a device.

    Attributes:
      name: `mnist`, the name given, or that of the folder.
      train_images: uint8 (n, features), raw pixel values, each image row by row; C-contiguous,
        at an address that JAX uses in place on CPUs.
      train_labels: int32 (n,), 0 … classes − 1.
      test_images: like `train_images`.
      test_labels: like `train_labels`.
      image_shape: of one image before it became a row, such as (28, 28).
      classes: number of classes, at most 256.
      sha256: of the content alone: the SHA-256 of the four SHA-256 (hexadecimal, one a line) of the
        uncompressed IDX files train-images, train-labels, t10k-images and t10k-labels that hold
        these arrays. `sha256sum FILES | cut -c-64 | sha256sum` gives the same.
    """

    name: str
    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int32]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int32]
    image_shape: tuple[int, ...]
    classes: int
    sha256: str

    def describe(self) -> str:
        """What it holds, in a line: "mnist: 60,000 + 10,000 images, 28×28, 10 classes"."""
        return (
            f"{self.name}: {len(self.train_labels):,} + {len(self.test_labels):,} images, "
            f"{_size(self.image_shape)}, {self.classes} classes"
        )


class Arrays(NamedTuple):
    """A data set as read: images (n, *image_shape) and labels (n,), all uint8.

    `names` is what an error calls the four; `classes` None: the highest training label plus one.
    """

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.uint8]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]
    names: list[str]
    classes: int | None = None


def to_dataset(name: str, arrays: Arrays) -> Dataset:
    """The data set that these arrays are; a UserError where the four do not fit together."""
    classes = _check(arrays)
    parts = "".join(f"{_sha256_of_idx(array)}\n" for array in arrays[:4])
    return Dataset(
        name=name,
        train_images=_aligned(arrays.train_images.reshape(len(arrays.train_images), -1)),
        train_labels=arrays.train_labels.astype(np.int32),
        test_images=_aligned(arrays.test_images.reshape(len(arrays.test_images), -1)),
        test_labels=arrays.test_labels.astype(np.int32),
        image_shape=arrays.train_images.shape[1:],
        classes=classes,
        sha256=hashlib.sha256(parts.encode()).hexdigest(),
    )


def _check(arrays: Arrays) -> int:
    """The number of classes of arrays that fit together."""
    train, train_labels, test, test_labels, names, classes = arrays
    parts = (train, train_labels, names[:2]), (test, test_labels, names[2:])
    for images, labels, (of_images, of_labels) in parts:
        some = "at least one image of at least one pixel"
        expect(images.size, of_images, some, f"shape {images.shape}")
        each = f"{len(images)} labels, one for each image of {of_images}"
        expect(len(images) == len(labels), of_labels, each, len(labels))
    size, test_size = _size(train.shape[1:]), _size(test.shape[1:])
    expect(size == test_size, names[2], f"images of {size} pixels as in {names[0]}", test_size)
    counts = np.bincount(train_labels)
    if classes is None:
        every = f"images of every class up to the highest label, {len(counts) - 1}"
        odd = f"which stands {counts[-1]} times, first at position {train_labels.argmax()}"
        expect(counts.all(), names[1], f"{every}, {odd}", f"none of class {counts.argmin()}")
    classes = classes or len(counts)
    expect(2 <= classes <= MAX_CLASSES, names[1], f"2 to {MAX_CLASSES} classes", classes)
    for _, labels, (_, name) in parts:
        known = f"labels 0 to {classes - 1}, the classes of {names[1]}"
        at = int(np.argmax(labels >= classes))
        expect(labels[at] < classes, name, known, f"{labels[at]} at position {at}")
    return classes


def _sha256_of_idx(array: NDArray[np.uint8]) -> str:
    """Of the IDX file that holds the array; for MNIST these are the well-known hashes."""
    digest = hashlib.sha256(bytes([0, 0, 8, array.ndim]))  # 8: unsigned bytes
    digest.update(struct.pack(f">{array.ndim}I", *array.shape))
    digest.update(np.ascontiguousarray(array).reshape(-1).data)
    return digest.hexdigest()


def _aligned(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A copy that JAX uses in place on CPUs, one for all devices.

    It lies in the large pages that NumPy asks for, which spares a step on two cores a twentieth.
    """
    memory = np.empty(images.nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    copy = memory[start : start + images.nbytes].reshape(images.shape)
    copy[:] = images
    copy.flags.writeable = False
    return copy


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
