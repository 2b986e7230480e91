"""What is missing is computed and recorded until nothing is: the same for every experiment.

An experiment says in `missing` which groups of runs can be computed now, and in `compute` how a
group gives rows; it is a pure function of the group and its data set. `complete` computes the
groups in this process, or has an engine compute them (`cluster`), and stores the rows as they come.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd

from unitnorm.run.loop import Session
from unitnorm.run.records import Records, Schema


@dataclass(frozen=True)
class Group:
    """Runs that one program computes, and that are recorded together.

    Attributes:
      title: what the user calls it, such as "train depth 4".
      table: the table that they are recorded in, and missing from.
      cells: what names each run, a row each, in the columns `Schema.cell`.
      what: all that the experiment needs to compute them.
      data: the name of their data set.
    """

    title: str
    table: str
    cells: pd.DataFrame
    what: Any
    data: str = ""

    def names(self, schema: Schema) -> frozenset[str]:
        """The names of its records, see `Schema.names`."""
        return frozenset(schema.names(self.table, self.cells))


class Found(NamedTuple):
    """What a group gives to the records.

    `rows` by table; `files` by name; `arrays` by the name of a safetensors file, to be put beside
    those that are in it.
    """

    rows: Mapping[str, pd.DataFrame] = {}
    files: Mapping[str, bytes] = {}
    arrays: Mapping[str, Mapping[str, np.ndarray]] = {}

    def added_to(self, records: Records) -> Records:
        """The records with all of it."""
        for table, rows in self.rows.items():
            records = records.with_rows(table, rows)
        return records.with_files(self.files).with_arrays(self.arrays)


def together(found: Sequence[Found]) -> Found:
    """What several groups give, as one: to add each by itself would sort the tables each time."""
    rows: dict[str, list[pd.DataFrame]] = {}
    files: dict[str, bytes] = {}
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for mine in found:
        for table, more in mine.rows.items():
            rows.setdefault(table, []).append(more)
        files |= mine.files
        for name, named in mine.arrays.items():
            arrays.setdefault(name, {}).update(named)
    joined = {table: pd.concat(parts, ignore_index=True) for table, parts in rows.items()}
    return Found(joined, files, arrays)


class Experiment(Protocol):
    """What an experiment brings. It is pickled where another process computes."""

    @property
    def schema(self) -> Schema:
        """Of its records."""

    def missing(self, records: Records) -> Iterable[Group]:
        """The groups without records that can be computed now, the first to be computed first."""

    def again(self, records: Records, chosen: Mapping[str, Any]) -> Iterable[Group]:
        """The groups that compute a recorded run again, which is a row of the table "runs"."""

    def compute(self, group: Group, data: Any, session: Session) -> Found:
        """The rows of a group."""


class Done(NamedTuple):
    """A group that has ended, what it gave, and the name of the worker, "" in this process."""

    group: Group
    found: Found
    worker: str = ""


class Engine(Protocol):
    """Others who compute groups; see `cluster`."""

    def has_room(self) -> bool:
        """Another group can be given."""

    def give(self, experiment: Experiment, group: Group, data: Any, session: Session) -> None:
        """Have a group computed."""

    def next(self, session: Session) -> list[Done]:
        """The groups that are done, as soon as there is one.

        Raises:
          Interrupted: somebody has asked to stop.
        """


class Plan(Protocol):
    """What is to be completed; a `job.Job`."""

    experiment: Experiment
    data: Mapping[str, Any]  # the data sets by name
    records: Records
    session: Session
    engine: Engine | None  # None: this process computes

    def store(self, records: Records, done: Sequence[Done] = ()) -> None:
        """Keep records that have grown, and hear of the groups that have ended."""


def complete(plan: Plan) -> None:
    """Compute what is missing.

    Raises:
      Interrupted: on request; what has ended is stored.
    """
    experiment, records = plan.experiment, plan.records

    def grow(found: Found) -> None:
        nonlocal records
        records = found.added_to(records)
        plan.store(records)

    session = replace(plan.session, grow=grow)
    running: set[frozenset[str]] = set()
    while True:
        busy: frozenset[str] = frozenset().union(*running)
        done: list[Done] = []
        for group in experiment.missing(records):
            if plan.engine is None:
                done = [Done(group, experiment.compute(group, plan.data[group.data], session))]
                break
            if not plan.engine.has_room():
                break
            names = group.names(experiment.schema)
            if not names & busy:
                plan.engine.give(experiment, group, plan.data[group.data], session)
                running.add(names)
                busy |= names
        if plan.engine is not None and running:
            done = plan.engine.next(session)
        if not done:
            return
        for group, _, _ in done:
            running.discard(group.names(experiment.schema))
        records = together([found for _, found, _ in done]).added_to(records)
        plan.store(records, done)
