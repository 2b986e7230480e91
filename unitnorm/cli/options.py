"""The options that several commands share, each once, and how a command's help groups them.

Options of a config are named after its keys, with __ for dots: `read_config` puts them there. An
option for every training goes to `training_options` and to `TrainingOptions`.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from unitnorm.errors import UserError, one_line
from unitnorm.run.job import TrainingOptions

if TYPE_CHECKING:
    from unitnorm.run.config import Schema

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class GroupedOption(click.Option):
    """An option that the help shows under a heading of its own; a number must be finite."""

    def __init__(self, *args: Any, group: str = "", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.group = group

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        cast = super().type_cast_value(ctx, value)
        for number in cast if isinstance(cast, tuple) else (cast,):
            if isinstance(number, float) and not math.isfinite(number):
                raise click.BadParameter(f"{number} is not a finite number.", ctx, self)
        return cast


class GroupedArgument(click.Argument):
    """An argument that the help explains, with every version of click."""

    group = "Arguments"

    def __init__(self, *args: Any, text: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.text = text

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        return self.human_readable_name, self.text


class GroupedCommand(click.Command):
    """A command whose help shows its arguments and options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "group", ""), []).append(record)
        rest = groups.pop("", [])
        for heading, records in [*groups.items(), ("Other" if groups else "Options", rest)]:
            with formatter.section(heading):
                formatter.write_dl(records)


class UpdateName(click.ParamType):
    """The name of an update: of the registry, with - or _, or of a function package.module:name."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from unitnorm.updates import check_update_name

        try:
            return check_update_name(value)
        except ValueError as error:
            self.fail(one_line(error), param, ctx)

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        from unitnorm.updates import UPDATES

        return [CompletionItem(name) for name in UPDATES if name.startswith(incomplete)]


class ConfigName(click.ParamType):
    """A TOML file, or the name of a preset."""

    name = "name|file"

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        from unitnorm.run.config import presets

        names = [CompletionItem(name) for name in presets() if name.startswith(incomplete)]
        return [*names, CompletionItem(incomplete, type="file")]


option: Callable[..., Decorator] = partial(click.option, cls=GroupedOption)
# and under the headings that several commands have
selection_option = partial(option, group="What is run")
data_option = partial(option, group="Data")
records_option = partial(option, group="Records")
argument: Callable[..., Decorator] = partial(click.argument, cls=GroupedArgument)


def together(*decorators: Decorator) -> Decorator:
    """Several options as one decorator, in this order in the help."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def out_option(default: str, text: str = "Folder of the records and the report.") -> Decorator:
    """--out, which every command that reads or writes records takes."""
    kind = click.Path(path_type=Path, file_okay=False)
    return records_option("--out", type=kind, default=Path(default), show_default=True, help=text)


def set_option(what: str, example: str) -> Decorator:
    """--set."""
    text = f"Override any key of the {what}, for example --set {example}."
    return selection_option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help=text)


def config_option(default: str) -> Decorator:
    """--config and --set."""
    text = f"A preset or a TOML file; `unitnorm config` lists them.  [default: {default}]"
    return together(
        selection_option("--config", "config_path", type=ConfigName(), help=text),
        set_option("config", "loss.batch_size=50"),
    )


update_option = selection_option("--update", "updates", type=UpdateName(), multiple=True,
                                 help="Update to run; may be repeated: b-sgd, un, …")  # fmt: skip
seed_option = selection_option("--seed", type=int, help="Seed of run 0; run k has seed + k.")
runs_option = selection_option("--runs", type=int, help="Runs of each update.")

# of every command on the paper's network
archbn_options = together(
    config_option("table2, the paper's protocol"),
    selection_option("--depth", "depths", type=int, multiple=True,
                     help="Depth to run; may be repeated."),
    update_option,
    seed_option,
    data_option("--dataset", "data__dataset",
                help="mnist, or a data set that TFDS knows, such as fashion_mnist."),
    data_option("--data-dir", "data__data_dir",
                help="Folder with four IDX files of your own, raw or .gz."),
)  # fmt: skip


def training_options(out: str) -> Decorator:
    """What every command that trains takes, alike: the fields of `TrainingOptions`."""
    several = partial(option, group="Devices and workers")
    gone = partial(click.option, hidden=True, expose_value=False, callback=_refuse)
    return together(
        out_option(out),
        records_option("--fresh", is_flag=True,
                       help="Start over: drop the records and checkpoints of the selected runs."),
        records_option("--checkpoint-every", type=click.FloatRange(0.0), metavar="SECONDS",
                       help="Save the state at most so often; 0: at every chance.  [default: 5]"),
        several("--devices", type=click.IntRange(1, 4096),
                help="CPU devices to share the work among.  [default: one per core]"),
        several("--workers", type=click.IntRange(1, 4096),
                help="Compute in so many processes on this machine (needs unitnorm[cluster])."),
        several("--scheduler", metavar="ADDRESS",
                help="Compute on the workers of a Dask scheduler, such as tcp://host:8786."),
        gone("--distributed", is_flag=True),
        *map(gone, ("--coordinator", "--processes", "--process")),
    )  # fmt: skip


def _refuse(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value not in (None, False):
        raise UserError(
            f"{param.opts[0]}: runs are independent, and need no processes in lock step: give "
            "--workers N on one machine, or --scheduler tcp://HOST:8786 for workers on several"
        )


def to_go_on(words: Sequence[str]) -> str:
    """The command of these words, to be repeated: with its name, without --fresh."""
    return shlex.join(["unitnorm", *(word for word in words[1:] if word != "--fresh")])


def take_training_options(options: dict[str, Any]) -> TrainingOptions:
    """The values of `training_options`, taken out of a command's."""
    names = TrainingOptions.__dataclass_fields__
    return TrainingOptions(**{name: options.pop(name) for name in names})


json_option = records_option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
quiet_option = records_option("--quiet", is_flag=True, help="Print nothing but faults.")


def print_report(
    shown: Any, files: Mapping[str, bytes], out: Path, *,
    written: bool = True, as_json: bool = False, quiet: bool = False,
) -> None:  # fmt: skip
    """Print what a report shows, or the tables among its files as JSON, and where these are."""
    if as_json:
        import pandas as pd

        tables = {}
        for name, content in files.items():
            if name.endswith(".csv"):
                table = pd.read_csv(io.BytesIO(content)).to_json(orient="records")
                tables[name.removesuffix(".csv")] = json.loads(table)
        click.echo(json.dumps({"folder": str(out), "files": sorted(files), "tables": tables}))
    elif not quiet:
        from rich.console import Console

        Console().print(shown)
        place = f"{out}{os.sep}"
        at_work = f"no files written: another process is at work in {place}"
        click.echo(f"{len(files)} files in {place}" if written else at_work)


def read_config(
    schema: type[Schema], config_path: str | None, overrides: tuple[str, ...], **given: Any
) -> Schema:
    """The config file with the command line's options on top.

    Args:
      given: values by key of the config, with __ for dots.

    Raises:
      UserError: it is none; where the file is one for other commands, they are named.
    """
    from unitnorm.run.config import load, parse_override

    values = dict(parse_override(text) for text in overrides)
    for key, value in given.items():
        if value not in (None, ()):  # an option that was not given
            values[key.replace("__", ".")] = list(value) if isinstance(value, tuple) else value
    try:
        return load(config_path, values, schema)
    except UserError:
        if config_path is not None and (command := _command_of(config_path, schema)):
            raise UserError(f"config {config_path}: is one for `{command}`, not for this") from None
        raise


def _command_of(config_path: str, schema: type[Schema]) -> str | None:
    """The command whose config a file is, where that is another than `schema`."""
    from unitnorm.archbn.config import Config
    from unitnorm.run.config import Section, load
    from unitnorm.segment.config import SegmentConfig
    from unitnorm.study.config import Plan

    commands: dict[str, type[Section]] = {
        "reproduce": Config, "study": Plan, "segment train": SegmentConfig,
    }  # fmt: skip
    for command, other in commands.items():
        with contextlib.suppress(UserError):
            if other is not schema and load(config_path, None, other):
                return f"unitnorm {command}"
    return None
