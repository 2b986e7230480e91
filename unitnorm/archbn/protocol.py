"""The paper's protocol as pure functions: bold driver, stopping rule, choice of the base rate.

Each works on scalars or arrays of one shape and is traced into the training program. The numbers
they need are arguments; their values live in `unitnorm.archbn.config`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

# A run's stop reason is an index into this tuple; 0 means that it is still running. The order is
# part of the checkpoint format: append only.
STOP_REASONS = (
    "running",
    "train-error",  # training error below the threshold
    "val-rise",  # validation error above that of `lookback` epochs before
    "val-flat",  # two successive validation errors closer than `flat`
    "max-epochs",
    "non-finite",  # a loss that is not a number, or infinite
    "no-rate",  # every rate of the sweep diverged: nothing to train with
)
RUNNING, TRAIN_ERROR, VAL_RISE, VAL_FLAT, MAX_EPOCHS, NON_FINITE, NO_RATE = range(7)


# How the learning rate goes on after an epoch, by index.
SCHEDULES = (
    "bold-driver",  # up after a decrease, down after an increase (the paper's)
    "bold-driver-back",  # the same, and the epoch of an increase is taken back (Battiti's)
    "constant",
    "cosine",  # from the base rate to zero after the last epoch, along half a cosine
    "follow",  # that of the seed's first run, so that both have one rate for all but the filters
    "warm-up",  # by mini-batch: up from zero in a tenth of the training, then along half a cosine
)
BOLD_DRIVER, BOLD_DRIVER_BACK, CONSTANT, COSINE, FOLLOW, WARM_UP = range(6)
WARM = 0.1  # of a training


def next_rate(
    schedule: Array,
    base: Array,
    rate: Array,
    watched: Array,
    previous: Array,
    epoch: Array,
    epochs: int,
    *,
    up: float,
    down: float,
) -> Array:
    """Next epoch's learning rate of each run, whose leader is another's business.

    Args:
      schedule: index into `SCHEDULES`.
      base, rate: the first epoch's rate, and that of the epoch that has just ended.
      watched, previous, up, down: see `bold_driver`.
      epoch: epochs finished; of `epochs` at most.
    """
    driven = bold_driver(rate, watched, previous, up=up, down=down)
    cosine = base * 0.5 * (1 + jnp.cos(jnp.pi * epoch / epochs))
    warm = rate_within(schedule, base, base, epoch / epochs)
    return jnp.select(
        [schedule <= BOLD_DRIVER_BACK, schedule == COSINE], [driven, cosine], default=warm
    )


def rate_within(schedule: Array, base: Array, rate: Array, done: Array) -> Array:
    """The rate of a mini-batch, when the part `done` of all are over: `rate`, but of WARM_UP."""
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * (done - WARM) / (1 - WARM)))
    return jnp.where(schedule == WARM_UP, base * jnp.minimum(done / WARM, cosine), rate)


def bold_driver(rate: Array, watched: Array, previous: Array, *, up: float, down: float) -> Array:
    """Next epoch's learning rate (bold driver; the paper's [19]).

    Args:
      rate: this epoch's rate.
      watched: the value after this epoch, usually the mean training loss.
      previous: the same after the epoch before; infinity after the first epoch.
      up, down: factors after a decrease and after an increase.

    Returns:
      `rate * up` if the value fell, `rate * down` if it rose, `rate` if it stayed or is the first.
    """
    factor = jnp.where(watched < previous, up, jnp.where(watched > previous, down, 1.0))
    return jnp.where(jnp.isinf(previous), rate, rate * factor)


def stop_reason(
    epoch: Array,
    loss: Array,
    train_error: Array,
    val_errors: Array,
    *,
    min_epochs: int,
    max_epochs: int,
    train_threshold: float,
    lookback: int,
    flat: float,
) -> Array:
    """Why a run ends after this epoch, as an index into `STOP_REASONS` (section 4).

    Args:
      epoch: epochs finished, 1 after the first.
      loss: this epoch's training loss.
      train_error: this epoch's training error, a fraction.
      val_errors: shape (max_epochs,): validation errors, entry e - 1 after epoch e; entries from
        `epoch` on are not read.
      min_epochs, max_epochs, train_threshold, lookback, flat: the rule's numbers.

    Returns:
      int32. A non-finite loss ends a run at once; the other rules apply from `min_epochs` on, in
      the order in which the paper names them; `max_epochs` comes last.
    """

    def value(back: int) -> Array:
        return val_errors[jnp.maximum(epoch - 1 - back, 0)]

    rise = (epoch > lookback) & (value(0) > value(lookback))
    still = (epoch > 1) & (jnp.abs(value(0) - value(1)) < flat)
    reason = jnp.where(epoch >= max_epochs, MAX_EPOCHS, RUNNING)
    reason = jnp.where(still, VAL_FLAT, reason)
    reason = jnp.where(rise, VAL_RISE, reason)
    reason = jnp.where(train_error < train_threshold, TRAIN_ERROR, reason)
    reason = jnp.where(epoch < min_epochs, RUNNING, reason)
    return jnp.where(jnp.isfinite(loss), reason, NON_FINITE).astype(jnp.int32)


def has_diverged(
    loss: ArrayLike, first_loss: ArrayLike, val_error: ArrayLike, *, diverged_error: float
) -> Array:
    """True where a run's validation error diverged (section 4: such runs are ignored).

    Either the training loss is not finite, or the validation error is at or above `diverged_error`
    and the training loss above that of the first epoch, which a rate that is only slow is not.

    Args:
      loss, first_loss: training loss of the last and of the first epoch.
      val_error: validation error after the last epoch.
    """
    loss, val_error = jnp.asarray(loss), jnp.asarray(val_error)
    worse = (val_error >= diverged_error) & (loss > first_loss)
    return ~jnp.isfinite(loss) | jnp.isnan(val_error) | worse


def choose_rate(rates: ArrayLike, val_errors: ArrayLike, diverged: ArrayLike) -> Array:
    """Index of the base learning rate: the lowest validation error among the rates that held.

    Ties go to the larger rate, which needs fewer epochs. Vectorised over leading axes.

    Args:
      rates: shape (..., P), in any order.
      val_errors: shape (..., P).
      diverged: shape (..., P), bool.

    Returns:
      int32 of shape (...,); -1 where every rate diverged.
    """
    errors = jnp.where(diverged, jnp.inf, val_errors)
    best = errors == errors.min(-1, keepdims=True)
    index = jnp.argmax(jnp.where(best, rates, -jnp.inf), axis=-1)
    return jnp.where(jnp.all(diverged, axis=-1), -1, index).astype(jnp.int32)
