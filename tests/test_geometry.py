"""The oblique manifold against float64 NumPy, written filter by filter."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unitnorm import geometry

filter_norms = jax.jit(geometry.filter_norms, static_argnames=("axis", "keepdims"))
tangent_projection = jax.jit(geometry.tangent_projection, static_argnames="axis")
retraction = jax.jit(geometry.retraction, static_argnames="axis")

# shape, axis as given, axes over which one filter runs
ARRAYS = [
    pytest.param((12, 5), None, (0,), id="dense"),
    pytest.param((3, 3, 4, 6), None, (0, 1, 2), id="conv"),
    pytest.param((5, 12), 1, (1,), id="rows"),
    pytest.param((5, 12), -1, (1,), id="rows-negative"),
    pytest.param((6, 3, 4, 3), (-1, 1, 2), (1, 2, 3), id="conv-first"),
    pytest.param((4, 7, 3), (1,), (1,), id="stacked-dense"),
    pytest.param((9,), 0, (0,), id="vector"),
    pytest.param((4, 3), (0, 1), (0, 1), id="one-filter"),
]


def filters_of(shape, axes):
    """An index for each filter: one place along every axis that counts filters."""
    places = [[slice(None)] if a in axes else range(n) for a, n in enumerate(shape)]
    return itertools.product(*places)


def random(shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize(("shape", "axis", "axes"), ARRAYS)
def test_norms_projection_and_retraction_filter_by_filter(shape, axis, axes):
    w, z = random(shape, 1, 3.0), random(shape, 2)
    projected, unit = np.empty(shape), np.empty(shape)
    norms = []
    for filter in filters_of(shape, axes):
        norm = np.linalg.norm(w[filter].ravel())
        norms.append(norm)
        unit[filter] = w[filter] / norm
        projected[filter] = z[filter] - np.vdot(unit[filter], z[filter]) * unit[filter]
    with jax.enable_x64(True):
        np.testing.assert_allclose(np.ravel(filter_norms(w, axis)), norms, rtol=1e-14)
        kept = filter_norms(w, axis, keepdims=True)
        assert kept.shape == tuple(1 if a in axes else n for a, n in enumerate(shape))
        np.testing.assert_allclose(tangent_projection(w, z, axis), projected, rtol=0, atol=1e-14)
        np.testing.assert_allclose(retraction(w, axis), unit, rtol=1e-14)


def test_a_zero_filter_stays_zero_and_one_that_is_not_finite_is_not_taken_for_it():
    w = jnp.array([[3.0, 0.0, jnp.inf, jnp.nan], [4.0, 0.0, 0.0, 0.0]], jnp.float32)
    nan = np.nan
    np.testing.assert_allclose(retraction(w), [[0.6, 0, nan, nan], [0.8, 0, nan, nan]], rtol=1e-7)
    z = jnp.ones_like(w)  # a zero filter has no tangent space
    np.testing.assert_allclose(tangent_projection(w, z)[:, :2], [[0.16, 1], [-0.12, 1]], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_filters_of_any_norm_are_taken_as_they_are(dtype):
    with jax.enable_x64(True):
        sizes = [1e-25, 1e20, 3e38, 2e-38, 1.0] if dtype == "float32" else [1e-200, 1e200, 1e307]
        sizes = jnp.array(sizes, dtype)
        w = jnp.array([[0.6], [0.8]], dtype) * sizes
        z = jnp.array([[1.0], [0.0]], dtype) / sizes
        tolerance = 4 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(filter_norms(w) / sizes, 1, rtol=tolerance)
        for unit, tangent, size in zip(
            retraction(w).T, tangent_projection(w, z).T, sizes, strict=True
        ):
            np.testing.assert_allclose(unit, [0.6, 0.8], rtol=tolerance)
            if 1e-30 < size < 1e30 or dtype == "float64":  # else the gradient is out of range
                np.testing.assert_allclose(tangent * size, [0.64, -0.48], rtol=10 * tolerance)


def test_complex_arrays_are_refused():
    with pytest.raises(ValueError, match="filters are real, got complex64"):
        geometry.retraction(jnp.ones((2, 2), jnp.complex64))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_computed_in_float32(dtype):
    w, z = (jnp.asarray(random((784, 3), seed), dtype) for seed in (1, 2))
    w64, z64 = np.asarray(w, np.float64), np.asarray(z, np.float64)
    unit64 = w64 / np.linalg.norm(w64, axis=0)
    projected64 = z64 - unit64 * (unit64 * z64).sum(0)
    one_rounding = float(jnp.finfo(dtype).eps) / 2 * 1.001
    unit, projected = retraction(w), tangent_projection(w, z)
    assert unit.dtype == projected.dtype == dtype
    assert filter_norms(w).dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(unit, float), unit64, rtol=one_rounding, atol=1e-6)
    np.testing.assert_allclose(
        np.asarray(projected, float), projected64, rtol=one_rounding, atol=1e-6
    )


@pytest.mark.parametrize(("shape", "axis"), [((3, 3, 512, 8), (0, 1, 2)), ((8, 4608), (1,))])
def test_wide_filters_are_normalised_to_rounding(shape, axis):
    w = retraction(jnp.asarray(random(shape), jnp.float32), axis)
    norms = np.sqrt((np.asarray(w, np.float64) ** 2).sum(axis))
    np.testing.assert_allclose(norms, 1, rtol=0, atol=3e-7)


@pytest.mark.parametrize("size", [0, 1, 40, 784, 1032, 2056])
def test_row_sums_are_sums_whatever_the_size(size):
    a, b = random((2, 3, size), 1), random((2, 3, size), 2)
    with jax.enable_x64(True):
        found = geometry.row_sums(lambda a, b: a * (b + 1), a, b)
        np.testing.assert_allclose(found, (a * (b + 1)).sum(-1, keepdims=True), atol=1e-12)
    found = geometry.row_sums(jnp.square, jnp.asarray(a, jnp.float32))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, (a**2).sum(-1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "axis", "complaint"),
    [
        ((64,), None, "two or more"),
        ((), 0, "no filters over axis=0"),
        ((3, 4), 2, "from -2 to 1"),
        ((3, 4), -3, "from -2 to 1"),
        ((3, 4), (0, -2), r"axis=\(0, -2\)"),
        ((3, 4), (), "different axes"),
        ((3, 4), 1.0, "static_args"),
        ((3, 4), "0", "integer"),
    ],
)
def test_axes_that_name_no_filters_are_refused(shape, axis, complaint):
    with pytest.raises(ValueError, match=complaint) as caught:
        geometry.filter_axes(shape, axis, "conv1/kernel")
    assert "conv1/kernel" in str(caught.value)
    assert str(shape) in str(caught.value)
    assert "\n" not in str(caught.value)
