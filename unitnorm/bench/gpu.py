"""All that is to be measured and trained on a GPU, in calls of a few minutes: `make gpu`.

Each step is a command of `unitnorm` with a folder and a log of its own under OUT/DEVICE. A call
takes the steps in turn. When its time is up it asks the command to stop, as Ctrl-C would; the next
call goes on from the records and checkpoints. `gpu.csv`, `.json` and `.md` say how far all is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import pandas as pd
from rich.console import Console

from unitnorm.bench.compare import IMAGES
from unitnorm.bench.measure import Measurement, find_device, make_cells, slug
from unitnorm.errors import UserError
from unitnorm.report.tables import Fitting
from unitnorm.run import records
from unitnorm.run.config import PRESETS, presets
from unitnorm.run.job import command_line

GRACE_S = 60.0  # to finish an epoch and save; then it is killed, which costs no finished epoch
STOPPED = (130, -signal.SIGINT, -signal.SIGKILL)  # exit codes of a command that was told to stop
COLUMNS = ["step", "state", "calls", "seconds", "said"]


class Step(NamedTuple):
    """A command of `unitnorm`."""

    name: str
    words: Sequence[str]
    whole: bool = False  # it starts anew where another goes on
    lacks: str = ""  # what has to be given for it


STEPS = (
    Step("table2-compiling", ("reproduce",)),
    Step("table2-compiled", ("reproduce",)),
    Step("bench", ("bench", "--rounds", "3"), whole=True),
    Step("bench-updates", ("bench", "--updates"), whole=True),
    Step("bench-kernels", ("bench", "--kernels"), whole=True),
)


def list_studies(results: Path, data: Mapping[str, str]) -> Iterator[Step]:
    """The studies among the presets that are not complete, the ones for a GPU alone last.

    Args:
      results: folder of what is recorded already.
      data: folders of the data sets that the package does not bring.
    """
    copied = "study/template"  # a plan to start from
    studies = [name for name in presets() if name.startswith("study/") and name != copied]
    for name in sorted(studies, key=lambda name: name.endswith("-gpu")):
        plan = tomllib.loads((PRESETS / f"{name}.toml").read_text(encoding="utf-8"))
        others = [dataset for dataset in plan.get("datasets", []) if dataset != "mnist"]
        lacks = " ".join(f"--data {x}=FOLDER" for x in others if x not in data)
        given = [word for x in others if x in data for word in ("--data", f"{x}={data[x]}")]
        if not is_complete(name, results / name):
            yield Step(name, ("study", name, *given), lacks=lacks and f"needs {lacks}")


def is_complete(study: str, folder: Path) -> bool:
    """Whether all runs of a study are recorded in a folder."""
    if not (folder / records.PROVENANCE).exists():
        return False
    command = [sys.executable, "-m", "unitnorm", "study", study, "--dry-run", "--out", str(folder)]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    counts = [line.split() for line in told.splitlines() if line.endswith(" recorded")]
    return bool(counts) and all(words[1] == words[3] for words in counts)


def run_step(step: Step, out: Path, seconds: float) -> tuple[str, str]:
    """Run a command for so long at most; its state, and what it said last or how much is left."""
    name = step.name.replace("/", "-")
    command = [sys.executable, "-m", "unitnorm", *step.words, "--out", str(out / name)]
    own_cache = {"UNITNORM_CACHE": str(out / "cache")}  # empty at first: the first step compiles
    with open(out / f"{name}.log", "a+", encoding="utf-8") as log:
        begin = log.tell()
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **own_cache})
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            process.kill()
        finally:
            code = process.wait()
        log.seek(begin)
        said = [line.strip() for line in log if line.strip()] or [""]
    if code in STOPPED:
        return "goes on", next((line for line in said[::-1] if line.endswith(" left")), said[-1])
    return ("failed", said[-1]) if code else ("done", "")


def work(steps: Sequence[Step], out: Path, minutes: float) -> pd.DataFrame:
    """Take the steps in turn until the time is up.

    A step that starts anew each time, and did not fit into a call, waits for the others.

    Returns:
      A row of `COLUMNS` for each step, as it is in `gpu.csv` after each of them.
    """
    known, end = out / "gpu.csv", time.monotonic() + 60 * minutes
    frame = pd.DataFrame([[s.name, "waiting", 0, 0.0, ""] for s in steps], columns=COLUMNS)
    frame = frame.set_index("step")
    if known.exists():
        frame.update(pd.read_csv(known, keep_default_na=False).set_index("step"))
    calls = frame["calls"].to_dict()
    for step in sorted(steps, key=lambda step: int(step.whole and calls[step.name])):
        state, _, seconds, said = frame.loc[step.name]
        started = time.monotonic()
        if step.lacks:
            frame.loc[step.name, ["state", "said"]] = "skipped", step.lacks
        elif state != "done" and started < end:
            click.echo(f"{step.name}: {(end - started) / 60:.1f} minutes at most")
            state, said = run_step(step, out, end - started)
            before = 0.0 if step.whole else float(str(seconds))
            seconds = time.monotonic() - started + before
            frame.loc[step.name] = state, calls[step.name] + 1, round(seconds, 1), said
        records.write_files(out, {known.name: frame.to_csv().encode()})
    return frame.reset_index()


def summarise(frame: pd.DataFrame, out: Path, device: dict[str, Any]) -> Measurement:
    """The steps, and geoopt's loop beside Table 2's forty runs as far as both are measured."""
    seconds = dict(frame[frame["state"] == "done"][["step", "seconds"]].to_numpy().tolist())
    speeds, runs = out / "bench" / f"{slug(device)}.csv", out / "table2-compiled" / "runs.csv"
    facts: dict[str, Any] = {"device": device, "seconds": seconds}
    remarks = ["table2-compiled: Table 2 again, with the programs that the first time compiled."]
    if {"bench", "table2-compiled"} <= seconds.keys():
        peer = pd.read_csv(speeds).query("name == 'geoopt'").groupby("depth")["samples_per_s"].max()
        images = IMAGES * pd.read_csv(runs).groupby("depth")["epochs"].sum()
        if peer.empty:
            remarks.append("geoopt's loop is not measured: torch or geoopt is not installed.")
        else:
            facts["geoopt_s"] = needs = float((images / peer).sum())
            times = needs / seconds["table2-compiled"]
            remarks.append(f"geoopt's loop needs {needs:,.0f} s for these runs, × {times:,.0f}.")
    cells = make_cells("On a GPU", frame, {name: f"{{{name}}}" for name in COLUMNS}, remarks)
    return Measurement("gpu", {"": frame}, cells, facts)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="runs/gpu", show_default=True,
              help="Folder; the results go to OUT/DEVICE.")  # fmt: skip
@click.option("--results", type=click.Path(path_type=Path), default="results", show_default=True,
              help="Folder of what is recorded already.")  # fmt: skip
@click.option("--data", "places", multiple=True, metavar="NAME=FOLDER",
              help="Where a study's data set lies; may be repeated.")  # fmt: skip
@click.option("--minutes", type=click.FloatRange(0.0, 600), default=8.0, show_default=True,
              help="Of this call; the next one goes on.")  # fmt: skip
def main(out: Path, results: Path, places: tuple[str, ...], minutes: float) -> None:
    """Measure and train on a GPU as far as a call's minutes reach; exit code 1 if a step failed."""
    started = time.time()
    try:
        device = find_device()
        out /= slug(device)
        with records.locked(out):
            data = dict(place.split("=", 1) for place in places if "=" in place)
            frame = work([*STEPS, *list_studies(results, data)], out, minutes)
            made = summarise(frame, out, device)
            files = made.files(command_line(), started, time.time() - started)
            records.write_files(out, files)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    Console().print(Fitting(made.cells))
    click.echo(f"{len(files)} files in {out}{os.sep}")
    sys.exit(int("failed" in set(frame["state"])))


if __name__ == "__main__":
    main()
