"""Rivals that a reader asks for: other people's updates for weights in front of a normalisation.

Each follows the published rule, with the published defaults unless its docstring says otherwise.
`learning_rate`, `axis` and `off_manifold` are as in `manifold`; an update without `off_manifold`
leaves the norms free. A constrained one takes every filter at unit norm, with the gradient that the
network has there, so that it moves the same way from every scaling of the start. Weight decay on
all other parameters and clipping are optax's: optax.add_decayed_weights, optax.clip_by_global_norm.
"""

import jax
import jax.numpy as jnp
import optax
from jax import Array

from unitnorm import geometry
from unitnorm.updates.manifold import OffManifold, on_sphere
from unitnorm.updates.parts import (
    Arrays,
    Axes,
    AxisSpec,
    LearningRate,
    Moments,
    Number,
    Schedulable,
    Transformation,
    correction,
    map_filters,
    norms_leaf,
    number,
    per_entry,
    per_filter,
    stateful,
    stateless,
    widened,
    with_rate,
)
from unitnorm.updates.selection import FilterAxes, as_columns, from_columns

EPS = 1e-8  # beside a norm, of AdamP and rotational SGD
DELTA, DECAY_RATIO = 0.1, 0.1  # of AdamP
AVERAGE_DECAY = 0.9  # of rotational SGD
TOLERANCE = 1e-6  # of manifold Muon's constraint


@with_rate
def sgdp(
    learning_rate: LearningRate,
    momentum: Schedulable = 0.9,
    weight_decay: Number = 0.0,
    *,
    nesterov: bool = False,
    axis: AxisSpec = None,
) -> Transformation:
    """SGD with momentum whose step loses its part along the weights, where they look invariant.

    m ← μ m + g; the step p is m, or g + μ m with Nesterov. If every filter of a leaf has
    |cos(g, w)| < 0.1/√(its entries), p loses its part along each filter; else if the leaf as a
    whole has, along the leaf. Then w ← (1 − λη/(1−μ)) w − λ p, with η/10 if projected.

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

    def leaf(axes: Axes, count: Array, w: Array, g: Array, m: Array) -> Arrays:
        mu = number(momentum)
        m = mu * m + g
        moved, share = _without_radial(axes, w, g, g + mu * m if nesterov else m)
        decay = weight_decay / (1 - mu) * share
        return moved + decay * w, m

    rate = optax.scale_by_learning_rate(learning_rate)
    return widened(optax.chain(stateful(leaf, (per_entry,), axis), rate))


@with_rate
def adamp(
    learning_rate: LearningRate,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: float = 1e-8,
    weight_decay: Number = 0.0,
    *,
    nesterov: bool = False,
    axis: AxisSpec = None,
) -> Transformation:
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

    def leaf(axes: Axes, count: Array, w: Array, g: Array, m: Array, v: Array) -> Arrays:
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        size = jnp.sqrt(v / correction(b2, count)) + eps
        towards = b1 * m + (1 - b1) * g if nesterov else m
        moved, share = _without_radial(axes, w, g, towards / size)
        return moved / correction(b1, count) + weight_decay * share * w, m, v

    rate = optax.scale_by_learning_rate(learning_rate)
    return widened(optax.chain(stateful(leaf, Moments(per_entry, per_entry), axis), rate))


def _without_radial(axes: Axes, w: Array, g: Array, p: Array) -> tuple[Array, Array]:
    """p without its part along the weights where they look invariant, and the share of decay."""
    found, looks = p, jnp.zeros([], bool)
    # The leaf as a whole first, so that filters have the last word.
    for over in (tuple(range(w.ndim)), axes):
        norms = [geometry.norms_of(x, over) for x in (w, g)]
        cosines = jnp.abs(dot(w, g, over)) / jnp.maximum(norms[0] * norms[1], EPS)
        looks_so = jnp.max(cosines) < DELTA / (w.size / cosines.size) ** 0.5
        unit = w / (norms[0] + EPS)
        found = jnp.where(looks_so, p - unit * dot(unit, p, over), found)
        looks = looks | looks_so
    return found, jnp.where(looks, DECAY_RATIO, 1)


@with_rate
def sgd_g(
    learning_rate: LearningRate,
    momentum: Schedulable = 0.9,
    clip: Number | None = 0.1,
    *,
    axis: AxisSpec = None,
    off_manifold: OffManifold = "normalize",
) -> Transformation:
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

    def leaf(axes: Axes, count: Array, w: Array, h: Array, m: Array) -> Arrays:
        m = number(momentum) * m - number(learning_rate) * _clipped(h, clip, axes)
        return _along_geodesic(w, m, m, axes)

    link = stateful(leaf, (per_entry,), axis)
    return on_sphere(link, tangent=["gradient"], axis=axis, off_manifold=off_manifold)


@with_rate
def adam_g(
    learning_rate: LearningRate,
    b1: Number = 0.9,
    b2: Number = 0.99,
    eps: float = 1e-8,
    clip: Number | None = 0.1,
    *,
    axis: AxisSpec = None,
    off_manifold: OffManifold = "normalize",
) -> Transformation:
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

    def leaf(axes: Axes, count: Array, w: Array, h: Array, m: Array, v: Array) -> Arrays:
        h = _clipped(h, clip, axes)
        m, v = b1 * m + (1 - b1) * h, b2 * v + (1 - b2) * dot(h, h, axes)
        ratio = jnp.sqrt(correction(b2, count)) / correction(b1, count)
        along = -number(learning_rate) * ratio * m / jnp.sqrt(v + eps)
        return *_along_geodesic(w, along, m, axes), v

    link = stateful(leaf, Moments(per_entry, per_filter), axis)
    return on_sphere(link, tangent=["gradient"], axis=axis, off_manifold=off_manifold)


def _clipped(h: Array, clip: Number | None, axes: Axes) -> Array:
    if clip is None:
        return h
    norms = geometry.norms_of(h, axes)
    return h * jnp.where(norms > clip, clip / jnp.where(norms == 0, 1, norms), 1)


def _along_geodesic(w: Array, along: Array, m: Array, axes: Axes) -> tuple[Array, Array]:
    """The step to exp_w(along) on the unit sphere, and m transported there; a zero filter stays."""
    angle = geometry.norms_of(along, axes)
    towards = along / jnp.where(angle == 0, 1, angle)
    part = dot(towards, m, axes)
    chord = jnp.where(dot(w, w, axes) == 0, 0, jnp.sin(angle)) * towards
    transported = m + part * ((jnp.cos(angle) - 1) * towards - jnp.sin(angle) * w)
    return (jnp.cos(angle) - 1) * w + chord, transported


@with_rate
def nero(
    learning_rate: LearningRate,
    beta: Number = 0.999,
    *,
    axis: AxisSpec = None,
    off_manifold: OffManifold = "normalize",
) -> Transformation:
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

    def leaf(axes: Axes, count: Array, w: Array, g: Array, v: Array) -> Arrays:
        v = beta * v + (1 - beta) * dot(g, g, axes)
        size = jnp.sqrt(v / correction(beta, count))
        u = -number(learning_rate) / jnp.where(size == 0, 1, size) * g
        return u - jnp.mean(w + u, axes, keepdims=True), v

    inner = stateful(leaf, (per_filter,), axis)
    return on_sphere(inner, tangent=(), axis=axis, off_manifold=off_manifold)


@with_rate
def lars(
    learning_rate: LearningRate,
    momentum: Schedulable = 0.9,
    weight_decay: Number = 0.0,
    *,
    axis: AxisSpec = None,
) -> Transformation:
    """Layer-wise rates: m ← μ m + λ (‖w‖/‖d‖) d with d = g + η w, w ← w − m, norms over a leaf.

    The factor before d is λ alone where either norm is zero. The paper's trust coefficient, 0.001,
    only multiplies its λ, and is 1 here. `axis` is not needed.

    Source: You, Gitman and Ginsburg (2017), Large batch training of convolutional networks,
    Algorithm 1, in the form of optax.lars, which this is.

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.array([[2.0], [0.0]]), jnp.array([[0.0], [100.0]])
    >>> tx = unitnorm.lars(0.5)
    >>> step, _ = tx.update(g, tx.init(w), w)
    >>> print((w + step).ravel().round(3))  # λ ‖w‖ far, whatever the gradient
    [ 2. -1.]
    """
    return widened(
        optax.lars(learning_rate, weight_decay, trust_coefficient=1.0, momentum=momentum)
    )


@with_rate
def rotational_sgd(
    learning_rate: LearningRate,
    momentum: Schedulable = 0.9,
    weight_decay: Number = 5e-4,
    *,
    zero_mean: bool = False,
    axis: AxisSpec = None,
    off_manifold: OffManifold = "normalize",
) -> Transformation:
    """Filters turn by the angle that weight decay would settle at: √(2λη/(1+μ)) per step.

    m ← μ m + g; d = Π_w(m) (of m without its mean if `zero_mean`); a ← 0.9 a + 0.1 ‖d‖² per filter,
    corrected for its zero start; w ← Orth(w − √(2λη/(1+μ)) d / (√â + ε)). η sets an angle; nothing
    decays.

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

    def centred(axes: Axes, w: Array) -> Array:
        return w - jnp.mean(w, axes, keepdims=True) if zero_mean else w

    def start(axes: Axes, w: Array) -> Array:
        return geometry.unit(centred(axes, w), axes) if zero_mean else w

    def turn(axes: Axes, count: Array, w: Array, m: Array, a: Array) -> Arrays:
        d = geometry.project(start(axes, w), centred(axes, m), axes)
        a = AVERAGE_DECAY * a + (1 - AVERAGE_DECAY) * dot(d, d, axes)
        return d / (jnp.sqrt(a / correction(AVERAGE_DECAY, count)) + EPS), a

    def from_start(axes: Axes, w: Array, u: Array) -> Array:
        return start(axes, w) + u - w

    angle = (2 * number(learning_rate) * weight_decay / (1 + number(momentum))) ** 0.5
    inner = optax.chain(
        optax.trace(momentum),
        stateful(turn, (per_filter,), axis),
        optax.scale_by_learning_rate(angle),
        stateless(from_start, axis),
    )
    return on_sphere(inner, tangent=(), axis=axis, off_manifold=off_manifold)


@with_rate
def adam_srt(
    learning_rate: LearningRate,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: float = 1e-8,
    *,
    axis: AxisSpec = None,
) -> Transformation:
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

    def leaf(axes: Axes, count: Array, w: Array, g: Array, m: Array, v: Array) -> Arrays:
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * dot(g, g, axes)
        size = jnp.sqrt(v / correction(b2, count)) + eps
        far = number(learning_rate) * (w.size / v.size) ** 0.5
        new = w - far * m / correction(b1, count) / size
        squared = dot(new, new, axes) + eps
        turned = (dot(w, new, axes) * m - dot(m, new, axes) * w) / squared
        return new - w, turned, v * dot(w, w, axes) / squared

    return widened(stateful(leaf, Moments(per_entry, per_filter), axis))


# --- Since 2023: norm or effective rate held ------------------------------------------------------


@with_rate
def hyperball(
    learning_rate: LearningRate,
    inner: optax.GradientTransformation | None = None,
    *,
    axis: AxisSpec = None,
    off_manifold: OffManifold = "normalize",
) -> Transformation:
    """Steps of fixed length at fixed norm: W ← R norm(W − λ R norm(u)), norm(x) = x/‖x‖.

    u is what `inner` answers. The norms are those of filters; with `axis` of all axes, those of a
    matrix, as published. R is 1; with off_manifold="keep" it is the norm at the start, as
    published, and a network that notices the norm may use it.

    Args:
        inner: without a learning rate; default: optax.scale_by_adam(). With
            optax.contrib.scale_by_muon() and whole matrices it is MuonH.

    Source: Wen, Dang, Lyu, Ma and Liang (2026), Fantastic pretraining optimizers and where to find
    them II: Hyperball optimization, arXiv 2606.16899.

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.array([[3.0], [4.0]]), jnp.array([[5.0], [0.0]])
    >>> tx = unitnorm.hyperball(0.1, off_manifold="keep")
    >>> step, _ = tx.update(g, tx.init(w), w)
    >>> print(unitnorm.filter_norms(w + step))
    [5.]
    """
    inner = optax.chain(
        optax.scale_by_adam() if inner is None else inner,
        stateless(lambda axes, w, u: geometry.unit(u, axes), axis),
        optax.scale_by_learning_rate(learning_rate),
    )
    return on_sphere(inner, tangent=(), axis=axis, off_manifold=off_manifold)


@with_rate
def ngpt(
    learning_rate: LearningRate,
    b1: Number = 0.9,
    b2: Number = 0.95,
    eps: float = 1e-8,
    *,
    axis: AxisSpec = None,
    off_manifold: OffManifold = "normalize",
) -> Transformation:
    """Adam, then unit norm, as nGPT trains its matrices: w ← Orth(w − λ m̂/(√v̂ + eps)).

    nGPT normalises along the embedding: `axis` has to say which that is for each matrix. Its
    network differs too; this is its optimiser alone. For another one than Adam:
    `on_sphere(inner, tangent=())`.

    Source: Loshchilov, Hsieh, Sun and Ginsburg (2024), nGPT: normalized transformer with
    representation learning on the hypersphere, section 2.6 and the authors' code (NVIDIA/ngpt).

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.array([[1.0], [0.0]]), jnp.array([[0.0], [7.0]])
    >>> tx = unitnorm.ngpt(0.75)
    >>> step, _ = tx.update(g, tx.init(w), w)
    >>> print((w + step).ravel().round(3))
    [ 0.8 -0.6]
    """
    adam = optax.adam(learning_rate, b1, b2, eps)
    return on_sphere(adam, tangent=(), axis=axis, off_manifold=off_manifold)


@with_rate
def renorm_sgd(
    learning_rate: LearningRate,
    momentum: Schedulable = 0.85,
    *,
    nesterov: bool = True,
    axis: AxisSpec = None,
) -> Transformation:
    """Unit norm, then a step of fixed length: w ← w/‖w‖ − λ u/‖u‖, m ← μ m + g, u = g + μ m.

    Norms are one before the step and not after it. Where u is 0 there is no step.

    Source: Jordan (2024), KellerJordan/research-airbench, renorm_airbench.py, whose rate is 0.07.

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.array([[2.0], [0.0]]), jnp.array([[0.0], [100.0]])
    >>> tx = unitnorm.renorm_sgd(0.07)
    >>> step, _ = tx.update(g, tx.init(w), w)
    >>> print((w + step).ravel().round(3))
    [ 1.   -0.07]
    """

    inner = optax.chain(
        optax.trace(momentum, nesterov),
        stateless(lambda axes, w, u: geometry.unit(u, axes), axis),
        optax.scale_by_learning_rate(learning_rate),
        stateless(lambda axes, w, u: geometry.unit(w, axes) + u - w, axis),
    )
    return widened(inner)


@with_rate
def adamwn(
    learning_rate: LearningRate,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: float = 1e-8,
    *,
    norm_ratio: Schedulable = 1.0,
    update_rate: Schedulable = 0.01,
    axis: AxisSpec = None,
) -> Transformation:
    """AdamW whose decay draws norms to a target: w ← w − λ m̂/(√v̂ + eps) − κ (1 − r‖w₀‖/‖w‖) w.

    r is `norm_ratio`, κ is `update_rate`; r = 0 is weight decay κ, κ = 1 sets the norm at once. κ
    is not multiplied by λ. The target is kept per filter, and κ = 0.01 is a choice made here.

    Source: Loshchilov (2023), Weight norm control, equation (3), arXiv 2311.11446.

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.array([[2.0], [0.0]]), jnp.zeros((2, 1))
    >>> tx = unitnorm.adamwn(0.1, norm_ratio=0.5, update_rate=1.0)
    >>> step, _ = tx.update(g, tx.init(w), w)
    >>> print((w + step).ravel())  # half its norm at once
    [1. 0.]
    """

    def control(axes: Axes, count: Array, w: Array, u: Array, start: Array) -> Arrays:
        target = number(norm_ratio) * start
        excess = 1 - target * geometry.inverse_norms(geometry.norms_of(w, axes))
        return u - number(update_rate) * excess * w, start

    adam = optax.adam(learning_rate, b1, b2, eps)
    return widened(optax.chain(adam, stateful(control, (norms_leaf,), axis)))


@with_rate
def muon(
    learning_rate: LearningRate,
    momentum: Schedulable = 0.95,
    weight_decay: Number = 0.0,
    *,
    nesterov: bool = True,
    axis: AxisSpec = None,
) -> Transformation:
    """Momentum made orthogonal, of the matrix whose columns are the filters: optax.contrib.muon.

    m ← μ m + (1−μ) g; of m̂ (with Nesterov, looked ahead) about the nearest matrix with orthonormal
    rows or columns, by five Newton-Schulz steps, times √max(1, filters/entries). With `axis` of all
    axes the matrix is one column. The kernels of a stack of layers are one matrix here.

    Source: Jordan, Jin, Boza, You, Cesista, Newhouse and Bernstein (2024), Muon: an optimizer for
    hidden layers in neural networks; momentum 0.95, Nesterov and five steps are theirs, λ is 0.02
    in their code (KellerJordan/Muon).

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.eye(2), jnp.diag(jnp.array([1.0, 100.0]))
    >>> tx = unitnorm.muon(0.1)
    >>> step, _ = tx.update(g, tx.init(w), w)
    >>> print(bool((jnp.diag(step) < -0.04).all()))  # both, whatever their gradients
    True
    """

    def numbers(axes: Axes, w: Array) -> optax.contrib.MuonDimensionNumbers:
        others = tuple(a for a in range(w.ndim) if a not in axes)
        return optax.contrib.MuonDimensionNumbers(axes, others)

    return widened(
        optax.contrib.muon(
            learning_rate,
            beta=momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
            muon_weight_dimension_numbers=lambda params: map_filters(numbers, axis, params),
        )
    )


@with_rate
def manifold_muon(
    learning_rate: LearningRate,
    *,
    dual_steps: int = 10,
    dual_rate: float = 0.1,
    axis: AxisSpec = None,
) -> Transformation:
    """Muon among orthonormal filters: W ← msign(W − λ A), WᵀW = 1, msign(U Σ Vᵀ) = U Vᵀ.

    W has the filters as columns, or the entries where those are fewer. A = msign(G + 2 W Λ) is the
    steepest direction of spectral norm one among the tangent ones, WᵀA + AᵀW = 0, for the right Λ:
    dual ascent from Λ = −(WᵀG + GᵀW)/4 takes `dual_steps` steps Λ ← Λ − α (1 − k/K) (WᵀA + AᵀW),
    and stops where their entries are below 1e-6. The first update makes W orthonormal.
    A singular value decomposition for each of these steps: for small matrices.

    Source: Bernstein (2025), Modular manifolds (thinkingmachines.ai), and its code
    (thinking-machines-lab/manifolds), whose K is 100 and α 0.01.

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.eye(3)[:, :2], jnp.ones((3, 2))
    >>> tx = unitnorm.manifold_muon(0.1)
    >>> step, _ = tx.update(g, tx.init(w), w)
    >>> print(jnp.abs((w + step).T @ (w + step)).round(4))
    [[1. 0.]
     [0. 1.]]
    """

    def leaf(axes: Axes, w: Array, g: Array) -> Array:
        filters = FilterAxes(axes)
        W, G = as_columns(w, filters), as_columns(g, filters)
        wide = W.shape[0] < W.shape[1]
        if wide:
            W, G = W.T, G.T

        def ascend(k: Array, carried: tuple[Array, Array]) -> Arrays:
            dual = carried[0]
            A = _msign(G + 2 * _times(W, dual))
            off = _times(W.T, A) + _times(A.T, W)
            step = jnp.where(jnp.sqrt(jnp.mean(off**2)) < TOLERANCE, 0, dual_rate)
            return dual - step * (1 - k / dual_steps) * off, A

        dual = -(_times(W.T, G) + _times(G.T, W)) / 4
        A = jax.lax.fori_loop(0, dual_steps, ascend, (dual, jnp.zeros_like(W)))[1]
        new = _msign(W - number(learning_rate) * A)
        return from_columns(new.T if wide else new, filters, w.shape) - w

    return widened(stateless(leaf, axis))


def _times(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _msign(x: Array) -> Array:
    """U Vᵀ of x = U Σ Vᵀ; directions that x does not have are left out."""
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    there = s > jnp.finfo(x.dtype).eps * max(x.shape) * jnp.max(s, initial=0)
    return _times(u * there, vt)


def dot(a: Array, b: Array, axes: Axes) -> Array:
    """⟨a, b⟩ per filter by one plain sum, which joins the loops around it: where the last digits of
    a norm do not count, as they do in `geometry.inner`."""
    return jnp.sum(a * b, axes, keepdims=True)
