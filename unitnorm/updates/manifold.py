"""The updates that keep every filter at unit norm: one function each.

All share the arguments `learning_rate` (a number, a traced scalar or an optax schedule), `axis`
(axes over which one filter runs, by default every axis but the last; see `parts.AxisSpec`) and
`off_manifold` ("normalize", "raise" or "trust"; see `parts.retract`), and all raise ValueError for
a leaf without filters. Send biases, scales and classifiers elsewhere, with `updates.build` or
optax.partition. The update is a displacement: optax.apply_updates lands on the manifold, and
nothing may scale it afterwards. Weight decay is not offered: followed by a normalisation it shrinks
nothing and only changes the size of the step in secret.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from unitnorm import geometry
from unitnorm.updates.parts import (
    AxisSpec,
    LearningRate,
    OffManifold,
    map_filters,
    normalized_gradient,
    retract,
    retracted,
    riemannian_gradient,
    riemannian_gradient_of,
    tangent_momentum,
)


def un(
    learning_rate: LearningRate,
    *,
    axis: AxisSpec = None,
    off_manifold: OffManifold = "normalize",
) -> optax.GradientTransformationExtraArgs:
    """Riemannian gradient descent on the oblique manifold, the paper's UN: w ← Orth(w − λ Π_w(∇ℓ)).

    Π_w projects onto the tangent space and Orth divides by the norm, per filter. It holds no state
    unless `learning_rate` is a schedule.

    It is the chain of `riemannian_gradient`, the learning rate and `retract`. Small leaves of rows
    (filters over the last axis) that are trusted to be on the manifold take the same step to
    rounding in fewer passes over the memory, for a longer compilation (`_row_step`).

    The promise, and what is left of the symmetry: on a network whose filters are normalised, UN
    goes the same way from every positive scaling of the filters. It does not undo the scalings that
    are left once norms are fixed: where only ReLU or maximum pooling stand between two layers, (γ,
    β) of a feature times c > 0 and the next layer's weights for that feature divided by c give the
    same outputs; UN, as every update here, goes another way from there.

    Raises:
        ValueError: by `init` and `update`, for a leaf without filters; see `parts.retract`.

    Source: Badrinarayanan, Mishra and Cipolla (2015), equation (2) and Table 1.

    >>> import jax.numpy as jnp, optax, unitnorm
    >>> params = {"kernel": jnp.array([[0.6, 1.0], [0.8, 0.0]])}  # (in, out): two filters
    >>> gradients = {"kernel": jnp.ones((2, 2))}
    >>> optimiser = unitnorm.un(0.5)
    >>> updates, _ = optimiser.update(gradients, optimiser.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    >>> print(jnp.round(unitnorm.filter_norms(params["kernel"]), 4))
    [1. 1.]
    """
    scale, last = optax.scale_by_learning_rate(learning_rate), retract(axis, off_manifold)

    def init(params: optax.Params) -> optax.OptState:
        last.init(params)  # refuses what has no filters, or is off the manifold
        return scale.init(params)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        factor, state = scale.update(jnp.ones([]), state)  # −λ, also of a schedule

        def leaf(axes: tuple[int, ...], w: jax.Array, g: jax.Array) -> jax.Array:
            if axes == (w.ndim - 1,) and w.size <= ROW_STEP_SIZE and off_manifold == "trust":
                return _row_step(w, g, factor)
            return retracted(axes, w, factor * riemannian_gradient_of(axes, w, g))

        return map_filters(leaf, axis, params, updates), state

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))


# Measured on two cores: up to here, which holds the layers of Table 2, `_row_step` is up to three
# times as fast as the chain; at 256 × 1152 and above it is slower, and its compilation takes long.
ROW_STEP_SIZE = 1 << 16


def _row_step(w: jax.Array, g: jax.Array, factor: jax.Array) -> jax.Array:
    """The displacement of UN for unit filters w over the last axis, with tangent gradient g.

    Orth(w/‖w‖ − λ ‖w‖ Π_w(g)) = Orth(w − λ ⟨w, w⟩ (g − ⟨w, g⟩/⟨w, w⟩ w)), `factor` being −λ: with
    two numbers for each filter nothing as large as w has to be kept between w and its new value.
    Trust spares one sum: in long rows that of ⟨w, w⟩, which is 1 but for rounding; in short ones
    that of the norm, made by Pythagoras of ⟨w, w⟩, ⟨w, g⟩ and ⟨g, g⟩, which would cancel where g is
    nearly parallel to w.
    """
    w_wide, g_wide = geometry.wide(w), geometry.wide(g)
    short = w.shape[-1] <= geometry.SHORT
    inner = geometry.row_sums(jnp.multiply, w_wide, g_wide)
    squared = geometry.row_sums(jnp.square, w_wide) if short else jnp.ones_like(inner)
    share = inner / jnp.where(squared == 0, 1, squared)
    rate = factor * squared

    def step(w: jax.Array, g: jax.Array) -> jax.Array:
        return w + rate * (g - share * w)

    if short:
        tangent_squared = geometry.row_sums(jnp.square, g_wide) - inner * share
        new_squared = squared + rate**2 * jnp.maximum(tangent_squared, 0)
    else:
        new_squared = geometry.row_sums(lambda w, g: jnp.square(step(w, g)), w_wide, g_wide)
    new = step(w_wide, g_wide) * geometry.inverse_norms(jnp.sqrt(new_squared))
    return (new - w_wide).astype(w.dtype)


def un_momentum(
    learning_rate: LearningRate,
    momentum: float | jax.Array = 0.9,
    *,
    axis: AxisSpec = None,
    off_manifold: OffManifold = "normalize",
) -> optax.GradientTransformation:
    """UN with heavy-ball momentum: m ← μ Π_w(m) + Π_w(∇ℓ), w ← Orth(w − λ m).

    The buffer starts at zero, so that the first step is UN's, and is kept tangent by projection at
    the current point.

    Source: optax.sgd(momentum=μ), with the projection as vector transport; Absil, Mahony and
    Sepulchre (2008), Optimization Algorithms on Matrix Manifolds, section 8.1.3.

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.array([[1.0], [0.0]]), jnp.array([[5.0], [1.0]])
    >>> tx = unitnorm.un_momentum(0.1)
    >>> state = tx.init(w)
    >>> for _ in range(2):
    ...     step, state = tx.update(g, state, w)
    ...     w = w + step
    >>> print(jnp.arctan2(w[1], w[0]).round(2))
    [-0.32999998]
    """
    return optax.chain(
        riemannian_gradient(axis),
        tangent_momentum(momentum, axis=axis),
        optax.scale_by_learning_rate(learning_rate),
        retract(axis, off_manifold),
    )


def un_nesterov(
    learning_rate: LearningRate,
    momentum: float | jax.Array = 0.9,
    *,
    axis: AxisSpec = None,
    off_manifold: OffManifold = "normalize",
) -> optax.GradientTransformation:
    """UN with Nesterov momentum: m ← μ Π_w(m) + r, w ← Orth(w − λ (r + μ m)), r = Π_w(∇ℓ).

    The parameters are the point looked ahead to, as in optax.sgd(nesterov=True), whose first step
    is 1 + μ times the plain one for the same reason.

    Source: Sutskever et al. (2013), in the form of optax.sgd; transport as in `un_momentum`.

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.array([[1.0], [0.0]]), jnp.array([[5.0], [1.0]])
    >>> tx = unitnorm.un_nesterov(0.1)
    >>> state = tx.init(w)
    >>> for _ in range(2):
    ...     step, state = tx.update(g, state, w)
    ...     w = w + step
    >>> print(jnp.arctan2(w[1], w[0]).round(2))
    [-0.61]
    """
    return optax.chain(
        riemannian_gradient(axis),
        tangent_momentum(momentum, nesterov=True, axis=axis),
        optax.scale_by_learning_rate(learning_rate),
        retract(axis, off_manifold),
    )


def un_adam(
    learning_rate: LearningRate,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    *,
    axis: AxisSpec = None,
    off_manifold: OffManifold = "normalize",
) -> optax.GradientTransformation:
    """Riemannian Adam: r = Π_w(∇ℓ), m ← b1 Π_w(m) + (1−b1) r, v ← b2 v + (1−b2) ‖r‖².

    Then w ← Orth(w − λ m̂ / (√v̂ + eps)), both moments corrected for their zero start. The second
    moment is one number per filter, not per entry: dividing entries by numbers of their own would
    turn the step out of the tangent space. So λ is an angle in radians, the first step's exactly
    (up to the retraction), whatever the width of the filter.

    Source: Bécigneul and Ganea (2019), Riemannian adaptive optimization methods, without the
    maximum of AMSGrad; each filter is one factor of the product manifold.

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.array([[1.0], [0.0]]), jnp.array([[5.0], [100.0]])
    >>> tx = unitnorm.un_adam(0.1)  # radians, whatever the gradient
    >>> step, _ = tx.update(g, tx.init(w), w)
    >>> w = w + step
    >>> print(jnp.arctan2(w[1], w[0]).round(3))
    [-0.1]
    """
    return optax.chain(
        riemannian_gradient(axis),
        _scale_by_tangent_adam(b1, b2, eps, axis),
        optax.scale_by_learning_rate(learning_rate),
        retract(axis, off_manifold),
    )


def normalize(
    learning_rate: LearningRate,
    *,
    axis: AxisSpec = None,
    off_manifold: OffManifold = "normalize",
) -> optax.GradientTransformation:
    """Normalisation without projection: a Euclidean step, then unit norm, w ← Orth(w − λ ∇ℓ).

    Where the loss does not change with the norm of a filter, ∇ℓ is tangent already and this is UN
    to rounding; the two part where invariance is only near, as by the ε of batch normalisation.

    Source: Huang, Liu, Lang and Li (2017), Projection based weight normalization for deep neural
    networks.

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.array([[1.0], [0.0]]), jnp.array([[0.0], [1.0]])
    >>> tx = unitnorm.normalize(0.75)
    >>> step, _ = tx.update(g, tx.init(w), w)
    >>> print((w + step).ravel().round(3))
    [ 0.8 -0.6]
    """
    return optax.chain(
        normalized_gradient(axis),
        optax.scale_by_learning_rate(learning_rate),
        retract(axis, off_manifold),
    )


class CarriedNormState(NamedTuple):
    """What ‖w‖² would be for filters that were never normalised, in at least float32."""

    squared_norms: optax.Params  # the parameters with the axes of a filter at length one


def un_carried(
    learning_rate: LearningRate,
    *,
    median: bool = False,
    axis: AxisSpec = None,
    off_manifold: OffManifold = "normalize",
) -> optax.GradientTransformation:
    """UN at the effective rates of B-SGD: w ← Orth(w − (λ/n) r), n ← n + λ²‖r‖²/n, r = Π_w(∇ℓ).

    Free filters in front of a normalisation layer move as unit ones at the rate λ/‖w‖², and their
    squared norm grows as n does: by Pythagoras, since their gradient r/‖w‖ is tangent. So on a loss
    that does not depend on norms the filters point where those of gradient descent do, step by
    step: this is B-SGD with its constraint, the control that tells the constraint from the rate. n
    is one number per filter, of the norm that it starts with (1 for unit filters).

    Args:
        median: step with λ over the median of n over the filters of a leaf: UN, with one rate for
            all of them, on the schedule of B-SGD's typical filter. n itself grows by what each
            filter would do with its own.

    Source: Arora, Li and Lyu (2019), Theoretical analysis of auto rate-tuning by batch
    normalization, Lemma 2.4, for n.

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.array([[1.0], [0.0]]), jnp.array([[0.0], [1.0]])
    >>> tx = unitnorm.un_carried(0.75)
    >>> _, state = tx.update(g, tx.init(w), w)
    >>> print(state[2].squared_norms)  # that of (1, −0.75), where B-SGD would be
    [[1.5625]]
    """
    return optax.chain(
        riemannian_gradient(axis),
        optax.scale_by_learning_rate(learning_rate),
        _divide_by_carried_norms(median, axis),
        retract(axis, off_manifold),
    )


def _divide_by_carried_norms(median: bool, axis: AxisSpec) -> optax.GradientTransformation:
    def init(params: optax.Params) -> CarriedNormState:
        def squares(axes: tuple[int, ...], w: jax.Array) -> jax.Array:
            return geometry.filter_norms(w, axes, keepdims=True) ** 2

        return CarriedNormState(map_filters(squares, axis, params))

    def divided(_: tuple[int, ...], w: jax.Array, u: jax.Array, n: jax.Array) -> jax.Array:
        return u / (jnp.median(n) if median else _or_one(n))

    def grown(axes: tuple[int, ...], _: jax.Array, u: jax.Array, n: jax.Array) -> jax.Array:
        return n + (geometry.filter_norms(u, axes, keepdims=True) ** 2 / _or_one(n)).astype(n.dtype)

    def update(
        updates: optax.Updates, state: CarriedNormState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, CarriedNormState]:
        carried = state.squared_norms
        steps = map_filters(divided, axis, params, updates, carried)
        return steps, CarriedNormState(map_filters(grown, axis, params, updates, carried))

    return optax.GradientTransformation(init, update)


def _or_one(n: jax.Array) -> jax.Array:
    return jnp.where(n == 0, 1, n)


class TangentAdamState(NamedTuple):
    """Moments of the Riemannian gradient, in at least float32."""

    # shape (), int32: updates so far; optax's name, which hides tuple.count
    count: jax.Array  # type: ignore[assignment]
    mu: optax.Params  # shaped like the parameters
    nu: optax.Params  # the same with the axes of a filter at length one


def _scale_by_tangent_adam(
    b1: float | jax.Array,
    b2: float | jax.Array,
    eps: float | jax.Array,
    axis: AxisSpec,
) -> optax.GradientTransformation:
    def init(params: optax.Params) -> TangentAdamState:
        def squares(axes: tuple[int, ...], w: jax.Array) -> jax.Array:
            return jnp.zeros_like(geometry.filter_norms(w, axes, keepdims=True))

        return TangentAdamState(
            count=jnp.zeros([], jnp.int32),
            mu=jax.tree.map(lambda w: jnp.zeros_like(geometry.wide(w)), params),
            nu=map_filters(squares, axis, params),
        )

    def first(axes: tuple[int, ...], w: jax.Array, r: jax.Array, mu: jax.Array) -> jax.Array:
        moved = b1 * geometry.tangent_projection(w, mu, axes)
        return (moved + (1 - b1) * r).astype(mu.dtype)

    def second(axes: tuple[int, ...], _: jax.Array, r: jax.Array, nu: jax.Array) -> jax.Array:
        squares = geometry.filter_norms(r, axes, keepdims=True) ** 2
        return (b2 * nu + (1 - b2) * squares).astype(nu.dtype)

    def update(
        updates: optax.Updates, state: TangentAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, TangentAdamState]:
        count = optax.safe_increment(state.count)
        mu = map_filters(first, axis, params, updates, state.mu)
        nu = map_filters(second, axis, params, updates, state.nu)
        steps = jax.tree.map(
            lambda m, v: m / (jnp.sqrt(v) + eps),
            optax.tree.bias_correction(mu, b1, count),
            optax.tree.bias_correction(nu, b2, count),
        )
        return steps, TangentAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)
