"""What scaling the filters does to the loss, its gradient and training (paper, sections 2 and 3).

A network is *reparameterised* by w → α w, one α per filter, which batch normalisation undoes. The
model, its start and the loss are those of Table 2. All of this is on CPU, from arrays to tables.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from jax import Array

from unitnorm.archbn.batches import INIT, stream
from unitnorm.archbn.config import Config
from unitnorm.archbn.evaluation import cross_entropy
from unitnorm.archbn.model import FILTER_AXIS, Network, archbn
from unitnorm.archbn.training import Arm, EpochState, Settings, Task, make_training
from unitnorm.data import Dataset
from unitnorm.geometry import filter_norms, retraction
from unitnorm.updates import build, find_update

EXPONENTS = np.linspace(-5, 5, 21)  # of |α|: ten decades
FACTOR_DECADES = 1.0  # a filter's own factor lies at most so many decades from 1
PROBE_BATCHES = 4
TEST_IMAGES = 1000  # on which outputs are compared
RECORDS_PER_EPOCH = 10
NORM_UPDATES = ("b-sgd", "un")
# Momentum 0.9 adds ten steps up; at the others' rate these two do not train, and the sweep gives
# them a tenth of it.
RATE_SHARE = {"un-momentum": 0.1, "un-nesterov": 0.1}
CLAIM, TRAINED = "float64", "float32"  # the claim itself has no ε, and training the config's
_KEY = ["depth", "point", "dtype", "bn_epsilon", "alpha", "filters", "compensated"]
_SCALING = ["loss", "error", "change", "epsilon_share"]
_GRADIENT = ["norm", "expected", "deviation"]


class Case(NamedTuple):
    """The arithmetic."""

    dtype: str
    bn_epsilon: float


class Point(NamedTuple):
    """Where the network is: parameters and running statistics."""

    params: Any
    stats: Any


class Measured(NamedTuple):
    """The tables of `probe` (two), `compare_trajectories` and `record_norms`."""

    scaling: pd.DataFrame
    gradient: pd.DataFrame
    trajectories: pd.DataFrame
    norms: pd.DataFrame


class Subject(NamedTuple):
    """What is measured: the config's network of one depth on the training images."""

    config: Config
    data: Dataset
    depth: int

    def network(self, **changed: float) -> Network:
        """ArchBN with the config's settings but for those that are `changed`."""
        settings = self.config.model.model_copy(update=changed)
        features = self.data.train_images.shape[1]
        return archbn(settings, features, self.data.classes, self.depth)

    def initial(self) -> Point:
        """The initial point of run 0, float32."""
        with jax.enable_x64(False):  # the draws of float64 would be others
            key = stream(jnp.uint32(self.config.seed), INIT)
            return Point(*jax.device_get(jax.jit(self.network().init)(key)))

    def batches(self, count: int) -> np.ndarray:
        """Image indices of the first mini-batches, (count, batch size): without replacement, in a
        new order in each epoch."""
        random = np.random.default_rng([self.config.seed, 0])
        size, images = self.config.loss.batch_size, self.config.train.train_images
        chosen = random.permutation(len(self.data.train_labels))[:images]
        each = len(chosen) // size
        epochs = [random.permutation(chosen)[: each * size] for _ in range(-(-count // each))]
        return np.concatenate(epochs)[: count * size].reshape(count, size).astype(np.int32)

    def factors(self) -> np.ndarray:
        """A factor for each filter, shape (depth, width), uniform in its logarithm."""
        random = np.random.default_rng([self.config.seed, self.depth])
        size = (self.depth, self.config.model.width)
        return 10 ** random.uniform(-FACTOR_DECADES, FACTOR_DECADES, size)

    def train(
        self,
        network: Network,
        rates: Mapping[str, float],
        starts: Sequence[Point],
        marks: Sequence[int],
        observe: Callable[[Any, Any], Array],
    ) -> tuple[list[Point], np.ndarray]:
        """Train by each update from each start on the same mini-batches, each at a fixed rate.

        Filters need not be of unit norm at the start, unlike in Table 2's own training.

        Returns:
          Where each update ends from the first start; and what `observe(params, stats)` gave after
          so many steps as `marks` says (ascending), shape (updates, starts, marks, …).
        """

        def begin(update: str, start: Point) -> EpochState:
            optimiser = build(update, rates[update], network.mask(start.params), axis=network.axis)
            loss = jnp.zeros([], jax.tree.leaves(start)[0].dtype)
            state = optimiser.init(start.params)
            return EpochState(*start, state, loss, jnp.zeros([], jnp.float32))

        def step(update: str, at: EpochState, x: Array, labels: Array) -> EpochState:
            loose = (("off_manifold", "normalize"),) if find_update(update).constrained else ()
            training = make_training(Task(self.config, network), Arm(update, loose))
            return training.step(Settings(seed=None, rate=rates[update]), at, x, labels)

        @jax.jit
        def train_all(starts: Point, order: Array, images: Array, labels: Array) -> Any:
            def step_all(number: Array, at: Any) -> Any:
                batch = images[order[number]].astype(jnp.float32), labels[order[number]]
                each = zip(rates, at, strict=True)
                return [jax.vmap(lambda a, u=u: step(u, a, *batch))(runs) for u, runs in each]

            def advance(at: Any, span: Any) -> Any:
                at = jax.lax.fori_loop(span[0], span[1], step_all, at)
                return at, [jax.vmap(observe)(*runs[:2]) for runs in at]

            at = [jax.vmap(partial(begin, update))(starts) for update in rates]
            spans = np.array([*itertools.pairwise([0, *marks])], np.int32)
            return jax.lax.scan(advance, at, spans)

        together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
        order, data = self.batches(marks[-1]), self.data
        at, seen = train_all(together, order, data.train_images, data.train_labels)
        ends = [Point(*jax.tree.map(lambda leaf: np.asarray(leaf[0]), runs[:2])) for runs in at]
        return ends, np.stack([np.moveaxis(np.asarray(each), 0, 1) for each in seen])


def measure_all(
    config: Config,
    data: Dataset,
    updates: Sequence[str],
    rate: float,
    steps: int,
    epochs: int,
    say: Callable[[str], None],
) -> Measured:
    """Everything at the config's depths, a task per CPU device at a time; see `symmetry.run`."""
    subjects = [Subject(config, data, depth) for depth in sorted(config.depths)]
    pairs = [(subject, subject.initial()) for subject in subjects]
    cases = Case(CLAIM, 0.0), Case(TRAINED, config.model.bn_epsilon)
    free = iter(jax.local_devices(backend="cpu"))

    def compare(case: Case, subject: Subject, start: Point) -> pd.DataFrame:
        table = compare_trajectories(subject, start, case, updates, rate, steps)
        say(f"depth {subject.depth}: trajectories in {case.dtype}, ε = {case.bn_epsilon:g}")
        return table

    def train_and_probe(subject: Subject, start: Point) -> tuple[pd.DataFrame, ...]:
        norms, trained = record_norms(subject, start, rate, epochs)
        probed = [probe(subject, {"start": start, "trained": trained}, case) for case in cases]
        say(f"depth {subject.depth}: loss, gradient and norms")
        return *map(pd.concat, zip(*probed, strict=True)), norms

    def take_a_device() -> None:
        jax.default_device(next(free)).__enter__()  # for this thread, as long as it lives

    # on CPU even where there is a GPU: this is about float64, and its bits should not depend on it
    with ThreadPoolExecutor(jax.local_device_count("cpu"), initializer=take_a_device) as pool:
        walks = [pool.submit(compare, case, *pair) for pair in pairs for case in cases]
        others = [pool.submit(train_and_probe, *pair) for pair in pairs]
    scaling, gradient, norms = zip(*(job.result() for job in others), strict=True)
    tables = (scaling, gradient, [job.result() for job in walks], norms)
    return Measured(*(pd.concat(table, ignore_index=True) for table in tables))


# ---------------------------------------------------------------- the symmetry


def reparameterise(params: Any, alpha: Any, gamma: Any) -> Any:
    """Multiply each filter by its α and the scale behind it by its γ, both (depth, width)."""
    layers = {
        index: {
            "rows": {"W": layer["rows"]["W"] * alpha[place][:, None]},
            "norm": {**layer["norm"], "scale": layer["norm"]["scale"] * gamma[place]},
        }
        for place, (index, layer) in enumerate(sorted(params["layers"].items()))
    }
    return {**params, "layers": layers}


def cast(tree: Any, dtype: str) -> Any:
    """Every leaf in `dtype`, as NumPy."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), tree)


def list_variants(subject: Subject) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """The reparameterisations of (a) and (b), a row each, and every α and γ: (rows, depth, width).

    `filters` is "all" (α for every filter), "own" (α times the filter's own factor) or "one" (α for
    the first filter of each layer alone); `compensated`: the trainable scale turns its sign with α.
    """
    own = subject.factors()
    one = np.ones_like(own)
    rows = [
        (sign * 10**exponent, kind, compensated)
        for kind in ("all", "own")
        for sign, compensated in ((1, False), (-1, False), (-1, True))
        for exponent in EXPONENTS
    ]
    scaled = [alpha * (own if kind == "own" else one) for alpha, kind, _ in rows]
    first = np.where(np.arange(own.shape[1]) == 0, 0.0, one)
    alpha = np.stack([*scaled, 0 * one, first])
    rows += [(0.0, "all", False), (0.0, "one", False)]
    table = pd.DataFrame(rows, columns=["alpha", "filters", "compensated"])
    gamma = np.where(table["compensated"].to_numpy()[:, None, None], np.sign(alpha), 1.0)
    return table, alpha, gamma


# ---------------------------------------------------------------- (a) loss and (b) gradient


def probe(
    subject: Subject, points: Mapping[str, Point], case: Case
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Loss (a) and Euclidean gradient (b) under every reparameterisation, on a few mini-batches.

    (a): `loss` (mean cross-entropy, nats) and `error` (fraction), means of the batches; `change`,
    the largest |ℓ(αW) − ℓ(W)| / ℓ(W); `epsilon_share`, the largest ε / (α² variance) of a feature.
    (b): `norm` of the gradient of the config's loss with respect to all W; `expected`, the norm if
    each filter's gradient is that at W divided by its α; `deviation`, the largest
    ‖α ∇ℓ(αW) − ∇ℓ(W)‖ / ‖∇ℓ(W)‖. There is nothing to compare where α < 0 is not compensated.
    """
    names, *factors = list_variants(subject)
    names = names.assign(depth=subject.depth, dtype=case.dtype, bn_epsilon=case.bn_epsilon)
    order, norm_of = subject.batches(PROBE_BATCHES), optax.tree.norm
    images = cast(subject.data.train_images[order], case.dtype)
    batches, tables = (images, subject.data.train_labels[order]), []
    summed = subject.config.loss.reduction == "sum"
    with jax.enable_x64(case.dtype == CLAIM):
        # a momentum of 0: the running variance is that of the mini-batch
        network = subject.network(bn_epsilon=case.bn_epsilon, bn_momentum=0.0)

        def probe_batch(point: Point, factors: Any, batch: Any) -> Any:
            x, labels = batch

            def objective(params: Any) -> Any:
                logits, after = network.apply(params, point.stats, x, True)
                losses = cross_entropy(logits, labels)
                total = losses.sum() if summed else losses.mean()
                return total, (losses.mean(), jnp.mean(jnp.argmax(logits, -1) != labels), after)

            differentiate = jax.grad(objective, has_aux=True)
            gradient, (loss, _, after) = differentiate(point.params)
            at_w, layers = network.filters(gradient), sorted(after["layers"].items())
            variances = jnp.stack([layer["norm"]["var"] for _, layer in layers])

            def scale(alpha: Array, gamma: Array) -> dict[str, Array]:
                there = reparameterise(point.params, alpha, gamma)
                gradient, (loss, error, _) = differentiate(there)
                each = list(zip(network.filters(gradient), alpha[:, :, None], at_w, strict=True))
                return {
                    "loss": loss,
                    "error": error,
                    "epsilon_share": jnp.max(case.bn_epsilon / (alpha**2 * variances)),
                    "norm": norm_of([g for g, _, _ in each]),
                    "expected": norm_of([old / a for _, a, old in each]),
                    "deviation": norm_of([a * g - old for g, a, old in each]) / norm_of(at_w),
                }

            return loss, jax.vmap(scale)(*factors)

        probe_all = jax.jit(lambda *at, batches: jax.lax.map(partial(probe_batch, *at), batches))
        factors = cast(factors, case.dtype)
        for name, point in points.items():
            measured = probe_all(cast(point, case.dtype), factors, batches=batches)
            loss, found = jax.tree.map(lambda array: np.asarray(array, np.float64), measured)
            mean = {key: array.mean(0) for key, array in found.items()}
            largest = {key: found[key].max(0) for key in ("epsilon_share", "deviation")}
            change = np.abs(found["loss"] / loss[:, None] - 1).max(0)
            tables.append(names.assign(point=name, **mean | largest, change=change))
    table = pd.concat(tables)
    if not case.bn_epsilon:
        table["epsilon_share"] = 0.0  # at α = 0 as well
    table.loc[table["alpha"] == 0, ["expected", "deviation"]] = np.inf, np.nan
    compared = (table["alpha"] >= 0) | table["compensated"]
    return table[[*_KEY, *_SCALING]], table.loc[compared, [*_KEY, *_GRADIENT]]


# ---------------------------------------------------------------- (c) trajectories


def compare_trajectories(
    subject: Subject, start: Point, case: Case, updates: Sequence[str], rate: float, steps: int
) -> pd.DataFrame:
    """Train from W and from diag(α) W, on the same mini-batches, and compare the outputs.

    α is `Subject.factors`, `rate` that of all updates but those in `RATE_SHARE`. A third training
    starts from Orth(diag(α) W), which is W but for rounding, and tells how far that alone leads.
    `gap` is ‖Δ logits‖ / ‖logits‖ over the first test images in training mode, `differing` the
    share of predictions that differ; of the third training `rounding_gap`, `rounding_differing`.
    """
    marks, tables = [0, *choose_steps(steps)], []
    rates = {update: rate * RATE_SHARE.get(update, 1.0) for update in updates}
    alpha = subject.factors().astype(case.dtype)
    test = subject.data.test_images[:TEST_IMAGES].astype(case.dtype)
    with jax.enable_x64(case.dtype == CLAIM):
        network = subject.network(bn_epsilon=case.bn_epsilon)
        params, stats = cast(start, case.dtype)
        orthogonal = partial(network.with_filters, change=partial(retraction, axis=FILTER_AXIS))
        params = orthogonal(params)  # it was of unit norm in float32 alone
        scaled = reparameterise(params, alpha, np.ones_like(alpha))
        starts = [Point(each, stats) for each in (params, scaled, orthogonal(scaled))]

        def outputs(params: Any, stats: Any) -> Array:
            return network.apply(params, stats, jnp.asarray(test), True)[0]

        _, logits = subject.train(network, rates, starts, marks, outputs)
    for (update, own_rate), found in zip(rates.items(), logits.astype(np.float64), strict=True):
        first, answers = found[0], found.argmax(-1)  # of (starts, marks, images, classes)
        gap = np.linalg.norm(found - first, axis=(-2, -1)) / np.linalg.norm(first, axis=(-2, -1))
        differing = (answers != answers[0]).mean(-1)
        keys = {"depth": subject.depth, **case._asdict(), "update": update, "rate": own_rate}
        columns = {"steps": marks, "gap": gap[1], "differing": differing[1]}
        rounding = {"rounding_gap": gap[2], "rounding_differing": differing[2]}
        tables.append(pd.DataFrame(keys | columns | rounding))
    return pd.concat(tables, ignore_index=True)


def choose_steps(steps: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, … up to `steps`, which is the last in any case."""
    grid = [m * 10**p for p in range(len(str(steps))) for m in (1, 2, 5)]
    return sorted({steps, *(mark for mark in grid if mark < steps)})


# ---------------------------------------------------------------- (d) row norms


def record_norms(
    subject: Subject, start: Point, rate: float, epochs: int
) -> tuple[pd.DataFrame, Point]:
    """Train at a fixed rate: the row norms, and the network that the last update has trained.

    Recorded are the least, median and largest ‖w‖ of each layer's filters, the effective rate
    λ/‖w‖² at these, and `norm_fall`, the largest relative fall of any norm in one step so far.
    """
    network = subject.network()

    def row_norms(params: Any, _: Any) -> Array:
        return jnp.stack([filter_norms(w, FILTER_AXIS) for w in network.filters(params)])

    per_epoch = subject.config.train.train_images // subject.config.loss.batch_size
    steps, tables = epochs * per_epoch, []
    kept = np.unique(np.linspace(0, steps, epochs * RECORDS_PER_EPOCH + 1).round().astype(int))
    rates = dict.fromkeys(NORM_UPDATES, rate)
    with jax.enable_x64(False):
        ends, norms = subject.train(network, rates, [start], range(steps + 1), row_norms)
    for update, norm in zip(rates, norms[:, 0].astype(np.float64), strict=True):
        fall = np.maximum(1 - norm[1:] / norm[:-1], 0).max(-1)  # of (steps + 1, depth, width)
        fall = np.maximum.accumulate(np.concatenate([0 * norm[:1, :, 0], fall]))[kept]
        for layer in range(subject.depth):
            least, median, most = (of(norm[kept, layer], -1) for of in (np.min, np.median, np.max))
            tables.append(pd.DataFrame({
                "depth": subject.depth, "update": update, "layer": layer + 1, "step": kept,
                "epoch": kept / per_epoch, "rate": rate,
                "norm_min": least, "norm_median": median, "norm_max": most,
                "effective_min": rate / most**2, "effective_median": rate / median**2,
                "effective_max": rate / least**2, "norm_fall": fall[:, layer],
            }))  # fmt: skip
    return pd.concat(tables, ignore_index=True), ends[-1]
