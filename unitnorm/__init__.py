"""unitnorm: SGD on the unit-norm manifold for networks with batch normalisation, in JAX.

    import jax, optax, unitnorm

    x, y = jax.random.normal(jax.random.key(0), (2, 64, 8))
    params = {"kernel": jax.numpy.eye(8), "scale": jax.numpy.ones(8)}
    apply = lambda p: p["scale"] * jax.nn.standardize(x @ p["kernel"], axis=0)
    tx = unitnorm.build("un", 1e-2, unitnorm.normalized_kernels(apply, params))  # was: optax.sgd
    state = tx.init(params)
    updates, state = tx.update(jax.grad(lambda p: abs(apply(p) - y).mean())(params), state, params)
    params = optax.apply_updates(params, updates)  # every filter of the kernel has norm 1

Every public name of the library is listed in `_HOME` with the module it lives in. They are imported
on first use, so that `unitnorm --help` does not wait for JAX; type checkers read the imports below.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unitnorm.archbn.model import ArchBN as ArchBN
    from unitnorm.data import Dataset as Dataset
    from unitnorm.data import load_dataset as load_dataset
    from unitnorm.errors import UserError as UserError
    from unitnorm.geometry import filter_norms as filter_norms
    from unitnorm.geometry import retraction as retraction
    from unitnorm.geometry import tangent_projection as tangent_projection
    from unitnorm.updates import UPDATES as UPDATES
    from unitnorm.updates import FilterAxes as FilterAxes
    from unitnorm.updates import KernelReport as KernelReport
    from unitnorm.updates import Update as Update
    from unitnorm.updates import adam_g as adam_g
    from unitnorm.updates import adam_srt as adam_srt
    from unitnorm.updates import adamp as adamp
    from unitnorm.updates import axes_of_selection as axes_of_selection
    from unitnorm.updates import b_sgd as b_sgd
    from unitnorm.updates import b_sgd_median as b_sgd_median
    from unitnorm.updates import build as build
    from unitnorm.updates import check_update_name as check_update_name
    from unitnorm.updates import examine_kernels as examine_kernels
    from unitnorm.updates import find_update as find_update
    from unitnorm.updates import lars as lars
    from unitnorm.updates import nero as nero
    from unitnorm.updates import normalize as normalize
    from unitnorm.updates import normalize_filters as normalize_filters
    from unitnorm.updates import normalized_kernels as normalized_kernels
    from unitnorm.updates import normalized_kernels_nnx as normalized_kernels_nnx
    from unitnorm.updates import partition as partition
    from unitnorm.updates import retract as retract
    from unitnorm.updates import riemannian_gradient as riemannian_gradient
    from unitnorm.updates import rotational_sgd as rotational_sgd
    from unitnorm.updates import sgd_g as sgd_g
    from unitnorm.updates import sgd_wd as sgd_wd
    from unitnorm.updates import sgdp as sgdp
    from unitnorm.updates import sm as sm
    from unitnorm.updates import tangent_momentum as tangent_momentum
    from unitnorm.updates import un as un
    from unitnorm.updates import un_adam as un_adam
    from unitnorm.updates import un_carried as un_carried
    from unitnorm.updates import un_momentum as un_momentum
    from unitnorm.updates import un_nesterov as un_nesterov
    from unitnorm.updates import weight_norm as weight_norm

__version__ = "0.1.0"

_HOME = {
    "unitnorm.data": ["Dataset", "load_dataset"],
    "unitnorm.errors": ["UserError"],
    "unitnorm.geometry": ["filter_norms", "retraction", "tangent_projection"],
    "unitnorm.archbn.model": ["ArchBN"],
    "unitnorm.updates": [
        "UPDATES", "FilterAxes", "KernelReport", "Update", "adam_g", "adam_srt", "adamp",
        "axes_of_selection", "b_sgd", "b_sgd_median", "build", "check_update_name",
        "examine_kernels", "find_update", "lars", "nero", "normalize", "normalize_filters",
        "normalized_kernels", "normalized_kernels_nnx", "partition", "retract",
        "riemannian_gradient", "rotational_sgd", "sgd_g", "sgd_wd", "sgdp", "sm",
        "tangent_momentum", "un", "un_adam", "un_carried", "un_momentum", "un_nesterov",
        "weight_norm",
    ],
}  # fmt: skip
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", *_MODULE]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'unitnorm' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
