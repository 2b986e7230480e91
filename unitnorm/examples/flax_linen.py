"""A Flax Linen network at unit norm: python -m unitnorm.examples.flax_linen [STEPS].

An ordinary training on the bundled MNIST, but for one line of `main`.
"""

import sys
from typing import Any

import jax
import optax
from flax import linen as nn

from unitnorm.examples.mnist import draw_batches, mnist_arrays, print_test_error
from unitnorm.updates import build, normalized_kernels


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, training: bool = True) -> jax.Array:
        for features in (8, 16):
            x = nn.BatchNorm(use_running_average=not training)(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


@jax.jit
def apply(params: Any, statistics: Any, images: jax.Array) -> tuple[jax.Array, Any]:
    return CNN().apply({"params": params, **statistics}, images, mutable=["batch_stats"])


def main(steps: int = 600) -> float:
    images, labels, test_images, test_labels = mnist_arrays(28, 28, 1)
    statistics = dict(CNN().init(jax.random.key(0), images[:100]))
    params = statistics.pop("params")
    kernels = normalized_kernels(lambda p: apply(p, statistics, images[:100]), params)
    # With AdamW alone the next line reads: update = optax.adamw(1e-3)
    update = build("un", 0.1, kernels, rest=optax.adamw(1e-3))
    state = update.init(params)

    @jax.jit
    def train(params: Any, statistics: Any, state: Any, images: Any, labels: Any) -> Any:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            logits, new = apply(params, statistics, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

        gradients, statistics = jax.grad(loss, has_aux=True)(params)
        step, state = update.update(gradients, state, params)
        return optax.apply_updates(params, step), statistics, state

    for batch in draw_batches(images, labels, steps):
        params, statistics, state = train(params, statistics, state, *batch)
    variables = {"params": params, **statistics}
    classify = jax.jit(lambda images: CNN().apply(variables, images, training=False))
    return print_test_error(classify, test_images, test_labels)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
