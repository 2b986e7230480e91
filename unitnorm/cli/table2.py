"""The commands of Table 2: sweep, train, report, reproduce, verify. Read options, call, print."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unitnorm.cli import options as opt
from unitnorm.errors import UserError
from unitnorm.run.job import Job, open_job, open_recomputation, print_report

if TYPE_CHECKING:
    from unitnorm.table2.config import Config

OUT = "runs/table2"

selection_options = opt.together(
    opt.config_option("table2, the paper's protocol"),
    opt.option("--depth", "depths", group=opt.SELECTION, type=int, multiple=True,
               help="Depth to run; may be repeated."),
    opt.update_option,
    opt.seed_option,
    opt.image_options,
)  # fmt: skip
shared_options = opt.together(selection_options, opt.runs_option, opt.training_options(OUT))


@contextmanager
def open_table2(options: dict[str, Any]) -> Iterator[tuple[Config, Job]]:
    """The config and the opened folder of a command with `shared_options`."""
    from unitnorm.table2.config import Config
    from unitnorm.table2.schema import SCHEMA

    training = opt.take_training_options(options)
    config = opt.read_config(Config, **options)

    def load() -> tuple[Any, ...]:
        from unitnorm.data import load_dataset
        from unitnorm.table2.experiment import describe_data, list_cells

        data = load_dataset(config.data.dataset, config.data.data_dir)
        config.check_images(len(data.train_labels))
        return data, describe_data(data), list_cells(config)

    with open_job(SCHEMA, config, load, training) as job:
        yield config, job


@click.command(cls=opt.GroupedCommand, short_help="Choose the base learning rate of every run.")
@shared_options
def sweep(**options: Any) -> None:
    """Choose the base learning rate of every run.

    Each candidate trains on 1,000 images for 50 epochs; the lowest error on 500 others wins.

    \b
    Example
      unitnorm sweep --depth 4 --update un
    """
    with open_table2(options) as (config, job):
        do_sweep(config, job)


@click.command(cls=opt.GroupedCommand, short_help="Train every run in full.")
@shared_options
def train(**options: Any) -> None:
    """Train every run in full, at its base learning rate.

    Runs without a recorded sweep are swept first.

    \b
    Example
      unitnorm train --depth 4 --update un --runs 10 --seed 0
    """
    with open_table2(options) as (config, job):
        do_train(config, job)


@click.command(cls=opt.GroupedCommand, short_help="The table and figures, from the records.")
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path))
@opt.out_option(OUT)
def report(folders: tuple[Path, ...], out: Path) -> None:
    """Table 2, its figures and what they show, from the records alone.

    With two folders, A and B, their runs side by side instead, with paired differences where
    seeds agree; what is written goes to --out then.

    \b
    Example
      unitnorm report --out results/table2
      unitnorm report results/table2 results/50-runs --out runs/compared
    """
    if len(folders) > 2:
        raise UserError(f"report: one or two folders, not {len(folders)}")
    if len(folders) == 2:
        do_compare(folders[0], folders[1], out)
    else:
        do_report(folders[0] if folders else out)


@click.command(cls=opt.GroupedCommand, short_help="Sweep, train and report: all of Table 2.")
@shared_options
def reproduce(**options: Any) -> None:
    """Sweep, train and report in a row: Table 2 from nothing.

    \b
    Example
      unitnorm reproduce --config quick --out runs/quick
    """
    with open_table2(options) as (config, job):
        do_train(config, job)
    if job.writes:
        do_report(job.out)


@click.command(cls=opt.GroupedCommand, short_help="Compute a recorded run again and compare.")
@opt.option("--depth", group=opt.SELECTION, type=int,
            help="Depth of the run.  [default: the first recorded]")  # fmt: skip
@opt.option("--update", group=opt.SELECTION, type=opt.UpdateName(),
            help="Update of the run.  [default: the first recorded]")  # fmt: skip
@opt.option("--run", group=opt.SELECTION, type=int,
            help="Number of the run.  [default: the first recorded]")  # fmt: skip
@opt.option("--data-dir", group=opt.DATA,
            help="Folder with the IDX files, if the records are of such.")  # fmt: skip
@opt.out_option(OUT)
def verify(out: Path, data_dir: str | None, **wanted: Any) -> None:
    """Compute a recorded run again and say whether every bit matches.

    Hashes the records and the data as well. Exit code 0 if all match, 1 if not. In the folder of a
    study, --run is the number of its row in runs.csv.gz, from 0.

    \b
    Example
      unitnorm verify --out results/table2 --depth 4 --update un --run 0
    """
    from unitnorm.run import devices, records

    devices.prepare()
    from unitnorm.cli import study
    from unitnorm.data import load_dataset
    from unitnorm.study import schema as study_schema
    from unitnorm.table2 import schema, verify

    of_study = records.kind_of(out) == "study"
    known = records.read_alone(out, (study_schema if of_study else schema).SCHEMA)
    runs = known["runs"]
    chosen = verify.choose(runs.assign(run=runs.index) if of_study else runs, **wanted)
    images = chosen.iloc[0] if of_study else known.provenance["config"]["data"]
    data = load_dataset(images["dataset"], data_dir)
    click.echo(f"records: {len(known.provenance['files'])} files with the SHA-256 recorded")
    same = True
    with open_recomputation() as session:
        for check in (study.verify if of_study else verify.verify)(known, data, chosen, session):
            click.echo(f"{check.what}: {check.found}")
            same = same and check.matches
    named = ", ".join(f"{column} {chosen[column].item()}" for column in known.schema.cell)
    click.echo(f"{named}: {'verified' if same else 'DOES NOT MATCH its record'}")
    note = verify.elsewhere(known.provenance)
    if note:
        click.echo(f"note: recorded elsewhere, where other bits are to be expected: {note}")
    if not same:
        sys.exit(1)


def do_sweep(config: Config, job: Job) -> None:
    """Sweep what has no rate yet, and record it."""
    from unitnorm.table2 import experiment

    if not experiment.missing(config, job.records["sweep"]):
        job.session.say("sweep: every selected run has its base learning rate")
    for records in experiment.sweep_missing(config, job.data, job.records, job.session):
        job.store(records)


def do_train(config: Config, job: Job) -> None:
    """Train what is not recorded yet, sweeping first where a rate is missing."""
    from unitnorm.table2 import experiment

    if not experiment.missing(config, job.records["runs"]):
        job.session.say("train: every selected run is recorded; --fresh starts over")
        return
    unswept = experiment.missing(config, job.records["sweep"])
    if unswept:
        count = sum(len(group.runs) * len(group.updates) for group in unswept)
        job.session.say(f"train: {count} runs have no base learning rate yet, sweeping first")
        do_sweep(config, job)
    for records in experiment.train_missing(config, job.data, job.records, job.session):
        job.store(records)


def is_the_papers(provenance: dict[str, Any]) -> bool:
    """Whether records may stand beside the paper's: its protocol, from any seed, on MNIST."""
    from unitnorm.table2.config import Config

    mine = provenance["config"] | {"seed": 0}
    return provenance["data"]["name"] == "mnist" and mine == Config().protocol()


def do_report(out: Path) -> None:
    """Print the report and write its files."""
    from unitnorm.run import records
    from unitnorm.table2 import report
    from unitnorm.table2.experiment import unpack_filters
    from unitnorm.table2.schema import SCHEMA

    with records.locked(out, make=False):
        known = records.read(out, SCHEMA)
        if known["runs"].empty:
            raise UserError(
                f"{out}: no records of trained runs here; run `unitnorm train --out {out}` first"
            )
        image_shape = tuple(known.provenance["data"]["image_shape"])
        paper = report.PAPER if is_the_papers(known.provenance) else {}
        files = report.build(
            known["runs"], known["history"], known["sweep"], unpack_filters(known),
            image_shape, paper,
        )  # fmt: skip
        records.write_files(out, files, replacing="figures/filters_depth*")
    print_report(report.show(known["runs"], paper), files, out)


def do_compare(a: Path, b: Path, out: Path) -> None:
    """Print two folders' runs side by side and write the files."""
    from unitnorm.run import records
    from unitnorm.table2 import report
    from unitnorm.table2.schema import SCHEMA

    first, second = (records.read_alone(folder, SCHEMA)["runs"] for folder in (a, b))
    files = report.build_comparison(first, second, (str(a), str(b)))
    with records.locked(out):
        records.write_files(out, files)
    print_report(report.show_comparison(first, second, (str(a), str(b))), files, out)
