"""unitnorm: SGD on the unit-norm manifold for networks with batch normalisation, in JAX.

    import optax, unitnorm
    optimiser = unitnorm.build("un", 1e-2, filters=unitnorm.normalized_kernels(apply, params))

Every public name of the library is listed in `_HOME` with the module it lives in. They are imported
on first use, so that `unitnorm --help` does not wait for JAX.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "unitnorm.data": ["Dataset", "load_dataset"],
    "unitnorm.errors": ["UserError"],
    "unitnorm.geometry": ["filter_norms", "retraction", "tangent_projection"],
    "unitnorm.table2.model": ["ArchBN"],
    "unitnorm.updates": [
        "UPDATES", "Update", "b_sgd", "b_sgd_median", "build", "normalize",
        "normalize_filters",
        "normalized_kernels", "normalized_kernels_nnx", "partition", "retract",
        "riemannian_gradient", "sgd_wd", "sm", "tangent_momentum", "un", "un_adam", "un_carried",
        "un_momentum", "un_nesterov", "weight_norm",
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
