"""How a running experiment looks: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import datetime
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from unitnorm.run.loop import Status, Trainable

PLAIN_EVERY_S = 5.0  # at most one plain line per program in so many seconds, beside the last
SPARKS, SPARKS_SHOWN = "▁▂▃▄▅▆▇█", 24

Report = Callable[[Trainable, Status, float], None]
Show = Callable[[Trainable, Status, str], None]


@contextlib.contextmanager
def shown(console: Console) -> Iterator[Report]:
    """What shows each epoch's report, as a bar or as lines."""
    seconds: dict[str, list[float]] = defaultdict(list)
    errors: dict[str, list[float]] = defaultdict(list)
    with bars(console) if console.is_terminal else contextlib.nullcontext(lines(console)) as show:

        def report(program: Trainable, status: Status, elapsed: float) -> None:
            past, course = seconds[program.title], errors[program.title]
            if not status.place:
                past.append(elapsed)
                course.append(status.val_error)
            # the first epoch compiles; it says nothing of the others
            pace = statistics.fmean(past[1:]) if past[1:] else math.nan
            drawn = () if console.options.ascii_only else course
            show(program, status, status.place or describe(program, status, pace, drawn))

        yield report


@contextlib.contextmanager
def bars(console: Console) -> Iterator[Show]:
    """One bar per program."""
    tasks: dict[str, TaskID] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("epoch {task.completed}/{task.total}"),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:

        def show(program: Trainable, status: Status, text: str) -> None:
            if program.title not in tasks:
                tasks[program.title] = progress.add_task(program.title, text="")
            # a program whose runs have all stopped early is done, not stuck
            total = program.epochs if status.active else status.epoch
            progress.update(tasks[program.title], completed=status.epoch, total=total, text=text)

        yield show


def lines(console: Console) -> Show:
    """Plain lines: the first epoch, then one every few seconds, and the last; none within one."""
    last: dict[str, float] = defaultdict(lambda: -math.inf)

    def show(program: Trainable, status: Status, text: str) -> None:
        now = time.monotonic()
        if not status.place and not (status.active and now - last[program.title] < PLAIN_EVERY_S):
            last[program.title] = now
            line = f"{program.title}: epoch {status.epoch}/{program.epochs}, {text}"
            console.print(line, soft_wrap=True, highlight=False)

    return show


def describe(
    program: Trainable, status: Status, seconds: float, errors: Sequence[float] = ()
) -> str:
    """What the program says of itself, its speed and the time left at most.

    `seconds` are those of an epoch, NaN while that is not known; the `errors` so far are drawn.
    """
    text = f"{status.text} {sparkline(errors)}".rstrip()
    if math.isnan(seconds):
        return text
    speed = program.samples / seconds
    left = (program.epochs - status.epoch) * seconds if status.active else 0
    shown = f"{speed / 1e3:,.0f}k" if speed >= 1e4 else f"{speed:,.1f}"
    return f"{text}, {shown} samples/s, ≤ {clock(left)} left"


def sparkline(values: Sequence[float]) -> str:
    """The last finite values as a row of bars, from the lowest to the highest of them."""
    finite = [value for value in values if math.isfinite(value)][-SPARKS_SHOWN:]
    if len(finite) < 2:
        return ""
    low, span = min(finite), max(finite) - min(finite) or 1.0
    return "".join(SPARKS[round((value - low) / span * (len(SPARKS) - 1))] for value in finite)


def clock(seconds: float) -> datetime.timedelta:
    """Hours, minutes and seconds, as they are shown."""
    return datetime.timedelta(seconds=round(seconds))
