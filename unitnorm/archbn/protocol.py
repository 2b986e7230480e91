"""The paper's protocol as pure functions: bold driver, stopping rule, choice of the base rate.

Each works on scalars or arrays of one shape and is traced into the training program, with its
numbers from sections of the config.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from unitnorm.archbn.config import WARM, BoldDriver, Sizes, Stopping

if TYPE_CHECKING:
    from unitnorm.archbn.training import Run

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


def next_rate(run: Run, watched: Array, epochs: int, driver: BoldDriver) -> Array:
    """The learning rate after the epoch of a `run`, of `epochs` at most.

    The bold driver (the paper's [19]) multiplies it by `up` where `watched`, usually the epoch's
    mean training loss, fell below that of the epoch before, `run.watched`, and by `down` where it
    rose; not after the first epoch, where that is infinite. A run that follows another gets its
    rate in `run_many.Program.advance`.
    """
    fell, rose, epoch = watched < run.watched, watched > run.watched, run.epoch + 1
    factor = jnp.where(fell, driver.up, jnp.where(rose, driver.down, 1.0))
    driven = jnp.where(jnp.isinf(run.watched), run.rate, run.rate * factor)
    cosine = run.base * 0.5 * (1 + jnp.cos(jnp.pi * epoch / epochs))
    warm = rate_within(run.schedule, run.base, run.base, epoch / epochs)
    conditions = [run.schedule <= BOLD_DRIVER_BACK, run.schedule == COSINE]
    return jnp.select(conditions, [driven, cosine], default=warm)


def rate_within(schedule: Array, base: Array, rate: Array, done: Array) -> Array:
    """The rate of a mini-batch, when the part `done` of all are over: `rate`, but of WARM_UP."""
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * (done - WARM) / (1 - WARM)))
    return jnp.where(schedule == WARM_UP, base * jnp.minimum(done / WARM, cosine), rate)


def stop_reason(
    epoch: Array, loss: Array, train_error: Array, val_errors: Array, sizes: Sizes, rule: Stopping
) -> Array:
    """Why a run ends after this epoch, as an index into `STOP_REASONS` (section 4).

    A non-finite loss ends it at once; the other rules apply from `sizes.min_epochs` on, in the
    order in which the paper names them; `sizes.max_epochs` comes last.

    Args:
      epoch: epochs finished, 1 after the first.
      loss, train_error: this epoch's; the error as a fraction.
      val_errors: shape (max_epochs,), entry e - 1 after epoch e; those from `epoch` on are not
        read.
    """

    def value(back: int) -> Array:
        return val_errors[jnp.maximum(epoch - 1 - back, 0)]

    rules = {
        NON_FINITE: ~jnp.isfinite(loss),
        RUNNING: epoch < sizes.min_epochs,
        TRAIN_ERROR: train_error < rule.train_error,
        VAL_RISE: (epoch > rule.lookback) & (value(0) > value(rule.lookback)),
        VAL_FLAT: (epoch > 1) & (jnp.abs(value(0) - value(1)) < rule.flat),
        MAX_EPOCHS: epoch >= sizes.max_epochs,
    }
    reasons = [jnp.int32(reason) for reason in rules]
    return jnp.select(list(rules.values()), reasons, default=RUNNING)


def has_diverged(
    loss: ArrayLike, first_loss: ArrayLike, val_error: ArrayLike, *, diverged_error: float
) -> Array:
    """True where a run's validation error diverged (section 4: such runs are ignored).

    Either the training loss is not finite, or the validation error is at or above `diverged_error`
    and the training loss above `first_loss`, that of the first epoch, which a rate that is only
    slow is not.
    """
    loss, val_error = jnp.asarray(loss), jnp.asarray(val_error)
    worse = (val_error >= diverged_error) & (loss > first_loss)
    return ~jnp.isfinite(loss) | jnp.isnan(val_error) | worse


def choose_rate(rates: ArrayLike, val_errors: ArrayLike, diverged: ArrayLike) -> Array:
    """Index of the base learning rate: the lowest validation error among the rates that held.

    Ties go to the larger rate, which needs fewer epochs.

    Args:
      rates, val_errors, diverged: shape (..., P), the rates in any order.

    Returns:
      int32 of shape (...,); -1 where every rate diverged.
    """
    errors = jnp.where(diverged, jnp.inf, val_errors)
    best = errors == errors.min(-1, keepdims=True)
    index = jnp.argmax(jnp.where(best, rates, -jnp.inf), axis=-1)
    return jnp.where(jnp.all(diverged, axis=-1), -1, index).astype(jnp.int32)
