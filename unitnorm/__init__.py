"""unitnorm: SGD on the unit-norm manifold for networks with batch normalisation, in JAX.

    import jax, optax, unitnorm

    x, y = jax.random.normal(jax.random.key(0), (2, 64, 8))
    params = {"kernel": jax.numpy.eye(8), "scale": jax.numpy.ones(8)}
    apply = lambda p: p["scale"] * jax.nn.standardize(x @ p["kernel"], axis=0)
    tx = unitnorm.build("un", 1e-2, unitnorm.normalized_kernels(apply, params))  # was: optax.sgd
    state = tx.init(params)
    updates, state = tx.update(jax.grad(lambda p: abs(apply(p) - y).mean())(params), state, params)
    params = optax.apply_updates(params, updates)  # every filter of the kernel has norm 1

Everything that `unitnorm.updates` lists is here too, and what is named below. It is imported on
first use, so that `unitnorm --help` does not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

from unitnorm.errors import UserError as UserError

if TYPE_CHECKING:
    from unitnorm.archbn.model import ArchBN as ArchBN
    from unitnorm.data import Dataset as Dataset
    from unitnorm.data import load_dataset as load_dataset
    from unitnorm.updates import *  # noqa: F403

__version__ = "0.1.0"

_ELSEWHERE = {"ArchBN": "archbn.model", "Dataset": "data", "load_dataset": "data"}


def __getattr__(name: str) -> Any:
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module 'unitnorm' has no attribute {name!r}")
    module = importlib.import_module(f"unitnorm.{_ELSEWHERE.get(name, 'updates')}")
    if name == "__all__":
        return ["__version__", "UserError", *_ELSEWHERE, *module.__all__]
    if name not in _ELSEWHERE and name not in module.__all__:
        raise AttributeError(f"module 'unitnorm' has no attribute {name!r}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__getattr__("__all__"))
