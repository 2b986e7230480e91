"""How a running experiment looks: a progress bar on a terminal, plain lines elsewhere.

Only the terminal is touched here, through rich. To show another figure, add a column to both.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from unitnorm.run.loop import EpochReport

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

    def __call__(self, report: EpochReport) -> None:
        if report.title not in self._tasks:
            self._tasks[report.title] = self._progress.add_task(
                report.title, total=report.epochs, text=""
            )
        self._progress.update(
            self._tasks[report.title],
            completed=report.epoch,
            # a program whose runs have all stopped early is done, not stuck
            total=report.epochs if report.active else report.epoch,
            text=describe(report),
        )

    def advanced(self, place: str) -> None:
        """Show the place within an epoch."""
        title, _, where = place.partition(": ")
        if title in self._tasks:
            self._progress.update(self._tasks[title], text=where)


class Lines:
    """Plain lines: the first epoch, then one every few seconds, and the last."""

    def __init__(self, console: Console):
        self._console = console
        self._shown: dict[str, float] = {}

    def __call__(self, report: EpochReport) -> None:
        now = time.monotonic()
        if report.active and now - self._shown.get(report.title, -PLAIN_EVERY_S) < PLAIN_EVERY_S:
            return
        self._shown[report.title] = now
        self._console.print(
            f"{report.title}: epoch {report.epoch}/{report.epochs}, {describe(report)}",
            soft_wrap=True,
            highlight=False,
        )

    def advanced(self, place: str) -> None:
        """Mini-batches are no lines."""


def describe(report: EpochReport) -> str:
    """What the program says of itself, its speed and the time left at most."""
    left = (report.epochs - report.epoch) * report.seconds if report.active else 0
    speed = report.samples_per_second
    shown = f"{speed / 1e3:,.0f}k" if speed >= 1e4 else f"{speed:,.1f}"
    return f"{report.text}, {shown} samples/s, ≤ {clock(left)} left"


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
