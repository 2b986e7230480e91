"""Predictions for photos of any size: to the training's scale, through the network, and back."""

import io
import math
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from unitnorm.errors import UserError
from unitnorm.report.style import encode
from unitnorm.segment.data import opened, resize_image
from unitnorm.segment.model import segnet
from unitnorm.segment.palette import CLASSES, COLOURS, NAMES
from unitnorm.segment.pictures import draw_photo
from unitnorm.segment.weights import TrainedSegNet


def list_photos(paths: Iterable[Path]) -> list[Path]:
    """The files, and the images of the folders, each by name.

    Raises:
      UserError: a folder holds no image, or two images would have predictions of one name.
    """
    kinds = Image.registered_extensions()
    found: dict[str, Path] = {}
    for path in paths:
        try:
            inside = sorted(path.iterdir()) if path.is_dir() else ()
        except OSError as problem:
            raise UserError(f"{path}: cannot be read ({problem.strerror})") from None
        files = [x for x in inside if kinds.get(x.suffix.lower()) in Image.OPEN]
        if path.is_dir() and not files:
            raise UserError(f"{path}: holds no image; expected PNGs, JPEGs or the like")
        for file in files or [path]:
            if found.setdefault(file.stem, file) != file:
                raise UserError(f"{file} and {found[file.stem]}: their predictions would collide")
    return list(found.values())


def open_photo(path: Path) -> Image.Image:
    """A photo, upright and in RGB.

    16 bits become 8; floating-point numbers are brightness from 0 to 1.

    Raises:
      UserError: it cannot be read as an image, or its range of brightness is not known.
    """
    with warnings.catch_warnings(), opened(path) as image:
        warnings.simplefilter("ignore")
        upright, mode = ImageOps.exif_transpose(image), image.mode
        if mode[0] not in "IF":
            return upright.convert("RGB")
        values = np.asarray(upright)
        # mode I has 32 bits, but for these formats, whose numbers Pillow brings to 16
        if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
            values = values / 65535
        elif mode == "I" or not (values.min() >= 0 and values.max() <= 1):
            raise UserError(
                f"{path}: has mode {mode} and values from {values.min():g} to {values.max():g}; "
                "expected 8 or 16 bits, or floating-point numbers from 0 to 1"
            )
        return Image.fromarray(np.rint(255 * values).astype(np.uint8)).convert("RGB")


def make_predictor(trained: TrainedSegNet) -> Callable[[Image.Image], NDArray[np.uint8]]:
    """A function: a photo in RGB → the class of each of its pixels, uint8 (height, width).

    The photo is brought to the number of pixels that the network was trained on, in its own
    proportions, so that things have the size that the network knows; the scores of each class are
    then stretched back, and the highest wins.
    """
    network = segnet(trained.network)

    @jax.jit
    def logits(image: jax.Array) -> jax.Array:
        return network.apply(*trained.weights, image[None].astype(jnp.float32), False)[0][0]

    def predict(photo: Image.Image) -> NDArray[np.uint8]:
        scale = (math.prod(trained.size) / (photo.width * photo.height)) ** 0.5
        height, width = (max(1, round(side * scale)) for side in (photo.height, photo.width))
        scores = np.asarray(logits(jnp.asarray(resize_image(photo, height, width))))
        # one class at a time: all at once would take gigabytes for a large photo
        best = np.full((photo.height, photo.width), -np.inf, np.float32)
        labels = np.zeros(best.shape, np.uint8)
        for index in range(CLASSES):
            coarse = Image.fromarray(np.ascontiguousarray(scores[..., index]))
            score = np.asarray(coarse.resize(photo.size, Image.Resampling.BILINEAR))
            higher = score > best
            best[higher], labels[higher] = score[higher], index
        return labels

    return predict


def draw_all(photo: Image.Image, labels: NDArray[np.uint8], *, overlay: bool) -> dict[str, bytes]:
    """PNGs of a prediction by name.

    labels: a palette image, whose numbers are the classes and whose palette is CamVid's colours;
    figure: the photo and its prediction with a legend; overlay: the photo under the colours.
    """
    drawn = Image.fromarray(labels)
    drawn.putpalette(COLOURS.ravel().tolist())
    images = {"labels": drawn}
    if overlay:
        images["overlay"] = Image.blend(photo, Image.fromarray(COLOURS[labels]), 0.5)
    files = {}
    for name, image in images.items():
        content = io.BytesIO()
        image.save(content, "PNG")
        files[name] = content.getvalue()
    small = photo.copy()
    small.thumbnail((1600, 1600))  # more than a figure shows
    figure = draw_photo(np.asarray(small), np.asarray(drawn.resize(small.size, 0)))
    return files | {"figure": encode(figure)["png"]}


def describe_shares(labels: NDArray[np.uint8]) -> str:
    """The classes' shares of the pixels, the largest first: "road 41%, sky 22%, …"."""
    shares = np.bincount(labels.ravel(), minlength=CLASSES) / labels.size
    order = np.argsort(-shares, kind="stable")
    return ", ".join(f"{NAMES[c]} {shares[c]:.0%}" for c in order if shares[c] >= 0.005)
