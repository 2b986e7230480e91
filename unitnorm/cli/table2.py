"""The commands of Table 2: sweep, train, report, reproduce, verify. Read options, call, print."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unitnorm.cli import options as opt
from unitnorm.errors import UserError
from unitnorm.run.job import Loaded, open_job, so_far

if TYPE_CHECKING:
    from unitnorm.run.planner import Verifiable
    from unitnorm.run.records import Records

OUT = "runs/table2"

shared_options = opt.together(opt.archbn_options, opt.runs_option, opt.training_options(OUT))


def do_training(options: dict[str, Any], *, sweep_only: bool = False, table: bool = False) -> None:
    """Sweep and train what is missing in the folder of a command with `shared_options`."""
    from unitnorm.archbn.config import Config
    from unitnorm.run.planner import complete
    from unitnorm.table2.experiment import Table2, describe_data, list_cells

    training = opt.take_training_options(options)
    config = opt.read_config(Config, **options)

    def load() -> Loaded:
        from unitnorm.data import load_dataset

        data = load_dataset(config.data.dataset, config.data.data_dir)
        config.check_images(len(data.train_labels))
        cells = list_cells(config)
        runs, lines = 0 if sweep_only else len(cells), (data.describe(),)
        return Loaded({"": data}, describe_data(data), runs, cells, lines)

    experiment = Table2(config, sweep_only)
    with open_job(experiment, config, load, training) as job:
        groups = list(experiment.missing(job.records))
        swept = sum(len(group.cells) for group in groups if group.table == "sweep")
        if not groups and sweep_only:
            job.session.say("sweep: every selected run has its base learning rate")
        elif not groups:
            job.session.say("train: every selected run is recorded; --fresh starts over")
        elif swept and not sweep_only:
            job.session.say(f"train: {swept} runs have no base learning rate yet, sweeping first")
        complete(job)
        if table:
            write_report(job.out, job.records)


@click.command(cls=opt.GroupedCommand, short_help="Choose the base learning rate of every run.")
@shared_options
def sweep(**options: Any) -> None:
    """Choose the base learning rate of every run.

    Each candidate trains on 1,000 images for 50 epochs; the lowest error on 500 others wins.

    \b
    Example
      unitnorm sweep --depth 4 --update un
    """
    do_training(options, sweep_only=True)


@click.command(cls=opt.GroupedCommand, short_help="Train every run in full.")
@shared_options
def train(**options: Any) -> None:
    """Train every run in full, at its base learning rate.

    Runs without a recorded sweep are swept first.

    \b
    Example
      unitnorm train --depth 4 --update un --runs 10 --seed 0
    """
    do_training(options)


@click.command(cls=opt.GroupedCommand, short_help="The table and figures, from the records.")
@opt.argument("folders", text="One results folder, or two to compare.  [default: that of --out]",
              nargs=-1, type=click.Path(path_type=Path))  # fmt: skip
@opt.out_option(OUT)
@opt.json_option
@opt.quiet_option
@click.pass_context
def report(context: click.Context, folders: tuple[Path, ...], out: Path, **output: bool) -> None:
    """Table 2 and its figures, from the records alone.

    With two folders, A and B, their runs side by side, and where data and config differ. Runs that
    started alike are compared in pairs, others as two samples; nothing is written without --out.

    \b
    Example
      unitnorm report --out results/table2
      unitnorm report results/table2 results/50-runs --out runs/compared
    """
    given = context.get_parameter_source("out") is not click.core.ParameterSource.DEFAULT
    if len(folders) > 2 or (given and len(folders) == 1):
        named = f"{len(folders)} folders" if len(folders) > 2 else f"{folders[0]} and --out {out}"
        raise UserError(f"report: one folder, or two to compare, not {named}")
    from rich.console import Console

    from unitnorm.run import records
    from unitnorm.table2.report import build_comparison
    from unitnorm.table2.schema import SCHEMA

    if len(folders) < 2:
        out = folders[0] if folders else out
        # the files are written unless another process is at work there
        with records.locked(out, make=False, needed=False) as held:
            known = records.read_to_show(out, SCHEMA, held)
            if progress := so_far(known):
                click.echo(progress)
            if not (progress and known["runs"].empty):
                write_report(out, known, write=held, **output)
        return
    one, other = (records.read_alone(folder, SCHEMA) for folder in folders)
    runs, provenance = (one["runs"], other["runs"]), (one.provenance, other.provenance)
    files, shown = build_comparison(runs, provenance, (str(folders[0]), str(folders[1])))
    if not given:
        Console().print(shown)
        return
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
    do_training(options, table=True)


@click.command("verify", cls=opt.GroupedCommand,
               short_help="Compute a recorded run again and compare.")  # fmt: skip
@opt.selection_option("--depth", type=int, help="Depth of the run.  [default: the first recorded]")
@opt.selection_option("--update", type=opt.UpdateName(),
                      help="Update of the run.  [default: the first recorded]")  # fmt: skip
@opt.selection_option("--run", type=int, help="Number of the run.  [default: the first recorded]")
@opt.data_option("--data-dir", help="Folder with the IDX files, if the records are of such.")
@opt.out_option(OUT)
def verify_command(out: Path, data_dir: str | None, **wanted: Any) -> None:
    """Compute a recorded run again and say whether every bit matches.

    Hashes the records and the data as well. Exit code 0 if all match, 1 if not. In the folder of a
    study, --run is the number of its row in runs.csv.gz, from 0.

    \b
    Example
      unitnorm verify --out results/table2 --depth 4 --update un --run 0
    """
    from rich.console import Console

    from unitnorm.run import devices, progress, records, verify

    devices.prepare()
    from unitnorm.archbn.config import Config
    from unitnorm.data import load_dataset
    from unitnorm.run.config import parse
    from unitnorm.run.loop import Session
    from unitnorm.study.experiment import Study, plan_of
    from unitnorm.study.schema import SCHEMA as STUDY
    from unitnorm.table2.experiment import Table2
    from unitnorm.table2.schema import SCHEMA

    of_study = records.kind_of(out) == "study"
    known = records.read_alone(out, STUDY if of_study else SCHEMA)
    runs, recorded = known["runs"], known.provenance
    chosen = verify.choose(runs.assign(run=runs.index) if of_study else runs, **wanted)
    experiment: Verifiable
    if of_study:
        name = chosen["dataset"].item()
        experiment, about, checks = Study(plan_of(known)), recorded["data"][name], []
    else:
        config = parse(recorded["config"], records.PROVENANCE, Config)
        experiment, about, name = Table2(config), recorded["data"], config.data.dataset
        found = config.fingerprint()
        checks = [verify.compare_hashes("config", recorded["config_sha256"], found)]
    data = load_dataset(name, data_dir)
    checks.append(verify.compare_hashes("data", about["sha256"], data.sha256))
    click.echo(f"records: {len(recorded['files'])} files with the SHA-256 recorded")
    same = True
    with progress.shown(Console(stderr=True)) as shown:
        again = verify.verify(experiment, known, data, chosen, Session(shown, click.echo))
        for check in itertools.chain(checks, again):
            click.echo(f"{check.what}: {check.found}")
            same = same and check.matches
    named = ", ".join(f"{column} {chosen[column].item()}" for column in known.schema.cell)
    click.echo(f"{named}: {'verified' if same else 'DOES NOT MATCH its record'}")
    if not same:
        if note := verify.elsewhere(known.provenance):
            click.echo(f"note: recorded elsewhere, where other bits are to be expected: {note}")
        sys.exit(1)


def write_report(out: Path, known: Records, *, write: bool = True, **output: bool) -> None:
    """Print the report of records; `write` its files too, to a folder that is held."""
    from unitnorm.archbn.config import Config
    from unitnorm.run import records
    from unitnorm.table2 import report
    from unitnorm.table2.experiment import filters_of

    if known["runs"].empty:
        first = f"run `unitnorm train --out {out}` first"
        raise UserError(f"{out}: no records of trained runs here; {first}")
    data, protocol = known.provenance["data"], known.provenance["config"] | {"seed": 0}
    # the paper's figures stand beside runs of its protocol alone, from any seed, on MNIST
    alike = data["name"] == "mnist" and protocol == Config().protocol()
    paper = report.PAPER if alike else {}
    shape, filters = tuple(data["image_shape"]), filters_of(known)
    rows = (known["runs"], known["history"], known["sweep"])
    files, shown = report.build(*rows, filters, shape, paper)
    if write:
        records.write_files(out, files, replacing="figures/filters_depth*")
    opt.print_report(shown, files, out, written=write, **output)
