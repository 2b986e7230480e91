"""Cost and memory of our program against runs, depth, variants and devices.

Each point is measured in a process of its own, so that its peak memory is its own. Runs are counted
as networks that train at once: 20 are Table 2's of a depth, 10 of each update. A study has few
seeds and many variants of each: updates, rates, schedules.
"""

from typing import NamedTuple

import pandas as pd

from unitnorm.bench import figures, measure
from unitnorm.bench.compare import IMAGES, OURS, UPDATES
from unitnorm.bench.measure import Contestant, Measurement, Say

RUNS = (10, 20, 50, 100, 200)
DEPTHS = (4, 8, 16)
VARIANTS = (1, 2, 4, 8, 16, 32, 64)
SEEDS_PER_CORE = 2  # of a study's points
RUN_EPOCHS = 25  # of a run, for runs per hour
COLUMNS = [
    "way", "runs", "variants", "depth", "devices", "images", "epoch_s", "low", "high",
    "samples_per_s", "runs_per_hour", "peak_memory_mb", "device_memory_mb",
]  # fmt: skip


class Point(NamedTuple):
    """What is measured in one process."""

    runs: int
    depth: int
    devices: int | None = None  # if they are CPUs; None: one per core
    variants: int = len(UPDATES)  # of each seed
    way: str = "table 2"

    def contestant(self, images: int) -> Contestant:
        """The program of this size; a single variant is UN's."""
        updates = UPDATES if self.variants > 1 else UPDATES[-1:]
        options = {
            "depth": self.depth, "seeds": self.runs // self.variants, "updates": updates,
            "variants": self.variants // len(updates), "images": images,
            "devices_used": self.devices,
        }  # fmt: skip
        return Contestant("contestants.program", options)


def list_points(cores: int, quick: bool) -> list[Point]:
    """Runs and variants at depth 2, depths at 20 runs, and 20 runs on fewer devices.

    A study has as many seeds as the cores compute at once.
    """
    seeds, table2 = SEEDS_PER_CORE * cores, OURS.runs
    fewer = [2**i for i in range(16) if 2**i < cores]
    return [
        *(Point(count, 2) for count in RUNS[: 2 if quick else None]),
        *(Point(table2, depth) for depth in DEPTHS[: 1 if quick else None]),
        *(Point(seeds * n, 2, variants=n, way="study") for n in VARIANTS[:: 3 if quick else 1]),
        *(Point(table2, 2, count) for count in fewer if not quick),
    ]


def measure_scaling(rounds: int, *, quick: bool, say: Say) -> Measurement:
    """Measure every point; `quick`: fewer, with a tenth of the images.

    Low and high are the fastest and the slowest epoch, in seconds; `runs_per_hour` of `RUN_EPOCHS`
    epochs of `IMAGES` images; memory in MB (10⁶ bytes), `device_memory_mb` empty where it is the
    computer's own.
    """
    device, images = measure.find_device(), IMAGES // 10 if quick else IMAGES
    cores = device["count"] if device["platform"] == "cpu" else 1  # GPUs are taken all
    points = {point: point.contestant(images) for point in list_points(cores, quick)}
    rows = []
    for point, found in measure.one_by_one(points, rounds, say):
        seconds, last = found.range_of("seconds"), found.answers[-1]
        speed = found.samples / seconds.median
        rows.append(
            [point.way, point.runs, point.variants, point.depth, found.about["device"]["count"],
             images, *seconds, speed, speed * 3600 / (RUN_EPOCHS * IMAGES),
             last["peak_memory_mb"], last.get("device_memory_mb")]
        )  # fmt: skip
    frame = pd.DataFrame(rows, columns=COLUMNS)
    facts = {
        "device": device,
        "rounds": rounds,
        "what": "epochs of `unitnorm train` (table 2), and with few seeds and many variants of "
        "each (study): runs are networks trained at once, images the training images of an epoch; "
        "low and high the fastest and the slowest of the rounds; runs per hour those of "
        f"{RUN_EPOCHS} epochs of {IMAGES:,} images",
    }
    columns = {
        **{name: f"{{{name}}}" for name in ("way", "runs", "variants", "depth", "devices")},
        "epoch s": "{epoch_s:.2f}", "samples/s": "{samples_per_s:,.0f}",
        "runs/h": "{runs_per_hour:,.0f}", "peak MB": "{peak_memory_mb:,.0f}",
    }  # fmt: skip
    remark = f"runs/h: of {RUN_EPOCHS} epochs of {IMAGES:,} images each."
    cells = measure.make_cells("Seconds of an epoch, and memory", frame, columns, [remark])
    return Measurement("scaling", {"": frame}, cells, facts, {"": figures.draw_scaling(frame)})
