"""Training: the compiled step, the compiled measurement, and the loop that can stop anywhere.

A `State` holds all that a training needs to go on; `Program.step` moves it by one mini-batch. Which
images a mini-batch has and which of them are flipped depends on the seed, the epoch and the step
alone, so that every update sees the same and an interrupted training goes on exactly. Mini-batches
are sharded over all devices while parameters are on each; statistics of batch normalisation are
those of the whole mini-batch, as the program is compiled for the whole and then divided.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from unitnorm.errors import UserError
from unitnorm.geometry import filter_norms
from unitnorm.run.checkpoints import Part
from unitnorm.run.loop import Interrupted
from unitnorm.segment.config import SegmentConfig
from unitnorm.segment.data import Split
from unitnorm.segment.metrics import confusion, measure, median_frequency_weights
from unitnorm.segment.model import filter_mask, segnet
from unitnorm.segment.palette import CLASSES, UNLABELLED
from unitnorm.updates import build

INIT, ORDER, FLIP = range(3)  # one stream of random numbers for each use


class Weights(NamedTuple):
    """What a prediction needs: nested dicts of arrays."""

    params: Any
    stats: Any


class History(NamedTuple):
    """One row per epoch; zeros where there was none yet."""

    loss: Array  # float32 (epochs,), mean weighted cross-entropy per labelled pixel, nats
    norm_deviation: Array  # float32 (epochs,), max |‖w‖ − 1| over all filters after the epoch
    confusion: Array  # int32 (epochs, classes, classes), on val


class State(NamedTuple):
    """A training between two mini-batches."""

    now: Weights
    opt_state: Any
    step: Array  # int32, mini-batches so far, over all epochs
    loss: Array  # float32, sum over the epoch's mini-batches so far
    history: History
    best: Weights  # of the epoch with the highest mean IoU on val
    best_epoch: Array  # int32, counted from 1; 0 where there is none


class Program:
    """The compiled functions of one update.

    Args:
      config: of the experiment.
      update: which update is trained.
      train, val: images and labels of one size.

    Raises:
      UserError: the batch size does not divide among the devices, or is above the images.
    """

    def __init__(self, config: SegmentConfig, update: str, train: Split, val: Split):
        part = config.train
        self.update, self._config = update, config
        images = len(train.labels)
        devices = jax.devices()
        if part.batch_size % len(devices):
            raise UserError(
                f"train.batch_size = {part.batch_size} does not divide among {len(devices)} "
                f"devices; expected a multiple of {len(devices)}: set it, or --devices"
            )
        if part.batch_size > images:
            raise UserError(
                f"train.batch_size = {part.batch_size}, but there are {images} training images"
            )
        mesh = Mesh(np.asarray(devices), ("image",), axis_types=(AxisType.Auto,))
        self._network = segnet(config.network, CLASSES, mesh)
        self._by_image = NamedSharding(mesh, PartitionSpec("image"))
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        self.epochs = part.epochs
        self.steps = -(-images // part.batch_size)  # mini-batches per epoch
        weights = median_frequency_weights(train.labels, CLASSES)
        self._class_weights = weights if part.class_weights else np.ones(CLASSES, np.float32)
        self._train = jax.device_put(train, self._everywhere)
        self._val = val
        self._step = jax.jit(self._train_step, donate_argnums=0, out_shardings=self._everywhere)
        self._count = jax.jit(self._confusion, out_shardings=self._everywhere)
        self._init = jax.jit(self._start, out_shardings=self._everywhere)
        self._deviation = jax.jit(norm_deviation)

    def init(self) -> State:
        """The start, which depends on the seed and not on the update."""
        return self._init(jnp.uint32(self._config.seed))

    def put(self, state: Any) -> State:
        """A state on the host, on the devices."""
        return jax.device_put(state, self._everywhere)

    def step(self, state: State) -> State:
        """One mini-batch. The state given is used up."""
        return self._step(state, self._train)

    def confusion(self, weights: Weights, split: Split) -> np.ndarray:
        """Confusion matrix over all images of a split, with running statistics."""
        size = self._config.train.batch_size
        total: Any = jnp.zeros((CLASSES, CLASSES), jnp.int32)
        for start in range(0, len(split.labels), size):
            images, labels = (array[start : start + size] for array in split)
            missing = size - len(labels)  # pixels without a label count nowhere
            images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
            labels = np.pad(labels, ((0, missing), (0, 0), (0, 0)), constant_values=UNLABELLED)
            batch = jax.device_put((images, labels), self._by_image)
            # one after another: CPU devices that sum for several batches at once can wait for each
            # other for ever, as each sum in waiting holds one of XLA's threads
            total = jax.block_until_ready(total + self._count(weights, *batch))
        return np.asarray(total)

    def finish_epoch(self, state: State) -> State:
        """Measure on val, write the history, keep the best."""
        epoch = int(state.step) // self.steps
        matrix = self.confusion(state.now, self._val)
        history = jax.device_get(state.history)
        history = History(*(array.copy() for array in history))
        history.loss[epoch - 1] = float(state.loss) / self.steps
        history.norm_deviation[epoch - 1] = float(self._deviation(state.now.params))
        before = int(state.best_epoch)
        is_best = before == 0 or (
            measure(matrix).mean_iou > measure(np.asarray(history.confusion[before - 1])).mean_iou
        )
        history.confusion[epoch - 1] = matrix
        state = state._replace(loss=jnp.zeros_like(state.loss), history=history)
        if is_best:
            copy = jax.tree.map(jnp.copy, state.now)  # a step uses up the arrays of its state
            state = state._replace(best=copy, best_epoch=jnp.int32(epoch))
        return self.put(state)

    # ------------------------------------------------------------ traced

    def _start(self, seed: Array) -> State:
        params, stats = self._network.init(jax.random.fold_in(jax.random.key(seed), INIT))
        weights = Weights(params, stats)
        return State(
            now=weights,
            opt_state=self._optimiser(0.0, params).init(params),
            step=jnp.int32(0),
            loss=jnp.float32(0),
            history=History(
                jnp.zeros(self.epochs, jnp.float32),
                jnp.zeros(self.epochs, jnp.float32),
                jnp.zeros((self.epochs, CLASSES, CLASSES), jnp.int32),
            ),
            best=jax.tree.map(jnp.copy, weights),
            best_epoch=jnp.int32(0),
        )

    def _optimiser(self, rate: Array | float, params: Any) -> optax.GradientTransformation:
        return build(self.update, rate, filters=filter_mask(params))

    def rate(self, step: Array | int) -> Array:
        """The learning rate of the mini-batch after `step` others."""
        base = jnp.float32(self._config.learning_rates[self.update])
        if self._config.train.decay == "none":
            return base
        return base * 0.5 * (1 + jnp.cos(jnp.pi * step / (self.steps * self.epochs)))

    def _batch(self, step: Array, train: Split) -> tuple[Array, Array]:
        """Images float32 and labels of a mini-batch, flipped at random.

        Each epoch has an order of its own. Where the batch size does not divide the images, the
        first of an order stand again at its end, so that all batches are of one size.
        """
        key = jax.random.key(jnp.uint32(self._config.seed))
        count, size = len(train.labels), self._config.train.batch_size
        epoch, place = step // self.steps, step % self.steps
        order_key = jax.random.fold_in(jax.random.fold_in(key, ORDER), epoch)
        order = jax.random.permutation(order_key, count)
        index = order[(place * size + jnp.arange(size)) % count]
        index = jax.lax.with_sharding_constraint(index, self._by_image)
        images, labels = train.images[index], train.labels[index]
        if self._config.data.flip:
            flip_key = jax.random.fold_in(jax.random.fold_in(key, FLIP), step)
            flip = jax.random.bernoulli(flip_key, shape=(size,))
            images = jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)
            labels = jnp.where(flip[:, None, None], labels[:, :, ::-1], labels)
        images, labels = jax.lax.with_sharding_constraint((images, labels), self._by_image)
        return images.astype(jnp.float32), labels.astype(jnp.int32)

    def _train_step(self, state: State, train: Split) -> State:
        images, labels = self._batch(state.step, train)

        def objective(params: Any) -> tuple[Array, Any]:
            logits, stats = self._network.apply(params, state.now.stats, images, True)
            return weighted_cross_entropy(logits, labels, self._class_weights), stats

        (loss, stats), gradient = jax.value_and_grad(objective, has_aux=True)(state.now.params)
        optimiser = self._optimiser(self.rate(state.step), state.now.params)
        steps, opt_state = optimiser.update(gradient, state.opt_state, state.now.params)
        params = optax.apply_updates(state.now.params, steps)
        return state._replace(
            now=Weights(params, stats),
            opt_state=opt_state,
            step=state.step + 1,
            loss=state.loss + loss,
        )

    def _confusion(self, weights: Weights, images: Array, labels: Array) -> Array:
        logits, _ = self._network.apply(*weights, images.astype(jnp.float32), False)
        return confusion(labels, jnp.argmax(logits, -1), CLASSES)


def weighted_cross_entropy(logits: Array, labels: Array, weights: np.ndarray | Array) -> Array:
    """Mean over the labelled pixels of weights[label] times cross-entropy, in nats.

    Args:
      logits: (…, classes).
      labels: int32 (…); `classes` and above are unlabelled and count nowhere.
      weights: (classes,).
    """
    picked = labels[..., None] == jnp.arange(logits.shape[-1])
    # a sum over a mask, since its gradient is a subtraction where an index's is a scatter
    weighted = jnp.where(picked, weights * jax.nn.log_softmax(logits), 0.0)
    return -weighted.sum() / jnp.maximum(picked.sum(), 1)


def norm_deviation(params: Any) -> Array:
    """max |‖w‖ − 1| over all filters that feed a batch normalisation."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(filter_mask(params)), strict=True)
    return jnp.stack([jnp.abs(filter_norms(w) - 1).max() for w, chosen in pairs if chosen]).max()


# ---------------------------------------------------------------- the loop


class Checkpoints(Protocol):
    """Keeps states; see `unitnorm.run.checkpoints.Folder`."""

    def restore(self, part: Part, like: Any) -> Any | None:
        """The saved state, or None."""

    def due(self) -> bool:
        """It is time to save."""

    def save(self, part: Part, state: Any, *, wait: bool) -> None:
        """Keep a state."""


@dataclass(frozen=True)
class Session:
    """The outside world, as far as a training needs it.

    Attributes:
      epoch_done: is given the program, the state after each epoch, and the epoch's seconds.
      step_done: is given the mini-batches of the epoch so far and in all.
    """

    epoch_done: Callable[[Program, State, float], None]
    step_done: Callable[[int, int], None]
    say: Callable[[str], None]
    checkpoints: Checkpoints
    interrupted: Callable[[], bool]


def train(program: Program, part: Part, session: Session) -> State:
    """All epochs, from the checkpoint of `part` if there is one.

    Raises:
      Interrupted: on request, after any mini-batch; the state is saved.
      UserError: the loss is not finite any more.
    """
    state = program.init()
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    saved = session.checkpoints.restore(part, like)
    if saved is not None:
        state = program.put(saved)
        epoch, place = divmod(int(state.step), program.steps)
        session.say(
            f"{part.title}: going on after epoch {epoch}" + (f", step {place}" * bool(place))
        )
    step, started = int(state.step), time.perf_counter()
    while step < program.epochs * program.steps:
        if session.interrupted():
            session.checkpoints.save(part, to_host(state), wait=True)
            raise Interrupted
        state = program.step(state)
        step += 1
        place = step % program.steps or program.steps
        # wait for the step before the next is sent, so that an interruption is quick to come
        jax.block_until_ready(state.step)
        session.step_done(place, program.steps)
        if place == program.steps:
            if not np.isfinite(float(state.loss)):
                raise UserError(
                    f"{part.title}: the loss is not finite in epoch {step // program.steps}; take "
                    f"a smaller rate, --set learning_rates.{program.update}=…"
                )
            state = program.finish_epoch(state)
            session.epoch_done(program, state, time.perf_counter() - started)
            started = time.perf_counter()
            if session.checkpoints.due():
                session.checkpoints.save(part, to_host(state), wait=False)
    return state


def to_host(state: State) -> Any:
    """Copies as NumPy, which a later step leaves alone."""
    return jax.tree.map(np.array, jax.device_get(state))
