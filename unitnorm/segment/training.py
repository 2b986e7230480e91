"""Training: the compiled step, and the program that the loop of `unitnorm.run` trains.

Which images a mini-batch has and how they are changed depends on the seed, the epoch, the step and
the image's place in it alone, so that every update sees the same and an interrupted training goes
on exactly. Mini-batches are sharded over all devices, parameters are on each; statistics of batch
normalisation are those of the whole mini-batch.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from unitnorm.archbn.batches import stream
from unitnorm.archbn.evaluation import cross_entropy, measure_norms
from unitnorm.errors import UserError
from unitnorm.run.loop import Status
from unitnorm.segment.augment import augment
from unitnorm.segment.config import SegmentConfig
from unitnorm.segment.data import Scenes
from unitnorm.segment.evaluation import Evaluator, measure
from unitnorm.segment.palette import CLASSES
from unitnorm.segment.weights import Weights
from unitnorm.updates import UPDATES, build

INIT, ORDER, AUGMENT = range(3)  # one stream of random numbers for each use

# Of the SegNet authors' own training on CamVid (segnet_basic_train.prototxt of their tutorial), in
# the order of `palette.NAMES`: median frequency weights of the 367 label images, each within a
# tenth, but for "sign", 9.6, where the images give 3.8; they probably had a narrower class.
PUBLISHED_WEIGHTS = (
    0.2595, 0.1826, 4.5640, 0.1417, 0.9051, 0.3826, 9.6446, 1.8418, 0.6823, 6.2478, 7.3614,
)  # fmt: skip


class EpochFigures(NamedTuple):
    """One row per epoch, on the host; zeros where there was none yet, or none was measured."""

    loss: np.ndarray  # float32 (epochs,), mean weighted cross-entropy per labelled pixel, nats
    norm_deviation: np.ndarray  # float32 (epochs,), max |‖w‖ − 1| over all filters after the epoch
    confusion: np.ndarray  # int32 (epochs, classes, classes), on the images held out


class SegNetState(NamedTuple):
    """A training between two mini-batches. A step changes the first four."""

    now: Weights
    opt_state: Any
    step: Array  # int32, mini-batches so far, over all epochs
    loss: Array  # float32, sum over the epoch's mini-batches so far
    best: Weights  # of the epoch with the highest mean IoU on the images held out
    best_epoch: np.int32  # on the host, counted from 1; 0 where there is none
    figures: EpochFigures


class SegNetProgram:
    """The training of one run of one update: a `loop.Trainable`.

    Args:
      title: what the user calls it.
      update, seed, rate: which run; `rate` is its base learning rate.
      scales: of each epoch, the part of the size at which images are trained on and measured.
      images: those that are trained on, and those that are measured on, at their full size.

    Raises:
      UserError: the batch size does not divide among the devices, or is above the images.
    """

    def __init__(
        self, title: str, config: SegmentConfig, update: str, seed: int, rate: float,
        scales: list[float], images: tuple[Scenes, Scenes],
    ):  # fmt: skip
        train, held_out = images
        part, count, devices = config.train, len(train.labels), len(jax.devices())
        if part.batch_size % devices:
            raise UserError(
                f"train.batch_size = {part.batch_size} does not divide among {devices} "
                f"devices; expected a multiple of {devices}: set it, or --devices"
            )
        if part.batch_size > count:
            few = f"there are {count} training images"
            raise UserError(f"train.batch_size = {part.batch_size}, but {few}")
        self.title, self.epochs, self.samples = title, len(scales), count
        self.steps = -(-count // part.batch_size)  # mini-batches per epoch
        self.update, self.seed, self.rate = update, seed, rate
        self.scales, self.final_size = scales, train.size_at(scales[-1])
        self._config = config
        self._run = jnp.uint32(seed), jnp.float32(rate)  # traced: all runs share what is compiled
        self._class_weights = {
            "median": lambda: median_frequency_weights(train.labels),
            "published": lambda: np.asarray(PUBLISHED_WEIGHTS, np.float32),
            "none": lambda: np.ones(CLASSES, np.float32),
        }[part.class_weights]()
        # as many pixels at a time as in training, if there are as many devices as images
        height, width = train.size_at(1.0)
        rows, columns = map(min, part.crop, (height, width))
        batch = max(1, part.batch_size * (rows * columns) // (height * width))
        self.evaluator = Evaluator(config.network, batch)
        self._network, self._everywhere = self.evaluator.network, self.evaluator.everywhere
        self._init = jax.jit(self._start, out_shardings=self._everywhere)
        self._step = jax.jit(self._train_step, donate_argnums=0, out_shardings=self._everywhere)
        self._norms = jax.jit(partial(measure_norms, self._network))
        self._draw = jax.jit(self._batch)

        @lru_cache(maxsize=1)
        def at(scale: float) -> tuple[Scenes, Scenes, tuple[Array, Array]]:
            """Both sets of images at a part of their size, and the first on the devices."""
            small = train.scaled(scale)
            return small, held_out.scaled(scale), jax.device_put(small[:2], self._everywhere)

        self._at = at

    # ------------------------------------------------------------ what the loop calls

    def start(self) -> SegNetState:
        """The start, which depends on the seed and not on the update."""
        loss, deviation = np.zeros((2, self.epochs), np.float32)
        confusion = np.zeros((self.epochs, CLASSES, CLASSES), np.int32)
        nothing = EpochFigures(loss, deviation, confusion)
        now, opt_state, step, total, best = self._init(self._run[0])
        return SegNetState(now, opt_state, step, total, best, np.int32(0), nothing)

    def put(self, saved: Any) -> SegNetState:
        """A state from the host, on the devices."""
        return SegNetState(*jax.device_put(saved[:5], self._everywhere), *saved[5:])

    def take(self, state: SegNetState) -> Any:
        """The state as NumPy arrays, which a later step leaves alone."""
        return jax.tree.map(np.array, jax.device_get(state))

    def advance(self, state: SegNetState) -> SegNetState:
        """One mini-batch; the last of an epoch measures. The state given is used up."""
        before = int(state.step)
        images = self._at(self.scales[before // self.steps])[2]
        now, opt_state, step, loss = self._step(state[:4], images, *self._run)
        state = SegNetState(now, opt_state, step, loss, *state[4:])
        return self._finish_epoch(state) if (before + 1) % self.steps == 0 else state

    def status(self, state: SegNetState) -> Status:
        """How far it is; it ends after its epochs, or with a loss that is not finite."""
        epoch, place = divmod(int(state.step), self.steps)
        if place or not epoch:
            return Status(epoch, True, "", f"mini-batch {place}/{self.steps}" if place else "")
        loss, _, confusion = state.figures
        text = f"loss {loss[epoch - 1]:.3f}"
        known = np.flatnonzero(confusion[:epoch].any((1, 2)))
        if known.size:
            found = measure(confusion[known[-1]])
            text += f", global {found['global_accuracy']:.1%}, mean IoU {found['mean_iou']:.1%}"
        return Status(epoch, epoch < self.epochs and bool(np.isfinite(loss[epoch - 1])), text)

    # ------------------------------------------------------------ measurement

    def measured(self, weights: Weights, epoch: int) -> Weights:
        """Weights as they are measured after an epoch, counted from 1."""
        if self._config.train.class_prior == "labels":
            weights = divide_out(weights, self._class_weights)
        return self.with_statistics(weights, epoch)

    def with_statistics(self, weights: Weights, epoch: int) -> Weights:
        """Weights with the batch statistics that the config asks for after an epoch."""
        source = self._config.train.statistics
        if source == "running":
            return weights
        train, _, on_devices = self._at(self.scales[epoch - 1])
        batches = self.evaluator.whole_images(train)
        if source == "batches":
            steps = range(epoch * self.steps, (epoch + 1) * self.steps)  # of the next epoch
            batches = (self._draw(jnp.int32(i), *on_devices, self._run[0])[0] for i in steps)
        return self.evaluator.recompute_statistics(weights, batches)

    def _finish_epoch(self, state: SegNetState) -> SegNetState:
        """Record the epoch; where it is time to, measure and keep the weights that are best.

        The best are looked for among the epochs at the scale of the last: others are not
        comparable.
        """
        epoch, before = int(state.step) // self.steps, int(state.best_epoch)
        figures = EpochFigures(*map(np.copy, state.figures))
        loss = figures.loss[epoch - 1] = np.float32(float(state.loss) / self.steps)
        figures.norm_deviation[epoch - 1] = self._norms(state.now.params)[0]
        due = epoch == self.epochs or epoch % self._config.train.measure_every == 0
        if due and np.isfinite(loss):
            scale, weights = self.scales[epoch - 1], self.measured(state.now, epoch)
            matrix = self.evaluator.confusion(weights, self._at(scale)[1]).sum(0)
            best = measure(figures.confusion[before - 1])["mean_iou"] if before else -1.0
            figures.confusion[epoch - 1] = matrix
            if scale == self.scales[-1] and not measure(matrix)["mean_iou"] <= best:
                copy = jax.tree.map(jnp.copy, weights)  # a step uses up the arrays that it changes
                state = state._replace(best=copy, best_epoch=np.int32(epoch))
        loss = jax.device_put(np.float32(0), self._everywhere)  # else a step compiles again
        return state._replace(loss=loss, figures=figures)

    def rate_at(self, step: Array | int, base: Any) -> Any:
        """The learning rate of the mini-batch after `step` others."""
        if self._config.train.decay == "none":
            return base
        return optax.cosine_decay_schedule(base, self.steps * self.epochs)(step)

    # ------------------------------------------------------------ traced

    def _start(self, seed: Array) -> tuple[Weights, Any, Array, Array, Weights]:
        """What a state has on the devices, in its order."""
        params, stats = self._network.init(stream(seed, INIT))
        now, opt_state = Weights(params, stats), self._optimiser(0.0, params).init(params)
        return now, opt_state, jnp.int32(0), jnp.float32(0), jax.tree.map(jnp.copy, now)

    def _optimiser(self, rate: Array | float, params: Any) -> optax.GradientTransformation:
        rest = UPDATES[self.update].rest(rate)
        if decay := self._config.train.weight_decay:
            rest = optax.chain(optax.add_decayed_weights(decay), rest)
        return build(self.update, rate, filters=self._network.mask(params), rest=rest)

    def _batch(self, step: Array, images: Array, labels: Array, seed: Array) -> tuple[Array, Array]:
        """A mini-batch, changed at random: images float32 and labels int32.

        Each epoch has an order of its own. Where the batch size does not divide the images, the
        first of an order stand again at its end, so that all batches are of one size.
        """
        size, (epoch, place) = self._config.train.batch_size, jnp.divmod(step, self.steps)
        order_key = jax.random.fold_in(stream(seed, ORDER), epoch)
        order = jax.random.permutation(order_key, len(labels))
        index = order[(place * size + jnp.arange(size)) % len(labels)]
        keys = jax.random.split(jax.random.fold_in(stream(seed, AUGMENT), step), size)
        by_image = self.evaluator.by_image
        index, keys = jax.lax.with_sharding_constraint((index, keys), by_image)
        rows, columns = map(min, self._config.train.crop, labels.shape[1:])
        change = partial(augment, size=(rows, columns), options=self._config.augmentation)
        batch = jax.vmap(change)(keys, images[index], labels[index])
        return jax.lax.with_sharding_constraint(batch, by_image)

    def _train_step(
        self, before: Any, train: tuple[Array, Array], seed: Array, rate: Array
    ) -> tuple[Weights, Any, Array, Array]:
        """The first four of a state, one mini-batch later."""
        now, opt_state, step, loss = before
        images, labels = self._batch(step, *train, seed)

        def objective(params: Any) -> tuple[Array, Any]:
            logits, stats = self._network.apply(params, now.stats, images, True)
            return weighted_cross_entropy(logits, labels, self._class_weights), stats

        (mean, stats), gradient = jax.value_and_grad(objective, has_aux=True)(now.params)
        optimiser = self._optimiser(self.rate_at(step, rate), now.params)
        change, opt_state = optimiser.update(gradient, opt_state, now.params)
        params, loss = optax.apply_updates(now.params, change), loss + mean
        return Weights(params, stats), opt_state, step + 1, loss


def median_frequency_weights(labels: np.ndarray) -> np.ndarray:
    """Weights of the classes in the loss: median(f) / f(c), float32 (CLASSES,).

    f(c) is the number of pixels of class c over the number of labelled and unlabelled pixels of the
    images that have it (Eigen and Fergus 2015, as in the SegNet paper). A class that no image has
    weighs nothing. `labels` are those of the training images, (n, height, width).
    """
    counts = np.stack([np.bincount(image.ravel(), minlength=256)[:CLASSES] for image in labels])
    with np.errstate(invalid="ignore"):  # 0 / 0
        frequency = counts.sum(0) / (labels[0].size * (counts > 0).sum(0))
    return np.nan_to_num(np.nanmedian(frequency) / frequency).astype(np.float32)


def weighted_cross_entropy(logits: Array, labels: Array, weights: np.ndarray | Array) -> Array:
    """Mean over the labelled pixels of weights[label] times cross-entropy, in nats.

    The arguments are those of `cross_entropy`.
    """
    labelled = (labels < logits.shape[-1]).sum()
    return cross_entropy(logits, labels, weights).sum() / jnp.maximum(labelled, 1)


def divide_out(weights: Weights, class_weights: np.ndarray) -> Weights:
    """The network whose class probabilities are those of the one given, each over its class weight.

    A loss weighted by w is least where a class c has the probability p(c|x) w(c) / Σ p(k|x) w(k):
    rare classes are taken too often. To take log w off the bias gives p(c|x) again. Menon et al.
    (2021), "Long-tail learning via logit adjustment", move the bias for the same reason.

    Args:
      class_weights: (classes,); a class of weight 0, which is never trained, stays as it is.
    """
    classifier = weights.params["classifier"]
    factors = np.where(class_weights > 0, class_weights, 1)
    corrected = {**classifier, "bias": classifier["bias"] - jnp.log(factors)}
    return weights._replace(params={**weights.params, "classifier": corrected})
