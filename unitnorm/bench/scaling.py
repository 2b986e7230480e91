"""Cost and memory of our program against runs, depth, variants, devices and processes.

Each point is measured in a process of its own, so that its peak memory is its own. Runs are counted
as networks that train at once: 20 are Table 2's of a depth, 10 of each update. A study has few
seeds and many variants of each: updates, rates, schedules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from unitnorm.archbn.training import CPU_BLOCK
from unitnorm.bench import figures, measure
from unitnorm.bench.compare import IMAGES, OURS, UPDATES
from unitnorm.bench.measure import Contestant, Measurement, Say, Spread
from unitnorm.report.tables import Cells
from unitnorm.run.devices import count_cores

RUNS = (10, 20, 50, 100, 200)
DEPTHS = (2, 4, 8, 16)
VARIANTS = (1, 2, 4, 8, 16, 32, 64)
RUN_EPOCHS = 25  # of a run, for runs per hour
TABLE2, STUDY = "table 2", "study"
COLUMNS = [
    "way", "runs", "variants", "depth", "devices", "processes", "images", "epoch_s", "low", "high",
    "samples_per_s", "runs_per_hour", "peak_memory_mb", "device_memory_mb",
]  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """What is measured in one process, or in several that work together."""

    runs: int
    depth: int
    devices: int | None = None  # of each process, if they are CPUs; None: one per core
    processes: int = 1
    variants: int = len(UPDATES)  # of each seed
    way: str = TABLE2

    def contestant(self, images: int) -> Contestant:
        """The program of this size; a single variant is UN's."""
        updates = UPDATES if self.variants > 1 else UPDATES[-1:]
        options = {
            "depth": self.depth,
            "seeds": self.runs // self.variants,
            "updates": updates,
            "variants": self.variants // len(updates),
            "images": images,
            "devices_used": self.devices,
        }
        return Contestant("program", options, self.processes, joint=self.processes > 1)


def list_points(cores: int, quick: bool = False) -> list[Setup]:
    """Runs and variants at depth 2, depths at 20 runs, and 20 runs on fewer devices and processes.

    The cores are shared among devices and processes that divide them evenly. The points of a study
    have as many seeds as the cores compute at once. `quick`: a few of them.
    """
    seeds, table2 = CPU_BLOCK * cores, OURS.runs
    runs, depths, variants = (
        (RUNS[:2], DEPTHS[1:2], VARIANTS[::3]) if quick else (RUNS, DEPTHS[1:], VARIANTS)
    )
    points = [Setup(count, 2) for count in runs] + [Setup(table2, depth) for depth in depths]
    points += [Setup(seeds * count, 2, variants=count, way=STUDY) for count in variants]
    if not quick:
        points += [Setup(table2, 2, 2**i) for i in range(16) if 2**i < cores]
        points += [Setup(table2, 2, cores // 2, 2)] if cores >= 2 and cores % 2 == 0 else []
    return points


def measure_points(
    points: Sequence[Setup], rounds: int, images: int = IMAGES, *, say: Say = lambda _: None
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Measure every point.

    Args:
      points: what to measure; those on fewer devices or several processes are left out on GPUs and
        TPUs, whose number cannot be chosen here.
      rounds: repetitions, after those to warm up; at least 1.
      images: training images of an epoch.
      say: told what is being done.

    Returns:
      A row of `COLUMNS` for each point; low and high are the fastest and the slowest epoch, in
      seconds; `runs_per_hour` of `RUN_EPOCHS` epochs of `IMAGES` images; memory in MB (10⁶ bytes),
      `device_memory_mb` empty where it is the computer's own. And the device, as
      `run.provenance.device` gives it.

    Raises:
      UserError: a process fails, for instance because the memory is full.
    """
    rows: list[list[Any]] = []
    device: dict[str, Any] = {}
    for point in points:
        if device.get("platform", "cpu") != "cpu" and (point.devices or point.processes > 1):
            continue
        say(
            f"{point.way}: runs {point.runs}, variants {point.variants}, depth {point.depth}, "
            f"processes {point.processes}"
        )
        with measure.started({"program": point.contestant(images)}) as (workers, _):
            worker = workers["program"]
            answers = measure.take_turns(workers, rounds)["program"]
        device = device or worker.about["device"]
        seconds = Spread.of([answer["seconds"] for answer in answers])
        speed = worker.samples / seconds.median
        rows.append(
            [point.way, point.runs, point.variants, point.depth, worker.about["device"]["count"],
             point.processes, images, *seconds, speed, speed * 3600 / (RUN_EPOCHS * IMAGES),
             answers[-1]["peak_memory_mb"], answers[-1].get("device_memory_mb")]
        )  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS), device


def measure_scaling(rounds: int, images: int, *, quick: bool, say: Say) -> Measurement:
    """`measure_points` of all points, with its files and its table."""
    frame, device = measure_points(list_points(count_cores(), quick), rounds, images, say=say)
    facts = {
        "device": device,
        "rounds": rounds,
        "what": "epochs of `unitnorm train` (table 2), and with few seeds and many variants of "
        "each (study): runs are networks trained at once, images the training images of an epoch; "
        "low and high the fastest and the slowest of the rounds; runs per hour those of "
        f"{RUN_EPOCHS} epochs of {IMAGES:,} images",
    }
    drawn = {"": figures.draw_scaling(frame)}
    return Measurement("scaling", {"": frame}, make_cells(frame), facts, drawn)


def make_cells(frame: pd.DataFrame) -> Cells:
    """Seconds and memory of every point."""
    rows = [
        {
            "way": row["way"],
            **{name: str(row[name]) for name in ("runs", "variants", "depth", "devices")},
            "proc.": str(row["processes"]),
            "epoch s": f"{row['epoch_s']:.2f}",
            "samples/s": f"{row['samples_per_s']:,.0f}",
            "runs/h": f"{row['runs_per_hour']:,.0f}",
            "peak MB": f"{row['peak_memory_mb']:,.0f}",
        }
        for row in frame.to_dict("records")
    ]
    remarks = measure.list_remarks(list_remarks(frame))
    return Cells("Seconds of an epoch, and memory", pd.DataFrame(rows), remarks)


def list_remarks(frame: pd.DataFrame) -> Iterator[str]:
    """The cost of evidence, and whether cost and memory grow in proportion."""
    common = frame[(frame["devices"] == frame["devices"].max()) & (frame["processes"] == 1)]
    parts = {
        "runs": common[(common["way"] == TABLE2) & (common["depth"] == 2)],
        "depth": common[(common["way"] == TABLE2) & (common["runs"] == OURS.runs)],
        "variants": common[common["way"] == STUDY],
    }
    usual = parts["runs"][parts["runs"]["runs"] == OURS.runs]
    told = f"runs an hour at depth 2, each of {RUN_EPOCHS} epochs of {IMAGES:,} images"
    for row in usual.to_dict("records"):
        yield f"Table 2's way: {row['runs_per_hour']:,.0f} {told}."
    best = parts["variants"].sort_values("samples_per_s", ascending=False).head(1)
    for row in best.to_dict("records"):
        yield (
            f"With the best number of variants of each of few seeds, {row['variants']}: "
            f"{row['runs_per_hour']:,.0f} {told}."
        )
    for column, part in parts.items():
        if len(part) > 1:
            first, *_, last = part.sort_values(column).to_dict("records")
            yield (
                f"{column} × {last[column] / first[column]:.0f}: "
                f"time × {last['epoch_s'] / first['epoch_s']:.1f}, "
                f"memory × {last['peak_memory_mb'] / first['peak_memory_mb']:.1f}"
            )
