"""The command `unitnorm study`: read options, call, print."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unitnorm.cli import options as opt
from unitnorm.errors import UserError
from unitnorm.run.job import Job, open_job

if TYPE_CHECKING:
    from unitnorm.run.records import Records
    from unitnorm.study.config import Plan

RUNS = "runs/study"


@click.command(cls=opt.GroupedCommand, short_help="Many runs compared, from a declared plan.")
@opt.argument("plan_name", "Plan: a preset, or a TOML file.", metavar="NAME|FILE",
              type=opt.ConfigName())  # fmt: skip
@opt.option(
    "--data", "places", group=opt.DATA, multiple=True, metavar="NAME=FOLDER",
    help="Where a data set of the plan lies: four IDX files; may be repeated. mnist needs none.",
)  # fmt: skip
@opt.option(
    "--dry-run", group=opt.SELECTION, is_flag=True,
    help="Say how many runs are missing and how long they take; train nothing.",
)  # fmt: skip
@opt.option(
    "--report-only", group=opt.SELECTION, is_flag=True,
    help="Comparisons and figures from what is recorded; train nothing.",
)  # fmt: skip
@opt.option(
    "--page", group=opt.RECORDS, is_flag=True,
    help="Also write index.html beside the folder: one page to explore all studies there.",
)  # fmt: skip
@opt.option(
    "--set", "overrides", group=opt.SELECTION, multiple=True, metavar="KEY=VALUE",
    help="Override any key of the plan, for example --set compare.count=20.",
)  # fmt: skip
@opt.training_options("runs/study")
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
    tuning and fresh ones for comparing, and the comparisons. Records go to --out [default:
    runs/study/NAME]; the same command goes on where it stopped, and seeds may be added later.

    \b
    Example
      unitnorm study study/effective-rate --data fashion=FOLDER
      unitnorm study study/effective-rate --set compare.count=20 --dry-run
    """
    from unitnorm.run.config import find_config
    from unitnorm.study.config import Plan
    from unitnorm.study.schema import SCHEMA

    plan = opt.read_config(Plan, plan_name, overrides)
    training = opt.take_training_options(options)
    if training.out == Path(RUNS):
        training = replace(training, out=Path(RUNS) / Path(plan_name).stem)
    if report_only:
        do_study_report(training.out, page)
        return
    folders = find_folders(plan, places)
    if dry_run:
        do_dry_run(plan, training.out)
        return

    def load_all() -> tuple[Any, ...]:
        from unitnorm.data import load_dataset

        data = {name: load_dataset(name, folders.get(name)) for name in plan.datasets}
        for name in plan.arms:
            for images in data.values():
                plan.config_of(name).check_images(len(images.train_labels), ("train",))
        return data, {name: {"sha256": images.sha256} for name, images in data.items()}, None

    with open_job(SCHEMA, plan, load_all, training) as job:
        do_study(plan, find_config(plan_name), job)
    if job.writes:
        do_study_report(training.out, page)


def find_folders(plan: Plan, places: tuple[str, ...]) -> dict[str, Path]:
    """Where the plan's data sets lie.

    Raises:
      UserError: one is not NAME=FOLDER, or the plan does not have it.
    """
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
    from unitnorm.run.progress import clock
    from unitnorm.run.provenance import committed
    from unitnorm.study.experiment import count_recorded, count_runs, run_study

    plan_file = path.read_bytes()
    declared = tell_when_declared(job.records, plan_file, committed(path))
    records = job.records.with_files({"plan.toml": plan_file})
    job.records = replace(records, provenance={**records.provenance, "plan_committed": declared})
    total = sum(count_runs(plan).values())
    before = sum(count_recorded(plan, records["runs"]).values())
    job.session.say(f"study: {before} of {total} runs are recorded")
    started = time.monotonic()
    for records in run_study(plan, job.data, job.records, job.session):
        job.store(records)
        done = sum(count_recorded(plan, records["runs"]).values())
        pace = (time.monotonic() - started) / max(done - before, 1)
        job.session.say(
            f"study: {done} of {total} runs, {3600 / pace:,.0f} an hour, about "
            f"{clock(pace * max(total - done, 0))} left"
        )


def tell_when_declared(known: Records, plan_file: bytes, committed: str | None) -> str | None:
    """When a plan was committed that goes on from `known`; where it was changed since, both times.

    Args:
      known: the records so far.
      plan_file: the plan as it is now.
      committed: when it was, as far as git knows.
    """
    before = known.provenance.get("plan_committed")
    if "plan.toml" not in known.files:
        return committed
    if known.files["plan.toml"] == plan_file:
        return before
    return f"{before or 'not committed'}, changed {committed or 'not committed'}"


def do_dry_run(plan: Plan, out: Path) -> None:
    """Say what is missing, and for how long: as recorded, or as a part of a run takes here."""
    from unitnorm.run.progress import clock
    from unitnorm.run.records import read
    from unitnorm.study.experiment import count_recorded, count_runs, time_run
    from unitnorm.study.schema import SCHEMA

    known = read(out, SCHEMA)
    asked, done = count_runs(plan), count_recorded(plan, known["runs"])
    for purpose, count in asked.items():
        click.echo(f"{purpose}: {count} runs, {done[purpose]} recorded")
    missing = max(sum(asked.values()) - sum(done.values()), 0)
    commands = known.provenance.get("commands", [])
    rows = sum(command["rows"] for command in commands)
    if rows:
        pace, whence = sum(command["wall_s"] for command in commands) / rows, "as recorded there"
    else:
        from unitnorm.data import load_dataset
        from unitnorm.run import devices

        devices.prepare()
        pace, whence = time_run(plan, load_dataset()), "measured on a few steps"
    click.echo(f"about {clock(pace * missing)} at {pace:.2f} s a run, {whence}")


def do_study_report(out: Path, page: bool) -> None:
    """Write and print what the records show."""
    from unitnorm.run import records
    from unitnorm.study import report
    from unitnorm.study.schema import SCHEMA

    with records.locked(out, make=False):
        known = records.read(out, SCHEMA)
        if known["runs"].empty:
            raise UserError(f"{out}: no runs of a study here; `unitnorm study` records some")
        compared = report.comparisons_of(known)
        files = report.build(known, compared)
        records.write_files(out, files, replacing="figures/*")
    if page:
        beside = sorted(p.parent for p in out.resolve().parent.glob("*/provenance.json"))
        studies = {
            folder.name: records.read_alone(folder, SCHEMA)
            for folder in beside
            if records.kind_of(folder) == "study"
        }
        with records.locked(out.parent):
            records.write_files(out.parent, {"index.html": report.build_index(studies)})
        click.echo(f"{out.parent / 'index.html'}: {', '.join(studies)}")
    opt.print_report(report.show(known, compared), files, out)
