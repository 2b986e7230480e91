"""The command `unitnorm study`."""

from __future__ import annotations

import click

from unitnorm.cli import options as opt


@click.command(cls=opt.GroupedCommand, short_help="Comparisons of many runs, from a plan.")
def study() -> None:
    """Comparisons of many runs, from a plan."""
