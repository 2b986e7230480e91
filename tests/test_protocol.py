"""The protocol's rules by table: annealing, stop reasons, the choice of the rate."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from unitnorm.archbn import protocol
from unitnorm.archbn.config import BoldDriver, Stopping, Train

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("schedule", "previous", "expected"),
    [
        ("bold-driver", 1.0, 0.15),  # down, from this epoch's 0.3
        ("bold-driver-back", 1.0, 0.15),
        ("bold-driver", 3.0, 0.315),  # up
        ("bold-driver", 2.0, 0.3),  # it stayed
        ("bold-driver", INF, 0.3),  # the first epoch has nothing to compare with
        ("constant", 1.0, 1.0),
        ("cosine", 1.0, 0.75),  # of the base rate, a third of the way: (1 + cos 60°) / 2
    ],
)
def test_the_next_rate_goes_by_the_runs_schedule(schedule, previous, expected):
    rate, watched, before = map(jnp.float32, (0.3, 2.0, previous))
    run = SimpleNamespace(
        schedule=jnp.int32(protocol.SCHEDULES.index(schedule)), base=jnp.float32(1.0), rate=rate,
        watched=before, epoch=jnp.int32(3),
    )  # fmt: skip
    found = protocol.next_rate(run, watched, 12, BoldDriver())
    assert found == pytest.approx(expected, rel=1e-6)


FALLING = [0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.09, 0.08, 0.07]


@pytest.mark.parametrize(
    ("errors", "options", "expected"),
    [
        (FALLING[:9], {}, "running"),
        (FALLING[:9], {"train_error": 0.0}, "train-error"),
        (FALLING[:9], {"train_error": 1e-5}, "running"),  # "less than", not "at most"
        (FALLING[:7], {"train_error": 0.0}, "running"),  # before the minimum of epochs
        (FALLING[:8], {"train_error": 0.0}, "train-error"),
        ([*FALLING[:8], 0.36], {}, "val-rise"),  # above the 0.35 of 5 epochs before
        ([*FALLING[:8], 0.35], {}, "running"),  # equal is no increase
        ([*FALLING[:8], 0.34], {}, "running"),  # above the last, but below 5 epochs before
        ([*FALLING[:8], 0.150001], {}, "val-flat"),
        ([*FALLING[:8], 0.15002], {}, "running"),
        ([*FALLING[:8], 0.14998], {}, "running"),
        (FALLING, {}, "max-epochs"),
        ([0.2] * 12, {}, "val-flat"),  # a reason of the paper's comes before the limit
        ([*FALLING[:8], 0.36], {"train_error": 0.0}, "train-error"),  # in the paper's order
        (FALLING[:3], {"loss": NAN}, "non-finite"),  # at once
        (FALLING[:9], {"loss": INF, "train_error": 0.0}, "non-finite"),
        ([0.3, 0.4], {"min_epochs": 1}, "running"),  # nothing 5 epochs before yet
        ([0.3], {"min_epochs": 1}, "running"),  # nor an epoch before
        ([0.3, 0.4, 0.5], {"min_epochs": 1, "lookback": 2}, "val-rise"),
    ],
)
def test_stop_reasons(errors, options, expected):
    given = {"loss": 0.1, "train_error": 0.5, "min_epochs": 8, "lookback": 5, **options}
    now = jnp.int32(len(errors)), jnp.float32(given["loss"]), given["train_error"]
    padded = jnp.asarray([*errors, *[NAN] * (20 - len(errors))])
    sizes = Train(min_epochs=given["min_epochs"], max_epochs=12)
    code = protocol.stop_reason(*now, padded, sizes, Stopping(lookback=given["lookback"]))
    assert protocol.STOP_REASONS[int(code)] == expected


@pytest.mark.parametrize(
    ("errors", "diverged", "expected"),
    [
        ([0.3, 0.1, 0.2, 0.9], [0, 0, 0, 0], 1),
        ([0.1, 0.1, 0.2, 0.9], [0, 0, 0, 0], 0),  # a tie goes to the larger rate
        ([0.5, 0.1, 0.1, 0.9], [0, 0, 0, 0], 1),
        ([0.0, 0.1, 0.2, 0.9], [1, 0, 0, 0], 1),  # a diverged rate cannot win
        ([NAN, 0.9, 0.9, 0.9], [1, 0, 0, 0], 1),
        ([NAN, NAN, NAN, NAN], [1, 1, 1, 1], -1),
    ],
)
def test_choice_of_the_rate_in_any_order(errors, diverged, expected):
    table = jnp.asarray([[1e-2, 1e-3, 1e-4, 1e-5], errors, diverged])
    turned = 3 - expected if expected >= 0 else -1
    for (rates, val_errors, bad), index in ((table, expected), (table[:, ::-1], turned)):
        assert int(protocol.choose_rate(rates, val_errors, bad > 0)) == index


@pytest.mark.parametrize(
    ("loss", "first", "error", "expected"),
    [
        (0.1, 1.0, 0.02, False),
        (3.0, 2.5, 0.9, True),
        (2.2, 2.5, 0.9, False),  # slow is not diverged
        (3.0, 2.5, 0.7, False),
        (NAN, 2.5, 0.1, True),
        (INF, 2.5, 0.1, True),
        (0.1, 1.0, NAN, True),
    ],
)
def test_what_counts_as_diverged(loss, first, error, expected):
    assert bool(protocol.has_diverged(loss, first, error, diverged_error=0.8)) is expected
