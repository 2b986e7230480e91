"""The loop that every program is trained by, and what it asks of the outside world.

An experiment brings a `Trainable`; `train` restores its state, advances it until it has ended,
reports every epoch, keeps checkpoints and stops when it is asked to. Nothing here knows what is
trained, nor where the reports and states go: that is in the `Session`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from unitnorm.errors import Interrupted
from unitnorm.run.checkpoints import Checkpoints, Part


class Status(NamedTuple):
    """How far a program is."""

    epoch: int  # epochs finished, of the run that is furthest
    active: bool  # something goes on
    text: str  # what to show of it
    place: str = ""  # within an epoch, such as "step 3"; "" at its end
    val_error: float = math.nan  # to draw its course; NaN where there is none


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
class Session:
    """The outside world, as far as an experiment needs it."""

    # shows how far a program is, after a unit and so many seconds of its epoch
    report: Callable[[Trainable, Status, float], None] = lambda program, status, seconds: None
    say: Callable[[str], None] = lambda line: None  # shows a line
    # stores what is known of a group before its end, a `planner.Found`
    grow: Callable[[Any], None] = lambda found: None
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    interrupted: Callable[[], bool] = lambda: False  # somebody has asked to stop


def train(
    part: Part,
    program: Trainable,
    session: Session,
    after_epoch: Callable[[Any, Status], None] = lambda state, status: None,
) -> Any:
    """Advance a program until it has ended, from its checkpoint `part` if there is one.

    On request it is `Interrupted` after a unit, when the state is saved. `after_epoch` is given
    the state and status after every epoch, for records that grow.
    """
    state = program.start()
    saved = session.checkpoints.restore(part, program.take(state))
    if saved is not None:
        state = program.put(saved)
    status = program.status(state)
    if saved is not None:
        where = f"epoch {status.epoch}" + (f", {status.place}" if status.place else "")
        session.say(f"{part.title}: going on after {where}")
    if status.active and session.interrupted():
        raise Interrupted
    started = time.perf_counter()
    while status.active:
        state = program.advance(state)
        before, status = status, program.status(state)
        ended, stopping = status.epoch > before.epoch, session.interrupted()
        if ended:
            after_epoch(state, status)
        if stopping or (session.checkpoints.due() and status.active):
            session.checkpoints.save(part, program.take(state), wait=stopping)
        session.report(program, status, time.perf_counter() - started)
        if ended:
            started = time.perf_counter()
        if stopping and status.active:
            raise Interrupted
    return state
