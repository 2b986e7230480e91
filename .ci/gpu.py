"""All that is to be measured and trained on a GPU, in calls of a few minutes: `make gpu`.

Each step is a command of `unitnorm` with a folder and a log of its own under OUT/DEVICE. A call
takes the steps in turn. When its time is up it asks the command to stop, as Ctrl-C would; the next
call goes on from the records and checkpoints. `gpu.csv` says how far it all is.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout need not be installed

import click
import pandas as pd
from rich.console import Console

from unitnorm.bench.measure import find_device, slug
from unitnorm.errors import UserError
from unitnorm.report.tables import Cells, Fitting
from unitnorm.run import records
from unitnorm.run.config import load, presets
from unitnorm.study.config import Plan
from unitnorm.study.experiment import count_recorded, count_runs
from unitnorm.study.schema import SCHEMA

UNITNORM = (sys.executable, "-m", "unitnorm")
GRACE_S = 60.0  # to finish an epoch and save; then it is killed, which costs no finished epoch


class Step(NamedTuple):
    """A command of `unitnorm`."""

    name: str
    words: Sequence[str]
    whole: bool = False  # it starts anew where another goes on
    lacks: str = ""  # what has to be given for it


STEPS = (
    Step("table2-compiling", ("reproduce",)),
    Step("table2-compiled", ("reproduce",)),  # again, with the programs of the first time
    Step("bench", ("bench", "--rounds", "3"), whole=True),
    Step("bench-updates", ("bench", "--updates"), whole=True),
    Step("bench-kernels", ("bench", "--kernels"), whole=True),
)


def list_studies(results: Path, data: Mapping[str, str]) -> Iterator[Step]:
    """The plans in `configs/study` that `results` does not hold whole; those for a GPU alone last.

    `data` has folders of the data sets that the package does not bring.
    """
    names = [name for name in presets() if name.startswith("study/") and "template" not in name]
    for name in sorted(names, key=lambda name: name.endswith("-gpu")):
        plan, folder = load(name, None, Plan), results / name
        if (folder / records.PROVENANCE).exists():
            runs = records.read_alone(folder, SCHEMA)["runs"]
            if count_recorded(plan, runs) == count_runs(plan):
                continue
        others = [dataset for dataset in plan.datasets if dataset != "mnist"]
        lacks = " ".join(f"--data {x}=FOLDER" for x in others if x not in data)
        given = [word for x in others if x in data for word in ("--data", f"{x}={data[x]}")]
        # seldom, for a state of thousands of runs is gigabytes
        yield Step(name, ("study", name, *given, "--checkpoint-every", "60"), lacks=lacks)


def run_step(step: Step, out: Path, seconds: float) -> tuple[str, str]:
    """Run a command for so long at most; its state, and what it said last or how much is left."""
    name = step.name.replace("/", "-")
    # its own cache is empty at first, so that the first step compiles
    given = {"UNITNORM_CACHE": str(out / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*UNITNORM, *step.words, "--out", str(out / name)]
    stopped = {130, -signal.SIGINT}  # the exit codes of a command that was asked to stop
    with open(out / f"{name}.log", "a+", encoding="utf-8") as log:
        begin = log.tell()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | given)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            process.kill()
            stopped.add(-signal.SIGKILL)  # otherwise the system's, for want of memory, say
        finally:
            code = process.wait()
        log.seek(begin)
        said = [line.strip() for line in log if line.strip()] or [""]
    if code in stopped:
        return "goes on", next((line for line in said[::-1] if line.endswith(" left")), said[-1])
    return ("failed", said[-1]) if code else ("done", "")


def work(steps: Sequence[Step], out: Path, minutes: float) -> pd.DataFrame:
    """Take the steps in turn until the time is up; a row for each, as in `gpu.csv`.

    A step that starts anew each time, and did not fit into a call, waits for the others.
    """
    known, end = out / "gpu.csv", time.monotonic() + 60 * minutes
    rows: dict[str, dict[Any, Any]] = {
        step.name: {"step": step.name, "state": "waiting", "calls": 0, "seconds": 0.0, "said": ""}
        for step in steps
    }
    if known.exists():
        before = pd.read_csv(known, keep_default_na=False).to_dict("records")
        rows |= {row["step"]: row for row in before if row["step"] in rows}
    for step in sorted(steps, key=lambda step: step.whole and rows[step.name]["calls"]):
        row, started = rows[step.name], time.monotonic()
        if step.lacks:
            row |= {"state": "skipped", "said": f"needs {step.lacks}"}
        elif row["state"] != "done" and started < end:
            click.echo(f"{step.name}: {(end - started) / 60:.1f} minutes at most")
            row["state"], row["said"] = run_step(step, out, end - started)
            earlier = 0.0 if step.whole else row["seconds"]
            row["seconds"] = round(earlier + time.monotonic() - started, 1)
            row["calls"] += 1
        table = pd.DataFrame(rows.values())
        records.write_files(out, {known.name: table.to_csv(index=False).encode()})
    return table


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="runs/gpu", show_default=True,
              help="Folder; the results go to OUT/DEVICE.")  # fmt: skip
@click.option("--results", type=click.Path(path_type=Path), default="results", show_default=True,
              help="Folder of what is recorded already.")  # fmt: skip
@click.option("--data", multiple=True, metavar="NAME=FOLDER",
              help="Where a study's data set lies; may be repeated.")  # fmt: skip
@click.option("--minutes", type=click.FloatRange(0.0, 600), default=8.0, show_default=True,
              help="Of this call; the next one goes on.")  # fmt: skip
def main(out: Path, results: Path, data: tuple[str, ...], minutes: float) -> None:
    """Measure and train on a GPU as far as a call's minutes reach; exit code 1 if a step failed."""
    folders = {name: folder for name, _, folder in (text.partition("=") for text in data)}
    try:
        out /= slug(find_device())
        with records.locked(out):
            frame = work([*STEPS, *list_studies(results, folders)], out, minutes)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    Console().print(Fitting(Cells("On a GPU", frame.map(str))))
    sys.exit(int("failed" in set(frame["state"])))


if __name__ == "__main__":
    main()
