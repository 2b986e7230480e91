"""What scaling the filters does to the loss, its gradient and training (paper, sections 2 and 3).

Numbers only: from arrays to arrays to tables, no files and no text. A network is *reparameterised*
by w → α w, one α per filter, which batch normalisation undoes. `probe` measures (a) the loss and
(b) its Euclidean gradient, `follow` (c) how far apart two trainings of one network end up,
`record_norms` (d) the row norms in training. All use the model, the loss and the training step of
`training`, so what is shown is what is trained. Change here what is measured, and where.
"""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import Array

from unitnorm.archbn import training
from unitnorm.archbn.config import Config
from unitnorm.archbn.model import FILTER_AXIS, Network, filter_mask
from unitnorm.archbn.training import Images, Stepping, filters
from unitnorm.data import Dataset
from unitnorm.geometry import filter_norms, retraction
from unitnorm.updates import build, find_update

EXPONENTS = np.linspace(-5, 5, 21)  # of |α|: ten decades
SPREAD = 1.0  # "own" factors lie this many decades around α, on either side
PROBE_BATCHES = 4
EVALUATION_IMAGES = 1000
RECORDS_PER_EPOCH = 10
NORM_UPDATES = ("b-sgd", "un")
PROBE_KEY = ("depth", "point", "dtype", "bn_epsilon", "alpha", "filters", "compensated")
# Momentum 0.9 adds ten steps up; at the others' rate these two do not train, and the sweep gives
# them a tenth of it.
RATE_SHARE = {"un-momentum": 0.1, "un-nesterov": 0.1}


class Case(NamedTuple):
    """The arithmetic: the claim itself (float64, ε = 0), or as it is trained."""

    dtype: str
    bn_epsilon: float


class Point(NamedTuple):
    """Where the network is: parameters and running statistics, as NumPy float32."""

    params: Any
    stats: Any


class Subject(NamedTuple):
    """What is measured: the config's network of one depth on some training images."""

    config: Config
    train: Images
    classes: int
    depth: int

    def network(self, case: Case, momentum: float | None = None) -> Network:
        """With the case's ε, and another BN momentum where one is given."""
        changed = {"bn_epsilon": case.bn_epsilon}
        if momentum is not None:
            changed["bn_momentum"] = momentum
        model = self.config.model.model_copy(update=changed)
        return training.archbn(model, np.shape(self.train.pixels)[1], self.classes, self.depth)

    def initial(self) -> Point:
        """The initial point of run 0."""
        with jax.enable_x64(False):  # the draws of float64 would be others
            network = self.network(Case("float32", self.config.model.bn_epsilon))
            key = training.stream(jnp.uint32(self.config.seed), training.INIT)
            return Point(*jax.device_get(jax.jit(network.init)(key)))

    def batches(self, count: int) -> np.ndarray:
        """Image indices of mini-batches, shape (count, batch size), the same for every caller.

        Without replacement within an epoch, in an order that is new in each, as in training.
        """
        random = np.random.default_rng([self.config.seed, 0])
        size, images = self.config.loss.batch_size, self.config.train.train_images
        chosen = random.permutation(len(self.train.labels))[:images]
        each = len(chosen) // size
        epochs = [random.permutation(chosen)[: each * size] for _ in range(-(-count // each))]
        return np.concatenate(epochs)[: count * size].reshape(count, size).astype(np.int32)

    def factors(self) -> np.ndarray:
        """A factor for each filter, from 10^-SPREAD to 10^SPREAD, uniform in its logarithm."""
        random = np.random.default_rng([self.config.seed, self.depth])
        return 10 ** random.uniform(-SPREAD, SPREAD, (self.depth, self.config.model.width))

    def images(self) -> Images:
        """The training images as a compiled function takes them."""
        return Images(np.asarray(self.train.pixels), np.asarray(self.train.labels, np.int32))


class Measured(NamedTuple):
    """The four tables; see `probe`, `follow` and `record_norms` for their columns."""

    scaling: pd.DataFrame
    gradient: pd.DataFrame
    trajectories: pd.DataFrame
    norms: pd.DataFrame


def measure_all(
    config: Config,
    data: Dataset,
    updates: Sequence[str],
    rate: float,
    steps: int,
    epochs: int,
    say: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Measure everything at the config's depths, on CPU, one task per CPU device at a time.

    Args:
      config: model, loss, depths and seed.
      data: training images for the mini-batches, test images to compare outputs.
      updates: names for the trajectories.
      rate: learning rate of all of them but those in `RATE_SHARE`.
      steps: length of the trajectories.
      epochs: length of the training whose norms are recorded.
      say: told of each finished part.
    """
    train, test = Images(data.train_images, data.train_labels), data.test_images[:EVALUATION_IMAGES]
    subjects = [Subject(config, train, data.classes, depth) for depth in sorted(config.depths)]
    starts = {subject.depth: subject.initial() for subject in subjects}

    def measure_depth(subject: Subject) -> list[pd.DataFrame]:
        start = starts[subject.depth]
        norms, trained = record_norms(subject, start, rate, epochs)
        points = {"start": start, "trained": trained}
        probed = [probe(subject, points, case) for case in list_cases(config)]
        say(f"depth {subject.depth}: loss, gradient and norms")
        return [*(pd.concat(tables) for tables in zip(*probed, strict=True)), norms]

    def measure_case(subject: Subject, case: Case) -> pd.DataFrame:
        table = follow(subject, test, starts[subject.depth], case, updates, rate, steps)
        say(f"depth {subject.depth}: trajectories in {case.dtype}, ε = {case.bn_epsilon:g}")
        return table

    pairs = [(subject, case) for subject in subjects for case in list_cases(config)]
    tasks: list[Callable[[], Any]] = [partial(measure_case, *pair) for pair in pairs]
    tasks += [partial(measure_depth, subject) for subject in subjects]
    done = run_on_cpu_devices(tasks)
    scaling, gradient, norms = zip(*done[len(pairs) :], strict=True)
    tables = (scaling, gradient, done[: len(pairs)], norms)
    return Measured(*(pd.concat(table, ignore_index=True) for table in tables))


def list_cases(config: Config) -> tuple[Case, Case]:
    """The claim itself, and as it is trained: float32 with the config's ε."""
    return Case("float64", 0.0), Case("float32", config.model.bn_epsilon)


def run_on_cpu_devices(tasks: Iterable[Callable[[], Any]]) -> list[Any]:
    """The tasks' results in order, each computed on one CPU device, as many at once as there are.

    On CPU even where there is a GPU: this is about float64, and its bits should not depend on it.
    """
    free: queue.SimpleQueue[Any] = queue.SimpleQueue()
    devices = jax.local_devices(backend="cpu")
    for device in devices:
        free.put(device)

    def one(task: Callable[[], Any]) -> Any:
        device = free.get()
        try:
            with jax.default_device(device):
                return task()
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(devices)) as pool:
        return list(pool.map(one, tasks))


# ---------------------------------------------------------------- the symmetry


def reparameterise(params: Any, alpha: Any, gamma: Any) -> Any:
    """Multiply each filter by its α, and the trainable scale behind its normalisation by its γ.

    Args:
      params: of ArchBN.
      alpha, gamma: shape (depth, width), first layer first.
    """
    layers = {
        index: {
            "rows": {"W": layer["rows"]["W"] * alpha[place][:, None]},
            "norm": {**layer["norm"], "scale": layer["norm"]["scale"] * gamma[place]},
        }
        for place, (index, layer) in enumerate(sorted(params["layers"].items()))
    }
    return {**params, "layers": layers}


def normalised(params: Any) -> Any:
    """Every filter of ArchBN divided by its norm: Orth(W)."""
    mask = filter_mask(params)
    return jax.tree.map(lambda w, is_w: retraction(w, FILTER_AXIS) if is_w else w, params, mask)


def list_variants(subject: Subject) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """The reparameterisations of (a) and (b).

    Returns:
      A table with a row for each: `alpha`; `filters`, which is "all" (α for every filter), "own"
      (α times the filter's own factor) or "one" (α for the first filter of each layer alone); and
      `compensated`, whether the trainable scale changes its sign with α. Then every α and γ,
      shape (rows, depth, width).
    """
    own = subject.factors()
    factors = {"all": np.ones_like(own), "own": own}
    rows: list[dict[str, Any]] = [
        {"alpha": sign * 10**exponent, "filters": kind, "compensated": compensated}
        for kind in factors
        for sign, compensated in ((1, False), (-1, False), (-1, True))
        for exponent in EXPONENTS
    ]
    alphas = [row["alpha"] * factors[row["filters"]] for row in rows]
    for kind in ("all", "one"):
        rows.append({"alpha": 0.0, "filters": kind, "compensated": False})
        alphas.append(np.zeros_like(own) if kind == "all" else np.ones_like(own))
    alphas[-1][:, 0] = 0.0
    table, alpha = pd.DataFrame(rows), np.stack(alphas)
    gamma = np.where(table["compensated"].to_numpy()[:, None, None], np.sign(alpha), 1.0)
    return table, alpha, gamma


# ---------------------------------------------------------------- (a) loss and (b) gradient


def probe(
    subject: Subject, points: Mapping[str, Point], case: Case
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Loss and Euclidean gradient under every reparameterisation, on a few mini-batches.

    Returns:
      The tables of (a) and (b). Both: depth, point, dtype, bn_epsilon, and what `list_variants`
      names. (a): `loss` (mean cross-entropy per image, nats, and mean over the batches), `error`
      (fraction), `change` (largest |ℓ(αW) − ℓ(W)| / ℓ(W) of a batch) and `epsilon_share` (largest
      ε / (α² variance) of a feature).
      (b): `norm` of the gradient with respect to all W, of the config's loss; `expected`, the norm
      if each filter's gradient is that at W divided by its α; `deviation`, the relative distance
      ‖α ∇ℓ(αW) − ∇ℓ(W)‖ / ‖∇ℓ(W)‖, largest of a batch. Without what is not to be compared: α < 0
      that is not compensated.
    """
    names, alpha, gamma = list_variants(subject)
    names = names.assign(depth=subject.depth, dtype=case.dtype, bn_epsilon=case.bn_epsilon)
    zero, compared = names["alpha"] == 0, (names["alpha"] >= 0) | names["compensated"]
    order = subject.batches(PROBE_BATCHES)
    x, y = (np.asarray(array)[order] for array in subject.train)
    x, alpha, gamma = cast((x, alpha, gamma), case.dtype)
    scaling, gradient = [], []
    with jax.enable_x64(case.dtype == "float64"):
        network, reduction = subject.network(case, momentum=0.0), subject.config.loss.reduction
        compiled = jax.jit(
            partial(probe_batches, network, reduction, case.bn_epsilon, alpha, gamma)
        )
        for name, point in points.items():
            measured = compiled(*cast(point, case.dtype), x, y)
            base, loss, error, share, norm, expected, deviation = (
                np.asarray(array, np.float64) for array in measured
            )
            named = names.assign(point=name)[[*PROBE_KEY]]
            scaling.append(
                named.assign(
                    loss=loss.mean(0),
                    error=error.mean(0),
                    change=np.abs(loss / base[:, None] - 1).max(0),
                    epsilon_share=share.max(0),
                )
            )
            gradient.append(
                named.assign(
                    norm=norm.mean(0),
                    expected=np.where(zero, np.inf, expected.mean(0)),
                    deviation=np.where(zero, np.nan, deviation.max(0)),
                )[compared]
            )
    return pd.concat(scaling), pd.concat(gradient)


def probe_batches(
    network: Network,
    reduction: str,
    bn_epsilon: float,
    alpha: np.ndarray,
    gamma: np.ndarray,
    params: Any,
    stats: Any,
    x: Array,
    y: Array,
) -> tuple[Array, ...]:
    """`probe` on arrays: batches x of shape (batches, images, features).

    `network` must have a BN momentum of 0, so that its running variance is that of the batch.

    Returns:
      The loss at W, shape (batches,); then under each reparameterisation loss, error, the share of
      ε, gradient norm, its expectation and the deviation, all of shape (batches, variants).
    """

    def one_batch(batch: tuple[Array, Array]) -> tuple[Array, ...]:
        pixels, labels = batch

        loss_of = partial(objective, network, reduction)
        slope = jax.value_and_grad(lambda p: loss_of(p, stats, pixels, labels), has_aux=True)
        (_, (loss, _, after)), gradient = slope(params)
        gradient = filters(gradient)
        variances = jnp.stack(
            [layer["norm"]["var"] for _, layer in sorted(after["layers"].items())]
        )

        def one(alpha: Array, gamma: Array) -> tuple[Array, ...]:
            (_, (moved, error, _)), steep = slope(reparameterise(params, alpha, gamma))
            factors = [a[:, None] for a in alpha]
            triples = list(zip(filters(steep), factors, gradient, strict=True))
            share = jnp.max(bn_epsilon / (alpha**2 * variances)) if bn_epsilon else jnp.zeros(())
            return (
                moved,
                error,
                share,
                norm_of([g for g, _, _ in triples]),
                norm_of([at_w / a for _, a, at_w in triples]),
                norm_of([a * g - at_w for g, a, at_w in triples]) / norm_of(gradient),
            )

        return loss, *jax.vmap(one)(jnp.asarray(alpha), jnp.asarray(gamma))

    return jax.lax.map(one_batch, (x, y))


def norm_of(arrays: Sequence[Array]) -> Array:
    """Euclidean norm of all entries together."""
    return jnp.sqrt(sum(jnp.sum(a**2) for a in arrays))


# ---------------------------------------------------------------- (c) trajectories


def follow(
    subject: Subject,
    test: np.ndarray,
    start: Point,
    case: Case,
    updates: Sequence[str],
    rate: float,
    steps: int,
) -> pd.DataFrame:
    """Train from W and from diag(α) W, on the same mini-batches, and compare the outputs.

    α is `Subject.factors`. A third training starts from Orth(diag(α) W), which is W but for
    rounding: it is diag(α) W "after one normalisation", and tells how far rounding alone leads.

    Returns:
      A row per update and number of steps: depth, dtype, bn_epsilon, update, rate, steps; `gap`,
      ‖Δ logits‖ / ‖logits‖ over the first test images in training mode; `differing`, the share of
      predictions that differ; the same two of the third training, `rounding_gap` and
      `rounding_differing`.
    """
    phase = training.train_phase(subject.config)
    rates = {update: rate * RATE_SHARE.get(update, 1.0) for update in updates}
    alpha = subject.factors()
    one = np.ones_like(alpha)
    marks = [0, *choose_steps(steps)]
    with jax.enable_x64(case.dtype == "float64"):
        network = subject.network(case)
        params, stats = jax.tree.map(jnp.asarray, cast(start, case.dtype))
        params = normalised(params)  # it was of unit norm in float32 alone
        scaled = reparameterise(params, jnp.asarray(alpha, case.dtype), one.astype(case.dtype))
        rounded = normalised(scaled)
        starts = stack([params, scaled, rounded])
        order = subject.batches(steps)
        compared = test.astype(case.dtype)

        def walk(starts: Any, order: Array, images: Images, compared: Array) -> Array:
            def step(number: Array, at: tuple[Stepping, ...]) -> tuple[Stepping, ...]:
                x, y = training.gather(images, order[number])

                def one(update: str, run: Stepping) -> Stepping:
                    here = jnp.asarray(rates[update])
                    return training.train_step(network, phase, arm_of(update), here, run, x, y)

                return tuple(
                    jax.vmap(partial(one, update))(runs)
                    for update, runs in zip(updates, at, strict=True)
                )

            def output(run: Stepping) -> Array:
                return network.apply(run.params, run.stats, compared, True)[0]

            def segment(at: tuple[Stepping, ...], ends: Array) -> tuple[Any, Array]:
                at = jax.lax.fori_loop(ends[0], ends[1], step, at)
                return at, jnp.stack([jax.vmap(output)(runs) for runs in at])

            runs = tuple(
                jax.vmap(lambda params, u=update: stepping(u, rates[u], params, stats))(starts)
                for update in updates
            )
            ends = np.array(list(itertools.pairwise([0, *marks])), np.int32)
            return jax.lax.scan(segment, runs, jnp.asarray(ends))[1]

        # (marks, updates, starts, images, classes)
        logits = jax.jit(walk)(starts, order, subject.images(), compared)
        logits = np.asarray(logits, np.float64)
    reference, answers = logits[:, :, :1], logits.argmax(-1)
    size = np.linalg.norm(reference, axis=(-2, -1))
    gap = np.linalg.norm(logits - reference, axis=(-2, -1)) / size
    differing = (answers != answers[:, :, :1]).mean(-1)
    rows = pd.MultiIndex.from_product([updates, marks], names=["update", "steps"])
    table = rows.to_frame(index=False)
    table.insert(1, "rate", table["update"].map(rates))
    for place, (key, value) in enumerate((("depth", subject.depth), *case._asdict().items())):
        table.insert(place, key, value)
    for place, name in ((1, ""), (2, "rounding_")):  # of the start that the first is held against
        table[f"{name}gap"] = gap[..., place].T.ravel()
        table[f"{name}differing"] = differing[..., place].T.ravel()
    return table


def choose_steps(steps: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, … up to `steps`, which is the last in any case."""
    grid = [m * 10**p for p in range(len(str(steps))) for m in (1, 2, 5)]
    return sorted({steps, *(mark for mark in grid if mark < steps)})


# ---------------------------------------------------------------- (d) row norms


def record_norms(
    subject: Subject, start: Point, rate: float, epochs: int
) -> tuple[pd.DataFrame, Point]:
    """Train at a fixed rate and record the row norms and what they make of the rate.

    Returns:
      A row per update of `NORM_UPDATES`, layer and record: depth, update, layer, step, epoch, rate;
      `norm_min`, `norm_median`, `norm_max` of ‖w‖ over the layer's filters; the effective rate
      λ/‖w‖² at these, `effective_max`, `effective_median`, `effective_min`; and `norm_fall`, the
      largest relative fall of any filter's norm in one step up to there. Then the trained network
      of the last update.
    """
    config = subject.config
    phase = training.train_phase(config)
    per_epoch = config.train.train_images // config.loss.batch_size
    with jax.enable_x64(False):
        network = subject.network(Case("float32", config.model.bn_epsilon))
        order = subject.batches(epochs * per_epoch)

        def walk(point: Point, order: Array, images: Images) -> tuple[Any, Array]:
            def step(at: tuple[Stepping, ...], index: Array) -> tuple[Any, Array]:
                x, y = training.gather(images, index)
                at = tuple(
                    training.train_step(
                        network, phase, training.Arm(update), jnp.asarray(rate), run, x, y
                    )
                    for update, run in zip(NORM_UPDATES, at, strict=True)
                )
                return at, row_norms(at)

            at = tuple(stepping(update, rate, *point) for update in NORM_UPDATES)
            before = row_norms(at)[None]
            at, after = jax.lax.scan(step, at, order)
            return at[-1], jnp.concatenate([before, after])

        last, measured = jax.device_get(jax.jit(walk)(start, order, subject.images()))
    norm = np.asarray(measured, np.float64)  # (steps + 1, updates, depth, width)
    fall = np.maximum(1 - norm[1:] / norm[:-1], 0).max(-1)
    fall = np.maximum.accumulate(np.concatenate([np.zeros((1, *fall.shape[1:])), fall]))
    every = np.unique(
        np.linspace(0, len(order), epochs * RECORDS_PER_EPOCH + 1).round().astype(int)
    )
    keys = {"update": NORM_UPDATES, "layer": range(1, subject.depth + 1), "step": every}
    table = pd.MultiIndex.from_product([*keys.values()], names=[*keys]).to_frame(index=False)
    table.insert(0, "depth", subject.depth)
    low, middle, high, fall = (
        values[every].transpose(1, 2, 0).ravel()  # (steps, updates, layers), as the rows stand
        for values in (norm.min(-1), np.median(norm, -1), norm.max(-1), fall)
    )
    table = table.assign(
        epoch=table["step"] / per_epoch,
        rate=rate,
        norm_min=low,
        norm_median=middle,
        norm_max=high,
        effective_min=rate / high**2,
        effective_median=rate / middle**2,
        effective_max=rate / low**2,
        norm_fall=fall,
    )
    return table, Point(last.params, last.stats)


def row_norms(runs: Sequence[Stepping]) -> Array:
    """‖w‖ of every filter, shape (runs, depth, width)."""
    return jnp.stack(
        [jnp.stack([filter_norms(w, FILTER_AXIS) for w in filters(run.params)]) for run in runs]
    )


# ---------------------------------------------------------------- what they share


def arm_of(update: str) -> training.Arm:
    """The update, for filters that need not start at unit norm."""
    options = (("off_manifold", "normalize"),) if find_update(update).constrained else ()
    return training.Arm(update, options=options)


def stepping(update: str, rate: float, params: Any, stats: Any) -> Stepping:
    """An update's training at its start."""
    transformation = build(update, rate, filters=filter_mask(params), axis=FILTER_AXIS)
    zero = jnp.zeros(())
    return Stepping(params, stats, transformation.init(params), zero, zero)


def objective(
    network: Network, reduction: str, params: Any, stats: Any, x: Array, y: Array
) -> tuple[Array, tuple[Array, Array, Any]]:
    """The config's loss of a mini-batch, with the mean cross-entropy, error and new statistics."""
    logits, after = network.apply(params, stats, x, True)
    losses = training.cross_entropy(logits, y)
    error = jnp.mean(jnp.argmax(logits, -1) != y)
    total = losses.sum() if reduction == "sum" else losses.mean()
    return total, (losses.mean(), error, after)


def stack(trees: Sequence[Any]) -> Any:
    """Trees of one structure as one, along a new first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def cast(tree: Any, dtype: str) -> Any:
    """Every leaf in `dtype`, as NumPy."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), tree)
