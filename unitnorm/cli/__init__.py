"""The command line: `main` and how a command ends. A module of this package per group of commands.

JAX and pandas are imported inside the commands that need them, so that --help stays quick. The
options that several share are in `options`, the frame of a training is in `unitnorm.run.job`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

import click

import unitnorm
from unitnorm.cli import bench, listing, segment, study, symmetry, table2
from unitnorm.cli.options import ConfigName, GroupedCommand, argument, to_go_on
from unitnorm.errors import UserError, one_line

# Of files, which have a name, a full disk is told where they are written: this is of the output.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
INTERRUPTED = 130  # exit code after Ctrl-C or SIGTERM, everything saved


class MainGroup(click.Group):
    """Ends every command: a fault or an interruption is one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a terminal without ≤ or ± shows ? instead
                stream.reconfigure(errors="replace")
        # It warns where it can keep nothing; figures are drawn all the same.
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        hook, sys.unraisablehook = sys.unraisablehook, interrupt_again
        is_main = threading.current_thread() is threading.main_thread()  # else no handler is set
        plain = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if plain:
            signal.signal(signal.SIGINT, interrupt)
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            if error.errno not in UNWRITABLE or error.filename is not None:
                raise
            with contextlib.suppress(OSError):  # what is still in its buffer would fail again
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            leave(f"the output cannot be written ({error.strerror}); what is saved stays")
        finally:
            sys.unraisablehook = hook
            if plain and signal.getsignal(signal.SIGINT) is interrupt:
                signal.signal(signal.SIGINT, signal.default_int_handler)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            leave(str(error), error.exit_code)
        except click.UsageError as error:
            if error.ctx is None or isinstance(error, click.exceptions.NoArgsIsHelpError):
                raise
            text = f"{error.format_message().rstrip('.')}; see `{error.ctx.command_path} --help`"
            leave(one_line(text), error.exit_code)
        except KeyboardInterrupt:
            # Once is enough: a second signal would only break off the end of the process.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            command = to_go_on(sys.argv)
            click.echo(f"interrupted; what is saved stays. Go on with: {command}", err=True)
            sys.exit(INTERRUPTED)


def leave(fault: str, exit_code: int = 1) -> NoReturn:
    """End the process with a fault on one line."""
    with contextlib.suppress(OSError):  # nowhere to say it
        click.echo(f"error: {on_one_line(fault)}", err=True)
    sys.exit(exit_code)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C; within an import, whose native code it could crash, it comes again after it."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    if frame is None:
        raise KeyboardInterrupt
    interrupt_later()


def interrupt_again(lost: sys.UnraisableHookArgs) -> None:
    """Ctrl-C within a callback of the garbage collector is lost: it comes again after it."""
    if isinstance(lost.exc_value, KeyboardInterrupt):
        interrupt_later()
    else:
        sys.__unraisablehook__(lost)


def interrupt_later() -> None:
    """Ctrl-C once more."""
    threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()


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
@argument("name", text="Preset, or a TOML file.", metavar="[NAME]", required=False,
          type=ConfigName())  # fmt: skip
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
            text = find_config(name).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"config {name}: cannot be read ({error})") from None
        click.echo(text, nl=False)
        return
    for preset in presets():
        text = (PRESETS / f"{preset}.toml").read_text(encoding="utf-8")
        click.echo(f"{preset:24} {text.splitlines()[0].removeprefix('#').strip()}")


for command in (
    table2.sweep, table2.train, table2.report, table2.reproduce, table2.verify_command, study.study,
    symmetry.symmetry, segment.segment, bench.bench, listing.list_folders, config,
):  # fmt: skip
    main.add_command(command)
