"""The loop that every experiment is trained by, and what it asks of the outside world.

An experiment brings a `Trainable`; `train` restores its state, advances it until it has ended,
reports every epoch, keeps checkpoints and stops when it is asked to. Nothing here knows what is
trained, nor where the reports and states go: that is in the `Session`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from unitnorm.run import processes
from unitnorm.run.checkpoints import Part


class Interrupted(Exception):
    """The user or the system asked to stop; everything up to here is saved."""


class Status(NamedTuple):
    """How far a program is."""

    epoch: int  # epochs finished, of the run that is furthest
    active: bool  # something goes on
    text: str  # what to show of it
    place: str = ""  # within an epoch, such as "step 3"; "" at its end


class Trainable(Protocol):
    """What the loop trains. A state is a tree of arrays on the devices."""

    title: str  # such as "train depth 4"
    epochs: int  # at most
    samples: int  # in an epoch, over all runs

    def start(self) -> Any:
        """The state before the first step."""

    def put(self, saved: Any) -> Any:
        """A state from the host, as `take` gave it, on the devices."""

    def take(self, state: Any) -> Any:
        """The state as NumPy arrays, which a later step leaves alone."""

    def advance(self, state: Any) -> Any:
        """The state one unit later: an epoch, or a mini-batch where those are long."""

    def status(self, state: Any) -> Status:
        """How far it is."""


@dataclass(frozen=True)
class EpochReport:
    """What is known of a program after one of its epochs."""

    title: str
    epoch: int
    epochs: int  # at most
    active: bool
    text: str
    samples_per_second: float
    seconds: float  # of this epoch


class Checkpoints(Protocol):
    """Keeps the state of a program from unit to unit; see `unitnorm.run.checkpoints`."""

    def restore(self, part: Part, like: Any) -> Any | None:
        """The saved state, a tree of NumPy arrays like `like`; None if none was saved."""

    def due(self) -> bool:
        """It is time to save."""

    def save(self, part: Part, state: Any, *, wait: bool) -> None:
        """Keep the state; `wait`: it is on the disk before this returns."""

    def drop(self, covers: Iterable[str]) -> None:
        """Remove what was saved of runs with these names (`records.Records.recorded`)."""


@dataclass(frozen=True)
class Session:
    """The outside world, as far as an experiment needs it.

    Attributes:
      report: shows an epoch.
      say: shows a line.
      checkpoints: keeps states.
      interrupted: whether somebody has asked to stop.
      advanced: is told the place within an epoch, where an epoch has several units.
    """

    report: Callable[[EpochReport], None]
    say: Callable[[str], None]
    checkpoints: Checkpoints
    interrupted: Callable[[], bool]
    advanced: Callable[[str], None] = lambda place: None


def train(
    part: Part,
    program: Trainable,
    session: Session,
    after_epoch: Callable[[Any, Status], None] = lambda state, status: None,
) -> Any:
    """Advance a program until it has ended, from its checkpoint if there is one.

    Args:
      part: the name and identity of its checkpoints.
      after_epoch: is given the state and status after every epoch, for records that grow.

    Raises:
      Interrupted: on request, after a unit; the state is saved.
    """
    state = program.start()
    like = program.take(state)
    saved = processes.from_first(session.checkpoints.restore(part, like), like)
    if saved is not None:
        state = program.put(saved)
    status = program.status(state)
    if saved is not None:
        where = f"epoch {status.epoch}" + (f", {status.place}" if status.place else "")
        session.say(f"{part.title}: going on after {where}")
    started, epoch_started_at = time.perf_counter(), status.epoch
    (stopping,) = processes.any_process(session.interrupted())
    if stopping and status.active:
        raise Interrupted
    while status.active:
        state = program.advance(state)
        before, status = status, program.status(state)
        ended = status.epoch > before.epoch
        if ended:
            after_epoch(state, status)
        elif status.place:
            session.advanced(f"{part.title}: {status.place}")
        stopping, due = processes.any_process(session.interrupted(), session.checkpoints.due())
        # another process can take the last epoch along, too, until it is recorded
        if stopping or (due and (status.active or processes.several())):
            session.checkpoints.save(part, program.take(state), wait=stopping)
        # afterwards, so that what was reported is kept whatever happens to the other processes
        if ended:
            seconds = (time.perf_counter() - started) / max(status.epoch - epoch_started_at, 1)
            session.report(
                EpochReport(
                    part.title, status.epoch, program.epochs, status.active, status.text,
                    program.samples / seconds, seconds,
                )
            )  # fmt: skip
            started, epoch_started_at = time.perf_counter(), status.epoch
        if stopping and status.active:
            raise Interrupted
    return state
