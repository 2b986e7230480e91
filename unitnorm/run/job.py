"""The frame of every command that trains: devices, data, the locked folder, signals, progress.

The edge of the program: files, clocks and the terminal are here and in what it calls. An experiment
brings its schema, its config and a function that loads its data. JAX and pandas are imported inside
the functions, so that --help stays quick.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unitnorm.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from unitnorm.run.config import ExperimentConfig
    from unitnorm.run.loop import Session
    from unitnorm.run.records import Records, Schema

CHECKPOINTS = ".checkpoints"  # in a results folder


@dataclass(frozen=True)
class TrainingOptions:
    """The options that every command that trains takes; see `unitnorm.cli.options`."""

    out: Path
    fresh: bool = False
    checkpoint_every: float | None = None
    devices: int | None = None
    distributed: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


@dataclass
class Job:
    """An opened results folder and all that a command needs to add to it."""

    data: Any
    out: Path
    records: Records
    session: Session
    started: float
    writes: bool  # only process 0 touches the folder
    rows: int = 0  # added to the records so far

    def store(self, records: Records) -> None:
        """Write the records, with what this command did, and drop the checkpoints they replace."""
        from unitnorm.run.provenance import command_entry
        from unitnorm.run.records import write

        self.rows += sum(len(records[name]) - len(self.records[name]) for name in records.tables)
        self.records = records
        if not self.writes:
            return
        entry = command_entry(command_line(), self.started, time.time() - self.started, self.rows)
        others = [c for c in records.provenance["commands"] if c["started"] != entry["started"]]
        noted = {**records.provenance, "commands": [*others, entry]}
        self.records = write(self.out, replace(records, provenance=noted))
        self.session.checkpoints.drop(records.recorded())


def command_line() -> str:
    """The command as it was typed, with the name it can be repeated by."""
    return shlex.join(["unitnorm", *sys.argv[1:]])


@contextlib.contextmanager
def open_job(
    schema: Schema,
    config: ExperimentConfig,
    load: Callable[[], tuple[Any, dict[str, Any], pd.DataFrame | None]],
    options: TrainingOptions,
) -> Iterator[Job]:
    """Check everything, lock the results folder and show progress; the frame of every training.

    Args:
      schema: of the records.
      config: of the experiment.
      load: gives the data, what the provenance says of it, and the runs that --fresh starts over,
        as cells of the schema; None: all.
      options: of the command line.
    """
    started = time.time()
    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(interruptible())
        from rich.console import Console

        from unitnorm.run import devices as device_setup
        from unitnorm.run import processes, progress, provenance, records
        from unitnorm.run.checkpoints import EVERY_S, Checkpoints, Folder
        from unitnorm.run.loop import Session

        stack.enter_context(processes.together())
        device_setup.prepare(options.devices)
        meet = options.coordinator, options.processes, options.process
        processes.join(*meet, detect=options.distributed)
        is_first = processes.is_first_process()
        console = Console(stderr=False, quiet=not is_first)

        def say(text: str) -> None:
            console.print(text, highlight=False, soft_wrap=True)

        data, about, selected = processes.in_all(load)
        expected = provenance.describe(config, about)
        asked = config.model_dump_json(exclude={"data": {"data_dir"}})
        sources = provenance.hash_sources() if processes.several() else ""
        processes.check_same(
            "config, data set or version of unitnorm", f"{asked} {about} {sources}"
        )
        checkpoints = Checkpoints()

        def open_folder() -> Records:
            nonlocal checkpoints
            if not is_first:
                return records.Records.empty(schema)
            stack.enter_context(records.locked(options.out))
            known = records.read(options.out, schema)
            dropped = None
            if options.fresh:
                dropped = known.cells() if selected is None else selected
                known = known.without(dropped)
            known = check_matching(known, config, expected, options)
            every_s = options.checkpoint_every
            if every_s is None:  # one of several processes can die at any time, and take all along
                every_s = 0.0 if processes.several() else EVERY_S
            folder = Folder(options.out / CHECKPOINTS, every_s=every_s, say=say)
            stack.callback(folder.finish)
            checkpoints = folder
            done = known.recorded()
            if dropped is not None:  # from the disk at once: the command goes on without --fresh
                done |= {name for t in schema.tables for name in schema.names(t, dropped)}
                if (options.out / records.PROVENANCE).exists():
                    known = records.write(options.out, known)
            checkpoints.drop(done)
            return known

        known = processes.in_all(open_folder)
        told = processes.text_from_first(records.to_text(known))
        if not is_first:
            known = replace(records.from_text(told, schema), provenance=expected)
        reporter = stack.enter_context(progress.shown(console))
        session = Session(reporter, say, checkpoints, lambda: stopping.is_set)
        stopping.after_the_epoch = True
        yield Job(data, options.out, known, session, started, is_first)


@contextlib.contextmanager
def open_recomputation() -> Iterator[Session]:
    """A session on standard error that records nothing: for runs that are computed again."""
    from rich.console import Console

    from unitnorm.run import progress
    from unitnorm.run.loop import Session

    with progress.shown(Console(stderr=True)) as report:
        yield Session(report, click.echo)


def check_matching(
    known: Records, config: ExperimentConfig, expected: dict[str, Any], options: TrainingOptions
) -> Records:
    """The folder's records, if they are of this config and data; new ones have their provenance.

    Raises:
      UserError: they are of another config or data set.
    """
    if not known.provenance or known.is_empty():
        return replace(known, provenance=expected)
    found = known.provenance
    differs, old, new = config.conflict(found["config"]), found["data"], expected["data"]
    other_data = any(old[key] != new[key] for key in old.keys() & new.keys())
    what = "config" if differs is not None else "data set" if other_data else ""
    if what:
        hint = "" if options.fresh else ", or start over with --fresh"
        raise UserError(
            f"{options.out}: holds records of {'other runs with ' if options.fresh else ''}"
            f"another {what}{differs or ''}; give another --out{hint}"
        )
    grown = {"data": old | new, "commands": found["commands"]}
    return replace(known, provenance=found | expected | grown)


@dataclass
class Stopping:
    """What Ctrl-C and SIGTERM do: stop at once, or set `is_set`, looked at after each epoch."""

    is_set: bool = False
    after_the_epoch: bool = False


@contextlib.contextmanager
def interruptible() -> Iterator[Stopping]:
    """Turn Ctrl-C or SIGTERM into a KeyboardInterrupt, or into a request to stop."""
    stopping = Stopping()

    def request(number: int, _: Any) -> None:
        if not stopping.after_the_epoch or (stopping.is_set and number == signal.SIGINT):
            raise KeyboardInterrupt  # nothing to lose yet, or asked twice
        stopping.is_set = True
        click.echo("stopping …", err=True)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, request) for number in numbers]
    try:
        yield stopping
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
