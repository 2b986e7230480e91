"""ArchBN, the paper's network (section 2, figure 1), in Flax NNX.

A layer is h = W x, batch normalisation with trainable scale and shift, ReLU, max-pooling of two
features with stride 2; after the last layer stands a softmax classifier θ. There are no biases.

Weights are stored as the paper writes them, one filter per row: W₁ is (width, features), the later
W are (width, width / 2), θ is (classes, width / 2). (The paper prints W₂ as 32 × 64; with 64
filters of 32 inputs, one per row, only 64 × 32 fits.) This is the transpose of `nnx.Linear`'s
kernel: a filter runs over the *last* axis, `FILTER_AXIS`. It also spares a transposition of the
weight gradient on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from unitnorm.archbn.config import Model
from unitnorm.geometry import unit

FILTER_AXIS = -1
PAPER = Model()

# What of a start can be changed without changing the network. The first three are unbalanced, each
# by a factor of its own within so many decades: filters in front of batch normalisation; the scales
# and shifts of pooled pairs against the columns of the next layer's filters; the same of the last
# layer against those of θ. "norms" gives all filters one norm, 10 to this power.
START = ("filters", "pairs", "theta", "norms")


class Rows(nnx.Module):
    """h = W x without bias; W has shape (outputs, inputs), rows Gaussian, then of unit norm."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        rows = jax.random.normal(rngs.params(), (outputs, inputs))
        self.W = nnx.Param(unit(rows, (1,)))

    def __call__(self, x: Array) -> Array:
        return jnp.einsum("...i,oi->...o", x, self.W[...])


class Layer(nnx.Module):
    """W x, batch normalisation, ReLU, max-pooling of 2 with stride 2: (…, inputs) → (…, width/2).

    ReLU and max commute, so their order is no choice; which features are neighbours is.
    """

    def __init__(self, inputs: int, settings: Model, *, rngs: nnx.Rngs):
        self.rows = Rows(inputs, settings.width, rngs=rngs)
        self.norm = nnx.BatchNorm(
            settings.width, momentum=settings.bn_momentum, epsilon=settings.bn_epsilon,
            # the fast variance E[h²] − E[h]² cancels badly on raw pixels, whose mean is large
            use_fast_variance=False, rngs=rngs,
        )  # fmt: skip
        self.pool_pairs = settings.pool_pairs

    def __call__(self, x: Array, *, train: bool) -> Array:
        h = self.norm(self.rows(x), use_running_average=not train)
        return max_pool_pairs(jax.nn.relu(h), self.pool_pairs)


class ArchBN(nnx.Module):
    """A stack of `depth` layers and the classifier θ: (batch, features) → logits (batch, classes).

    Args:
      features: inputs, 784 for MNIST.
      depth: layers, at least 1; the paper has 2 and 4.
      classes: rows of θ.
      settings: width, pooling and batch normalisation, by default the paper's.
      rngs: one key for all initial rows.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> model = ArchBN(784, depth=2, rngs=nnx.Rngs(0))
    >>> model(jnp.ones((100, 784))).shape
    (100, 10)
    """

    def __init__(
        self, features: int, depth: int, classes: int = 10, settings: Model = PAPER, *,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        if depth < 1:
            raise ValueError(f"depth {depth}: need depth ≥ 1")
        half = settings.width // 2
        sizes = [features] + [half] * (depth - 1)
        self.layers = nnx.List([Layer(size, settings, rngs=rngs) for size in sizes])
        self.theta = Rows(half, classes, rngs=rngs)

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Logits. `train` normalises with the mini-batch and moves the running statistics."""
        for layer in self.layers:
            x = layer(x, train=train)
        return self.theta(x)


class Network(NamedTuple):
    """A module as pure functions of its parameters and statistics (nested dicts of arrays).

    `init(key)` gives (parameters, statistics); `apply(parameters, statistics, x, train)` gives
    (logits, statistics), the statistics moved where `train` is true. `mask(parameters)` is true for
    the kernels whose filters feed a normalisation layer, which run over the axes `axis` of theirs
    (None: all but the last). `augment(key, x)` changes a mini-batch that is trained on; None: it
    stays. All can be traced. `together` is how many runs a CPU computes in one batch: of ArchBN
    more than two leave its caches, and with one XLA has no batch to work on; either costs a fifth.
    """

    init: Callable[[Array], tuple[Any, Any]]
    apply: Callable[[Any, Any, Array, bool], tuple[Array, Any]]
    mask: Callable[[Any], Any]
    axis: int | tuple[int, ...] | None
    bn_momentum: float  # of the running statistics
    augment: Callable[[Array, Array], Array] | None = None
    together: int = 2

    def filters(self, params: Any) -> list[Array]:
        """Every kernel of filters, first layer first."""
        chosen = jax.tree.leaves(self.mask(params))
        return [w for w, mine in zip(jax.tree.leaves(params), chosen, strict=True) if mine]

    def with_filters(self, params: Any, change: Callable[[Array], Array]) -> Any:
        """The parameters with every kernel of filters changed."""
        return jax.tree.map(lambda w, mine: change(w) if mine else w, params, self.mask(params))


@lru_cache(maxsize=16)
def archbn(settings: Model, features: int, classes: int, depth: int) -> Network:
    """ArchBN as pure functions, the same ones for the same arguments."""
    make = partial(ArchBN, features, depth, classes, settings)
    return split_network(lambda rngs: make(rngs=rngs), bn_momentum=settings.bn_momentum)


def filter_mask(params: Any) -> Any:
    """True for every W of ArchBN, whose filters feed a normalisation; False for all else."""
    rows = jax.tree_util.DictKey("rows")
    return jax.tree.map_with_path(lambda path, _: rows in path, params)


def split_network(
    make: Callable[[nnx.Rngs], nnx.Module],
    mask: Callable[[Any], Any] = filter_mask,
    axis: int | tuple[int, ...] | None = FILTER_AXIS,
    bn_momentum: float = 0.99,  # Flax's own
) -> Network:
    """The module that `make` builds as pure functions; the others as of `Network`."""
    graph = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, nnx.BatchStat)[0]

    def init(key: Array) -> tuple[Any, Any]:
        _, *states = nnx.split(make(nnx.Rngs(key)), nnx.Param, nnx.BatchStat)
        params, stats = map(nnx.to_pure_dict, states)
        return params, stats

    def apply(params: Any, stats: Any, x: Array, train: bool) -> tuple[Array, Any]:
        model = nnx.merge(graph, params, stats)
        logits = model(x, train=train)
        return logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    return Network(init, apply, mask, axis, bn_momentum)


def max_pool_pairs(h: Array, pairs: Literal["adjacent", "halves"]) -> Array:
    """Maximum of two features: (…, width) → (…, width / 2).

    "adjacent" pools features 2i and 2i + 1 (the paper's 2 × 1 pooling with stride 2), "halves"
    pools i and i + width / 2, the same network with its features renumbered.
    """
    if pairs == "adjacent":
        return _max_of_neighbours(h)
    half = h.shape[-1] // 2
    return jnp.maximum(h[..., :half], h[..., half:])


# The derivative that JAX finds for the two strided slices pads and adds, which takes as long as
# everything else in a small layer. This one interleaves instead. Ties go to the first feature; they
# are both zero behind a ReLU, whose derivative is zero there.
@jax.custom_vjp
def _max_of_neighbours(h: Array) -> Array:
    return jnp.maximum(h[..., 0::2], h[..., 1::2])


def _max_backward(h: Array, gradient: Array) -> tuple[Array]:
    first = h[..., 0::2] >= h[..., 1::2]
    both = jnp.stack([jnp.where(first, gradient, 0), jnp.where(first, 0, gradient)], -1)
    return (both.reshape(h.shape),)


_max_of_neighbours.defvjp(lambda h: (_max_of_neighbours(h), h), _max_backward)


def unbalance(params: Any, spread: Array, key: Array) -> Any:
    """ArchBN's parameters moved along its symmetries: the network computes the same from there.

    Args:
      spread: float32 (4,): for each of `START`, over how many decades the factors are spread
        (uniform in the logarithm, about 1), and how many the norm is above 1; 0 leaves everything
        as it is.
      key: of the factors.
    """

    def factors(key: Array, count: int, decades: Array) -> Array:
        return 10.0 ** (decades * jax.random.uniform(key, (count,), minval=-0.5, maxval=0.5))

    names = sorted(params["layers"])
    layers, c = {}, jnp.float32(1)
    for place, name in enumerate(names):
        rows, norm = params["layers"][name]["rows"], params["layers"][name]["norm"]
        keys = jax.random.split(jax.random.fold_in(key, place), 2)
        w = rows["W"] / c  # c of the layer before
        alpha = factors(keys[0], w.shape[0], spread[0]) * 10.0 ** spread[3]
        # both features of a pooled pair have one factor: their maximum has it then, too
        c = factors(keys[1], w.shape[0] // 2, spread[2 if name == names[-1] else 1])
        norm = jax.tree.map(lambda x, c=c: x * jnp.repeat(c, 2), norm)
        layers[name] = {"rows": {"W": w * alpha[:, None]}, "norm": norm}
    return {**params, "layers": layers, "theta": {"W": params["theta"]["W"] / c}}
