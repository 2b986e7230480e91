"""The command `unitnorm bench`."""

from __future__ import annotations

import os
import time
from pathlib import Path

import click

from unitnorm.cli import options as opt


@click.command(cls=opt.GroupedCommand, short_help="Speed beside the peers and the limits.")
@opt.option("--scaling", is_flag=True, help="Cost and memory against runs, depth and devices.")
@opt.option("--startup", is_flag=True, help="The time from typing a command to its first epoch.")
@opt.option("--depth", type=click.IntRange(1, 64), multiple=True, help="Depth to compare at.")
@opt.option("--rounds", type=click.IntRange(1, 50), help="Repetitions.  [default: 7, else 3]")
@opt.option("--quick", is_flag=True, help="A tenth of the images and 2 rounds: a first look.")
@opt.out_option("runs/bench", "Folder of the tables and figures.")
def bench(
    out: Path,
    scaling: bool,
    startup: bool,
    depth: tuple[int, ...],
    rounds: int | None,
    quick: bool,
) -> None:
    """Training speed beside geoopt, PyTorch, plain optax and the machine's limits.

    Takes turns among them, each in a process of its own. The machine should have nothing else to
    do.

    \b
    Example
      pip install "unitnorm[bench]"
      unitnorm bench
    """
    do_bench(out, "scaling" if scaling else "startup" if startup else "", depth, rounds, quick)


def do_bench(
    out: Path, what: str, depths: tuple[int, ...], rounds: int | None, quick: bool
) -> None:
    """Measure, print the table and write the files."""
    from rich.console import Console

    from unitnorm.bench import compare, measure, scaling, startup
    from unitnorm.report.tables import Fitting
    from unitnorm.run import records
    from unitnorm.run.job import command_line

    started = time.time()
    console = Console()
    images = compare.IMAGES // 10 if quick else compare.IMAGES
    rounds = rounds or (2 if quick else 3 if what else 7)
    with records.locked(out):
        with console.status("") as status:
            say = status.update
            if what == "scaling":
                frame, device = scaling.scaling(
                    scaling.points(measure.cores()), rounds, images, say=say
                )
            elif what == "startup":
                frame = startup.startup(rounds, say=say)
            else:
                compared = compare.compare(depths or (2, 4), rounds, images, say=say)
        done = measure.provenance(command_line(), started, time.time() - started)
        if what == "scaling":
            shown, lines = scaling.table(frame), scaling.growth(frame)
            files = scaling.files(frame, device, rounds, done)
        elif what == "startup":
            shown, lines = startup.table(frame), []
            files = startup.files(frame, rounds, done)
        else:
            shown, lines = compare.table(compared), compare.remarks(compared)
            files = compare.files(compared, done)
        records.write_files(out, files)
    console.print(Fitting(shown))
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"{len(files)} files in {out}{os.sep}", highlight=False)
