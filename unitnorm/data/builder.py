"""Our TensorFlow Datasets builder: writes the prepared copies that the cache keeps, and reads them.

Change here what a prepared copy looks like, and raise `VERSION` when you do: copies of another
version are not taken. TFDS is used without tensorflow: array_record files hold the examples and
NumPy decodes them. Importing this module imports TFDS (half a second), so `unitnorm.data` does it
inside functions only.
"""

import contextlib
import io
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from numpy.typing import NDArray
from tensorflow_datasets.proto import tf_example_pb2

from unitnorm.data.arrays import Arrays, hashes

VERSION = "1.0.0"
BLOCK = 4096  # examples asked for at once: one by one takes four times as long


class CopyInfo(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """TFDS would ask its cloud bucket about the data set, and leave an empty folder behind."""


class ImageClasses(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Writes `Arrays` as examples of `image` and `label`, in their order.

    Not registered, so that the names of TFDS's own builders stay free.
    """

    VERSION = tfds.core.Version(VERSION)

    def __init__(self, arrays: Arrays, **kwargs: Any) -> None:
        self._arrays = arrays
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Tensor(
            # zlib-packed bytes are read four times faster than the PNG of an Image feature.
            shape=self._arrays.train_images.shape[1:],
            dtype=np.uint8,
            encoding="zlib",
        )
        label = tfds.features.ClassLabel(num_classes=self._arrays.classes)
        return CopyInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"image": image, "label": label}),
            metadata=tfds.core.MetadataDict(
                sha256=hashes(self._arrays), classes=self._arrays.classes
            ),
            disable_shuffling=True,  # image i stays image i
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        del dl_manager  # nothing is downloaded
        arrays = self._arrays
        return {
            "train": self._generate_examples(arrays.train_images, arrays.train_labels),
            "test": self._generate_examples(arrays.test_images, arrays.test_labels),
        }

    def _generate_examples(
        self, images: NDArray[np.uint8], labels: NDArray[np.uint8]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(len(labels)):
            yield i, {"image": images[i], "label": labels[i]}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps TFDS from printing, drawing progress bars and setting up logging for everyone."""
    # Without any handler, the logging library that TFDS uses calls logging.basicConfig().
    handler = logging.NullHandler()
    logging.root.addHandler(handler)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.root.removeHandler(handler)


@quiet()
def prepare(arrays: Arrays, folder: Path) -> None:
    """Writes `arrays` under `folder`, from which `read` reads them back.

    Raises:
      OSError: if the files cannot be written.
    """
    builder = ImageClasses(arrays, data_dir=folder)
    downloads = folder / "downloads"  # TFDS makes it, though nothing is downloaded
    config = tfds.download.DownloadConfig(extract_dir=downloads)
    try:
        builder.download_and_prepare(download_dir=downloads, download_config=config)
    except (OSError, RuntimeError) as problem:  # array_record raises the latter on a full disk
        reason = " ".join(str(problem).split()).split("; ")[0]
        raise OSError(f"cannot write to {folder}: {reason}") from problem
    shutil.rmtree(downloads)


@quiet()
def read(folder: Path) -> tuple[Arrays, tuple[str, ...]]:
    """What `prepare` wrote under `folder`, and the hashes that it noted, which the caller compares.

    A damaged copy raises whatever TFDS raises, or comes back with other hashes.
    """
    builder = tfds.builder_from_directory(folder / ImageClasses.name / VERSION)
    features = builder.info.features
    (train_images, train_labels), (test_images, test_labels) = (
        _read_split(
            builder.as_data_source(
                split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            ),
            features["image"],
        )
        for split in ("train", "test")
    )
    classes, noted = features["label"].num_classes, builder.info.metadata
    if classes != noted["classes"]:  # the hashes do not cover it
        raise ValueError(f"expected {noted['classes']} classes, found {classes}")
    return Arrays(train_images, train_labels, test_images, test_labels, classes), tuple(
        noted["sha256"]
    )


def _read_split(source: Any, image: Any) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images and labels of one split, from undecoded records.

    The two known features are decoded here: TFDS's general decoder spends 50 µs on an example,
    4 s on MNIST, and this a quarter of it.
    """
    images = np.empty((len(source), *image.shape), np.uint8)
    labels = np.empty(len(source), np.uint8)
    for start in range(0, len(source), BLOCK):
        block = slice(start, min(start + BLOCK, len(source)))
        records = source.__getitems__(range(block.start, block.stop))
        examples = [
            tf_example_pb2.Example.FromString(record).features.feature for record in records
        ]
        images[block] = [
            image.decode_example_np(example["image"].bytes_list.value[0]) for example in examples
        ]
        labels[block] = [example["label"].int64_list.value[0] for example in examples]
    return images, labels
