"""Which blocks of its parameters a network leaves free to be scaled, found by the network itself.

No names of parameters, no layouts and no kinds of layers are known here. `tracing` gives the
network in float32, `rows` says from rows of its Jacobian which factors should leave the outputs as
they are, and what they suggest is tried: the blocks are multiplied by factors from 0.3 to 3, and
the outputs have to stay.
"""

import functools
import itertools
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unitnorm import geometry
from unitnorm.updates.parts import AxisSpec, axis_of_leaves, leaf_name
from unitnorm.updates.rows import FIRST_ROWS, Part, Rows
from unitnorm.updates.selection import FilterAxes
from unitnorm.updates.tracing import ENTRY_BY_ENTRY, Origin, evaluate, find_contacts, in_float32

# How little scaling the blocks must change the outputs, against scaling every entry by itself.
# Normalisation leaves about its ε over the variance of a feature, 1e-5; what is not normalised
# changes the outputs by the same order either way.
_TOLERANCE = 0.01
_DOUBTFUL = 0.1  # below it, but not below the tolerance: normalised in part
_MOST_ROWS = 136  # a few at first; and as many more as there are leaves that these leave open


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
        for name, shape, blocks, effect, reason, _ in self.findings:
            over = count = ""
            if blocks is not None:
                over = f"{blocks.axes}" + (f" of {blocks.view}" if blocks.view else "")
                count = str(math.prod(blocks.factors(shape)))
            shown = "" if np.isnan(effect) else f"{effect:.0e}"
            rows.append((name, str(shape), over, count, shown, reason))
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
            found._asdict() | {"effect": None if np.isnan(found.effect) else found.effect}
            for found in self.findings
        ]
        pairs = [pair._asdict() for pair in self.pairs]
        said = {"findings": findings, "pairs": pairs, "passes": self.passes}
        return json.dumps(said, default=asdict)  # of FilterAxes


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
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
            inside = "".join(f"{key}/" for key in path)
            for name in chosen:
                if name.startswith(inside):
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

    The symmetry is tested at parameters moved a little at random, where no start at zero hides what
    a leaf does, and in float32, whatever the network computes in. It takes 8 forward and reverse
    passes, one more for each leaf that is not scaled alone, up to 136 in all; and three forward
    passes or more for each block that is tried.

    Args:
        apply: from parameters to outputs (any pytree of arrays), in training mode, with the
            statistics of the batch: a real batch of some tens of examples. It must be deterministic
            and pure, such that JAX can trace it. Of a pair whose second is no array only the first
            counts: the second holds new statistics, as Linen's `mutable` and Equinox's stateful
            layers give.
        params: such as a Linen dictionary, an nnx.State of nnx.Param or the arrays of an Equinox
            module.
        axis: axes over which one filter runs, see `parts.AxisSpec`; default: they are found.
            Leaves that hold no filters over it are not tried, and nothing is joint.
        seed: of the random points and factors.
        progress: called with a line now and then, such as `print`.

    Warns:
        UserWarning: a kernel is normalised in part alone, and was left out.

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
        return _Search(_Network(apply, params, seed, progress or (lambda line: None))).report(axis)


# --- The network ----------------------------------------------------------------------------------


class _Group(NamedTuple):
    """Leaves that are scaled together, each by a factor or (−1) by its inverse."""

    signs: dict[int, int]
    parts: dict[int, list[Part]]  # that each leaf is divided in, in one order
    blocks: dict[int, FilterAxes]  # the same
    effect: float = math.inf

    def factors(self) -> int:
        return next(math.prod(part.parts for part in parts) for parts in self.parts.values())


class _Network:
    """A network in float32, at random points around its parameters."""

    def __init__(
        self,
        apply: Callable[[optax.Params], Any],
        params: optax.Params,
        seed: int,
        progress: Callable[[str], Any],
    ):
        named, treedef = jax.tree.flatten_with_path(params)
        self.params, self.names = params, [leaf_name(path) for path, _ in named]
        self.given = [leaf for _, leaf in named]
        self.shapes = [jnp.shape(leaf) for leaf in self.given]
        self.floats = [i for i, leaf in enumerate(self.given) if _is_float(leaf)]
        self.random, self.progress, self.passes = np.random.default_rng(seed), progress, 2

        def outputs(leaves: Sequence[Any]) -> list[jax.Array]:
            result = _without_statistics(apply(jax.tree.unflatten(treedef, leaves)))
            arrays = [jnp.asarray(array) for array in jax.tree.leaves(result)]
            halves = ((a.real, a.imag) if jnp.iscomplexobj(a) else (a,) for a in arrays)
            return [part for half in halves for part in half if _is_float(part)]

        point = self.point()
        rounded = [
            jnp.asarray(w, jnp.result_type(leaf)) for w, leaf in zip(point, self.given, strict=True)
        ]
        _refuse_random(outputs, rounded)
        try:
            traced = jax.make_jaxpr(outputs)(rounded)
        except jax.errors.JAXTypeError as error:
            raise ValueError(
                "apply cannot be traced by JAX, as jax.grad has to: make it a pure function of the "
                f"parameters; {str(error).splitlines()[0]}"
            ) from None
        self.code = jax.make_jaxpr(functools.partial(evaluate, traced))(point)
        self.forward = jax.jit(functools.partial(evaluate, self.code))
        self.before = self.outputs(point)
        if not all(np.isfinite(out).all() for out in self.before):
            raise ValueError(
                "apply gave outputs that are not finite, so no symmetry of theirs can be tested: "
                "check the batch and the parameters, or select the kernels by a mask"
            )
        origins = [Origin(frozenset({i} & {*self.floats})) for i in range(len(self.given))]
        sizes = dict(enumerate(map(math.prod, self.shapes)))
        self.contacts = find_contacts(self.code.jaxpr, origins, sizes)

    def point(self) -> list[Any]:
        return [
            _moved(self.random, leaf) if i in self.floats else leaf
            for i, leaf in enumerate(self.given)
        ]

    def outputs(self, leaves: Sequence[Any]) -> list[np.ndarray]:
        self.passes += 1
        return [np.asarray(out, np.float64) for out in self.forward(leaves)]

    def is_kernel(self, leaf: int) -> bool:
        return sum(n > 1 for n in self.shapes[leaf]) >= 2 and any(
            leaf in contact.leaves and contact.primitive not in ENTRY_BY_ENTRY
            for contact in self.contacts
        )

    def rows(
        self,
        leaves: Sequence[int],
        extra: Sequence[Any] = (),
        evaluate: Callable[[list[Any], list[Any]], list[Any]] | None = None,
    ) -> Rows:
        """A few rows of leaves and of extra arrays, numbered on.

        `evaluate` goes from parameters and extra arrays to outputs.
        """
        count = len(self.given)
        of = [*leaves, *range(count, count + len(extra))]
        shapes = [*self.shapes, *map(jnp.shape, extra)]
        scales = [np.sqrt(np.mean(out**2)) or 1.0 for out in self.before]

        @jax.jit
        def row(arrays: list[Any], cotangents: list[Any]) -> list[jax.Array]:
            def outputs(chosen: list[Any]) -> list[Any]:
                full = list(arrays)
                for i, array in zip(of, chosen, strict=True):
                    full[i] = array
                return evaluate(full[:count], full[count:]) if evaluate else self.forward(full)

            chosen = [arrays[i] for i in of]
            (slopes,) = jax.vjp(outputs, chosen)[1](cotangents)
            return [w * g for w, g in zip(chosen, slopes, strict=True)]

        def draw() -> list[jax.Array]:
            self.passes += 3
            cotangents = [
                np.asarray(self.random.normal(size=out.shape) / scale, np.float32)
                for out, scale in zip(self.before, scales, strict=True)
            ]
            return row(self.point() + [_moved(self.random, array) for array in extra], cotangents)

        return Rows({i: shapes[i] for i in of}, draw, self.progress)

    def tried(self, group: _Group) -> _Group:
        """A group with the effect of scaling its blocks, over that of scaling every entry.

        It is the least of up to three points: at one, what goes into a kernel may be dead.
        """
        for _ in range(3):
            if group.effect >= _TOLERANCE:
                group = group._replace(effect=min(group.effect, self.effect(group)))
        return group

    def effect(self, group: _Group) -> float:
        # Beside larger features the ε of a normalisation counts less; a pair has to stay balanced.
        start = 10.0 if set(group.signs.values()) == {1} else 1.0
        point = self.point()

        def outputs(factors: Callable[[int], Any]) -> list[np.ndarray]:
            leaves = list(point)
            for i, blocks in group.blocks.items():
                view = np.reshape(leaves[i] * start, blocks.view or self.shapes[i])
                leaves[i] = np.asarray(view * factors(i), np.float32).reshape(self.shapes[i])
            return self.outputs(leaves)

        def draw(shape: int | tuple[int, ...]) -> np.ndarray:
            return np.asarray(self.random.uniform(np.log(0.3), np.log(3), shape))

        logs, before = draw(group.factors()), outputs(lambda i: 1.0)
        shared = outputs(
            lambda i: np.exp(group.signs[i] * logs).reshape(group.blocks[i].factors(self.shapes[i]))
        )
        own = outputs(lambda i: np.exp(draw(group.blocks[i].view or self.shapes[i])))
        return _distance(shared, before) / max(_distance(own, before), 1e-30)


# --- The search -----------------------------------------------------------------------------------


class _Search:
    """From rows to groups of leaves, which are tried, and to what is said of each leaf."""

    def __init__(self, network: _Network):
        self.network, self.names, self.shapes = network, network.names, network.shapes
        self.rows = network.rows(network.floats)
        largest = max((self.rows.effect(i) for i in network.floats), default=0)
        self.live = [i for i in network.floats if self.rows.effect(i) > 1e-6 * largest]
        self.found: dict[int, KernelFinding] = {}

    def report(self, axis: AxisSpec) -> KernelReport:
        network, rows = self.network, self.rows
        for i, leaf in enumerate(network.given):
            if i not in network.floats:
                self.say(i, f"not tried: {jnp.result_type(leaf)}")
            elif i not in self.live:
                self.say(i, "without effect")
        pairs: list[_Group] = []
        if axis is None:
            open_leaves = sum(not rows.free(Part(i)) for i in self.live)
            rows.grow(min(FIRST_ROWS + open_leaves, _MOST_ROWS))
            for group in self.groups():
                self.say_of_group(group)
            pairs = self.pairs()
        else:
            for i, spec in enumerate(axis_of_leaves(network.params, axis)):
                if i in self.live:
                    self.try_by_hand(i, spec)
        for i in self.live:
            if i not in self.found:
                effect = float(np.linalg.norm(rows.sums(Part(i))) / rows.effect(i))
                reason = (self.tied(i) or self.part(i)) if network.is_kernel(i) else None
                self.say(i, reason or "not normalised", effect)
        findings = tuple(self.found[i] for i in range(len(network.given)))
        if in_part := [found.name for found in findings if found.reason.startswith("in part")]:
            warnings.warn(
                f"normalised in part alone, and left out: {', '.join(in_part)}; print "
                "examine_kernels(...) for how far",
                stacklevel=3,
            )
        if not any(found.selected for found in findings):
            raise ValueError(_nothing(findings, self.held_by_constants()))
        selection = jax.tree.unflatten(jax.tree.structure(network.params), map(_selected, findings))
        return KernelReport(selection, findings, tuple(map(self.pair, pairs)), network.passes)

    def say(
        self,
        leaf: int,
        reason: str,
        effect: float = np.nan,
        blocks: FilterAxes | None = None,
        selected: bool = False,
    ) -> None:
        name, shape = self.names[leaf], self.shapes[leaf]
        self.found[leaf] = KernelFinding(name, shape, blocks, effect, reason, selected)

    # --- from rows to groups ---

    def refine(self, signs: dict[int, int]) -> _Group:
        """The finest blocks of leaves that are scaled together."""
        main = max(signs, key=lambda i: (len(self.shapes[i]), -i))
        axes: list[dict[int, Part]] = []  # for each axis of `main` that divides, how all do
        for axis in range(len(self.shapes[main])):
            divisions = self.rows.divisions(main, axis)
            ways = (self.rows.divide_alike(signs, part) for part in divisions)
            axes += [way for way in ways if way is not None][:1]
        subsets = [c for k in range(len(axes) + 1) for c in itertools.combinations(axes, k)]
        subsets.sort(key=lambda c: -math.prod(way[main].parts for way in c))
        tried: list[_Group] = []
        for subset in subsets:
            parts = {i: [way[i] for way in subset] for i in signs}
            blocks = {i: _blocks(self.shapes[i], parts[i]) for i in signs}
            if None in blocks.values():
                continue
            group = _Group(signs, parts, cast(dict[int, FilterAxes], blocks))
            tried.append(self.network.tried(group))
            if tried[-1].effect < _TOLERANCE:
                break
        return min(tried, key=lambda group: group.effect)  # the last subset is empty: one block

    def groups(self) -> list[_Group]:
        """Leaves scaled alone, then those that share a factor, the fewest leaves first."""
        alone = [i for i in self.live if self.rows.free(Part(i))]
        others = [i for i in self.live if i not in alone]
        shared: set[tuple[int, ...]] = set()
        for leaf in others:
            self.network.progress(f"what shares a factor with {self.names[leaf]}")
            items = self.rows.parts(others, 1)
            found = self.rows.signs(Part(leaf), items, positive=True, most=len(others))
            if found is not None:
                shared.add(tuple(sorted(part.leaf for part in found)))
        together = [(i,) for i in alone] + sorted(shared, key=lambda leaves: (len(leaves), leaves))
        return [self.refine(dict.fromkeys(leaves, 1)) for leaves in together]

    def pairs(self) -> list[_Group]:
        """Leaves that are scaled against each other, along an axis or else as a whole."""
        found: dict[frozenset[int], _Group] = {}
        covered: set[tuple[int, int]] = set()
        for leaf in self.live:
            self.network.progress(f"what is scaled against {self.names[leaf]}")
            axes = range(len(self.rows.shapes[leaf]))
            for ways in [*(self.rows.divisions(leaf, axis) for axis in axes), [Part(leaf)]]:
                for part in ways:
                    whole = part.parts == 1 and any((leaf, axis) in covered for axis in axes)
                    if whole or (leaf, part.axis) in covered:
                        break
                    pair = self.rows.signs(part, self.rows.parts(self.live, part.parts))
                    if pair is None or len(set(pair.values())) < 2:
                        continue
                    covered |= {(p.leaf, p.axis) for p in pair}
                    signs = {p.leaf: sign for p, sign in pair.items()}
                    if frozenset(signs) not in found:
                        group = self.refine(signs)
                        if group.effect < _TOLERANCE:
                            found[frozenset(signs)] = group
        return list(found.values())

    # --- from groups to words ---

    def say_of_group(self, group: _Group) -> None:
        """What a group says of its leaves, but for those that another one has taken."""
        kernels = [i for i in group.signs if self.network.is_kernel(i)]
        first = (kernels or list(group.signs))[0]
        taken = [i for i in group.signs if i in self.found]
        why = None
        if group.effect >= _TOLERANCE:
            why = _bound(group.effect) if kernels else "not normalised"
        elif kernels and len(group.signs) == 1:
            why = self.part(first, 0.5)
        elif taken:
            names = ", ".join(self.names[i] for i in taken)
            why = f"free only together with {names}, in blocks of their own"
        refusal = ""
        if sum(math.prod(self.shapes[i]) for i in group.signs) == group.factors():
            refusal = "; not selected: a single entry has no direction"
        elif not kernels:
            refusal = "; not selected: no kernel"
        elif len(kernels) > 1:
            refusal = "; not selected: several kernels"
        for i in group.signs.keys() - taken:
            if why:
                self.say(i, why, group.effect)
                continue
            blocks, reason = group.blocks[i], _in_words(self.shapes[i], group.parts[i])
            if others := [self.names[j] for j in group.signs if j != i]:
                reason += f", together with {', '.join(others)}"
                blocks = replace(blocks, joint=self.names[first])
            self.say(i, reason + refusal, group.effect, blocks, not refusal)

    def try_by_hand(self, i: int, spec: geometry.Axis) -> None:
        shape = self.shapes[i]
        try:
            axes = geometry.filter_axes(shape, spec)
        except ValueError:
            return self.say(i, f"not tried: no filters over axis={spec!r}")
        if all(shape[a] == 1 for a in axes):
            return self.say(i, "not tried: a single entry")
        blocks = FilterAxes(axes)
        parts = [Part(i, a, n) for a, n in enumerate(shape) if a not in axes]
        effect = self.network.tried(_Group({i: 1}, {i: parts}, {i: blocks})).effect
        if effect < _TOLERANCE:
            return self.say(i, _in_words(shape, parts), effect, blocks, True)
        return self.say(i, _bound(effect), effect)

    def pair(self, pair: _Group) -> PairFinding:
        first = min(pair.signs)
        times, divided = (
            tuple(self.names[i] for i in sorted(pair.signs) if pair.signs[i] == sign)
            for sign in (pair.signs[first], -pair.signs[first])
        )
        return PairFinding(times, divided, pair.factors(), pair.effect)

    # --- what stands in the way ---

    def part(self, leaf: int, least: float = 0) -> str | None:
        """Whether some blocks of a leaf can be scaled, more than a share `least`, but not all."""
        for axis in range(len(self.shapes[leaf])):
            for part in self.rows.divisions(leaf, axis):
                vanish, alive = self.rows.vanishing(part)
                good, count = int((vanish & alive).sum()), int(alive.sum())
                if not self.rows.free(part) and good > least * count:
                    return f"in part: {good} of {count} parts of axis {axis}"
        return None

    def tied(self, leaf: int) -> str | None:
        """Whether a leaf is used more than once, and normalised at some of the uses alone."""
        network = self.network
        uses = [
            (c.equation, c.operand) for c in network.contacts if leaf in c.leaves and c.operand >= 0
        ]
        if len(uses) < 2:
            return None

        def used(leaves: list[Any], factors: list[Any]) -> list[Any]:
            by_use = dict(zip(uses, factors, strict=True))

            def rule(number: int, equation: Any, operands: list[Any]) -> Sequence[Any]:
                scaled = [x * by_use.get((number, i), 1) for i, x in enumerate(operands)]
                return in_float32(number, equation, scaled)

            return evaluate(network.code, leaves, rule)

        ones = [jnp.ones(network.code.jaxpr.eqns[e].invars[o].aval.shape) for e, o in uses]
        rows = network.rows([], ones, used)
        free = sum(rows.free(Part(i)) for i in rows.shapes)
        if not 0 < free < len(uses):
            return None
        return f"tied: used {len(uses)} times, and normalised at {free} of them alone"

    def held_by_constants(self) -> list[str]:
        """Kernels whose factors running statistics would have to follow."""
        code = self.network.code
        places = [
            k
            for k, c in enumerate(code.consts)
            if _is_float(c) and sum(n > 1 for n in jnp.shape(c)) == 1 and jnp.isfinite(c).all()
        ]

        def held(leaves: list[Any], extra: list[Any]) -> list[Any]:
            constants = dict(enumerate(code.consts)) | dict(zip(places, extra, strict=True))
            return evaluate(code, leaves, constants=constants.values())

        rows = self.network.rows(self.live, [code.consts[k] for k in places], held)

        def follows(leaf: int) -> bool:
            for axis, n in enumerate(self.shapes[leaf]):
                part = Part(leaf, axis, n)
                alone, along = (rows.parts(list(which), n) for which in (self.live, rows.shapes))
                if n > 1 and rows.cancelling(part, alone) is None and rows.cancelling(part, along):
                    return True
            return False

        kernels = [i for i in self.live if places and self.network.is_kernel(i)]
        return [self.names[i] for i in kernels if follows(i)]


def _bound(effect: float) -> str:
    """Why blocks are left out that change the outputs by so much."""
    return "in part: nearly" if effect < _DOUBTFUL else "not normalised"


def _nothing(findings: Sequence[KernelFinding], held: Sequence[str]) -> str:
    """Why there is no selection, as well as it is known."""
    start = "no kernel can be scaled without changing the outputs"
    if held:
        return (
            f"{start}; {', '.join(held)} could be if constants were scaled along, such as the "
            "running statistics of a batch normalisation: call the network in training mode, "
            "with the statistics of the batch"
        )
    telling = [f for f in findings if f.blocks or f.reason.startswith(("tied", "in part"))]
    if telling:
        return f"{start}: {'; '.join(f'{f.name}: {f.reason}' for f in telling)}"
    return (
        f"{start}, and none is normalised in part or at some of its uses: expected a batch, group, "
        "layer or RMS normalisation behind one; select kernels by a mask if you know better"
    )


def _selected(found: KernelFinding) -> bool | FilterAxes:
    if not found.selected or found.blocks is None:
        return False
    usual = FilterAxes(tuple(range(len(found.shape) - 1)))
    return True if found.blocks == usual else found.blocks


def _blocks(shape: tuple[int, ...], parts: Sequence[Part]) -> FilterAxes | None:
    """The blocks of a leaf whose axes are divided so, in this order; None: not to be written so."""
    dims: list[tuple[int, Part | None]] = []  # of the view, with the part that counts there
    for axis, n in enumerate(shape):
        here = [part for part in parts if part.axis == axis]
        within = n // math.prod(part.parts for part in here)
        if len(here) > 2 or (len(here) == 2 and within > 1):
            return None
        dims += [(part.parts, part) for part in here if not part.strided]
        dims += [(within, None)] if within > 1 or not here else []
        dims += [(part.parts, part) for part in here if part.strided]
    if [part for _, part in dims if part is not None] != list(parts):
        return None
    view = tuple(length for length, _ in dims)
    axes = tuple(a for a, (_, part) in enumerate(dims) if part is None)
    return FilterAxes(axes, None if view == shape else view)


def _in_words(shape: tuple[int, ...], parts: Sequence[Part]) -> str:
    """What has a factor of its own."""
    words = []
    for axis, n in enumerate(shape):
        here = [part for part in parts if part.axis == axis]
        count = math.prod(part.parts for part in here)
        if count == n > 1:
            words.append(f"each index of axis {axis}")
        elif count > 1:
            kind = "strides" if here[0].strided else "runs"
            words.append(f"each of {count} {kind} of axis {axis}")
    return f"a factor for {' and '.join(words)}" if words else "one factor for all of it"


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
