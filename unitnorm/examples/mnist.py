"""What every example shares and none is about: MNIST's images, mini-batches, the test error."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from unitnorm.data import load_dataset


def mnist_arrays(*shape: int) -> tuple[jax.Array, ...]:
    """Training images and labels, test images and labels; images have `shape`, pixels 0 to 1."""
    data = load_dataset()
    train, test = (
        jnp.asarray(images.reshape(-1, *shape), jnp.float32) / 255
        for images in (data.train_images, data.test_images)
    )
    return train, jnp.asarray(data.train_labels), test, jnp.asarray(data.test_labels)


def draw_batches(
    images: jax.Array, labels: jax.Array, steps: int
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """`steps` mini-batches of 100 images and labels, in one random order again and again."""
    order = np.random.default_rng(0).permutation(len(images))
    for batch in np.resize(order, (steps, 100)):
        yield images[batch], labels[batch]


def print_test_error(
    logits: Callable[[jax.Array], jax.Array], images: jax.Array, labels: jax.Array
) -> float:
    """Print and return the share of wrong answers, found in ten parts that fit any memory."""
    answers = jnp.concatenate([logits(part).argmax(-1) for part in jnp.split(images, 10)])
    error = float(jnp.mean(answers != labels))
    print(f"test error {error:.4f}")
    return error
