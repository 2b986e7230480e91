"""The records of a results folder: tables of runs, their provenance, and how they reach the disk.

An experiment says in a `Schema` which tables and other files its folder holds; `provenance.json`
names the config that all of them belong to and the SHA-256 of each. They change together: a new set
is staged beside the old one, one rename makes it valid, and whoever opens the folder next completes
what a killed process left undone. To add a column, add it to the experiment's schema and fill it in
the experiment.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pandas as pd
import pydantic
import safetensors
import safetensors.numpy

from unitnorm.errors import UserError, one_line, system_faults

FORMAT = 1  # of provenance.json and the tables; raised when an older reader would misread them
PROVENANCE = "provenance.json"
REPAIR = "restore the folder from a copy, or give another --out"

WRITING_S = 2.0  # so long a reader waits for a writer to have put its set in place
_STAGED, _VALID, _LOCK = ".records-staged", ".records-valid", ".lock"


def as_float32(value: float) -> float:
    """The shortest decimal of the nearest float32: 0.0701, and not 0.07010000199079514."""
    return float(str(np.float32(value)))


@dataclass(frozen=True)
class Table:
    """A table of an experiment."""

    # name → kind: "i" whole number, "f" float32, written as its shortest decimal, "d" float64, "b"
    # truth value, "s" text
    columns: Mapping[str, str]
    key: tuple[str, ...]  # the columns that name a row, in the order in which rows are sorted
    descending: tuple[str, ...] = ()  # those of `key` that are sorted from the largest on
    packed: bool = False  # the file is NAME.csv.gz, for tables of many thousand rows
    # columns that older records lack, each with the value that is read for them then
    later: Mapping[str, Any] = field(default_factory=dict)

    def typed(self, rows: pd.DataFrame) -> pd.DataFrame:
        dtypes = {"i": "int64", "f": "float64", "d": "float64", "b": "bool", "s": "object"}
        return rows.astype({name: dtypes[kind] for name, kind in self.columns.items()})

    def sorted(self, rows: pd.DataFrame) -> pd.DataFrame:
        ascending = [name not in self.descending for name in self.key]
        return rows.sort_values(list(self.key), ascending=ascending, ignore_index=True)


class About(pydantic.BaseModel):
    """What provenance.json says of the data: the keys that are relied on; others may be there."""

    model_config = pydantic.ConfigDict(extra="allow", strict=True)


@dataclass(frozen=True)
class Schema:
    """What the results folder of an experiment holds."""

    kind: str  # of experiment, such as "table2"; a folder of another kind is refused
    tables: Mapping[str, Table]
    cell: tuple[str, ...]  # the columns that name a run in every table
    files: str = r"(?!)"  # pattern of the names of further files, such as weights
    about: type[About] = About  # the keys of provenance.json's `data`
    required: tuple[str, ...] = ()  # further files that are always there

    def file_of(self, table: str) -> str:
        return f"{table}.csv.gz" if self.tables[table].packed else f"{table}.csv"

    def always(self) -> list[str]:
        """The files that are always there."""
        return [*map(self.file_of, self.tables), *self.required]

    def frame(self, table: str, rows: pd.DataFrame | Sequence[Mapping[Any, Any]]) -> pd.DataFrame:
        """Rows as a table with its columns, dtypes and order."""
        spec = self.tables[table]
        result = pd.DataFrame(rows, columns=list(spec.columns))
        for name, kind in spec.columns.items():
            if kind == "f":
                result[name] = [as_float32(value) for value in result[name]]
        return spec.sorted(spec.typed(result))

    def names(self, table: str, cells: pd.DataFrame) -> set[str]:
        """What the runs of `cells` are called in a table, such as "runs/4/un/0"."""
        rows = cells[list(self.cell)].drop_duplicates()
        return {"/".join([table, *map(str, row)]) for row in rows.itertuples(index=False)}

    def among(self, table: pd.DataFrame, cells: pd.DataFrame) -> np.ndarray:
        """For each row of `table`, whether its run is among `cells`."""
        key = list(self.cell)
        return pd.MultiIndex.from_frame(table[key]).isin(pd.MultiIndex.from_frame(cells[key]))


@dataclass(frozen=True)
class Records:
    """What a results folder holds; empty tables where nothing is recorded yet."""

    schema: Schema
    tables: dict[str, pd.DataFrame]  # by name, with the schema's columns and order
    files: dict[str, bytes] = field(default_factory=dict)  # the further ones
    provenance: dict[str, Any] = field(default_factory=dict)  # {} before the first write

    @classmethod
    def empty(cls, schema: Schema) -> Records:
        return cls(schema, {name: schema.frame(name, []) for name in schema.tables})

    def __getitem__(self, table: str) -> pd.DataFrame:
        return self.tables[table]

    def is_empty(self) -> bool:
        return all(table.empty for table in self.tables.values())

    def with_rows(self, table: str, rows: pd.DataFrame) -> Records:
        """With these rows in place of whatever the table holds of the same runs."""
        old = self.tables[table]
        kept = old[~self.schema.among(old, rows)]
        merged = pd.concat([part for part in (kept, rows) if len(part)] or [kept])
        merged = self.schema.tables[table].sorted(merged)
        return replace(self, tables={**self.tables, table: merged})

    def with_files(self, files: Mapping[str, bytes]) -> Records:
        return replace(self, files={**self.files, **files})

    def with_arrays(self, arrays: Mapping[str, Mapping[str, np.ndarray]]) -> Records:
        """With these arrays put into safetensors files, beside those that are there."""
        files = {
            name: safetensors.numpy.save(dict(sorted({**self.arrays(name), **mine}.items())))
            for name, mine in arrays.items()
        }
        return self.with_files(files)

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of a safetensors file; none where there is no such file."""
        try:
            return safetensors.numpy.load(self.files[name]) if name in self.files else {}
        except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise UserError(f"{name}: not arrays of runs: {one_line(error)}; {REPAIR}") from None

    def without(self, cells: pd.DataFrame) -> Records:
        """Without the rows of these runs."""
        tables = {
            name: table[~self.schema.among(table, cells)].reset_index(drop=True)
            for name, table in self.tables.items()
        }
        return replace(self, tables=tables)

    def cells(self) -> pd.DataFrame:
        """What names the recorded runs, a row each or more."""
        return pd.concat([table[list(self.schema.cell)] for table in self.tables.values()])

    def recorded(self) -> set[str]:
        """The names of the recorded runs, table by table; see `Schema.names`."""
        return set().union(*(self.schema.names(name, t) for name, t in self.tables.items()))


class _Command(About):
    command: str
    started: str
    rows: int
    versions: dict[str, str]
    device: dict[str, Any]


class _Provenance(About):
    kind: str = ""  # the first records name none
    config: dict[str, Any]
    config_sha256: str
    data: dict[str, Any]
    commands: list[_Command]
    files: dict[str, str]


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def locked(folder: Path, *, make: bool = True, needed: bool = True) -> Iterator[bool]:
    """Hold a results folder for one process, to write to it; `make` it where it is missing.

    Where another process holds it, or it cannot be written, that is a `UserError` if it is
    `needed`; else False is given.
    """
    if make:
        with system_faults(folder, "used as a results folder"):
            folder.mkdir(parents=True, exist_ok=True)
    elif not os.path.isdir(folder):  # unlike Path.is_dir, without errors for impossible names
        raise UserError(f"{folder}: no records: there is no such folder; name another with --out")
    lock = filelock.FileLock(folder / _LOCK, timeout=0.1, poll_interval=0.01)
    held, fault = os.access(folder, os.W_OK), "cannot be written (permissions)"
    if held:
        with system_faults(folder, "locked"):
            try:
                lock.acquire()
            except filelock.Timeout:
                held, fault = False, "another unitnorm process is at work here; wait for it to end"
    if needed and not held:  # said now, and not after an hour of training
        raise UserError(f"{folder}: {fault}, or give another --out")
    try:
        if held:  # complete or undo what a process killed while writing has left
            with system_faults(folder, "repaired after an interrupted write"):
                if (folder / _VALID).is_dir():
                    _publish(folder)
            shutil.rmtree(folder / _STAGED, ignore_errors=True)
        yield held
    finally:
        if held:
            # while it is held: whoever has it open finds that it has no name, and looks again
            with contextlib.suppress(OSError):  # as on a system that removes no open file
                os.unlink(folder / _LOCK)
            lock.release()


def read(folder: Path, schema: Schema) -> Records:
    """The records of a folder, checked against their hashes; empty ones if there are none.

    Call inside `locked`, which completes what a killed process has left, or see `read_alone`.
    Whatever is missing, altered, cut or of another format or experiment is a `UserError`.
    """
    path = folder / PROVENANCE
    if not os.path.exists(path):  # unlike Path.exists, without errors for impossible names
        for name in schema.always():
            if os.path.exists(folder / name):
                raise UserError(f"{path}: missing beside {name}; {REPAIR}")
        return Records.empty(schema)
    provenance = _read_provenance(path, schema)
    contents = {}
    for name, digest in provenance["files"].items():
        contents[name] = _read_bytes(folder / name)
        found = hashlib.sha256(contents[name]).hexdigest()
        if found != digest:
            raise UserError(
                f"{folder / name}: altered or cut: expected SHA-256 {digest[:12]}… from "
                f"{PROVENANCE}, found {found[:12]}…; {REPAIR}"
            )
    tables = {
        name: _parse_csv(schema, name, contents.pop(schema.file_of(name)), folder)
        for name in schema.tables
    }
    return Records(schema, tables, contents, provenance)


def kind_of(folder: Path) -> str | None:
    """Which kind of experiment a folder's records are of; None where there are none to be read."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        return str(json.loads((folder / PROVENANCE).read_bytes())["kind"])
    return None


def read_alone(folder: Path, schema: Schema) -> Records:
    """`read`, to look at: also where another process is at work, or the folder is not writable."""
    with locked(folder, make=False, needed=False) as held:
        return read_to_show(folder, schema, held)


def read_to_show(folder: Path, schema: Schema, held: bool) -> Records:
    """The same of a folder that is `held`, or not: then until no other process is in between."""
    until = time.monotonic() + (0.0 if held else WRITING_S)
    while True:
        try:
            records = read(folder, schema)
            break
        except UserError:  # of a set that is being put in place, or damaged
            if time.monotonic() >= until:
                raise
            time.sleep(0.02)
    if not records.provenance:
        raise UserError(f"{folder}: no records here; name another folder with --out")
    return records


def write(folder: Path, records: Records) -> Records:
    """Replace a folder's records as a whole, inside `locked`; they come back with their hashes."""
    schema, files = records.schema, {}
    for name, table in records.tables.items():
        content = table.to_csv(index=False, lineterminator="\n").encode()
        if schema.tables[name].packed:
            content = gzip.compress(content, 6, mtime=0)  # 9 takes twice as long
        files[schema.file_of(name)] = content
    files |= records.files
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    about = {"format": FORMAT, "kind": schema.kind}
    records = replace(records, provenance={**about, **records.provenance, "files": hashes})
    text = json.dumps(records.provenance, indent=2, ensure_ascii=False) + "\n"
    write_files(folder, files | {PROVENANCE: text.encode()})
    return records


def write_files(folder: Path, files: Mapping[str, bytes], replacing: str = "") -> None:
    """Put several files in place, all or none, even if the process is killed at any moment.

    Where the disk is full or the folder cannot be written, what was there stays.

    Args:
      folder: where, held by `locked`.
      files: content by name; a name may have one folder in front.
      replacing: a pattern; files of such names that are not among `files` are removed afterwards.
    """
    staged = folder / _STAGED
    with system_faults(folder, "written"):
        try:
            for name, content in files.items():
                path = staged / name
                path.parent.mkdir(parents=True, exist_ok=True)
                write_synced(path, content)
            os.rename(staged, folder / _VALID)
        finally:
            shutil.rmtree(staged, ignore_errors=True)  # a full disk needs the space
        sync_folder(folder)
        _publish(folder)
        for path in folder.glob(replacing) if replacing else ():
            if str(path.relative_to(folder)) not in files:
                path.unlink()


def _publish(folder: Path) -> None:
    """Move every file of a valid set into place; can be repeated after a kill."""
    valid = folder / _VALID
    for path in sorted(p for p in valid.rglob("*") if p.is_file()):
        target = folder / path.relative_to(valid)
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
    sync_folder(folder)
    shutil.rmtree(valid)


def write_synced(path: Path, content: bytes) -> None:
    """Make a file; it is on the disk when this returns, though perhaps not its name."""
    with open(path, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Have the names of a folder's files on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _number(text: str) -> float:
    """By Python: not every version of pandas reads to the last bit."""
    return float(text or "nan")


_TRUTH = {"True": True, "False": False}
_READERS: dict[str, Any] = {"i": int, "f": _number, "d": _number, "b": _TRUTH.__getitem__, "s": str}


def _parse_csv(schema: Schema, name: str, content: bytes, folder: Path) -> pd.DataFrame:
    spec, path = schema.tables[name], folder / schema.file_of(name)
    try:
        text = io.BytesIO(gzip.decompress(content) if spec.packed else content)
        readers = {column: _READERS[kind] for column, kind in spec.columns.items()}
        table = pd.read_csv(text, converters=readers, keep_default_na=False)
        table = table.assign(**{c: x for c, x in spec.later.items() if c not in table})
        if set(table.columns) != set(spec.columns):
            there, expected = ",".join(map(str, table.columns)), ",".join(spec.columns)
            raise UserError(f"{path}: columns {there}; expected {expected}; {REPAIR}")
        table = spec.typed(table[list(spec.columns)])
    except (ValueError, OverflowError, LookupError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a table of records: {one_line(error)}; {REPAIR}") from None
    for column in schema.cell:
        values = table[column]
        is_text = spec.columns[column] == "s"
        if not (values.str.fullmatch(r"[\w.+@:=-]+") if is_text else values >= 0).all():
            raise UserError(f"{path}: a row names no {', '.join(schema.cell)}; {REPAIR}")
    if table.duplicated(list(spec.key)).any():
        raise UserError(f"{path}: a row stands there twice; {REPAIR}")
    return table


def _read_provenance(path: Path, schema: Schema) -> dict[str, Any]:
    try:
        provenance = json.loads(_read_bytes(path))
        if provenance["format"] != FORMAT:
            raise UserError(
                f"{path}: records of format {provenance['format']!r:.20}, this version of unitnorm "
                f"reads format {FORMAT}; give another --out"
            )
        read = _Provenance.model_validate(provenance)
        if read.kind not in ("", schema.kind):
            wrote = read.commands[-1].command if read.commands else "another"
            raise UserError(
                f"{path.parent}: holds records of the kind {read.kind:.40}, not {schema.kind}; "
                f"they are of the command `{wrote:.80}`"
            )
        schema.about.model_validate(read.data)
        # only the names of this schema: a provenance from elsewhere must not lead out of the folder
        always, files = set(schema.always()), set(read.files)
        if not always <= files or not all(re.fullmatch(schema.files, x) for x in files - always):
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
