"""IDX files, written from the format's description and not by our reader."""

import numpy as np


def idx_bytes(*values: bytes, shape: tuple[int, ...]) -> bytes:
    """A file of unsigned bytes: 0 0 8, dimensions, sizes, values; these need not fit the sizes."""
    sizes = b"".join(int(size).to_bytes(4, "big") for size in shape)
    return bytes([0, 0, 8, len(shape)]) + sizes + b"".join(values)


def idx_of(array: np.ndarray) -> bytes:
    """A file that holds the array."""
    return idx_bytes(array.astype(np.uint8).tobytes(), shape=array.shape)
