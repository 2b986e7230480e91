"""The updates that keep every filter at unit norm: one function each.

All share the arguments `learning_rate` (a number, a traced scalar or an optax schedule), `axis`
(axes over which one filter runs, by default every axis but the last; see `parts.AxisSpec`) and
`off_manifold` ("normalize", "raise", "trust" or "keep"; see `on_sphere`), and all raise
ValueError for a leaf without filters. Send biases, scales and classifiers elsewhere, with
`updates.build` or optax.partition. The update is a displacement: optax.apply_updates lands on the
manifold, and nothing may scale it afterwards; `assert_on_manifold` looks. Weight decay is not
offered: before a normalisation it only changes the size of the step in secret.
"""

from collections.abc import Collection
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import Array

from unitnorm import geometry
from unitnorm.updates.parts import (
    Arrays,
    Axes,
    AxisSpec,
    LearningRate,
    Moments,
    Number,
    Schedulable,
    Transformation,
    check_filters,
    correction,
    map_filters,
    norms_leaf,
    number,
    per_entry,
    per_filter,
    refuse_off_manifold,
    stateful,
    transformation,
    widen,
    with_rate,
)

Tangent = Literal["gradient", "moments", "step"]
OffManifold = Literal["normalize", "raise", "trust", "keep"]


class OnSphereState(NamedTuple):
    """What `on_sphere` remembers."""

    inner: optax.OptState
    radius: optax.Params  # with "keep" the norm of each filter at the start, else empty


def on_sphere(
    inner: optax.GradientTransformation,
    *,
    tangent: Collection[Tangent] = ("gradient", "moments", "step"),
    axis: AxisSpec = None,
    off_manifold: OffManifold = "normalize",
) -> Transformation:
    """Any optax optimiser, made to move its filters at fixed norm: w ← Orth(w/‖w‖ + u).

    u is what `inner` answers, at w/‖w‖ and in at least float32, to the gradient there, which is
    ‖w‖ ∇ℓ(w) for a network that does not notice the norm. `inner` brings its own learning rate.

    Args:
        inner: an optax optimiser, such as optax.adam(1e-3).
        tangent: what is projected onto the tangent space at w. "gradient": what `inner` is given.
            "moments": what it remembers of earlier gradients, the trees that its states call `mu`
            or `trace`, before each update. "step": what it answers. Empty: nothing, and a
            Euclidean step is normalised.
        axis: axes over which one filter runs, see `parts.AxisSpec`.
        off_manifold: what becomes of filters that do not start at unit norm. "normalize": the
            first update normalises them. "raise": `init` refuses them, and needs concrete
            parameters for that. Zero filters, which stay where they are, are allowed by both.
            "trust": there are none of either kind, and gradients are tangent or nearly so, as those
            of filters that feed a normalisation layer; nobody looks, and an update may leave out
            what only others need. "keep": each keeps the norm R that it starts with, and ‖w‖ ∇ℓ(w)
            is the gradient by w/R whatever the network.

    The new norm is one to the rounding of the larger of w and the new w: for a filter of norm far
    above one the first update lands only nearly on the manifold, and the second on it.

    Raises:
        ValueError: by `init`, for a leaf without filters or, with "raise", off the manifold; or for
            a filter whose squared norm is out of range.

    >>> import jax.numpy as jnp, optax, unitnorm
    >>> w, g = jnp.array([[3.0], [4.0]]), jnp.array([[1.0], [0.0]])
    >>> tx = unitnorm.on_sphere(optax.adam(0.1), off_manifold="keep")
    >>> step, _ = tx.update(g, tx.init(w), w)
    >>> print(unitnorm.filter_norms(w + step).round(4))
    [5.]
    """
    if off_manifold not in get_args(OffManifold):
        names = ", ".join(get_args(OffManifold))
        raise ValueError(f"off_manifold must be one of {names}; got {off_manifold!r}")
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> OnSphereState:
        check_filters(params, axis)
        if off_manifold == "raise":
            wide = widen(params)
            unit = map_filters(lambda axes, w: geometry.retraction(w, axes), axis, wide)
            refuse_off_manifold(params, unit)
        radius = map_filters(norms_leaf, axis, params) if off_manifold == "keep" else ()
        return OnSphereState(inner.init(widen(params)), radius)

    def update(updates: Any, state: Any, params: Any, **extra: Any) -> tuple[Any, OnSphereState]:
        def project(axes: Axes, w: Array, m: Array, squared: Array) -> Array:
            return geometry.project(w, m, axes, squared).astype(m.dtype)

        def gradient(axes: Axes, w: Array, g: Array, squared: Array) -> Array:
            if "gradient" in tangent:
                return _riemannian(axes, w, g, squared)
            return jnp.sqrt(squared) * g

        def unit(axes: Axes, w: Array, squared: Array) -> Array:
            return w * geometry.inverse_norms(jnp.sqrt(squared))

        squared = map_filters(lambda axes, w: geometry.inner(w, w, axes), axis, params)
        gradients = map_filters(gradient, axis, params, updates, squared)
        memory = state.inner
        if "moments" in tangent:
            memory = _map_moments(lambda m: map_filters(project, axis, params, m, squared), memory)
        at = map_filters(unit, axis, params, squared)
        steps, after = inner.update(gradients, memory, at, **extra)
        if "step" in tangent:
            steps = map_filters(project, axis, params, steps, squared)
        radius = [state.radius] if off_manifold == "keep" else []
        moved = map_filters(_land, axis, params, steps, squared, *radius)
        return moved, OnSphereState(after, state.radius)

    return transformation(init, update)


def _riemannian(axes: Axes, w: Array, g: Array, squared: Array) -> Array:
    """‖w‖ Π_w(g); `squared` is ⟨w, w⟩ of each filter."""
    return jnp.sqrt(squared) * geometry.project(w, g, axes, squared)


def _land(axes: Axes, w: Array, u: Array, squared: Array, radius: Array | None = None) -> Array:
    """The displacement from w to Orth(w/‖w‖ + u), or to that times the radius."""
    # ‖w‖ (w/‖w‖ + u): the retraction divides by the norm, so this needs no division of its own.
    new = geometry.unit(w + jnp.sqrt(squared) * u, axes)
    return (new if radius is None else radius * new) - w


def _map_moments(function: Any, state: optax.OptState) -> optax.OptState:
    """The state with `function` of every tree that one of its NamedTuples calls mu or trace."""

    def names(node: Any) -> set[str]:
        return {"mu", "trace"} & set(getattr(node, "_fields", ()))

    def moved(node: Any) -> Any:
        new = {name: function(getattr(node, name)) for name in names(node)}
        return node._replace(**new) if new else node

    return jax.tree.map(moved, state, is_leaf=lambda node: bool(names(node)))


@with_rate
def un(
    learning_rate: LearningRate, *, axis: AxisSpec = None, off_manifold: OffManifold = "normalize"
) -> Transformation:
    """Riemannian gradient descent on the oblique manifold, the paper's UN: w ← Orth(w − λ Π_w(∇ℓ)).

    Π_w projects onto the tangent space and Orth divides by the norm, per filter: `on_sphere` of
    gradient descent. Small leaves of rows (filters over the last axis) that are trusted to be on
    the manifold take the same step to rounding in fewer passes over the memory.

    On a network whose filters are normalised, UN goes the same way from every positive scaling of
    the filters. It does not undo the scalings that are left once norms are fixed: where only ReLU
    or maximum pooling stand between two layers, (γ, β) of a feature times c > 0 and the next
    layer's weights for that feature divided by c give the same outputs; UN, as every update here,
    goes another way from there.

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
    scale = optax.scale_by_learning_rate(learning_rate)
    general = on_sphere(scale, tangent=["gradient"], axis=axis, off_manifold=off_manifold)
    if off_manifold != "trust":
        return general

    def update(updates: Any, state: Any, params: Any, **extra: Any) -> tuple[Any, OnSphereState]:
        factor = -number(learning_rate)

        def leaf(axes: Axes, w: Array, g: Array) -> Array:
            if axes == (w.ndim - 1,) and w.size <= ROW_STEP_SIZE:
                return _row_step(w, g, factor)
            squared = geometry.inner(w, w, axes)
            return _land(axes, w, factor * _riemannian(axes, w, g, squared), squared)

        return map_filters(leaf, axis, params, updates), state

    return transformation(general.init, update)


# Measured on two cores: up to here, which holds the layers of Table 2, `_row_step` is up to three
# times as fast as the chain; at 256 × 1152 and above it is slower, and its compilation takes long.
ROW_STEP_SIZE = 1 << 16


def _row_step(w: Array, g: Array, factor: Array) -> Array:
    """The displacement of UN for unit filters w over the last axis, with tangent gradient g.

    Orth(w/‖w‖ − λ ‖w‖ Π_w(g)) = Orth(w − λ ⟨w, w⟩ (g − ⟨w, g⟩/⟨w, w⟩ w)), `factor` being −λ: with
    two numbers for each filter nothing as large as w has to be kept between w and its new value.
    Trust spares one sum: in long rows that of ⟨w, w⟩, which is 1 but for rounding; in short ones
    that of the norm, made by Pythagoras of ⟨w, w⟩, ⟨w, g⟩ and ⟨g, g⟩, which would cancel where g is
    nearly parallel to w.
    """
    short = w.shape[-1] <= geometry.SHORT
    inner = geometry.row_sums(jnp.multiply, w, g)
    squared = geometry.row_sums(jnp.square, w) if short else jnp.ones_like(inner)
    share = inner / jnp.where(squared == 0, 1, squared)
    rate = factor * squared

    def step(w: Array, g: Array) -> Array:
        return w + rate * (g - share * w)

    if short:
        tangent_squared = geometry.row_sums(jnp.square, g) - inner * share
        new_squared = squared + rate**2 * jnp.maximum(tangent_squared, 0)
    else:
        new_squared = geometry.row_sums(lambda w, g: jnp.square(step(w, g)), w, g)
    return step(w, g) * geometry.inverse_norms(jnp.sqrt(new_squared)) - w


@with_rate
def un_momentum(
    learning_rate: LearningRate,
    momentum: Schedulable = 0.9,
    *,
    nesterov: bool = False,
    axis: AxisSpec = None,
    off_manifold: OffManifold = "normalize",
) -> Transformation:
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

    def leaf(axes: Axes, count: Array, w: Array, r: Array, m: Array) -> Arrays:
        m = number(momentum) * m + r
        return r + number(momentum) * m if nesterov else m, m

    inner = optax.chain(
        stateful(leaf, optax.TraceState(per_entry), axis),
        optax.scale_by_learning_rate(learning_rate),
    )
    return on_sphere(inner, tangent=["gradient", "moments"], axis=axis, off_manifold=off_manifold)


@with_rate
def un_nesterov(
    learning_rate: LearningRate,
    momentum: Schedulable = 0.9,
    *,
    axis: AxisSpec = None,
    off_manifold: OffManifold = "normalize",
) -> Transformation:
    """UN with Nesterov momentum: m ← μ Π_w(m) + r, w ← Orth(w − λ (r + μ m)), r = Π_w(∇ℓ).

    The parameters are the point looked ahead to, as in optax.sgd(nesterov=True), whose first step
    is 1 + μ times the plain one for the same reason.

    Source: Sutskever et al. (2013), in the form of optax.sgd; transport as in `un_momentum`.

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.array([[1.0], [0.0]]), jnp.array([[5.0], [1.0]])
    >>> tx = unitnorm.un_nesterov(0.1)
    >>> step, _ = tx.update(g, tx.init(w), w)
    >>> print(jnp.tan(jnp.arctan2(*(w + step)[::-1])).round(2))
    [-0.19]
    """
    return un_momentum(learning_rate, momentum, nesterov=True, axis=axis, off_manifold=off_manifold)


@with_rate
def un_adam(
    learning_rate: LearningRate,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    *,
    axis: AxisSpec = None,
    off_manifold: OffManifold = "normalize",
) -> Transformation:
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

    def leaf(axes: Axes, count: Array, w: Array, r: Array, mu: Array, nu: Array) -> Arrays:
        mu = b1 * mu + (1 - b1) * r
        nu = b2 * nu + (1 - b2) * geometry.inner(r, r, axes)
        size = jnp.sqrt(nu / correction(b2, count)) + eps
        return mu / correction(b1, count) / size, mu, nu

    inner = optax.chain(
        stateful(leaf, Moments(per_entry, per_filter), axis),
        optax.scale_by_learning_rate(learning_rate),
    )
    return on_sphere(inner, tangent=["gradient", "moments"], axis=axis, off_manifold=off_manifold)


@with_rate
def normalize(
    learning_rate: LearningRate, *, axis: AxisSpec = None, off_manifold: OffManifold = "normalize"
) -> Transformation:
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
    scale = optax.scale_by_learning_rate(learning_rate)
    return on_sphere(scale, tangent=(), axis=axis, off_manifold=off_manifold)


@with_rate
def un_carried(
    learning_rate: LearningRate,
    *,
    median: bool = False,
    axis: AxisSpec = None,
    off_manifold: OffManifold = "normalize",
) -> Transformation:
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
    >>> print(state.inner[1].memory[0])  # that of (1, −0.75), where B-SGD would be
    [[1.5625]]
    """

    def squares(axes: Axes, w: Array) -> Array:
        return norms_leaf(axes, w) ** 2

    def leaf(axes: Axes, count: Array, w: Array, u: Array, n: Array) -> Arrays:
        each = jnp.where(n == 0, 1, n)
        grown = n + geometry.norms_of(u, axes) ** 2 / each
        return u / (geometry.median(n) if median else each), grown

    inner = optax.chain(
        optax.scale_by_learning_rate(learning_rate), stateful(leaf, (squares,), axis)
    )
    return on_sphere(inner, tangent=["gradient"], axis=axis, off_manifold=off_manifold)
