"""The training program: one epoch of many runs under several updates, compiled as one.

`epoch` is a pure function of one run: its `Split` and its `Run`. `Program` maps it over runs in
small blocks, deals the blocks to the devices and compiles the whole. Nothing moves between host and
device inside an epoch. What is trained (model, loss, protocol numbers) comes in as arguments; what
may be changed here is how.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from unitnorm.archbn import protocol
from unitnorm.archbn.config import Config, Model
from unitnorm.archbn.model import FILTER_AXIS, ArchBN, Network, filter_mask, split_network
from unitnorm.data import Dataset
from unitnorm.geometry import filter_norms, retraction
from unitnorm.run.loop import Status
from unitnorm.run.processes import to_host
from unitnorm.updates import find_update, partition

# Runs that a CPU device computes together: with more they leave its caches, with one XLA has no
# batch to work on; either costs a fifth. A GPU or TPU computes all of its runs together.
CPU_BLOCK = 2
EVALUATION_CHUNK = 500  # images per step of an evaluation; bounds its memory, not its result

# One stream of random numbers for each use, so that adding one leaves the others as they are.
INIT, SWEEP_SPLIT, SWEEP_ORDER, TRAIN_SPLIT, TRAIN_ORDER, START = range(6)


class Images(NamedTuple):
    """Pixels uint8 (N, features) and labels int32 (N,), on the device or on the host."""

    pixels: Array | np.ndarray
    labels: Array | np.ndarray


class Split(NamedTuple):
    """What a run's seed decides of its data: the indices of its images and the order's key."""

    train: Array  # int32 (train_images,)
    validation: Array  # int32 (validation_images,)
    order_seed: Array  # uint32 (), the seed of which the epochs' orders are drawn


class History(NamedTuple):
    """One value per epoch, each of shape (max_epochs,); NaN where nothing was measured."""

    lr: Array  # of all parameters but the filters, whose rate is `Run.ratio` times this
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
    """What some runs of a program have in common; it is compiled in."""

    update: str
    options: tuple[tuple[str, Any], ...] = ()  # of the update of the filters, beside axis
    unbalanced: bool = False  # some run's start is spread


class Settings(NamedTuple):
    """What distinguishes the runs of an arm: arrays of shape (runs,), or of one run, traced."""

    seed: Any
    rate: Any  # base learning rate; a run without a finite one has ended
    ratio: Any = None  # rate of the filters over that of the rest; None: one rate for both
    schedule: Any = protocol.BOLD_DRIVER  # int32, index into protocol.SCHEDULES
    spread: Any = (0.0, 0.0, 0.0)  # (runs, 3), decades: see `protocol.START`


class Run(NamedTuple):
    """One run: everything that it needs to go on."""

    params: Any
    stats: Any
    opt_state: Any
    base: Array  # the first epoch's learning rate
    rate: Array  # the coming epoch's
    ratio: Array | None
    schedule: Array
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
    stop_by: str = "val_error"  # or "val_loss": what the rules on validation look at
    # "running", or "anew": computed before each evaluation, see `recompute_statistics`
    statistics: str = "running"
    bn_momentum: float = 0.99  # of the running statistics
    budgets: tuple[int, ...] = ()  # after so many epochs the test images are measured


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


@lru_cache(maxsize=16)
def archbn(settings: Model, features: int, classes: int, depth: int) -> Network:
    """ArchBN as pure functions, the same ones for the same arguments.

    Args:
      settings: of a config, `config.model`.
    """
    named = settings.model_dump()
    return split_network(lambda rngs: ArchBN(features, depth, classes=classes, rngs=rngs, **named))


def stream(seed: Array, use: int) -> Array:
    """The key of one use of a run's seed."""
    return jax.random.fold_in(jax.random.key(seed), use)


def init_run(network: Network, phase: Phase, arm: Arm, settings: Settings) -> Run:
    """A run at its start, which depends on its seed and its spread, not on its update."""
    params, stats = network.init(stream(settings.seed, INIT))
    if arm.unbalanced:
        key = stream(settings.seed, START)
        params = protocol.unbalance(params, jnp.asarray(settings.spread), key)
        if find_update(arm.update).constrained:  # "trust" looks at no norm afterwards
            params = put_filters(params, [retraction(w, FILTER_AXIS) for w in filters(params)])
    nothing = jnp.full(phase.max_epochs, jnp.nan)
    has_rate = jnp.isfinite(settings.rate)
    return Run(
        params,
        stats,
        transformation(arm, jnp.float32(0), params).init(params),
        base=settings.rate,
        rate=settings.rate,
        ratio=settings.ratio,
        schedule=settings.schedule,
        watched=jnp.asarray(jnp.inf),
        epoch=jnp.asarray(0),
        reason=jnp.where(has_rate, protocol.RUNNING, protocol.NO_RATE).astype(jnp.int32),
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
    arm: Arm,
    split: Split,
    run: Run,
    number: Array,
    images: Images,
    test: Images,
) -> Run:
    """One epoch of one run; a run that has ended stays as it is.

    Mini-batches are drawn without replacement in an order that is new in each epoch and the same
    for all runs of a seed. Where the batch size does not divide the training images, the last batch
    is smaller.

    Args:
      number: of the epoch, from 0, the same for all runs of a program.
      test: measured after the epochs of `phase.budgets`.
    """
    key = jax.random.fold_in(stream(split.order_seed, phase.order_stream), number)
    # one sort of random bits, where jax.random.permutation takes two to be safe from ties; with
    # 50,000 images about one epoch in four has a single tie, broken by the order of the split
    order = split.train[argsort(jax.random.bits(key, (phase.train_images,)))]
    full = phase.train_images // phase.batch_size * phase.batch_size

    def step(at: Stepping, index: Array) -> tuple[Stepping, None]:
        x, y = gather(images, index)
        return train_step(network, phase, arm, run.rate, at, x, y, run.ratio), None

    # a constant would be found to differ from run to run, and the mini-batch traced once more
    zero = 0 * run.rate
    at = Stepping(run.params, run.stats, run.opt_state, zero, zero)
    at, _ = jax.lax.scan(step, at, order[:full].reshape(-1, phase.batch_size))
    if full < phase.train_images:
        at, _ = step(at, order[full:])
    return finish_epoch(network, phase, run, at, split, number, images, test)


def argsort(bits: Array) -> Array:
    """The order of uint32 (n,), int32 (n,): `jnp.argsort`, in a fifth of the time on a CPU.

    There XLA has a fast sort for one array of numbers, but not for two, so that the place is the
    lower half of the number.
    """

    def of_one_array(bits: Array) -> Array:
        with jax.enable_x64(True):
            places = jnp.arange(len(bits), dtype=jnp.uint64)
            return jnp.sort((bits.astype(jnp.uint64) << 32) | places).astype(jnp.int32)

    return jax.lax.platform_dependent(bits, cpu=of_one_array, default=jnp.argsort)


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


def train_step(
    network: Network,
    phase: Phase,
    arm: Arm,
    rate: Array,
    at: Stepping,
    x: Array,
    y: Array,
    ratio: Array | None = None,
) -> Stepping:
    """One mini-batch of one run: gradient, update, statistics, and the epoch's loss and errors."""

    def objective(params: Any) -> tuple[Array, tuple[Array, Array, Any]]:
        logits, moved = network.apply(params, at.stats, x, True)
        total = cross_entropy(logits, y).sum()
        wrong = jnp.sum(jnp.argmax(logits, -1) != y).astype(jnp.float32)
        return total if phase.reduction == "sum" else total / len(y), (total, wrong, moved)

    gradient, (total, wrong, stats) = jax.grad(objective, has_aux=True)(at.params)
    optimiser = transformation(arm, rate, at.params, ratio)
    displacement, opt_state = optimiser.update(gradient, at.opt_state, at.params)
    params = optax.apply_updates(at.params, displacement)
    return Stepping(params, stats, opt_state, at.loss + total, at.wrong + wrong)


def finish_epoch(
    network: Network,
    phase: Phase,
    run: Run,
    end: Stepping,
    split: Split,
    number: Array,
    images: Images,
    test: Images,
) -> Run:
    """Measure, anneal, decide on stopping, write the history; leave an ended run untouched."""
    loss, train_error = end.loss / phase.train_images, end.wrong / phase.train_images
    stats = end.stats
    if phase.statistics == "anew":
        stats = recompute_statistics(network, phase, end.params, stats, images, split.train)

    def measure_test() -> tuple[Array, Array]:
        everything = jnp.arange(len(test.labels), dtype=jnp.int32)
        return evaluate(network, end.params, stats, test, everything)

    val_error, val_loss = evaluate(network, end.params, stats, images, split.validation)
    test_error = test_loss = jnp.asarray(jnp.nan)
    if phase.budgets:
        test_error, test_loss = jax.lax.cond(
            jnp.isin(number + 1, jnp.asarray(phase.budgets)),
            measure_test,
            lambda: (test_error, test_loss),
        )
    deviation, mean, inverse = measure_norms(end.params)
    filters_rate = run.rate if run.ratio is None else run.rate * run.ratio
    values = History(
        run.rate, loss, train_error, val_error, val_loss, deviation, mean,
        filters_rate * inverse, test_error, test_loss,
    )  # fmt: skip
    history = jax.tree.map(lambda old, new: old.at[run.epoch].set(new), run.history, values)
    watched = {"train_loss": loss, "val_error": val_error, "val_loss": val_loss}[phase.watch]
    reason = protocol.stop_reason(
        run.epoch + 1,
        loss,
        train_error,
        getattr(history, phase.stop_by),
        min_epochs=phase.min_epochs,
        max_epochs=phase.max_epochs,
        train_threshold=phase.train_threshold,
        lookback=phase.lookback,
        flat=phase.flat,
    )
    rate = protocol.next_rate(
        run.schedule, run.base, run.rate, watched, run.watched, run.epoch + 1, phase.max_epochs,
        up=phase.up, down=phase.down,
    )  # fmt: skip
    # Battiti's bold driver takes back the step, here an epoch, after which the value rose
    back = (run.schedule == protocol.BOLD_DRIVER_BACK) & (watched > run.watched)
    start = (run.params, run.stats, run.opt_state, run.watched)
    moved = _where(back, start, (end.params, stats, end.opt_state, watched))
    params, stats, opt_state, watched = moved
    done = run._replace(
        params=params, stats=stats, opt_state=opt_state, rate=rate, watched=watched,
        epoch=run.epoch + 1, reason=reason, history=history,
    )  # fmt: skip
    return _where(run.reason == protocol.RUNNING, done, run)


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


def _where(chosen: Array, new: Any, old: Any) -> Any:
    """Leaf by leaf `new` or `old`."""
    return jax.tree.map(partial(jnp.where, chosen), new, old)


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
    """Fraction misclassified of the images at `index`, and mean cross-entropy in nats."""
    wrong, losses = find_wrong(network, params, stats, images, index)
    return wrong.mean(), losses.mean()


def chunked(index: Array) -> Array:
    """Indices of images, (n,), for an evaluation: (chunks, `EVALUATION_CHUNK`), filled with 0.

    Two chunks at least: XLA takes a loop of one step apart and computes it together with what
    stands around it, so that the loss would round with what is trained along.
    """
    chunk = min(EVALUATION_CHUNK, -(-len(index) // 2))
    return jnp.pad(index, (0, -len(index) % chunk)).reshape(-1, chunk)


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

    _, (wrong, losses) = jax.lax.scan(body, None, chunked(index))
    return wrong.reshape(-1)[: len(index)], losses.reshape(-1)[: len(index)]


def in_blocks(block: int, function: Callable[..., Any], *trees: Any) -> Any:
    """A function of `block` runs for many, leaves (runs, …), one block after the other.

    XLA compiles batches of other sizes to code with other rounding, so it is the block alone that
    decides a run's bits, and not how many runs there are.
    """
    blocks = jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), trees)
    done = jax.lax.map(lambda mine: function(*mine), blocks)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), done)


def over_devices(
    mesh: Mesh, function: Callable[..., Any], *, by_run: int, donate: int | None = None
) -> Callable[..., Any]:
    """Compile a function of many runs, each device computing its own.

    Args:
      mesh: the devices, along the axis "run".
      function: of trees whose leaves have runs as their leading axis, and of what they share.
      by_run: how many of its arguments have runs; the result has them, too.
      donate: an argument whose memory may be reused.
    """
    runs, everywhere = PartitionSpec("run"), PartitionSpec()

    def sharded(*arguments: Any) -> Any:
        specs = (runs,) * by_run + (everywhere,) * (len(arguments) - by_run)
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=runs, check_vma=False)(
            *arguments
        )

    compiled = jax.jit(sharded, donate_argnums=() if donate is None else donate)

    def call(*arguments: Any) -> Any:
        # by default JAX rounds the factors of float32 products on recent GPUs and on TPUs
        with jax.default_matmul_precision("highest"):
            return compiled(*arguments)

    return call


def deal(counts: Sequence[int], blocks: Sequence[int], devices: int) -> list[np.ndarray]:
    """Deal blocks of runs to devices like cards, arm after arm, so that all have as much to do.

    Args:
      counts, blocks: of each arm, its runs, and how many are a block.

    Returns:
      For each arm the run at each place, device after device, int (places,); −1 where there is
      none, since every device has as many places as the others.
    """
    found, dealt = [], 0
    for count, block in zip(counts, blocks, strict=True):
        number = -(-count // block)
        places = np.full((devices, -(-number // devices), block), -1)
        for card in range(number):
            runs = np.arange(card * block, min((card + 1) * block, count))
            places[(dealt + card) % devices, card // devices, : len(runs)] = runs
        dealt += number
        found.append(places.reshape(-1))
    return found


@lru_cache(maxsize=16)
def compile_parts(
    network: Network,
    phase: Phase,
    arms: tuple[Arm, ...],
    blocks: tuple[int, ...],
    mesh: Mesh,
    images: int,
) -> tuple[Callable[..., Any], ...]:
    """What is compiled of a program: its splits, its start, an epoch, what its runs get wrong.

    A study trains program after program of other seeds: the same functions spare it the tracing,
    a twentieth of its time.

    Args:
      arms, blocks: of each arm, how many of its runs are computed together.
      mesh: the devices, along the axis "run".
      images: to split.
    """

    def for_each_arm(function: Callable[..., Any], *trees: Any) -> Any:
        each = zip(arms, blocks, *trees, strict=True)
        return tuple(in_blocks(block, partial(function, arm), *mine) for arm, block, *mine in each)

    def init(settings: tuple[Settings, ...]) -> Any:
        def block(arm: Arm, given: Settings) -> Run:
            return jax.vmap(partial(init_run, network, phase, arm))(given)

        return for_each_arm(block, settings)

    def advance(splits: Any, state: Any, number: Array, images: Images, test: Images) -> Any:
        def block(arm: Arm, splits: Split, runs: Run) -> Run:
            compute = jax.vmap(
                lambda split, run: epoch(network, phase, arm, split, run, number, images, test)
            )
            # a block that has ended costs nothing
            is_running = jnp.any(runs.reason == protocol.RUNNING)
            return jax.lax.cond(is_running, compute, lambda _, runs: runs, splits, runs)

        return for_each_arm(block, splits, state)

    def find_wrong_of(state: Any, test: Images) -> Any:
        def block(_: Arm, runs: Run) -> tuple[Array, Array]:
            everything = jnp.arange(len(test.labels), dtype=jnp.int32)
            wrong, losses = jax.vmap(lambda p, s: find_wrong(network, p, s, test, everything))(
                runs.params, runs.stats
            )
            return wrong, losses.mean(-1)

        return for_each_arm(block, state)

    return (
        jax.jit(partial(jax.lax.map, partial(init_split, phase, images=images))),
        over_devices(mesh, init, by_run=1),
        over_devices(mesh, advance, by_run=2, donate=1),
        over_devices(mesh, find_wrong_of, by_run=1),
    )


class Program:
    """The training of runs of one depth, in one phase: a `loop.Trainable`.

    The runs of an arm are the leading axis of every array of its `Run`, sharded over the devices;
    where they do not divide evenly, runs that have ended are added and never reported. A state has
    a `Run` for each arm.

    Args:
      title: what the user calls it.
      config, depth: what is trained.
      phase: `sweep_phase(config)`, `train_phase(config)`, or another.
      arms: each with its runs.
      data: its images.
    """

    def __init__(
        self,
        title: str,
        config: Config,
        depth: int,
        phase: Phase,
        arms: Sequence[tuple[Arm, Settings]],
        data: Dataset,
    ):
        network = archbn(config.model, data.train_images.shape[1], data.classes, depth)
        self.title, self.epochs = title, phase.max_epochs
        settings = [_fill(given) for _, given in arms]
        counts = [len(given.seed) for given in settings]
        self.samples = sum(counts) * phase.train_images
        devices = jax.devices()
        if jax.process_count() == 1:
            devices = devices[: sum(-(-count // CPU_BLOCK) for count in counts)]
        on_cpu = devices[0].platform == "cpu"
        blocks = [CPU_BLOCK if on_cpu else -(-count // len(devices)) for count in counts]
        self._dealt = deal(counts, blocks, len(devices))
        self._places = [_find_places(dealt) for dealt in self._dealt]
        self._settings = tuple(
            # where there is no run, one that has ended
            mine._replace(rate=np.where(dealt < 0, np.float32(np.nan), mine.rate))
            for mine, dealt in zip(map(_rows, settings, self._dealt), self._dealt, strict=True)
        )
        leaders = _find_leaders(settings, self._settings, self._places[0])
        mesh = Mesh(np.asarray(devices), ("run",), axis_types=(AxisType.Auto,))
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._images, self._test = jax.device_put(
            (
                Images(data.train_images, data.train_labels),
                Images(data.test_images, data.test_labels),
            ),
            everywhere,
        )
        self._split, self._init, self._epoch, self._wrong = compile_parts(
            network,
            phase,
            tuple(arm for arm, _ in arms),
            tuple(blocks),
            mesh,
            len(data.train_labels),
        )
        self._by_run = NamedSharding(mesh, PartitionSpec("run"))
        self._follow = leaders and jax.jit(
            partial(_follow, leaders), donate_argnums=0, out_shardings=self._by_run
        )
        self._epochs_done = 0

    def start(self) -> tuple[Run, ...]:
        """The runs at their start."""
        # a seed's split is drawn once: for each run, it would be a third of the start
        seeds = np.unique(np.concatenate([given.seed for given in self._settings]))
        drawn = self._split(seeds)
        state: tuple[Run, ...] = self._init(self._settings)  # is traced while splits are drawn
        splits = jax.device_get(drawn)
        index = [np.searchsorted(seeds, given.seed) for given in self._settings]
        self._splits = self._shard([_rows(splits, mine) for mine in index])
        self._epochs_done = 0
        return state

    def put(self, saved: Any) -> tuple[Run, ...]:
        """Saved runs at their places, which depend on the devices."""
        self._epochs_done = max(int(np.max(runs.epoch)) for runs in saved)
        placed = zip(map(_rows, saved, self._dealt), self._dealt, strict=True)
        ended = np.int32(protocol.NO_RATE)
        state = tuple(
            runs._replace(reason=np.where(dealt < 0, ended, runs.reason)) for runs, dealt in placed
        )
        return self._shard(state)

    def _shard(self, tree: Any) -> Any:
        """What there is at each place, on the devices."""

        def put(x: np.ndarray) -> Array:
            return jax.make_array_from_callback(x.shape, self._by_run, lambda i: x[i])

        return jax.tree.map(put, tree)

    def take(self, state: Any) -> Any:
        """The runs of a state, or what else there is of each, in their order and on the host."""
        return tuple(map(_rows, to_host(state), self._places))

    def advance(self, state: tuple[Run, ...]) -> tuple[Run, ...]:
        """An epoch. The state given is used up."""
        number = np.int32(self._epochs_done)
        self._epochs_done += 1
        state = self._epoch(self._splits, state, number, self._images, self._test)
        return self._follow(state) if self._follow else state

    def status(self, state: tuple[Run, ...]) -> Status:
        """How far the runs are."""
        told = self.take(tuple((r.reason, r.epoch, r.history.val_error) for r in state))
        reasons, epochs, errors = map(np.concatenate, zip(*told, strict=True))
        now = last(errors, epochs)
        known = now[np.isfinite(now)]
        active = int((reasons == protocol.RUNNING).sum())
        error = float(known.mean()) if known.size else np.nan
        shown = f"{error:.2%}" if known.size else "–"
        text = f"{active}/{reasons.size} runs active, val error {shown}"
        return Status(int(epochs.max()), bool(active), text, val_error=error)

    def find_wrong(self, state: tuple[Run, ...]) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """Which test images the runs of each arm get wrong, and the mean cross-entropy over all.

        Returns:
          For each arm bool (runs, test images), float32 (runs,).
        """
        return self.take(self._wrong(state, self._test))


def _fill(given: Settings) -> Settings:
    """Settings with every array as long as `seed`."""
    count = len(given.seed)
    return Settings(
        seed=np.asarray(given.seed, np.uint32),
        rate=np.asarray(given.rate, np.float32),
        ratio=None if given.ratio is None else np.asarray(given.ratio, np.float32),
        schedule=np.broadcast_to(np.asarray(given.schedule, np.int32), count),
        spread=np.broadcast_to(np.asarray(given.spread, np.float32), (count, 3)),
    )


def _rows(tree: Any, index: np.ndarray) -> Any:
    """These rows of every array."""
    return jax.tree.map(lambda x: x[index], tree)


def _find_places(dealt: np.ndarray) -> np.ndarray:
    """Where each run is."""
    return np.argsort(dealt)[np.sum(dealt < 0) :]


def _find_leaders(
    given: Sequence[Settings], placed: Sequence[Settings], first: np.ndarray
) -> list[np.ndarray] | None:
    """For each place of each arm, that of its seed's first run in the first arm.

    Args:
      given, placed: the settings of each run, and of each place.
      first: where the first arm's runs are.

    Returns:
      None where no run follows another.
    """
    if not any(np.any(mine.schedule == protocol.FOLLOW) for mine in given):
        return None
    leader = dict(zip(given[0].seed[::-1].tolist(), first[::-1].tolist(), strict=True))
    return [np.array([leader[seed] for seed in mine.seed.tolist()]) for mine in placed]


def _follow(leaders: list[np.ndarray], state: tuple[Run, ...]) -> tuple[Run, ...]:
    """The state with the rates of `protocol.FOLLOW` set to their leaders'."""
    rates = state[0].rate
    return tuple(
        run._replace(rate=jnp.where(run.schedule == protocol.FOLLOW, rates[mine], run.rate))
        for run, mine in zip(state, leaders, strict=True)
    )


def last(values: ArrayLike, epochs: ArrayLike) -> np.ndarray:
    """Each run's value after its last epoch: (…, max_epochs) and (…,) → (…,); NaN without any."""
    index = np.maximum(np.asarray(epochs) - 1, 0)
    return np.take_along_axis(np.asarray(values), index[..., None], -1)[..., 0]
