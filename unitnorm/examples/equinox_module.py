"""An Equinox network at unit norm: python -m unitnorm.examples.equinox_module [STEPS].

An ordinary training on the bundled MNIST, but for one line of `main`.
"""

import sys
from typing import Any

import equinox as eqx
import jax
import optax
from equinox import nn

from unitnorm.examples.mnist import draw_batches, mnist_arrays, print_test_error
from unitnorm.updates import build, normalized_kernels


def network(key: jax.Array) -> nn.Sequential:
    keys, layers = jax.random.split(key, 3), list[Any]()
    for before, after, key in ((1, 8, keys[0]), (8, 16, keys[1])):
        layers.append(nn.Conv2d(before, after, 3, padding=1, key=key))
        layers.append(nn.BatchNorm(after, "batch", momentum=0.9, mode="batch"))
        layers.extend([nn.Lambda(jax.nn.relu), nn.MaxPool2d(2, 2)])
    return nn.Sequential([*layers, nn.Lambda(jax.numpy.ravel), nn.Linear(784, 10, key=keys[2])])


@eqx.filter_jit
def apply(model: nn.Sequential, running: nn.State, images: jax.Array) -> tuple[jax.Array, nn.State]:
    return jax.vmap(model, (0, None), (0, None), axis_name="batch")(images, running)


def main(steps: int = 600) -> float:
    images, labels, test_images, test_labels = mnist_arrays(1, 28, 28)
    model, running = nn.make_with_state(network)(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    batch = images[:100]
    kernels = normalized_kernels(lambda p: apply(eqx.combine(p, static), running, batch), params)
    # With SGD the next line reads: update = optax.sgd(0.1)
    update = build("un", 0.1, kernels)
    state = update.init(params)

    @eqx.filter_jit
    def train(params: Any, running: nn.State, state: Any, images: Any, labels: Any) -> Any:
        def loss(params: Any) -> tuple[jax.Array, nn.State]:
            logits, new = apply(eqx.combine(params, static), running, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

        gradients, running = jax.grad(loss, has_aux=True)(params)
        step, state = update.update(gradients, state, params)
        return optax.apply_updates(params, step), running, state

    for drawn in draw_batches(images, labels, steps):
        params, running, state = train(params, running, state, *drawn)
    trained = nn.inference_mode(eqx.combine(params, static))
    return print_test_error(lambda x: apply(trained, running, x)[0], test_images, test_labels)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
