"""What a training asks of a mini-batch: its loss, and its statistics of batch normalisation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from unitnorm.archbn.model import Network


def cross_entropy(logits: Array, labels: Array, weights: ArrayLike | None = None) -> Array:
    """Cross-entropy in nats of each example; 0 where the label is no class.

    Args:
      logits: (…, classes).
      labels: int32 (…); those of `classes` and above count nowhere.
      weights: of the classes, (classes,); None: 1.

    Returns:
      float32 (…).
    """
    picked = labels[..., None] == jnp.arange(logits.shape[-1])
    log_p = jax.nn.log_softmax(logits)
    weighted = log_p if weights is None else weights * log_p
    # a sum over a mask, since its gradient is a subtraction where an index's is a scatter
    return -jnp.sum(jnp.where(picked, weighted, 0.0), axis=-1)


def batch_statistics(network: Network, params: Any, like: Any, x: Array) -> Any:
    """1 − momentum times the mean and variance of each batch normalisation over a mini-batch.

    Summed over mini-batches and divided, they replace running statistics ("precise" ones: Wu and
    Johnson 2021, "Rethinking 'Batch' in BatchNorm"). A layer's are those behind the normalisation
    of the layers before it, as in training.

    Args:
      like: statistics of the network, for their shapes.
      x: the mini-batch.
    """
    # from zero, a running mean moves to 1 − momentum of the batch's
    return network.apply(params, jax.tree.map(jnp.zeros_like, like), x, True)[1]
