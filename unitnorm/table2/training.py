"""The training program: one epoch of many runs under several updates, compiled as one.

The runs of a seed are its *lanes*: they share its mini-batches, so that each batch is gathered once
and meets the first layers of all lanes in one product, X times all W side by side; only the updates
are the lanes' own. `epoch` is a pure function of one seed's `Split` and `Runs`. `Program` maps it
over seeds, compiles it and shards the seed axis over the devices. Nothing moves between host and
device inside an epoch. What is trained (model, loss, protocol numbers) comes in as arguments; what
may be changed here is how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from unitnorm.geometry import filter_norms, retraction
from unitnorm.run.loop import Status
from unitnorm.run.processes import to_host
from unitnorm.table2 import protocol
from unitnorm.table2.config import Config
from unitnorm.table2.model import FILTER_AXIS, ArchBN, Network, filter_mask, split_network
from unitnorm.updates import find_update, partition

# Seeds that a CPU device computes together: with more they leave its caches, with one XLA has no
# batch to work on; either costs a fifth. A GPU or TPU computes all of its seeds together.
CPU_BLOCK = 2
EVALUATION_CHUNK = 500  # images per step of an evaluation; bounds its memory, not its result

# One stream of random numbers for each use, so that adding one leaves the others as they are.
INIT, SWEEP_SPLIT, SWEEP_ORDER, TRAIN_SPLIT, TRAIN_ORDER, START = range(6)


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
    """One value per epoch, each of shape (max_epochs,); NaN where nothing was measured."""

    lr: Array  # of all parameters but the filters, whose rate is `Runs.ratio` times this
    train_loss: Array  # mean cross-entropy per image, nats, in training mode
    train_error: Array  # fraction, in training mode
    val_error: Array  # fraction, with running statistics
    val_loss: Array  # mean cross-entropy per image, nats, with running statistics
    norm_deviation: Array  # max |‖w‖ − 1| over all filters
    norm_mean: Array  # mean ‖w‖ over all filters
    effective_rate: Array  # median over all filters of their rate over ‖w‖²
    test_error: Array  # as val_error, of the test images, where it is asked for
    test_loss: Array  # the same of val_loss


class Arm(NamedTuple):
    """What some neighbouring lanes of every seed have in common; it is compiled in."""

    update: str
    lanes: int = 1
    options: tuple[tuple[str, Any], ...] = ()  # of the update of the filters, beside axis
    unbalanced: bool = False  # some lane's start is spread


class Lanes(NamedTuple):
    """What distinguishes the lanes of a seed: arrays of shape (lanes,), on the host or traced."""

    rate: Any  # base learning rate; a lane without a finite one has ended
    ratio: Any  # rate of the filters over that of the rest; None: one rate for both
    schedule: Any  # int32, index into protocol.SCHEDULES
    spread: Any  # (lanes, 3), decades by which the start is unbalanced: see `protocol.START`


class Runs(NamedTuple):
    """The runs of a seed, lane by lane: everything that they need to go on."""

    params: Any
    stats: Any
    opt_state: tuple[Any, ...]  # one per arm
    base: Array  # float32 (lanes,), the first epoch's learning rate
    rate: Array  # float32 (lanes,), the coming epoch's
    ratio: Array | None
    schedule: Array
    watched: Array  # the bold driver's value after the last epoch
    epoch: Array  # int32 (lanes,), epochs finished
    reason: Array  # int32 (lanes,), index into protocol.STOP_REASONS
    history: History  # each (lanes, max_epochs)


class Stepping(NamedTuple):
    """What changes from one mini-batch to the next, of one run or of several lanes."""

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
    stop_by: str = "val_error"  # or "val_loss": what the rules on validation look at
    # "running", or "anew": computed before each evaluation, see `recompute_statistics`
    statistics: str = "running"
    bn_momentum: float = 0.99  # of the running statistics
    budgets: tuple[int, ...] = ()  # after so many epochs the test images are measured
    # The first layers of all lanes in one product: faster, but a lane's rounding depends then on
    # how many lanes there are. Without, a run's bits depend on its seed alone.
    side_by_side: bool = False


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
        bn_momentum=config.model.bn_momentum,
    )  # fmt: skip


def archbn(config: Config, features: int, classes: int, depth: int) -> Network:
    """The config's ArchBN as pure functions."""
    settings = config.model.model_dump()
    return split_network(
        lambda rngs: ArchBN(features, depth, classes=classes, rngs=rngs, **settings)
    )


def stream(seed: Array, use: int) -> Array:
    """The key of one use of a run's seed."""
    return jax.random.fold_in(jax.random.key(seed), use)


def init_runs(
    network: Network, phase: Phase, arms: Sequence[Arm], seed: Array, lanes: Lanes
) -> Runs:
    """A seed's runs at their start, which depends on the seed and its spread, not on the update."""
    params, stats = network.init(stream(seed, INIT))
    key = stream(seed, START)
    count = len(lanes.rate)
    params, stats = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), (params, stats))
    states, parts = [], []
    for arm, (part, spread) in by_arm(arms, (params, lanes.spread)):
        if arm.unbalanced:
            part = jax.vmap(lambda one, s: protocol.unbalance(one, s, key))(part, spread)
            if find_update(arm.update).constrained:  # "trust" looks at no norm afterwards
                part = put_filters(part, [retraction(w, FILTER_AXIS) for w in filters(part)])
        states.append(jax.vmap(transformation(arm, jnp.float32(0), part).init)(part))
        parts.append(part)
    nothing = jnp.full((count, phase.max_epochs), jnp.nan)
    return Runs(
        jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts),
        stats,
        tuple(states),
        base=lanes.rate,
        rate=lanes.rate,
        ratio=lanes.ratio,
        schedule=lanes.schedule,
        watched=jnp.full(count, jnp.inf),
        epoch=jnp.zeros(count, jnp.int32),
        reason=jnp.where(jnp.isfinite(lanes.rate), protocol.RUNNING, protocol.NO_RATE).astype(
            jnp.int32
        ),
        history=History(*(nothing for _ in History._fields)),
    )


def over_lanes(function: Callable[..., Any], side_by_side: bool, *trees: Any) -> Any:
    """A function of one run for the lanes of all: as one computation, or one after the other."""
    if side_by_side:
        return jax.vmap(function)(*trees)
    count = len(jax.tree.leaves(trees)[0])
    traced_once = jax.jit(function, inline=True)  # and put in once for each lane
    results = [traced_once(*jax.tree.map(lambda x, i=i: x[i], trees)) for i in range(count)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


def by_arm(arms: Sequence[Arm], tree: Any) -> Iterator[tuple[Arm, Any]]:
    """Each arm with its lanes of a tree whose leading axis is that of the lanes."""
    start = 0
    for arm in arms:
        end = start + arm.lanes
        yield arm, jax.tree.map(lambda x, start=start, end=end: x[start:end], tree)
        start = end


def init_split(phase: Phase, seed: Array, images: int) -> Split:
    """A seed's random split of `images` training images."""
    train, validation = protocol.split(
        stream(seed, phase.split_stream), images, phase.train_images, phase.validation_images
    )
    return Split(train, validation, seed)


def epoch(
    network: Network,
    phase: Phase,
    arms: Sequence[Arm],
    split: Split,
    runs: Runs,
    images: Images,
    test: Images,
    test_now: Array,
) -> Runs:
    """One epoch of one seed's runs; a run that has ended stays as it is.

    Mini-batches are drawn without replacement in an order that is new in each epoch and the same
    in every lane. Where the batch size does not divide the training images, the last batch is
    smaller.

    Args:
      test: measured after the epoch where `test_now` is true.
    """
    # Runs of a seed start together, but some may have ended: the running ones hold the epoch.
    key = jax.random.fold_in(stream(split.order_seed, phase.order_stream), runs.epoch.max())
    # one sort of random bits, where jax.random.permutation takes two to be safe from ties; with
    # 50,000 images about one epoch in four has a single tie, broken by the order of the split
    order = split.train[jnp.argsort(jax.random.bits(key, (phase.train_images,)))]
    full = phase.train_images // phase.batch_size * phase.batch_size

    def step(at: Stepping, index: Array) -> tuple[Stepping, None]:
        x, y = gather(images, index)
        gradient, (total, wrong, stats) = over_lanes(
            lambda params, stats: gradient_of(network, phase, params, stats, x, y),
            phase.side_by_side, at.params, at.stats,
        )  # fmt: skip
        moved = []
        lanes = (at.params, gradient, runs.rate, runs.ratio)
        for (arm, mine), state in zip(by_arm(arms, lanes), at.opt_state, strict=True):
            side_by_side = phase.side_by_side or arm.lanes > 1
            moved.append(over_lanes(partial(apply_update, arm), side_by_side, *mine, state))
        params, states = zip(*moved, strict=True)
        params = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *params)
        return Stepping(params, stats, states, at.loss + total, at.wrong + wrong), None

    zero = jnp.zeros(len(runs.rate))
    carry = Stepping(runs.params, runs.stats, runs.opt_state, zero, zero)
    carry, _ = jax.lax.scan(step, carry, order[:full].reshape(-1, phase.batch_size))
    if full < phase.train_images:
        carry, _ = step(carry, order[full:])
    return finish_epoch(network, phase, arms, runs, carry, split, images, test, test_now)


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
    arm: Arm, rate: Array, params: Any, ratio: Array | None = None
) -> optax.GradientTransformation:
    """An arm's update of ArchBN's parameters, whose filters have unit norm from the start."""
    known, options = find_update(arm.update), dict(arm.options)
    if known.constrained:
        options.setdefault("off_manifold", "trust")
    filters_rate = rate if ratio is None else ratio * rate
    update = known.filters(filters_rate, axis=FILTER_AXIS, **options)
    return partition(update, known.rest(rate), filter_mask(params))


def gradient_of(
    network: Network, phase: Phase, params: Any, stats: Any, x: Array, y: Array
) -> tuple[Any, tuple[Array, Array, Any]]:
    """One run's gradient for a mini-batch, with its loss (a sum), errors and new statistics."""

    def objective(params: Any) -> tuple[Array, tuple[Array, Array, Any]]:
        logits, moved = network.apply(params, stats, x, True)
        total = cross_entropy(logits, y).sum()
        wrong = jnp.sum(jnp.argmax(logits, -1) != y).astype(jnp.float32)
        return total if phase.reduction == "sum" else total / len(y), (total, wrong, moved)

    return jax.grad(objective, has_aux=True)(params)


def apply_update(
    arm: Arm, params: Any, gradient: Any, rate: Array, ratio: Array | None, state: Any
) -> tuple[Any, Any]:
    """One run's parameters after the arm's update, and the update's state."""
    optimiser = transformation(arm, rate, params, ratio)
    displacement, state = optimiser.update(gradient, state, params)
    return optax.apply_updates(params, displacement), state


def train_step(
    network: Network, phase: Phase, arm: Arm, rate: Array, at: Stepping, x: Array, y: Array
) -> Stepping:
    """One mini-batch of one run: gradient, update, statistics, and the epoch's loss and errors."""
    gradient, (total, wrong, stats) = gradient_of(network, phase, at.params, at.stats, x, y)
    params, opt_state = apply_update(arm, at.params, gradient, rate, None, at.opt_state)
    return Stepping(params, stats, opt_state, at.loss + total, at.wrong + wrong)


def finish_epoch(
    network: Network,
    phase: Phase,
    arms: Sequence[Arm],
    runs: Runs,
    end: Stepping,
    split: Split,
    images: Images,
    test: Images,
    test_now: Array,
) -> Runs:
    """Measure, anneal, decide on stopping, write the history; leave an ended run untouched."""
    loss, train_error = end.loss / phase.train_images, end.wrong / phase.train_images
    if phase.statistics == "anew":
        stats = over_lanes(
            lambda params, stats: recompute_statistics(
                network, phase, params, stats, images, split.train
            ),
            phase.side_by_side, end.params, end.stats,
        )  # fmt: skip
        end = end._replace(stats=stats)

    def measure(images: Images, index: Array) -> tuple[Array, Array]:
        return over_lanes(
            lambda params, stats: evaluate(network, params, stats, images, index),
            phase.side_by_side, end.params, end.stats,
        )  # fmt: skip

    val_error, val_loss = measure(images, split.validation)
    everything = jnp.arange(len(test.labels), dtype=jnp.int32)
    nothing = jnp.full_like(val_loss, jnp.nan)
    test_error, test_loss = jax.lax.cond(
        test_now, lambda: measure(test, everything), lambda: (nothing, nothing)
    )
    # lane by lane, for sums over several lanes at once would round with their number
    deviation, mean, inverse = over_lanes(measure_norms, phase.side_by_side, end.params)
    filters_rate = runs.rate if runs.ratio is None else runs.rate * runs.ratio
    values = History(
        runs.rate, loss, train_error, val_error, val_loss, deviation, mean,
        filters_rate * inverse, test_error, test_loss,
    )  # fmt: skip
    lane = jnp.arange(len(runs.rate))
    history = jax.tree.map(lambda old, new: old.at[lane, runs.epoch].set(new), runs.history, values)
    watched = {"train_loss": loss, "val_error": val_error, "val_loss": val_loss}[phase.watch]
    reason = jax.vmap(
        partial(
            protocol.stop_reason,
            min_epochs=phase.min_epochs,
            max_epochs=phase.max_epochs,
            train_threshold=phase.train_threshold,
            lookback=phase.lookback,
            flat=phase.flat,
        )
    )(runs.epoch + 1, loss, train_error, getattr(history, phase.stop_by))
    rate = protocol.next_rate(
        runs.schedule, runs.base, runs.rate, watched, runs.watched, runs.epoch + 1,
        phase.max_epochs, up=phase.up, down=phase.down,
    )  # fmt: skip
    # Battiti's bold driver takes back the step, here an epoch, after which the value rose
    back = (runs.schedule == protocol.BOLD_DRIVER_BACK) & (watched > runs.watched)
    active = runs.reason == protocol.RUNNING
    states = (end.params, end.stats, end.opt_state)
    params, stats, opt_state = select_lanes(
        arms, active & ~back, states, (runs.params, runs.stats, runs.opt_state)
    )
    watched = jnp.where(back, runs.watched, watched)
    told = (rate, watched, runs.epoch + 1, reason, history)
    kept = (runs.rate, runs.watched, runs.epoch, runs.reason, runs.history)
    rate, watched, epochs, reason, history = _where(active, told, kept)
    return Runs(
        params, stats, opt_state, runs.base, rate, runs.ratio, runs.schedule, watched, epochs,
        reason, history,
    )  # fmt: skip


def measure_norms(params: Any) -> tuple[Array, Array, Array]:
    """Of one run's filters: max |‖w‖ − 1|, mean ‖w‖ and median 1/‖w‖²."""
    norms = jnp.concatenate([filter_norms(w, FILTER_AXIS) for w in filters(params)])
    return jnp.abs(norms - 1).max(), norms.mean(), jnp.median(1 / norms**2)


def recompute_statistics(
    network: Network, phase: Phase, params: Any, stats: Any, images: Images, train: Array
) -> Any:
    """The statistics of mini-batches, averaged over the training images, in place of running ones.

    Every layer's are those behind the batch normalisation of the layers before it, as in training;
    the images that fill no mini-batch are left out ("precise" statistics: Wu and Johnson 2021).

    Args:
      stats: shaped like the result.
      train: int32 (train_images,), which images.
    """
    steps = len(train) // phase.batch_size
    nothing = jax.tree.map(jnp.zeros_like, stats)

    def body(total: Any, index: Array) -> tuple[Any, None]:
        x, _ = gather(images, index)
        moved = network.apply(params, nothing, x, True)[1]  # 1 − momentum of the batch's own
        return jax.tree.map(jnp.add, total, moved), None

    batches = train[: steps * phase.batch_size].reshape(steps, phase.batch_size)
    total, _ = jax.lax.scan(body, nothing, batches)
    return jax.tree.map(lambda x: x / (steps * (1 - phase.bn_momentum)), total)


def select_lanes(arms: Sequence[Arm], chosen: Array, new: Any, old: Any) -> Any:
    """Parameters, statistics and states of `new` where a lane is chosen, of `old` elsewhere."""
    params, stats = _where(chosen, new[:2], old[:2])
    states = zip(by_arm(arms, chosen), new[2], old[2], strict=True)
    return params, stats, tuple(_where(mine, *pair) for (_, mine), *pair in states)


def _where(chosen: Array, new: Any, old: Any) -> Any:
    """Leaf by leaf `new` or `old`, by the leading axis."""
    return jax.tree.map(
        lambda a, b: jnp.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old
    )


def filters(params: Any) -> list[Array]:
    """Every W of ArchBN, first layer first, one filter per row."""
    return [params["layers"][index]["rows"]["W"] for index in sorted(params["layers"])]


def put_filters(params: Any, new: Sequence[Array]) -> Any:
    """The parameters with these W in place of theirs."""
    layers = {
        index: params["layers"][index] | {"rows": {"W": w}}
        for index, w in zip(sorted(params["layers"]), new, strict=True)
    }
    return {**params, "layers": layers}


def evaluate(
    network: Network, params: Any, stats: Any, images: Images, index: Array
) -> tuple[Array, Array]:
    """Fraction misclassified of the images at `index`, and mean cross-entropy, running statistics.

    Every image counts once, whatever `EVALUATION_CHUNK`.
    """
    count, padded = len(index), chunked(index)
    valid = (jnp.arange(padded.size) < count).reshape(padded.shape)

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


def chunked(index: Array) -> Array:
    """Indices of images, (n,), for an evaluation: (chunks, `EVALUATION_CHUNK`), filled with 0.

    Two chunks at least: XLA takes a loop of one step apart and computes it together with those of
    the other lanes, so that the loss would round with their number.
    """
    chunk = min(EVALUATION_CHUNK, -(-len(index) // 2))
    return jnp.pad(index, (0, -len(index) % chunk)).reshape(-1, chunk)


def find_wrong(network: Network, params: Any, stats: Any, images: Images) -> tuple[Array, Array]:
    """Which images are misclassified, bool (images,), and the mean cross-entropy."""
    count = len(images.labels)

    def body(_: None, part: Array) -> tuple[None, tuple[Array, Array]]:
        x, y = gather(images, part)
        logits, _ = network.apply(params, stats, x, False)
        return None, (jnp.argmax(logits, -1) != y, cross_entropy(logits, y))

    _, (wrong, losses) = jax.lax.scan(body, None, chunked(jnp.arange(count, dtype=jnp.int32)))
    return wrong.reshape(-1)[:count], losses.reshape(-1)[:count].mean()


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

    Seeds are the leading axis of every array of `Split` and `Runs`, sharded over the devices; where
    they do not divide evenly, seeds that have ended are added and never reported. A state is the
    `Runs` of all seeds.

    Args:
      title: what the user calls it.
      config, depth: what is trained.
      phase: `sweep_phase(config)`, `train_phase(config)`, or another.
      arms: the lanes of every seed.
      seeds: shape (n,).
      lanes: what distinguishes the lanes, each with seeds in front, shape (n, lanes, …).
      data: its images.
    """

    def __init__(
        self,
        title: str,
        config: Config,
        depth: int,
        phase: Phase,
        arms: Sequence[Arm],
        seeds: np.ndarray,
        lanes: Lanes,
        data: Dataset,
    ):
        network = archbn(config, data.train_images.shape[1], data.classes, depth)
        self.title, self.epochs, self.phase = title, phase.max_epochs, phase
        self._count, self._seeds, self._lanes = len(seeds), seeds, lanes
        self.samples = lanes.rate.size * phase.train_images
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

        def init_one(seed: Array, lanes: Lanes) -> tuple[Split, Runs]:
            return init_split(phase, seed, total), init_runs(network, phase, arms, seed, lanes)

        def is_running(_: Split, runs: Runs) -> Array:
            return jnp.any(runs.reason == protocol.RUNNING)

        def wrong_one(runs: Runs, test: Images) -> tuple[Array, Array]:
            return jax.vmap(lambda p, s: find_wrong(network, p, s, test))(runs.params, runs.stats)

        spread = partial(over_seeds, mesh, block)
        self._init = spread(init_one, by_seed=2)
        self._epoch = spread(
            partial(epoch, network, phase, arms),
            by_seed=2,
            unless_idle=(is_running, 1),
            donate=1,
        )
        self._wrong = spread(wrong_one, by_seed=1)
        self._split: Split | None = None
        self._epochs_done = 0

    def start(self) -> Runs:
        """The runs at their start."""
        missing = self._padded - self._count

        def pad(x: np.ndarray, value: float) -> np.ndarray:
            x = np.asarray(x)
            return np.concatenate([x, np.full((missing, *x.shape[1:]), value, x.dtype)])

        ratio = self._lanes.ratio
        lanes = Lanes(
            rate=pad(self._lanes.rate.astype(np.float32), np.nan),
            ratio=None if ratio is None else pad(ratio.astype(np.float32), 1.0),
            schedule=pad(self._lanes.schedule.astype(np.int32), 0),
            spread=pad(self._lanes.spread.astype(np.float32), 0.0),
        )
        self._split, runs = self._init(pad(self._seeds.astype(np.uint32), 0), lanes)
        self._fresh, self._epochs_done = runs, 0
        return runs

    def put(self, saved: Any) -> Runs:
        """Saved runs in place of the first fresh ones: the padding depends on the devices."""
        fresh = to_host(self._fresh)
        whole = jax.tree.map(lambda new, old: np.concatenate([new, old[len(new) :]]), saved, fresh)
        self._epochs_done = int(np.max(saved.epoch))
        return jax.tree.map(
            lambda x, on: jax.make_array_from_callback(x.shape, on.sharding, lambda i: x[i]),
            whole,
            self._fresh,
        )

    def take(self, state: Runs) -> Runs:
        """The runs without the padding, on the host."""
        return jax.tree.map(lambda x: x[: self._count], to_host(state))

    def advance(self, state: Runs) -> Runs:
        """An epoch. The state given is used up."""
        self._epochs_done += 1
        test_now = np.asarray(self._epochs_done in self.phase.budgets)
        return self._epoch(self._split, state, self._images, self._test, test_now)

    def status(self, state: Runs) -> Status:
        """How far the runs are."""
        told = (state.reason, state.epoch, state.history.val_error)
        reasons, epochs, errors = (x[: self._count] for x in to_host(told))
        now = last(errors, epochs)
        known = now[np.isfinite(now)]
        active = int((reasons == protocol.RUNNING).sum())
        error = f"{known.mean():.2%}" if known.size else "–"
        text = f"{active}/{reasons.size} runs active, val error {error}"
        return Status(int(epochs.max()), bool(active), text)

    def find_wrong(self, state: Runs) -> tuple[np.ndarray, np.ndarray]:
        """Which test images every run gets wrong, and its mean cross-entropy over all of them.

        Returns:
          bool (seeds, lanes, test images); float32 (seeds, lanes).
        """
        wrong, loss = to_host(self._wrong(state, self._test))
        return wrong[: self._count], loss[: self._count]


def lane_of(runs: Runs, lane: int) -> Runs:
    """One lane of every seed, on the host, without the states of the updates."""
    return jax.tree.map(lambda x: x[:, lane], runs._replace(opt_state=()))


def same_start(rates: np.ndarray, schedule: int = protocol.BOLD_DRIVER) -> Lanes:
    """Balanced lanes of one schedule, with one rate for all parameters: rates (seeds, lanes)."""
    return Lanes(rates, None, np.full(rates.shape, schedule), np.zeros((*rates.shape, 3)))


def last(values: ArrayLike, epochs: ArrayLike) -> np.ndarray:
    """Each run's value after its last epoch: (…, max_epochs) and (…,) → (…,); NaN without any."""
    index = np.maximum(np.asarray(epochs) - 1, 0)
    return np.take_along_axis(np.asarray(values), index[..., None], -1)[..., 0]
