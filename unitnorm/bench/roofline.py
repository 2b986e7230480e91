"""What a training sample of ArchBN must cost, and what the machine then allows: pure functions.

Only matrix products are counted as floating-point operations, as in every roofline: the rest of the
network is a few per cent of them. Bytes are the least that must cross the memory bus if nothing but
the mini-batch at hand is kept in caches: its pixels, and every parameter read and written once for
each mini-batch.
"""

from __future__ import annotations

# ArchBN of Table 2 on MNIST
FEATURES, WIDTH, CLASSES, BATCH = 784, 64, 10, 100
FLOAT = 4  # bytes of a float32


def products(depth: int) -> list[tuple[int, int]]:
    """(inputs, outputs) of every product with a matrix of weights, first layer first."""
    inner = [(WIDTH // 2, WIDTH)] * (depth - 1)
    return [(FEATURES, WIDTH), *inner, (WIDTH // 2, CLASSES)]


def count_parameters(depth: int) -> int:
    """Numbers trained: weights, and scale and shift of every normalised feature."""
    return sum(i * o for i, o in products(depth)) + depth * 2 * WIDTH


def forward_flops(depth: int) -> int:
    """Floating-point operations of one image's logits."""
    return sum(2 * i * o for i, o in products(depth))


def training_flops(depth: int) -> int:
    """Floating-point operations of one image's share of a step.

    Backwards there is a product for the weights' gradient, and one for the inputs' but in the first
    layer, whose inputs are the pixels.
    """
    return 3 * forward_flops(depth) - 2 * FEATURES * WIDTH


def training_bytes(depth: int, pixel_bytes: int) -> float:
    """Bytes that one image's share of a step must move.

    Args:
      pixel_bytes: 1 where images are kept as uint8, 4 as float32.
    """
    return FEATURES * pixel_bytes + 2 * FLOAT * count_parameters(depth) / BATCH


def bound(flops: float, bytes_moved: float, flops_per_s: float, bytes_per_s: float) -> float:
    """Samples per second that the machine allows: the lower of its two limits."""
    return min(flops_per_s / flops, bytes_per_s / bytes_moved)
