"""IDX files, written from the format's description and not by our reader."""

import gzip
from pathlib import Path

import numpy as np


def idx_bytes(*values: bytes, shape: tuple[int, ...]) -> bytes:
    """A file of unsigned bytes: 0 0 8, dimensions, sizes, values; these need not fit the sizes."""
    sizes = b"".join(int(size).to_bytes(4, "big") for size in shape)
    return bytes([0, 0, 8, len(shape)]) + sizes + b"".join(values)


def idx_of(array: np.ndarray) -> bytes:
    """A file that holds the array."""
    return idx_bytes(array.astype(np.uint8).tobytes(), shape=array.shape)


def blobs(
    rng: np.random.Generator, count: int, side: int = 6, classes: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Images that can be learnt: each class has a bright pattern of its own, under noise."""
    patterns = np.random.default_rng(7).integers(0, 120, (classes, side, side))
    labels = np.arange(count) % classes
    rng.shuffle(labels)
    noise = rng.integers(0, 60, (count, side, side))
    return (patterns[labels] + noise).astype(np.uint8), labels.astype(np.uint8)


def write_blobs(folder: Path, train: int, test: int) -> Path:
    """A small data set of one's own, 6 × 6, in four files."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        images, labels = blobs(rng, count)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx_of(images))
        packed = gzip.compress(idx_of(labels), mtime=0)
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(packed)
    return folder
