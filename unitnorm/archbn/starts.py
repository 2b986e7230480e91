"""Starts that compute the same: ArchBN's parameters moved along the symmetries of the network."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

# What of a start can be changed without changing the network. The first three are unbalanced, each
# by a factor of its own within so many decades: filters in front of batch normalisation; the scales
# and shifts of pooled pairs against the columns of the next layer's filters; the same of the last
# layer against those of θ. "norms" gives all filters one norm, 10 to this power.
START = ("filters", "pairs", "theta", "norms")


def unbalance(params: Any, spread: Array, key: Array) -> Any:
    """The parameters moved along symmetries of the network, which computes the same from there.

    Args:
      params: of ArchBN.
      spread: float32 (4,): for each of `START`, over how many decades the factors are spread
        (uniform in the logarithm, about 1), and how many the norm is above 1; 0 leaves everything
        as it is.
      key: of the factors.
    """
    names = sorted(params["layers"])
    layers = {name: params["layers"][name] for name in names}
    theta = params["theta"]
    for place, name in enumerate(names):
        layer, keys = layers[name], jax.random.split(jax.random.fold_in(key, place), 2)
        w, norm = layer["rows"]["W"], layer["norm"]
        alpha = _factors(keys[0], w.shape[0], spread[0]) * 10.0 ** spread[3]
        is_last = place == len(names) - 1
        # both features of a pooled pair have one factor: their maximum has it then, too
        c = _factors(keys[1], w.shape[0] // 2, spread[2 if is_last else 1])
        both = jnp.repeat(c, 2)
        norm = {"scale": norm["scale"] * both, "bias": norm["bias"] * both}
        layers[name] = layer | {"rows": {"W": w * alpha[:, None]}, "norm": norm}
        if is_last:
            theta = {"W": theta["W"] / c}
        else:
            after = layers[names[place + 1]]
            layers[names[place + 1]] = after | {"rows": {"W": after["rows"]["W"] / c}}
    return {**params, "layers": layers, "theta": theta}


def _factors(key: Array, count: int, decades: Array) -> Array:
    return 10.0 ** (decades * jax.random.uniform(key, (count,), minval=-0.5, maxval=0.5))
