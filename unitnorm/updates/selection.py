"""Which parameters are filters: the kernels that feed a normalisation layer.

Nothing here goes by the names of parameters. A *selection*, wherever one is asked for, is a pytree
(or prefix of one) shaped like the parameters, or a function from the parameters to one. It holds
True or "filters" for filters, `FilterAxes` for those over axes of their own, and False or "rest"
for all else. A pytree that is callable, such as an Equinox module, is a pytree.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unitnorm import geometry
from unitnorm.updates.parts import AxisSpec, axis_of_leaves, is_function, leaf_name, leaves_beside

Selection = Any | Callable[[optax.Params], Any]

# How little scaling the filters must change the output, against scaling every entry by itself.
# Batch normalisation leaves about its ε over the variance of a feature, 1e-5; a kernel that is not
# normalised changes the output by the same order either way.
_TOLERANCE = 0.01
_DOUBTFUL = 0.1  # below it, but not below the tolerance: partly normalised


@dataclass(frozen=True)
class FilterAxes:
    """In a selection: a leaf of filters, each of which runs over `axes`, non-negative integers.

    A selection with these is one tree that says which leaves hold filters and how they lie, as a
    tree of `optax.contrib.MuonDimensionNumbers` does for Muon: `axes` is its `reduction_axis`, all
    other axes count filters, and a leaf without filters is False, where Muon's is None.
    """

    axes: tuple[int, ...]


class KernelFinding(NamedTuple):
    """What `examine_kernels` found of one leaf."""

    name: str  # its path
    shape: tuple[int, ...]
    axes: tuple[int, ...] | None  # over which a filter runs; None: no filters
    effect: float  # of scaling the filters, over that of scaling every entry; NaN: not tried
    reason: str


@dataclass(frozen=True)
class KernelReport:
    """The kernels that a network normalises: a selection, and why; it prints as a table."""

    selection: Any  # a pytree shaped like the parameters, of True, `FilterAxes` or False
    findings: tuple[KernelFinding, ...]  # one for each leaf, in order

    def __str__(self) -> str:
        rows = [("leaf", "shape", "filters over", "effect", "finding")] + [
            (
                found.name,
                str(found.shape),
                "" if found.axes is None else str(found.axes),
                "" if np.isnan(found.effect) else f"{found.effect:.0e}",
                found.reason,
            )
            for found in self.findings
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        )
        return "\n".join(line.rstrip() for line in lines)


def normalized_kernels(
    apply: Callable[[optax.Params], Any],
    params: optax.Params,
    *,
    axis: AxisSpec = None,
    seed: int = 0,
) -> Any:
    """Find the kernels whose filters the network normalises, by the symmetry itself.

    The selection of `examine_kernels`, which takes the same arguments and also says why. It holds
    True where filters run over every axis but the last, and `FilterAxes` where the network shows
    that they lie otherwise. `build` and `normalize_filters` follow it; an update made by hand for
    `partition` needs `axis=axes_of_selection(selection)`.

    Returns:
        A pytree shaped like `params`: a selection.

    Raises:
        ValueError: as `examine_kernels`.

    >>> import jax.numpy as jnp, numpy as np, unitnorm
    >>> x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 5)))
    >>> params = {"hidden": jnp.ones((5, 4)), "out": jnp.ones((4, 3))}
    >>> def apply(params):
    ...     h = x @ params["hidden"]
    ...     return ((h - h.mean(0)) / h.std(0)) @ params["out"]
    >>> unitnorm.normalized_kernels(apply, params)
    {'hidden': True, 'out': False}
    """
    return examine_kernels(apply, params, axis=axis, seed=seed).selection


def examine_kernels(
    apply: Callable[[optax.Params], Any],
    params: optax.Params,
    *,
    axis: AxisSpec = None,
    seed: int = 0,
) -> KernelReport:
    """Try every leaf for filters that the network normalises, and report what was found.

    A leaf is chosen if the output stays the same when each of its filters is multiplied by a
    positive factor of its own, and changes when each entry is. Batch normalisation gives that,
    also across a ReLU or pooling before it, and the updates on the oblique manifold need it. Layer
    normalisation does not, as it undoes only a factor that all filters share; nor does a bias
    between the kernel and a ReLU.

    How the filters lie is found the same way: an axis counts filters if the output bears a factor
    for each place along it. So a dense kernel may be (in, out) or (out, in), and the kernels of a
    stack of layers (nnx.scan, jax.lax.scan) are told from one kernel.

    The symmetry belongs to the network and not to its parameters, so it is tested at parameters
    moved a little at random, where no start at zero hides what a leaf does. This takes one forward
    pass, and for every leaf of two axes or more one for each axis and two more.

    Args:
        apply: from parameters to outputs (any pytree of arrays), in training mode, with the
            statistics of the batch: a real batch of some tens of examples. It must be
            deterministic: fix the key of any dropout. Of a pair whose second is no array only the
            first counts: the second holds new statistics, as Linen's `mutable` and Equinox's
            stateful layers give. Compiled (jax.jit) it is faster.
        params: parameters, such as a Linen dictionary, an nnx.State of nnx.Param or the arrays of
            an Equinox module.
        axis: axes over which one filter runs, see `parts.AxisSpec`; default: they are found.
            Leaves that hold no filters over it are not tried. Nor is a leaf whose filters have a
            single entry: there is no direction to learn on the manifold.
        seed: of the random factors.

    Warns:
        UserWarning: a leaf is normalised in part alone (some of its filters, or nearly), and was
            left out.

    Raises:
        ValueError: the output is not finite, or no leaf passes the test.

    >>> import jax.numpy as jnp, numpy as np, unitnorm
    >>> x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 5)))
    >>> params = {"bias": jnp.ones(4), "kernel": jnp.ones((5, 4))}
    >>> def apply(params):
    ...     h = x @ params["kernel"] + params["bias"]
    ...     return (h - h.mean(0)) / h.std(0)
    >>> report = unitnorm.examine_kernels(apply, params)  # print(report) shows a table
    >>> [(found.name, found.axes, found.reason) for found in report.findings]
    [('bias', None, 'not tried: fewer than two axes'), ('kernel', (0,), 'normalised')]
    """
    named, treedef = jax.tree.flatten_with_path(params)
    # NumPy draws the numbers, for JAX would compile for every shape.
    random = np.random.default_rng(seed)
    leaves = [_moved(random, leaf) for _, leaf in named]

    def output(position: int, leaf: jax.Array) -> jax.Array:
        tried = [*leaves[:position], leaf, *leaves[position + 1 :]]
        arrays = jax.tree.leaves(_without_statistics(apply(jax.tree.unflatten(treedef, tried))))
        return jnp.concatenate([jnp.ravel(geometry.wide(a)) for a in arrays])

    before = output(0, leaves[0])
    if not jnp.all(jnp.isfinite(before)):
        raise ValueError(
            "apply gave outputs that are not finite, so no symmetry of theirs can be tested: "
            "check the batch and the parameters, or select the kernels by a mask"
        )

    def effect_of_scaling(position: int, shape: Sequence[int]) -> float:
        factors = jnp.asarray(2 ** random.uniform(-1, 1, shape), leaves[position].dtype)
        return float(jnp.linalg.norm(output(position, leaves[position] * factors) - before))

    def examine(position: int, spec: geometry.Axis) -> KernelFinding:
        leaf, name = leaves[position], leaf_name(named[position][0])

        def found(axes: tuple[int, ...] | None, effect: float, reason: str) -> KernelFinding:
            return KernelFinding(name, leaf.shape, axes, effect, reason)

        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return found(None, np.nan, f"not tried: {leaf.dtype}")
        # Haiku's scales and offsets are (1, 1, 1, features).
        if spec is None and sum(size > 1 for size in leaf.shape) < 2:
            return found(None, np.nan, "not tried: fewer than two axes")
        if spec is not None:
            try:
                axes = geometry.filter_axes(leaf.shape, spec, name)
            except ValueError:
                return found(None, np.nan, f"not tried: no filters over axis={spec!r}")
            if all(leaf.shape[a] == 1 for a in axes):
                return found(None, np.nan, "not tried: a single entry in a filter")
        entries = effect_of_scaling(position, leaf.shape)
        if entries == 0:
            return found(None, np.nan, "without effect on the output")

        def share(axes: Sequence[int]) -> float:
            one_each = [1 if a in axes else n for a, n in enumerate(leaf.shape)]
            return effect_of_scaling(position, one_each) / entries

        every = range(leaf.ndim)
        if spec is None:
            # an axis of length one has no factors to tell apart
            alone = {a: share([b for b in every if b != a]) for a in every if leaf.shape[a] > 1}
            counting = [a for a, effect in alone.items() if effect < _TOLERANCE]
            axes = tuple(a for a in every if a not in counting)
            if not counting:
                nearest = min(alone.values(), default=np.inf)
                doubtful = nearest < _DOUBTFUL
                return found(None, nearest, "in part" if doubtful else "not normalised")
            if all(leaf.shape[a] == 1 for a in axes):
                return found(None, np.nan, "not tried: a single entry in a filter")
        effect = share(axes)
        if effect < _TOLERANCE:
            return found(axes, effect, "normalised")
        return found(None, effect, "in part" if effect < _DOUBTFUL else "not normalised")

    findings = tuple(examine(i, spec) for i, spec in enumerate(axis_of_leaves(params, axis)))
    in_part = [found.name for found in findings if found.reason == "in part"]
    if in_part:
        warnings.warn(
            f"normalised in part alone, and left out: {', '.join(in_part)}; print "
            "examine_kernels(...) for how far",
            stacklevel=2,
        )
    report = KernelReport(
        jax.tree.unflatten(
            treedef,
            [
                found.axes is not None
                and (found.axes == tuple(range(len(found.shape) - 1)) or FilterAxes(found.axes))
                for found in findings
            ],
        ),
        findings,
    )
    if all(found.axes is None for found in findings):
        raise ValueError(
            "no kernel of the network can have its filters scaled without changing the output: "
            "expected a batch normalisation behind one; check that apply runs in training mode "
            "(batch statistics, not running ones), or select the kernels by a mask"
        )
    return report


def _without_statistics(result: Any) -> Any:
    if isinstance(result, tuple) and len(result) == 2 and not hasattr(result[1], "shape"):
        return result[0]
    return result


def normalized_kernels_nnx(model: Any, *inputs: Any, axis: AxisSpec = None, seed: int = 0) -> Any:
    """`normalized_kernels` among the nnx.Param of a Flax NNX model, by its outputs for `inputs`.

    The model is in training mode and is left as it was, its running statistics included.

    Raises:
        ValueError: see `normalized_kernels`.

    >>> import jax.numpy as jnp, numpy as np, unitnorm
    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(5, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
    >>> x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 5)))
    >>> found = unitnorm.normalized_kernels_nnx(model, x)
    >>> nnx.to_pure_dict(found)
    {'layers': {0: {'bias': False, 'kernel': True}, 1: {'bias': False, 'scale': False}}}
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

    >>> import jax.numpy as jnp, optax, unitnorm
    >>> params = {"bias": jnp.ones(2), "kernel": jnp.eye(2)}
    >>> selection = {"bias": False, "kernel": True}
    >>> tx = unitnorm.partition(unitnorm.un(0.1), optax.adamw(1e-3), selection)
    >>> steps, _ = tx.update(params, tx.init(params), params)
    >>> print(steps["kernel"].tolist())  # the gradient was along the filters
    [[0.0, 0.0], [0.0, 0.0]]
    """
    return optax.partition(
        {"filters": filters, "rest": rest}, lambda params: _labels(params, selection)
    )


def axes_of_selection(selection: Selection) -> AxisSpec:
    """The `axis` of an update for a selection: the axes that it names, elsewhere the default.

    >>> axes_of_selection({"bias": False, "kernel": FilterAxes((1,))})
    {'bias': None, 'kernel': (1,)}
    """
    if is_function(selection):
        return None
    return jax.tree.map(lambda leaf: leaf.axes if isinstance(leaf, FilterAxes) else None, selection)


def normalize_filters(
    params: optax.Params, selection: Selection, *, axis: AxisSpec = None
) -> optax.Params:
    """The parameters with every selected filter divided by its norm; a zero filter stays zero.

    Args:
        params: parameters.
        selection: which leaves are filters.
        axis: axes over which one filter runs, see `parts.AxisSpec`; default: as selected.

    Raises:
        ValueError: a selection or an axis does not fit the parameters.

    >>> import jax.numpy as jnp, unitnorm
    >>> params = {"bias": jnp.ones(2), "kernel": 3 * jnp.eye(2)}
    >>> unitnorm.normalize_filters(params, {"bias": False, "kernel": True})["kernel"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    axis = axes_of_selection(selection) if axis is None else axis
    named, treedef = jax.tree.flatten_with_path(params)
    labels = jax.tree.leaves(_labels(params, selection))
    results = []
    for (path, w), label, spec in zip(named, labels, axis_of_leaves(params, axis), strict=True):
        if label == "filters":
            w = geometry.retraction(w, geometry.filter_axes(jnp.shape(w), spec, leaf_name(path)))
        results.append(w)
    return jax.tree.unflatten(treedef, results)


def _labels(params: optax.Params, selection: Selection) -> Any:
    if is_function(selection):
        selection = selection(params)
    names = {True: "filters", False: "rest", "filters": "filters", "rest": "rest"}
    labels = []
    for leaf in leaves_beside(params, selection, "the selection of filters"):
        value = True if isinstance(leaf, FilterAxes) else leaf
        value = value if isinstance(value, str) else bool(value)
        if value not in names:
            raise ValueError(
                f'a selection of filters holds True, "filters" or FilterAxes, False or "rest", '
                f"got {leaf!r}"
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
