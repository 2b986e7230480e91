"""The command `unitnorm bench`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from unitnorm.cli import options as opt
from unitnorm.errors import UserError

MEASURES = {  # flag → what it says of itself; without any, the comparison
    "scaling": "Cost and memory against runs, depth, variants and devices.",
    "updates": "What a step of each update costs by itself.",
    "kernels": "Kernels of a training step, and what a GPU would need for them.",
    "convolution": "What SegNet's Fourier convolution gains over XLA's.",
    "startup": "The time from typing a command to its first epoch.",
}


@click.command(cls=opt.GroupedCommand, short_help="Speed beside the peers and the limits.")
@opt.together(*(opt.selection_option(f"--{name}", "what", flag_value=name, help=text)
                for name, text in MEASURES.items()))  # fmt: skip
@opt.selection_option("--depth", type=click.IntRange(1, 64), multiple=True,
                      help="Depth to compare at.  [default: 2 and 4]")  # fmt: skip
@opt.selection_option("--rounds", type=click.IntRange(1, 50),
                      help="Repetitions.  [default: 7, else 3]")  # fmt: skip
@opt.selection_option("--quick", is_flag=True,
                      help="A first look in two minutes: depth 2, 2 rounds, a tenth of the images, "
                      "fewer points.")  # fmt: skip
@opt.out_option("runs/bench", "Folder of the tables and figures.")
def bench(
    out: Path, what: str | None, depth: tuple[int, ...], rounds: int | None, quick: bool
) -> None:
    """Training speed beside geoopt, PyTorch, plain optax and the machine's limits.

    Takes turns among them, each in a process of its own. The machine should have nothing else to
    do.

    \b
    Example
      pip install "unitnorm[bench]"
      unitnorm bench
    """
    if depth and what:
        raise UserError(f"--depth {depth[0]} is of the comparison with the peers, not of --{what}")
    from rich.console import Console

    from unitnorm.bench import compare, convolution, kernels, scaling, startup, updates
    from unitnorm.bench.measure import find_device
    from unitnorm.bench.survey import measure
    from unitnorm.report.tables import to_screen
    from unitnorm.run import records
    from unitnorm.run.job import command_line

    measures = {
        "scaling": scaling.survey, "updates": updates.survey, "kernels": kernels.survey,
        "convolution": convolution.survey, "startup": startup.survey,
    }  # fmt: skip
    depths = depth or ((2,) if quick else (2, 4))
    rounds = rounds or (2 if quick else 3 if what else 7)
    console = Console()
    plain = partial(console.print, highlight=False, soft_wrap=True)
    with records.locked(out):
        with console.status("") as status:
            say = status.update if console.is_terminal else plain
            device = find_device()
            surveys = (
                [measures[what](device, quick)] if what else compare.surveys(device, quick, depths)
            )
            pages, files = measure(surveys, device, command_line(), rounds, say)
        records.write_files(out, files)
    opt.print_report(to_screen(pages), files, out)
