"""Data sets of images and classes: `load_dataset` gives MNIST, your own IDX files, or one of TFDS.

Nothing is copied or cached: IDX files are read as they are (`idx.py`), and what TFDS has prepared
is read by TFDS (`from_tfds.py`). Change here which sources there are.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unitnorm.data import idx
from unitnorm.data.arrays import Arrays, aligned, hashes
from unitnorm.errors import UserError

__all__ = ["Dataset", "load_dataset"]

_MNIST = Path(__file__).parent / "mnist"
_REINSTALL = "the installation is damaged: install unitnorm again"
_MNIST_HASHES = (
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
)


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


def load_dataset(dataset: str = "mnist", data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Reads a data set, checks it and computes its hash.

    Args:
      dataset: `mnist` is in this package. Any other name is one of TFDS, with `image` and `label`:
        read where it is prepared, in `data_dir` or else in TFDS_DATA_DIR or ~/tensorflow_datasets,
        and otherwise downloaded and prepared there by TFDS. `name/version`, `name/config` and the
        path of a prepared data set are understood too.
      data_dir: a folder of four IDX files named as those of MNIST, raw or with .gz; `dataset` then
        only gives it a name (its folder's, if left at `mnist`). Or see `dataset`.

    Raises:
      UserError: if a source is missing, damaged or of another kind, naming the file, what was
        expected and what was found.

    >>> from unitnorm import load_dataset
    >>> mnist = load_dataset()
    >>> mnist.train_images.shape, mnist.test_images.shape, mnist.classes
    ((60000, 784), (10000, 784), 10)
    """
    if not dataset:
        raise UserError("dataset: expected a name or a path, found nothing")
    folder = None if data_dir is None else _path(data_dir)
    try:
        if folder is None and dataset == "mnist":
            arrays, parts = _read_mnist()
        else:
            arrays = _read(dataset, folder)
            parts = hashes(arrays)
            if folder is not None and dataset == "mnist":
                dataset = folder.resolve().name
    except OSError as problem:
        reason = problem.strerror or str(problem)
        where = f"{problem.filename}: " if problem.filename else ""
        raise UserError(f"cannot read {where}{reason}") from problem
    return Dataset(
        name=dataset,
        train_images=aligned(arrays.train_images.reshape(len(arrays.train_images), -1)),
        train_labels=arrays.train_labels.astype(np.int32),
        test_images=aligned(arrays.test_images.reshape(len(arrays.test_images), -1)),
        test_labels=arrays.test_labels.astype(np.int32),
        image_shape=arrays.train_images.shape[1:],
        classes=arrays.classes,
        sha256=hashlib.sha256("".join(f"{part}\n" for part in parts).encode()).hexdigest(),
    )


def _read(dataset: str, folder: Path | None) -> Arrays:
    if folder is not None and (dataset == "mnist" or idx.any_in(folder)):
        return idx.read_all(idx.find_files(folder))
    from unitnorm.data import from_tfds

    root = folder or _path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    if folder is not None and not folder.is_dir():
        raise UserError(f"{folder}: expected a folder of data sets, found no folder")
    found = from_tfds.find_prepared(str(_path(dataset)), root)
    return from_tfds.read(found or from_tfds.prepare(dataset, root))


def _read_mnist() -> tuple[Arrays, list[str]]:
    try:
        files = idx.find_files(_MNIST)
        arrays = idx.read_all(files)
    except UserError as problem:
        raise UserError(f"{problem}; {_REINSTALL}") from problem
    parts = hashes(arrays)
    for path, expected, found in zip(files, _MNIST_HASHES, parts, strict=True):
        if found != expected:
            raise UserError(
                f"{path}: expected SHA-256 {expected} (uncompressed), found {found}; {_REINSTALL}"
            )
    return arrays, parts


def _path(path: str | os.PathLike[str]) -> Path:
    if "\0" in os.fspath(path):
        raise UserError(f"{os.fspath(path)!r}: expected a path, found a null character in it")
    try:
        return Path(path).expanduser()
    except RuntimeError as problem:
        raise UserError(f"{path}: there is no home folder; give a full path") from problem
