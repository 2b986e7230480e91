"""The command line: `main` and how a command ends. A module of this package per group of commands.

JAX and pandas are imported inside the commands that need them, so that --help stays quick. To add a
command, write it in its group's module; the options that several share are in `options`, the frame
of a training is in `unitnorm.run.job`.
"""

from __future__ import annotations

import shlex
import sys
from typing import Any

import click

import unitnorm
from unitnorm.cli import bench, segment, study, symmetry, table2
from unitnorm.cli.options import ConfigName, GroupedCommand
from unitnorm.errors import UserError

INTERRUPTED = 130  # exit code after Ctrl-C or SIGTERM, everything saved


class MainGroup(click.Group):
    """Prints a `UserError` or an interruption as one line; keeps the order of the commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"error: {on_one_line(str(error))}", err=True)
            ctx.exit(error.exit_code)
        except click.UsageError as error:
            if error.ctx is None or isinstance(error, click.exceptions.NoArgsIsHelpError):
                raise
            text = f"{error.format_message().rstrip('.')}; see `{error.ctx.command_path} --help`"
            click.echo(f"error: {on_one_line(' '.join(text.split()))}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            resume = shlex.join(["unitnorm", *(word for word in sys.argv[1:] if word != "--fresh")])
            click.echo(f"interrupted; what is saved stays. Go on with: {resume}", err=True)
            ctx.exit(INTERRUPTED)


def on_one_line(text: str) -> str:
    """The text with line breaks and the like written out: names of files and keys may hold any."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@click.group(cls=MainGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(unitnorm.__version__, prog_name="unitnorm")
def main() -> None:
    """Does it pay to remove the scaling symmetries of a batch-normalised network?

    Table 2 of "Understanding symmetries in deep networks" (Badrinarayanan, Mishra and Cipolla,
    2015): SGD from unit-norm filters (b-sgd) against SGD on the unit-norm manifold (un); and
    studies of when, how much and why. What you run goes to the folder runs/.

    \b
    Example: the whole table, from nothing
      unitnorm reproduce
    A first look in about a minute
      unitnorm reproduce --config quick --out runs/quick
    """


@click.command(cls=GroupedCommand, short_help="Print a preset to edit, or list them.")
@click.argument("name", metavar="[NAME]", required=False, type=ConfigName())
def config(name: str | None) -> None:
    """Print a preset, to be edited and given with --config; without a name, list them.

    \b
    Example
      unitnorm config quick > mine.toml
      unitnorm reproduce --config mine.toml
    """
    from unitnorm.run.config import PRESETS, find_config, presets

    if name is not None:
        try:
            click.echo(find_config(name).read_text(encoding="utf-8"), nl=False)
        except (OSError, ValueError) as error:
            raise UserError(f"config {name}: cannot be read ({error})") from None
        return
    for preset in presets():
        text = (PRESETS / f"{preset}.toml").read_text(encoding="utf-8")
        click.echo(f"{preset:24} {text.splitlines()[0].removeprefix('#').strip()}")


for command in (
    table2.sweep, table2.train, table2.report, table2.reproduce, table2.verify_command, study.study,
    symmetry.symmetry, segment.segment, bench.bench, config,
):  # fmt: skip
    main.add_command(command)
