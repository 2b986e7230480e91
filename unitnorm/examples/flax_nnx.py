"""A Flax NNX network at unit norm: python -m unitnorm.examples.flax_nnx [STEPS].

An ordinary training on the bundled MNIST, but for one line of `main`.
"""

import sys

import jax
import optax
from flax import nnx

from unitnorm.examples.mnist import draw_batches, mnist_arrays, print_test_error
from unitnorm.updates import build, normalized_kernels_nnx


class CNN(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv1, self.norm1 = nnx.Conv(1, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.conv2, self.norm2 = nnx.Conv(8, 16, (3, 3), rngs=rngs), nnx.BatchNorm(16, rngs=rngs)
        self.classifier = nnx.Linear(16 * 7 * 7, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            x = nnx.max_pool(nnx.relu(norm(conv(x))), (2, 2), (2, 2))
        return self.classifier(x.reshape(len(x), -1))


@nnx.jit
def train(model: CNN, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> None:
    def loss(model: CNN) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    optimizer.update(model, nnx.grad(loss)(model))


def main(steps: int = 600) -> float:
    images, labels, test_images, test_labels = mnist_arrays(28, 28, 1)
    model = CNN(nnx.Rngs(0))
    # With SGD the next line reads: update = optax.sgd(0.1)
    update = build("un", 0.1, normalized_kernels_nnx(model, images[:100]))
    optimizer = nnx.Optimizer(model, update, wrt=nnx.Param)
    for batch in draw_batches(images, labels, steps):
        train(model, optimizer, *batch)
    model.eval()
    classify = nnx.jit(lambda model, images: model(images))
    return print_test_error(lambda images: classify(model, images), test_images, test_labels)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
