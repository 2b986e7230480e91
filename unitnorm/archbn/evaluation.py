"""What is measured of a network: its loss and errors, its filters' norms, the size of its steps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from unitnorm.archbn.batches import Images, gather
from unitnorm.archbn.model import Network
from unitnorm.geometry import filter_axes, filter_norms, norms_of, retraction, tangent_projection

EVALUATION_CHUNK = 500  # images per step of an evaluation; bounds its memory, not its result


def cross_entropy(logits: Array, labels: Array, weights: ArrayLike | None = None) -> Array:
    """Cross-entropy in nats of each example, float32 (…); 0 where the label is no class.

    Args:
      logits: (…, classes).
      labels: int32 (…); those of `classes` and above count nowhere.
      weights: of the classes, (classes,); None: 1.
    """
    picked = labels[..., None] == jnp.arange(logits.shape[-1])
    log_p = jax.nn.log_softmax(logits)
    weighted = log_p if weights is None else weights * log_p
    # a sum over a mask, since its gradient is a subtraction where an index's is a scatter
    return -jnp.sum(jnp.where(picked, weighted, 0.0), axis=-1)


def evaluate(
    network: Network, params: Any, stats: Any, images: Images, index: Array
) -> tuple[Array, Array]:
    """Fraction misclassified of the images at `index`, and mean cross-entropy in nats."""
    wrong, losses = find_wrong(network, params, stats, images, index)
    return wrong.mean(), losses.mean()


def find_wrong(
    network: Network, params: Any, stats: Any, images: Images, index: Array
) -> tuple[Array, Array]:
    """Which of the images at `index` are misclassified, bool (n,), and cross-entropy, float32 (n,).

    Every image counts once, whatever `EVALUATION_CHUNK`.
    """

    def body(_: None, part: Array) -> tuple[None, tuple[Array, Array]]:
        x, y = gather(images, part)
        logits, _ = network.apply(params, stats, x, False)
        return None, (jnp.argmax(logits, -1) != y, cross_entropy(logits, y))

    # two chunks at least: XLA takes a loop of one step apart and computes it together with what
    # stands around it, so that the loss would round with what is trained along
    chunk = min(EVALUATION_CHUNK, -(-len(index) // 2))
    chunks = jnp.pad(index, (0, -len(index) % chunk)).reshape(-1, chunk)
    _, (wrong, losses) = jax.lax.scan(body, None, chunks)
    return wrong.reshape(-1)[: len(index)], losses.reshape(-1)[: len(index)]


def batch_statistics(network: Network, params: Any, like: Any, x: Array) -> Any:
    """1 − momentum times the mean and variance of each batch normalisation over a mini-batch.

    Summed over mini-batches and divided, they replace running statistics ("precise" ones: Wu and
    Johnson 2021, "Rethinking 'Batch' in BatchNorm"). A layer's are those behind the normalisation
    of the layers before it, as in training. `like` gives the shapes of the statistics.
    """
    # from zero, a running mean moves to 1 − momentum of the batch's
    return network.apply(params, jax.tree.map(jnp.zeros_like, like), x, True)[1]


def average_statistics(
    network: Network, params: Any, like: Any, images: Images, batches: Array
) -> Any:
    """`batch_statistics` averaged over mini-batches, int32 (steps, batch), without the factor."""

    def body(total: Any, index: Array) -> tuple[Any, None]:
        x, _ = gather(images, index)
        found = batch_statistics(network, params, like, x)
        return jax.tree.map(jnp.add, total, found), None

    total, _ = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, like), batches)
    return jax.tree.map(lambda x: x / (len(batches) * (1 - network.bn_momentum)), total)


def measure_norms(network: Network, params: Any) -> tuple[Array, Array, Array]:
    """Of one run's filters: max |‖w‖ − 1|, mean ‖w‖ and median 1/‖w‖²."""
    each = [(w, filter_axes(w.shape, network.axis)) for w in network.filters(params)]
    norms = jnp.concatenate([norms_of(w, axes).reshape(-1) for w, axes in each])
    return jnp.abs(norms - 1).max(), norms.mean(), jnp.median(1 / norms**2)


def measure_step(network: Network, before: Any, gradient: Any, after: Any) -> tuple[Array, Array]:
    """How far one step turned each layer's filters, and the rate that this amounts to.

    With ŵ = w/‖w‖ and r = ‖w‖ Π_w(∇ℓ), the Riemannian gradient at ŵ: the rate is that of the
    step ŵ − rate · r which is nearest, λ for UN and λ/‖w‖² for gradient descent.

    Returns:
      float32 (layers,) each: the effective rate Σ⟨ŵ − ŵ', r⟩ / Σ⟨r, r⟩ over a layer's filters, and
      the mean angle between ŵ and ŵ', in radians.
    """
    rates, angles = [], []
    trees = map(network.filters, (before, gradient, after))
    for w, g, moved in zip(*trees, strict=True):
        norms = filter_norms(w, network.axis, keepdims=True)
        r = norms * tangent_projection(w, g, network.axis)
        chord = retraction(w, network.axis) - retraction(moved, network.axis)
        rates.append(jnp.vdot(chord, r) / jnp.vdot(r, r))
        # the chord, for small angles, where the arc cosine of a product would round to nothing
        half = jnp.minimum(filter_norms(chord, network.axis) / 2, 1)
        angles.append((2 * jnp.arcsin(half)).mean())
    return jnp.stack(rates), jnp.stack(angles)
