"""What is missing is computed and recorded until nothing is: the same for every experiment.

An experiment says in `missing` which groups of runs can be computed now, and in `compute` how a
group gives rows; it is a pure function of the group and its data set. `complete` computes the
groups in this process, or has the workers of a `cluster` compute them, and stores what they give.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import pandas as pd

from unitnorm.run.loop import Session
from unitnorm.run.records import Records, Schema

if TYPE_CHECKING:
    from unitnorm.run.job import Job


@dataclass(frozen=True)
class Group:
    """Runs that one program computes, and that are recorded together."""

    title: str  # what the user calls it, such as "train depth 4"
    table: str  # that they are recorded in, and missing from
    # a row for each run: what names it, in the columns `Schema.cell`, and whatever else is given
    cells: pd.DataFrame
    what: Any = None  # what the experiment needs beside that to compute them
    data: str = ""  # the name of their data set

    def names(self, schema: Schema) -> set[str]:
        """The names of its records, see `Schema.names`."""
        return schema.names(self.table, self.cells)


class Found(NamedTuple):
    """What a group gives to the records."""

    rows: Mapping[str, pd.DataFrame] = {}  # by table
    files: Mapping[str, bytes] = {}  # by name
    # by the name of a safetensors file, to be put beside those that are in it
    arrays: Mapping[str, Mapping[str, np.ndarray]] = {}


def add(records: Records, *found: Found) -> Records:
    """The records with all that several groups give."""
    rows: dict[str, list[pd.DataFrame]] = {}
    for mine in found:
        for table, more in mine.rows.items():
            rows.setdefault(table, []).append(more)
        records = records.with_files(mine.files).with_arrays(mine.arrays)
    for table, parts in rows.items():  # at once, as each time the whole table is sorted
        records = records.with_rows(table, pd.concat(parts, ignore_index=True))
    return records


class Experiment(Protocol):
    """What an experiment brings. It is pickled where another process computes."""

    @property
    def schema(self) -> Schema:
        """Of its records."""

    def missing(self, records: Records) -> Iterable[Group]:
        """The groups without records that can be computed now, the first to be computed first."""

    def compute(self, group: Group, data: Any, session: Session) -> Found:
        """The rows of a group."""


class Verifiable(Experiment, Protocol):
    """One whose runs `unitnorm verify` can compute again."""

    def again(self, records: Records, chosen: Mapping[str, Any]) -> Iterable[Group]:
        """The groups that compute a recorded run again, which is a row of the table "runs"."""


class Done(NamedTuple):
    """A group that has ended, what it gave, and the name of the worker, "" in this process."""

    group: Group
    found: Found
    worker: str = ""


def complete(job: Job) -> None:
    """Compute what is missing. It is `Interrupted` on request, when what has ended is stored."""
    experiment, records = job.experiment, job.records

    def grow(found: Found) -> None:
        nonlocal records
        records = add(records, found)
        job.store(records)

    session = replace(job.session, grow=grow)
    running: set[str] = set()  # the names of what the engine was given
    while True:
        done: list[Done] = []
        for group in experiment.missing(records):
            if job.engine is None:
                done = [Done(group, experiment.compute(group, job.data[group.data], session))]
                break
            if not job.engine.has_room():
                break
            names = group.names(experiment.schema)
            if not names & running:
                job.engine.give(experiment, group, job.data[group.data])
                running |= names
        if job.engine is not None and running:
            done = job.engine.next(session)
        if not done:
            return
        records = add(records, *(found for _, found, _ in done))
        job.store(records, done)
        for group, found, _ in done:
            names = group.names(experiment.schema)
            running -= names
            if not names <= experiment.schema.names(group.table, found.rows[group.table]):
                # it would be missing again, without end
                raise RuntimeError(f"{group.title}: what was computed are other runs than planned")
