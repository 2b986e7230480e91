"""The updates that leave the norms of filters free, which the paper and others set against UN.

`axis` and `learning_rate` are as in `manifold`; what treats every entry alike ignores `axis`.
"""

import jax.numpy as jnp
import optax
from jax import Array

from unitnorm import geometry
from unitnorm.updates.parts import (
    Arrays,
    Axes,
    AxisSpec,
    LearningRate,
    Schedulable,
    Transformation,
    norms_leaf,
    number,
    stateful,
    stateless,
    widened,
    with_rate,
)


@with_rate
def b_sgd(learning_rate: LearningRate, *, axis: AxisSpec = None) -> optax.GradientTransformation:
    """Plain stochastic gradient descent, w ← w − λ ∇ℓ: optax.sgd, which needs no `axis`.

    "Balanced" is the start, filters and class vectors of unit norm, not the step.

    Source: Badrinarayanan, Mishra and Cipolla (2015), section 4.

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.array([[1.0], [0.0]]), jnp.array([[0.0], [1.0]])
    >>> tx = unitnorm.b_sgd(0.5)
    >>> step, _ = tx.update(g, tx.init(w), w)
    >>> print((w + step).ravel().round(3))
    [ 1.  -0.5]
    """
    return optax.sgd(learning_rate)


@with_rate
def b_sgd_median(learning_rate: LearningRate, *, axis: AxisSpec = None) -> Transformation:
    """B-SGD without the fall of its rate: w_i ← w_i − λ m² ∇ℓ, then W ← W/m, m = median ‖w_i‖.

    The median runs over the filters i of a leaf, before the step and again after it. Before a
    normalisation layer the effective rate of B-SGD falls as λ/‖w‖²; here the typical filter of each
    layer keeps λ, while the rates of its filters still differ by their norms: UN's rate without its
    constraint, to set against both. Dividing a whole layer changes nothing that the network
    computes, nor where it goes; without that the norms would grow exponentially, and overflow.

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.eye(3), jnp.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    >>> tx = unitnorm.b_sgd_median(0.5)
    >>> step, _ = tx.update(g, tx.init(w), w)
    >>> print(unitnorm.filter_norms(w + step).round(3))  # only the first filter moved
    [1.118 1.    1.   ]
    """

    def median_norm(axes: Axes, w: Array) -> Array:
        found = geometry.median(geometry.norms_of(w, axes))
        return jnp.where(found == 0, 1, found)

    def ahead(axes: Axes, w: Array, g: Array) -> Array:
        return median_norm(axes, w) ** 2 * g

    def divide(axes: Axes, w: Array, u: Array) -> Array:
        return (w + u) / median_norm(axes, w + u) - w

    rate = optax.scale_by_learning_rate(learning_rate)
    return widened(optax.chain(stateless(ahead, axis), rate, stateless(divide, axis)))


@with_rate
def sgd_wd(
    learning_rate: LearningRate,
    weight_decay: Schedulable = 5e-4,
    *,
    summed_over: int = 1,
    axis: AxisSpec = None,
) -> Transformation:
    """Gradient descent with weight decay: w ← w − λ (∇ℓ + n η w).

    Before a normalisation layer the decay does not regularise, it holds the effective rate λ/‖w‖²
    up. `weight_decay` η weighs against the gradient of a loss that is a mean; a loss summed over a
    mini-batch needs `summed_over` n, its size: 0.05 in all for the default η and a sum over 100. η
    may be a traced scalar, one for each run of a vmap, or a schedule.

    Source: Krogh and Hertz (1991); for its effect here van Laarhoven (2017), L2 regularization
    versus batch and weight normalization.

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.array([[1.0], [0.0]]), jnp.zeros((2, 1))
    >>> tx = unitnorm.sgd_wd(0.1, 5e-4, summed_over=100)
    >>> step, _ = tx.update(g, tx.init(w), w)
    >>> print((w + step).ravel())
    [0.995 0.   ]
    """
    decay = summed_over * number(weight_decay)
    return widened(optax.chain(optax.add_decayed_weights(decay), optax.sgd(learning_rate)))


@with_rate
def sgd_momentum(
    learning_rate: LearningRate,
    momentum: Schedulable = 0.9,
    weight_decay: Schedulable = 5e-4,
    *,
    nesterov: bool = False,
    axis: AxisSpec = None,
) -> Transformation:
    """SGD as most networks are trained: m ← μ m + ∇ℓ + η w, w ← w − λ m, or λ (μ m + ∇ℓ + η w).

    The second is Nesterov's. `weight_decay` η is as in `sgd_wd`. Where norms have settled, filters
    turn by about √(2λη/(1+μ)) a step, whatever the gradient: see `rotational_sgd`.

    Source: Polyak (1964); Sutskever et al. (2013) for Nesterov's form; optax.sgd.

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.array([[1.0], [0.0]]), jnp.array([[0.0], [1.0]])
    >>> tx = unitnorm.sgd_momentum(0.5, weight_decay=0.0)
    >>> state = tx.init(w)
    >>> for _ in range(2):
    ...     step, state = tx.update(g, state, w)
    ...     print(step[1])
    [-0.5]
    [-0.95]
    """
    decay = optax.add_decayed_weights(weight_decay)
    return widened(optax.chain(decay, optax.sgd(learning_rate, momentum, nesterov)))


@with_rate
def sm(learning_rate: LearningRate, *, axis: AxisSpec = None) -> Transformation:
    """Gradient descent in the scaled metric ⟨ξ, η⟩/‖w‖² of each filter: w ← w − λ ‖w‖² ∇ℓ.

    Under w → α w with α > 0 the gradient shrinks by α and the step grows by α, so the network moves
    the same way from every scaling of its filters, with no constraint. On a loss that does not
    depend on norms its filters point where UN's do, step by step, while their norms only grow. A
    zero filter stays zero.

    Source: Badrinarayanan, Mishra and Cipolla (2015), section 2: "a suitable non-Euclidean
    gradient which is invariant to reparameterizations".

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.array([[1.0], [0.0]]), jnp.array([[0.0], [1.0]])
    >>> tx = unitnorm.sm(0.5)
    >>> for scale in (1, 4):  # the gradient at 4 w is a fourth
    ...     step, _ = tx.update(g / scale, tx.init(w), scale * w)
    ...     print((scale * w + step).ravel())
    [ 1.  -0.5]
    [ 4. -2.]
    """

    def leaf(axes: Axes, w: Array, g: Array) -> Array:
        return geometry.norms_of(w, axes) ** 2 * g

    return widened(optax.chain(stateless(leaf, axis), optax.scale_by_learning_rate(learning_rate)))


@with_rate
def weight_norm(learning_rate: LearningRate, *, axis: AxisSpec = None) -> Transformation:
    """Weight normalisation: gradient descent on v and g of W = g v / ‖v‖, from v = W, g = ‖W‖.

    With ∇W the gradient of the loss, ∇g = ⟨∇W, v⟩ / ‖v‖ and ∇v = (g / ‖v‖)(∇W − ∇g v / ‖v‖). Flax
    has it as a layer (linen.WeightNorm) that rewrites the model; here the model keeps W, the pair
    lives in the state, and the update is the displacement of W. So after an edit of W by hand,
    call `init` again. A zero filter stays zero.

    Source: Salimans and Kingma (2016), equations (2) and (3).

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.array([[2.0], [0.0]]), jnp.array([[1.0], [0.0]])
    >>> tx = unitnorm.weight_norm(0.5)
    >>> step, state = tx.update(g, tx.init(w), w)
    >>> print((w + step).ravel(), state.memory[1].ravel())
    [1.5 0. ] [1.5]
    """

    def leaf(axes: Axes, count: Array, w: Array, grad: Array, v: Array, g: Array) -> Arrays:
        rate = number(learning_rate)
        norms = geometry.norms_of(v, axes)
        by_norm = jnp.sum(geometry.unit(v, axes) * grad, axes, keepdims=True)
        by_direction = g / jnp.where(norms == 0, 1, norms) * geometry.project(v, grad, axes)
        v, g = v - rate * by_direction, g - rate * by_norm
        return g * geometry.unit(v, axes) - w, v, g

    return widened(stateful(leaf, (lambda axes, w: geometry.wide(w), norms_leaf), axis))
