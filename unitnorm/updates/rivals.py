"""Rivals that a reader asks for: other people's updates for weights in front of a normalisation.

Each follows the published rule, with the published defaults unless its docstring says otherwise.
`learning_rate`, `axis` and `off_manifold` are as in `manifold`; an update without `off_manifold`
leaves the norms free. A constrained one takes every filter at unit norm, with the gradient that the
network has there, so that it moves the same way from every scaling of the start. Weight decay on
all other parameters and clipping are optax's: optax.add_decayed_weights, optax.clip_by_global_norm.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unitnorm import geometry
from unitnorm.updates.parts import (
    NEEDS_PARAMS,
    AxisSpec,
    LearningRate,
    OffManifold,
    map_filters,
    retract,
)

Number = float | jax.Array
Axes = tuple[int, ...]

WHOLE = object()  # instead of an axis: a leaf of any shape, as one


class RivalState(NamedTuple):
    """What an update remembers, in at least float32."""

    # shape (), int32: updates so far; optax's name, which hides tuple.count
    count: jax.Array  # type: ignore[assignment]
    memory: Any  # a tuple of arrays for each parameter
    schedule: optax.OptState  # of the learning rate


def sgdp(
    learning_rate: LearningRate,
    momentum: Number = 0.9,
    weight_decay: Number = 0.0,
    *,
    nesterov: bool = False,
    delta: Number = 0.1,
    wd_ratio: Number = 0.1,
    eps: float = 1e-8,
    axis: AxisSpec = None,
) -> optax.GradientTransformationExtraArgs:
    """SGD with momentum whose step loses its part along the weights, where they look invariant.

    m ← μ m + g; the step p is m, or g + μ m with Nesterov. If every filter of a leaf has
    |cos(g, w)| < δ/√(its entries), p loses its part along each filter; else if the leaf as a whole
    has, along the leaf. Then w ← (1 − λη/(1−μ)) w − λ p, with η times `wd_ratio` if projected.

    Source: Heo et al. (2021), AdamP: slowing down the slowdown for momentum optimizers on
    scale-invariant weights, Algorithm 1; the authors' SGDP (clovaai/AdamP). Their momentum default
    is 0, their experiments' 0.9.

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.array([[1.0], [0.0]]), jnp.array([[0.0], [1.0]])
    >>> tx = unitnorm.sgdp(0.5)
    >>> step, _ = tx.update(g, tx.init(w), w)
    >>> print((w + step).ravel().round(3))
    [ 1.  -0.5]
    """

    def step(
        axes: Axes, rate: jax.Array, _: jax.Array, w: jax.Array, g: jax.Array, m: jax.Array
    ) -> tuple[jax.Array, ...]:
        m = momentum * m + g
        moved, share = _without_radial(axes, w, g, g + momentum * m if nesterov else m, delta, eps)
        decay = rate * weight_decay / (1 - momentum) * jnp.where(share, wd_ratio, 1)
        return (1 - decay) * w - rate * moved, m

    return _leaf_by_leaf(step, _one_like, learning_rate, axis)


def adamp(
    learning_rate: LearningRate,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: float = 1e-8,
    weight_decay: Number = 0.0,
    *,
    nesterov: bool = False,
    delta: Number = 0.1,
    wd_ratio: Number = 0.1,
    axis: AxisSpec = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam whose step loses its part along the weights, where they look invariant: see `sgdp`.

    The projected step is p = m / (√(v / (1−b2ᵗ)) + eps), the weight decay η that of AdamW:
    w ← (1 − λη) w − λ p / (1−b1ᵗ).

    Source: Heo et al. (2021), as for `sgdp`, Algorithm 2; the authors' AdamP.

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.array([[1.0], [0.0]]), jnp.array([[0.0], [1.0]])
    >>> tx = unitnorm.adamp(0.5)
    >>> step, _ = tx.update(g, tx.init(w), w)
    >>> print((w + step).ravel().round(3))
    [ 1.  -0.5]
    """

    def step(
        axes: Axes,
        rate: jax.Array,
        t: jax.Array,
        w: jax.Array,
        g: jax.Array,
        m: jax.Array,
        v: jax.Array,
    ) -> tuple[jax.Array, ...]:
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        size = jnp.sqrt(v / _correction(b2, t)) + eps
        towards = b1 * m + (1 - b1) * g if nesterov else m
        moved, share = _without_radial(axes, w, g, towards / size, delta, eps)
        decay = rate * weight_decay * jnp.where(share, wd_ratio, 1)
        return (1 - decay) * w - rate / _correction(b1, t) * moved, m, v

    return _leaf_by_leaf(step, _two_like, learning_rate, axis)


def sgd_g(
    learning_rate: LearningRate,
    momentum: Number = 0.9,
    clip: Number | None = 0.1,
    *,
    axis: AxisSpec = None,
    off_manifold: OffManifold = "normalize",
) -> optax.GradientTransformationExtraArgs:
    """SGD with momentum along geodesics: m ← μ m − λ h, w ← exp_w(m), m transported along itself.

    h is the Riemannian gradient of each filter, shortened to norm `clip` if it is longer (None: not
    at all; mind the reduction of the loss). The penalty on the filters' inner products that the
    paper adds to the loss is no part of it.

    Source: Cho and Lee (2017), Riemannian approach to batch normalization, Algorithm 2.

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.array([[1.0], [0.0]]), jnp.array([[5.0], [100.0]])
    >>> tx = unitnorm.sgd_g(1.0)  # the gradient is cut to 0.1: an angle
    >>> step, _ = tx.update(g, tx.init(w), w)
    >>> w = w + step
    >>> print(jnp.arctan2(w[1], w[0]).round(3))
    [-0.1]
    """

    def step(
        axes: Axes, rate: jax.Array, _: jax.Array, w: jax.Array, g: jax.Array, m: jax.Array
    ) -> tuple[jax.Array, ...]:
        m = momentum * m - rate * _clipped(geometry.tangent_projection(w, g, axes), clip, axes)
        return _along_geodesic(w, m, m, axes)

    return _leaf_by_leaf(step, _one_like, learning_rate, axis, off_manifold)


def adam_g(
    learning_rate: LearningRate,
    b1: Number = 0.9,
    b2: Number = 0.99,
    eps: float = 1e-8,
    clip: Number | None = 0.1,
    *,
    axis: AxisSpec = None,
    off_manifold: OffManifold = "normalize",
) -> optax.GradientTransformationExtraArgs:
    """Adam along geodesics: w ← exp_w(−λ √(1−b2ᵗ)/(1−b1ᵗ) m/√(v + eps)), m transported along.

    h as in `sgd_g`, m ← b1 m + (1−b1) h, v ← b2 v + (1−b2) ‖h‖², one number per filter. It differs
    from `un_adam` by the geodesic, by the parallel transport and by the clipping.

    Source: Cho and Lee (2017), as for `sgd_g`, Algorithm 3.

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.array([[1.0], [0.0]]), jnp.array([[5.0], [100.0]])
    >>> tx = unitnorm.adam_g(0.1)
    >>> step, _ = tx.update(g, tx.init(w), w)
    >>> w = w + step
    >>> print(jnp.arctan2(w[1], w[0]).round(3))
    [-0.1]
    """

    def step(
        axes: Axes,
        rate: jax.Array,
        t: jax.Array,
        w: jax.Array,
        g: jax.Array,
        m: jax.Array,
        v: jax.Array,
    ) -> tuple[jax.Array, ...]:
        h = _clipped(geometry.tangent_projection(w, g, axes), clip, axes)
        m, v = b1 * m + (1 - b1) * h, b2 * v + (1 - b2) * _dot(h, h, axes)
        along = -rate * jnp.sqrt(_correction(b2, t)) / _correction(b1, t) * m / jnp.sqrt(v + eps)
        return *_along_geodesic(w, along, m, axes), v

    return _leaf_by_leaf(step, _one_and_filters, learning_rate, axis, off_manifold)


def nero(
    learning_rate: LearningRate,
    beta: Number = 0.999,
    *,
    axis: AxisSpec = None,
    off_manifold: OffManifold = "normalize",
) -> optax.GradientTransformationExtraArgs:
    """Relative steps of neurons with mean zero and norm one: w ← C(w − λ g / √v̂).

    v ← β v + (1−β) ‖g‖² per filter, corrected for its zero start; C takes the mean off each filter
    and divides by the norm. A filter that does not start with mean zero has it from the first
    update on. Where v is 0 there is no step.

    Source: Liu, Bernstein, Meister and Yue (2021), Learning by turning: neural architecture aware
    optimisation, Algorithm 1; the authors' code (jxbz/nero).

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.array([[3.0], [4.0], [8.0]]), jnp.array([[0.0], [1.0], [0.0]])
    >>> tx = unitnorm.nero(0.1)
    >>> step, _ = tx.update(g, tx.init(w), w)
    >>> print(abs((w + step).mean().round(3)), unitnorm.filter_norms(w + step).round(3))
    0.0 [1.]
    """

    def step(
        axes: Axes, rate: jax.Array, t: jax.Array, w: jax.Array, g: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, ...]:
        v = beta * v + (1 - beta) * _dot(g, g, axes)
        size = jnp.sqrt(v / _correction(beta, t))
        moved = w - rate * g / jnp.where(size == 0, 1, size)
        return geometry.retraction(_centred(moved, axes), axes), v

    return _leaf_by_leaf(step, _filters, learning_rate, axis, off_manifold)


def lars(
    learning_rate: LearningRate,
    momentum: Number = 0.9,
    weight_decay: Number = 0.0,
    trust_coefficient: Number = 1.0,
    *,
    axis: AxisSpec = None,
) -> optax.GradientTransformationExtraArgs:
    """Layer-wise rates: m ← μ m + λ τ (‖w‖/‖d‖) d with d = g + η w, w ← w − m, norms over a leaf.

    The factor before d is λ alone where either norm is zero. τ only multiplies λ; it is 1 here, and
    0.001 in the paper, whose λ is larger to match. `axis` is not needed.

    Source: You, Gitman and Ginsburg (2017), Large batch training of convolutional networks,
    Algorithm 1, in the form of optax.lars; here computed in at least float32.

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.array([[2.0], [0.0]]), jnp.array([[0.0], [100.0]])
    >>> tx = unitnorm.lars(0.5)
    >>> step, _ = tx.update(g, tx.init(w), w)
    >>> print((w + step).ravel().round(3))  # λ ‖w‖ far, whatever the gradient
    [ 2. -1.]
    """
    del axis

    def step(
        axes: Axes, rate: jax.Array, _: jax.Array, w: jax.Array, g: jax.Array, m: jax.Array
    ) -> tuple[jax.Array, ...]:
        d = g + weight_decay * w
        sizes = [jnp.sqrt(_dot(x, x, axes)) for x in (w, d)]
        ratio = trust_coefficient * sizes[0] / jnp.where(sizes[1] == 0, 1, sizes[1])
        m = momentum * m + rate * jnp.where((sizes[0] == 0) | (sizes[1] == 0), 1, ratio) * d
        return w - m, m

    return _leaf_by_leaf(step, _one_like, learning_rate, WHOLE)


def rotational_sgd(
    learning_rate: LearningRate,
    momentum: Number = 0.9,
    weight_decay: Number = 5e-4,
    *,
    average_decay: Number = 0.9,
    zero_mean: bool = False,
    eps: float = 1e-8,
    axis: AxisSpec = None,
    off_manifold: OffManifold = "normalize",
) -> optax.GradientTransformationExtraArgs:
    """Filters turn by the angle that weight decay would settle at: √(2λη/(1+μ)) per step.

    m ← μ m + g; d = Π_w(m) (of m without its mean if `zero_mean`); a ← β a + (1−β) ‖d‖² per filter,
    corrected for its zero start; w ← Orth(w − √(2λη/(1+μ)) d / (√â + eps)). η sets an angle;
    nothing decays.

    Source: Kosson, Messmer and Jaggi (2023), Rotational equilibrium: how weight decay balances
    learning across neural networks, Algorithm 1; the authors' RotationalSGD (epfml/REQ), whose
    `zero_mean` is True by default.

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.array([[1.0], [0.0]]), jnp.array([[5.0], [100.0]])
    >>> tx = unitnorm.rotational_sgd(0.1, weight_decay=0.019)  # √(2 · 0.1 · 0.019 / 1.9)
    >>> step, _ = tx.update(g, tx.init(w), w)
    >>> print(((w + step)[1] / (w + step)[0]).round(4))
    [-0.0447]
    """

    def step(
        axes: Axes,
        rate: jax.Array,
        t: jax.Array,
        w: jax.Array,
        g: jax.Array,
        m: jax.Array,
        a: jax.Array,
    ) -> tuple[jax.Array, ...]:
        if zero_mean:
            w = geometry.retraction(_centred(w, axes), axes)
        m = momentum * m + g
        d = geometry.tangent_projection(w, _centred(m, axes) if zero_mean else m, axes)
        a = average_decay * a + (1 - average_decay) * _dot(d, d, axes)
        size = jnp.sqrt(a / _correction(average_decay, t)) + eps
        angle = jnp.sqrt(2 * rate * weight_decay / (1 + momentum))
        return geometry.retraction(w - angle * d / size, axes), m, a

    return _leaf_by_leaf(step, _one_and_filters, learning_rate, axis, off_manifold)


def adam_srt(
    learning_rate: LearningRate,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: float = 1e-8,
    *,
    axis: AxisSpec = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with one second moment per filter, both moments rescaled and turned along with it.

    m ← b1 m + (1−b1) g, v ← b2 v + (1−b2) ‖g‖²; w' = w − λ √d m̂ / (√v̂ + eps) with d entries in a
    filter. Then v ← v ‖w‖²/(‖w'‖² + eps) and m ← (⟨w, w'⟩ m − ⟨m, w'⟩ w)/(‖w'‖² + eps).

    Source: Roburin, de Mont-Marin, Bursuc, Marlet, Pérez and Aubry (2022), Spherical perspective on
    learning with normalization layers; the authors' AdamSRT (ymontmarin/adamsrt).

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.array([[1.0], [0.0]]), jnp.array([[0.0], [1.0]])
    >>> tx = unitnorm.adam_srt(0.1)
    >>> step, _ = tx.update(g, tx.init(w), w)
    >>> print((w + step).ravel().round(3))
    [ 1.    -0.141]
    """

    def step(
        axes: Axes,
        rate: jax.Array,
        t: jax.Array,
        w: jax.Array,
        g: jax.Array,
        m: jax.Array,
        v: jax.Array,
    ) -> tuple[jax.Array, ...]:
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * _dot(g, g, axes)
        entries = w.size / v.size
        size = jnp.sqrt(v / _correction(b2, t)) + eps
        new = w - rate * entries**0.5 * m / _correction(b1, t) / size
        squared = _dot(new, new, axes) + eps
        turned = (_dot(w, new, axes) * m - _dot(m, new, axes) * w) / squared
        return new, turned, v * _dot(w, w, axes) / squared

    return _leaf_by_leaf(step, _one_and_filters, learning_rate, axis)


def _leaf_by_leaf(
    step: Callable[..., tuple[jax.Array, ...]],
    start: Callable[[Axes, jax.Array], tuple[jax.Array, ...]],
    learning_rate: LearningRate,
    axis: AxisSpec,  # or WHOLE
    off_manifold: OffManifold | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An update from what becomes of one leaf.

    Args:
        step: of (axes, learning rate, updates so far with this one, w, g, *memory) to the new w and
            the new memory; w and g in at least float32. With `off_manifold`, w has unit norm.
        start: of (axes, w) to the memory at the start.
    """
    rates = optax.scale_by_learning_rate(learning_rate, flip_sign=False)

    def map_leaves(function: Callable[..., Any], params: optax.Params | None, *trees: Any) -> Any:
        if axis is not WHOLE:
            return map_filters(function, axis, params, *trees)
        if params is None:
            raise ValueError(NEEDS_PARAMS)
        return jax.tree.map(lambda w, *x: function(tuple(range(w.ndim)), w, *x), params, *trees)

    guard = None if off_manifold is None else retract(axis, off_manifold)

    def init(params: optax.Params) -> RivalState:
        if guard is not None:
            guard.init(params)
        memory = map_leaves(start, jax.tree.map(geometry.wide, params))
        return RivalState(jnp.zeros([], jnp.int32), memory, rates.init(params))

    def update(
        updates: optax.Updates, state: RivalState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, RivalState]:
        rate, schedule = rates.update(jnp.ones([]), state.schedule)
        count = optax.safe_increment(state.count)

        def leaf(axes: Axes, w: jax.Array, g: jax.Array, memory: tuple[jax.Array, ...]) -> _Moved:
            at, slope = geometry.wide(w), geometry.wide(g)
            if guard is not None:
                slope = geometry.filter_norms(w, axes, keepdims=True) * slope
                at = geometry.retraction(at, axes)
            new, *after = step(axes, rate, count, at, slope, *memory)
            kept = tuple(a.astype(b.dtype) for a, b in zip(after, memory, strict=True))
            return _Moved((new - geometry.wide(w)).astype(w.dtype), kept)

        moved = map_leaves(leaf, params, updates, state.memory)
        steps = jax.tree.map(lambda m: m.step, moved, is_leaf=_is_moved)
        memory = jax.tree.map(lambda m: m.memory, moved, is_leaf=_is_moved)
        return steps, RivalState(count, memory, schedule)

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))


class _Moved(NamedTuple):
    step: jax.Array
    memory: tuple[jax.Array, ...]


def _is_moved(x: Any) -> bool:
    return isinstance(x, _Moved)


def _one_like(_: Axes, w: jax.Array) -> tuple[jax.Array, ...]:
    return (jnp.zeros_like(w),)


def _two_like(_: Axes, w: jax.Array) -> tuple[jax.Array, ...]:
    return jnp.zeros_like(w), jnp.zeros_like(w)


def _filters(axes: Axes, w: jax.Array) -> tuple[jax.Array, ...]:
    return (jnp.zeros_like(geometry.filter_norms(w, axes, keepdims=True)),)


def _one_and_filters(axes: Axes, w: jax.Array) -> tuple[jax.Array, ...]:
    return *_one_like(axes, w), *_filters(axes, w)


def _correction(decay: Number, t: jax.Array) -> jax.Array:
    """1 − decayᵗ without the cancellation that costs float32 four digits at 0.999."""
    exact = isinstance(decay, float) and decay > 0
    return -jnp.expm1(t * (math.log(decay) if exact else jnp.log(decay)))


def _dot(a: jax.Array, b: jax.Array, axes: Axes) -> jax.Array:
    return jnp.sum(a * b, axes, keepdims=True)


def _centred(w: jax.Array, axes: Axes) -> jax.Array:
    return w - jnp.mean(w, axes, keepdims=True)


def _clipped(h: jax.Array, clip: Number | None, axes: Axes) -> jax.Array:
    if clip is None:
        return h
    norms = geometry.filter_norms(h, axes, keepdims=True)
    return h * jnp.where(norms > clip, clip / jnp.where(norms == 0, 1, norms), 1)


def _along_geodesic(
    w: jax.Array, along: jax.Array, m: jax.Array, axes: Axes
) -> tuple[jax.Array, jax.Array]:
    """exp_w(along) on the unit sphere, and m transported there; a zero filter stays."""
    angle = geometry.filter_norms(along, axes, keepdims=True)
    towards = along / jnp.where(angle == 0, 1, angle)
    part = _dot(towards, m, axes)
    new = jnp.cos(angle) * w + jnp.where(_dot(w, w, axes) == 0, 0, jnp.sin(angle)) * towards
    transported = m + part * ((jnp.cos(angle) - 1) * towards - jnp.sin(angle) * w)
    return geometry.retraction(new, axes), transported  # divided by the norm for rounding alone


def _without_radial(
    axes: Axes, w: jax.Array, g: jax.Array, p: jax.Array, delta: Number, eps: float
) -> tuple[jax.Array, jax.Array]:
    """p without its part along the weights where they look invariant, and whether they do."""
    found, looks = p, jnp.zeros([], bool)
    # The leaf as a whole first, so that filters have the last word.
    for over in (tuple(range(w.ndim)), axes):
        norms = [jnp.sqrt(_dot(x, x, over)) for x in (w, g)]
        cosines = jnp.abs(_dot(w, g, over)) / jnp.maximum(norms[0] * norms[1], eps)
        looks_so = jnp.max(cosines) < delta / (w.size / cosines.size) ** 0.5
        unit = w / (norms[0] + eps)
        found = jnp.where(looks_so, p - unit * _dot(unit, p, over), found)
        looks = looks | looks_so
    return found, looks
