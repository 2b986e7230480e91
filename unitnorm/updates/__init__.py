"""The updates, for any optax training: each is one function and one entry in `UPDATES`.

To add one, write its function in `manifold` (filters keep unit norm) or `euclidean`, out of optax's
own transformations and what is in `parts`, and its entry in the table below. It then works with
`build`, in every command that takes --update, and in the contract tests. All of it, for the sign
of the Riemannian gradient:

    def un_sign(learning_rate, *, axis=None, off_manifold="normalize"):
        \"\"\"Sign of the Riemannian gradient: w ← Orth(w − λ sign(Π_w(∇ℓ))).\"\"\"
        inner = optax.sign_sgd(learning_rate)
        return on_sphere(inner, tangent=["gradient"], axis=axis, off_manifold=off_manifold)

    Update("un-sign", un_sign, optax.sgd, True, "sign of UN's direction"),

An update takes a learning rate first (a number, a traced scalar or an optax schedule, on whose
value its state may not depend) and `axis` by keyword, though it may ignore it; one that constrains
filters takes `off_manifold` too.

An update from another package needs no entry here: give its "package.module:function" wherever a
name is asked for, or declare the function under the entry point group `unitnorm.updates`.
"""

import difflib
import functools
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import optax

from unitnorm.geometry import filter_norms, retraction, tangent_projection
from unitnorm.updates.euclidean import b_sgd, b_sgd_median, sgd_momentum, sgd_wd, sm, weight_norm
from unitnorm.updates.manifold import (
    normalize,
    on_sphere,
    un,
    un_adam,
    un_carried,
    un_momentum,
    un_nesterov,
)
from unitnorm.updates.parts import AxisSpec, LearningRate, refuse_off_manifold, widen
from unitnorm.updates.rivals import (
    adam_g,
    adam_srt,
    adamp,
    adamwn,
    hyperball,
    lars,
    manifold_muon,
    muon,
    nero,
    ngpt,
    renorm_sgd,
    rotational_sgd,
    sgd_g,
    sgdp,
)
from unitnorm.updates.selection import (
    FilterAxes,
    Selection,
    axes_of_selection,
    normalize_filters,
    partition,
)
from unitnorm.updates.symmetries import (
    KernelReport,
    examine_kernels,
    normalized_kernels,
    normalized_kernels_nnx,
)

__all__ = [
    "UPDATES", "FilterAxes", "KernelReport", "Update", "adam_g", "adam_srt", "adamp", "adamwn",
    "assert_on_manifold", "axes_of_selection", "b_sgd", "b_sgd_median", "build",
    "check_update_name", "examine_kernels", "filter_norms", "find_update", "hyperball", "lars",
    "manifold_muon", "muon", "nero", "ngpt", "normalize", "normalize_filters", "normalized_kernels",
    "normalized_kernels_nnx", "on_sphere", "partition", "renorm_sgd", "retraction",
    "rotational_sgd", "sgd_g", "sgd_momentum", "sgd_wd", "sgdp", "sm", "tangent_projection", "un",
    "un_adam", "un_carried", "un_momentum", "un_nesterov", "weight_norm",
]  # fmt: skip


@dataclass(frozen=True)
class Update:
    """An update by name: what becomes of filters, and of every other parameter."""

    name: str
    filters: Callable[..., optax.GradientTransformation]  # of a learning rate, axis= and options
    rest: Callable[[LearningRate], optax.GradientTransformation]
    constrained: bool  # filters stay at unit norm
    summary: str  # one line, with its source


_heavy_ball = functools.partial(optax.sgd, momentum=0.9)
_nesterov = functools.partial(optax.sgd, momentum=0.9, nesterov=True)
_jordan = functools.partial(optax.sgd, momentum=0.85, nesterov=True)
_adam = functools.partial(optax.adam, b2=0.95)

_UPDATES = (
    Update("b-sgd", b_sgd, optax.sgd, False, "gradient descent (the paper's B-SGD)"),
    Update("un", un, optax.sgd, True, "Riemannian gradient descent at unit norm (Table 1)"),
    Update("un-momentum", un_momentum, _heavy_ball, True, "UN with heavy-ball momentum 0.9"),
    Update("un-nesterov", un_nesterov, _nesterov, True, "UN with Nesterov momentum 0.9"),
    Update("un-adam", un_adam, optax.adam, True, "Riemannian Adam (Bécigneul and Ganea 2019)"),
    Update("sm", sm, optax.sgd, False, "scaled metric: step ‖w‖²∇ℓ (the paper's section 2)"),
    Update("normalize", normalize, optax.sgd, True, "step, then unit norm (Huang et al. 2017)"),
    Update("weight-norm", weight_norm, optax.sgd, False, "W = g v/‖v‖ (Salimans and Kingma 2016)"),
    Update("sgd-wd", sgd_wd, optax.sgd, False, "weight decay 5e-4 (van Laarhoven 2017)"),
    Update("sgd-momentum", sgd_momentum, _heavy_ball, False, "momentum 0.9, weight decay 5e-4"),
    Update("sgdp", sgdp, _heavy_ball, False, "projected SGD with momentum (Heo et al. 2021)"),
    Update("adamp", adamp, optax.adam, False, "projected Adam (Heo et al. 2021)"),
    Update("sgd-g", sgd_g, _heavy_ball, True, "momentum along geodesics (Cho and Lee 2017)"),
    Update("adam-g", adam_g, optax.adam, True, "Adam along geodesics (Cho and Lee 2017)"),
    Update("nero", nero, optax.adam, True, "relative steps of neurons (Liu et al. 2021)"),
    Update("lars", lars, _heavy_ball, False, "layer-wise rates (You et al. 2017)"),
    Update("rotational-sgd", rotational_sgd, _heavy_ball, True, "fixed angle (Kosson et al. 2023)"),
    Update("adam-srt", adam_srt, optax.adam, False, "Adam turned along (Roburin et al. 2022)"),
    Update("un-carried", un_carried, optax.sgd, True, "UN at B-SGD's effective rates"),
    Update("b-sgd-median", b_sgd_median, optax.sgd, False, "B-SGD, each layer's median norm held"),
    Update("hyperball", hyperball, optax.adam, True, "steps of fixed length (Wen et al. 2026)"),
    Update("ngpt", ngpt, _adam, True, "Adam, then unit norm (Loshchilov et al. 2024)"),
    Update("renorm-sgd", renorm_sgd, _jordan, False, "unit norm, then a fixed step (Jordan 2024)"),
    Update("adamwn", adamwn, optax.adam, False, "Adam, norms drawn to a target (Loshchilov 2023)"),
    Update("muon", muon, optax.adam, False, "orthogonal momentum (Jordan et al. 2024)"),
    Update("manifold-muon", manifold_muon, optax.adam, False, "orthonormal (Bernstein 2025)"),
)
UPDATES: Mapping[str, Update] = MappingProxyType({update.name: update for update in _UPDATES})


def check_update_name(name: str) -> str:
    """The name of an update as `find_update` takes it, spelt as in the registry.

    Underscores are hyphens, and the case of letters does not matter. Nothing is imported: a name
    "package.module:function" is returned as it is.

    Raises:
        ValueError: the name is unknown; with those that come near, and all there are.

    >>> check_update_name("un_adam")
    'un-adam'
    """
    if ":" in name:
        return name
    known = {known.lower().replace("_", "-"): known for known in [*UPDATES, *_entry_points()]}
    plain = name.strip().lower().replace("_", "-")
    if plain not in known:
        near = difflib.get_close_matches(plain, known, 2, 0.7)
        meant = f" (did you mean {' or '.join(known[n] for n in near)}?)" if near else ""
        raise ValueError(
            f"{name!r} is not an update{meant}; expected one of {', '.join(known.values())}, "
            "or package.module:function"
        )
    return known[plain]


def find_update(name: str) -> Update:
    """The update of that name: of `UPDATES`, of an entry point, or package.module:function.

    A function from outside takes what one of `UPDATES` takes; it constrains filters if it has
    `off_manifold`, and optax.sgd updates the rest. An `Update` from outside says so itself.

    Raises:
        ValueError: as `check_update_name`; or what the name stands for cannot be imported, or is no
            update.

    >>> import unitnorm
    >>> unitnorm.find_update("un_adam").summary
    'Riemannian Adam (Bécigneul and Ganea 2019)'
    """
    name = check_update_name(name)
    if name in UPDATES:
        return UPDATES[name]
    try:
        found = pkgutil.resolve_name(name) if ":" in name else _entry_points()[name].load()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"update {name!r} cannot be imported: {error}") from None
    if isinstance(found, Update):
        return found
    if not callable(found):
        raise ValueError(f"update {name!r} is a {type(found).__name__}, expected a function")
    parameters = inspect.signature(found).parameters
    if "axis" not in parameters:
        raise ValueError(f"update {name!r} takes no axis=: see unitnorm.updates for what it must")
    summary = (inspect.getdoc(found) or name).splitlines()[0]
    return Update(name, found, optax.sgd, "off_manifold" in parameters, summary)


def _entry_points() -> Mapping[str, importlib.metadata.EntryPoint]:
    points = importlib.metadata.entry_points(group="unitnorm.updates")
    return {point.name: point for point in points}


def build(
    name: str,
    learning_rate: LearningRate,
    filters: Selection,
    *,
    filters_learning_rate: LearningRate | None = None,
    rest: optax.GradientTransformation | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """The named update for filters, beside the optimiser of every other parameter.

    Args:
        name: see `find_update`.
        learning_rate: of both: a number, a traced scalar or an optax schedule.
        filters: which parameters are filters, see `selection`: for instance the result of
            `normalized_kernels_nnx`.
        filters_learning_rate: of the filters alone; default: `learning_rate`.
        rest: optimiser of every other parameter; default: the Euclidean counterpart in `UPDATES`.
        **options: passed on to the update of the filters, such as `momentum`; or `axis`, which is
            that of the selection where it names one (see `axes_of_selection`).

    optax.inject_hyperparams takes it; a selection that is a function then has to be named in
    static_args=("filters",), for it would pass for a schedule.

    Raises:
        ValueError: the name is unknown. Also by `init` and `update`: the selection does not fit, or
            it holds a leaf without filters.

    >>> import jax.numpy as jnp, optax, unitnorm
    >>> params = {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}
    >>> optimiser = unitnorm.build("un", 0.1, filters={"kernel": True, "bias": False})
    >>> updates, state = optimiser.update(params, optimiser.init(params), params)
    >>> print(unitnorm.filter_norms(optax.apply_updates(params, updates)["kernel"]))
    [1. 1. 1.]
    """
    update = find_update(name)
    options |= options.pop("options", {})  # the form in which inject_hyperparams passes them on
    own = learning_rate if filters_learning_rate is None else filters_learning_rate
    if options.get("axis") is None:
        options["axis"] = axes_of_selection(filters)
    return partition(
        update.filters(own, **options),
        update.rest(learning_rate) if rest is None else rest,
        filters,
    )


def assert_on_manifold(
    params: optax.Params, filters: Selection = True, *, axis: AxisSpec = None
) -> None:
    """Raise unless every selected filter has unit norm: for a test, or every so many steps.

    An update that something scales after it, such as optax.chain(unitnorm.un(0.1), optax.scale(2)),
    leaves the manifold in silence; this says so.
    `filters` says which leaves are filters, as for `build`; `axis` is by default as selected.

    Raises:
        ValueError: a filter's norm is neither 0 nor 1 within 1e-5, or within four times the
            precision of a coarser dtype; with the leaf and the norm. Or parameters are traced.

    >>> import jax.numpy as jnp, unitnorm
    >>> unitnorm.assert_on_manifold({"kernel": jnp.eye(2), "bias": jnp.ones(2)},
    ...                             {"kernel": True, "bias": False})
    """
    refuse_off_manifold(params, normalize_filters(widen(params), filters, axis=axis))
