"""Which blocks of its parameters a network leaves free to be scaled, found by the network itself.

No names of parameters, no layouts and no kinds of layers are known here. For parameters w and
outputs f(w), factors exp(u) of the entries leave the outputs as they are if r·u = 0 for every row
r = w ∘ ∂⟨c, f⟩/∂w, whatever the point w and the cotangent c. A row costs one reverse pass for all
leaves together, and sums of its entries over a block say what the block's common factor does:

- a leaf is scaled in blocks of its own where the sums over each of them vanish;
- leaves share a factor where their sums cancel, as those of a kernel and its bias do;
- a pair takes a factor and its inverse where one's sums are those of the other.

What the rows suggest is then tried: the blocks are multiplied by factors from 0.3 to 3, and the
outputs have to stay.
"""

import functools
import itertools
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from unitnorm import geometry
from unitnorm.updates.parts import AxisSpec, axis_of_leaves, leaf_name
from unitnorm.updates.selection import FilterAxes

# How little scaling the blocks must change the outputs, against scaling every entry by itself.
# Normalisation leaves about its ε over the variance of a feature, 1e-5; what is not normalised
# changes the outputs by the same order either way.
_TOLERANCE = 0.01
_DOUBTFUL = 0.1  # below it, but not below the tolerance: normalised in part
_SUGGESTED = 0.05  # of the sums of rows over their sizes: worth a trial
_WEAK = 0.3  # the same of one block among many, whose features may vary as little as an ε
_DEAD = 1e-4  # a block whose effect is this small beside that of the largest says nothing
_ROWS = 8  # at first; and as many more as there are leaves that these leave open
_MOST_ROWS = 136
_FEW = 8  # leaves that may be scaled against one


class KernelFinding(NamedTuple):
    """What `examine_kernels` found of one leaf."""

    name: str  # its path
    shape: tuple[int, ...]
    blocks: FilterAxes | None  # the finest that can be scaled; None: none
    effect: float  # of scaling the blocks, over that of scaling every entry; NaN: not tried
    reason: str
    selected: bool  # whether the selection holds it

    @property
    def axes(self) -> tuple[int, ...] | None:
        """Axes over which a block of the selection runs; None: not selected."""
        return self.blocks.axes if self.blocks is not None and self.selected else None


class PairFinding(NamedTuple):
    """Leaves that take a factor c and others that take 1/c: no update here removes that."""

    times: tuple[str, ...]
    divided: tuple[str, ...]
    factors: int  # independent ones
    effect: float


@dataclass(frozen=True)
class KernelReport:
    """The blocks that a network leaves free to be scaled; it prints as a table.

    Attributes:
        selection: a pytree shaped like the parameters, of True, `FilterAxes` or False.
        findings: one for each leaf, in order.
        pairs: of leaves, which are scaled against each other.
        passes: how many forward passes it took, a reverse pass counted as two more.
    """

    selection: Any
    findings: tuple[KernelFinding, ...]
    pairs: tuple[PairFinding, ...] = ()
    passes: int = 0

    def __str__(self) -> str:
        rows = [("leaf", "shape", "blocks over", "blocks", "effect", "finding")]
        for found in self.findings:
            over = count = ""
            if found.blocks is not None:
                view = found.blocks.view
                over = f"{found.blocks.axes}" + (f" of {view}" if view else "")
                count = str(math.prod(found.blocks.factors(found.shape)))
            effect = "" if np.isnan(found.effect) else f"{found.effect:.0e}"
            rows.append((found.name, str(found.shape), over, count, effect, found.reason))
        lines = _table(rows)
        if self.pairs:
            pairs = [("times c", "times 1/c", "factors", "effect")] + [
                (", ".join(p.times), ", ".join(p.divided), str(p.factors), f"{p.effect:.0e}")
                for p in self.pairs
            ]
            lines += ["", "pairs, which no update removes", *_table(pairs)]
        return "\n".join([*lines, "", f"{self.passes} forward passes"])

    def to_json(self) -> str:
        """The report as JSON: findings, pairs and passes.

        >>> report = KernelReport({"w": False}, (), (), 3)
        >>> report.to_json()
        '{"findings": [], "pairs": [], "passes": 3}'
        """
        findings = [
            found._asdict()
            | {
                "blocks": None if found.blocks is None else asdict(found.blocks),
                "effect": None if np.isnan(found.effect) else found.effect,
            }
            for found in self.findings
        ]
        pairs = [pair._asdict() for pair in self.pairs]
        return json.dumps({"findings": findings, "pairs": pairs, "passes": self.passes})


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def normalized_kernels(
    apply: Callable[[optax.Params], Any],
    params: optax.Params,
    *,
    axis: AxisSpec = None,
    seed: int = 0,
) -> Any:
    """Find the kernels that the network normalises, by the symmetry itself.

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


def normalized_kernels_nnx(model: Any, *inputs: Any, axis: AxisSpec = None, seed: int = 0) -> Any:
    """`normalized_kernels` among the nnx.Param of a Flax NNX model, by its outputs for `inputs`.

    The model is in training mode and is left as it was, its running statistics included.

    Warns:
        UserWarning: as `examine_kernels`; or a selected kernel is inside nnx.WeightNorm, which
            divides it by its norm as well.

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

    def apply(params: Any) -> Any:
        return nnx.merge(graphdef, params, *rest, copy=True)(*inputs)

    selection = normalized_kernels(jax.jit(apply), params, axis=axis, seed=seed)
    chosen = [leaf_name(path) for path, leaf in jax.tree.leaves_with_path(selection) if leaf]
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.WeightNorm):
            inside = leaf_name(tuple(map(jax.tree_util.DictKey, path)))
            for name in chosen:
                if name.startswith(f"{inside}/" if path else ""):
                    warnings.warn(
                        f"{name} is inside nnx.WeightNorm, which writes normalised weights back: "
                        "two normalisers would act on it; take the wrapper off, or the kernel out "
                        "of the selection",
                        stacklevel=2,
                    )
    return selection


def examine_kernels(
    apply: Callable[[optax.Params], Any],
    params: optax.Params,
    *,
    axis: AxisSpec = None,
    seed: int = 0,
    progress: Callable[[str], Any] | None = None,
) -> KernelReport:
    """Find, for every leaf, the finest blocks that can be scaled without changing the outputs.

    A factor for each filter is what batch normalisation leaves free, also across a ReLU or pooling
    before it; one for each group or for the whole kernel, what group, layer and RMS normalisation
    do; one for each head, what the normalisation of queries and keys does. Where a bias stands
    between the kernel and the normalisation, it shares the factors of the kernel: the two are
    joint. How a kernel lies does not matter, nor whether it is a stack of layers (nnx.scan,
    jax.lax.scan) or of networks (jax.vmap).

    Selected are kernels, alone or with their biases. A kernel here is a leaf of two axes or more
    that the network multiplies, convolves or looks up with more than entry by entry. Found but not
    selected are blocks of scales and shifts alone, and blocks of several kernels, such as all that
    end in one normalised sum; their `FilterAxes` stand in the findings, for a selection by hand.

    The symmetry belongs to the network and not to its parameters, so it is tested at parameters
    moved a little at random, where no start at zero hides what a leaf does; and in float32, though
    the network computes in bfloat16. It takes 8 forward and reverse passes, one more for each leaf
    that is not scaled alone, up to 136 in all; and three forward passes or more for
    each block that is tried.

    Args:
        apply: from parameters to outputs (any pytree of arrays), in training mode, with the
            statistics of the batch: a real batch of some tens of examples. It must be deterministic
            and pure, such that JAX can trace it. Of a pair whose second is no array only the first
            counts: the second holds new statistics, as Linen's `mutable` and Equinox's stateful
            layers give.
        params: parameters, such as a Linen dictionary, an nnx.State of nnx.Param or the arrays of
            an Equinox module.
        axis: axes over which one filter runs, see `parts.AxisSpec`; default: they are found.
            Leaves that hold no filters over it are not tried, and nothing is joint.
        seed: of the random points and factors.
        progress: called with a line now and then, such as `print`.

    Warns:
        UserWarning: a kernel is normalised in part alone (some of its blocks, or nearly), and was
            left out.

    Raises:
        ValueError: two calls of `apply` differ; the outputs are not finite; or no kernel is found,
            with what stands in the way.

    >>> import jax.numpy as jnp, numpy as np, unitnorm
    >>> x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 5)))
    >>> params = {"bias": jnp.ones(4), "kernel": jnp.ones((5, 4))}
    >>> def apply(params):
    ...     h = x @ params["kernel"] + params["bias"]
    ...     return (h - h.mean(0)) / h.std(0)
    >>> report = unitnorm.examine_kernels(apply, params)  # print(report) shows a table
    >>> [(found.name, found.axes, found.reason) for found in report.findings]
    [('bias', None, 'without effect'), ('kernel', (0,), 'a factor for each index of axis 1')]
    """
    with jax.default_matmul_precision("highest"):
        return _Search(apply, params, seed, progress or (lambda line: None)).report(axis)


# --- The network as a list of equations -----------------------------------------------------------

_INLINED = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint",
            "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}  # fmt: skip
_ENTRY_BY_ENTRY = {"mul", "add", "sub", "div", "add_any", "max", "min", "pow", "select_n"}
Tap = Callable[[int, int, jax.Array], jax.Array]


def _evaluate(
    closed: ClosedJaxpr,
    arguments: Sequence[Any],
    tap: Tap | None = None,
    constants: Sequence[Any] | None = None,
) -> list[Any]:
    """The outputs of traced code, its calls inlined, in at least float32 throughout.

    Rules of differentiation that the code brings along, and its stops, are left out: what counts is
    what the outputs do.

    Args:
        tap: of the number of an equation, that of an operand and the operand, to the operand.
        constants: in place of those of the code.
    """
    constants = closed.consts if constants is None else constants
    environment = dict(zip(closed.jaxpr.constvars, map(_wide, constants), strict=True))
    environment |= dict(zip(closed.jaxpr.invars, arguments, strict=True))

    def read(variable: Any) -> Any:
        if isinstance(variable, Literal):
            return _wide(variable.val)
        return environment[variable]

    for number, equation in enumerate(closed.jaxpr.eqns):
        operands = [read(variable) for variable in equation.invars]
        if tap is not None:
            operands = [tap(number, i, operand) for i, operand in enumerate(operands)]
        outputs = _results(equation, operands)
        environment |= dict(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in closed.jaxpr.outvars]


def _results(equation: JaxprEqn, operands: list[Any]) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    if name in _INLINED:
        inner = params["call_jaxpr"] if "call_jaxpr" in params else params["jaxpr"]
        inner = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
        return _evaluate(inner, operands)
    if name == "scan":
        consts, carried = params["num_consts"], params["num_consts"] + params["num_carry"]

        def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
            after = _evaluate(params["jaxpr"], [*operands[:consts], *carry, *xs])
            return after[: params["num_carry"]], after[params["num_carry"] :]

        carry, ys = jax.lax.scan(
            body,
            operands[consts:carried],
            operands[carried:],
            params["length"],
            params["reverse"],
            params["unroll"],
        )
        return [*carry, *ys]
    if name == "while":
        test, step = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        return jax.lax.while_loop(
            lambda at: _evaluate(params["cond_jaxpr"], [*operands[:test], *at])[0],
            lambda at: _evaluate(params["body_jaxpr"], [*operands[test:step], *at]),
            operands[step:],
        )
    if name == "cond":
        branches = [
            functools.partial(lambda branch, *at: _evaluate(branch, at), branch)
            for branch in params["branches"]
        ]
        return jax.lax.switch(operands[0], branches, *operands[1:])
    if name in ("stop_gradient", "reduce_precision"):
        return operands
    if name != "bitcast_convert_type":  # which counts bits
        params = {
            key: jnp.dtype("float32") if _is_narrow(value) else value
            for key, value in params.items()
        }
    outputs = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(params))
    return [_wide(out) for out in (outputs if equation.primitive.multiple_results else [outputs])]


def _is_narrow(dtype: Any) -> bool:
    if not isinstance(dtype, np.dtype | type):
        return False
    try:
        return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4
    except TypeError:
        return False


def _wide(x: Any) -> Any:
    return x.astype(jnp.float32) if _is_narrow(getattr(x, "dtype", None)) else x


class _Contact(NamedTuple):
    """Where parameters meet data."""

    equation: int
    operand: int
    leaves: frozenset[int]
    primitive: str


def _contacts(
    jaxpr: Any,
    leaves: dict[Any, frozenset[int]],
    sizes: dict[int, int],
    data: set[Any] | None = None,
) -> list[_Contact]:
    """All equations in which what is made of parameters alone meets what is made of data.

    Args:
        leaves: for variables made of parameters, of which.
        sizes: of the parameters.
        data: variables made of data; default: constants that are no scalars.
    """
    leaves = dict(leaves)
    data = {v for v in jaxpr.constvars if v.aval.shape} if data is None else set(data)
    both = set[Any]()  # made of parameters and data
    contacts = []
    for number, equation in enumerate(jaxpr.eqns):
        operands = [v for v in equation.invars if not isinstance(v, Literal)]
        met = [i for i, v in enumerate(equation.invars) if v in operands and leaves.get(v)]
        union = frozenset[int]().union(*(leaves[equation.invars[i]] for i in met))
        entries = max((equation.invars[i].aval.size for i in met), default=0)
        # A mask of the parameters, or a constant scale, makes no data of them.
        masked = (
            equation.primitive.name in _ENTRY_BY_ENTRY
            and not both.intersection(operands)
            and met
            and equation.outvars[0].aval.size == max(sizes[leaf] for leaf in union) == entries
        )
        if masked or not data.intersection(operands):
            leaves |= {v: union for v in equation.outvars if union}
            continue
        data.update(equation.outvars)
        if met or both.intersection(operands):
            both.update(equation.outvars)
        if equation.primitive.name == "scan" and met:
            body = equation.params["jaxpr"].jaxpr
            inside = dict(zip(body.invars, equation.invars, strict=True))
            consts, carry = equation.params["num_consts"], equation.params["num_carry"]
            within = _contacts(
                body,
                {v: leaves[o] for v, o in inside.items() if o in operands and leaves.get(o)},
                sizes,
                {v for v, o in inside.items() if o in operands and o in data}
                | set(body.invars[consts : consts + carry]),
            )
            for leaf in union:
                kinds = {c.primitive for c in within if leaf in c.leaves}
                kind = next((k for k in kinds if k not in _ENTRY_BY_ENTRY), "add")
                contacts.append(_Contact(number, -1, frozenset({leaf}), kind))
            continue
        contacts += [
            _Contact(number, i, leaves[equation.invars[i]], equation.primitive.name) for i in met
        ]
    return contacts


# --- Rows, and what their sums say ----------------------------------------------------------------


class _Split(NamedTuple):
    """An axis in equal parts: runs of neighbours, or every so-manieth entry."""

    axis: int
    parts: int
    strided: bool = False


class _Rows:
    """Sums of rows over all axes of a leaf but one, which is all that splits of axes need."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]):
        self.shapes = [shape or (1,) for shape in shapes]
        self.count = 0
        self._sums: list[list[list[np.ndarray]]] = [[[] for _ in s] for s in self.shapes]
        self._squares: list[list[list[np.ndarray]]] = [[[] for _ in s] for s in self.shapes]

    def add(self, row: Sequence[Any]) -> None:
        self.count += 1
        self._known: dict[tuple[int, _Split], tuple[np.ndarray, np.ndarray]] = {}
        for leaf, (r, shape) in enumerate(zip(row, self.shapes, strict=True)):
            r = np.asarray(r, np.float64).reshape(shape)
            for axis in range(r.ndim):
                others = tuple(a for a in range(r.ndim) if a != axis)
                self._sums[leaf][axis].append(r.sum(others))
                self._squares[leaf][axis].append((r**2).sum(others))

    def sums(self, leaf: int, split: _Split) -> np.ndarray:
        """(rows, parts)"""
        return self._folded(leaf, split)[0]

    def sizes(self, leaf: int, split: _Split) -> np.ndarray:
        """(parts,): what the norm over the rows of `sums` is where entries go their own ways."""
        return self._folded(leaf, split)[1]

    def _folded(self, leaf: int, split: _Split) -> tuple[np.ndarray, np.ndarray]:
        if (leaf, split) not in self._known:
            sums, squares = (
                _fold(np.stack(kept[leaf][split.axis]), split)
                for kept in (self._sums, self._squares)
            )
            self._known[leaf, split] = sums, np.sqrt(squares.sum(0))
        return self._known[leaf, split]

    def free(self, leaf: int, split: _Split) -> bool:
        return _free(self.sums(leaf, split), self.sizes(leaf, split))

    def splits(self, leaf: int, parts: int) -> list[_Split]:
        """All splits of a leaf's axes in so many parts."""
        if parts == 1:
            return [_Split(0, 1)]
        return [
            _Split(axis, parts, strided)
            for axis, n in enumerate(self.shapes[leaf])
            if n % parts == 0
            for strided in ((False, True) if parts < n else (False,))
        ]


def _fold(x: np.ndarray, split: _Split) -> np.ndarray:
    rows, n = x.shape
    if split.strided:
        return x.reshape(rows, n // split.parts, split.parts).sum(1)
    return x.reshape(rows, split.parts, n // split.parts).sum(2)


def _divisors(n: int) -> list[int]:
    """From the largest to 2."""
    return [d for d in range(n, 1, -1) if n % d == 0]


def _vanish(sums: np.ndarray, sizes: np.ndarray, tolerance: float) -> np.ndarray:
    """Which blocks' sums vanish; a dead block's do not count against it."""
    return (np.linalg.norm(sums, axis=0) <= tolerance * sizes) | (sizes <= _DEAD * sizes.max())


def _free(sums: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether all blocks can be scaled: their sums vanish, but for a weak one's ε."""
    together = np.linalg.norm(sums) <= _SUGGESTED * np.linalg.norm(sizes)
    return bool(together and _vanish(sums, sizes, _WEAK).all())


def _cancelling(
    columns: np.ndarray, target: int, owners: Sequence[int], *, positive: bool, most: int
) -> dict[int, float] | None:
    """Few columns, with their coefficients, that cancel the target: c_t + Σ x_j c_j = 0.

    Orthogonal matching pursuit, then without what is not needed. No owner gives two columns.

    Returns:
        Coefficients by column, 1 for the target; None: nothing cancels it.
    """
    norms = np.linalg.norm(columns, axis=0)
    if not norms[target]:
        return None
    owner = np.array(owners)
    usable = (norms > 0) & (owner != owner[target])
    unit = columns / np.where(norms == 0, 1, norms)
    goal = unit[:, target]
    support: list[int] = []

    def solve(support: list[int]) -> tuple[np.ndarray, np.ndarray]:
        x = np.linalg.lstsq(unit[:, support], -goal, rcond=None)[0]
        return x, goal + unit[:, support] @ x

    left = goal
    while np.linalg.norm(left) > _SUGGESTED:
        towards = -(unit.T @ left)
        score = np.where(usable, towards if positive else np.abs(towards), 0)
        best = int(np.argmax(score))
        if score[best] <= 1e-6 or len(support) == most:
            return None
        support.append(best)
        usable &= owner != owner[best]
        x, left = solve(support)
        if positive and (x <= 0).any():
            support = [j for j, value in zip(support, x, strict=True) if value > 0]
            x, left = solve(support)
    for j in sorted(support, key=lambda j: norms[j]):
        fewer = [i for i in support if i != j]
        if np.linalg.norm(solve(fewer)[1]) <= _SUGGESTED:
            support = fewer
    x = solve(support)[0] * norms[target] / norms[support]
    return {target: 1.0, **dict(zip(support, x.tolist(), strict=True))}


def _signs(found: dict[int, float] | None) -> dict[int, int] | None:
    """The coefficients, if all are 1 or −1."""
    if found is None or any(abs(abs(x) - 1) > 0.05 for x in found.values()):
        return None
    return {j: 1 if x > 0 else -1 for j, x in found.items()}


class _Group(NamedTuple):
    """Leaves that are scaled together, each by a factor or (−1) by its inverse."""

    signs: dict[int, int]
    blocks: dict[int, FilterAxes]
    effect: float


def _blocks(shape: tuple[int, ...], splits: Sequence[_Split]) -> FilterAxes | None:
    """The blocks of a leaf whose axes are split so, in this order; None: not to be written so."""
    view: list[int] = []
    counting: list[int] = []  # axes of the view, in the order of the splits
    places: dict[_Split, int] = {}
    for axis, n in enumerate(shape):
        here = [split for split in splits if split.axis == axis]
        runs = [s for s in here if not s.strided]
        strides = [s for s in here if s.strided]
        if len(runs) > 1 or len(strides) > 1:
            return None
        if runs and strides:
            if runs[0].parts * strides[0].parts != n:
                return None
            dims: list[tuple[int, _Split | None]] = [(runs[0].parts, runs[0])]
            dims.append((strides[0].parts, strides[0]))
        elif runs:
            dims = [(runs[0].parts, runs[0]), (n // runs[0].parts, None)]
        elif strides:
            dims = [(n // strides[0].parts, None), (strides[0].parts, strides[0])]
        else:
            dims = [(n, None)]
        if len(dims) > 1:
            dims = [(d, s) for d, s in dims if d > 1 or s is not None]
        for length, split in dims:
            if split is not None:
                places[split] = len(view)
            view.append(length)
    counting = [places[split] for split in splits]
    if counting != sorted(counting):
        return None
    axes = tuple(a for a in range(len(view)) if a not in counting)
    return FilterAxes(axes, None if tuple(view) == tuple(shape) else tuple(view))


# --- The search -----------------------------------------------------------------------------------


class _Search:
    """One network, at random points, and what has been found of it."""

    def __init__(
        self,
        apply: Callable[[optax.Params], Any],
        params: optax.Params,
        seed: int,
        progress: Callable[[str], Any],
    ):
        self.progress, self.passes = progress, 0
        self.random = np.random.default_rng(seed)
        named, self.treedef = jax.tree.flatten_with_path(params)
        self.params = params
        self.names = [leaf_name(path) for path, _ in named]
        self.given = [leaf for _, leaf in named]
        self.shapes = [jnp.shape(leaf) for leaf in self.given]
        self.floats = [i for i, leaf in enumerate(self.given) if _is_float(leaf)]

        def outputs(leaves: Sequence[Any]) -> list[jax.Array]:
            result = _without_statistics(apply(jax.tree.unflatten(self.treedef, leaves)))
            arrays = [jnp.asarray(array) for array in jax.tree.leaves(result)]
            parts = [
                part for a in arrays for part in ((a.real, a.imag) if jnp.iscomplexobj(a) else (a,))
            ]
            return [part for part in parts if jnp.issubdtype(part.dtype, jnp.floating)]

        point = self.point()
        narrow = [
            jnp.asarray(w, jnp.result_type(leaf)) if i in self.floats else leaf
            for i, (w, leaf) in enumerate(zip(point, self.given, strict=True))
        ]
        _refuse_random(outputs, narrow)
        self.passes += 2
        try:
            traced = jax.make_jaxpr(outputs)(narrow)
        except (
            jax.errors.ConcretizationTypeError,
            jax.errors.TracerArrayConversionError,
            jax.errors.TracerIntegerConversionError,
            jax.errors.UnexpectedTracerError,
        ) as error:
            raise ValueError(
                "apply cannot be traced by JAX, as jax.grad has to: make it a pure function of the "
                f"parameters; {str(error).splitlines()[0]}"
            ) from None
        self.flat = jax.make_jaxpr(functools.partial(_evaluate, traced))(point)
        self.forward = jax.jit(functools.partial(_evaluate, self.flat))
        self.before = self.outputs(point)
        if not all(np.isfinite(out).all() for out in self.before):
            raise ValueError(
                "apply gave outputs that are not finite, so no symmetry of theirs can be tested: "
                "check the batch and the parameters, or select the kernels by a mask"
            )
        contacts = _contacts(
            self.flat.jaxpr,
            {self.flat.jaxpr.invars[i]: frozenset({i}) for i in self.floats},
            {i: math.prod(self.shapes[i]) for i in self.floats},
        )
        self.contacts = {i: [c for c in contacts if i in c.leaves] for i in self.floats}

    def point(self) -> list[Any]:
        """The parameters moved a little."""
        return [
            _moved(self.random, leaf) if i in self.floats else leaf
            for i, leaf in enumerate(self.given)
        ]

    def outputs(self, leaves: Sequence[Any]) -> list[np.ndarray]:
        self.passes += 1
        return [np.asarray(out, np.float64) for out in self.forward(leaves)]

    def is_kernel(self, leaf: int) -> bool:
        return sum(n > 1 for n in self.shapes[leaf]) >= 2 and any(
            contact.primitive not in _ENTRY_BY_ENTRY for contact in self.contacts[leaf]
        )

    # --- rows ---

    def add_rows(self, rows: _Rows, to: int, function: Any, extra: Sequence[Any] = ()) -> None:
        """As many rows as are missing, of function(point and extra arrays, cotangents)."""
        scales = [np.sqrt(np.mean(out**2)) or 1.0 for out in self.before]
        for number in range(rows.count, to):
            self.progress(f"row {number + 1} of {to}")
            arrays = self.point() + [_moved(self.random, array) for array in extra]
            cotangents = [
                np.asarray(self.random.normal(size=out.shape) / scale, np.float32)
                for out, scale in zip(self.before, scales, strict=True)
            ]
            rows.add(function(arrays, cotangents))
            self.passes += 3

    def row_function(self, evaluate: Callable[[list[Any]], list[Any]], of: Sequence[int]) -> Any:
        """w ∘ ∂⟨c, outputs⟩/∂w for the arrays at the places `of`."""

        @jax.jit
        def row(arrays: list[Any], cotangents: list[Any]) -> list[jax.Array]:
            def outputs(chosen: list[Any]) -> list[Any]:
                full = list(arrays)
                for i, array in zip(of, chosen, strict=True):
                    full[i] = array
                return evaluate(full)

            chosen = [arrays[i] for i in of]
            _, pull = jax.vjp(outputs, chosen)
            (slopes,) = pull([jnp.asarray(c) for c in cotangents])
            return [w * g for w, g in zip(chosen, slopes, strict=True)]

        return row

    # --- trials with finite factors ---

    def effect(self, signs: dict[int, int], blocks: dict[int, FilterAxes]) -> float:
        """Of scaling blocks together, over that of scaling every entry of those leaves.

        The least of up to three points: at one, what goes into a kernel may be dead.
        """
        effects = (self.effect_at(self.point(), signs, blocks) for _ in range(3))
        least = math.inf
        for effect in effects:
            least = min(least, effect)
            if least < _TOLERANCE:
                break
        return least

    def effect_at(
        self, point: Sequence[Any], signs: dict[int, int], blocks: dict[int, FilterAxes]
    ) -> float:
        """`effect` at a point.

        All are first multiplied by 10 (or, in a pair, left alone): beside larger features the ε of
        a normalisation counts less.
        """
        first = next(iter(blocks))
        count = math.prod(blocks[first].factors(self.shapes[first]))
        start = 10.0 if set(signs.values()) == {1} else 1.0

        def outputs(factors: Callable[[int], Any]) -> list[np.ndarray]:
            leaves = list(point)
            for i in blocks:
                view = np.asarray(leaves[i] * start).reshape(blocks[i].view or self.shapes[i])
                leaves[i] = np.asarray(view * factors(i), np.float32).reshape(self.shapes[i])
            return self.outputs(leaves)

        def draw(shape: int | tuple[int, ...]) -> Any:
            return self.random.uniform(np.log(0.3), np.log(3), shape)

        def shared(i: int) -> Any:
            return np.exp(signs[i] * logs).reshape(blocks[i].factors(self.shapes[i]))

        def own(i: int) -> Any:
            return np.exp(draw(blocks[i].view or self.shapes[i]))

        logs = draw(count)
        before = outputs(lambda _: 1.0)
        together, apart = (_distance(outputs(factors), before) for factors in (shared, own))
        return together / max(apart, 1e-30)

    # --- from rows to blocks ---

    def refine(self, rows: _Rows, place: dict[int, int], signs: dict[int, int]) -> _Group | None:
        """The finest blocks of leaves that are scaled together.

        Args:
            place: of a leaf in the rows.
        """
        main, *others = sorted(signs, key=lambda i: (-len(rows.shapes[place[i]]), i))
        axes: list[list[_Split]] = []  # for each axis of the first that splits, how all do
        for axis, n in enumerate(rows.shapes[place[main]]):
            splits = (
                s for d in _divisors(n) for s in rows.splits(place[main], d) if s.axis == axis
            )
            ways = (self.split_alike(rows, place, signs, main, others, split) for split in splits)
            if (found := next(filter(None, ways), None)) is not None:
                axes.append(found)
        subsets = [c for k in range(len(axes) + 1) for c in itertools.combinations(axes, k)]
        nearest: _Group | None = None
        for subset in sorted(subsets, key=lambda c: -math.prod(way[0].parts for way in c)):
            blocks = {
                i: _blocks(self.shapes[i], [way[k] for way in subset])
                for k, i in enumerate([main, *others])
            }
            whole = {i: b for i, b in blocks.items() if b is not None}
            if len(whole) < len(blocks):
                continue
            effect = self.effect(signs, whole)
            if nearest is None or effect < nearest.effect:
                nearest = _Group(signs, whole, effect)
            if effect < _TOLERANCE:
                break
        return nearest

    def split_alike(
        self,
        rows: _Rows,
        place: dict[int, int],
        signs: dict[int, int],
        main: int,
        others: Sequence[int],
        split: _Split,
    ) -> list[_Split] | None:
        """How the others split where `main` does so, such that all sums cancel part by part."""
        if not others:
            return [split] if rows.free(place[main], split) else None
        items = [(main, split)]
        items += [(i, s) for i in others for s in rows.splits(place[i], split.parts)]
        found = _signs(
            _cancelling(
                self.columns(rows, place, items),
                0,
                [i for i, _ in items],
                positive=False,
                most=len(others),
            )
        )
        alike = {items[j][0]: sign * signs[main] for j, sign in (found or {}).items()}
        if alike != signs:
            return None
        by_leaf = {items[j][0]: items[j][1] for j in found or {}}
        return [by_leaf[i] for i in (main, *others)]

    def report(self, axis: AxisSpec) -> KernelReport:
        rows = _Rows([self.shapes[i] for i in self.floats])
        place = {leaf: k for k, leaf in enumerate(self.floats)}
        row = self.row_function(self.forward, self.floats)
        self.add_rows(rows, _ROWS, row)
        sizes = {i: float(np.linalg.norm(rows.sizes(place[i], _Split(0, 1)))) for i in self.floats}
        largest = max(sizes.values(), default=0)
        live = [i for i in self.floats if sizes[i] > 1e-6 * largest]

        def alone(i: int) -> bool:
            return rows.free(place[i], _Split(0, 1))

        groups: list[_Group] = []
        pairs: list[_Group] = []
        if axis is None:
            open_leaves = [i for i in live if not alone(i)]
            self.add_rows(rows, min(len(open_leaves) + _ROWS, _MOST_ROWS), row)
            open_leaves = [i for i in live if not alone(i)]
            groups = self.groups(
                rows, place, [i for i in live if i not in open_leaves], open_leaves
            )
            pairs = self.pairs(rows, place, live)
            reasons = dict.fromkeys(live, "not normalised")
        else:
            reasons = {}
            for i, spec in enumerate(axis_of_leaves(self.params, axis)):
                if i not in live:
                    continue
                try:
                    axes = geometry.filter_axes(self.shapes[i], spec, self.names[i])
                except ValueError:
                    reasons[i] = f"not tried: no filters over axis={spec!r}"
                    continue
                reasons[i] = "not normalised"
                blocks = {i: FilterAxes(axes)}
                groups.append(_Group({i: 1}, blocks, self.effect({i: 1}, blocks)))
        return self.written(rows, place, live, groups, pairs, reasons, by_hand=axis is not None)

    def groups(
        self, rows: _Rows, place: dict[int, int], alone: Sequence[int], others: Sequence[int]
    ) -> list[_Group]:
        """Leaves scaled alone, then those that share a factor, the fewest leaves first."""
        found = [self.refine(rows, place, {i: 1}) for i in alone]
        columns = self.columns(rows, place, [(i, _Split(0, 1)) for i in others])
        shared: dict[frozenset[int], dict[int, int]] = {}
        for k, leaf in enumerate(others):
            self.progress(f"what shares a factor with {self.names[leaf]}")
            signs = _signs(
                _cancelling(columns, k, others, positive=True, most=len(others))
                if len(others) > 1
                else None
            )
            if signs is not None:
                shared[frozenset(others[j] for j in signs)] = {others[j]: 1 for j in signs}
        found += [self.refine(rows, place, s) for s in sorted(shared.values(), key=len)]
        return [group for group in found if group is not None]

    def pairs(self, rows: _Rows, place: dict[int, int], live: Sequence[int]) -> list[_Group]:
        """Leaves that are scaled against each other, index by index of an axis, or else whole."""
        found: dict[frozenset[int], _Group] = {}
        covered: set[tuple[int, int]] = set()
        for leaf in live:
            for axis, n in enumerate(rows.shapes[place[leaf]]):
                for parts in _divisors(n):
                    if (leaf, axis) in covered:
                        break
                    items = [(i, s) for i in live for s in rows.splits(place[i], parts)]
                    for target in [(leaf, s) for s in rows.splits(place[leaf], parts)]:
                        if target[1].axis != axis:
                            continue
                        group = self.pair(rows, place, items, target)
                        if group is None:
                            continue
                        splits, signs = group
                        covered |= {(i, s.axis) for i, s in splits}
                        if frozenset(signs) not in found:
                            refined = self.refine(rows, place, signs)
                            if refined is not None and refined.effect < _TOLERANCE:
                                found[frozenset(signs)] = refined
                        break
        return list(found.values())

    def pair(
        self,
        rows: _Rows,
        place: dict[int, int],
        items: Sequence[tuple[int, _Split]],
        target: tuple[int, _Split],
    ) -> tuple[list[tuple[int, _Split]], dict[int, int]] | None:
        leaf, split = target
        if rows.free(place[leaf], split):
            return None
        signs = _signs(self.cancelling(rows, place, items, target))
        if signs is None or len(set(signs.values())) < 2:
            return None
        return [items[j] for j in signs], {items[j][0]: sign for j, sign in signs.items()}

    def cancelling(
        self,
        rows: _Rows,
        place: dict[int, int],
        items: Sequence[tuple[int, _Split]],
        target: tuple[int, _Split],
    ) -> dict[int, float] | None:
        """Which few items cancel the target, up to a factor for each."""
        return _cancelling(
            self.columns(rows, place, items),
            items.index(target),
            [i for i, _ in items],
            positive=False,
            most=_FEW,
        )

    def columns(
        self, rows: _Rows, place: dict[int, int], items: Sequence[tuple[int, _Split]]
    ) -> np.ndarray:
        """A column for each item: its sums, of all rows and parts; zero if it is free."""
        columns = []
        for leaf, split in items:
            sums = rows.sums(place[leaf], split)
            columns.append(np.zeros(sums.size) if rows.free(place[leaf], split) else sums.ravel())
        return np.stack(columns, 1) if columns else np.zeros((0, 0))

    # --- in words ---

    def written(
        self,
        rows: _Rows,
        place: dict[int, int],
        live: Sequence[int],
        groups: Sequence[_Group],
        pairs: Sequence[_Group],
        reasons: dict[int, str],
        *,
        by_hand: bool,
    ) -> KernelReport:
        findings: dict[int, KernelFinding] = {}
        in_part: list[str] = []

        def note(
            i: int, blocks: FilterAxes | None, effect: float, reason: str, chosen: bool
        ) -> None:
            findings[i] = KernelFinding(
                self.names[i], self.shapes[i], blocks, effect, reason, chosen
            )

        for group in groups:
            kernels = [i for i in group.signs if by_hand or self.is_kernel(i)]
            new = [i for i in group.signs if i not in findings]
            if group.effect >= _TOLERANCE:
                nearly = group.effect < _DOUBTFUL
                for i in filter(self.is_kernel, new):
                    in_part += [self.names[i]] if nearly else []
                    reason = "in part: nearly" if nearly else "not normalised"
                    note(i, None, group.effect, reason, False)
                continue
            if len(new) < len(group.signs):
                taken = ", ".join(self.names[i] for i in group.signs if i in findings)
                for i in new:
                    reason = f"free only together with {taken}, in blocks of their own"
                    note(i, None, group.effect, reason, False)
                continue
            first = next(iter(group.signs))
            if not by_hand and len(group.signs) == 1 and self.is_kernel(first):
                if reason := self.part(rows, place[first], first, least=0.5):
                    in_part.append(self.names[first])
                    note(first, None, group.effect, reason, False)
                    continue
            count = math.prod(group.blocks[first].factors(self.shapes[first]))
            entries = sum(math.prod(self.shapes[i]) for i in group.signs) // count
            for i in group.signs:
                others = [self.names[j] for j in group.signs if j != i]
                reason = _in_words(group.blocks[i], self.shapes[i])
                if others:
                    reason += f", together with {', '.join(others)}"
                if entries == 1:
                    reason += "; not selected: a single entry has no direction"
                elif not kernels:
                    reason += "; not selected: no kernel"
                elif len(kernels) > 1:
                    reason += "; not selected: several kernels"
                chosen = entries > 1 and len(kernels) == 1
                blocks = group.blocks[i]
                if others:
                    joint = self.names[(kernels or [first])[0]]
                    blocks = FilterAxes(blocks.axes, blocks.view, joint)
                note(i, blocks, group.effect, reason, chosen)
        for i, leaf in enumerate(self.given):
            if i in findings:
                continue
            if i not in self.floats:
                note(i, None, np.nan, f"not tried: {jnp.result_type(leaf)}", False)
            elif i not in live:
                note(i, None, np.nan, "without effect", False)
            else:
                reason = reasons[i]
                if self.is_kernel(i) and not by_hand:
                    reason = self.tied(i) or self.part(rows, place[i], i) or reason
                    if reason.startswith("in part"):
                        in_part.append(self.names[i])
                whole = _Split(0, 1)
                sums, sizes = rows.sums(place[i], whole), rows.sizes(place[i], whole)
                note(i, None, float(np.linalg.norm(sums) / sizes[0]), reason, False)
        ordered = tuple(findings[i] for i in range(len(self.given)))
        if in_part:
            warnings.warn(
                f"normalised in part alone, and left out: {', '.join(in_part)}; print "
                "examine_kernels(...) for how far",
                stacklevel=4,
            )
        if not any(found.selected for found in ordered):
            raise ValueError(self.nothing_found(rows, place, live, ordered))
        return KernelReport(
            jax.tree.unflatten(self.treedef, [_selected(found) for found in ordered]),
            ordered,
            tuple(self.written_pair(pair) for pair in pairs),
            self.passes,
        )

    def written_pair(self, pair: _Group) -> PairFinding:
        first = min(pair.signs)
        times, divided = (
            tuple(self.names[i] for i in sorted(pair.signs) if pair.signs[i] == sign)
            for sign in (pair.signs[first], -pair.signs[first])
        )
        count = math.prod(pair.blocks[first].factors(self.shapes[first]))
        return PairFinding(times, divided, count, pair.effect)

    def part(self, rows: _Rows, k: int, leaf: int, least: float = 0) -> str | None:
        """Whether some blocks of a leaf can be scaled, more than a share `least`, but not all."""
        for axis, n in enumerate(self.shapes[leaf]):
            for parts in _divisors(n):
                for split in rows.splits(k, parts):
                    if split.axis != axis or rows.free(k, split):
                        continue
                    sums, sizes = rows.sums(k, split), rows.sizes(k, split)
                    alive = sizes > _DEAD * sizes.max()
                    good = int((alive & _vanish(sums, sizes, _SUGGESTED)).sum())
                    if good > least * alive.sum():
                        return f"in part: {good} of {alive.sum()} parts of axis {axis}"
        return None

    def tied(self, leaf: int) -> str | None:
        """Whether a leaf is used more than once, and normalised at some of the uses alone."""
        uses = [c for c in self.contacts[leaf] if c.operand >= 0]
        if len(uses) < 2:
            return None

        def evaluate(arrays: list[Any]) -> list[Any]:
            added = dict(zip([(c.equation, c.operand) for c in uses], arrays[-len(uses) :]))

            def tap(equation: int, operand: int, value: Any) -> Any:
                # e^t at t = 1 times the operand: the row of t is that of the operand's entries
                factor = added.get((equation, operand))
                return value if factor is None else value * factor

            return _evaluate(self.flat, arrays[: -len(uses)], tap)

        ones = [
            jnp.ones(self.flat.jaxpr.eqns[c.equation].invars[c.operand].aval.shape) for c in uses
        ]
        places = range(len(self.given), len(self.given) + len(uses))
        rows = _Rows([one.shape for one in ones])
        row = self.row_function(evaluate, places)
        self.add_rows(rows, 4, lambda arrays, c: row([*arrays, *ones], c))
        free = [k for k in range(len(uses)) if rows.free(k, _Split(0, 1))]
        if not free or len(free) == len(uses):
            return None
        return f"tied: used {len(uses)} times, and normalised at {len(free)} of them alone"

    def nothing_found(
        self,
        rows: _Rows,
        place: dict[int, int],
        live: Sequence[int],
        findings: Sequence[KernelFinding],
    ) -> str:
        said = [
            f"{f.name}: {f.reason}" for f in findings if f.reason.startswith(("tied", "in part"))
        ]
        said += [f"{f.name}: {f.reason}" for f in findings if f.blocks is not None]
        start = "no kernel can be scaled without changing the outputs"
        if held := self.held_by_constants(live):
            return (
                f"{start}; {', '.join(held)} could be if constants were scaled along, such as the "
                "running statistics of a batch normalisation: call the network in training mode, "
                "with the statistics of the batch"
            )
        if said:
            return f"{start}: {'; '.join(said)}"
        return (
            f"{start}, and none is normalised in part or at some of its uses: expected a batch, "
            "group, layer or RMS normalisation behind one; select kernels by a mask if you know "
            "better"
        )

    def held_by_constants(self, live: Sequence[int]) -> list[str]:
        """Kernels whose factors running statistics would have to follow."""
        constants = [
            (k, c) for k, c in enumerate(self.flat.consts)
            if _is_float(c) and sum(n > 1 for n in jnp.shape(c)) == 1
            and np.isfinite(np.asarray(c, np.float32)).all()
        ]  # fmt: skip
        if not constants:
            return []
        count = len(self.given)

        def evaluate(arrays: list[Any]) -> list[Any]:
            full = list(self.flat.consts)
            for (k, _), array in zip(constants, arrays[count:], strict=True):
                full[k] = array
            return _evaluate(self.flat, arrays[:count], constants=full)

        of = [*live, *range(count, count + len(constants))]
        extra = [c for _, c in constants]
        rows = _Rows([*(self.shapes[i] for i in live), *(jnp.shape(c) for c in extra)])
        self.add_rows(rows, _ROWS, self.row_function(evaluate, of), extra)
        found = []
        place = {i: k for k, i in enumerate(of)}
        for leaf in filter(self.is_kernel, live):
            for axis, n in enumerate(self.shapes[leaf]):
                target = (leaf, _Split(axis, n))
                items = [(i, s) for i in of for s in rows.splits(place[i], n)]
                alone = [item for item in items if item[0] < count]
                if n > 1 and not rows.free(place[leaf], target[1]):
                    ways = [self.cancelling(rows, place, which, target) for which in (alone, items)]
                    if ways[0] is None and ways[1] is not None:
                        found.append(self.names[leaf])
                        break
        return found


def _selected(found: KernelFinding) -> bool | FilterAxes:
    if not found.selected or found.blocks is None:
        return False
    usual = FilterAxes(tuple(range(len(found.shape) - 1)))
    return True if found.blocks == usual else found.blocks


def _in_words(blocks: FilterAxes, shape: tuple[int, ...]) -> str:
    """What has a factor of its own."""
    factors = blocks.factors(shape)
    if math.prod(factors) == 1:
        return "one factor for all of it"
    words, place = [], 0
    view = blocks.view or shape
    for axis, n in enumerate(shape):
        parts, length = [], 1
        while length < n or (n == 1 and not parts):
            parts.append(factors[place])
            length *= view[place]
            place += 1
        if math.prod(parts) == n > 1:
            words.append(f"each index of axis {axis}")
        elif math.prod(parts) > 1:
            kind = "runs" if parts[0] > 1 else "strides"
            words.append(f"each of {math.prod(parts)} {kind} of axis {axis}")
    return f"a factor for {' and '.join(words)}"


def _refuse_random(outputs: Callable[[Sequence[Any]], list[Any]], leaves: Sequence[Any]) -> None:
    first, second = ([np.asarray(geometry.wide(x)) for x in outputs(leaves)] for _ in range(2))
    for a, b in zip(first, second, strict=True):
        scale = np.abs(a).max(initial=0)
        if np.isfinite(a).all() and np.abs(a - b).max(initial=0) > 1e-2 * scale:
            raise ValueError(
                "apply is not deterministic: two calls with the same parameters gave different "
                "outputs; fix the key of any dropout, as by making it outside of apply and passing "
                "the same one at every call"
            )


def _distance(after: Sequence[np.ndarray], before: Sequence[np.ndarray]) -> float:
    return math.sqrt(
        sum(
            np.sum((a - b) ** 2) / max(np.mean(b**2), 1e-30)
            for a, b in zip(after, before, strict=True)
        )
    )


def _without_statistics(result: Any) -> Any:
    if isinstance(result, tuple) and len(result) == 2 and not hasattr(result[1], "shape"):
        return result[0]
    return result


def _is_float(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))


def _moved(random: np.random.Generator, leaf: Any) -> np.ndarray:
    array = np.asarray(leaf).astype(float)
    size = np.sqrt(np.mean(array**2))
    # A start at zero gets the size that keeps features of size one: by width for a kernel.
    usual = (array.shape[-1] / array.size) ** 0.5 if array.ndim >= 2 else 1.0
    noise = random.normal(size=array.shape) * (0.1 * size if size else usual)
    return np.asarray(array + noise, np.float32)
