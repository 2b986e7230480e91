"""The eleven classes of CamVid in the order of their labels, and their colours."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NAMES = (
    "sky", "building", "pole", "road", "pavement", "tree",
    "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
CLASSES = len(NAMES)
UNLABELLED = CLASSES  # this label means: nobody said what it is

# Red, green and blue as the SegNet authors draw them; the last is for unlabelled pixels.
COLOURS = np.array(
    [
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
        (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192), (0, 0, 0),
    ],
    np.uint8,
)  # fmt: skip


def coloured(labels: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Labels of any shape as colours: (…) → uint8 (…, 3)."""
    return COLOURS[labels]
