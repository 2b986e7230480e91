"""The one loop: restore, advance, report, save, interrupt, with a program that only counts."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from unitnorm.errors import Interrupted
from unitnorm.run.checkpoints import Checkpoints, Part
from unitnorm.run.loop import Session, Status, train
from unitnorm.run.progress import describe

PART = Part("count", "0" * 64)


class Counter:
    """Three epochs of two units; a state is how many units are done."""

    title, epochs, samples = "count", 3, 10

    def start(self) -> Any:
        return {"units": jnp.asarray(0)}

    def put(self, saved: Any) -> Any:
        assert isinstance(saved["units"], np.ndarray)
        return {"units": jnp.asarray(saved["units"])}

    def take(self, state: Any) -> Any:
        return {"units": np.array(state["units"])}

    def advance(self, state: Any) -> Any:
        return {"units": state["units"] + 1}

    def status(self, state: Any) -> Status:
        epoch, unit = divmod(int(state["units"]), 2)
        return Status(epoch, epoch < self.epochs, f"{epoch} counted", "step 1" if unit else "")


class Memory(Checkpoints):
    """Keeps every state; it is due after these units."""

    def __init__(self, *due_after: int):
        self.due_after, self.saved, self.asked = due_after, [], 0

    def restore(self, part: Part, like: Any) -> Any | None:
        assert (part, like["units"].shape) == (PART, ())
        return {"units": np.asarray(self.saved[-1][0])} if self.saved else None

    def due(self) -> bool:
        self.asked += 1
        return self.asked in self.due_after

    def save(self, part: Part, state: Any, *, wait: bool) -> None:
        assert part == PART
        self.saved.append((int(state["units"]), wait))


def counted(memory: Checkpoints, stop_at: int = 0) -> list[Any]:
    """What a training told, its end first: 6, or None where it was interrupted, at a look at
    whether somebody has asked to stop; the first is before the first unit."""
    told: list[Any] = []
    looks = iter(range(1, 99))

    def report(program: Counter, status: Status, seconds: float) -> None:
        assert seconds > 0
        told.append(status)

    def after_epoch(state: Any, status: Status) -> None:
        told.append(("epoch", status.epoch, int(state["units"])))

    session = Session(
        report, told.append, checkpoints=memory, interrupted=lambda: next(looks) == stop_at
    )
    try:
        return [int(train(PART, Counter(), session, after_epoch)["units"]), *told]
    except Interrupted:
        return [None, *told]


def test_every_epoch_is_reported_once_after_its_records():
    assert counted(Checkpoints()) == [
        6,
        Status(0, True, "0 counted", "step 1"), ("epoch", 1, 2), Status(1, True, "1 counted"),
        Status(1, True, "1 counted", "step 1"), ("epoch", 2, 4), Status(2, True, "2 counted"),
        Status(2, True, "2 counted", "step 1"), ("epoch", 3, 6), Status(3, False, "3 counted"),
    ]  # fmt: skip


@pytest.mark.parametrize(("epoch", "left"), [(1, "0:00:08"), (3, "0:00:00")])
def test_an_epoch_is_shown_with_its_speed_and_the_time_left(epoch, left):
    shown = describe(Counter(), Counter().status({"units": 2 * epoch}), seconds=4.0)
    assert shown == f"{epoch} counted, 2.5 samples/s, ≤ {left} left"


def test_a_state_is_saved_when_it_is_due_and_never_at_the_end():
    memory = Memory(2, 3, 6)
    assert counted(memory)[0] == 6
    assert memory.saved == [(2, False), (3, False)]  # after 6 its records are to be written


@pytest.mark.parametrize("units", range(7))
def test_an_interruption_saves_and_the_next_start_goes_on(units):
    memory, whole = Memory(), counted(Checkpoints())[1:]
    end, *told = counted(memory, stop_at=units + 1)
    assert end == (6 if units == 6 else None)  # after the last unit there are results to record
    assert memory.saved == ([(units, True)] if units else [])  # on the disk
    cut = units + units // 2  # a unit is told once, and an epoch once more
    assert told == whole[:cut]
    where = f"epoch {units // 2}" + (", step 1" if units % 2 else "")
    going = [f"count: going on after {where}"] if units else []
    assert counted(memory) == [6, *going, *whole[cut:]]
