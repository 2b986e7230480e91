"""The records of a results folder: tables of runs, their provenance, and how they reach the disk.

A folder holds `runs.csv`, `history.csv`, `sweep.csv`, `filters.safetensors` and
`provenance.json`, which names the config that all of them belong to and the SHA-256 of each. They
change together: a new set is staged beside the old one, one rename makes it valid, and whoever
opens the folder next completes what a killed process left undone. To add a column, add it to its
table here and fill it in `experiment`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pydantic
import safetensors.numpy

from unitnorm.errors import UserError

FORMAT = 1  # of provenance.json and the tables; raised when an older reader would misread them

# kind: i whole number, f number, b truth value, s text
RUNS = {
    "depth": "i", "update": "s", "run": "i", "seed": "i", "base_lr": "f", "epochs": "i",
    "train_loss": "f", "val_error": "f", "test_error": "f", "diverged": "b", "stop_reason": "s",
}  # fmt: skip
HISTORY = {
    "depth": "i", "update": "s", "run": "i", "epoch": "i", "lr": "f", "train_loss": "f",
    "train_error": "f", "val_error": "f", "norm_deviation": "f", "norm_mean": "f",
}  # fmt: skip
SWEEP = {
    "depth": "i", "update": "s", "run": "i", "seed": "i", "base_lr": "f", "val_error": "f",
    "train_loss": "f", "diverged": "b", "chosen": "b",
}  # fmt: skip
TABLES = {
    "runs": (RUNS, ["depth", "update", "run"]),
    "history": (HISTORY, ["depth", "update", "run", "epoch"]),
    "sweep": (SWEEP, ["depth", "update", "run", "base_lr"]),
}
CELL = ["depth", "update", "run"]  # what names a run in every table

_DTYPES = {"i": "int64", "f": "float64", "b": "bool", "s": "object"}
_STAGED, _VALID = ".records-staged", ".records-valid"
PROVENANCE, FILTERS = "provenance.json", "filters.safetensors"
REPAIR = "restore the folder from a copy, or give another --out"


class _Part(pydantic.BaseModel):
    """A part of provenance.json: the keys that are relied on; others may stand beside them."""

    model_config = pydantic.ConfigDict(extra="allow", strict=True)


class _Data(_Part):
    name: str
    sha256: str
    image_shape: list[int]


class _Command(_Part):
    started: str
    rows: int
    versions: dict[str, str]
    device: dict[str, Any]


class _Provenance(_Part):
    config: dict[str, Any]
    config_sha256: str
    data: _Data
    commands: list[_Command]
    files: dict[str, str]


@dataclass
class Records:
    """What a results folder holds; empty tables where nothing is recorded yet.

    Attributes:
      runs, history, sweep: tables with the columns above, sorted by run.
      filters: (depth, update) → float32 (filters, features): the first layer of run 0.
      provenance: see `experiment.provenance`; `{}` before the first write.
    """

    runs: pd.DataFrame = field(default_factory=lambda: empty("runs"))
    history: pd.DataFrame = field(default_factory=lambda: empty("history"))
    sweep: pd.DataFrame = field(default_factory=lambda: empty("sweep"))
    filters: dict[tuple[int, str], np.ndarray] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def is_empty(self) -> bool:
        """No run is recorded, neither swept nor trained."""
        return self.runs.empty and self.sweep.empty


def cells(depths: Iterable[int], updates: Iterable[str], runs: int) -> pd.DataFrame:
    """The runs of a selection: one row per depth, update and run."""
    return pd.DataFrame(list(itertools.product(depths, updates, range(runs))), columns=CELL)


def drop(records: Records, selected: pd.DataFrame) -> Records:
    """The records without those of the selected runs."""
    gone = set(zip(selected["depth"], selected["update"], strict=True))
    return Records(
        **{name: without(getattr(records, name), selected) for name in TABLES},
        filters={cell: array for cell, array in records.filters.items() if cell not in gone},
        provenance=records.provenance,
    )


def names(table: str, cells: pd.DataFrame) -> set[str]:
    """What the runs of `cells` are called in a table, such as "runs/4/un/0"."""
    rows = cells[CELL].drop_duplicates()
    return {f"{table}/{depth}/{update}/{run}" for depth, update, run in rows.itertuples(False)}


def empty(table: str) -> pd.DataFrame:
    """A table without rows."""
    return frame(table, [])


def frame(table: str, rows: Sequence[Mapping[Any, Any]]) -> pd.DataFrame:
    """Rows as a table with its columns, dtypes and order."""
    columns, key = TABLES[table]
    result = pd.DataFrame(rows, columns=list(columns))
    for name in (name for name, kind in columns.items() if kind == "f"):
        result[name] = result[name].map(shortest).astype("float64")
    result = result.astype({name: _DTYPES[kind] for name, kind in columns.items()})
    ascending = [name != "base_lr" for name in key]
    return result.sort_values(key, ascending=ascending, ignore_index=True)


def shortest(value: float) -> float:
    """The shortest decimal that is this float32: 0.0701 and not 0.07010000199079514."""
    return float(str(np.float32(value)))


def merge(table: str, old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """The old rows and the new ones, which replace whatever is recorded of the same runs."""
    kept = without(old, new)
    return frame(table, kept.to_dict("records") + new.to_dict("records"))


def without(table: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """The rows of `table` whose run (depth, update, run) is not among `cells`."""
    return table[~_among(table, cells)].reset_index(drop=True)


def rows_of(table: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """The rows of `table` whose run (depth, update, run) is among `cells`."""
    return table[_among(table, cells)].reset_index(drop=True)


def _among(table: pd.DataFrame, cells: pd.DataFrame) -> np.ndarray:
    return pd.MultiIndex.from_frame(table[CELL]).isin(pd.MultiIndex.from_frame(cells[CELL]))


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def locked(folder: Path, *, make: bool = True, wait: bool = False) -> Iterator[None]:
    """Hold a results folder for one process, to write to it.

    Args:
      folder: where; made if it is missing, unless `make` is false.
      wait: wait for another process that holds it.

    Raises:
      UserError: another process holds it, it is missing, or it cannot be made or written.
    """
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise UserError(
            f"{folder}: no records: there is no such folder; name another with --out"
        ) from None
    except (OSError, ValueError) as error:  # the latter on a null character
        raise _cannot(folder, "used as a results folder", error) from None
    if not os.access(folder, os.W_OK):  # said now, and not after an hour of training
        os.close(handle)
        raise UserError(f"{folder}: cannot be written (permissions); give another --out")
    try:
        # a lock on the folder itself leaves no file behind and ends with the process
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(handle)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise _cannot(folder, "locked", error) from None
        raise UserError(
            f"{folder}: another unitnorm process is at work here; wait for it to end, or give "
            "another --out"
        ) from None
    try:
        recover(folder)
        yield
    finally:
        os.close(handle)


def recover(folder: Path) -> None:
    """Complete or undo what a process killed while writing records has left."""
    valid = folder / _VALID
    try:
        if valid.is_dir():
            _publish(folder)
        shutil.rmtree(folder / _STAGED, ignore_errors=True)
    except OSError as error:
        raise _cannot(folder, "repaired after an interrupted write", error) from None


def read(folder: Path) -> Records:
    """The records of a folder, checked against their hashes; empty ones if there are none.

    Raises:
      UserError: a file is missing, altered, cut or of another format; one line says which, what
        was expected and what to do.
    """
    if not os.path.isdir(folder):  # unlike Path.is_dir, without errors for impossible names
        return Records()
    if (folder / _VALID).is_dir():
        recover(folder)
    path = folder / PROVENANCE
    if not path.exists():
        for name in (*(f"{table}.csv" for table in TABLES), FILTERS):
            if (folder / name).exists():
                raise UserError(f"{path}: missing beside {name}; {REPAIR}")
        return Records()
    provenance = _read_provenance(path)
    contents = {}
    for name, digest in provenance["files"].items():
        content = _read_bytes(folder / name)
        found = hashlib.sha256(content).hexdigest()
        if found != digest:
            raise UserError(
                f"{folder / name}: altered or cut: expected SHA-256 {digest[:12]}… from "
                f"{PROVENANCE}, found {found[:12]}…; {REPAIR}"
            )
        contents[name] = content
    tables = {name: _parse_csv(folder, name, contents[f"{name}.csv"]) for name in TABLES}
    filters = _unpack_filters(folder, contents[FILTERS])
    return Records(**tables, filters=filters, provenance=provenance)


def read_alone(folder: Path) -> Records:
    """`read`, while no other process writes; also from a folder that cannot be written.

    Raises:
      UserError: as `read`, or another process is at work, or there are no records.
    """
    alone = locked(folder, make=False) if os.access(folder, os.W_OK) else contextlib.nullcontext()
    with alone:
        records = read(folder)
    if not records.provenance:
        raise UserError(f"{folder}: no records here; name another folder with --out")
    return records


def to_text(records: Records) -> str:
    """The tables, for another process."""
    return json.dumps({name: _to_csv(getattr(records, name)).decode() for name in TABLES})


def from_text(text: str) -> Records:
    """The tables of `to_text`; without filters and provenance, which only a writer needs."""
    told = json.loads(text)
    runs, history, sweep = (_parse_csv(Path(), name, told[name].encode()) for name in TABLES)
    return Records(runs, history, sweep)


def write(folder: Path, records: Records) -> None:
    """Replace a folder's records as a whole; call inside `locked`.

    Raises:
      UserError: the disk is full or the folder cannot be written; the old records stay.
    """
    files = {f"{name}.csv": _to_csv(getattr(records, name)) for name in TABLES}
    files[FILTERS] = safetensors.numpy.save(_pack_filters(records.filters))
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    records.provenance = {"format": FORMAT, **records.provenance, "files": hashes}
    text = json.dumps(records.provenance, indent=2, ensure_ascii=False) + "\n"
    files[PROVENANCE] = text.encode()
    write_files(folder, files)


def write_files(folder: Path, files: Mapping[str, bytes], replacing: str = "") -> None:
    """Put several files in place, all or none, even if the process is killed at any moment.

    Args:
      folder: where, held by `locked`.
      files: content by name; a name may have one folder in front.
      replacing: a pattern; files of such names that are not among `files` are removed afterwards.

    Raises:
      UserError: the disk is full or the folder cannot be written; what was there stays.
    """
    staged = folder / _STAGED
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        for name, content in files.items():
            path = staged / name
            path.parent.mkdir(exist_ok=True)
            with open(path, "wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
        os.rename(staged, folder / _VALID)
        _sync(folder)
        _publish(folder)
        for path in folder.glob(replacing) if replacing else ():
            if str(path.relative_to(folder)) not in files:
                path.unlink()
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise _cannot(folder, "written", error) from None


def _publish(folder: Path) -> None:
    """Move every file of a valid set into place; can be repeated after a kill."""
    valid = folder / _VALID
    for path in sorted(p for p in valid.rglob("*") if p.is_file()):
        target = folder / path.relative_to(valid)
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
    _sync(folder)
    shutil.rmtree(valid)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _to_csv(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=False, lineterminator="\n").encode()


def _parse_csv(folder: Path, name: str, content: bytes) -> pd.DataFrame:
    columns, key = TABLES[name]
    dtypes = {
        column: _DTYPES[kind] if kind != "f" else "object" for column, kind in columns.items()
    }
    try:
        with np.errstate(invalid="raise"):  # a number that is no whole one
            table = pd.read_csv(io.BytesIO(content), dtype=dtypes)
        for column in (column for column, kind in columns.items() if kind == "f"):
            if (
                column in table
            ):  # by Python, since not every version of pandas reads to the last bit
                table[column] = np.array([float(text) for text in table[column]], np.float64)
    except (ValueError, OverflowError, FloatingPointError, TypeError) as error:
        detail = " ".join(str(error).split())
        raise UserError(
            f"{folder / name}.csv: not a table of records: {detail}; {REPAIR}"
        ) from None
    if list(table.columns) != list(columns):
        raise UserError(
            f"{folder / name}.csv: columns {','.join(map(str, table.columns))}; expected "
            f"{','.join(columns)}; {REPAIR}"
        )
    named = table["update"].astype(str).str.fullmatch(r"[\w.+-]+")
    if not (named & table["update"].notna() & (table["depth"] > 0) & (table["run"] >= 0)).all():
        raise UserError(f"{folder / name}.csv: a row names no depth, update and run; {REPAIR}")
    if table.duplicated(key).any():
        raise UserError(f"{folder / name}.csv: a row stands there twice; {REPAIR}")
    return table


def _read_provenance(path: Path) -> dict[str, Any]:
    try:
        provenance = json.loads(_read_bytes(path))
        if provenance["format"] != FORMAT:
            raise UserError(
                f"{path}: records of format {provenance['format']!r:.20}, this version of unitnorm "
                f"reads format {FORMAT}; give another --out"
            )
        _Provenance.model_validate(provenance)
        if set(provenance["files"]) != {*(f"{name}.csv" for name in TABLES), FILTERS}:
            raise KeyError("files")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{path}: damaged: not the provenance of a results folder; {REPAIR}"
        ) from None
    return provenance


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {REPAIR}") from None


def _pack_filters(filters: Mapping[tuple[int, str], np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{depth}/{update}": array for (depth, update), array in sorted(filters.items())}


def _unpack_filters(folder: Path, content: bytes) -> dict[tuple[int, str], np.ndarray]:
    try:
        arrays = safetensors.numpy.load(content)
        names = {name: name.partition("/") for name in arrays}
        return {(int(names[name][0]), names[name][2]): arrays[name] for name in arrays}
    except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        detail = " ".join(str(error).split())
        raise UserError(
            f"{folder / FILTERS}: not the filters of runs: {detail}; {REPAIR}"
        ) from None


def _cannot(folder: Path, what: str, error: OSError | ValueError) -> UserError:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    hint = "free some space" if full else "give another --out"
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return UserError(f"{folder}: cannot be {what} ({reason}); {hint}")
