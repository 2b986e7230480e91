"""The oblique manifold: arrays whose filters have unit norm. Pure functions on single arrays.

A *filter* is what the paper calls a row of W. Its entries run over the axes named by `axis`, which
defaults to every axis but the last: the columns of a Flax dense kernel (in, out), and the last
index of a convolution kernel (kh, kw, in, out). Every other axis counts filters.

Everything here is computed in at least float32 and returned in the dtype of the input. Filters of
any norm are taken as they are: those whose squares would leave the range of the numbers are scaled
by a power of two first, which changes no bit of the others.
"""

import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Axis = int | Sequence[int] | None

VECTOR = 8  # float32 numbers that a CPU adds at once
SHORT = 64  # a row that XLA on a CPU adds as fast by itself
MOST_PIECES = 128  # of a row, each of which is code of its own


def filter_axes(shape: Sequence[int], axis: Axis = None, name: str = "array") -> tuple[int, ...]:
    """The axes over which one filter runs, as sorted non-negative integers.

    Raises:
        ValueError: no axis is given and the array, called `name`, has fewer than two; or an axis is
            out of range, named twice, or no integer.

    >>> filter_axes((3, 3, 8, 16))  # a convolution kernel: sixteen filters
    (0, 1, 2)
    >>> filter_axes((64, 784), axis=-1)  # rows
    (1,)
    """
    shape = tuple(shape)
    if axis is None:
        if len(shape) < 2:
            raise ValueError(
                f"{name} of shape {shape} holds no filters: by default a filter runs over every "
                "axis but the last, which needs two or more; leave it to another optimiser "
                "(optax.partition) or name the axes with axis="
            )
        return tuple(range(len(shape) - 1))
    try:
        given = tuple(map(operator.index, axis if isinstance(axis, Sequence) else (axis,)))
    except TypeError:
        raise ValueError(
            f"{name} of shape {shape}: axis must be an integer or a tuple of integers, got "
            f"{axis!r}; optax.inject_hyperparams needs static_args=('axis',)"
        ) from None
    axes = tuple(sorted(a % len(shape) for a in given if -len(shape) <= a < len(shape)))
    if not axes or len(axes) < len(given) or len(set(axes)) < len(axes):
        raise ValueError(
            f"{name} of shape {shape} has no filters over axis={axis!r}: expected different axes "
            f"from {-len(shape)} to {len(shape) - 1}"
        )
    return axes


def filter_norms(w: jax.Array, axis: Axis = None, *, keepdims: bool = False) -> jax.Array:
    """Euclidean norm of each filter, in at least float32.

    With `keepdims` the summed axes stay with length one, so that the norms broadcast against `w`.

    Raises:
        ValueError: see `filter_axes`; or `w` is complex.

    >>> import jax.numpy as jnp
    >>> kernel = jnp.array([[3.0, 0.0], [4.0, 2.0]])  # (in, out): two filters
    >>> print(filter_norms(kernel), filter_norms(kernel, axis=-1))
    [5. 2.] [3.       4.472136]
    """
    axes = filter_axes(jnp.shape(w), axis)
    scale = power_of_two(wide(w), axes)
    norms = norms_of(wide(w) * scale, axes) / scale
    return norms if keepdims else jnp.squeeze(norms, axes)


def tangent_projection(w: jax.Array, z: jax.Array, axis: Axis = None) -> jax.Array:
    """Project `z` onto the tangent space at w/‖w‖: Π_w(z) = z − (⟨w, z⟩ / ⟨w, w⟩) w, per filter.

    At unit norm this is Π_W(Z) = Z − Diag(diag(Z Wᵀ)) W below Table 1, with the paper's rows as
    filters. A zero filter has no tangent space, and its `z` comes back unchanged. The result has
    the shape, which is that of `w` too, and the dtype of `z`.

    Raises:
        ValueError: see `filter_axes`; or an array is complex.

    >>> import jax.numpy as jnp
    >>> w, z = jnp.array([[1.0], [0.0]]), jnp.array([[5.0], [7.0]])
    >>> print(tangent_projection(w, z).ravel())
    [0. 7.]
    """
    axes = filter_axes(jnp.shape(w), axis)
    w = wide(w) * power_of_two(wide(w), axes)
    return project(w, wide(z), axes).astype(jnp.result_type(z))


def retraction(w: jax.Array, axis: Axis = None) -> jax.Array:
    """Divide each filter by its norm: Orth(·) of Table 1.

    A zero filter has no direction and stays zero, without NaN. One with an infinite entry becomes
    NaN, because zeros would let a diverged run pass for a dead filter. The result has the shape and
    dtype of `w`.

    Raises:
        ValueError: see `filter_axes`; or `w` is complex.

    >>> import jax.numpy as jnp
    >>> print(retraction(jnp.array([[3.0, 0.0], [4.0, 0.0]])))
    [[0.6 0. ]
     [0.8 0. ]]
    """
    axes = filter_axes(jnp.shape(w), axis)
    scaled = wide(w) * power_of_two(wide(w), axes)
    return unit(scaled, axes).astype(jnp.result_type(w))


# --- Inside an update: arrays in at least float32, `axes` as `filter_axes` gives them and kept at
# length one by all that sums, and squares that are in range.


def wide(x: jax.Array) -> jax.Array:
    """The array in at least float32; ValueError for a complex one."""
    dtype = jnp.promote_types(jnp.result_type(x), jnp.float32)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(f"filters are real, got {dtype}: keep real and imaginary parts apart")
    return jnp.asarray(x, dtype)


def norms_of(w: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(inner(w, w, axes))


def project(
    w: jax.Array, z: jax.Array, axes: tuple[int, ...], squared: jax.Array | None = None
) -> jax.Array:
    """`tangent_projection`; `squared` is ⟨w, w⟩ of each filter, where it is known."""
    squared = inner(w, w, axes) if squared is None else squared
    return z - inner(w, z, axes) / jnp.where(squared == 0, 1, squared) * w


def unit(w: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return w * inverse_norms(norms_of(w, axes))


def inverse_norms(norms: jax.Array) -> jax.Array:
    """What a filter of each norm is multiplied by in its `retraction`: 1 for zero, NaN for ∞."""
    return jnp.where(jnp.isinf(norms), jnp.nan, 1 / jnp.where(norms == 0, 1, norms))


def power_of_two(w: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """What brings each filter's largest entry to between 1/2 and 1; 1 if it is 0 or not finite."""
    largest = jnp.max(jnp.abs(w), axes, keepdims=True, initial=0)
    least = jnp.finfo(w.dtype).minexp  # powers of two below it are flushed to zero
    exponent = jnp.clip(jnp.frexp(largest)[1], least, -least)
    usable = (largest > 0) & jnp.isfinite(largest)
    return jnp.ldexp(jnp.ones_like(largest), jnp.where(usable, -exponent, 0))


def inner(a: jax.Array, b: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Inner product of each pair of filters.

    The first sums over any axis but the last are pairwise: XLA on a CPU adds a column entry by
    entry, and folding the array first is both closer (which keeps norms within 1e-6 of one for
    wide filters) and faster, since whole rows are added at once. More than four folds gain nothing.
    """
    product = a * b
    folds = 4
    for axis in axes:
        if axis == product.ndim - 1 or _on_several_devices(product, axis):
            continue
        while folds and product.shape[axis] > 1 and product.shape[axis] % 2 == 0:
            product = jnp.add(*jnp.split(product, 2, axis))
            folds -= 1
    return jnp.sum(product, axes, keepdims=True)


def row_sums(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Sum of function(*arrays), which works entry by entry, over the last axis, kept at length one.

    Pairwise, in pieces of a few neighbours that go through `function` on their own: on a CPU, XLA
    makes one vectorised loop of that, without the array of the terms.
    """
    size = arrays[0].shape[-1]
    width = VECTOR
    while size % width == 0 and size // width > MOST_PIECES:
        width *= 2
    if size <= SHORT or size % width or _on_several_devices(arrays[0], -1):
        return jnp.sum(function(*arrays), -1, keepdims=True)
    parts = (jax.lax.split(array, [width] * (size // width), -1) for array in arrays)
    # traced once for all pieces, as `+` of JAX arrays would not be
    function = jax.jit(function, inline=True)
    pieces = [function(*part) for part in zip(*parts, strict=True)]
    while len(pieces) > 1:
        pairs = [jax.lax.add(*pieces[i : i + 2]) for i in range(0, len(pieces) - 1, 2)]
        pieces = pairs + pieces[2 * len(pairs) :]
    return jnp.sum(pieces[0], -1, keepdims=True)


def median(x: jax.Array) -> jax.Array:
    """The median of all numbers, of every device."""
    spec = jax.typeof(x).sharding.spec
    return jnp.median(jax.sharding.reshard(x, jax.P()) if any(spec) else x)


def _on_several_devices(x: jax.Array, axis: int) -> bool:
    """Whether the axis is split over devices of a mesh with explicit axes: it cannot be cut."""
    spec = jax.typeof(x).sharding.spec
    return bool(spec) and spec[axis] is not None
