"""The training of one run, from its start to the stopping rule: the paper's section 4 on one page.

What may be changed here is how a network is trained; the numbers are in `config`, the rules in
`protocol`, the updates in `unitnorm.updates`. `run_many` maps it over runs and devices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from unitnorm.archbn import batches, evaluation, protocol
from unitnorm.archbn.batches import Images, Split
from unitnorm.archbn.config import Config
from unitnorm.archbn.model import START, Network, unbalance
from unitnorm.geometry import retraction
from unitnorm.updates import find_update, partition


class Task(NamedTuple):
    """What all runs of a program have in common; it is compiled in."""

    config: Config
    network: Network
    part: str = "train"  # of the config: "train", or "sweep", which has a fixed rate and length
    stop_by: str = "val_error"  # or "val_loss": what the rules on validation look at
    statistics: str = "running"  # or "images": of the training images, before each evaluation
    budgets: tuple[int, ...] = ()  # after so many epochs the test images are measured
    layers: bool = False  # each epoch ends with a look at the size of a step, layer by layer


class Arm(NamedTuple):
    """What some runs of a program have in common; it is compiled in, too."""

    update: str
    options: tuple[tuple[str, Any], ...] = ()  # of the update of the filters, beside axis
    unbalanced: bool = False  # some run's start is spread
    factors: tuple[float, ...] = ()  # of the filters' rate, layer by layer; (): 1


class Settings(NamedTuple):
    """What distinguishes the runs of an arm: arrays of shape (runs,), or of one run, traced."""

    seed: Any
    rate: Any  # base learning rate; a run without a finite one has ended
    ratio: Any = None  # rate of the filters over that of the rest; None: one rate for both
    schedule: Any = protocol.BOLD_DRIVER  # int32, index into protocol.SCHEDULES
    spread: Any = (0.0,) * len(START)  # (runs, 4), decades: see `model.START`
    decay: Any = None  # weight decay of the filters, η; None: the update takes none


class History(NamedTuple):
    """One value per epoch, each of shape (max_epochs, …); NaN where nothing was measured."""

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
    layer_rate: Array | None  # (…, layers), see `evaluation.measure_step`
    layer_angle: Array | None  # the same, in radians


class Run(NamedTuple):
    """One run: everything that it needs to go on."""

    params: Any
    stats: Any
    opt_state: Any
    base: Array  # the first epoch's learning rate
    rate: Array  # the coming epoch's
    ratio: Array | None
    decay: Array | None
    schedule: Array
    watched: Array  # the bold driver's value after the last epoch
    epoch: Array  # int32, epochs finished
    reason: Array  # int32, index into protocol.STOP_REASONS
    history: History


class EpochState(NamedTuple):
    """Where a run stands between two mini-batches of an epoch."""

    params: Any
    stats: Any
    opt_state: Any
    loss: Array  # sum of the epoch's losses so far, in training mode
    wrong: Array  # number of the epoch's images misclassified so far


class Training(NamedTuple):
    """Pure functions of one run."""

    init: Callable[[Settings], Run]
    step: Callable[[Any, EpochState, Array, Array], EpochState]
    epoch: Callable[[Images, Images, Array, Split, Run], Run]


def make_training(task: Task, arm: Arm) -> Training:
    """The functions below, closed over what is compiled in."""
    config, network = task.config, task.network
    known, sizes = find_update(arm.update), getattr(config, task.part)
    size = config.loss.batch_size

    def optimiser(run: Any, params: Any) -> optax.GradientTransformation:
        """Table 1: of each filter, for UN w ← Orth(w − λ Π_w(∇ℓ)) with Π_w(g) = g − (wᵀg) w, for
        B-SGD w ← w − λ ∇ℓ; of all else, γ, β and θ, x ← x − λ ∇ℓ."""
        options = dict(arm.options) | ({} if run.decay is None else {"weight_decay": run.decay})
        if known.constrained:
            options.setdefault("off_manifold", "trust")  # filters have unit norm from the start
        filters_rate = run.rate if run.ratio is None else run.ratio * run.rate
        filters = known.filters(filters_rate, axis=network.axis, **options)
        return partition(filters, known.rest(run.rate), network.mask(params))

    def init(given: Settings) -> Run:
        """A run at its start, which depends on its seed and spread, not on its update."""
        params, stats = network.init(batches.stream(given.seed, batches.INIT))
        if arm.unbalanced:
            key = batches.stream(given.seed, batches.START)
            params = unbalance(params, jnp.asarray(given.spread), key)
            if known.constrained:  # "trust" looks at no norm afterwards
                params = network.with_filters(params, lambda w: retraction(w, network.axis))
        once = jnp.full(sizes.max_epochs, jnp.nan)
        shape = sizes.max_epochs, len(network.filters(params))
        by_layer = jnp.full(shape, jnp.nan) if task.layers else None
        history = History(**dict.fromkeys(History._fields, once))
        history = history._replace(layer_rate=by_layer, layer_angle=by_layer)
        reason = jnp.where(jnp.isfinite(given.rate), protocol.RUNNING, protocol.NO_RATE)
        run = Run(
            params=params, stats=stats, opt_state=None, base=given.rate, rate=given.rate,
            ratio=given.ratio, decay=given.decay, schedule=given.schedule,
            watched=jnp.asarray(jnp.inf), epoch=jnp.asarray(0), reason=reason.astype(jnp.int32),
            history=history,
        )  # fmt: skip
        at_rest = run._replace(rate=jnp.float32(0), ratio=None)
        return run._replace(opt_state=optimiser(at_rest, params).init(params))

    def gradient(at: EpochState, x: Array, y: Array) -> tuple[Any, tuple[Array, Array, Any]]:
        """∇ℓ of the mini-batch's cross-entropy; its sum, its errors, and the moved statistics."""

        def loss(params: Any) -> tuple[Array, tuple[Array, Array, Any]]:
            logits, moved = network.apply(params, at.stats, x, True)
            total = evaluation.cross_entropy(logits, y).sum()
            wrong = jnp.sum(jnp.argmax(logits, -1) != y).astype(jnp.float32)
            joined = total if config.loss.reduction == "sum" else total / len(y)
            return joined, (total, wrong, moved)

        return jax.grad(loss, has_aux=True)(at.params)

    def step(run: Any, at: EpochState, x: Array, y: Array) -> EpochState:
        """Table 1, one row: ∇ℓ of a mini-batch, the update, the running statistics.

        Of the run, `rate`, `ratio` and `decay` are read.
        """
        g, (total, wrong, stats) = gradient(at, x, y)
        if arm.factors:
            factors = iter(arm.factors)
            g = network.with_filters(g, lambda filters: next(factors) * filters)
        displacement, opt_state = optimiser(run, at.params).update(g, at.opt_state, at.params)
        params = optax.apply_updates(at.params, displacement)
        return EpochState(params, stats, opt_state, at.loss + total, at.wrong + wrong)

    def epoch(images: Images, test: Images, number: Array, split: Split, run: Run) -> Run:
        """Section 4: mini-batches without replacement, in an order that is new in each epoch.

        `number` is the epoch's, from 0.
        """
        order = batches.draw_order(task.part, split, number)
        whole = len(order) // size * size
        # a constant would be found to differ from run to run, and the mini-batch traced once more
        zero = 0 * run.rate
        at = EpochState(run.params, run.stats, run.opt_state, zero, zero)
        each, last = order[:whole].reshape(-1, size), order[whole:]  # the last may be smaller
        places = len(each) + (len(last) > 0)

        def step_at(at: EpochState, given: tuple[Array, Array | int]) -> tuple[EpochState, None]:
            index, place = given
            x, y = batches.gather(images, index)
            if network.augment is None:
                return step(run, at, x, y), None
            done = (number * places + place) / (sizes.max_epochs * places)
            rate = protocol.rate_within(run.schedule, run.base, run.rate, done)
            key = batches.stream(split.order_seed, batches.AUGMENT)
            key = jax.random.fold_in(jax.random.fold_in(key, number), place)
            return step(run._replace(rate=rate), at, network.augment(key, x), y), None

        at, _ = jax.lax.scan(step_at, at, (each, jnp.arange(len(each))))
        at = step_at(at, (last, len(each)))[0] if len(last) else at
        if task.statistics == "images":
            blocks = split.train[:whole].reshape(-1, size)
            stats = evaluation.average_statistics(network, at.params, at.stats, images, blocks)
            at = at._replace(stats=stats)
        return finish(run, at, measure(images, test, number, split, run, at))

    def finish(run: Run, end: EpochState, values: History) -> Run:
        """Section 4: anneal λ, stop, or go on; an ended run is left untouched."""
        history = jax.tree.map(lambda old, new: old.at[run.epoch].set(new), run.history, values)
        watched, epochs = getattr(values, config.bold_driver.watch), run.epoch + 1
        reason = protocol.stop_reason(
            epochs, values.train_loss, values.train_error, getattr(history, task.stop_by), sizes,
            config.stopping,
        )  # fmt: skip
        rate = protocol.next_rate(run, watched, sizes.max_epochs, config.bold_driver)
        # Battiti's bold driver takes back the step, here an epoch, after which the value rose
        back = (run.schedule == protocol.BOLD_DRIVER_BACK) & (watched > run.watched)
        before = run.params, run.stats, run.opt_state, run.watched
        after = end.params, end.stats, end.opt_state, watched
        params, stats, opt_state, watched = _where(back, before, after)
        done = run._replace(
            params=params, stats=stats, opt_state=opt_state, rate=rate, watched=watched,
            epoch=epochs, reason=reason, history=history,
        )  # fmt: skip
        return _where(run.reason == protocol.RUNNING, done, run)

    def measure(
        images: Images, test: Images, number: Array, split: Split, run: Run, end: EpochState
    ) -> History:
        """The epoch's row of the history."""
        params, stats, seen = end.params, end.stats, sizes.train_images
        val_error, val_loss = evaluation.evaluate(network, params, stats, images, split.validation)
        test_error = test_loss = jnp.asarray(jnp.nan)
        if task.budgets:
            everything = jnp.arange(len(test.labels), dtype=jnp.int32)
            test_error, test_loss = jax.lax.cond(
                jnp.isin(number + 1, jnp.asarray(task.budgets)),
                lambda: evaluation.evaluate(network, params, stats, test, everything),
                lambda: (test_error, test_loss),
            )
        deviation, mean, inverse = evaluation.measure_norms(network, params)
        layers: tuple[Any, Any] = None, None
        if task.layers:  # of a step that is looked at and not taken
            x, y = batches.gather(images, split.train[:size])
            after, (g, _) = step(run, end, x, y), gradient(end, x, y)
            layers = evaluation.measure_step(network, params, g, after.params)
        filters_rate = run.rate if run.ratio is None else run.rate * run.ratio
        return History(
            lr=run.rate, train_loss=end.loss / seen, train_error=end.wrong / seen,
            val_error=val_error, val_loss=val_loss, norm_deviation=deviation, norm_mean=mean,
            effective_rate=filters_rate * inverse, test_error=test_error, test_loss=test_loss,
            layer_rate=layers[0], layer_angle=layers[1],
        )  # fmt: skip

    return Training(init, step, epoch)


def _where(chosen: Array, new: Any, old: Any) -> Any:
    """Leaf by leaf `new` or `old`."""
    return jax.tree.map(partial(jnp.where, chosen), new, old)
