"""What a training sample of Table 2's ArchBN must cost.

Only matrix products are counted as floating-point operations, as in every roofline: the rest of the
network is a few per cent of them. Bytes are the least that must cross the memory bus if nothing but
the mini-batch at hand is kept in caches: its pixels, and every parameter read and written once for
each mini-batch.
"""

FEATURES, WIDTH, CLASSES, BATCH = 784, 64, 10, 100
FLOAT = 4  # bytes of a float32
VALIDATION_SHARE = 0.2  # validation images over training images, as in Table 2


def count_weights(depth: int) -> int:
    """Of all matrices: each costs an image's logits a multiplication and an addition."""
    return FEATURES * WIDTH + (depth - 1) * (WIDTH // 2) * WIDTH + (WIDTH // 2) * CLASSES


def training_flops(depth: int) -> int:
    """Floating-point operations of one image's share of a step.

    Backwards there is a product for the weights' gradient, and one for the inputs' but in the first
    layer, whose inputs are the pixels.
    """
    return 6 * count_weights(depth) - 2 * FEATURES * WIDTH


def work_of(depth: int, *, ours: bool) -> tuple[float, float]:
    """Floating-point operations and bytes of a training sample: of a peer, or of ours, which keeps
    images as bytes and is evaluated, for its logits alone."""
    weights, evaluated = count_weights(depth), VALIDATION_SHARE if ours else 0.0
    parameters = weights + depth * 2 * WIDTH  # scale and shift of every normalised feature
    moved = FEATURES * (1 if ours else FLOAT) + 2 * FLOAT * parameters / BATCH
    return training_flops(depth) + evaluated * 2 * weights, moved + evaluated * FEATURES
