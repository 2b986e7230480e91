"""The frame of every command that trains: devices, data, the locked folder, signals, progress.

The edge of the program: files, clocks and the terminal are here and in what it calls. An experiment
brings its config, its groups (`planner.Experiment`) and a function that loads its data. JAX and
pandas are imported inside the functions, so that --help stays quick.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from unitnorm.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from unitnorm.run.cluster import Workers
    from unitnorm.run.config import ExperimentConfig
    from unitnorm.run.loop import Session
    from unitnorm.run.planner import Done, Experiment
    from unitnorm.run.records import Records

CHECKPOINTS = ".checkpoints"  # in a results folder


@dataclass(frozen=True)
class TrainingOptions:
    """The options that every command that trains takes; see `unitnorm.cli.options`."""

    out: Path
    fresh: bool = False
    checkpoint_every: float | None = None
    devices: int | None = None
    workers: int | None = None
    scheduler: str | None = None


class Loaded(NamedTuple):
    """What an experiment's data are."""

    data: Mapping[str, Any]  # the data sets by the names that groups have for them
    about: dict[str, Any]  # what the provenance says of them
    runs: int  # how many the command asks for, recorded or not
    selected: pd.DataFrame | None = None  # cells that --fresh starts over; None: all
    lines: tuple[str, ...] = ()  # what to say of them at the start


@dataclass
class Job:
    """An opened results folder and all that a command needs to add to it."""

    experiment: Experiment
    data: Mapping[str, Any]
    out: Path
    records: Records
    session: Session
    engine: Workers | None  # None: this process computes
    started: float
    runs: int  # how many are asked for
    rows: int = 0  # added to the records so far
    workers: dict[str, list[str]] = field(default_factory=dict)  # what each has computed
    after: Callable[[Records], None] = lambda records: None  # sees them after every group

    def store(self, records: Records, done: Sequence[Done] = ()) -> None:
        """Write the records, with what this command did, and drop the checkpoints they replace."""
        from unitnorm.run.provenance import command_entry
        from unitnorm.run.records import write

        for group, _, worker in done:
            if worker:
                self.workers.setdefault(worker, []).append(group.title)
        self.rows += sum(len(records[name]) - len(self.records[name]) for name in records.tables)
        known = records.provenance
        entry = command_entry(command_line(), self.started, time.time() - self.started, self.rows)
        entry["asked"] = self.runs
        if self.workers:
            entry["workers"] = self.workers
        others = [c for c in known["commands"] if c["started"] != entry["started"]]
        noted = replace(records, provenance={**known, "commands": [*others, entry]})
        self.records = write(self.out, noted)
        self.session.checkpoints.drop(records.recorded())
        if done:
            self.after(self.records)


def so_far(known: Records) -> str:
    """How many of the runs that the last command asked for are recorded; "" if all are."""
    asked = max((command.get("asked", 0) for command in known.provenance["commands"]), default=0)
    done = len(known["runs"])
    return f"{done:,} of {asked:,} runs so far" if done < asked else ""


def command_line() -> str:
    """The command as it was typed, with the name it can be repeated by."""
    module = getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "")
    ours = module.startswith("unitnorm.") and not module.endswith("__main__")  # an example
    return shlex.join([*(("python", "-m", module) if ours else ("unitnorm",)), *sys.argv[1:]])


@contextlib.contextmanager
def open_job(
    experiment: Experiment,
    config: ExperimentConfig,
    load: Callable[[], Loaded],
    options: TrainingOptions,
) -> Iterator[Job]:
    """Check everything, lock the results folder and show progress; the frame of every training."""
    started = time.time()
    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(interruptible())
        from rich.console import Console

        from unitnorm.run import devices, progress, provenance, records
        from unitnorm.run.checkpoints import EVERY_S, Folder
        from unitnorm.run.loop import Session

        devices.prepare(options.devices)
        console = Console()
        say = partial(console.print, highlight=False, soft_wrap=True)
        data, about, runs, selected, lines = load()
        schema, expected = experiment.schema, provenance.describe(config, about)
        stack.enter_context(records.locked(options.out))
        known = records.read(options.out, schema)
        dropped: set[str] = set()
        if options.fresh:
            cells = known.cells() if selected is None else selected
            known = known.without(cells)
            dropped = {name for table in schema.tables for name in schema.names(table, cells)}
        known = check_matching(known, config, expected, options)
        every_s = EVERY_S if options.checkpoint_every is None else options.checkpoint_every
        checkpoints = Folder(options.out / CHECKPOINTS, every_s=every_s, say=say)
        stack.callback(checkpoints.finish)
        for line in lines:
            say(line)
        engine = None
        if options.workers is not None or options.scheduler is not None:
            from unitnorm.run.cluster import connect

            there = connect(options.scheduler, options.workers, options.devices)
            engine = stack.enter_context(there)
        report = stack.enter_context(progress.shown(console))
        session = Session(report, say, checkpoints=checkpoints, interrupted=lambda: stopping.is_set)
        stopping.after_the_epoch = True
        job = Job(experiment, data, options.out, known, session, engine, started, runs)
        if options.fresh or any(True for _ in experiment.missing(known)):
            # at once: others may look from now on, and the command goes on without --fresh
            job.store(known.with_arrays({name: {} for name in schema.required}))
        checkpoints.drop(known.recorded() | dropped)
        yield job


def check_matching(
    known: Records, config: ExperimentConfig, expected: dict[str, Any], options: TrainingOptions
) -> Records:
    """The folder's records, if they are of this config and data; new ones have their provenance."""
    if known.is_empty():
        return replace(known, provenance=expected)
    found = known.provenance
    differs, old, new = config.conflict(found["config"]), found["data"], expected["data"]
    other_data = any(old[key] != new[key] for key in old.keys() & new.keys())
    if differs is not None or other_data:
        what = "data set" if differs is None else f"config{differs}"
        others = "other runs with " if options.fresh else ""
        hint = "" if options.fresh else ", or start over with --fresh"
        raise UserError(
            f"{options.out}: holds records of {others}another {what}; give another --out{hint}"
        )
    grown = {"data": old | new, "commands": found["commands"]}
    return replace(known, provenance=found | expected | grown)


@dataclass
class Interrupts:
    """What Ctrl-C and SIGTERM do: stop at once, or set `is_set`, looked at after each epoch."""

    is_set: bool = False
    after_the_epoch: bool = False


@contextlib.contextmanager
def interruptible() -> Iterator[Interrupts]:
    """Turn Ctrl-C or SIGTERM into a KeyboardInterrupt, or into a request to stop."""
    stopping = Interrupts()

    def request(number: int, _: Any) -> None:
        if not stopping.after_the_epoch or (stopping.is_set and number == signal.SIGINT):
            raise KeyboardInterrupt  # nothing to lose yet, or asked twice
        stopping.is_set = True
        click.echo("stopping …", err=True)

    before = {n: signal.signal(n, request) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
