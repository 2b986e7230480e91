"""A dictionary of arrays at unit norm: python -m unitnorm.examples.plain_dict [STEPS].

An ordinary training on the bundled MNIST, but for one line of `main`.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unitnorm.examples.mnist import draw_batches, mnist_arrays, print_test_error
from unitnorm.updates import build, normalized_kernels

Params = dict[str, jax.Array]


def apply(params: Params, images: jax.Array, seen: jax.Array) -> jax.Array:
    """Logits, with the mean and variance of the features over the images `seen`."""
    features, over = images @ params["hidden"], seen @ params["hidden"]
    normalised = (features - over.mean(0)) / jnp.sqrt(over.var(0) + 1e-5)
    return jax.nn.relu(normalised * params["scale"] + params["shift"]) @ params["classifier"]


def main(steps: int = 600) -> float:
    images, labels, test_images, test_labels = mnist_arrays(28 * 28)
    keys = jax.random.split(jax.random.key(0))
    params = {
        "hidden": jax.random.normal(keys[0], (28 * 28, 64)) / 28,
        "scale": jnp.ones(64),
        "shift": jnp.zeros(64),
        "classifier": jax.random.normal(keys[1], (64, 10)) / 8,
    }
    kernels = normalized_kernels(lambda p: apply(p, images[:100], images[:100]), params)
    # With SGD the next line reads: update = optax.sgd(0.1)
    update = build("un", 0.1, kernels)
    state = update.init(params)

    @jax.jit
    def train(params: Params, state: Any, images: jax.Array, labels: jax.Array) -> Any:
        def loss(params: Params) -> jax.Array:
            logits = apply(params, images, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        step, state = update.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, step), state

    for batch in draw_batches(images, labels, steps):
        params, state = train(params, state, *batch)
    return print_test_error(lambda x: apply(params, x, images[:5000]), test_images, test_labels)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
