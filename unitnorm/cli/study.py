"""The command `unitnorm study`: read options, call, print."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unitnorm.cli import options as opt
from unitnorm.errors import UserError
from unitnorm.run.job import Job, Loaded, open_job

if TYPE_CHECKING:
    from unitnorm.run.records import Records
    from unitnorm.study.config import Plan
    from unitnorm.study.report import Findings

RUNS = "runs/study/NAME"  # unless --out says otherwise; NAME is the plan's


@click.command(cls=opt.GroupedCommand, short_help="Many runs compared, from a declared plan.")
@opt.argument("plan_name", text="Plan: a preset, or a TOML file.", metavar="NAME|FILE",
              type=opt.ConfigName())  # fmt: skip
@opt.data_option("--data", "places", multiple=True, metavar="NAME=FOLDER",
                 help="Where a data set of the plan lies: four IDX files; may be repeated. "
                 "mnist needs none.")  # fmt: skip
@opt.selection_option("--dry-run", is_flag=True,
                      help="Say how many runs are missing and how long they take; train "
                      "nothing.")  # fmt: skip
@opt.selection_option("--report-only", is_flag=True,
                      help="Comparisons and figures from what is recorded; train "
                      "nothing.")  # fmt: skip
@opt.records_option("--page", is_flag=True,
                    help="Also write index.html beside the folder: one page to explore all "
                    "studies there.")  # fmt: skip
@opt.set_option("plan", "compare.count=20")
@opt.training_options(RUNS)
def study(
    plan_name: str,
    places: tuple[str, ...],
    dry_run: bool,
    report_only: bool,
    page: bool,
    overrides: tuple[str, ...],
    **options: Any,
) -> None:
    """Train what a plan declares, and compare.

    A plan names data sets, depths, arms (an update with its rates, schedule and start), seeds for
    tuning and fresh ones for comparing, and the comparisons. Records go to --out; the same
    command goes on where it stopped, and seeds may be added later.

    \b
    Example
      unitnorm study study/effective-rate --data fashion=FOLDER
      unitnorm study study/effective-rate --set compare.count=20 --dry-run
    """
    from unitnorm.run import records
    from unitnorm.run.config import find_config
    from unitnorm.study.config import Plan
    from unitnorm.study.experiment import Study, count_runs
    from unitnorm.study.schema import SCHEMA

    plan = opt.read_config(Plan, plan_name, overrides)
    training = opt.take_training_options(options)
    if training.out == Path(RUNS):
        training = replace(training, out=Path(RUNS).with_name(Path(plan_name).stem))
    if report_only:
        with records.locked(training.out, make=False):
            write_report(training.out, records.read(training.out, SCHEMA), page)
        return
    folders = find_folders(plan, places)
    if dry_run:
        do_dry_run(plan, training.out)
        return

    def load_all() -> Loaded:
        from unitnorm.data import load_dataset

        data = {}
        for name in plan.datasets:
            try:
                data[name] = load_dataset(name, folders.get(name))
            except UserError as error:  # which knows the option of the other commands
                text = str(error).replace("--data-dir", f"--data {name}=FOLDER")
                raise UserError(text) from None
        for name in plan.arms:
            for images in data.values():
                plan.config_of(name).check_images(len(images.train_labels), ("train",))
        about = {name: {"sha256": images.sha256} for name, images in data.items()}
        lines = tuple(images.describe() for images in data.values())
        return Loaded(data, about, sum(count_runs(plan).values()), lines=lines)

    with open_job(Study(plan), plan, load_all, training) as job:
        do_study(plan, find_config(plan_name), job)
        write_report(training.out, job.records, page)


def find_folders(plan: Plan, places: tuple[str, ...]) -> dict[str, Path]:
    """Where the plan's data sets lie, by name."""
    folders = {}
    for text in places:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise UserError(
                f"--data {text}: expected NAME=FOLDER, for example fashion=datasets/fashion"
            )
        if name not in plan.datasets:
            raise UserError(
                f"--data {name}=…: the plan has no such data set, only {', '.join(plan.datasets)}"
            )
        folders[name] = Path(folder).expanduser()
    return folders


def do_study(plan: Plan, path: Path, job: Job) -> None:
    """Train what is missing, and record it batch by batch, with the plan as it was declared."""
    from unitnorm.run.planner import complete
    from unitnorm.run.progress import clock
    from unitnorm.run.provenance import committed
    from unitnorm.study.experiment import count_recorded, count_runs

    plan_file = path.read_bytes()
    declared = tell_when_declared(job.records, plan_file, committed(path))
    records = job.records.with_files({"plan.toml": plan_file})
    job.records = replace(records, provenance={**records.provenance, "plan_committed": declared})
    total = sum(count_runs(plan).values())
    before = sum(count_recorded(plan, records["runs"]).values())
    job.session.say(f"study: {before} of {total} runs are recorded")
    started = time.monotonic()

    def say_pace(records: Records) -> None:
        done = sum(count_recorded(plan, records["runs"]).values())
        pace = (time.monotonic() - started) / max(done - before, 1)
        left = clock(pace * max(total - done, 0))
        speed = f"{3600 / pace:,.0f} an hour"
        job.session.say(f"study: {done} of {total} runs, {speed}, about {left} left")

    job.after = say_pace
    complete(job)


def tell_when_declared(known: Records, plan_file: bytes, committed: str | None) -> str | None:
    """When the plan of records was committed; where it was changed since, both times."""
    before = known.provenance.get("plan_committed")
    if "plan.toml" not in known.files:
        return committed
    if known.files["plan.toml"] == plan_file:
        return before
    return f"{before or 'not committed'}, changed {committed or 'not committed'}"


def do_dry_run(plan: Plan, out: Path) -> None:
    """Say what is missing, and for how long: as recorded, or as a part of a run takes here."""
    from unitnorm.run.progress import clock
    from unitnorm.run.records import PROVENANCE, Records, read_alone
    from unitnorm.study.experiment import Pace, count_recorded, count_runs, measure_pace
    from unitnorm.study.schema import SCHEMA

    there = os.path.exists(out / PROVENANCE)
    known = read_alone(out, SCHEMA) if there else Records.empty(SCHEMA)
    asked, done = count_runs(plan), count_recorded(plan, known["runs"])
    for purpose, count in asked.items():
        click.echo(f"{purpose}: {count} runs, {done[purpose]} recorded")
    missing = max(sum(asked.values()) - sum(done.values()), 0)
    commands = known.provenance.get("commands", [])
    if rows := sum(command["rows"] for command in commands):
        pace = Pace(sum(command["wall_s"] for command in commands) / rows, 0.0)
        whence = "as recorded there"
    else:
        from unitnorm.data import load_dataset
        from unitnorm.run import devices

        devices.prepare()
        pace, whence = measure_pace(plan, load_dataset()), "measured on a few steps"
    click.echo(f"about {clock(pace.of(plan, missing))} at {pace.run:.2f} s a run, {whence}")


def write_report(out: Path, known: Records, page: bool) -> None:
    """Write and print what the records of a folder show, which is held."""
    from unitnorm.run import records
    from unitnorm.study import report
    from unitnorm.study.page import is_page

    if known["runs"].empty:
        raise UserError(f"{out}: no runs of a study here; `unitnorm study` records some")
    study = report.look(out, known)
    files = report.build(study)
    records.write_files(out, files, replacing="figures/*")
    path = out.resolve().parent / "index.html"
    if page:
        write_page(path, out.resolve(), study)
    elif path.is_file() and is_page(path.read_bytes()):  # which is kept up to date
        try:
            write_page(path, out.resolve(), study)
        except UserError as error:  # such as a training in a folder beside, which goes on
            click.echo(f"{path} is not brought up to date: {error}")
    opt.print_report(report.show(study), files, out)


def write_page(path: Path, mine: Path, study: Findings) -> None:
    """The page and the figure of all studies in the folders beside it, one of which is held."""
    from unitnorm.run import records
    from unitnorm.study import report
    from unitnorm.study.page import build_page
    from unitnorm.study.schema import SCHEMA

    studies = {}
    for folder in sorted(found.parent for found in path.parent.glob("*/provenance.json")):
        if folder == mine:
            studies[folder.name] = study
        elif records.kind_of(folder) == "study":
            studies[folder.name] = report.look(folder, records.read_alone(folder, SCHEMA))
    with records.locked(path.parent):
        files = {path.name: build_page(studies), **report.build_late_rates(studies)}
        records.write_files(path.parent, files)
    click.echo(f"{path}: {', '.join(studies)}")
