"""Table 2: which runs its sweep and its full trainings have, and their rows.

A group is the runs of one depth that lack the same updates; one program trains it.
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
class Cells:
    """Runs of one depth, and their base learning rates, (runs, updates), once they are known."""

    depth: int
    updates: tuple[str, ...]
    runs: tuple[int, ...]
    rates: np.ndarray | None = None

    def table(self) -> pd.DataFrame:
        """One row per update and run."""
        return _product([self.depth], self.updates, self.runs)


@dataclass(frozen=True)
class Table2:
    """The experiment of a config; see `planner.Experiment`."""

    config: Config
    sweep_only: bool = False
    schema: Schema = SCHEMA

    def missing(self, records: Records) -> Iterator[Group]:
        """Sweeps first; full trainings of what is swept."""
        untrained = () if self.sweep_only else _missing(self.config, records["runs"])
        if untrained or self.sweep_only:
            for cells in _missing(self.config, records["sweep"]):
                yield _group("sweep", cells)
        for cells in untrained:
            if SCHEMA.among(cells.table(), records["sweep"]).all():
                yield _group("runs", with_rates(cells, records["sweep"]))

    def again(self, records: Records, chosen: Mapping[str, Any]) -> Iterator[Group]:
        """The run's sweep, and its full training at the rate recorded."""
        depth, update, run = (chosen[column] for column in CELL)
        cells = Cells(depth, (update,), (run,))
        yield _group("sweep", cells)
        yield _group("runs", with_rates(cells, records["sweep"]))

    def compute(self, group: Group, data: Dataset, session: Session) -> Found:
        """The rows of a sweep or of full trainings, all in one program."""
        cells: Cells = group.what
        config, part = self.config, "sweep" if cells.rates is None else "train"
        seeds = np.asarray([config.seed + run for run in cells.runs])
        rates, schedule = cells.rates, protocol.BOLD_DRIVER
        if rates is None:  # every rate for every run, as it is
            tried = np.asarray(config.sweep.rates)
            rates = np.tile(tried[:, None], (len(cells.runs), len(cells.updates)))
            seeds, schedule = np.repeat(seeds, len(tried)), protocol.CONSTANT
        network = archbn(config.model, data.train_images.shape[1], data.classes, cells.depth)
        task = Task(config, network, part)
        arms = [
            (Arm(update), Settings(seeds, rates[:, column], schedule=schedule))
            for column, update in enumerate(cells.updates)
        ]
        program = run_many.Program(group.title, task, arms, data)
        identity = fingerprint(
            ("archbn", "table2"), cells.updates, part, config.fingerprint(), data.sha256,
            cells.depth, seeds, rates,
        )  # fmt: skip
        covers = tuple(sorted(group.names(SCHEMA)))
        state = train(Part(group.title, identity, covers), program, session)
        if cells.rates is None:
            return self._sweep_rows(cells, task, program.take(state))
        wrong = [mine for mine, _ in program.find_wrong(state)]
        return self._train_rows(cells, task, program.take(state), wrong)

    def _sweep_rows(self, cells: Cells, task: Task, trained: tuple[Run, ...]) -> Found:
        """Of each run, the rate that is best on the validation images is chosen (section 4)."""
        rates = np.asarray(self.config.sweep.rates)
        numbers = np.repeat(cells.runs, len(rates))
        rows: list[dict[Any, Any]] = []
        for update, run in zip(cells.updates, trained, strict=True):
            end = run_many.at_end(run, task)
            errors, diverged = (end[n].reshape(-1, len(rates)) for n in ("val_error", "diverged"))
            chosen = np.asarray(protocol.choose_rate(rates, errors, diverged))
            found = {
                "depth": cells.depth, "update": update, "run": numbers,
                "seed": self.config.seed + numbers, "base_lr": np.tile(rates, len(cells.runs)),
                "chosen": (np.arange(len(rates)) == chosen[:, None]).reshape(-1),
            }  # fmt: skip
            rows += pd.DataFrame(found | end).to_dict("records")
        return Found({"sweep": SCHEMA.frame("sweep", rows)}, arrays={FILTERS: {}})

    def _train_rows(
        self, cells: Cells, task: Task, trained: tuple[Run, ...], wrong: list[np.ndarray]
    ) -> Found:
        """Full trainings, and run 0's filters of the first layer.

        Args:
          wrong: of each update, which test images each run gets wrong.
        """
        assert cells.rates is not None
        numbers, filters = np.asarray(cells.runs), {}
        rows: dict[str, list[dict[Any, Any]]] = {"runs": [], "history": []}
        each = zip(cells.updates, cells.rates.T, trained, wrong, strict=True)
        for update, rates, run, mine in each:
            if cells.runs[0] == 0:
                first = task.network.filters(run.params)[0]
                filters[f"{cells.depth}/{update}"] = np.asarray(first[0])
            cell = {"depth": cells.depth, "update": update}
            found = {
                "run": numbers, "seed": self.config.seed + numbers, "base_lr": rates,
                "epochs": run.epoch, "stop_reason": np.take(protocol.STOP_REASONS, run.reason),
                "test_error": np.where(run.epoch > 0, mine.mean(axis=-1), np.nan),
            }  # fmt: skip
            end = run_many.at_end(run, task)
            rows["runs"] += pd.DataFrame(cell | found | end).to_dict("records")
            history = run_many.exact_history(run, task)
            columns = [name for name in SCHEMA.tables["history"].columns if name in history]
            # of each run, the epochs that it has had
            i, epoch = np.nonzero(np.arange(task.config.train.max_epochs) < run.epoch[:, None])
            values = {name: history[name][i, epoch] for name in columns}
            course = pd.DataFrame(cell | {"run": numbers[i], "epoch": epoch + 1} | values)
            rows["history"] += course.to_dict("records")
        return Found({n: SCHEMA.frame(n, mine) for n, mine in rows.items()}, {}, {FILTERS: filters})


def list_cells(config: Config) -> pd.DataFrame:
    """The runs of a config's selection: one row per depth, update and run."""
    return _product(config.depths, config.updates, range(config.runs))


def with_rates(cells: Cells, sweep: pd.DataFrame) -> Cells:
    """With the rates that the sweep chose; NaN where every rate diverged."""
    chosen = sweep[sweep["chosen"]].set_index(list(CELL))["base_lr"]
    rates = chosen.reindex(pd.MultiIndex.from_frame(cells.table())).to_numpy(float)
    shaped = rates.reshape(len(cells.updates), len(cells.runs)).T
    return Cells(cells.depth, cells.updates, cells.runs, shaped)


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


def _group(table: str, cells: Cells) -> Group:
    title = "train" if table == "runs" else table
    return Group(f"{title} depth {cells.depth}", table, cells.table(), cells)


def _missing(config: Config, table: pd.DataFrame) -> list[Cells]:
    """The runs of the config that `table` has no row of; updates that lack the same go together."""
    have = set(table[list(CELL)].itertuples(index=False, name=None))
    found = []
    for depth in config.depths:
        by_runs: dict[tuple[int, ...], list[str]] = {}
        for update in config.updates:
            runs = tuple(run for run in range(config.runs) if (depth, update, run) not in have)
            if runs:
                by_runs.setdefault(runs, []).append(update)
        found += [Cells(depth, tuple(updates), runs) for runs, updates in by_runs.items()]
    return found


def _product(*values: Any) -> pd.DataFrame:
    return pd.DataFrame(itertools.product(*values), columns=list(CELL))
