"""Which parameters are filters, and in which blocks their norms are held.

A *selection*, wherever one is asked for, is a pytree (or prefix of one) shaped like the parameters,
or a function from the parameters to one. It holds True or "filters" for filters, `FilterAxes` for
those over axes of their own, and False, None or "rest" for all else. A pytree that is callable,
such as an Equinox module, is a pytree. `symmetries` finds one by what the network computes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unitnorm import geometry
from unitnorm.updates import parts
from unitnorm.updates.parts import AxisSpec, is_function, leaf_name

Selection = Any | Callable[[optax.Params], Any]


@dataclass(frozen=True)
class FilterAxes:
    """In a selection: a leaf of filters, each of which runs over `axes`, non-negative integers.

    All other axes count filters. So a tree of these says which leaves hold filters and how they
    lie, as a tree of `optax.contrib.MuonDimensionNumbers` does for Muon: `axes` is its
    `reduction_axis`, and a leaf without filters is False or None.

    Attributes:
        axes: axes over which a filter runs: all of them for one filter that is the whole leaf.
        view: a shape with as many entries, in which the leaf is read, row by row, before `axes`
            are named. It splits an axis: the kernel (in, 64) of 4 heads of 16 is (in, 4, 16), with
            filters over the axes 0 and 2.
        joint: a name. Leaves of the same name are one: the first filter of each belongs to one
            filter with one norm, and so on, in the order of the axes that count. A kernel (in, out)
            and its bias (out) together are FilterAxes((0,), joint="q") and FilterAxes((),
            joint="q").
    """

    axes: tuple[int, ...]
    view: tuple[int, ...] | None = None
    joint: str | None = None

    def factors(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape, beside that of the view, of one number for each filter of a leaf.

        >>> FilterAxes((0, 2), view=(8, 4, 16)).factors((8, 64))
        (1, 4, 1)
        """
        view = self.view or tuple(shape)
        return tuple(1 if a in self.axes else n for a, n in enumerate(view))


def partition(
    filters: optax.GradientTransformation,
    rest: optax.GradientTransformation,
    selection: Selection,
) -> optax.GradientTransformationExtraArgs:
    """optax.partition of the parameters into filters and all else, each with its own optimiser.

    The selection may be that of an NNX state: it also fits the bare arrays that nnx.Optimizer
    passes on. The update of the filters sees a leaf with a `view` in the shape of that view, and
    joint leaves as one array (entries, filters) in the place of the first of them. A gradient that
    is None counts as zero, and its update is None: the parameter stays.

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
    optimisers = {"filters": filters, "rest": rest}

    def init(params: optax.Params) -> optax.OptState:
        layout = _layout(params, selection)
        return optax.partition(optimisers, lambda _: layout.labels()).init(layout.pack(params))

    def update(updates: Any, state: Any, params: Any, **extra: Any) -> tuple[Any, Any]:
        like = updates if params is None else params
        layout = _layout(like, selection)
        steps, state = optax.partition(optimisers, lambda _: layout.labels()).update(
            layout.pack(updates), state, None if params is None else layout.pack(params), **extra
        )
        return layout.unpack(steps, like), state

    return parts.transformation(init, update, wide=False)


def axes_of_selection(selection: Selection) -> AxisSpec:
    """The `axis` of an update for a selection: the axes that it names, elsewhere the default.

    For leaves with a `view` and for joint ones it is that of the arrays which `partition` makes.

    >>> axes_of_selection({"bias": False, "kernel": FilterAxes((1,))})
    {'bias': None, 'kernel': (1,)}
    """
    if is_function(selection):
        return None

    def axes(leaf: Any) -> tuple[int, ...] | None:
        if not isinstance(leaf, FilterAxes):
            return None
        return leaf.axes if leaf.joint is None else (0,)

    return jax.tree.map(axes, selection, is_leaf=_is_none)


def normalize_filters(
    params: optax.Params, selection: Selection, *, axis: AxisSpec = None
) -> optax.Params:
    """The parameters with every selected filter divided by its norm; a zero filter stays zero.

    `axis` is as in `parts.AxisSpec`, by default as selected.

    Raises:
        ValueError: a selection or an axis does not fit the parameters.

    >>> import jax.numpy as jnp, unitnorm
    >>> params = {"bias": jnp.ones(2), "kernel": 3 * jnp.eye(2)}
    >>> unitnorm.normalize_filters(params, {"bias": False, "kernel": True})["kernel"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    axis = axes_of_selection(selection) if axis is None else axis

    def unit(_: Any, filters: Any) -> Any:
        return parts.map_filters(lambda axes, w: geometry.retraction(w, axes), axis, filters)

    divided = partition(optax.stateless(unit), optax.identity(), selection)
    return divided.update(params, divided.init(params), params)[0]


def as_columns(w: jax.Array, blocks: FilterAxes) -> jax.Array:
    """A leaf as an array (entries of a filter, filters)."""
    view = jnp.reshape(w, blocks.view or jnp.shape(w))
    entries = math.prod(view.shape[a] for a in blocks.axes)
    return jnp.moveaxis(view, blocks.axes, range(len(blocks.axes))).reshape(entries, -1)


def from_columns(columns: jax.Array, blocks: FilterAxes, shape: Sequence[int]) -> jax.Array:
    """The leaf of that shape whose `as_columns` is given."""
    view = blocks.view or tuple(shape)
    counting = [n for a, n in enumerate(view) if a not in blocks.axes]
    lying = columns.reshape([view[a] for a in blocks.axes] + counting)
    return jnp.moveaxis(lying, range(len(blocks.axes)), blocks.axes).reshape(shape)


class _Layout(NamedTuple):
    """How the leaves of a tree are handed to the update of the filters."""

    treedef: Any
    chosen: list[Any]  # of each leaf: FilterAxes, or whether it holds filters
    viewed: list[int]  # the leaves that are read in another shape, and are not joint
    joint: dict[str, list[int]]  # the leaves of each name, in order

    def labels(self) -> Any:
        """ "filters" or "rest" for each leaf of a packed tree."""
        labels = ["filters" if leaf else "rest" for leaf in self.chosen]
        return self.treedef.unflatten(self._dropped(labels))

    def pack(self, tree: Any) -> Any:
        leaves = self.treedef.flatten_up_to(tree)
        for i in self.viewed:
            leaves[i] = jnp.reshape(leaves[i], self.chosen[i].view)
        for members in self.joint.values():
            columns = [as_columns(leaves[i], self.chosen[i]) for i in members]
            leaves[members[0]] = jnp.concatenate(columns)
        return self.treedef.unflatten(self._dropped(leaves))

    def unpack(self, packed: Any, like: Any) -> Any:
        """What `pack` packed, each leaf in the shape and dtype of that of `like`."""
        leaves, kind = self.treedef.flatten_up_to(packed), self.treedef.flatten_up_to(like)
        for i in self.viewed:
            leaves[i] = jnp.reshape(leaves[i], jnp.shape(kind[i]))
        for members in self.joint.values():
            rows, start = leaves[members[0]], 0
            for i in members:
                stop = start + jnp.size(kind[i]) // rows.shape[1]
                leaf = from_columns(rows[start:stop], self.chosen[i], jnp.shape(kind[i]))
                leaves[i], start = leaf.astype(jnp.result_type(kind[i])), stop
        return self.treedef.unflatten(leaves)

    def _dropped(self, leaves: list[Any]) -> list[Any]:
        """All but the first of joint leaves as nodes without leaves."""
        gone = {i for members in self.joint.values() for i in members[1:]}
        return [optax.MaskedNode() if i in gone else leaf for i, leaf in enumerate(leaves)]


def _layout(params: optax.Params, selection: Selection) -> _Layout:
    if is_function(selection):
        selection = selection(params)
    named, treedef = jax.tree.flatten_with_path(params)
    values = {True: True, False: False, None: False, "filters": True, "rest": False}
    chosen: list[Any] = []
    viewed: list[int] = []
    joint: dict[str, list[int]] = {}
    counts: dict[str, int] = {}
    given = parts.leaves_beside(params, selection, "the selection of filters", _is_none)
    for i, ((path, w), leaf) in enumerate(zip(named, given, strict=True)):
        if not isinstance(leaf, FilterAxes):
            value = leaf if leaf is None or isinstance(leaf, str) else bool(leaf)
            if value not in values:
                raise ValueError(
                    f'a selection of filters holds True, "filters" or FilterAxes, False, None or '
                    f'"rest", got {leaf!r}'
                )
            chosen.append(values[value])
            continue
        shape, name = jnp.shape(w), leaf_name(path)
        view = leaf.view or shape
        if math.prod(view) != math.prod(shape) or not set(leaf.axes) <= set(range(len(view))):
            raise ValueError(f"{name} of shape {shape} has no filters as {leaf} says")
        chosen.append(leaf)
        if leaf.joint is not None:
            members = joint.setdefault(leaf.joint, [])
            filters = math.prod(leaf.factors(shape))
            if filters != counts.setdefault(leaf.joint, filters):
                raise ValueError(
                    f"joint leaves have the same number of filters: {name} of shape {shape} has "
                    f"{filters}, those before it named {leaf.joint!r} have {counts[leaf.joint]}"
                )
            members.append(i)
        elif leaf.view:
            viewed.append(i)
    return _Layout(treedef, chosen, viewed, joint)


def _is_none(x: Any) -> bool:
    return x is None
