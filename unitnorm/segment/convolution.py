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

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Transforms(NamedTuple):
    """Real matrices of the discrete Fourier transform of 2m × 2m values; f frequencies."""

    block: np.ndarray  # (2f, m²), real and imaginary parts alternate: of the first block
    kernel: np.ndarray  # (2f, k²)
    inverse: np.ndarray  # (m², 2f): the upper left m × m values
    down: np.ndarray  # (2f, 1, 1, 1), ±1: the factor of a shift by m rows
    right: np.ndarray  # the same by m columns


@functools.cache
def transforms(k: int) -> Transforms:
    """The matrices for kernels of k × k, float32."""
    m, size = k - 1, 2 * (k - 1)
    u, v = np.indices((size, size)).reshape(2, -1)
    own, conjugate = u * size + v, -u % size * size + -v % size
    kept = own <= conjugate  # one of each pair, counted twice
    frequencies = np.stack([u, v], 1)[kept]

    def matrix(side: int) -> np.ndarray:
        angle = 2 * np.pi / size * (frequencies @ np.indices((side, side)).reshape(2, -1))
        return np.stack([np.cos(angle), -np.sin(angle)], axis=1)  # (f, 2, side²)

    inverse = matrix(m) * np.where(own == conjugate, 1, 2)[kept][:, None, None] / size**2
    found = matrix(m).reshape(-1, m * m), matrix(k).reshape(-1, k * k), inverse.reshape(-1, m * m).T
    shifts = (np.repeat((-1.0) ** f, 2)[:, None, None, None] for f in frequencies.T)
    return Transforms(*(x.astype(np.float32) for x in (*found, *shifts)))


def fourier_convolution(x: Array, kernel: Array) -> Array:
    """Cross-correlation of stride 1, zeros around: (n, h, w, c), (k, k, c, d) → (n, h, w, d).

    Equal to `jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME")`, channels last, up to
    rounding. k ≥ 2; computed in float32.
    """
    n, h, w, c = x.shape
    k, _, _, d = kernel.shape
    m, before = k - 1, (k - 1) // 2
    rows, columns = -(-h // m), -(-w // m)  # of blocks of outputs
    pads = [(before, (n + 1) * m - size - before) for n, size in ((rows, h), (columns, w))]
    x = jnp.pad(x.astype(jnp.float32), [(0, 0), *pads, (0, 0)])
    x = x.reshape(n, rows + 1, m, columns + 1, m, c).transpose(1, 2, 4, 0, 3, 5)
    x = x.reshape(rows + 1, m * m, n, columns + 1, c)
    weights = _transformed(transforms(k).kernel, kernel.astype(jnp.float32).reshape(k * k, c, d))
    w_re, w_im = weights[::2], weights[1::2]
    y = _row_by_row(k, x, jnp.stack([w_re, w_im - w_re, w_re + w_im]))
    y = y.reshape(rows, m, m, n, columns, d).transpose(3, 0, 1, 4, 2, 5)
    return y.reshape(n, rows * m, columns * m, d)[:, :h, :w]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _row_by_row(k: int, x: Array, weights: Array) -> Array:
    """All rows of outputs, (rows, m², n, columns, d), one after another: one fits the cache.

    `x` are blocks (rows + 1, m², n, columns + 1, c), `weights` the kernel's transform (3, f, c, d):
    real part, imaginary − real, real + imaginary.
    """
    block = transforms(k).block

    def step(upper: Array, row: Array) -> tuple[Array, Array]:
        lower = jnp.tensordot(block, row, 1)
        return lower, _one_row(k, upper, lower, weights)

    return jax.lax.scan(step, jnp.tensordot(block, x[0], 1), x[1:])[1]


def _backward(k: int, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    # JAX's own would keep the transforms for it: to make them again takes less time than the memory
    x, weights = kept
    block = transforms(k).block

    def step(carry: tuple[Array, Array, Array], row: tuple[Array, Array]) -> Any:
        upper, by_upper, by_weights = carry
        lower = jnp.tensordot(block, row[0], 1)
        _, transpose = jax.vjp(functools.partial(_one_row, k), upper, lower, weights)
        more, by_lower, by_these = transpose(row[1])
        by_row = jnp.tensordot(block.T, by_upper + more, 1)
        return (lower, by_lower, by_weights + by_these), by_row

    first = jnp.tensordot(block, x[0], 1)
    start = first, jnp.zeros_like(first), jnp.zeros_like(weights)
    (_, by_last, by_weights), by_rows = jax.lax.scan(step, start, (x[1:], gradient))
    by_last = jnp.tensordot(block.T, by_last, 1)
    return jnp.concatenate([by_rows, by_last[None]]), by_weights


_row_by_row.defvjp(lambda k, x, weights: (_row_by_row(k, x, weights), (x, weights)), _backward)


def _one_row(k: int, upper: Array, lower: Array, weights: Array) -> Array:
    """A row of outputs, (m², n, columns, d), from the transforms of the two rows of blocks that it
    depends on, (2f, n, columns + 1, c), and the kernel's, (3, f, c, d).
    """
    matrices = transforms(k)
    _, n, columns, c = upper.shape
    blocks = upper + matrices.down * lower
    tiles = blocks[:, :, :-1] + matrices.right * blocks[:, :, 1:]
    x = tiles.reshape(-1, 2, n * (columns - 1), c)
    x_re, x_im = x[:, 0], x[:, 1]
    common = (x_re + x_im) @ weights[0]  # times the kernel's conjugate
    y = jnp.stack([common + x_im @ weights[1], common - x_re @ weights[2]], 1)
    return _transformed(matrices.inverse, y.reshape(-1, n, columns - 1, weights.shape[-1]))


def _transformed(matrix: np.ndarray, x: Array) -> Array:
    """The matrix times the first axis of x.

    Its derivative is the transposed matrix times the first axis, too. The one that JAX finds is the
    same, but with that axis last, which takes turning all values around and back.
    """
    times = jax.custom_vjp(lambda x: jnp.tensordot(matrix, x, 1))
    times.defvjp(
        lambda x: (times(x), None), lambda _, gradient: (jnp.tensordot(matrix.T, gradient, 1),)
    )
    return times(x)
