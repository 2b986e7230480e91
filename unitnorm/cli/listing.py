"""The command `unitnorm list`: what stands in the results folders, and how to go on with it."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shlex
import zlib
from pathlib import Path
from typing import Any

import click

from unitnorm.cli import options as opt
from unitnorm.run.job import CHECKPOINTS


@click.command("list", cls=opt.GroupedCommand, short_help="What was run, and how to go on.")
@opt.out_option("runs", "Folder that is searched.")
@opt.json_option
def list_folders(out: Path, as_json: bool) -> None:
    """List the results folders: experiment, state, runs recorded, size, and the last command.

    The command of an unfinished folder goes on where it stopped.

    \b
    Example
      unitnorm list
      unitnorm list --out results --json
    """
    marks = {"provenance.json", CHECKPOINTS}
    walk = os.walk(out)  # unlike glob, it bears that a training at work removes a folder
    folders = sorted(Path(place) for place, inner, names in walk if marks & {*inner, *names})
    found = [look_at(folder) for folder in folders]
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    if not found:
        click.echo(f"nothing was run in {out} yet")
    for about in found:
        size = f"{about['bytes'] / 1e6:,.1f} MB"
        runs = "" if about["runs"] is None else f", {about['runs']:,} runs"
        click.echo(f"{about['folder']}: {about['experiment']}, {about['state']}{runs}, {size}")
        if about["command"]:
            click.echo(f"  {about['command']}")


def look_at(folder: Path) -> dict[str, Any]:
    """What a results folder holds: running, unfinished, recorded or damaged."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a training at work may have removed it
                size += os.stat(os.path.join(place, name)).st_size
    about: dict[str, Any] = {
        "folder": str(folder), "experiment": "unknown", "state": "damaged", "runs": None,
        "command": None, "last": None, "bytes": size,
    }  # fmt: skip
    try:
        for path in folder.glob("runs.csv*"):
            content = path.read_bytes()
            content = gzip.decompress(content) if path.suffix == ".gz" else content
            about["runs"] = content.count(b"\n") - 1
        if (folder / "provenance.json").exists():
            provenance = json.loads((folder / "provenance.json").read_bytes())
            last = provenance["commands"][-1]
            about["experiment"] = provenance.get("kind", "table2")
            about["command"] = opt.to_go_on(shlex.split(last["command"]))
            about["last"] = last["started"]
        left = (folder / CHECKPOINTS).exists()
        about["state"] = "running" if is_held(folder) else "unfinished" if left else "recorded"
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError):
        pass  # damaged
    return about


def is_held(folder: Path) -> bool:
    """Whether a process is at work in the folder."""
    if not (folder / ".lock").exists():
        return False
    import filelock

    try:
        with filelock.FileLock(folder / ".lock", timeout=0):
            return False
    except filelock.Timeout:
        return True
    except OSError:  # a folder that cannot be written
        return False
