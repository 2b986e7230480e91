"""The command line: reads options, calls the library, prints. No logic of the experiment is here.

JAX and pandas are imported inside the commands that need them, so that --help stays quick. To add
a command, decorate a function; the options that several share are in `shared_options`, the frame of
a training is in `job`.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import unitnorm
from unitnorm.cli.segment import segment
from unitnorm.errors import UserError
from unitnorm.run.job import Job, command_line, interruptible, opened, read_config

INTERRUPTED = 130  # exit code after Ctrl-C or SIGTERM, everything saved


class Group(click.Group):
    """Prints a `UserError` or an interruption as one line; keeps the order of the commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"error: {on_one_line(str(error))}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            resume = shlex.join(["unitnorm", *(word for word in sys.argv[1:] if word != "--fresh")])
            click.echo(f"interrupted; what is saved stays. Go on with: {resume}", err=True)
            ctx.exit(INTERRUPTED)


def on_one_line(text: str) -> str:
    """The text with line breaks and the like written out: names of files and keys may hold any."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
        default=Path("runs/table2"),
        show_default=True,
        help="Folder of the records and the report.",
    )(command)


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What every command with a config takes."""
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
    ]
    for option in reversed(options):
        command = option(command)
    return command


def shared_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What every command that trains takes."""
    options: list[Callable[..., Any]] = [
        config_options,
        click.option("--runs", type=int, help="Runs of each depth and update."),
        click.option(
            "--fresh",
            is_flag=True,
            help="Start over: drop the records and checkpoints of the selected runs.",
        ),
        click.option(
            "--checkpoint-every",
            type=click.FloatRange(0.0),
            metavar="SECONDS",
            help="Save the state at the end of an epoch, at most so often; 0: of every epoch.  "
            "[default: 5; 0 with several processes]",
        ),
        click.option(
            "--devices",
            type=click.IntRange(1, 4096),
            help="CPU devices to share the runs among.  [default: one per core]",
        ),
        click.option(
            "--distributed",
            is_flag=True,
            help="Several processes, as Slurm, Kubernetes, Open MPI or a TPU pod has started them.",
        ),
        click.option(
            "--coordinator",
            metavar="HOST:PORT",
            help="Several processes: where to meet, on the host of process 0.",
        ),
        click.option("--processes", type=click.IntRange(1), help="Several processes: how many."),
        click.option("--process", type=click.IntRange(0), help="Several processes: which this is."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


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
      unitnorm report --out results/table2
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


@main.command()
@config_options
@click.option(
    "--rate",
    type=float,
    help="Learning rate.  [default: the config's largest candidate, 0.01 in Table 2]",
)
@click.option(
    "--steps",
    type=click.IntRange(1, 1_000_000),
    default=1000,
    show_default=True,
    help="Length of the trajectories.",
)
@click.option(
    "--epochs",
    type=click.IntRange(1, 1000),
    default=5,
    show_default=True,
    help="Length of the training whose row norms are recorded.",
)
def symmetry(out: Path, rate: float | None, steps: int, epochs: int, **options: Any) -> None:
    """Scale every filter: what becomes of loss, gradient, training and row norms?

    Shows the symmetry, and which updates respect it, on real mini-batches (sections 2 and 3 of the
    paper), on CPU and in float64. Follows every update unless --update names some. Writes to
    OUT/symmetry.

    \b
    Example
      unitnorm symmetry --depth 2
    """
    do_symmetry(out, rate, steps, epochs, **options)


@main.command()
@out_option
@click.option("--scaling", is_flag=True, help="Cost and memory against runs, depth and devices.")
@click.option("--startup", is_flag=True, help="The time from typing a command to its first epoch.")
@click.option("--depth", type=click.IntRange(1, 64), multiple=True, help="Depth to compare at.")
@click.option("--rounds", type=click.IntRange(1, 50), help="Repetitions.  [default: 7, else 3]")
@click.option("--quick", is_flag=True, help="A tenth of the images and 2 rounds: a first look.")
def bench(
    out: Path,
    scaling: bool,
    startup: bool,
    depth: tuple[int, ...],
    rounds: int | None,
    quick: bool,
) -> None:
    """Training speed beside geoopt, PyTorch, plain optax and the machine's limits.

    Takes turns among them, each in a process of its own; writes to OUT/bench. The machine should
    have nothing else to do.

    \b
    Example
      pip install "unitnorm[bench]"
      unitnorm bench
    """
    do_bench(out, "scaling" if scaling else "startup" if startup else "", depth, rounds, quick)


@main.command()
@out_option
@click.option("--depth", type=int, help="Depth of the run.  [default: the first recorded]")
@click.option("--update", help="Update of the run.  [default: the first recorded]")
@click.option("--run", type=int, help="Number of the run.  [default: the first recorded]")
@click.option("--data-dir", help="Folder with the IDX files, if the records are of such.")
def verify(out: Path, **run: Any) -> None:
    """Compute a recorded run again and say whether every bit matches.

    Hashes the records and the data as well. Exit code 0 if all match, 1 if not.

    \b
    Example
      unitnorm verify --depth 4 --update un --run 0
    """
    if not do_verify(out, **run):
        sys.exit(1)


def do_sweep(job: Job) -> None:
    """Sweep what has no rate yet, and record it."""
    from unitnorm.run import records
    from unitnorm.table2 import experiment

    if not experiment.missing(job.config, job.records.sweep):
        job.session.say("sweep: every selected run has its base learning rate")
    for rows in experiment.run_sweep(job.config, job.data, job.records, job.session):
        job.records.sweep = records.merge("sweep", job.records.sweep, rows)
        job.store(len(rows))


def do_train(job: Job) -> None:
    """Train what is not recorded yet, sweeping first where a rate is missing."""
    from unitnorm.run import records
    from unitnorm.table2 import experiment

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


def do_verify(
    out: Path, depth: int | None, update: str | None, run: int | None, data_dir: str | None
) -> bool:
    """Print every check and whether all match."""
    from unitnorm.run import devices

    devices.prepare()
    from rich.console import Console

    from unitnorm import data
    from unitnorm.run import progress, records
    from unitnorm.run.checkpoints import Nowhere
    from unitnorm.table2 import experiment, verify

    known = records.read_alone(out)
    group = verify.choose(known, depth, update, run)
    dataset = data.load(known.provenance["config"]["data"]["dataset"], data_dir)
    click.echo(f"records: {len(known.provenance['files'])} files with the SHA-256 recorded")
    same = True
    with progress.shown(Console(stderr=True)) as report:
        session = experiment.Session(report, click.echo, Nowhere(), lambda: False)
        for check in verify.verify(known, dataset, group, session):
            click.echo(f"{check.what}: {check.found}")
            same = same and check.matches
    named = f"depth {group.depth}, {group.updates[0]}, run {group.runs[0]}"
    click.echo(f"{named}: {'verified' if same else 'DOES NOT MATCH its record'}")
    note = verify.elsewhere(known.provenance)
    if note:
        click.echo(f"note: recorded elsewhere, where other bits are to be expected: {note}")
    return same


def is_the_papers(provenance: dict[str, Any]) -> bool:
    """Whether records may stand beside the paper's: its protocol, from any seed, on MNIST."""
    from unitnorm.table2.config import Config

    mine = provenance["config"] | {"seed": 0}
    return provenance["data"]["name"] == "mnist" and mine == Config().protocol()


def do_report(out: Path) -> None:
    """Print the report and write its files."""
    from rich.console import Console

    from unitnorm import report
    from unitnorm.run import records

    with records.locked(out, make=False):
        known = records.read(out)
        if known.runs.empty:
            raise UserError(
                f"{out}: no records of trained runs here; run `unitnorm train --out {out}` first"
            )
        image_shape = tuple(known.provenance["data"]["image_shape"])
        paper = report.PAPER if is_the_papers(known.provenance) else {}
        files = report.build(
            known.runs, known.history, known.sweep, known.filters, image_shape, paper
        )
        records.write_files(out, files, replacing="figures/filters_depth*")
    console = Console()
    console.print(report.terminal(known.runs, paper))
    console.print(f"{len(files)} files in {out}{os.sep}", highlight=False)


def do_symmetry(
    out: Path, rate: float | None, steps: int, epochs: int, **config_options: Any
) -> None:
    """Measure, print the table and write the files."""
    with interruptible():
        config = read_config(runs=None, **config_options)
        from unitnorm.run import devices

        devices.prepare()
        from rich.console import Console

        from unitnorm import data
        from unitnorm.run import records
        from unitnorm.symmetry import run
        from unitnorm.updates import UPDATES

        console = Console()

        def say(text: str) -> None:
            console.print(f"measured: {text}", highlight=False)

        updates = config.updates if config_options["update"] else list(UPDATES)
        dataset = data.load(config.data.dataset, config.data.data_dir)
        config.check_images(len(dataset.train_labels))
        with records.locked(out):
            with console.status("measuring"):
                result = run(config, dataset, updates, rate, steps, epochs, say)
            records.write_files(out, result.files)
    console.print(result.shown)
    console.print(f"{len(result.files)} files in {out / 'symmetry'}{os.sep}", highlight=False)


def do_bench(
    out: Path, what: str, depths: tuple[int, ...], rounds: int | None, quick: bool
) -> None:
    """Measure, print the table and write the files."""
    from rich.console import Console

    from unitnorm.bench import compare, measure, scaling, startup
    from unitnorm.report.tables import Fitting
    from unitnorm.run import records

    started = time.time()
    console = Console()
    images = compare.IMAGES // 10 if quick else compare.IMAGES
    rounds = rounds or (2 if quick else 3 if what else 7)
    with records.locked(out):
        with console.status("") as status:
            say = status.update
            if what == "scaling":
                frame, device = scaling.scaling(
                    scaling.points(measure.cores()), rounds, images, say=say
                )
            elif what == "startup":
                frame = startup.startup(rounds, say=say)
            else:
                compared = compare.compare(depths or (2, 4), rounds, images, say=say)
        done = measure.provenance(command_line(), started, time.time() - started)
        if what == "scaling":
            shown, lines = scaling.table(frame), scaling.growth(frame)
            files = scaling.files(frame, device, rounds, done)
        elif what == "startup":
            shown, lines = startup.table(frame), []
            files = startup.files(frame, rounds, done)
        else:
            shown, lines = compare.table(compared), compare.remarks(compared)
            files = compare.files(compared, done)
        records.write_files(out, files)
    console.print(Fitting(shown))
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"{len(files)} files in {out / 'bench'}{os.sep}", highlight=False)


main.add_command(segment)
