"""Which parameters are filters: the kernels that feed a normalisation layer.

Nothing here goes by the names of parameters. A *selection*, wherever one is asked for, is a pytree
(or prefix of one) shaped like the parameters with True or "filters" for filters and False or "rest"
for all else, or a function from the parameters to one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unitnorm import geometry
from unitnorm.updates.parts import AxisSpec, axis_of_leaves, leaf_name, leaves_beside

Selection = Any | Callable[[optax.Params], Any]

# How little scaling the filters must change the output, against scaling every entry by itself.
# Batch normalisation leaves about its ε over the variance of a feature, 1e-5; a kernel that is not
# normalised changes the output by the same order either way.
_TOLERANCE = 0.01


def normalized_kernels(
    apply: Callable[[optax.Params], Any],
    params: optax.Params,
    *,
    axis: AxisSpec = None,
    seed: int = 0,
) -> Any:
    """Find the kernels whose filters the network normalises, by the symmetry itself.

    A leaf is chosen if the output stays the same when each of its filters is multiplied by a
    positive factor of its own, and changes when each entry is. Batch normalisation gives that,
    also across a ReLU or pooling before it, and the updates on the oblique manifold need it. Layer
    normalisation does not, as it undoes only a factor that all filters share; nor does a bias
    between the kernel and a ReLU.

    The symmetry belongs to the network and not to its parameters, so it is tested at parameters
    moved a little at random, where no start at zero hides what a leaf does. This takes one forward
    pass and two more for every leaf tried.

    Args:
        apply: from parameters to outputs (any pytree of arrays), in training mode, with the
            statistics of the batch: a real batch of some tens of examples. It must be
            deterministic: fix the key of any dropout. Compiled (jax.jit) it is faster.
        params: parameters, such as a Linen dictionary or an nnx.State of nnx.Param.
        axis: axes over which one filter runs, see `parts.AxisSpec`. By default leaves of fewer
            than two axes are not tried. Nor is a leaf whose filters have a single entry: there is
            no direction to learn on the manifold.
        seed: of the random factors.

    Returns:
        A pytree of bool shaped like `params`: a selection.

    Raises:
        ValueError: the output is not finite, no leaf passes the test, or as `geometry.filter_axes`.
    """
    named, treedef = jax.tree.flatten_with_path(params)
    # NumPy draws the numbers, for JAX would compile for every shape.
    random = np.random.default_rng(seed)
    leaves = [_moved(random, leaf) for _, leaf in named]

    def output(position: int, leaf: jax.Array) -> jax.Array:
        tried = [*leaves[:position], leaf, *leaves[position + 1 :]]
        arrays = jax.tree.leaves(apply(jax.tree.unflatten(treedef, tried)))
        return jnp.concatenate([jnp.ravel(geometry.wide(a)) for a in arrays])

    before = output(0, leaves[0])
    if not jnp.all(jnp.isfinite(before)):
        raise ValueError(
            "apply gave outputs that are not finite, so no symmetry of theirs can be tested: "
            "check the batch and the parameters, or select the kernels by a mask"
        )

    def effect_of_scaling(position: int, shape: Sequence[int]) -> jax.Array:
        factors = jnp.asarray(2 ** random.uniform(-1, 1, shape), leaves[position].dtype)
        return jnp.linalg.norm(output(position, leaves[position] * factors) - before)

    def is_normalized(position: int, axis: geometry.Axis) -> bool:
        leaf = leaves[position]
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or (axis is None and leaf.ndim < 2):
            return False
        axes = geometry.filter_axes(leaf.shape, axis, leaf_name(named[position][0]))
        one_per_filter = tuple(1 if a in axes else n for a, n in enumerate(leaf.shape))
        if one_per_filter == leaf.shape:
            return False
        of_filters = effect_of_scaling(position, one_per_filter)
        # Strictly less, for scaling a leaf without any effect changes nothing either way.
        return bool(of_filters < _TOLERANCE * effect_of_scaling(position, leaf.shape))

    chosen = [is_normalized(i, spec) for i, spec in enumerate(axis_of_leaves(params, axis))]
    if not any(chosen):
        raise ValueError(
            "no kernel of the network can have its filters scaled without changing the output: "
            "expected a batch normalisation behind one; check that apply runs in training mode "
            "(batch statistics, not running ones), or select the kernels by a mask"
        )
    return jax.tree.unflatten(treedef, chosen)


def normalized_kernels_nnx(model: Any, *inputs: Any, axis: AxisSpec = None, seed: int = 0) -> Any:
    """`normalized_kernels` among the nnx.Param of a Flax NNX model, by its outputs for `inputs`.

    The model is in training mode and is left as it was, its running statistics included.

    Raises:
        ValueError: see `normalized_kernels`.
    """
    from flax import nnx  # half a second that no other update needs

    graphdef, params, *rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def apply(params: Any) -> Any:
        return nnx.merge(graphdef, params, *rest, copy=True)(*inputs)

    return normalized_kernels(apply, params, axis=axis, seed=seed)


def partition(
    filters: optax.GradientTransformation,
    rest: optax.GradientTransformation,
    selection: Selection,
) -> optax.GradientTransformationExtraArgs:
    """optax.partition of the parameters into filters and all else, each with its own optimiser.

    The selection may be that of an NNX state: it also fits the bare arrays that nnx.Optimizer
    passes on.

    Raises:
        ValueError: by `init` and `update`, for a selection that does not fit the parameters.
    """
    return optax.partition(
        {"filters": filters, "rest": rest}, lambda params: _labels(params, selection)
    )


def normalize_filters(
    params: optax.Params, selection: Selection, *, axis: AxisSpec = None
) -> optax.Params:
    """The parameters with every selected filter divided by its norm; a zero filter stays zero.

    Args:
        params: parameters.
        selection: which leaves are filters.
        axis: axes over which one filter runs, see `parts.AxisSpec`.

    Raises:
        ValueError: a selection or an axis does not fit the parameters.
    """
    named, treedef = jax.tree.flatten_with_path(params)
    labels = jax.tree.leaves(_labels(params, selection))
    results = []
    for (path, w), label, spec in zip(named, labels, axis_of_leaves(params, axis), strict=True):
        if label == "filters":
            w = geometry.retraction(w, geometry.filter_axes(jnp.shape(w), spec, leaf_name(path)))
        results.append(w)
    return jax.tree.unflatten(treedef, results)


def _labels(params: optax.Params, selection: Selection) -> Any:
    if callable(selection):
        selection = selection(params)
    names = {True: "filters", False: "rest", "filters": "filters", "rest": "rest"}
    labels = []
    for leaf in leaves_beside(params, selection, "the selection of filters"):
        value = leaf if isinstance(leaf, str) else bool(leaf)
        if value not in names:
            raise ValueError(
                f'a selection of filters holds True or "filters", False or "rest", got {leaf!r}'
            )
        labels.append(names[value])
    return jax.tree.unflatten(jax.tree.structure(params), labels)


def _moved(random: np.random.Generator, leaf: Any) -> jax.Array:
    array = np.asarray(leaf)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return jnp.asarray(leaf)
    size = np.sqrt(np.mean(array.astype(float) ** 2))
    # A start at zero gets the size that keeps features of size one: by width for a kernel.
    usual = (array.shape[-1] / array.size) ** 0.5 if array.ndim >= 2 else 1.0
    noise = random.normal(size=array.shape) * (0.1 * size if size else usual)
    return jnp.asarray(array + noise, array.dtype)
