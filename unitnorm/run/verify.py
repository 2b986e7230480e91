"""Verify: a recorded run is computed again, and compared bit for bit.

The records' own hashes are checked when they are read (`records.read`); how a run is computed again
is the experiment's `again`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from unitnorm.errors import UserError
from unitnorm.run import provenance
from unitnorm.run.loop import Session
from unitnorm.run.planner import Verifiable
from unitnorm.run.records import Records

MATTERS = {"versions": ("unitnorm", "jax", "jaxlib"), "device": ("platform", "kind", "machine")}


class Check(NamedTuple):
    """One thing that was compared, and what was found, in one line."""

    what: str
    matches: bool
    found: str


def choose(runs: pd.DataFrame, **wanted: int | str | None) -> pd.DataFrame:
    """The first of the recorded runs with these values (None: any), as a table of one row."""
    if runs.empty:
        raise UserError("no run is recorded; `unitnorm train` records some")
    for column, value in wanted.items():
        if value is not None:
            there = ", ".join(map(str, runs[column].unique()[:20]))
            runs = runs[runs[column] == value]
            if runs.empty:
                raise UserError(f"--{column} {value}: no such run is recorded; there are {there}")
    return runs.iloc[[0]]


def verify(
    experiment: Verifiable, known: Records, data: Any, chosen: pd.DataFrame, session: Session
) -> Iterator[Check]:
    """Compute a recorded run, `chosen`, again and compare, one check after the other."""
    row: Mapping[str, Any] = {str(key): value for key, value in chosen.iloc[0].items()}
    for group in experiment.again(known, row):
        found = experiment.compute(group, data, session)
        for table in reversed([*found.rows]):
            yield compare(table, known, found.rows[table], chosen)
        for name, arrays in found.arrays.items():
            recorded = known.arrays(name)
            for key, array in arrays.items():
                same = key in recorded and np.array_equal(recorded[key], array)
                yield Check(name, same, "the same bits" if same else "other values than recorded")


def compare(table: str, known: Records, computed: pd.DataFrame, chosen: pd.DataFrame) -> Check:
    """A run's rows as recorded and as computed: the same in every digit, or how far apart."""
    schema, file = known.schema, known.schema.file_of(table)
    mine = (rows[schema.among(rows, chosen)] for rows in (known[table], computed))
    old, new = (schema.frame(table, rows.to_dict("records")) for rows in mine)
    for column, default in schema.tables[table].later.items():
        if (old[column].isna() | (old[column] == default)).all():  # recorded before there was one
            new[column] = old[column]
    if old.equals(new):
        return Check(file, True, f"{_rows(old)} with the same bits")
    if len(old) != len(new):
        return Check(file, False, f"{_rows(old)} recorded, {_rows(new)} computed")
    differs = (old != new) & ~(old.isna() & new.isna())
    apart = differs.any(axis=1)
    where = f" from epoch {old[apart]['epoch'].iloc[0]} on" if "epoch" in old else ""
    columns = ", ".join(
        f"{column} {_apart(old[column], new[column])}" for column in old if differs[column].any()
    )
    return Check(file, False, f"{apart.sum()} of {_rows(old)} differ{where}: {columns}")


def elsewhere(recorded: dict[str, Any]) -> str:
    """In what machine, versions and commit differ from those recorded; "" where they do not."""
    here = {"versions": provenance.versions(), "device": provenance.device()}
    notes, commit = [], provenance.commit()
    for command in recorded["commands"]:
        note = [
            f"{key} {command[part].get(key)}, here {here[part][key]}"
            for part, keys in MATTERS.items()
            for key in keys
            if command[part].get(key) != here[part][key]
        ]
        if command.get("commit") != commit:
            note.append(f"commit {command['commit']}, here {commit}")
        notes.append(note)
    fewest: list[str] = min(notes, key=len, default=[])
    return ", ".join(fewest)


def compare_hashes(what: str, recorded: str, found: str) -> Check:
    """Whether something has the SHA-256 recorded."""
    if recorded == found:
        return Check(what, True, f"SHA-256 {found[:12]}… as recorded")
    return Check(what, False, f"SHA-256 {found[:12]}…, recorded {recorded[:12]}…")


def _rows(table: pd.DataFrame) -> str:
    return f"{len(table)} row" + "s" * (len(table) != 1)


def _apart(old: pd.Series, new: pd.Series) -> str:
    if old.dtype == np.float64:
        return f"by up to {np.nanmax(np.abs(old - new)):.3g}"
    pair = pd.DataFrame({"old": old, "new": new}).query("old != new").iloc[0].astype(str)
    # what is packed says nothing
    return "{old} there, {new} here".format(**pair) if pair.str.len().max() <= 40 else "differs"
