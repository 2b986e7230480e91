"""The training program: one epoch of many runs and several updates, compiled as one.

`epoch` is a pure function of one seed's `Split` and of its `Run`s, one per update; the runs of a
seed share their mini-batches, so that each batch is gathered once. `Program` maps it over seeds
with `vmap`, compiles it and shards the seed axis over the devices. Nothing moves between host and
device inside an epoch. What is trained (model, loss, protocol numbers) comes in as arguments; what
may be changed here is how.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from unitnorm.data import Dataset
from unitnorm.geometry import filter_norms
from unitnorm.run.loop import Status, to_host
from unitnorm.table2 import protocol
from unitnorm.table2.config import Config
from unitnorm.table2.model import FILTER_AXIS, ArchBN, Network, filter_mask, split_network
from unitnorm.updates import UPDATES, build
from unitnorm.updates.parts import OffManifold

# Seeds that a CPU device computes together: with more they leave its caches, with one XLA has no
# batch to work on; either costs a fifth. A GPU or TPU computes all of its seeds together.
CPU_BLOCK = 2
EVALUATION_CHUNK = 500  # images per step of an evaluation; bounds its memory, not its result

# One stream of random numbers for each use, so that adding one leaves the others as they are.
INIT, SWEEP_SPLIT, SWEEP_ORDER, TRAIN_SPLIT, TRAIN_ORDER = range(5)


class Images(NamedTuple):
    """Pixels uint8 (N, features) and labels int32 (N,), on the device or on the host."""

    pixels: Array | np.ndarray
    labels: Array | np.ndarray


class Split(NamedTuple):
    """What the runs of one seed share: the training and validation indices and the order's key."""

    train: Array  # int32 (train_images,)
    validation: Array  # int32 (validation_images,)
    order_seed: Array  # uint32 (), the seed of which the epochs' orders are drawn


class History(NamedTuple):
    """One value per epoch, each of shape (max_epochs,); NaN where there was no epoch."""

    lr: Array
    train_loss: Array  # mean cross-entropy per image, nats, in training mode
    train_error: Array  # fraction, in training mode
    val_error: Array  # fraction, with running statistics
    val_loss: Array  # mean cross-entropy per image, nats, with running statistics
    norm_deviation: Array  # max |‖w‖ − 1| over all filters
    norm_mean: Array  # mean ‖w‖ over all filters


class Run(NamedTuple):
    """One run of one update: everything that it needs to go on."""

    params: Any
    stats: Any
    opt_state: Any
    rate: Array  # the coming epoch's learning rate
    watched: Array  # the bold driver's value after the last epoch
    epoch: Array  # int32, epochs finished
    reason: Array  # int32, index into protocol.STOP_REASONS
    history: History


class Stepping(NamedTuple):
    """What changes from one mini-batch to the next."""

    params: Any
    stats: Any
    opt_state: Any
    loss: Array  # sum of the epoch's losses so far, in training mode
    wrong: Array  # number of the epoch's images misclassified so far


class Phase(NamedTuple):
    """The numbers of one kind of training, sweep or full; all are compiled in."""

    train_images: int
    validation_images: int
    batch_size: int
    reduction: str
    min_epochs: int
    max_epochs: int
    watch: str
    up: float
    down: float
    train_threshold: float
    lookback: int
    flat: float
    split_stream: int
    order_stream: int


def sweep_phase(config: Config) -> Phase:
    """The sweep: a fixed rate and a fixed number of epochs, no early stop (section 4)."""
    part = config.sweep
    return Phase(
        part.train_images, part.validation_images, config.loss.batch_size, config.loss.reduction,
        part.epochs, part.epochs, "train_loss", 1.0, 1.0, 0.0, 1, 0.0, SWEEP_SPLIT, SWEEP_ORDER,
    )  # fmt: skip


def train_phase(config: Config) -> Phase:
    """The full training, with the bold driver and the stopping rule (section 4)."""
    part, driver, stop = config.train, config.bold_driver, config.stopping
    return Phase(
        part.train_images, part.validation_images, config.loss.batch_size, config.loss.reduction,
        part.min_epochs, part.max_epochs, driver.watch, driver.up, driver.down,
        stop.train_error, stop.lookback, stop.flat, TRAIN_SPLIT, TRAIN_ORDER,
    )  # fmt: skip


def archbn(config: Config, features: int, classes: int, depth: int) -> Network:
    """The config's ArchBN as pure functions."""
    model = config.model
    return split_network(
        lambda rngs: ArchBN(
            features,
            depth,
            model.width,
            classes,
            pool_pairs=model.pool_pairs,
            bn_momentum=model.bn_momentum,
            bn_epsilon=model.bn_epsilon,
            rngs=rngs,
        )
    )


def stream(seed: Array, use: int) -> Array:
    """The key of one use of a run's seed."""
    return jax.random.fold_in(jax.random.key(seed), use)


def init_run(network: Network, phase: Phase, update: str, seed: Array, rate: Array) -> Run:
    """A run at its start. The initial point depends on the seed alone, not on the update.

    A rate that is not finite gives a run that has ended: no rate of its sweep held.
    """
    params, stats = network.init(stream(seed, INIT))
    nothing = jnp.full(phase.max_epochs, jnp.nan)
    return Run(
        params,
        stats,
        transformation(update, rate, params).init(params),
        rate=rate,
        watched=jnp.asarray(jnp.inf),
        epoch=jnp.asarray(0, jnp.int32),
        reason=jnp.where(jnp.isfinite(rate), protocol.RUNNING, protocol.NO_RATE).astype(jnp.int32),
        history=History(*(nothing for _ in History._fields)),
    )


def init_split(phase: Phase, seed: Array, images: int) -> Split:
    """A seed's random split of `images` training images."""
    train, validation = protocol.split(
        stream(seed, phase.split_stream), images, phase.train_images, phase.validation_images
    )
    return Split(train, validation, seed)


def epoch(
    network: Network,
    phase: Phase,
    updates: Sequence[str],
    split: Split,
    runs: tuple[Run, ...],
    images: Images,
) -> tuple[Run, ...]:
    """One epoch of one seed's runs, one run per update; a run that has ended stays as it is.

    Mini-batches are drawn without replacement in an order that is new in each epoch and the same
    for every update. Where the batch size does not divide the training images, the last batch is
    smaller.
    """
    # Runs of a seed start together, but some may have ended: the running ones hold the epoch.
    number = jnp.stack([run.epoch for run in runs]).max()
    key = jax.random.fold_in(stream(split.order_seed, phase.order_stream), number)
    # one sort of random bits, where jax.random.permutation takes two to be safe from ties; with
    # 50,000 images about one epoch in four has a single tie, broken by the order of the split
    order = split.train[jnp.argsort(jax.random.bits(key, (phase.train_images,)))]
    full = phase.train_images // phase.batch_size * phase.batch_size

    def step(carry: tuple[Stepping, ...], index: Array) -> tuple[tuple[Stepping, ...], None]:
        x, y = gather(images, index)
        return tuple(
            train_step(network, phase, update, run.rate, stepping, x, y)
            for update, run, stepping in zip(updates, runs, carry, strict=True)
        ), None

    zero = jnp.asarray(0.0)
    carry = tuple(Stepping(run.params, run.stats, run.opt_state, zero, zero) for run in runs)
    carry, _ = jax.lax.scan(step, carry, order[:full].reshape(-1, phase.batch_size))
    if full < phase.train_images:
        carry, _ = step(carry, order[full:])
    return tuple(
        finish_epoch(network, phase, run, stepping, split, images)
        for run, stepping in zip(runs, carry, strict=True)
    )


def gather(images: Images, index: Array) -> tuple[Array, Array]:
    """The mini-batch at `index`: float32 pixels 0 to 255 as they are, and labels."""
    # the indices come from a permutation; a bounds check would cost a third of the gather
    pixels, labels = (
        jnp.asarray(array).at[index].get(mode="promise_in_bounds") for array in images
    )
    return pixels.astype(jnp.float32), labels


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Cross-entropy in nats, shape (batch,)."""
    picked = labels[:, None] == jnp.arange(logits.shape[-1])
    # a sum over a mask, since its gradient is a subtraction where an index's is a scatter
    return -jnp.sum(jnp.where(picked, jax.nn.log_softmax(logits), 0.0), axis=-1)


def transformation(
    update: str, rate: Array, params: Any, off_manifold: OffManifold = "trust"
) -> optax.GradientTransformation:
    """The named update of ArchBN's parameters, whose filters have unit norm from the start."""
    options = {"off_manifold": off_manifold} if UPDATES[update].constrained else {}
    return build(update, rate, filters=filter_mask(params), axis=FILTER_AXIS, **options)


def train_step(
    network: Network,
    phase: Phase,
    update: str,
    rate: Array,
    at: Stepping,
    x: Array,
    y: Array,
    off_manifold: OffManifold = "trust",
) -> Stepping:
    """One mini-batch: gradient, update, running statistics, and the epoch's loss and errors."""

    def objective(params: Any) -> tuple[Array, tuple[Array, Array, Any]]:
        logits, stats = network.apply(params, at.stats, x, True)
        total = cross_entropy(logits, y).sum()
        wrong = jnp.sum(jnp.argmax(logits, -1) != y).astype(jnp.float32)
        return total if phase.reduction == "sum" else total / len(y), (total, wrong, stats)

    gradient, (total, wrong, stats) = jax.grad(objective, has_aux=True)(at.params)
    optimiser = transformation(update, rate, at.params, off_manifold)
    displacement, opt_state = optimiser.update(gradient, at.opt_state, at.params)
    params = optax.apply_updates(at.params, displacement)
    return Stepping(params, stats, opt_state, at.loss + total, at.wrong + wrong)


def finish_epoch(
    network: Network, phase: Phase, run: Run, end: Stepping, split: Split, images: Images
) -> Run:
    """Measure, anneal, decide on stopping, write the history; leave an ended run untouched."""
    params, stats = end.params, end.stats
    loss, train_error = end.loss / phase.train_images, end.wrong / phase.train_images
    val_error, val_loss = evaluate(network, params, stats, images, split.validation)
    norms = jnp.concatenate([filter_norms(w, FILTER_AXIS).ravel() for w in filters(params)])
    values = History(
        run.rate, loss, train_error, val_error, val_loss, jnp.abs(norms - 1).max(), norms.mean()
    )
    history = jax.tree.map(lambda old, new: old.at[run.epoch].set(new), run.history, values)
    watched = loss if phase.watch == "train_loss" else val_error
    reason = protocol.stop_reason(
        run.epoch + 1,
        loss,
        train_error,
        history.val_error,
        min_epochs=phase.min_epochs,
        max_epochs=phase.max_epochs,
        train_threshold=phase.train_threshold,
        lookback=phase.lookback,
        flat=phase.flat,
    )
    rate = protocol.bold_driver(run.rate, watched, run.watched, up=phase.up, down=phase.down)
    after = Run(params, stats, end.opt_state, rate, watched, run.epoch + 1, reason, history)
    active = run.reason == protocol.RUNNING
    return jax.tree.map(lambda new, old: jnp.where(active, new, old), after, run)


def filters(params: Any) -> list[Array]:
    """Every W of ArchBN, first layer first, one filter per row."""
    return [params["layers"][index]["rows"]["W"] for index in sorted(params["layers"])]


def evaluate(
    network: Network, params: Any, stats: Any, images: Images, index: Array
) -> tuple[Array, Array]:
    """Fraction misclassified of the images at `index`, and mean cross-entropy, running statistics.

    Every image counts once, whatever `EVALUATION_CHUNK`.
    """
    count = len(index)
    chunk = min(EVALUATION_CHUNK, count)
    chunks = -(-count // chunk)
    padded = jnp.pad(index, (0, chunks * chunk - count)).reshape(chunks, chunk)
    valid = (jnp.arange(chunks * chunk) < count).reshape(chunks, chunk)

    def body(
        total: tuple[Array, Array], part: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array], None]:
        x, y = gather(images, part[0])
        logits, _ = network.apply(params, stats, x, False)
        wrong = jnp.sum((jnp.argmax(logits, -1) != y) & part[1])
        loss = jnp.sum(jnp.where(part[1], cross_entropy(logits, y), 0.0))
        return (total[0] + wrong, total[1] + loss), None

    start = jnp.asarray(0, jnp.int32), jnp.asarray(0.0)
    (wrong, loss), _ = jax.lax.scan(body, start, (padded, valid))
    return wrong / count, loss / count


def over_seeds(
    mesh: Mesh,
    block: int,
    function: Callable[..., Any],
    *,
    by_seed: int,
    unless_idle: tuple[Callable[..., Array], int] | None = None,
    donate: int | None = None,
) -> Callable[..., Any]:
    """Compile a function of one seed for many: sharded over the devices, in blocks on each.

    Args:
      mesh: the devices, along the axis "seed".
      block: seeds that are computed together (`vmap`); blocks follow one another. XLA compiles
        batches of other sizes to code with other rounding, so it is the block alone that decides a
        run's bits, and not how many runs or devices there are.
      function: of one seed.
      by_seed: how many of its arguments have seeds as their leading axis; the rest are shared.
      unless_idle: a predicate of the arguments by seed, and which of them stands for the result
        where the predicate is false for a whole block, which then costs nothing.
      donate: an argument whose memory may be reused.
    """

    def local(*arguments: Any) -> Any:
        mapped, shared = arguments[:by_seed], arguments[by_seed:]
        blocks = jax.tree.map(lambda a: a.reshape(-1, block, *a.shape[1:]), mapped)

        def compute(mine: tuple[Any, ...]) -> Any:
            return jax.vmap(lambda *one: function(*one, *shared))(*mine)

        def one_block(mine: tuple[Any, ...]) -> Any:
            if unless_idle is None:
                return compute(mine)
            predicate, result = unless_idle
            busy = jnp.any(jax.vmap(predicate)(*mine))
            return jax.lax.cond(busy, compute, lambda mine: mine[result], mine)

        done = jax.lax.map(one_block, blocks)
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), done)

    seeds, everywhere = PartitionSpec("seed"), PartitionSpec()

    def sharded(*arguments: Any) -> Any:
        specs = (seeds,) * by_seed + (everywhere,) * (len(arguments) - by_seed)
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=seeds, check_vma=False)(
            *arguments
        )

    compiled = jax.jit(sharded, donate_argnums=() if donate is None else donate)

    def call(*arguments: Any) -> Any:
        # by default JAX rounds the factors of float32 products on recent GPUs and on TPUs
        with jax.default_matmul_precision("highest"):
            return compiled(*arguments)

    return call


class Program:
    """The training of all runs of one depth and set of updates, in one phase: a `loop.Trainable`.

    Seeds are the leading axis of every array of `Split` and `Run`, sharded over the devices; where
    they do not divide evenly, seeds that have ended are added and never reported. A state is a
    tuple of `Run`s, one per update.

    Args:
      title: what the user calls it.
      config, depth, updates: what is trained.
      phase: `sweep_phase(config)` or `train_phase(config)`.
      seeds: shape (n,), of the runs.
      rates: shape (n, updates), their base learning rates; a run without a finite one has ended.
      data: its images.
    """

    def __init__(
        self,
        title: str,
        config: Config,
        depth: int,
        updates: Sequence[str],
        phase: Phase,
        seeds: np.ndarray,
        rates: np.ndarray,
        data: Dataset,
    ):
        network = archbn(config, data.train_images.shape[1], data.classes, depth)
        self.title, self.epochs = title, phase.max_epochs
        self.samples = len(seeds) * len(updates) * phase.train_images
        self.updates = tuple(updates)
        self._count, self._seeds, self._rates = len(seeds), seeds, rates
        devices = jax.devices()
        if jax.process_count() == 1:
            devices = devices[: -(-len(seeds) // CPU_BLOCK)]
        each = -(-len(seeds) // len(devices))
        block = CPU_BLOCK if devices[0].platform == "cpu" else each
        self._padded = -(-each // block) * block * len(devices)
        mesh = Mesh(np.asarray(devices), ("seed",), axis_types=(AxisType.Auto,))
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._images, self._test = jax.device_put(
            (
                Images(data.train_images, data.train_labels),
                Images(data.test_images, data.test_labels),
            ),
            everywhere,
        )
        total = len(data.train_labels)

        def init_one(seed: Array, rates: Array) -> tuple[Split, tuple[Run, ...]]:
            return init_split(phase, seed, total), tuple(
                init_run(network, phase, update, seed, rates[column])
                for column, update in enumerate(self.updates)
            )

        def epoch_one(split: Split, runs: tuple[Run, ...], images: Images) -> tuple[Run, ...]:
            return epoch(network, phase, self.updates, split, runs, images)

        def test_one(runs: tuple[Run, ...], test: Images) -> tuple[Array, ...]:
            everything = jnp.arange(len(test.labels), dtype=jnp.int32)
            return tuple(
                evaluate(network, run.params, run.stats, test, everything)[0] for run in runs
            )

        def is_running(_: Split, runs: tuple[Run, ...]) -> Array:
            reasons = jnp.stack([run.reason for run in runs])
            return jnp.any(reasons == protocol.RUNNING)

        spread = partial(over_seeds, mesh, block)
        self._init = spread(init_one, by_seed=2)
        self._epoch = spread(epoch_one, by_seed=2, unless_idle=(is_running, 1), donate=1)
        self._test_error = spread(test_one, by_seed=1)
        self._split: Split | None = None

    def start(self) -> tuple[Run, ...]:
        """The runs at their start."""
        missing = self._padded - self._count
        seeds = np.concatenate([self._seeds, np.zeros(missing)]).astype(np.uint32)
        rates = np.concatenate([self._rates, np.full((missing, self._rates.shape[1]), np.nan)])
        self._split, runs = self._init(seeds, rates.astype(np.float32))
        self._fresh = runs
        return runs

    def put(self, saved: Any) -> tuple[Run, ...]:
        """Saved runs in place of the first fresh ones: the padding depends on the devices."""
        fresh = to_host(self._fresh)
        whole = jax.tree.map(lambda new, old: np.concatenate([new, old[len(new) :]]), saved, fresh)
        return jax.tree.map(
            lambda x, on: jax.make_array_from_callback(x.shape, on.sharding, lambda i: x[i]),
            whole,
            self._fresh,
        )

    def take(self, state: tuple[Run, ...]) -> tuple[Run, ...]:
        """The runs without the padding, on the host."""
        return jax.tree.map(lambda x: x[: self._count], to_host(state))

    def advance(self, state: tuple[Run, ...]) -> tuple[Run, ...]:
        """An epoch. The state given is used up."""
        return self._epoch(self._split, state, self._images)

    def status(self, state: tuple[Run, ...]) -> Status:
        """How far the runs are."""
        reasons, epochs, errors = (
            np.stack(values)[:, : self._count]
            for values in to_host(
                (
                    [run.reason for run in state],
                    [run.epoch for run in state],
                    [run.history.val_error for run in state],
                )
            )
        )
        now = last(errors, epochs)
        known = now[np.isfinite(now)]
        active = int((reasons == protocol.RUNNING).sum())
        error = f"{known.mean():.2%}" if known.size else "–"
        text = f"{active}/{reasons.size} runs active, val error {error}"
        return Status(int(epochs.max()), bool(active), text)

    def test_error(self, state: tuple[Run, ...]) -> tuple[np.ndarray, ...]:
        """Test error of every run over all test images, one array per update."""
        return tuple(x[: self._count] for x in to_host(self._test_error(state, self._test)))


def last(values: ArrayLike, epochs: ArrayLike) -> np.ndarray:
    """Each run's value after its last epoch: (…, max_epochs) and (…,) → (…,); NaN without any."""
    index = np.maximum(np.asarray(epochs) - 1, 0)
    return np.take_along_axis(np.asarray(values), index[..., None], -1)[..., 0]
