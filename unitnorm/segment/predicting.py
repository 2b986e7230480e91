"""Predictions for photos of any size: to the training's scale, through the network, and back."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from unitnorm.errors import UserError
from unitnorm.segment.model import segnet
from unitnorm.segment.palette import CLASSES, COLOURS, NAMES, coloured
from unitnorm.segment.weights import TrainedSegNet

Predictor = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def make_predictor(trained: TrainedSegNet) -> Predictor:
    """A compiled function: an image uint8 (h, w, 3) → float32 logits (h, w, classes)."""
    network = segnet(trained.network, CLASSES)

    @jax.jit
    def logits(image: jax.Array) -> jax.Array:
        return network.apply(*trained.weights, image[None].astype(jnp.float32), False)[0][0]

    return lambda image: np.asarray(logits(jnp.asarray(image)))


def predict_labels(predict: Predictor, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The most likely class of each pixel of an image of the training's size: uint8 (h, w)."""
    return predict(image).argmax(-1).astype(np.uint8)


def open_photo(path: Path) -> Image.Image:
    """A photo, upright and in RGB.

    Raises:
      UserError: it cannot be read as an image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        reason = " ".join(str(problem).split())
        raise UserError(
            f"{path}: cannot be read as an image ({reason}); expected a PNG, JPEG or the like"
        ) from None


def segment_photo(
    predict: Predictor, photo: Image.Image, size: tuple[int, int]
) -> NDArray[np.uint8]:
    """The class of each pixel of a photo: uint8 (photo.height, photo.width).

    The photo is brought to the number of pixels that the network was trained on, in its own
    proportions, so that things have the size that the network knows; the scores of each class are
    then stretched back, and the highest wins.

    Args:
      size: height and width of the training's images.
    """
    scale = (size[0] * size[1] / (photo.width * photo.height)) ** 0.5
    small = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
    smooth = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
    shrunk = photo if small == photo.size else photo.resize(small, smooth)
    scores = predict(np.asarray(shrunk, np.uint8))
    if small == photo.size:
        return scores.argmax(-1).astype(np.uint8)
    # one class at a time: all at once would take gigabytes for a large photo
    best = np.full((photo.height, photo.width), -np.inf, np.float32)
    labels = np.zeros(best.shape, np.uint8)
    for index in range(scores.shape[-1]):
        coarse = Image.fromarray(np.ascontiguousarray(scores[..., index]))
        score = np.asarray(coarse.resize(photo.size, Image.Resampling.BILINEAR))
        higher = score > best
        best[higher], labels[higher] = score[higher], index
    return labels


def draw_labels(labels: NDArray[np.uint8]) -> Image.Image:
    """Labels as a palette image: the numbers are the classes, the palette has CamVid's colours."""
    image = Image.fromarray(labels, "L")
    image.putpalette(COLOURS.ravel().tolist())
    return image


def draw_overlay(photo: Image.Image, labels: NDArray[np.uint8], share: float = 0.5) -> Image.Image:
    """The photo with its classes' colours over it, of the photo's size."""
    return Image.blend(photo, Image.fromarray(coloured(labels)), share)


def describe_shares(labels: NDArray[np.uint8]) -> str:
    """The classes' shares of the pixels, the largest first: "road 41%, sky 22%, …"."""
    shares = np.bincount(labels.ravel(), minlength=CLASSES)[:CLASSES] / labels.size
    order = np.argsort(-shares, kind="stable")
    return ", ".join(f"{NAMES[c]} {shares[c]:.0%}" for c in order if shares[c] >= 0.005)


def to_png(image: Image.Image) -> bytes:
    """The image as a file."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()
