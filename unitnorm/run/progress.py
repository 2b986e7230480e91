"""How a running experiment looks: a progress bar on a terminal, plain lines elsewhere.

Only the terminal is touched here, through rich. To show another figure, add a column to both.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from unitnorm.table2.experiment import EpochReport

PLAIN_EVERY_S = 5.0  # at most one plain line per program in so many seconds, beside the last


@contextlib.contextmanager
def shown(console: Console) -> Iterator[Callable[[EpochReport], None]]:
    """A function that shows each epoch's report, as a bar or as lines."""
    if console.is_terminal:
        with _bar(console) as progress:
            yield Bars(progress)
    else:
        yield Lines(console)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("epoch {task.completed}/{task.total}"),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        console=console,
    )


class Bars:
    """One bar per program."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, report: EpochReport) -> None:
        if report.title not in self._tasks:
            self._tasks[report.title] = self._progress.add_task(
                report.title, total=report.max_epochs, text=""
            )
        self._progress.update(
            self._tasks[report.title],
            completed=report.epoch,
            # a program whose runs have all stopped early is done, not stuck
            total=report.max_epochs if report.active else report.epoch,
            text=describe(report),
        )


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
            f"{report.title}: epoch {report.epoch}/{report.max_epochs}, {describe(report)}",
            soft_wrap=True,
            highlight=False,
        )


def describe(report: EpochReport) -> str:
    """Runs still active, mean validation error, speed and time left at most."""
    left = (report.max_epochs - report.epoch) * report.seconds_per_epoch if report.active else 0
    return (
        f"{report.active}/{report.runs} runs active, val error {report.val_error:.2%}, "
        f"{report.samples_per_second / 1e3:,.0f}k samples/s, ≤ {clock(left)} left"
    )


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
