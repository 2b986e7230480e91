"""Data sets of images and classes: `load_dataset` gives MNIST, your own IDX files, or one of TFDS.

Nothing is copied or cached. Change here which sources there are.
"""

import os
from pathlib import Path

from unitnorm.data import idx
from unitnorm.data.arrays import Arrays, Dataset, to_dataset
from unitnorm.errors import UserError, expect

__all__ = ["Dataset", "load_dataset"]

_MNIST = Path(__file__).parent / "mnist"
_MNIST_SHA256 = "ac89dbc26b7b0b5f68ff586bc0579a0c16e78b3436b0c71ccdd0169cbebf9ff7"


def load_dataset(dataset: str = "mnist", data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Reads a data set, checks it and computes its hash.

    Args:
      dataset: `mnist` is in this package. Any other name is one of TFDS, with `image` and `label`:
        read where it is prepared, in `data_dir` or else in TFDS_DATA_DIR or ~/tensorflow_datasets,
        and otherwise downloaded and prepared there by TFDS. `name/version`, `name/config` and the
        path of a prepared data set are understood too.
      data_dir: a folder of four IDX files named as those of MNIST or EMNIST, raw or with .gz;
        `dataset` then only gives it a name (its folder's, if left at `mnist`). Or see `dataset`.

    Raises:
      UserError: if a source is missing, damaged or of another kind, naming the file, what was
        expected and what was found.

    >>> from unitnorm import load_dataset
    >>> load_dataset().describe()
    'mnist: 60,000 + 10,000 images, 28×28, 10 classes'
    """
    expect(dataset, "dataset", "a name or a path", "nothing")
    folder = None if data_dir is None else _path(data_dir)
    try:
        if dataset != "mnist":
            return to_dataset(dataset, _read(dataset, folder))
        if folder is not None:
            return to_dataset(folder.resolve().name, idx.read_folder(folder))
        return _read_mnist()
    except OSError as problem:
        reason = problem.strerror or str(problem)
        where = f"{problem.filename}: " if problem.filename else ""
        raise UserError(f"cannot read {where}{reason}") from problem


def _read(dataset: str, folder: Path | None) -> Arrays:
    if folder is not None and any(idx.find_files(folder)):
        return idx.read_folder(folder)
    from unitnorm.data import from_tfds

    root = folder or _path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    expect(folder is None or folder.is_dir(), folder, "a folder of data sets", "no folder")
    found = from_tfds.find_prepared(str(_path(dataset)), root)
    return from_tfds.read(found or from_tfds.prepare(dataset, root))


def _read_mnist() -> Dataset:
    try:
        mnist = to_dataset("mnist", idx.read_folder(_MNIST))
        expect(mnist.sha256 == _MNIST_SHA256, _MNIST, "MNIST", "other files")
    except UserError as problem:
        raise UserError(f"{problem}; the installation is damaged: install unitnorm again") from None
    return mnist


def _path(path: str | os.PathLike[str]) -> Path:
    name = os.fspath(path)
    expect("\0" not in name, repr(name), "a path", "a null character in it")
    try:
        return Path(path).expanduser()
    except RuntimeError as problem:
        raise UserError(f"{path}: there is no home folder; give a full path") from problem
