"""What a training sample of ArchBN must cost, and what the machine then allows: pure functions.

Only matrix products are counted as floating-point operations, as in every roofline: the rest of the
network is a few per cent of them. Bytes are the least that must cross the memory bus if nothing but
the mini-batch at hand is kept in caches: its pixels, and every parameter read and written once for
each mini-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT = 4  # bytes of a float32


@dataclass(frozen=True)
class Shape:
    """The network and the mini-batch."""

    depth: int
    features: int = 784
    width: int = 64
    classes: int = 10
    batch: int = 100

    def products(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of every product with a matrix of weights, first layer first."""
        inner = [(self.width // 2, self.width)] * (self.depth - 1)
        return [(self.features, self.width), *inner, (self.width // 2, self.classes)]

    def parameters(self) -> int:
        """Numbers trained: weights, and scale and shift of every normalised feature."""
        return sum(i * o for i, o in self.products()) + self.depth * 2 * self.width


def forward_flops(shape: Shape) -> int:
    """Floating-point operations of one image's logits."""
    return sum(2 * i * o for i, o in shape.products())


def training_flops(shape: Shape) -> int:
    """Floating-point operations of one image's share of a step.

    Backwards there is a product for the weights' gradient, and one for the inputs' but in the first
    layer, whose inputs are the pixels.
    """
    features, width = shape.products()[0]
    return 3 * forward_flops(shape) - 2 * features * width


def training_bytes(shape: Shape, pixel_bytes: int) -> float:
    """Bytes that one image's share of a step must move.

    Args:
      pixel_bytes: 1 where images are kept as uint8, 4 as float32.
    """
    return shape.features * pixel_bytes + 2 * FLOAT * shape.parameters() / shape.batch


def bound(flops: float, bytes_moved: float, flops_per_s: float, bytes_per_s: float) -> float:
    """Samples per second that the machine allows: the lower of its two limits."""
    return min(flops_per_s / flops, bytes_per_s / bytes_moved)
