"""The updates, for any optax training: each is one function and one entry in `UPDATES`.

To add one, write its function in `manifold` (filters keep unit norm) or `euclidean`, out of the
links in `parts`, and its entry in the table below. It then works with `build`, in every command
that takes --update, and in the contract tests. All of it, for the sign of the Riemannian gradient:

    def un_sign(learning_rate, *, axis=None, off_manifold="normalize"):
        \"\"\"Sign of the Riemannian gradient: w ← Orth(w − λ sign(Π_w(∇ℓ))).\"\"\"
        return optax.chain(
            riemannian_gradient(axis),
            optax.scale_by_sign(),
            optax.scale_by_learning_rate(learning_rate),
            retract(axis, off_manifold),
        )

    Update("un-sign", un_sign, optax.sgd, True, "sign of UN's direction"),

An update takes a learning rate first (a number, a traced scalar or an optax schedule, on whose
value its state may not depend) and `axis` by keyword, though it may ignore it; one that constrains
filters takes `off_manifold` too.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import optax

from unitnorm.updates.euclidean import b_sgd, b_sgd_median, sgd_wd, sm, weight_norm
from unitnorm.updates.manifold import (
    normalize,
    un,
    un_adam,
    un_carried,
    un_momentum,
    un_nesterov,
)
from unitnorm.updates.parts import retract, riemannian_gradient, tangent_momentum
from unitnorm.updates.selection import (
    Selection,
    normalize_filters,
    normalized_kernels,
    normalized_kernels_nnx,
    partition,
)

__all__ = [
    "UPDATES",
    "Update",
    "b_sgd",
    "b_sgd_median",
    "build",
    "normalize",
    "normalize_filters",
    "normalized_kernels",
    "normalized_kernels_nnx",
    "partition",
    "retract",
    "riemannian_gradient",
    "sgd_wd",
    "sm",
    "tangent_momentum",
    "un",
    "un_adam",
    "un_carried",
    "un_momentum",
    "un_nesterov",
    "weight_norm",
]


@dataclass(frozen=True)
class Update:
    """An update by name: what becomes of filters, and of every other parameter."""

    name: str
    filters: Callable[..., optax.GradientTransformation]  # of a learning rate, axis= and options
    rest: Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]
    constrained: bool  # filters stay at unit norm
    summary: str  # one line, with its source


_heavy_ball = functools.partial(optax.sgd, momentum=0.9)
_nesterov = functools.partial(optax.sgd, momentum=0.9, nesterov=True)

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
    Update("un-carried", un_carried, optax.sgd, True, "UN at B-SGD's effective rates"),
    Update("b-sgd-median", b_sgd_median, optax.sgd, False, "B-SGD, rate times median ‖w‖²"),
)
UPDATES: Mapping[str, Update] = MappingProxyType({update.name: update for update in _UPDATES})


def build(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    filters: Selection,
    *,
    filters_learning_rate: optax.ScalarOrSchedule | None = None,
    rest: optax.GradientTransformation | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """The named update for filters, beside the optimiser of every other parameter.

    Args:
        name: a key of `UPDATES`.
        learning_rate: of both: a number, a traced scalar or an optax schedule.
        filters: which parameters are filters, see `selection`: for instance the result of
            `normalized_kernels_nnx`.
        filters_learning_rate: of the filters alone; default: `learning_rate`.
        rest: optimiser of every other parameter; default: the Euclidean counterpart in `UPDATES`.
        **options: passed on to the update of the filters, such as `axis` or `momentum`.

    Raises:
        ValueError: the name is unknown. Also by `init` and `update`: the selection does not fit, or
            it holds a leaf without filters.
    """
    if name not in UPDATES:
        raise ValueError(f"unknown update {name!r}; expected one of {', '.join(UPDATES)}")
    update = UPDATES[name]
    own = learning_rate if filters_learning_rate is None else filters_learning_rate
    return partition(
        update.filters(own, **options),
        update.rest(learning_rate) if rest is None else rest,
        filters,
    )


def check_update_name(name: str) -> str:
    """The registry's name for `name`, in which _ may stand for -.

    Raises:
        ValueError: it is unknown.
    """
    known = name.replace("_", "-")
    if known not in UPDATES:
        raise ValueError(f"{name!r} is not an update; expected one of {', '.join(UPDATES)}")
    return known
