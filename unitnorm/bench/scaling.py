"""Cost and memory of our program against runs, depth, devices and processes.

Each point is measured in a process of its own, so that its peak memory is its own. Runs are counted
as networks that train at once: 20 are Table 2's of a depth, 10 of each update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from unitnorm.bench import figures, measure
from unitnorm.bench.compare import IMAGES, SEEDS, UPDATES
from unitnorm.bench.measure import Contestant, Spread
from unitnorm.report.tables import Cells

RUNS = (10, 20, 50, 100, 200)
DEPTHS = (2, 4, 8, 16)
COLUMNS = [
    "runs", "depth", "devices", "processes", "images", "epoch_s", "low", "high", "samples_per_s",
    "peak_memory_mb", "device_memory_mb",
]  # fmt: skip


@dataclass(frozen=True)
class Point:
    """What is measured in one process, or in several that work together."""

    runs: int
    depth: int
    devices: int | None = None  # of each process, if they are CPUs; None: one per core
    processes: int = 1

    def contestant(self, images: int) -> Contestant:
        """The program of this size."""
        options = {
            "depth": self.depth,
            "seeds": self.runs // len(UPDATES),
            "updates": UPDATES,
            "images": images,
            "devices_used": self.devices,
        }
        return Contestant("program", options, self.processes)


def points(cores: int) -> list[Point]:
    """Runs at depth 2, depths at 20 runs, and 20 runs of depth 2 on fewer devices and as processes.

    The cores are shared among devices and processes that divide them evenly.
    """
    table2 = SEEDS * len(UPDATES)
    sizes = [Point(runs, 2) for runs in RUNS] + [Point(table2, depth) for depth in DEPTHS[1:]]
    fewer = [2**power for power in range(16) if 2**power < cores]
    on_fewer = [Point(table2, 2, devices) for devices in fewer]
    shared = [Point(table2, 2, cores // 2, 2)] if cores >= 2 and cores % 2 == 0 else []
    return sizes + on_fewer + shared


def scaling(
    places: Sequence[Point],
    rounds: int,
    images: int = IMAGES,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Measure every point.

    Args:
      places: what to measure; those on fewer devices or several processes are left out on GPUs and
        TPUs, whose number cannot be chosen here.
      rounds: repetitions, after those to warm up; at least 1.
      images: training images of an epoch.
      say: told what is being done.

    Returns:
      A row of `COLUMNS` for each point; low and high are the fastest and the slowest epoch, in
      seconds; memory in MB (10⁶ bytes), `device_memory_mb` empty where it is the computer's own.
      And the device, as `experiment.device` gives it.

    Raises:
      UserError: a process fails, for instance because the memory is full.
    """
    rows: list[dict[str, Any]] = []
    device: dict[str, Any] = {}
    for place in places:
        if device.get("platform", "cpu") != "cpu" and (place.devices or place.processes > 1):
            continue
        say(f"{place.runs} runs, depth {place.depth}, processes {place.processes}")
        with measure.started({"program": place.contestant(images)}) as (workers, _):
            worker = workers["program"]
            answers = measure.take_turns(workers, rounds)["program"]
        device = device or worker.about["device"]
        seconds = Spread.of([answer["seconds"] for answer in answers])
        rows.append(
            {
                "runs": place.runs,
                "depth": place.depth,
                "devices": worker.about["device"]["count"],
                "processes": place.processes,
                "images": images,
                "epoch_s": seconds.median,
                "low": seconds.low,
                "high": seconds.high,
                "samples_per_s": worker.about["samples"] / seconds.median,
                "peak_memory_mb": answers[-1]["peak_memory_mb"],
                "device_memory_mb": answers[-1].get("device_memory_mb"),
            }
        )
    return pd.DataFrame(rows, columns=COLUMNS), device


def files(
    frame: pd.DataFrame, device: dict[str, Any], rounds: int, done: dict[str, Any]
) -> dict[str, bytes]:
    """The files of the results folder, by name; `done` as `measure.provenance` gives it."""
    facts = {
        **done,
        "device": device,
        "rounds": rounds,
        "what": "epochs of `unitnorm train`: runs are networks trained at once, images the "
        "training images of an epoch; low and high the fastest and the slowest of the rounds",
    }
    decimals = {"epoch_s": 4, "low": 4, "high": 4, "samples_per_s": 0, "peak_memory_mb": 0,
                "device_memory_mb": 0}  # fmt: skip
    drawn = figures.encode(figures.scaling(frame))
    return {
        "bench/scaling.csv": frame.round(decimals).to_csv(index=False).encode(),
        "bench/scaling.json": measure.as_json(facts),
        "bench/scaling.md": measure.as_markdown(table(frame), growth(frame)),
        **{f"bench/scaling.{ending}": content for ending, content in drawn.items()},
    }


def table(frame: pd.DataFrame) -> Cells:
    """Seconds and memory of every point."""
    header = ["runs", "depth", "devices", "processes", "epoch s", "samples/s", "peak MB"]
    rows = [
        [
            *map(str, (row.runs, row.depth, row.devices, row.processes)),
            f"{row.epoch_s:.2f}",
            f"{row.samples_per_s:,.0f}",
            f"{row.peak_memory_mb:,.0f}",
        ]
        for row in frame.itertuples(index=False)
    ]
    return Cells("Seconds of an epoch, and memory", pd.DataFrame(rows, columns=header))


def growth(frame: pd.DataFrame) -> list[str]:
    """Whether cost and memory grow in proportion, a line for runs and one for depth."""
    lines = []
    common = frame[(frame["devices"] == frame["devices"].max()) & (frame["processes"] == 1)]
    for column, other, value in (("runs", "depth", 2), ("depth", "runs", SEEDS * len(UPDATES))):
        part = common[common[other] == value].sort_values(column)
        if len(part) > 1:
            first, last = part.iloc[0], part.iloc[-1]
            lines.append(
                f"{column} × {last[column] / first[column]:.0f}: "
                f"time × {last['epoch_s'] / first['epoch_s']:.1f}, "
                f"memory × {last['peak_memory_mb'] / first['peak_memory_mb']:.1f}"
            )
    return lines
