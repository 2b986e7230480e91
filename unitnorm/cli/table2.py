"""The commands of Table 2: sweep, train, report, reproduce, verify. Read options, call, print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from unitnorm.cli import options as opt
from unitnorm.errors import UserError
from unitnorm.run.job import Job, open_job, open_recomputation

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


def add_missing(options: dict[str, Any], *, sweep_only: bool = False) -> Job:
    """Sweep and train what is missing in the folder of a command with `shared_options`."""
    from unitnorm.archbn.config import Config
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
        from unitnorm.table2.experiment import sweep_missing, train_missing

        add = sweep_missing if sweep_only else train_missing
        for records in add(config, job.data, job.records, job.session):
            job.store(records)
    return job


@click.command(cls=opt.GroupedCommand, short_help="Choose the base learning rate of every run.")
@shared_options
def sweep(**options: Any) -> None:
    """Choose the base learning rate of every run.

    Each candidate trains on 1,000 images for 50 epochs; the lowest error on 500 others wins.

    \b
    Example
      unitnorm sweep --depth 4 --update un
    """
    add_missing(options, sweep_only=True)


@click.command(cls=opt.GroupedCommand, short_help="Train every run in full.")
@shared_options
def train(**options: Any) -> None:
    """Train every run in full, at its base learning rate.

    Runs without a recorded sweep are swept first.

    \b
    Example
      unitnorm train --depth 4 --update un --runs 10 --seed 0
    """
    add_missing(options)


@click.command(cls=opt.GroupedCommand, short_help="The table and figures, from the records.")
@opt.argument("folders", "One results folder, or two to compare.  [default: that of --out]",
              nargs=-1, type=click.Path(path_type=Path))  # fmt: skip
@opt.out_option(OUT)
@opt.output_options
def report(folders: tuple[Path, ...], out: Path, **output: bool) -> None:
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
    if len(folders) < 2:
        do_report(folders[0] if folders else out, **output)
        return
    from unitnorm.run import records
    from unitnorm.table2.report import build_comparison
    from unitnorm.table2.schema import SCHEMA

    first, second = (records.read_alone(folder, SCHEMA)["runs"] for folder in folders)
    files, shown = build_comparison(first, second, (str(folders[0]), str(folders[1])))
    with records.locked(out):
        records.write_files(out, files)
    opt.print_report(shown, files, out, **output)


@click.command(cls=opt.GroupedCommand, short_help="Sweep, train and report: all of Table 2.")
@shared_options
def reproduce(**options: Any) -> None:
    """Sweep, train and report in a row: Table 2 from nothing.

    \b
    Example
      unitnorm reproduce --config quick --out runs/quick
    """
    job = add_missing(options)
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
    from unitnorm.data import load_dataset
    from unitnorm.table2.verify import choose, elsewhere

    of_study = records.kind_of(out) == "study"
    if of_study:
        from unitnorm.study.schema import SCHEMA
        from unitnorm.study.verify import verify as recompute
    else:
        from unitnorm.table2.schema import SCHEMA
        from unitnorm.table2.verify import verify as recompute
    known = records.read_alone(out, SCHEMA)
    runs = known["runs"]
    chosen = choose(runs.assign(run=runs.index) if of_study else runs, **wanted)
    images = chosen.iloc[0] if of_study else known.provenance["config"]["data"]
    data = load_dataset(images["dataset"], data_dir)
    click.echo(f"records: {len(known.provenance['files'])} files with the SHA-256 recorded")
    same = True
    with open_recomputation() as session:
        for check in recompute(known, data, chosen, session):
            click.echo(f"{check.what}: {check.found}")
            same = same and check.matches
    named = ", ".join(f"{column} {chosen[column].item()}" for column in known.schema.cell)
    click.echo(f"{named}: {'verified' if same else 'DOES NOT MATCH its record'}")
    if not same:
        if note := elsewhere(known.provenance):
            click.echo(f"note: recorded elsewhere, where other bits are to be expected: {note}")
        sys.exit(1)


def do_report(out: Path, **output: bool) -> None:
    """Print the report and write its files."""
    from unitnorm.archbn.config import Config
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
        # the paper's figures stand beside runs of its protocol alone, from any seed, on MNIST
        protocol = known.provenance["config"] | {"seed": 0}
        on_mnist = known.provenance["data"]["name"] == "mnist"
        paper = report.PAPER if on_mnist and protocol == Config().protocol() else {}
        files = report.build(
            known["runs"], known["history"], known["sweep"], unpack_filters(known),
            image_shape, paper,
        )  # fmt: skip
        records.write_files(out, files, replacing="figures/filters_depth*")
    opt.print_report(report.show(known["runs"], paper), files, out, **output)
