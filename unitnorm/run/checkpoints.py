"""Checkpoints: the state of a program that has not ended, kept beside the records.

A checkpoint folder has one sub-folder for each program that was stopped, named after its title and
fingerprint. In it are `about.json` and the last two states, `1.safetensors`, `2.safetensors`, …,
each with the SHA-256 of all its bytes in its own header. A state is written under another name and
renamed when it is whole and on the disk. Nothing but `Folder.drop` removes a state that could be
the last: damaged ones are set aside, and whatever else hinders reading ends the command.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy

from unitnorm.errors import UserError, system_faults
from unitnorm.run.records import sync_folder, write_synced

EVERY_S = 5.0  # a state is saved at most so often; see `Folder`
KEEP = 2  # states of a program: the newest, and one to fall back on
FORMAT = 1  # of about.json and of a state; raised when an older reader would misread them
BLANK = "0" * 64  # stands for a state's SHA-256 while that is taken
STATE = r"(\d+)\.safetensors"


class Part(NamedTuple):
    """The part of an experiment that a checkpoint belongs to."""

    title: str  # what the user calls it, such as "train depth 4"
    fingerprint: str  # SHA-256 of all that its numbers depend on; only equal ones share checkpoints
    covers: tuple[str, ...] = ()  # names of the records that it will become


class Checkpoints:
    """Keeps nothing: for programs that are not worth it and processes that do not write."""

    def restore(self, part: Part, like: Any) -> Any | None:
        """The newest whole state of `part`, a tree of NumPy arrays; None if there is none.

        `like` is a tree of its structure, of anything with a shape and a dtype.
        """

    def due(self) -> bool:
        """It is time to save."""
        return False

    def save(self, part: Part, state: Any, *, wait: bool) -> None:
        """Keep a tree of NumPy arrays that nobody changes from now on.

        It is written in the background, unless one is to `wait` until it is on the disk.
        """

    def drop(self, covers: Iterable[str]) -> None:
        """Remove what was saved of any run with one of these names (`records.Records.recorded`)."""


class Folder(Checkpoints):
    """The checkpoints in one folder, which one process uses at a time.

    Every method raises a `UserError` where the disk is full or the folder cannot be read or
    written, if need be for the save before; the states saved before that stay.

    Args:
      folder: where; made with the first save, removed with the last checkpoint.
      every_s: seconds between two saves; 0 saves after every epoch.
      say: shows the user a line.
    """

    def __init__(self, folder: Path, *, every_s: float = EVERY_S, say: Callable[[str], None]):
        self._folder = folder
        self._every_s = every_s
        self._say = say
        self._saved_at = time.monotonic()
        self._writer = concurrent.futures.ThreadPoolExecutor(1)
        self._writing: concurrent.futures.Future[None] | None = None

    def restore(self, part: Part, like: Any) -> Any | None:
        self.finish()
        self._saved_at = time.monotonic()
        place = self._place(part)
        with system_faults(self._folder, "read"):
            states, title = _states(place), place.name[:-16]
            others = [p for p in self._places() if p.name[:-16] == title and p != place]
        if others and not states:
            self._say(
                f"{part.title}: the checkpoint {others[0].name} is of other runs, settings or code "
                "and is not used; --fresh removes it"
            )
        for step, path in sorted(states.items(), reverse=True):
            try:
                arrays = _read(path)
            except _DamageError as damage:
                aside = path.with_name(f"damaged-{path.name}")
                with system_faults(self._folder, "written"):
                    os.replace(path, aside)
                self._say(
                    f"{part.title}: checkpoint {step} is damaged ({damage}) and is set aside as "
                    f"{aside.name}; using the one before it, if there is one"
                )
                continue
            wanted, found = _kinds(_named(like)), _kinds(arrays)
            differing = [name for name in wanted | found if wanted.get(name) != found.get(name)]
            if differing:
                raise UserError(
                    f"{path}: its {differing[0]} is not that of this program, although settings "
                    "and code are; start over with --fresh"
                )
            return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])
        return None

    def due(self) -> bool:
        return time.monotonic() - self._saved_at >= self._every_s

    def save(self, part: Part, state: Any, *, wait: bool) -> None:
        self.finish()
        self._writing = self._writer.submit(_write, self._place(part), part, _named(state))
        if wait:
            self.finish()
        self._saved_at = time.monotonic()

    def drop(self, covers: Iterable[str]) -> None:
        # a checkpoint is of use only as long as none of its runs is recorded
        gone = set(covers)
        self.finish()
        with system_faults(self._folder, "removed"):
            for place in self._places():
                mine = _covers(place)
                if gone.intersection(mine or ()) or (mine is None and not _states(place)):
                    shutil.rmtree(place)
            with contextlib.suppress(OSError):  # not there, or not empty
                self._folder.rmdir()

    def finish(self) -> None:
        """Return when the state that is being written is on the disk."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            with system_faults(self._folder, "written"):
                writing.result()

    def _places(self) -> list[Path]:
        paths = (self._folder / name for name in _listed(self._folder))
        return [path for path in paths if path.is_dir()]

    def _place(self, part: Part) -> Path:
        return self._folder / f"{part.title.replace(' ', '-')}-{part.fingerprint[:16]}"


class _DamageError(Exception):
    """A state's bytes are not those that were written."""


def _write(place: Path, part: Part, arrays: Mapping[str, np.ndarray]) -> None:
    """Add a state to a program's sub-folder, made where it is missing."""
    if _covers(place) is None:
        place.mkdir(parents=True, exist_ok=True)
        about = {"format": FORMAT, "fingerprint": part.fingerprint, "covers": list(part.covers)}
        _write_whole(place / "about.json", (json.dumps(about, indent=2) + "\n").encode())
    content = safetensors.numpy.save(
        {name: np.asarray(array, order="C") for name, array in arrays.items()},
        {"format": str(FORMAT), "sha256": BLANK},
    )
    digest = hashlib.sha256(content).hexdigest()
    # no number is given twice, nor one that was set aside
    step = 1 + max(_states(place, f"(?:damaged-)?{STATE}"), default=0)
    # the header comes first, so that the first blank is its own
    _write_whole(place / f"{step}.safetensors", content.replace(BLANK.encode(), digest.encode(), 1))
    for _, old in sorted(_states(place).items())[:-KEEP]:
        old.unlink()


def _write_whole(path: Path, content: bytes) -> None:
    """Make a file that is whole and on the disk before it has its name."""
    unfinished = path.with_name("unfinished.tmp")
    try:
        write_synced(unfinished, content)
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)  # a full disk needs the space
        raise
    sync_folder(path.parent)


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a state by name; a `UserError` where its bytes are whole or may be, but
    cannot be read."""
    with system_faults(path, "read"):
        content = path.read_bytes()
    try:
        start = 8 + int.from_bytes(content[:8], "little")  # of the arrays, after a header of JSON
        noted = json.loads(content[8:start])["__metadata__"]
        whole = content.replace(noted["sha256"].encode(), BLANK.encode(), 1)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
        raise _DamageError("its header cannot be read") from None
    if hashlib.sha256(whole).hexdigest() != noted["sha256"]:
        raise _DamageError("its content does not have the SHA-256 that was noted")
    if noted.get("format") != str(FORMAT):
        raise UserError(
            f"{path}: of format {noted.get('format')}, this version of unitnorm reads {FORMAT}; "
            "go on with the version that wrote it, or start over with --fresh"
        )
    return safetensors.numpy.load(content)


def _kinds(arrays: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    return {name: (tuple(a.shape), np.dtype(a.dtype)) for name, a in arrays.items()}


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their path, in order: a file need not know our containers."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _states(place: Path, pattern: str = STATE) -> dict[int, Path]:
    """A program's states by number."""
    found = (re.fullmatch(pattern, name) for name in _listed(place))
    return {int(match[1]): place / match[0] for match in found if match}


def _listed(folder: Path) -> list[str]:
    """What is in a folder that may not be there; unlike Path.glob, this hides no other fault."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def _covers(place: Path) -> list[str] | None:
    """What a program's sub-folder covers; None if it does not say, as after a killed start."""
    try:
        about = json.loads((place / "about.json").read_bytes())
        return about["covers"] if about["format"] == FORMAT else None
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None
