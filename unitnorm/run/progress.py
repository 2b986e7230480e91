"""How a running experiment looks: a progress bar on a terminal, plain lines elsewhere.

Only the terminal is touched here, through rich. To show another figure, add a column to both.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from unitnorm.run.loop import Status, Trainable

PLAIN_EVERY_S = 5.0  # at most one plain line per program in so many seconds, beside the last


@contextlib.contextmanager
def shown(console: Console) -> Iterator[Bars | Lines]:
    """What shows each epoch's report, as a bar or as lines."""
    if console.is_terminal:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("epoch {task.completed}/{task.total}"),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            console=console,
        ) as progress:
            yield Bars(progress)
    else:
        yield Lines(console)


class Bars:
    """One bar per program."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, program: Trainable, status: Status, seconds: float) -> None:
        if program.title not in self._tasks:
            self._tasks[program.title] = self._progress.add_task(program.title, text="")
        self._progress.update(
            self._tasks[program.title],
            completed=status.epoch,
            # a program whose runs have all stopped early is done, not stuck
            total=program.epochs if status.active else status.epoch,
            text=status.place or describe(program, status, seconds),
        )


class Lines:
    """Plain lines: the first epoch, then one every few seconds, and the last; none within one."""

    def __init__(self, console: Console):
        self._console = console
        self._shown: dict[str, float] = {}

    def __call__(self, program: Trainable, status: Status, seconds: float) -> None:
        now, title = time.monotonic(), program.title
        soon = now - self._shown.get(title, -PLAIN_EVERY_S) < PLAIN_EVERY_S
        if status.place or (status.active and soon):
            return
        self._shown[title] = now
        self._console.print(
            f"{title}: epoch {status.epoch}/{program.epochs}, {describe(program, status, seconds)}",
            soft_wrap=True,
            highlight=False,
        )


def describe(program: Trainable, status: Status, seconds: float) -> str:
    """What the program says of itself, its speed and the time left at most.

    Args:
      seconds: of an epoch.
    """
    left = (program.epochs - status.epoch) * seconds if status.active else 0
    speed = program.samples / seconds
    shown = f"{speed / 1e3:,.0f}k" if speed >= 1e4 else f"{speed:,.1f}"
    return f"{status.text}, {shown} samples/s, ≤ {clock(left)} left"


def clock(seconds: float) -> datetime.timedelta:
    """Hours, minutes and seconds, as they are shown."""
    return datetime.timedelta(seconds=round(seconds))
