"""Verify: one recorded run is computed again from its provenance, and compared bit for bit.

The records' own hashes are checked when they are read (`run.records.read`); here it is the config's
and the data's hash, then the sweep and the full training of the chosen run. Change here what is
compared, and what is said about it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from unitnorm.data import Dataset
from unitnorm.errors import UserError
from unitnorm.run import config as configs
from unitnorm.run import provenance
from unitnorm.run.loop import Session
from unitnorm.run.records import PROVENANCE, Records
from unitnorm.table2 import experiment
from unitnorm.table2.config import Config
from unitnorm.table2.experiment import Group
from unitnorm.table2.schema import SCHEMA

MATTERS = {"versions": ("unitnorm", "jax", "jaxlib"), "device": ("platform", "kind", "machine")}


@dataclass(frozen=True)
class Check:
    """One thing that was compared."""

    what: str
    matches: bool
    found: str  # one line


def choose(known: Records, depth: int | None, update: str | None, run: int | None) -> Group:
    """The first recorded run of that depth, update and number (None: any).

    Raises:
      UserError: there is none.
    """
    runs = known["runs"]
    if runs.empty:
        raise UserError("no run is recorded; `unitnorm train` records some")
    for column, wanted in (("depth", depth), ("update", update), ("run", run)):
        if wanted is not None:
            there = ", ".join(str(value) for value in runs[column].unique()[:20])
            runs = runs[runs[column] == wanted]
            if runs.empty:
                raise UserError(f"--{column} {wanted}: no such run is recorded; there are {there}")
    first = runs.iloc[0]
    return Group(int(first["depth"]), (str(first["update"]),), (int(first["run"]),))


def verify(known: Records, data: Dataset, group: Group, session: Session) -> Iterator[Check]:
    """Compute a recorded run again and compare, one check after the other.

    Args:
      known: the records of a folder, as read.
      data: the data set that they name.
      group: the run; see `choose`.

    Raises:
      UserError: the recorded config cannot be read by this version.
    """
    config = configs.parse(known.provenance["config"], PROVENANCE, Config)
    yield _same("config", known.provenance["config_sha256"], config.fingerprint())
    yield _same("data", known.provenance["data"]["sha256"], data.sha256)
    swept = experiment.sweep_group(config, data, group, session)
    yield compare("sweep", known["sweep"], swept, group)
    trained = experiment.train_group(config, data, group, known["sweep"], session)
    yield compare("history", known["history"], trained.history, group)
    yield compare("runs", known["runs"], trained.runs, group)
    recorded = experiment.unpack_filters(known)
    for cell, filters in trained.filters.items():
        same = cell in recorded and np.array_equal(recorded[cell], filters)
        found = "the same bits" if same else "other values than recorded"
        yield Check("filters", same, found)


def compare(table: str, recorded: pd.DataFrame, computed: pd.DataFrame, group: Group) -> Check:
    """The rows of a run in two tables: the same in every digit, or how far apart."""
    mine = SCHEMA.rows_of(recorded, group.cells())
    old, new = (SCHEMA.frame(table, t.to_dict("records")) for t in (mine, computed))
    for column in SCHEMA.tables[table].later:
        if old[column].isna().all():  # recorded before there was such a column
            new[column] = np.nan
    if old.equals(new):
        return Check(f"{table}.csv", True, f"{_rows(old)} with the same bits")
    if len(old) != len(new):
        return Check(f"{table}.csv", False, f"{_rows(old)} recorded, {_rows(new)} computed")
    differs = (old != new) & ~(old.isna() & new.isna())
    columns = [column for column in old if differs[column].any()]
    first = old[differs.any(axis=1)].iloc[0]
    where = "" if table != "history" else f" from epoch {first['epoch']} on"
    return Check(
        f"{table}.csv",
        False,
        f"{int(differs.any(axis=1).sum())} of {_rows(old)} differ{where}: "
        + ", ".join(f"{column} {_apart(old[column], new[column])}" for column in columns),
    )


def elsewhere(recorded: dict[str, Any]) -> str:
    """In what this machine and its versions differ from those recorded; "" where they do not."""
    here = provenance.command_entry("", time.time(), 0.0, 0)
    notes: list[list[str]] = [
        [
            f"{key} {command[part].get(key)}, here {here[part][key]}"
            for part, keys in MATTERS.items()
            for key in keys
            if command[part].get(key) != here[part][key]
        ]
        for command in recorded["commands"]
    ]
    fewest: list[str] = min(notes, key=len, default=[])
    return ", ".join(fewest)


def _same(what: str, recorded: str, found: str) -> Check:
    if recorded == found:
        return Check(what, True, f"SHA-256 {found[:12]}… as recorded")
    return Check(what, False, f"SHA-256 {found[:12]}…, recorded {recorded[:12]}…")


def _rows(table: pd.DataFrame) -> str:
    return f"{len(table)} row" + "s" * (len(table) != 1)


def _apart(old: pd.Series, new: pd.Series) -> str:
    if old.dtype == np.float64:
        return f"by up to {np.nanmax(np.abs(old - new)):.3g}"
    pair = pd.DataFrame({"old": old, "new": new}).query("old != new").iloc[0]
    return f"{pair['old']} there, {pair['new']} here"
