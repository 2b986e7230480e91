"""Sweep and train: from a config and the records so far to the records to come.

`sweep_missing` and `train_missing` find out which runs are missing, train all that go together as
one `training.Program`, and give the records back with the new rows. The only thing they ask of the
outside is a `Session`: where to report progress, keep checkpoints and hear of an interruption.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import safetensors
import safetensors.numpy
from jax.typing import ArrayLike

from unitnorm.archbn import protocol, training
from unitnorm.archbn.config import Config
from unitnorm.data import Dataset
from unitnorm.errors import UserError
from unitnorm.run.checkpoints import Part
from unitnorm.run.loop import Session, train
from unitnorm.run.provenance import fingerprint
from unitnorm.run.records import REPAIR, Records
from unitnorm.table2.schema import CELL, FILTERS, SCHEMA


@dataclass(frozen=True)
class Group:
    """Runs of one depth that are trained by one program."""

    depth: int
    updates: tuple[str, ...]
    runs: tuple[int, ...]

    def cells(self) -> pd.DataFrame:
        """One row per update and run."""
        product = itertools.product([self.depth], self.updates, self.runs)
        return pd.DataFrame(product, columns=list(CELL))


def sweep_missing(
    config: Config, data: Dataset, records: Records, session: Session
) -> Iterator[Records]:
    """Try every rate for every run that has no base learning rate yet (section 4).

    Yields:
      The records with the rows of one more group of runs, as soon as they are known.

    Raises:
      Interrupted: after saving a checkpoint.
    """
    groups = missing(config, records["sweep"])
    if not groups:
        session.say("sweep: every selected run has its base learning rate")
    filters = pack_filters(unpack_filters(records))  # a folder has them from the first write on
    for group in groups:
        rows = sweep_group(config, data, group, session)
        records = records.with_rows("sweep", rows).with_files({FILTERS: filters})
        yield records


def train_missing(
    config: Config, data: Dataset, records: Records, session: Session
) -> Iterator[Records]:
    """Train every run that is not recorded, at its base learning rate; those without are swept.

    Yields, raises:
      As `sweep_missing`.
    """
    groups = missing(config, records["runs"])
    if not groups:
        session.say("train: every selected run is recorded; --fresh starts over")
        return
    unswept = missing(config, records["sweep"])
    if unswept:
        count = sum(len(group.runs) * len(group.updates) for group in unswept)
        session.say(f"train: {count} runs have no base learning rate yet, sweeping first")
        for swept in sweep_missing(config, data, records, session):
            records = swept
            yield records
    filters = unpack_filters(records)
    for group in groups:
        trained = train_group(config, data, group, records["sweep"], session)
        filters |= trained.filters
        records = records.with_rows("runs", trained.runs).with_rows("history", trained.history)
        records = records.with_files({FILTERS: pack_filters(filters)})
        yield records


def sweep_group(config: Config, data: Dataset, group: Group, session: Session) -> pd.DataFrame:
    """The sweep of one group of runs, as rows of the table `sweep`."""
    rates = np.asarray(config.sweep.rates)
    seeds = np.repeat([config.seed + run for run in group.runs], len(rates))
    grid = np.tile(rates[:, None], (len(group.runs), len(group.updates)))
    phase = training.sweep_phase(config)
    _, trained = train_program("sweep", phase, config, data, group, seeds, grid, session)
    rows = []
    for update, runs in zip(group.updates, trained, strict=True):
        end = at_end(runs, config, phase)
        val_error, loss, diverged = (
            values.reshape(len(group.runs), len(rates))
            for values in (end.val_error, end.train_loss, end.diverged)
        )
        chosen = np.asarray(protocol.choose_rate(rates, val_error, diverged))
        rows += [
            {
                "depth": group.depth, "update": update, "run": number,
                "seed": config.seed + number, "base_lr": rate, "val_error": val_error[i, j],
                "train_loss": loss[i, j], "diverged": diverged[i, j], "chosen": j == chosen[i],
            }
            for i, number in enumerate(group.runs)
            for j, rate in enumerate(rates)
        ]  # fmt: skip
    return SCHEMA.frame("sweep", rows)


class Trained(NamedTuple):
    """The records of one group's full training."""

    runs: pd.DataFrame
    history: pd.DataFrame
    filters: dict[tuple[int, str], np.ndarray]


def train_group(
    config: Config, data: Dataset, group: Group, sweep: pd.DataFrame, session: Session
) -> Trained:
    """The full training of one group of runs, at their rates from `sweep`."""
    rates, phase = base_rates(sweep, group), training.train_phase(config)
    seeds = np.asarray([config.seed + run for run in group.runs])
    wrong, trained = train_program("runs", phase, config, data, group, seeds, rates, session)
    columns = SCHEMA.tables["history"].columns
    run_rows, history_rows, filters = [], [], {}
    for column, (update, run) in enumerate(zip(group.updates, trained, strict=True)):
        end, test_error = at_end(run, config, phase), wrong[column].mean(axis=-1)
        history = run.history._asdict() | {
            "train_error": exact(run.history.train_error, phase.train_images),
            "val_error": exact(run.history.val_error, phase.validation_images),
        }
        if group.runs[0] == 0:
            filters[group.depth, update] = np.asarray(training.filters(run.params)[0][0])
        for i, number in enumerate(group.runs):
            name = {"depth": group.depth, "update": update, "run": number}
            run_rows.append(
                name
                | {
                    "seed": seeds[i], "base_lr": rates[i, column],
                    "epochs": run.epoch[i],
                    "train_loss": end.train_loss[i], "val_error": end.val_error[i],
                    "test_error": test_error[i] if run.epoch[i] else np.nan,
                    "diverged": end.diverged[i],
                    "stop_reason": protocol.STOP_REASONS[run.reason[i]],
                }
            )  # fmt: skip
            history_rows += [
                name
                | {"epoch": epoch + 1}
                | {key: history[key][i, epoch] for key in history if key in columns}
                for epoch in range(run.epoch[i])
            ]
    return Trained(SCHEMA.frame("runs", run_rows), SCHEMA.frame("history", history_rows), filters)


def train_program(
    table: str,
    phase: training.Phase,
    config: Config,
    data: Dataset,
    group: Group,
    seeds: np.ndarray,
    rates: np.ndarray,
    session: Session,
) -> tuple[list[np.ndarray], tuple[training.Run, ...]]:
    """Train a group to its end.

    Args:
      rates: (seeds, updates).

    Returns:
      For each update, the test images that are wrong, and the runs on the host.
    """
    title = f"{'train' if table == 'runs' else table} depth {group.depth}"
    arms = [
        (training.Arm(update), training.Settings(seeds, rates[:, column]))
        for column, update in enumerate(group.updates)
    ]
    program = training.Program(title, config, group.depth, phase, arms, data)
    part = Part(
        title,
        fingerprint(
            training.__name__, group.updates, table, config.fingerprint(), data.sha256, seeds, rates
        ),
        covers=tuple(sorted(SCHEMA.names(table, group.cells()))),
    )
    state = train(part, program, session)
    wrong = [mine for mine, _ in program.find_wrong(state)] if table == "runs" else []
    return wrong, program.take(state)


class End(NamedTuple):
    """Where runs of one update ended, each of shape (runs,)."""

    train_loss: np.ndarray
    val_error: np.ndarray
    diverged: np.ndarray


def at_end(run: training.Run, config: Config, phase: training.Phase) -> End:
    """The last epoch of runs, and whether they have diverged."""
    loss = training.last(run.history.train_loss, run.epoch)
    val_error = training.last(run.history.val_error, run.epoch)
    val_error = exact(val_error, phase.validation_images)
    first, limit = run.history.train_loss[:, 0], config.stopping.diverged_error
    diverged = protocol.has_diverged(loss, first, val_error, diverged_error=limit)
    return End(loss, val_error, np.asarray(diverged))


def missing(config: Config, table: pd.DataFrame) -> list[Group]:
    """The runs of the config that `table` has no row of, as groups that train together."""
    have = set(table[list(CELL)].itertuples(index=False, name=None))
    groups = []
    for depth in config.depths:
        by_runs: dict[tuple[int, ...], list[str]] = {}
        for update in config.updates:
            runs = tuple(run for run in range(config.runs) if (depth, update, run) not in have)
            if runs:
                by_runs.setdefault(runs, []).append(update)
        groups += [Group(depth, tuple(updates), runs) for runs, updates in by_runs.items()]
    return groups


def base_rates(sweep: pd.DataFrame, group: Group) -> np.ndarray:
    """The chosen rates of a group, shape (runs, updates); NaN where every rate diverged.

    Raises:
      UserError: a run has not been swept.
    """
    cells = group.cells()
    unswept = cells[~SCHEMA.among(cells, sweep)]
    if len(unswept):
        depth, update, run = unswept.iloc[0]
        raise UserError(
            f"depth {depth}, {update}, run {run}: no base learning rate is recorded; "
            "run `unitnorm sweep` first"
        )
    chosen = sweep[sweep["chosen"]].set_index(list(CELL))["base_lr"]
    rates = chosen.reindex(pd.MultiIndex.from_frame(cells)).to_numpy(float)
    return rates.reshape(len(group.updates), len(group.runs)).T


def exact(errors: ArrayLike, images: int) -> np.ndarray:
    """Error rates as the fractions that they are; XLA multiplies by 1 / images, which rounds."""
    return np.round(np.asarray(errors, np.float64) * images) / images


def list_cells(config: Config) -> pd.DataFrame:
    """The runs of a config's selection: one row per depth, update and run."""
    product = itertools.product(config.depths, config.updates, range(config.runs))
    return pd.DataFrame(product, columns=list(CELL))


def describe_data(data: Dataset) -> dict[str, object]:
    """What the provenance says of the data."""
    return {"name": data.name, "sha256": data.sha256, "image_shape": list(data.image_shape)}


def pack_filters(filters: Mapping[tuple[int, str], np.ndarray]) -> bytes:
    """(depth, update) → float32 (filters, features), as the content of `FILTERS`."""
    named = {f"{depth}/{update}": array for (depth, update), array in sorted(filters.items())}
    return safetensors.numpy.save(named)


def unpack_filters(records: Records) -> dict[tuple[int, str], np.ndarray]:
    """What `pack_filters` packed; empty where there are none.

    Raises:
      UserError: the file holds something else.
    """
    if FILTERS not in records.files:
        return {}
    try:
        arrays = safetensors.numpy.load(records.files[FILTERS])
        split = {tuple(name.split("/", 1)): array for name, array in arrays.items()}
        return {(int(depth), update): array for (depth, update), array in split.items()}
    except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{FILTERS}: not the filters of runs: {detail}; {REPAIR}") from None
