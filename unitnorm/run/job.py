"""The frame of every command that trains: config, devices, the locked folder, signals, progress.

The edge of the program: files, clocks and the terminal are here and in what it calls; the commands
themselves are in `cli`. JAX and pandas are imported inside the functions, so that --help stays
quick.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unitnorm.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from unitnorm.data import Dataset
    from unitnorm.run.records import Records
    from unitnorm.table2.config import Config
    from unitnorm.table2.experiment import Checkpoints, Session

DEFAULT_CONFIG = Path("configs/table2.toml")


@dataclass
class Job:
    """An opened results folder and all that a command needs to add to it."""

    config: Config
    data: Dataset
    out: Path
    records: Records
    session: Session
    console: Console
    started: float
    writes: bool  # only process 0 touches the folder
    rows: int = 0  # added to the records so far

    def store(self, rows: int) -> None:
        """Write the records, with what this command did: that it added so many rows to them."""
        from unitnorm.run import records

        if not self.writes:
            return
        self.rows += rows
        note(self.records.provenance, self.started, self.rows)
        records.write(self.out, self.records)
        self.session.checkpoints.drop(recorded(self.records))


def note(provenance: dict[str, Any], started: float, rows: int) -> None:
    """Put this command among those of the provenance, or bring its entry up to date.

    Args:
      started: seconds since the epoch, by which its entry is known.
      rows: that it has added to the records so far.
    """
    from unitnorm.table2 import experiment

    entry = experiment.command_entry(command_line(), started, time.time() - started, rows)
    commands = provenance["commands"]
    if commands and commands[-1]["started"] == entry["started"]:
        commands.pop()
    commands.append(entry)


def command_line() -> str:
    """The command as it was typed, with the name it can be repeated by."""
    return shlex.join(["unitnorm", *sys.argv[1:]])


def read_config(
    config_path: Path | None,
    depth: tuple[int, ...],
    update: tuple[str, ...],
    runs: int | None,
    seed: int | None,
    dataset: str | None,
    data_dir: str | None,
    overrides: tuple[str, ...],
) -> Config:
    """The config file with the command line's options on top."""
    from unitnorm.table2 import config

    if config_path is None and DEFAULT_CONFIG.exists():
        config_path = DEFAULT_CONFIG
    values = dict(config.parse_override(text) for text in overrides)
    given = {
        "depths": list(depth) or None,
        "updates": list(update) or None,
        "runs": runs,
        "seed": seed,
        "data.dataset": dataset,
        "data.data_dir": data_dir,
    }
    values |= {key: value for key, value in given.items() if value is not None}
    return config.load(config_path, values)


@contextlib.contextmanager
def opened(
    out: Path,
    fresh: bool,
    checkpoint_every: float | None,
    devices: int | None,
    distributed: bool,
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    **config_options: Any,
) -> Iterator[Job]:
    """Check everything, lock the results folder and show progress; the frame of every training."""
    started = time.time()
    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(interruptible())
        config = read_config(**config_options)
        from rich.console import Console

        from unitnorm import data
        from unitnorm.run import devices as device_setup
        from unitnorm.run import progress, records
        from unitnorm.run.checkpoints import EVERY_S, Folder, Nowhere
        from unitnorm.table2 import experiment

        stack.enter_context(as_interruption(experiment.Interrupted))
        stack.enter_context(device_setup.together((experiment.Interrupted,)))
        device_setup.prepare(devices, coordinator, processes, process, detect=distributed)
        is_first = device_setup.is_first_process()
        console = Console(stderr=False, quiet=not is_first)

        def say(text: str) -> None:
            console.print(text, highlight=False, soft_wrap=True)

        def load() -> Dataset:
            dataset = data.load(config.data.dataset, config.data.data_dir)
            config.check_images(len(dataset.train_labels))
            return dataset

        dataset = device_setup.in_all(load)
        asked = config.model_dump_json(exclude={"data": {"data_dir"}})
        identity = " ".join([asked, dataset.sha256, experiment.code()])
        device_setup.check_same("config, data set or version of unitnorm", identity)
        checkpoints: Checkpoints = Nowhere()

        def open_folder() -> Records:
            nonlocal checkpoints
            if not is_first:
                return records.Records()
            stack.enter_context(records.locked(out))
            known = matching(records.read(out), config, dataset, out, fresh)
            every_s = checkpoint_every
            if every_s is None:  # one of several processes can die at any time, and take all along
                every_s = 0.0 if device_setup.several() else EVERY_S
            folder = Folder(out / ".checkpoints", every_s=every_s, say=say)
            stack.callback(folder.close)
            checkpoints = folder
            start_over(out, known, config, checkpoints, fresh)
            return known

        known = device_setup.in_all(open_folder)
        told = device_setup.text_from_first(records.to_text(known))
        session = experiment.Session(
            report=stack.enter_context(progress.shown(console)),
            say=say,
            checkpoints=checkpoints,
            interrupted=lambda: stopping.is_set,
        )
        known = known if is_first else records.from_text(told)
        job = Job(config, dataset, out, known, session, console, started, is_first)
        stopping.after_the_epoch = True
        yield job


@contextlib.contextmanager
def as_interruption(stopped: type[Exception]) -> Iterator[None]:
    """Turn the end that was asked for into what the command ends with."""
    try:
        yield
    except stopped:
        raise KeyboardInterrupt from None


def start_over(
    out: Path, known: Records, config: Config, checkpoints: Checkpoints, fresh: bool
) -> None:
    """Remove the checkpoints that are of no use any more and, if asked, the selected runs.

    They go from the disk at once: an interrupted command is repeated without --fresh.
    """
    from unitnorm.run import records

    done = recorded(known)
    if fresh:
        cells = records.cells(config.depths, config.updates, config.runs)
        done |= {name for table in ("sweep", "runs") for name in records.names(table, cells)}
        if (out / records.PROVENANCE).exists():
            records.write(out, known)
    checkpoints.drop(done)


def recorded(known: Records) -> set[str]:
    """The names of the recorded runs and sweeps, which need no checkpoint."""
    from unitnorm.run import records

    return records.names("sweep", known.sweep) | records.names("runs", known.runs)


def matching(known: Records, config: Config, dataset: Dataset, out: Path, fresh: bool) -> Records:
    """The folder's records, if they are of this config and data; without the selected runs
    where those are to start over."""
    from unitnorm.run import records
    from unitnorm.table2 import experiment

    expected = experiment.provenance(config, dataset)
    cells = records.cells(config.depths, config.updates, config.runs)
    if fresh:
        known = records.drop(known, cells)
    if known.provenance and not known.is_empty():
        refuse_others(out, known.provenance, expected, fresh)
    else:
        known.provenance = expected
    return known


def refuse_others(out: Path, found: dict[str, Any], expected: dict[str, Any], fresh: bool) -> None:
    """Refuse a folder whose records, by their provenance, are of another config or data set."""
    for key, what in (("config_sha256", "config"), ("data", "data set")):
        if found.get(key) != expected[key]:
            hint = "" if fresh else ", or start over with --fresh"
            raise UserError(
                f"{out}: holds records of {'other runs with ' if fresh else ''}another {what}"
                f"{difference(found['config'], expected['config'])}; give another --out{hint}"
            )


def difference(old: Any, new: dict[str, Any], prefix: str = "") -> str:
    """The first key in which two configs differ, as " (seed: 0 there, 7 here)"."""
    for key, value in new.items():
        there = old.get(key) if isinstance(old, dict) else None
        if isinstance(value, dict):
            inner = difference(there, value, f"{prefix}{key}.")
            if inner:
                return inner
        elif there != value:
            return f" ({prefix}{key}: {there} there, {value} here)"
    return ""


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
