"""The updates that leave the norms of filters free, which the paper and others set against UN.

`axis` and `learning_rate` are as in `manifold`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from unitnorm import geometry
from unitnorm.updates.parts import (
    AxisSpec,
    LearningRate,
    in_dtype_of_params,
    map_filters,
    stateless,
)


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
    del axis
    return optax.sgd(learning_rate)


def b_sgd_median(
    learning_rate: LearningRate, *, axis: AxisSpec = None
) -> optax.GradientTransformation:
    """B-SGD without the fall of its rate: w_i ← w_i − λ m² ∇ℓ, then W ← W/m, m = median ‖w_i‖.

    The median runs over the filters i of a leaf, before the step and anew after it. Before a
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

    def ahead(axes: tuple[int, ...], w: jax.Array, g: jax.Array) -> jax.Array:
        return _median_norm(axes, w) ** 2 * geometry.wide(g)

    def divide(axes: tuple[int, ...], w: jax.Array, u: jax.Array) -> jax.Array:
        moved = geometry.wide(w) + u
        return moved / _median_norm(axes, moved) - geometry.wide(w)

    return optax.chain(
        stateless(ahead, axis),
        optax.scale_by_learning_rate(learning_rate),
        stateless(divide, axis),
        in_dtype_of_params(),
    )


def sgd_wd(
    learning_rate: LearningRate,
    weight_decay: float | jax.Array = 5e-4,
    *,
    summed_over: int = 1,
    axis: AxisSpec = None,
) -> optax.GradientTransformation:
    """Gradient descent with weight decay: w ← w − λ (∇ℓ + n η w).

    Before a normalisation layer the decay does not regularise, it holds the effective rate λ/‖w‖²
    up. `weight_decay` η weighs against the gradient of a loss that is a mean; a loss summed over a
    mini-batch needs `summed_over` n, its size: 0.05 in all for the default η and a sum over 100.

    Source: Krogh and Hertz (1991); for its effect here van Laarhoven (2017), L2 regularization
    versus batch and weight normalization.

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.array([[1.0], [0.0]]), jnp.zeros((2, 1))
    >>> tx = unitnorm.sgd_wd(0.1, 5e-4, summed_over=100)
    >>> step, _ = tx.update(g, tx.init(w), w)
    >>> print((w + step).ravel())
    [0.995 0.   ]
    """
    del axis  # the decay is the same for every entry
    return optax.chain(
        optax.add_decayed_weights(summed_over * weight_decay), optax.sgd(learning_rate)
    )


def sm(learning_rate: LearningRate, *, axis: AxisSpec = None) -> optax.GradientTransformation:
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

    def leaf(axes: tuple[int, ...], w: jax.Array, g: jax.Array) -> jax.Array:
        return geometry.filter_norms(w, axes, keepdims=True) ** 2 * geometry.wide(g)

    return optax.chain(
        stateless(leaf, axis), optax.scale_by_learning_rate(learning_rate), in_dtype_of_params()
    )


class WeightNormState(NamedTuple):
    """The parameters behind W = g v / ‖v‖, in at least float32."""

    v: optax.Params  # directions, shaped like W
    g: optax.Params  # norms, with the axes of a filter at length one
    inner: optax.OptState  # state of optax.sgd on the pair (v, g)


def weight_norm(
    learning_rate: LearningRate, *, axis: AxisSpec = None
) -> optax.GradientTransformationExtraArgs:
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
    >>> print((w + step).ravel(), state.g.ravel())
    [1.5 0. ] [1.5]
    """
    sgd = optax.sgd(learning_rate)

    def init(params: optax.Params) -> WeightNormState:
        v = jax.tree.map(geometry.wide, params)
        g = map_filters(_norms, axis, v)
        return WeightNormState(v, g, sgd.init((v, g)))

    def norm_gradient(axes: tuple[int, ...], v: jax.Array, grad: jax.Array) -> jax.Array:
        return jnp.sum(geometry.retraction(v, axes) * geometry.wide(grad), axes, keepdims=True)

    def direction_gradient(
        axes: tuple[int, ...], v: jax.Array, g: jax.Array, grad: jax.Array
    ) -> jax.Array:
        norms = _norms(axes, v)
        return (
            g
            / jnp.where(norms == 0, 1, norms)
            * geometry.tangent_projection(v, geometry.wide(grad), axes)
        )

    def displacement(axes: tuple[int, ...], w: jax.Array, v: jax.Array, g: jax.Array) -> jax.Array:
        return (g * geometry.retraction(v, axes) - geometry.wide(w)).astype(w.dtype)

    def update(
        updates: optax.Updates, state: WeightNormState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, WeightNormState]:
        v, g = state.v, state.g
        gradients = (
            map_filters(direction_gradient, axis, v, g, updates),
            map_filters(norm_gradient, axis, v, updates),
        )
        steps, inner = sgd.update(gradients, state.inner)
        v, g = optax.apply_updates((v, g), steps)
        return map_filters(displacement, axis, params, v, g), WeightNormState(v, g, inner)

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))


def _norms(axes: tuple[int, ...], w: jax.Array) -> jax.Array:
    return geometry.filter_norms(w, axes, keepdims=True)


def _median_norm(axes: tuple[int, ...], w: jax.Array) -> jax.Array:
    median = jnp.median(geometry.filter_norms(w, axes))
    return jnp.where(median == 0, 1, median)
