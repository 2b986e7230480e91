"""Checkpoints: the state of a program that has not ended, kept with Orbax beside the records.

A checkpoint folder has one sub-folder for each program that was stopped, named after its title and
fingerprint; in it are `about.json` and the last two states, each with the SHA-256 of its content.
Orbax writes a state under another name and renames it when it is whole. A program's sub-folder goes
when its results are recorded. Change here how states are kept; what a state is, is the business of
`experiment`. Orbax is imported when there is something to read or write, so that a start does not
wait for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from unitnorm.errors import UserError

EVERY_S = 5.0  # a state is saved at most so often; see `Folder`
KEEP = 2  # states of a program: the newest, and one to fall back on
FORMAT = 1  # of a program's sub-folder; raised when an older reader would misread it


@dataclass(frozen=True)
class Part:
    """The part of an experiment that a checkpoint belongs to.

    Attributes:
      title: what the user calls it, such as "train depth 4".
      fingerprint: SHA-256 of all that its numbers depend on; only equal ones share checkpoints.
      covers: names of the records that it will become; see `Folder.drop`.
    """

    title: str
    fingerprint: str
    covers: tuple[str, ...] = ()


class Nowhere:
    """Keeps nothing: for programs that are not worth it and processes that do not write."""

    def restore(self, part: Part, like: Any) -> Any | None:
        """Nothing was saved."""

    def due(self) -> bool:
        """It is never time to save."""
        return False

    def save(self, part: Part, state: Any, *, wait: bool) -> None:
        """Forget the state."""

    def drop(self, covers: Iterable[str]) -> None:
        """There is nothing to remove."""


class Folder:
    """The checkpoints in one folder, which one process uses at a time.

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
        self._open: tuple[Path, Any] | None = None  # the program in use and its Orbax manager
        self._step = 0

    def restore(self, part: Part, like: Any) -> Any | None:
        """The newest state of `part` that is whole; None if there is none.

        Args:
          like: a tree of the state's structure, of anything with a shape and a dtype.

        Returns:
          A tree of NumPy arrays. Damaged states are removed, and said so.
        """
        self._saved_at = time.monotonic()
        place = self._place(part)
        if not place.is_dir():
            others = [path.name for path in self._all() if path.name.startswith(_slug(part.title))]
            if others:
                self._say(
                    f"{part.title}: the checkpoint {others[0]} is of other runs, settings or code "
                    "and is not used; --fresh removes it"
                )
            return None
        wanted = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in _named(like).items()}
        manager = self._manager(place)
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                arrays = _read(manager, step, wanted)
            except Exception as problem:  # Orbax and TensorStore raise all kinds on damaged files
                reason = " ".join(f"{type(problem).__name__}: {problem}".split())[:120]
                self._say(
                    f"{part.title}: checkpoint {step} is damaged and is left out ({reason}); "
                    "using the one before it, if there is one"
                )
                with _errors(self._folder):
                    shutil.rmtree(place / str(step))
                    manager.reload()
                continue
            return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])
        return None

    def due(self) -> bool:
        """It is time to save."""
        return time.monotonic() - self._saved_at >= self._every_s

    def save(self, part: Part, state: Any, *, wait: bool) -> None:
        """Keep a state and forget all but the last `KEEP`.

        Args:
          state: a tree of NumPy arrays that nobody changes from now on: they are written in the
            background.
          wait: return only when the state is on the disk.

        Raises:
          UserError: the disk is full or the folder cannot be written, now or at the save before;
            the states saved before that stay.
        """
        place = self._place(part)
        with _errors(self._folder):
            if not place.is_dir():
                _make(place, part)
            manager = self._manager(place)
            self._step += 1
            _write(manager, self._step, _named(state))
            if wait:
                manager.wait_until_finished()
        self._saved_at = time.monotonic()

    def drop(self, covers: Iterable[str]) -> None:
        """Remove every checkpoint that covers one of these records, and what killed saves left.

        A checkpoint is of use only as long as none of its runs is recorded.
        """
        gone = set(covers)
        with _errors(self._folder):
            for place in self._all():
                mine = _covers(place)
                if mine is None or gone.intersection(mine):
                    if self._open is not None and self._open[0] == place:
                        self.close()
                    shutil.rmtree(place)
            with contextlib.suppress(OSError):  # not there, or not empty
                self._folder.rmdir()

    def close(self) -> None:
        """Finish what is being written.

        Raises:
          UserError: as `save`.
        """
        if self._open is not None:
            manager, self._open = self._open[1], None
            with _errors(self._folder):
                manager.close()

    def _all(self) -> list[Path]:
        return sorted(self._folder.iterdir()) if self._folder.is_dir() else []

    def _place(self, part: Part) -> Path:
        return self._folder / f"{_slug(part.title)}{part.fingerprint[:16]}"

    def _manager(self, place: Path) -> Any:
        """Orbax's manager of a program's states."""
        if self._open is None or self._open[0] != place:
            self.close()
            manager = _orbax_manager(place)
            self._open = place, manager
            self._step = max(manager.all_steps(), default=0)
        return self._open[1]


def _orbax_manager(place: Path) -> Any:
    import orbax.checkpoint as ocp

    _quieten()
    alone = ocp.options.MultiprocessingOptions(
        # only this process saves, whatever others it computes with
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix="unitnorm",
    )
    options = ocp.CheckpointManagerOptions(
        max_to_keep=KEEP,
        create=False,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
        multiprocessing_options=alone,
    )
    return ocp.CheckpointManager(place.absolute(), options=options)


def _write(manager: Any, step: int, arrays: Mapping[str, np.ndarray]) -> None:
    import orbax.checkpoint as ocp

    items = ocp.args.Composite(
        state=ocp.args.StandardSave(dict(arrays)),
        content=ocp.args.JsonSave({"sha256": _sha256(arrays)}),
    )
    manager.save(step, args=items, force=True)


def _read(manager: Any, step: int, wanted: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    items = ocp.args.Composite(
        state=ocp.args.StandardRestore(dict(wanted)), content=ocp.args.JsonRestore()
    )
    found = manager.restore(step, args=items)
    arrays = {name: np.asarray(found.state[name]) for name in wanted}
    if _sha256(arrays) != found.content["sha256"]:
        raise ValueError("the content does not have the SHA-256 that was noted")
    for name, array in arrays.items():
        if (array.shape, array.dtype) != (wanted[name].shape, wanted[name].dtype):
            raise ValueError(f"{name} is {array.dtype} of shape {array.shape}")
    return arrays


def _quieten() -> None:
    """Keep from the terminal what is said here in a line, for as long as the process lives.

    Where one array is damaged, or does not fit on the disk, TensorStore goes on with the others for
    a moment, and complains that Orbax has stopped listening.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    heard = sys.unraisablehook
    if getattr(heard, "without_closed_loops", False):
        return

    def hear(problem: Any) -> None:
        if str(problem.exc_value) != "Event loop is closed":
            heard(problem)

    hear.without_closed_loops = True  # type: ignore[attr-defined]
    sys.unraisablehook = hear


def _sha256(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their path, in order: Orbax need not know our containers."""
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _make(place: Path, part: Part) -> None:
    """A program's sub-folder; one without a whole `about.json` is taken for a killed start."""
    place.mkdir(parents=True)
    about = {"format": FORMAT, "fingerprint": part.fingerprint, "covers": list(part.covers)}
    unfinished = place / "about.tmp"
    unfinished.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, place / "about.json")


def _covers(place: Path) -> list[str] | None:
    """What a program's sub-folder covers; None if it is not one."""
    try:
        about = json.loads((place / "about.json").read_bytes())
        covers = about["covers"] if about["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    whole = isinstance(covers, list) and all(isinstance(name, str) for name in covers)
    return covers if whole else None


def _slug(title: str) -> str:
    return title.replace(" ", "-") + "-"


@contextlib.contextmanager
def _errors(folder: Path) -> Iterator[None]:
    """Turn whatever fails while writing into one clear line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as problem:  # the latter two from TensorStore
        full = "No space left" in str(problem) or "RESOURCE_EXHAUSTED" in str(problem)
        reason = "No space left on device" if full else " ".join(str(problem).split())[:200]
        hint = "free some space" if full else "make the folder writable, or give another --out"
        raise UserError(
            f"{folder}: the checkpoint cannot be written ({reason}); {hint} and repeat the command"
        ) from problem
