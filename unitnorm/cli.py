"""The command line: reads options, calls the library, prints. No logic of the experiment is here.

JAX and pandas are imported inside the commands that need them, so that --help stays quick. To add
a command, decorate a function; what several commands share is in `shared_options` and `opened`.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import unitnorm
from unitnorm.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from unitnorm.config import Config
    from unitnorm.data import Dataset
    from unitnorm.experiment import Session
    from unitnorm.records import Records

DEFAULT_CONFIG = Path("configs/table2.toml")
INTERRUPTED = 130  # exit code after Ctrl-C or SIGTERM, everything saved


class Group(click.Group):
    """Prints a `UserError` as one line and keeps the order in which commands are written."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(unitnorm.__version__, prog_name="unitnorm")
def main() -> None:
    """Does it pay to remove the scaling symmetries of a batch-normalised network?

    Table 2 of "Understanding symmetries in deep networks" (Badrinarayanan, Mishra and Cipolla,
    2015): SGD from unit-norm filters (b-sgd) against SGD on the unit-norm manifold (un).

    \b
    Example: the whole table, from nothing
      unitnorm reproduce
    A first look in about a minute
      unitnorm reproduce --config configs/quick.toml --out quick
    """


# ---------------------------------------------------------------- options


def out_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--out, which every command takes."""
    return click.option(
        "--out",
        type=click.Path(path_type=Path, file_okay=False),
        default=Path("results"),
        show_default=True,
        help="Folder of the records and the report.",
    )(command)


def shared_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What every command that trains takes."""
    options: list[Callable[..., Any]] = [
        click.option(
            "--config",
            "config_path",
            type=click.Path(path_type=Path),
            help="TOML file of the experiment.  [default: configs/table2.toml, the paper's "
            "protocol, which is also built in]",
        ),
        out_option,
        click.option("--depth", type=int, multiple=True, help="Depth to run; may be repeated."),
        click.option("--update", multiple=True, help="Update to run; may be repeated."),
        click.option("--runs", type=int, help="Runs of each depth and update."),
        click.option("--seed", type=int, help="Seed of run 0; run k has seed + k."),
        click.option("--dataset", help="mnist, or the name of a prepared TFDS data set."),
        click.option("--data-dir", help="Folder with four IDX files of your own, raw or .gz."),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Override any key of the config, for example --set loss.batch_size=50.",
        ),
        click.option(
            "--fresh", is_flag=True, help="Start over: drop the records of the selected runs."
        ),
        click.option(
            "--devices",
            type=click.IntRange(1, 4096),
            help="CPU devices to share the runs among.  [default: one per core]",
        ),
        click.option(
            "--coordinator", metavar="HOST:PORT", help="Several processes: where to meet."
        ),
        click.option("--processes", type=click.IntRange(1), help="Several processes: how many."),
        click.option("--process", type=click.IntRange(0), help="Several processes: which this is."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


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

    def store(self, rows: int) -> None:
        """Write the records, with what this command did."""
        from unitnorm import experiment, records

        if not self.writes:
            return
        entry = experiment.command_entry(
            command_line(), self.started, time.time() - self.started, rows
        )
        commands = self.records.provenance["commands"]
        if commands and commands[-1]["started"] == entry["started"]:
            entry["rows"] += commands.pop()["rows"]
        commands.append(entry)
        records.write(self.out, self.records)


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
    from unitnorm import config

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
    devices: int | None,
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    **config_options: Any,
) -> Iterator[Job]:
    """Check everything, lock the results folder and show progress; the frame of every training."""
    started = time.time()
    config = read_config(**config_options)
    from unitnorm import devices as device_setup

    device_setup.prepare(devices, coordinator, processes, process)
    from rich.console import Console

    from unitnorm import checkpoints, data, experiment, progress, records

    is_first = device_setup.is_first_process()
    console = Console(stderr=False, quiet=not is_first)
    dataset = data.load(config.data.dataset, config.data.data_dir)
    config.check_images(len(dataset.train_labels))
    with contextlib.ExitStack() as stack:
        if is_first:
            stack.enter_context(records.locked(out))
        device_setup.wait_for_all("folder opened")
        known = records.read(out)
        known = matching(known, config, dataset, out, fresh)
        stopping = stack.enter_context(interruptible())
        session = experiment.Session(
            report=stack.enter_context(progress.shown(console)),
            say=lambda text: console.print(text, highlight=False, soft_wrap=True),
            checkpoints=checkpoints.Folder(out / ".checkpoints", fresh=fresh),
            interrupted=lambda: stopping.is_set,
        )
        job = Job(config, dataset, out, known, session, console, started, is_first)
        try:
            yield job
        except experiment.Interrupted:
            resume = [word for word in sys.argv[1:] if word != "--fresh"]
            again = shlex.join(["unitnorm", *resume])
            click.echo(f"interrupted; everything is saved. Go on with: {again}", err=True)
            sys.exit(INTERRUPTED)


def matching(known: Records, config: Config, dataset: Dataset, out: Path, fresh: bool) -> Records:
    """The folder's records, if they are of this config and data; without the selected runs
    where those are to start over."""
    from unitnorm import experiment, records

    expected = experiment.provenance(config, dataset)
    cells = records.cells(config.depths, config.updates, config.runs)
    if fresh:
        known = records.drop(known, cells)
    if known.provenance and not known.is_empty():
        for key, what in (("config_sha256", "config"), ("data", "data set")):
            if known.provenance.get(key) != expected[key]:
                raise UserError(
                    f"{out}: holds records of another {what}"
                    f"{difference(known.provenance.get('config'), expected['config'])}; give "
                    "another --out, or start over with --fresh"
                )
    else:
        known.provenance = expected
    return known


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


class StopFlag:
    """Set by Ctrl-C or SIGTERM; looked at after each epoch."""

    is_set = False


@contextlib.contextmanager
def interruptible() -> Iterator[StopFlag]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop after the epoch."""
    flag = StopFlag()

    def request(number: int, _: Any) -> None:
        if flag.is_set and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: at once, with the last saved epoch
        flag.is_set = True
        click.echo("stopping after this epoch …", err=True)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, request) for number in numbers]
    try:
        yield flag
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


# ---------------------------------------------------------------- commands


@main.command()
@shared_options
def sweep(**options: Any) -> None:
    """Choose the base learning rate of every run.

    Each candidate trains on 1,000 images for 50 epochs; the lowest error on 500 others wins.

    \b
    Example
      unitnorm sweep --depth 4 --update un
    """
    with opened(**options) as job:
        do_sweep(job)


@main.command()
@shared_options
def train(**options: Any) -> None:
    """Train every run in full, at its base learning rate.

    Runs without a recorded sweep are swept first.

    \b
    Example
      unitnorm train --depth 4 --update un --runs 10 --seed 0
    """
    with opened(**options) as job:
        do_train(job)


@main.command()
@out_option
def report(out: Path) -> None:
    """Table 2, its figures and the verdict, from the records alone.

    \b
    Example
      unitnorm report --out results
    """
    do_report(out)


@main.command()
@shared_options
def reproduce(**options: Any) -> None:
    """Sweep, train and report in a row: Table 2 from nothing.

    \b
    Example
      unitnorm reproduce --config configs/quick.toml --out quick
    """
    with opened(**options) as job:
        do_train(job)
    if job.writes:
        do_report(options["out"])


def do_sweep(job: Job) -> None:
    """Sweep what has no rate yet, and record it."""
    from unitnorm import experiment, records

    if not experiment.missing(job.config, job.records.sweep):
        job.session.say("sweep: every selected run has its base learning rate")
    for rows in experiment.run_sweep(job.config, job.data, job.records, job.session):
        job.records.sweep = records.merge("sweep", job.records.sweep, rows)
        job.store(len(rows))


def do_train(job: Job) -> None:
    """Train what is not recorded yet, sweeping first where a rate is missing."""
    from unitnorm import experiment, records

    if not experiment.missing(job.config, job.records.runs):
        job.session.say("train: every selected run is recorded; --fresh starts over")
        return
    unswept = experiment.missing(job.config, job.records.sweep)
    if unswept:
        count = sum(len(group.runs) * len(group.updates) for group in unswept)
        job.session.say(f"train: {count} runs have no base learning rate yet, sweeping first")
        do_sweep(job)
    for trained in experiment.run_training(job.config, job.data, job.records, job.session):
        job.records.runs = records.merge("runs", job.records.runs, trained.runs)
        job.records.history = records.merge("history", job.records.history, trained.history)
        job.records.filters |= trained.filters
        job.store(len(trained.runs))


def do_report(out: Path) -> None:
    """Print the report and write its files."""
    from rich.console import Console

    from unitnorm import records, report

    with records.locked(out):
        known = records.read(out)
        if known.runs.empty:
            raise UserError(
                f"{out}: no records of trained runs here; run `unitnorm train --out {out}` first"
            )
        image_shape = tuple(known.provenance["data"]["image_shape"])
        paper = report.PAPER if known.provenance["data"]["name"] == "mnist" else {}
        files = report.build(
            known.runs, known.history, known.sweep, known.filters, image_shape, paper
        )
        records.write_files(out, files)
    console = Console()
    console.print(report.terminal(known.runs, paper))
    console.print(f"{len(files)} files in {out}{os.sep}", highlight=False)
