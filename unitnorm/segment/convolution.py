"""Convolution by products of Fourier transforms of small tiles: fewer operations for large kernels.

A k × k correlation costs k² multiplications for each pixel and pair of channels. Here the image is
cut into blocks of m = k − 1 pixels a side; two by two of them, 2m × 2m pixels, are what m × m
outputs depend on. Their discrete Fourier transform times the conjugate of the kernel's is the
transform of those outputs (overlap-save). Of real values half of the frequencies are enough, and a
complex product takes three real ones (Gauss), so that k = 7 costs about 6 multiplications for each
pixel and pair of channels instead of 49, as matrix products over the channels. Transforms are
products with small matrices; the transform of a tile is a sum of its four blocks', since a shift by
m is a factor of ±1. Exact up to rounding, for every kernel of 2 × 2 and more.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Transforms(NamedTuple):
    """Real matrices of the discrete Fourier transform of 2m × 2m values; f frequencies."""

    block: np.ndarray  # (2f, m²), real and imaginary parts alternate: of the first block
    kernel: np.ndarray  # (2f, k²)
    inverse: np.ndarray  # (m², 2f): the upper left m × m values
    down: np.ndarray  # (f,), ±1: the factor of a shift by m rows
    right: np.ndarray  # (f,), ±1: the factor of a shift by m columns


@functools.cache
def transforms(k: int) -> Transforms:
    """The matrices for kernels of k × k, float32."""
    m = k - 1
    size = 2 * m
    pairs = [(u, v) for u in range(size) for v in range(size)]
    # of each pair of conjugate frequencies one is kept, and counted twice
    kept = np.array([p for p in pairs if p <= ((-p[0]) % size, (-p[1]) % size)])
    twice = np.array([1.0 if (u, v) == ((-u) % size, (-v) % size) else 2.0 for u, v in kept])

    def matrix(side: int) -> np.ndarray:
        places = np.array([(i, j) for i in range(side) for j in range(side)])
        angle = 2 * np.pi / size * (kept @ places.T)
        return np.stack([np.cos(angle), -np.sin(angle)], axis=1)  # (f, 2, side²)

    inverse = matrix(m) * twice[:, None, None] / size**2
    return Transforms(
        block=matrix(m).reshape(-1, m * m).astype(np.float32),
        kernel=matrix(k).reshape(-1, k * k).astype(np.float32),
        inverse=inverse.reshape(-1, m * m).T.astype(np.float32),
        down=((-1.0) ** kept[:, 0]).astype(np.float32),
        right=((-1.0) ** kept[:, 1]).astype(np.float32),
    )


def fourier_convolution(x: Array, kernel: Array) -> Array:
    """Cross-correlation of stride 1, zeros around: (n, h, w, c), (k, k, c, d) → (n, h, w, d).

    Equal to `jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME")`, channels last, up to
    rounding. k ≥ 2; computed in float32.
    """
    n, h, w, c = x.shape
    k, _, _, d = kernel.shape
    matrices, m, before = transforms(k), k - 1, (k - 1) // 2
    rows, columns = -(-h // m), -(-w // m)  # of blocks of outputs

    # blocks: (m², n, rows + 1, columns + 1, c)
    pads = [
        (before, (blocks + 1) * m - size - before) for blocks, size in [(rows, h), (columns, w)]
    ]
    x = jnp.pad(x.astype(jnp.float32), [(0, 0), *pads, (0, 0)])
    x = x.reshape(n, rows + 1, m, columns + 1, m, c).transpose(2, 4, 0, 1, 3, 5)
    x = _transformed(matrices.block, x.reshape(m * m, n, rows + 1, columns + 1, c))
    x = x.reshape(-1, 2, n, rows + 1, columns + 1, c)

    weights = _transformed(matrices.kernel, kernel.astype(jnp.float32).reshape(k * k, c, d))
    y = _at_each_frequency(x, weights.reshape(-1, 2, c, d), matrices.down, matrices.right)

    y = _transformed(matrices.inverse, y.reshape(-1, n, rows, columns, d))
    y = y.reshape(m, m, n, rows, columns, d).transpose(2, 3, 0, 4, 1, 5)
    return y.reshape(n, rows * m, columns * m, d)[:, :h, :w]


def _transformed(matrix: np.ndarray, x: Array) -> Array:
    """The matrix times the first axis of x.

    Its derivative is the transposed matrix times the first axis, too. The one that JAX finds is the
    same, but with that axis last, which takes turning all values around and back.
    """

    @jax.custom_vjp
    def times(x: Array) -> Array:
        return jnp.tensordot(matrix, x, 1)

    def forward(x: Array) -> tuple[Array, None]:
        return times(x), None

    def backward(_: None, gradient: Array) -> tuple[Array]:
        return (jnp.tensordot(matrix.T, gradient, 1),)

    times.defvjp(forward, backward)
    return times(x)


def _at_each_frequency(x: Array, w: Array, down: np.ndarray, right: np.ndarray) -> Array:
    """Tiles made of blocks, times the conjugate of the kernel, at each of f frequencies.

    Args:
      x: blocks (f, 2, n, rows + 1, columns + 1, c), real and imaginary parts.
      w: kernel (f, 2, c, d).
      down, right: see `Transforms`.

    Returns:
      (f, 2, n · rows · columns, d).
    """

    # the derivative makes the tiles again: to keep them takes new memory, which costs more
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def at_one(operands: tuple[Array, Array, Array, Array]) -> Array:
        blocks, (w_re, w_im), down, right = operands
        x = blocks[:, :, :-1] + down * blocks[:, :, 1:]
        x = x[:, :, :, :-1] + right * x[:, :, :, 1:]
        x_re, x_im = x.reshape(2, -1, x.shape[-1])
        common = (x_re + x_im) @ w_re
        return jnp.stack([common + x_im @ (w_im - w_re), common - x_re @ (w_re + w_im)])

    # one after another: what belongs to one fits the cache
    return jax.lax.map(at_one, (x, w, jnp.asarray(down), jnp.asarray(right)))
