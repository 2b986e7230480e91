"""What is missing is computed and recorded until nothing is: the same for every experiment.

An experiment says in `missing` which groups of runs can be computed now, and in `compute` how a
group gives rows; it is a pure function of the group and its data set. `complete` hands the groups
to an engine, here `Here`, in this process (`cluster` has others), and stores the rows as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
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
    """Who computes groups."""

    def has_room(self) -> bool:
        """Another group can be given."""

    def give(self, experiment: Experiment, group: Group, data: Any, session: Session) -> None:
        """Have a group computed."""

    def next(self, session: Session) -> list[Done]:
        """The groups that are done, as soon as there is one.

        Raises:
          Interrupted: somebody has asked to stop.
        """


@dataclass
class Here:
    """This process, on all of its devices, a group at a time."""

    given: list[Callable[[], Done]] = field(default_factory=list)

    def has_room(self) -> bool:
        """None is waiting."""
        return not self.given

    def give(self, experiment: Experiment, group: Group, data: Any, session: Session) -> None:
        """Compute it at the call of `next`."""
        self.given.append(lambda: Done(group, experiment.compute(group, data, session)))

    def next(self, session: Session) -> list[Done]:
        """Compute the group that was given."""
        return [self.given.pop()()]


def complete(
    experiment: Experiment,
    data: Mapping[str, Any],
    records: Records,
    session: Session,
    store: Callable[[Records, list[Done]], None],
    engine: Engine,
) -> Records:
    """Compute what is missing.

    Args:
      data: the data sets by name.
      store: is given the records each time that they have grown, and the groups that have ended.

    Raises:
      Interrupted: on request; what has ended is stored.
    """

    def grow(found: Found) -> None:
        nonlocal records
        records = found.added_to(records)
        store(records, [])

    session = replace(session, grow=grow)
    running: dict[frozenset[str], Group] = {}
    while True:
        busy: frozenset[str] = frozenset().union(*running)
        for group in experiment.missing(records):
            if not engine.has_room():
                break
            names = group.names(experiment.schema)
            if not names & busy:
                engine.give(experiment, group, data[group.data], session)
                running[names] = group
                busy |= names
        if not running:
            return records
        done = engine.next(session)
        for group, found, _ in done:
            del running[group.names(experiment.schema)]
            records = found.added_to(records)
        store(records, done)
