"""Invented road scenes with all eleven classes, for tests and a first look without data.

Each scene is drawn from a seed. Coordinates are fractions of the height and width, so that scenes
of any size look alike.
"""

from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from unitnorm.segment.palette import NAMES, UNLABELLED

COUNTS = {"train": 48, "val": 16, "test": 16}

# What the things look like, unlike their colours in a label image.
_LOOKS = {
    "sky": (170, 200, 235), "building": (150, 110, 90), "pole": (70, 75, 80),
    "road": (85, 85, 90), "pavement": (165, 160, 150), "tree": (60, 105, 50),
    "sign": (215, 190, 50), "fence": (120, 100, 70), "car": (150, 30, 40),
    "pedestrian": (205, 150, 120), "bicyclist": (40, 90, 190),
}  # fmt: skip


def scenes(count: int, height: int, width: int, seed: int = 0) -> tuple[NDArray, NDArray]:
    """Images uint8 (count, height, width, 3) and labels uint8 (count, height, width).

    Scene i of a seed does not depend on `count`.
    """
    pairs = [_scene(np.random.default_rng([seed, i]), height, width) for i in range(count)]
    images, labels = zip(*pairs, strict=True)
    return np.stack(images), np.stack(labels)


def _scene(rng: np.random.Generator, height: int, width: int) -> tuple[NDArray, NDArray]:
    image = Image.new("RGB", (width, height))
    label = Image.new("L", (width, height), UNLABELLED)
    brushes, u = (ImageDraw.Draw(image), ImageDraw.Draw(label)), rng.uniform

    def draw(shape: str, name: str, *points: float) -> None:
        """A thing, by x and y of its points in turn."""
        at = np.round(np.reshape(points, (-1, 2)) * [width, height]).ravel().tolist()
        tone = np.array(_LOOKS[name]) * u(0.8, 1.2)
        colour = tuple(np.clip(tone, 0, 255).astype(int).tolist())
        for brush, fill in zip(brushes, (colour, NAMES.index(name)), strict=True):
            getattr(brush, shape)(at, fill=fill)

    box, ellipse = partial(draw, "rectangle"), partial(draw, "ellipse")
    horizon, vanishing = u(0.42, 0.52), u(0.4, 0.6)
    box("sky", 0, 0, 1, 1)
    for side in (0, 1):
        x = 0.0
        while x < 0.45:  # from the edge towards the vanishing point, ever smaller
            step = u(0.08, 0.2)
            top = horizon - (0.5 - x) * u(0.5, 0.95)
            left, right = (x, x + step) if side == 0 else (1 - x - step, 1 - x)
            box("building", left, top, right, horizon + 0.06)
            x += step
    for _ in range(rng.integers(1, 4)):
        x, r = u(0.05, 0.95), u(0.05, 0.14)
        box("tree", x - 0.01, horizon - r, x + 0.01, horizon + 0.04)
        ellipse("tree", x - r * 0.8, horizon - 2.4 * r, x + r * 0.8, horizon - 0.3 * r)
    box("pavement", 0, horizon, 1, 1)
    left, right = u(-0.1, 0.12), u(0.88, 1.1)
    tip = vanishing - 0.03, horizon, vanishing + 0.03, horizon
    draw("polygon", "road", *tip, right, 1, left, 1)
    far, near = (vanishing - 0.1, 0.0) if rng.integers(2) else (vanishing + 0.1, 1.0)
    side_of_it = near, horizon + 0.02, near, horizon + 0.2
    draw("polygon", "fence", far, horizon, *side_of_it, far, horizon + 0.04)
    for _ in range(rng.integers(1, 4)):
        size = u(0.08, 0.24)
        x, foot = u(0.25, 0.75), horizon + size * u(0.8, 1.4)
        box("car", x - size / 2, foot - size * 0.45, x + size / 2, foot)
        box("car", x - size / 3, foot - size * 0.8, x + size / 3, foot - size * 0.4)
    for name in ("pedestrian", "pedestrian", "bicyclist"):
        size = u(0.16, 0.3)
        x, foot = (u(0.04, 0.25), u(0.75, 0.96))[rng.integers(2)], horizon + size * u(0.9, 1.3)
        wide = 0.13 * size if name == "pedestrian" else 0.3 * size
        box(name, x - wide, foot - 0.75 * size, x + wide, foot)
        ellipse(name, x - 0.1 * size, foot - size, x + 0.1 * size, foot - 0.75 * size)
    for _ in range(2):
        x, top = (u(0.08, 0.3), u(0.7, 0.92))[rng.integers(2)], horizon - u(0.2, 0.38)
        box("pole", x - 0.008, top, x + 0.008, horizon + u(0.1, 0.2))
        box("sign", x - 0.035, top - 0.03, x + 0.035, top + 0.06)
    noisy = np.asarray(image, float) + rng.normal(0, 9.0, (height, width, 3))
    labels = np.array(label)
    labels[rng.random(labels.shape) < 0.01] = UNLABELLED
    return np.clip(noisy, 0, 255).astype(np.uint8), labels
