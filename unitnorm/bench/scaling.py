"""Cost and memory of our program against runs, depth, variants and devices.

Each point is measured in a process of its own, so that its peak memory is its own. Runs are counted
as networks that train at once: 20 are Table 2's of a depth, 10 of each update. A study has few
seeds and many variants of each: updates, rates, schedules.
"""

from collections.abc import Iterator
from typing import Any

from unitnorm.bench import figures
from unitnorm.bench.compare import IMAGES, SEEDS, UPDATES
from unitnorm.bench.measure import Contestant, Found
from unitnorm.bench.survey import Device, Survey

RUNS = (10, 20, 50, 100, 200)
TABLE2 = SEEDS * len(UPDATES)
DEPTHS = (4, 8, 16)
VARIANTS = (1, 2, 4, 8, 16, 32, 64)
SEEDS_PER_CORE = 2  # of a study's points, which has as many as the cores compute at once
RUN_EPOCHS = 25  # of a run, for runs per hour


def list_points(cores: int, images: int, quick: bool) -> Iterator[Contestant]:
    """Runs and variants at depth 2, depths at 20 runs, and 20 runs on fewer devices."""

    def point(
        runs: int, depth: int, variants: int = 2, way: str = "table 2", devices: int | None = None
    ) -> Contestant:
        updates = UPDATES if variants > 1 else UPDATES[-1:]
        options = {
            "depth": depth, "seeds": runs // variants, "updates": updates,
            "variants": variants // len(updates), "images": images, "devices_used": devices,
        }  # fmt: skip
        row = {"way": way, "runs": runs, "variants": variants, "depth": depth}
        return Contestant("contestants.program", options, row=row)

    for runs in RUNS[:2] if quick else RUNS:
        yield point(runs, 2)
    for depth in DEPTHS[:1] if quick else DEPTHS:
        yield point(TABLE2, depth)
    for variants in VARIANTS[::3] if quick else VARIANTS:
        yield point(SEEDS_PER_CORE * cores * variants, 2, variants, "study")
    for devices in () if quick else (2**i for i in range(16) if 2**i < cores):
        yield point(TABLE2, 2, devices=devices)


def rows(found: list[Found]) -> Iterator[dict[str, Any]]:
    """Memory in MB (10⁶ bytes), `device_memory_mb` empty where it is the computer's own."""
    for each in found:
        seconds, last = each.range_of("seconds"), each.answers[-1]
        speed = each.samples / seconds.median
        yield {
            **each.row, "devices": each.about["device"]["count"],
            "images": each.samples // each.row["runs"], **seconds.named("epoch_s"),
            "samples_per_s": speed, "runs_per_hour": speed * 3600 / (RUN_EPOCHS * IMAGES),
            "peak_memory_mb": last["peak_memory_mb"],
            "device_memory_mb": last.get("device_memory_mb"),
        }  # fmt: skip


def survey(device: Device, quick: bool) -> Survey:
    """Every point; `quick`: fewer, with a tenth of the images."""
    cores = device["count"] if device["platform"] == "cpu" else 1  # GPUs are taken all
    images = IMAGES // 10 if quick else IMAGES
    return Survey(
        name="scaling",
        title="Seconds of an epoch, and memory",
        groups=[[point] for point in list_points(cores, images, quick)],
        rows=rows,
        columns={
            **{name: f"{{{name}}}" for name in ("way", "runs", "variants", "depth", "devices")},
            "epoch s": "{epoch_s:.2f}", "samples/s": "{samples_per_s:,.0f}",
            "runs/h": "{runs_per_hour:,.0f}", "peak MB": "{peak_memory_mb:,.0f}",
        },
        note=[
            "epochs of `unitnorm train` (table 2), and with few seeds and many variants of each "
            "(study); runs: networks trained at once.",
            f"runs/h: of {RUN_EPOCHS} epochs of {IMAGES:,} images each.",
        ],
        conclude=lambda frame, _: ({}, {"": figures.draw_scaling(frame)}),
    )  # fmt: skip
