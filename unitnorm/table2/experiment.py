"""Table 2: which runs its sweep and its full trainings have, and their rows.

A group is the runs of one depth that are missing; one program trains it, with an arm per update.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from unitnorm.archbn import protocol, run_many
from unitnorm.archbn.config import Config
from unitnorm.archbn.model import archbn
from unitnorm.archbn.training import Arm, Run, Settings, Task
from unitnorm.data import Dataset
from unitnorm.errors import UserError
from unitnorm.run.checkpoints import Part
from unitnorm.run.loop import Session, train
from unitnorm.run.planner import Found, Group
from unitnorm.run.provenance import fingerprint
from unitnorm.run.records import REPAIR, Records, Schema
from unitnorm.table2.schema import CELL, FILTERS, SCHEMA


@dataclass(frozen=True)
class Table2:
    """The experiment of a config; see `planner.Experiment`."""

    config: Config
    sweep_only: bool = False
    schema: Schema = SCHEMA

    def missing(self, records: Records) -> Iterator[Group]:
        """Sweeps first; full trainings of what is swept."""
        cells, sweep = list_cells(self.config), records["sweep"]
        untrained = cells[~SCHEMA.among(cells, records["runs"])]
        if self.sweep_only or len(untrained):
            yield from _by_depth("sweep", cells[~SCHEMA.among(cells, sweep)])
        if self.sweep_only:
            return
        for group in _by_depth("runs", with_rates(untrained, sweep)):
            if SCHEMA.among(group.cells, sweep).all():
                yield group

    def again(self, records: Records, chosen: Mapping[str, Any]) -> Iterator[Group]:
        """The run's sweep, and its full training at the rate recorded."""
        cells = pd.DataFrame([{name: chosen[name] for name in CELL}])
        yield from _by_depth("sweep", cells)
        yield from _by_depth("runs", with_rates(cells, records["sweep"]))

    def compute(self, group: Group, data: Dataset, session: Session) -> Found:
        """The rows of a sweep or of full trainings, all in one program."""
        config, depth = self.config, int(group.cells["depth"].iloc[0])
        part = "sweep" if group.table == "sweep" else "train"
        groups = group.cells.groupby("update", sort=False)
        cells = {str(update): mine for update, mine in groups}
        arms = [(Arm(update), self._settings(mine, part)) for update, mine in cells.items()]
        network = archbn(config.model, data.train_images.shape[1], data.classes, depth)
        task = Task(config, network, part)
        program = run_many.Program(group.title, task, arms, data)
        identity = fingerprint(
            ("archbn", "table2"), cells, part, config.fingerprint(), data.sha256, depth,
            *(values for _, (seeds, rates, *_) in arms for values in (seeds, rates)),
        )  # fmt: skip
        covers = tuple(sorted(group.names(SCHEMA)))
        state = train(Part(group.title, identity, covers), program, session)
        trained = zip(cells.values(), program.take(state), strict=True)
        if part == "sweep":
            rows = [self._sweep_rows(mine, task, run) for mine, run in trained]
            return Found({"sweep": SCHEMA.frame("sweep", pd.concat(rows))}, arrays={FILTERS: {}})
        tables: dict[str, list[pd.DataFrame]] = {"runs": [], "history": []}
        filters = {}
        for (mine, run), (wrong, _) in zip(trained, program.find_wrong(state), strict=True):
            tables["runs"].append(self._run_rows(mine, task, run, wrong))
            tables["history"].append(_history_rows(mine, task, run))
            if mine["run"].iloc[0] == 0:
                first = task.network.filters(run.params)[0]
                filters[f"{depth}/{mine['update'].iloc[0]}"] = np.asarray(first[0])
        found = {name: SCHEMA.frame(name, pd.concat(parts)) for name, parts in tables.items()}
        return Found(found, arrays={FILTERS: filters})

    def _settings(self, cells: pd.DataFrame, part: str) -> Settings:
        """Of an update's runs; a sweep has every rate for every run, as it is."""
        seeds = self.config.seed + cells["run"].to_numpy()
        if part == "train":
            return Settings(seeds, cells["base_lr"].to_numpy())
        rates = np.asarray(self.config.sweep.rates)
        each = np.repeat(seeds, len(rates)), np.tile(rates, len(cells))
        return Settings(*each, schedule=protocol.CONSTANT)

    def _sweep_rows(self, cells: pd.DataFrame, task: Task, run: Run) -> pd.DataFrame:
        """Of each run, the rate that is best on the validation images is chosen (section 4)."""
        rates, end = np.asarray(self.config.sweep.rates), run_many.at_end(run, task)
        errors, diverged = (end[n].reshape(-1, len(rates)) for n in ("val_error", "diverged"))
        chosen = np.asarray(protocol.choose_rate(rates, errors, diverged))
        rows = cells.loc[cells.index.repeat(len(rates)), list(CELL)]
        return rows.assign(
            seed=self.config.seed + rows["run"], base_lr=np.tile(rates, len(cells)),
            chosen=(np.arange(len(rates)) == chosen[:, None]).reshape(-1), **end,
        )  # fmt: skip

    def _run_rows(
        self, cells: pd.DataFrame, task: Task, run: Run, wrong: np.ndarray
    ) -> pd.DataFrame:
        """Of full trainings; `wrong`: which test images each run gets wrong, (runs, images)."""
        return cells.assign(
            seed=self.config.seed + cells["run"],
            epochs=np.asarray(run.epoch), stop_reason=np.take(protocol.STOP_REASONS, run.reason),
            test_error=np.where(run.epoch > 0, wrong.mean(axis=-1), np.nan),
            **run_many.at_end(run, task),
        )  # fmt: skip


def _history_rows(cells: pd.DataFrame, task: Task, run: Run) -> pd.DataFrame:
    """Of each run, the epochs that it has had."""
    history = run_many.exact_history(run, task)
    i, epoch = np.nonzero(np.arange(task.config.train.max_epochs) < run.epoch[:, None])
    columns = [name for name in SCHEMA.tables["history"].columns if name in history]
    values = {name: history[name][i, epoch] for name in columns}
    return cells[list(CELL)].iloc[i].assign(epoch=epoch + 1, **values)


def list_cells(config: Config) -> pd.DataFrame:
    """The runs of a config's selection: one row per depth, update and run."""
    each = itertools.product(config.depths, config.updates, range(config.runs))
    return pd.DataFrame(each, columns=list(CELL))


def with_rates(cells: pd.DataFrame, sweep: pd.DataFrame) -> pd.DataFrame:
    """With the rates that the sweep chose, in `base_lr`; NaN where every rate diverged."""
    chosen = sweep.loc[sweep["chosen"], [*CELL, "base_lr"]]
    return cells.merge(chosen, how="left", on=list(CELL))


def _by_depth(table: str, cells: pd.DataFrame) -> Iterator[Group]:
    """The groups of these runs."""
    title = "train" if table == "runs" else table
    for depth, mine in cells.groupby("depth", sort=False):
        yield Group(f"{title} depth {depth}", table, mine)


def describe_data(data: Dataset) -> dict[str, object]:
    """What the provenance says of the data."""
    return {
        "name": data.name, "sha256": data.sha256, "image_shape": list(data.image_shape),
        "classes": data.classes,
    }  # fmt: skip


def filters_of(records: Records) -> dict[tuple[int, str], np.ndarray]:
    """(depth, update) → float32 (filters, features), of run 0's first layer.

    Raises:
      UserError: the file holds something else.
    """
    arrays = records.arrays(FILTERS)
    try:
        split = {tuple(name.split("/", 1)): array for name, array in arrays.items()}
        return {(int(depth), update): array for (depth, update), array in split.items()}
    except ValueError as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{FILTERS}: not the filters of runs: {detail}; {REPAIR}") from None
