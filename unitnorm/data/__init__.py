"""Data sets of images and classes: `load_dataset` gives MNIST, your own IDX files, or one of TFDS.

Every source goes the same way: read and checked (`idx.py`, `prepared.py`), prepared once by our
TFDS builder (`builder.py`) in a cache (`cache.py`), and loaded from there, verified by its hashes.
Change here which sources there are.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unitnorm.data import cache, idx
from unitnorm.data.arrays import Arrays, hashes
from unitnorm.errors import UserError

__all__ = ["Dataset", "load_dataset"]

log = logging.getLogger(__name__)

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
      train_images: uint8 (n, features), raw pixel values, each image row by row; C-contiguous.
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


def load_dataset(
    dataset: str = "mnist",
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Loads a data set, from the cache if it has been prepared before.

    Args:
      dataset: `mnist` is in this package. Any other name or path is a data set with `image` and
        `label` that TFDS has prepared, looked up in `data_dir`, or else in TFDS_DATA_DIR or
        ~/tensorflow_datasets; `name/version` and `name/config` are understood.
      data_dir: a folder of four IDX files named as those of MNIST, raw or with .gz; `dataset` then
        only gives it a name (its folder's, if left at `mnist`). Or see `dataset`.
      cache_dir: where prepared copies are kept: UNITNORM_CACHE, else XDG_CACHE_HOME/unitnorm, else
        ~/.cache/unitnorm. Where that cannot be used, a temporary folder serves for this once, and a
        warning is logged.

    Raises:
      UserError: if a source is missing, damaged or of another kind, naming the file, what was
        expected and what was found; or if there is no room to prepare it.
    """
    try:
        source = _source(dataset, None if data_dir is None else _path(data_dir))
        key = cache.key(source.files)
    except OSError as problem:
        hint = f"; {_REINSTALL}" if dataset == "mnist" and data_dir is None else ""
        raise UserError(f"cannot read {_where(problem)}{hint}") from problem
    try:
        folder = cache.default_folder() if cache_dir is None else _path(cache_dir)
        arrays, found = cache.fetch(key, source.read, folder, source.known)
    except OSError as problem:
        log.warning(
            "the data cache cannot be used (%s): preparing the data in a temporary folder, for "
            "this time only; set UNITNORM_CACHE to a writable folder",
            _where(problem),
        )
        arrays, found = _fetch_for_this_once(key, source)
    return Dataset(
        name=source.name,
        train_images=_rows(arrays.train_images),
        train_labels=arrays.train_labels.astype(np.int32),
        test_images=_rows(arrays.test_images),
        test_labels=arrays.test_labels.astype(np.int32),
        image_shape=arrays.train_images.shape[1:],
        classes=arrays.classes,
        sha256=hashlib.sha256("".join(f"{part}\n" for part in found).encode()).hexdigest(),
    )


class _Source(NamedTuple):
    name: str
    files: tuple[Path, ...]
    read: Callable[[], Arrays]
    known: tuple[str, ...] | None = None  # hashes of the arrays


def _source(dataset: str, data_dir: Path | None) -> _Source:
    if not dataset:
        raise UserError("dataset: expected a name or a path, found nothing")
    if dataset == "mnist" and data_dir is None:
        files = tuple(_MNIST / f"{name}.gz" for name in idx.FILES)
        return _Source("mnist", files, partial(_read_mnist, files), _MNIST_HASHES)
    if data_dir is not None and (dataset == "mnist" or idx.any_in(data_dir)):
        files = idx.find(data_dir)
        name = data_dir.resolve().name if dataset == "mnist" else dataset
        return _Source(name, files, partial(idx.read_all, files))
    from unitnorm.data import prepared

    root = data_dir or _path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    folder = prepared.find(str(_path(dataset)), root)
    files = tuple(sorted(path for path in folder.iterdir() if path.is_file()))
    return _Source(dataset, files, partial(prepared.read, folder))


def _read_mnist(files: tuple[Path, ...]) -> Arrays:
    try:
        arrays = idx.read_all(files)
    except UserError as problem:
        raise UserError(f"{problem}; {_REINSTALL}") from problem
    for path, expected, found in zip(files, _MNIST_HASHES, hashes(arrays), strict=True):
        if found != expected:
            raise UserError(
                f"{path}: expected SHA-256 {expected} (uncompressed), found {found}; {_REINSTALL}"
            )
    return arrays


def _fetch_for_this_once(key: str, source: _Source) -> tuple[Arrays, tuple[str, ...]]:
    try:
        with tempfile.TemporaryDirectory(prefix="unitnorm-") as folder:
            return cache.fetch(key, source.read, Path(folder), source.known)
    except OSError as problem:
        raise UserError(
            f"the data can be prepared neither in the cache nor in a temporary folder "
            f"({_where(problem)}); make room, or set UNITNORM_CACHE to a writable folder"
        ) from problem


def _rows(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(images.reshape(len(images), -1))


def _path(path: str | os.PathLike[str]) -> Path:
    if "\0" in os.fspath(path):
        raise UserError(f"{os.fspath(path)!r}: expected a path, found a null character in it")
    try:
        return Path(path).expanduser()
    except RuntimeError as problem:
        raise UserError(f"{path}: there is no home folder; give a full path") from problem


def _reason(problem: OSError) -> str:
    return problem.strerror or str(problem)


def _where(problem: OSError) -> str:
    return f"{problem.filename}: {_reason(problem)}" if problem.filename else _reason(problem)
