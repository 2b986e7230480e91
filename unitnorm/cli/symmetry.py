"""The command `unitnorm symmetry`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from unitnorm.cli import options as opt
from unitnorm.run.job import interruptible


@click.command(cls=opt.GroupedCommand, short_help="What scaling the filters does, made visible.")
@opt.archbn_options
@opt.selection_option("--rate", type=float, help="Learning rate.  "
                      "[default: the config's largest candidate, 0.01 in Table 2]")  # fmt: skip
@opt.selection_option("--steps", type=click.IntRange(1, 1_000_000), default=1000,
                      show_default=True, help="Length of the trajectories.")  # fmt: skip
@opt.selection_option("--epochs", type=click.IntRange(1, 1000), default=5, show_default=True,
                      help="Length of the training whose row norms are recorded.")  # fmt: skip
@opt.out_option("runs/symmetry", "Folder of the tables and figures.")
def symmetry(out: Path, rate: float | None, steps: int, epochs: int, **options: Any) -> None:
    """Scale every filter: what becomes of loss, gradient, training and row norms?

    Shows the symmetry, and which updates respect it, on real mini-batches (sections 2 and 3 of the
    paper), on CPU and in float64. Follows every update unless --update names some.

    \b
    Example
      unitnorm symmetry --depth 2
    """
    with interruptible():
        from rich.console import Console

        from unitnorm.archbn.config import Config
        from unitnorm.data import load_dataset
        from unitnorm.run import devices, records

        config, console = opt.read_config(Config, **options), Console()
        devices.prepare()
        from unitnorm.symmetry import run
        from unitnorm.updates import UPDATES

        def say(text: str) -> None:
            console.print(f"measured: {text}", highlight=False)

        updates = config.updates if options["updates"] else list(UPDATES)
        dataset = load_dataset(config.data.dataset, config.data.data_dir)
        config.check_images(len(dataset.train_labels))
        with records.locked(out):
            with console.status("measuring"):
                files, shown = run(config, dataset, updates, rate, steps, epochs, say)
            records.write_files(out, files)
    opt.print_report(shown, files, out)
