"""What updates are made of: links of a chain, a leaf's geometry, and trees of filters.

A link is an optax transformation that knows what a filter is: `stateless` and `stateful` make one
of a function of a single leaf. Chain links with optax's own, and put the chain into
`manifold.on_sphere` for filters at unit norm, or into `widened` for free ones. `with_rate` before
an update has its schedules become numbers. A gradient that is None, as of a frozen parameter,
counts as zero, and its update is None: the parameter stays.
"""

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeGuard, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike
from optax import GradientTransformationExtraArgs as Transformation

from unitnorm import geometry

# One axis specification for all leaves, a pytree (or prefix) of them, or a function from a leaf's
# path, such as "conv1/kernel", to one. A tuple of integers is one specification, never a pytree.
AxisSpec = geometry.Axis | Any | Callable[[str], geometry.Axis]
# A number, a traced scalar, or an optax schedule: from the count of updates to one of these.
Schedulable = ArrayLike | Callable[[Any], Any]
LearningRate = Schedulable
Number = float | Array
Axes = tuple[int, ...]
Arrays = tuple[Array, ...]


# What a memory starts with, in at least float32; a number for each filter keeps the axes of the
# filter at length one.


def norms_leaf(axes: Axes, w: Array) -> Array:
    return geometry.filter_norms(w, axes, keepdims=True)


def per_entry(axes: Axes, w: Array) -> Array:
    """Zeros shaped like a leaf."""
    return jnp.zeros_like(geometry.wide(w))


def per_filter(axes: Axes, w: Array) -> Array:
    """A zero for each filter."""
    return jnp.zeros_like(jnp.sum(geometry.wide(w), axes, keepdims=True))


def widen(tree: Any) -> Any:
    """Every leaf in at least float32; complex ones, which hold no filters, as they are."""
    return jax.tree.map(lambda w: w if jnp.iscomplexobj(w) else geometry.wide(w), tree)


Build = TypeVar("Build", bound=Callable[..., optax.GradientTransformation])


def with_rate(update: Build) -> Build:
    """An update whose numbers may be schedules: it is made anew of what these say, each time.

    It raises ValueError for a rate that is negative, not finite, or no rate.
    """
    signature = inspect.signature(update)

    @functools.wraps(update)
    def checked(learning_rate: Schedulable, *args: Any, **options: Any) -> Any:
        if isinstance(learning_rate, bool | str | bytes | complex | None) or (
            isinstance(learning_rate, numbers.Real) and not 0 <= float(learning_rate) < math.inf
        ):
            raise ValueError(
                f"learning_rate = {learning_rate!r}: expected a finite number of at least 0, an "
                "array, or an optax schedule"
            )
        given = signature.bind(learning_rate, *args, **options).arguments
        schedules = {name for name, value in given.items() if callable(value)} - {"axis"}
        if not schedules:
            return update(**given)
        fixed, dtype = signature.parameters.keys() - schedules, jnp.result_type(float)
        return optax.inject_hyperparams(update, fixed, hyperparam_dtype=dtype)(**given)

    return cast(Build, checked)


def number(value: Schedulable) -> Any:
    """A hyperparameter, which is a number inside an update: see `with_rate`."""
    return value


def correction(decay: Number, count: Array) -> Array:
    """1 − decayᵗ for t = count + 1: what a mean of moments that start at zero is divided by.

    Without the cancellation that costs float32 four digits at 0.999.
    """
    exact = isinstance(decay, float) and decay > 0
    return -jnp.expm1((count + 1) * (math.log(decay) if exact else jnp.log(decay)))


def transformation(
    init: Callable[..., Any], update: Callable[..., Any], *, wide: bool = True
) -> Transformation:
    """An optax transformation of `init` and of `update`, which takes extra arguments.

    A gradient that is None counts as zero, and its update is None. `init` also takes shapes, as of
    jax.eval_shape, and gives shapes. If `wide`, the update needs the parameters, is made in at
    least float32, and its steps have the dtype of their parameters.
    """

    def init_or_shapes(params: optax.Params) -> Any:
        abstract = any(isinstance(w, jax.ShapeDtypeStruct) for w in jax.tree.leaves(params))
        return jax.eval_shape(init, params) if abstract else init(params)

    def update_or_none(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        if params is None and wide:
            raise ValueError(
                "this step depends on where the parameters are: call update(grads, state, params)"
            )
        like = updates if params is None else params
        filled = jax.tree.map(lambda w, u: jnp.zeros_like(w) if u is None else u, like, updates)
        if wide:
            steps, state = update(widen(filled), state, widen(params), **extra)
            steps = jax.tree.map(lambda w, x: x.astype(w.dtype), params, steps)
        else:
            steps, state = update(filled, state, params, **extra)
        return jax.tree.map(lambda w, u, x: u if u is None else x, like, updates, steps), state

    return Transformation(init_or_shapes, update_or_none)


def stateless(leaf: Callable[..., Array], axis: AxisSpec) -> Transformation:
    """An optax transformation that applies leaf(axes, w, u) to every parameter and its update."""

    def init(params: optax.Params) -> optax.OptState:
        check_filters(params, axis)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any, **extra: Any) -> tuple[Any, Any]:
        return map_filters(leaf, axis, params, updates), state

    return transformation(init, update)


class Moments(NamedTuple):
    """What an Adam remembers: two trees; or, for `stateful`, how their leaves start."""

    mu: Any
    nu: Any


class FilterState(NamedTuple):
    """What a link remembers."""

    # shape (), int32: updates so far; optax's name, which hides tuple.count
    count: Array  # type: ignore[assignment]
    memory: Any  # a tuple of trees, each shaped like the parameters or with a number per filter


def stateful(leaf: Callable[..., Arrays], start: tuple[Any, ...], axis: AxisSpec) -> Transformation:
    """An optax transformation with a memory of its own for every parameter.

    Args:
        leaf: of (axes, updates before this one, w, u, *memory) to the new u and the new memory; u
            and what `start` makes are in at least float32.
        start: for each part of the memory a function of (axes, w) to its first value, such as
            `per_entry` and `per_filter`; a NamedTuple of them names the parts.
        axis: axes over which one filter runs, see `AxisSpec`.
    """
    pack = getattr(start, "_make", tuple)

    def init(params: optax.Params) -> FilterState:
        check_filters(params, axis)
        memory = pack([map_filters(function, axis, params) for function in start])
        return FilterState(jnp.zeros([], jnp.int32), memory)

    def update(
        updates: Any, state: FilterState, params: Any, **extra: Any
    ) -> tuple[Any, FilterState]:
        rows = []
        for axes, w, u, *memory in _side_by_side(axis, params, updates, *state.memory):
            new, *after = leaf(axes, state.count, w, u, *memory)
            rows.append([new, *(a.astype(b.dtype) for a, b in zip(after, memory, strict=True))])
        columns = zip(*rows, strict=True) if rows else [()] * (1 + len(start))
        structure = jax.tree.structure(params)
        steps, *trees = (jax.tree.unflatten(structure, column) for column in columns)
        return steps, FilterState(optax.safe_increment(state.count), pack(trees))

    return transformation(init, update)


def widened(inner: optax.GradientTransformation) -> Transformation:
    """`inner` in at least float32, its steps in the dtype of their parameters."""
    inner = optax.with_extra_args_support(inner)
    return transformation(lambda params: inner.init(widen(params)), inner.update)


def map_filters(
    function: Callable[..., Any], axis: AxisSpec, params: optax.Params, *trees: Any
) -> Any:
    """Apply function(axes, w, *leaves) to each leaf w of `params` and those of `trees` beside it.

    Raises:
        ValueError: a leaf has no filters, see `axes_of_leaves`.
    """
    results = [function(*leaves) for leaves in _side_by_side(axis, params, *trees)]
    return jax.tree.unflatten(jax.tree.structure(params), results)


def _side_by_side(axis: AxisSpec, params: optax.Params, *trees: Any) -> Iterable[Any]:
    """For each leaf of `params` its axes, itself, and what stands in its place in each tree."""
    structure: Any = jax.tree.structure(params)
    beside = [structure.flatten_up_to(tree) for tree in (params, *trees)]
    return zip(axes_of_leaves(params, axis), *beside, strict=True)


def axes_of_leaves(params: optax.Params, axis: AxisSpec) -> list[Axes]:
    """The axes of each leaf of `params` in order, as non-negative integers.

    Raises:
        ValueError: `axis` does not fit the tree, or a leaf of the tree is complex or has no filters
            over it.
    """
    named = [(leaf_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(params)]
    for name, leaf in named:
        if jnp.issubdtype(getattr(leaf, "dtype", float), jnp.complexfloating):
            raise ValueError(
                f"{name} is {leaf.dtype}: filters are real; keep real and imaginary parts in "
                "leaves of their own, or leave it to another optimiser (optax.partition)"
            )
    return [
        geometry.filter_axes(jnp.shape(leaf), spec, name)
        for (name, leaf), spec in zip(named, axis_of_leaves(params, axis), strict=True)
    ]


def axis_of_leaves(params: optax.Params, axis: AxisSpec) -> list[geometry.Axis]:
    """What `axis` says of each leaf of `params` in order, not yet checked against its shape."""
    if is_function(axis):
        return [axis(leaf_name(path)) for path, _ in jax.tree.leaves_with_path(params)]
    return leaves_beside(params, axis, "axis", _is_axis)


def is_function(x: Any) -> TypeGuard[Callable[..., Any]]:
    """A function, and not a pytree that can be called, such as an Equinox module."""
    if isinstance(x, jax.tree_util.Partial):
        return True
    return callable(x) and jax.tree_util.treedef_is_leaf(jax.tree.structure(x))


def leaves_beside(
    params: optax.Params, tree: Any, what: str, is_leaf: Callable[[Any], bool]
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
        broadcast = jax.tree.broadcast(tree, params, is_leaf)
    except ValueError as error:
        raise ValueError(
            f"{what} does not fit the parameters: expected one value, a pytree of values or a "
            f"function; {str(error).splitlines()[0]}"
        ) from None
    structure: Any = jax.tree.structure(params)
    return structure.flatten_up_to(broadcast)


def leaf_name(path: Sequence[Any]) -> str:
    """A leaf's path such as "conv1/kernel", the same for Linen dictionaries and NNX states."""
    # An NNX variable in a state adds a last ".value", which optimisers see at init alone.
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/") or "the array"


def _is_axis(x: Any) -> bool:
    if isinstance(x, tuple):
        return bool(x) and all(isinstance(a, int) for a in x)
    return x is None or isinstance(x, int)


def check_filters(params: optax.Params, axis: AxisSpec) -> None:
    """Refuse before any training what no update can move; norms only where their values are known.

    Raises:
        ValueError: see `axes_of_leaves`; or the square of a norm would leave the range of the
            numbers, so that a filter would pass for a dead one or become NaN.
    """
    named = jax.tree.leaves_with_path(params)
    for (path, w), axes in zip(named, axes_of_leaves(params, axis), strict=True):
        if isinstance(w, jax.core.Tracer | jax.ShapeDtypeStruct):
            continue
        with jax.ensure_compile_time_eval():  # values known inside jax.jit are known here
            norms = np.asarray(geometry.filter_norms(w, axes))
        numbers = jnp.finfo(norms.dtype)
        least, most = (numbers.tiny / numbers.eps) ** 0.5, float(numbers.max) ** 0.5
        outside = ((norms > 0) & (norms < least)) | ((norms > most) & np.isfinite(norms))
        if outside.any():
            norm = float(norms.ravel()[outside.argmax()])
            raise ValueError(
                f"{leaf_name(path)} of shape {jnp.shape(w)} has a filter of norm {norm:.2g}, whose "
                f"square is out of the range of {norms.dtype}: normalize_filters first"
            )


def refuse_off_manifold(params: optax.Params, unit: optax.Params) -> None:
    """Raise ValueError unless parameters are what they are once normalised, which is `unit`."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, unit))):
        raise ValueError(
            "whether filters have unit norm is in the values of the parameters: look outside jit, "
            'or choose off_manifold="normalize"'
        )
    pairs = zip(jax.tree.leaves_with_path(params), jax.tree.leaves(unit), strict=True)
    for (path, w), u in pairs:
        norms = jnp.where(u == 0, 1, geometry.wide(w) / jnp.where(u == 0, 1, u)).ravel()
        errors = jnp.abs(norms - 1)
        # The rounding of a stored filter, with room for norms that other libraries normalised.
        tolerance = max(1e-5, 4 * float(jnp.finfo(w.dtype).eps))
        if errors.size and not jnp.max(errors) <= tolerance:
            norm = float(norms[jnp.argmax(errors)])
            raise ValueError(
                f"{leaf_name(path)} of shape {jnp.shape(w)} is off the manifold: a filter has norm "
                f"{norm:.6g}, expected 1 within {tolerance:.0e}; pass it through normalize_filters "
                'or choose off_manifold="normalize", and let nothing scale updates afterwards'
            )
