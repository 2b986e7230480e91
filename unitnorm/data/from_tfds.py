"""Data sets of TFDS by name: found where they are prepared, or else prepared by TFDS.

No tensorflow: examples are kept as array_record and decoded by NumPy, though most of TFDS's own
builders need tensorflow to prepare them. Importing this module imports TFDS, which takes a second.
"""

import contextlib
import io
import logging
import math
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from numpy.typing import NDArray
from tensorflow_datasets.core.utils.version import list_all_versions

from unitnorm.data.arrays import MAX_BYTES, MAX_CLASSES, Arrays
from unitnorm.errors import UserError, expect, one_line

_SPLITS = ("train", "test")
_BLOCK = 4096  # examples asked for at once: one by one takes four times as long
_OWN = "a data set of your own, four IDX files, goes by --data-dir"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS from printing and from setting up logging for everyone."""
    handler = logging.NullHandler()  # without any, what TFDS logs by calls logging.basicConfig()
    logging.root.addHandler(handler)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.root.removeHandler(handler)


def find_prepared(dataset: str, root: Path) -> Path | None:
    """The folder of the highest version of a data set that TFDS has prepared, if there is one.

    Looked up here and not by TFDS, which would import its own builder of that name, if it has one.
    """
    for folder in (root / dataset.replace(":", "/"), Path(dataset)):
        if (folder / "dataset_info.json").is_file():
            return folder
        for holders in [folder], sorted(folder.glob("*/")):  # of versions; or its configurations
            found = {holder: list_all_versions(holder) for holder in holders}
            named = [holder for holder, versions in found.items() if versions]
            several = ", ".join(holder.name for holder in named)
            expect(len(named) < 2, dataset, "one configuration", f"{several}; name one")
            if named:
                return named[0] / str(found[named[0]][-1])
    return None


def prepare(dataset: str, root: Path) -> Path:
    """Has TFDS download a data set and prepare it as array_record in `root`; gives its folder."""
    if re.split("[:/]", dataset)[0] not in tfds.list_builders(with_community_datasets=False):
        raise UserError(
            f"{dataset}: expected a data set prepared by TFDS in {root}, found none, nor does TFDS "
            f"know its name (see tensorflow.org/datasets/catalog); {_OWN}"
        )
    logging.getLogger(__name__).warning(
        "%s: TFDS downloads and prepares it in %s, this once", dataset, root
    )
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        with _quiet():
            builder = tfds.builder(dataset, data_dir=root)
            _check_network(builder.url_infos)
            builder.download_and_prepare(file_format="array_record")
    except Exception as problem:  # of all kinds: network, disk, missing modules, manual downloads
        if found := find_prepared(dataset, root):  # another process was faster
            return found
        raise UserError(
            f"{dataset}: TFDS cannot prepare it here ({_reason(problem)}); where there is a "
            "network: pip install tensorflow tensorflow-datasets array_record && tfds build "
            f"{dataset} --file_format=array_record --data_dir={root}; {_OWN}"
        ) from problem
    return Path(builder.data_dir)


def _check_network(urls: Any) -> None:
    """Raises an OSError where no one answers at the first address; TFDS would try for minutes."""
    for url in [url for url in urls or () if url.startswith("http")][:1]:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10).close()
        except urllib.error.HTTPError:
            pass  # that is an answer
        except OSError as problem:
            raise OSError(f"no answer from {url}: {getattr(problem, 'reason', problem)}") from None


def _reason(problem: BaseException) -> str:
    """In a line; a module that is missing somewhere below says more than what TFDS makes of it."""
    cause: BaseException | None = problem
    while cause:
        if isinstance(cause, ImportError) and cause.name:
            return f"it needs the module {cause.name}"
        cause = cause.__cause__ or cause.__context__
    return one_line(problem)[:200]


@_quiet()
def read(folder: Path) -> Arrays:
    """Reads a data set with `image` (uint8) and `label` (integer) in `train` and `test`.

    Images of one channel lose that axis.
    """
    try:
        builder = tfds.builder_from_directory(folder)
        _check_kind(builder.info, folder)
        train, test = (_read_split(builder, split, folder) for split in _SPLITS)
    except UserError:
        raise
    except Exception as problem:  # TFDS raises all kinds on damaged files
        raise UserError(
            f"{folder}: expected a data set prepared by TFDS, found one that cannot be read "
            f"({_reason(problem)}); prepare it again"
        ) from problem
    label = builder.info.features["label"]
    classes = isinstance(label, tfds.features.ClassLabel) and label.num_classes
    names = [f"{folder}, {split}: {key}" for split in _SPLITS for key in ("image", "label")]
    return Arrays(*train, *test, names, classes or None)


def _check_kind(info: Any, folder: Path) -> None:
    """Refuses what has no images of one size, each with the number of its class."""
    file_format = info.file_format.value if info.file_format else "none"
    again = f"{file_format}; prepare it again with file_format='array_record'"
    expect(file_format == "array_record", folder, "the file format array_record", again)
    features = info.features
    named = isinstance(features, tfds.features.FeaturesDict) and {"image", "label"} <= {*features}
    expect(named, folder, "the features image and label", repr(features))
    missing = [split for split in _SPLITS if split not in info.splits]
    expect(not missing, folder, "the splits train and test", f"no {' and no '.join(missing)}")
    image, label = features["image"], features["label"]
    good, found = None not in image.shape, f"{image.np_dtype} and {image.shape}"
    expect(good and image.np_dtype == np.uint8, folder, "images of uint8 and of one shape", found)
    good, found = np.issubdtype(label.np_dtype, np.integer), f"{label.np_dtype} and {label.shape}"
    expect(good and label.shape == (), folder, "one integer as label", found)
    for split in _SPLITS:
        size = info.splits[split].num_examples * math.prod(image.shape)
        expect(size <= MAX_BYTES, folder, f"at most {MAX_BYTES} bytes of images in {split}", size)


def _read_split(builder: Any, split: str, folder: Path) -> tuple[NDArray, NDArray]:
    """Images and labels, each uint8."""
    source = builder.as_data_source(split)
    places, shape = range(len(source)), builder.info.features["image"].shape
    images, labels = np.empty((len(source), *shape), np.uint8), np.empty(len(source), np.int64)
    for start in places[::_BLOCK]:
        block = slice(start, start + _BLOCK)
        examples = source.__getitems__(places[block])
        images[block] = [example["image"] for example in examples]
        labels[block] = [example["label"] for example in examples]
    bad = labels[(labels < 0) | (labels >= MAX_CLASSES)]  # a byte below would hide them
    expect(not bad.size, f"{folder}, {split}", f"labels 0 to {MAX_CLASSES - 1}", bad[:1])
    return images.squeeze(-1) if shape[-1:] == (1,) else images, labels.astype(np.uint8)
