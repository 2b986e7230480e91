"""The links from which an update is chained: optax transformations that know what a filter is.

An update on the oblique manifold reads

    optax.chain(riemannian_gradient(axis), ..., optax.scale_by_learning_rate(lr), retract(axis))

`retract` comes last, for whatever scales an update after it takes the filters off the manifold.
Whatever shapes the step, the learning rate included, goes between the two. In between, steps are in
at least float32 and are those of the *normalised* filter w/‖w‖: since the loss of a network does
not change when a filter that feeds a normalisation layer is scaled, ∇ℓ(w/‖w‖) = ‖w‖ ∇ℓ(w), so a
filter that starts off the manifold moves exactly as if it had been normalised first.

Add a link here when two updates need it; a link of one update stays beside that update.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeGuard, get_args

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from unitnorm import geometry

# One axis specification for all leaves, a pytree (or prefix) of them, or a function from a leaf's
# path, such as "conv1/kernel", to one. A tuple of integers is one specification, never a pytree.
AxisSpec = geometry.Axis | Any | Callable[[str], geometry.Axis]
# A number, a traced scalar, or an optax schedule: from the count of updates to one of these.
LearningRate = ArrayLike | Callable[[Any], Any]
NEEDS_PARAMS = "this step depends on where the parameters are: call update(grads, state, params)"
OffManifold = Literal["normalize", "raise", "trust"]


def riemannian_gradient(axis: AxisSpec = None) -> optax.GradientTransformationExtraArgs:
    """Turn the gradient g at w into ‖w‖ (g − ⟨w, g⟩ w / ‖w‖²): the Riemannian one at w/‖w‖.

    Equation (2) of the paper, first line, per filter. A zero filter gives zero.

    >>> import jax.numpy as jnp, unitnorm
    >>> w, g = jnp.array([[2.0], [0.0]]), jnp.array([[5.0], [7.0]])
    >>> link = unitnorm.riemannian_gradient()
    >>> print(link.update(g, link.init(w), w)[0].ravel())
    [ 0. 14.]
    """
    return stateless(riemannian_gradient_of, axis)


def riemannian_gradient_of(axes: tuple[int, ...], w: jax.Array, g: jax.Array) -> jax.Array:
    """What `riemannian_gradient` does to one parameter w and its gradient g."""
    return _norms(w, axes) * geometry.tangent_projection(w, geometry.wide(g), axes)


def normalized_gradient(axis: AxisSpec = None) -> optax.GradientTransformation:
    """Turn the gradient g at w into ‖w‖ g: the Euclidean gradient at w/‖w‖."""

    def leaf(axes: tuple[int, ...], w: jax.Array, g: jax.Array) -> jax.Array:
        return _norms(w, axes) * geometry.wide(g)

    return stateless(leaf, axis)


class TangentMomentumState(NamedTuple):
    """Shaped like the parameters, in at least float32, tangent where it was last used."""

    momentum: optax.Params


def tangent_momentum(
    momentum: float | jax.Array, nesterov: bool = False, axis: AxisSpec = None
) -> optax.GradientTransformationExtraArgs:
    """Momentum over Riemannian gradients r: m ← μ Π_w(m) + r, and r + μ m with Nesterov.

    The buffer starts at zero and is moved by projection onto the tangent space at the current
    point, so each step is tangent, the first included.

    >>> import jax.numpy as jnp, unitnorm
    >>> w, r = jnp.array([[1.0], [0.0]]), jnp.array([[0.0], [2.0]])
    >>> link = unitnorm.tangent_momentum(0.9)
    >>> state = link.init(w)
    >>> for _ in range(2):
    ...     step, state = link.update(r, state, w)
    >>> print(step.ravel())
    [0.  3.8]
    """

    def init(params: optax.Params) -> TangentMomentumState:
        return TangentMomentumState(
            jax.tree.map(lambda w: jnp.zeros_like(geometry.wide(w)), params)
        )

    def update(
        updates: optax.Updates, state: TangentMomentumState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, TangentMomentumState]:
        def leaf(axes: tuple[int, ...], w: jax.Array, r: jax.Array, m: jax.Array) -> jax.Array:
            moved = momentum * geometry.tangent_projection(w, m, axes)
            return (moved + r).astype(m.dtype)

        buffer = map_filters(leaf, axis, params, updates, state.momentum)
        if nesterov:
            updates = jax.tree.map(lambda r, m: r + momentum * m, updates, buffer)
        else:
            updates = buffer
        return updates, TangentMomentumState(buffer)

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))


def retract(
    axis: AxisSpec = None, off_manifold: OffManifold = "normalize"
) -> optax.GradientTransformationExtraArgs:
    """Turn a step u into the displacement Orth(w/‖w‖ + u) − w, so that w + displacement has norm 1.

    The last link of a chain. A zero filter stays where it is. The new norm is one to the rounding
    of the larger of w and the new w: for a filter of norm far above one the first update lands
    only nearly on the manifold, and the second on it.

    Args:
        axis: axes over which one filter runs, see `AxisSpec`.
        off_manifold: what becomes of filters that do not start at unit norm. "normalize": the
            first update normalises them. "raise": `init` refuses them, and needs concrete
            parameters for that. Zero filters are allowed by both. "trust": there are none of
            either kind, and gradients are tangent or nearly so, as those of filters that feed a
            normalisation layer; nobody looks, and an update may leave out what only others need.

    Raises:
        ValueError: by `init`, for a leaf without filters or, with "raise", off the manifold.

    >>> import jax.numpy as jnp, unitnorm
    >>> w, u = jnp.array([[1.0], [0.0]]), jnp.array([[0.0], [0.75]])
    >>> link = unitnorm.retract()
    >>> step, _ = link.update(u, link.init(w), w)
    >>> print((w + step).ravel())
    [0.8 0.6]
    """
    if off_manifold not in get_args(OffManifold):
        names = ", ".join(get_args(OffManifold))
        raise ValueError(f"off_manifold must be one of {names}; got {off_manifold!r}")

    link = stateless(retracted, axis)

    def init(params: optax.Params) -> optax.OptState:
        if off_manifold == "raise":
            _refuse_off_manifold(params, axis)
        return link.init(params)

    return optax.with_extra_args_support(optax.GradientTransformation(init, link.update))


def retracted(axes: tuple[int, ...], w: jax.Array, u: jax.Array) -> jax.Array:
    """What `retract` does to one parameter w and its step u."""
    # ‖w‖ (w/‖w‖ + u): the retraction divides by the norm, so this needs no division of its own.
    step = geometry.wide(w) + _norms(w, axes) * u
    return (geometry.retraction(step, axes) - geometry.wide(w)).astype(w.dtype)


def in_dtype_of_params() -> optax.GradientTransformation:
    """Round steps to the dtype of their parameters: the last link of a chain without `retract`."""
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda u, w: u.astype(w.dtype), updates, params)
    )


def stateless(
    leaf: Callable[..., jax.Array], axis: AxisSpec
) -> optax.GradientTransformationExtraArgs:
    """An optax transformation that applies leaf(axes, w, u) to every parameter and its update."""

    def init(params: optax.Params) -> optax.OptState:
        axes_of_leaves(params, axis)  # refuses leaves without filters before any training
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        return map_filters(leaf, axis, params, updates), state

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))


def map_filters(
    function: Callable[..., Any], axis: AxisSpec, params: optax.Params | None, *trees: Any
) -> Any:
    """Apply function(axes, w, *leaves) to each leaf w of `params` and those of `trees` beside it.

    Raises:
        ValueError: `params` is None; or a leaf has no filters, see `axes_of_leaves`.
    """
    if params is None:
        raise ValueError(NEEDS_PARAMS)
    boxes = [_Box(axes) for axes in axes_of_leaves(params, axis)]
    axes_tree = jax.tree.unflatten(jax.tree.structure(params), boxes)
    return jax.tree.map(
        lambda box, *leaves: function(box.content, *leaves), axes_tree, params, *trees
    )


def axes_of_leaves(params: optax.Params, axis: AxisSpec) -> list[tuple[int, ...]]:
    """The axes of each leaf of `params` in order, as non-negative integers.

    Raises:
        ValueError: `axis` does not fit the tree, or a leaf of the tree has no filters over it.
    """
    named = [(leaf_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(params)]
    return [
        geometry.filter_axes(jnp.shape(leaf), spec, name)
        for (name, leaf), spec in zip(named, axis_of_leaves(params, axis), strict=True)
    ]


def axis_of_leaves(params: optax.Params, axis: AxisSpec) -> list[geometry.Axis]:
    """What `axis` says of each leaf of `params` in order, not yet checked against its shape.

    Raises:
        ValueError: `axis` does not fit the tree.
    """
    if is_function(axis):
        return [axis(leaf_name(path)) for path, _ in jax.tree.leaves_with_path(params)]
    return leaves_beside(params, axis, "axis", _is_axis)


def is_function(x: Any) -> TypeGuard[Callable[..., Any]]:
    """A function, and not a pytree that can be called, such as an Equinox module."""
    if isinstance(x, jax.tree_util.Partial):
        return True
    return callable(x) and jax.tree_util.treedef_is_leaf(jax.tree.structure(x))


def leaves_beside(
    params: optax.Params, tree: Any, what: str, is_leaf: Callable[[Any], bool] | None = None
) -> list[Any]:
    """For each leaf of `params` in order, the leaf of `tree` that goes with it.

    Leaves go by their paths, which are the same for an NNX state and the bare arrays that
    nnx.Optimizer makes of it. Failing that, `tree` is a prefix of `params`.

    Raises:
        ValueError: neither fits.
    """
    named = {leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree, is_leaf)}
    names = [leaf_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    if all(name in named for name in names):
        return [named[name] for name in names]
    try:
        boxes = jax.tree.broadcast(jax.tree.map(_Box, tree, is_leaf=is_leaf), params)
    except ValueError as error:
        raise ValueError(
            f"{what} does not fit the parameters: expected one value, a pytree of values or a "
            f"function; {str(error).splitlines()[0]}"
        ) from None
    return [box.content for box in jax.tree.leaves(boxes)]


@dataclasses.dataclass(frozen=True)
class _Box:
    """Hides a tuple or None from jax.tree."""

    content: Any


def leaf_name(path: Sequence[Any]) -> str:
    """A leaf's path such as "conv1/kernel", the same for Linen dictionaries and NNX states."""
    # An NNX variable in a state adds a last ".value", which optimisers see at init alone.
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/") or "the array"


def _norms(w: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return geometry.filter_norms(w, axes, keepdims=True)


def _is_axis(x: Any) -> bool:
    if isinstance(x, tuple):
        return bool(x) and all(isinstance(a, int) for a in x)
    return x is None or isinstance(x, int)


def _refuse_off_manifold(params: optax.Params, axis: AxisSpec) -> None:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params)):
        raise ValueError(
            'off_manifold="raise" looks at the values of the parameters: call init outside jit, '
            'or choose off_manifold="normalize"'
        )
    axes_by_leaf = axes_of_leaves(params, axis)
    for (path, w), axes in zip(jax.tree.leaves_with_path(params), axes_by_leaf, strict=True):
        norms = geometry.filter_norms(w, axes).ravel()
        errors = jnp.where(norms == 0, 0, jnp.abs(norms - 1))
        # The rounding of a stored filter, with room for norms that other libraries normalised.
        tolerance = max(1e-5, 4 * float(jnp.finfo(w.dtype).eps))
        worst = jnp.argmax(errors)
        if not errors[worst] <= tolerance:
            raise ValueError(
                f"{leaf_name(path)} of shape {jnp.shape(w)} is off the manifold: over axes {axes} "
                f"a filter has norm {float(norms[worst]):.6g}, expected 1 within {tolerance:.0e}; "
                'pass it through normalize_filters first or choose off_manifold="normalize"'
            )
