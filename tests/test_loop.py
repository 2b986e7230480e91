"""The one loop: restore, advance, report, save, interrupt, with a program that only counts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from unitnorm.errors import Interrupted
from unitnorm.run import checkpoints
from unitnorm.run.checkpoints import Checkpoints, Part
from unitnorm.run.loop import Session, Status, Trainable, train
from unitnorm.run.progress import describe

PART = Part("count", "0" * 64, ("counts/0",))


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


@dataclass
class Memory(Checkpoints):
    """Keeps every state; it is due after these units."""

    due_after: tuple[int, ...] = ()
    saved: list[tuple[int, bool]] = field(default_factory=list)
    asked: int = 0

    def restore(self, part: Part, like: Any) -> Any | None:
        assert part == PART
        assert like["units"].shape == ()
        return {"units": np.asarray(self.saved[-1][0])} if self.saved else None

    def due(self) -> bool:
        self.asked += 1
        return self.asked in self.due_after

    def save(self, part: Part, state: Any, *, wait: bool) -> None:
        assert part == PART
        self.saved.append((int(state["units"]), wait))


class Outside:
    """A session that notes what it is told, and asks to stop at its n-th look."""

    def __init__(self, kept: Any = None, stop_at: int | None = None):
        self.told: list[Any] = []
        self.looks = 0
        self.stop_at = stop_at
        self.kept = Checkpoints() if kept is None else kept
        self.session = Session(
            self.report, self.told.append, checkpoints=self.kept, interrupted=self.interrupted
        )

    def report(self, program: Trainable, status: Status, seconds: float) -> None:
        assert isinstance(program, Counter)
        assert (program.title, program.epochs) == ("count", 3)
        assert seconds > 0
        self.told.append(status)

    def interrupted(self) -> bool:
        self.looks += 1
        return self.looks == self.stop_at

    def train(self) -> int:
        def after_epoch(state: Any, status: Status) -> None:
            self.told.append(("epoch", status.epoch, int(state["units"])))

        return int(train(PART, Counter(), self.session, after_epoch)["units"])

    def lines(self) -> list[str]:
        return [told for told in self.told if isinstance(told, str)]

    def reports(self) -> list[Status]:
        """What was shown of whole epochs."""
        return [told for told in self.told if isinstance(told, Status) and not told.place]


def test_every_epoch_is_reported_once_after_its_records():
    outside = Outside()
    assert outside.train() == 6
    assert outside.told == [
        Status(0, True, "0 counted", "step 1"), ("epoch", 1, 2), Status(1, True, "1 counted"),
        Status(1, True, "1 counted", "step 1"), ("epoch", 2, 4), Status(2, True, "2 counted"),
        Status(2, True, "2 counted", "step 1"), ("epoch", 3, 6), Status(3, False, "3 counted"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("epoch", "says"),
    [(1, "2.5 samples/s, ≤ 0:00:08 left"), (3, "2.5 samples/s, ≤ 0:00:00 left")],
)
def test_an_epoch_is_shown_with_its_speed_and_the_time_left(epoch, says):
    status = Counter().status({"units": 2 * epoch})
    assert describe(Counter(), status, seconds=4.0) == f"{epoch} counted, {says}"


def test_a_state_is_saved_when_it_is_due_and_never_at_the_end():
    memory = Memory(due_after=(2, 3, 6))
    assert Outside(memory).train() == 6
    assert memory.saved == [(2, False), (3, False)]  # after 6 its records are to be written


@pytest.mark.parametrize("units", range(1, 6))
def test_an_interruption_saves_and_the_next_start_goes_on(units):
    memory = Memory()
    first = Outside(memory, stop_at=units + 1)  # it is looked at before the first unit, too
    with pytest.raises(Interrupted):
        first.train()
    assert memory.saved == [(units, True)]  # on the disk
    assert len(first.reports()) == units // 2  # what has ended is reported
    second = Outside(memory)
    assert second.train() == 6
    where = f"epoch {units // 2}" + (", step 1" if units % 2 else "")
    assert second.lines()[0] == f"count: going on after {where}"
    assert [report.epoch for report in second.reports()] == list(range(units // 2 + 1, 4))


def test_an_interruption_before_the_first_unit_computes_nothing():
    memory = Memory()
    outside = Outside(memory, stop_at=1)
    with pytest.raises(Interrupted):
        outside.train()
    assert (outside.told, memory.saved) == ([], [])


def test_an_interruption_after_the_last_unit_leaves_the_results_to_be_recorded():
    memory = Memory()
    outside = Outside(memory, stop_at=7)
    assert outside.train() == 6
    assert memory.saved == [(6, True)]  # should writing them fail
    again = Outside(memory)
    assert again.train() == 6
    assert again.reports() == []


def test_what_the_library_keeps_is_what_the_loop_goes_on_from(tmp_path):
    """With real checkpoints; those of other runs are left alone."""
    folder = tmp_path / "kept"

    def outside(stop_at: int | None = None) -> Outside:
        told: list[str] = []
        result = Outside(checkpoints.Folder(folder, every_s=0.0, say=told.append), stop_at)
        return result

    with pytest.raises(Interrupted):
        outside(4).train()
    (place,) = folder.iterdir()
    assert json.loads((place / "about.json").read_text())["covers"] == ["counts/0"]
    second = outside()
    assert second.train() == 6
    assert second.lines()[0] == "count: going on after epoch 1, step 1"
    second.kept.drop(["other/0"])
    assert place.is_dir()
    second.kept.drop(["counts/0"])
    assert not folder.exists()
