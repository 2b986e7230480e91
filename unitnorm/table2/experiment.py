"""Sweep and train: from a config and the records so far to the records to come.

`run_sweep` and `run_training` find out which runs are missing, train all that go together as one
`training.Program`, and give the records back with the new rows. The only thing they ask of the
outside is a `Session`: where to report progress, keep checkpoints and hear of an interruption.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import itertools
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import pandas as pd

from unitnorm.data import Dataset
from unitnorm.errors import UserError
from unitnorm.run import devices, records
from unitnorm.run.checkpoints import Part
from unitnorm.run.records import Records
from unitnorm.table2 import protocol, training
from unitnorm.table2.config import Config

VERSIONS = ("unitnorm", "jax", "jaxlib", "flax", "optax", "numpy")


class Interrupted(Exception):
    """The user or the system asked to stop; everything up to here is saved."""


@dataclass(frozen=True)
class EpochReport:
    """What is known of a program after one of its epochs."""

    title: str  # such as "train depth 4"
    epoch: int
    max_epochs: int
    active: int  # runs that go on
    runs: int
    val_error: float  # mean over the runs that are not diverged
    samples_per_second: float
    seconds_per_epoch: float


class Checkpoints(Protocol):
    """Keeps the state of a program from epoch to epoch; see `unitnorm.run.checkpoints`."""

    def restore(self, part: Part, like: Any) -> Any | None:
        """The saved state, a tree of NumPy arrays like `like`; None if none was saved."""

    def due(self) -> bool:
        """It is time to save."""

    def save(self, part: Part, state: Any, *, wait: bool) -> None:
        """Keep the state after an epoch; `wait`: it is on the disk before this returns."""

    def drop(self, covers: Iterable[str]) -> None:
        """Remove what was saved of runs with these names (`records.names`)."""


@dataclass(frozen=True)
class Session:
    """The outside world, as far as an experiment needs it."""

    report: Callable[[EpochReport], None]
    say: Callable[[str], None]
    checkpoints: Checkpoints
    interrupted: Callable[[], bool]


@dataclass(frozen=True)
class Group:
    """Runs of one depth that are trained by one program."""

    depth: int
    updates: tuple[str, ...]
    runs: tuple[int, ...]

    def cells(self) -> pd.DataFrame:
        """One row per depth, update and run."""
        product = itertools.product([self.depth], self.updates, self.runs)
        return pd.DataFrame(list(product), columns=records.CELL)


def run_sweep(
    config: Config, data: Dataset, known: Records, session: Session
) -> Iterator[pd.DataFrame]:
    """Try every rate for every run that has no base learning rate yet (section 4).

    Yields:
      Rows of `records.SWEEP` for one group of runs, as soon as they are known.

    Raises:
      Interrupted: after saving a checkpoint.
    """
    for group in missing(config, known.sweep):
        yield sweep_group(config, data, group, session)


def sweep_group(config: Config, data: Dataset, group: Group, session: Session) -> pd.DataFrame:
    """The sweep of one group of runs, as rows of `records.SWEEP`."""
    rates = np.asarray(config.sweep.rates)
    seeds = np.repeat([config.seed + run for run in group.runs], len(rates))
    program = make_program(len(seeds), config, data, group, training.sweep_phase(config))
    grid = np.tile(rates[:, None], (len(group.runs), len(group.updates)))
    part = part_of("sweep", group, seeds, grid, config, data)
    finished = train_all(program, seeds, grid, part, session)
    rows = []
    for update, run in zip(group.updates, finished, strict=True):
        shape = (len(group.runs), len(rates))
        val_error = last(run.history.val_error, run.epoch).reshape(shape)
        val_error = exact(val_error, config.sweep.validation_images)
        loss = last(run.history.train_loss, run.epoch).reshape(shape)
        first = run.history.train_loss[:, 0].reshape(shape)
        diverged = np.asarray(
            protocol.has_diverged(
                loss, first, val_error, diverged_error=config.stopping.diverged_error
            )
        )
        chosen = np.asarray(protocol.choose_rate(rates, val_error, diverged))
        rows += [
            {
                "depth": group.depth,
                "update": update,
                "run": number,
                "seed": config.seed + number,
                "base_lr": rate,
                "val_error": val_error[i, j],
                "train_loss": loss[i, j],
                "diverged": diverged[i, j],
                "chosen": j == chosen[i],
            }
            for i, number in enumerate(group.runs)
            for j, rate in enumerate(rates)
        ]
    return records.frame("sweep", rows)


@dataclass(frozen=True)
class Trained:
    """The records of one group's full training."""

    runs: pd.DataFrame
    history: pd.DataFrame
    filters: dict[tuple[int, str], np.ndarray]


def run_training(
    config: Config, data: Dataset, known: Records, session: Session
) -> Iterator[Trained]:
    """Train every run that is not recorded, at its base learning rate from `known.sweep`.

    Raises:
      Interrupted: after saving a checkpoint.
      UserError: a run has no row in the sweep.
    """
    for group in missing(config, known.runs):
        yield train_group(config, data, group, known.sweep, session)


def train_group(
    config: Config, data: Dataset, group: Group, sweep: pd.DataFrame, session: Session
) -> Trained:
    """The full training of one group of runs, at their rates from `sweep`."""
    seeds = np.asarray([config.seed + run for run in group.runs])
    program = make_program(len(seeds), config, data, group, training.train_phase(config))
    rates = base_rates(sweep, group)
    part = part_of("runs", group, seeds, rates, config, data)
    finished = train_all(program, seeds, rates, part, session)
    test_errors = to_host(program.test_error(finished.on_device))
    run_rows, history_rows, filters = [], [], {}
    for column, update in enumerate(group.updates):
        run = finished[column]
        history = run.history._replace(
            train_error=exact(run.history.train_error, config.train.train_images),
            val_error=exact(run.history.val_error, config.train.validation_images),
        )
        test_error = exact(test_errors[column], len(data.test_labels))
        val_error = last(history.val_error, run.epoch)
        loss = last(history.train_loss, run.epoch)
        diverged = np.asarray(
            protocol.has_diverged(
                loss,
                history.train_loss[:, 0],
                val_error,
                diverged_error=config.stopping.diverged_error,
            )
        )
        if group.runs[0] == 0:
            filters[group.depth, update] = np.asarray(training.filters(run.params)[0][0])
        for i, number in enumerate(group.runs):
            name = {"depth": group.depth, "update": update, "run": number}
            trained = run.epoch[i] > 0
            run_rows.append(
                {
                    **name,
                    "seed": seeds[i],
                    "base_lr": rates[i, column],
                    "epochs": run.epoch[i],
                    "train_loss": loss[i],
                    "val_error": val_error[i],
                    "test_error": test_error[i] if trained else np.nan,
                    "diverged": diverged[i],
                    "stop_reason": protocol.STOP_REASONS[run.reason[i]],
                }
            )
            history_rows += [
                {
                    **name,
                    "epoch": epoch + 1,
                    **{key: values[i, epoch] for key, values in history._asdict().items()},
                }
                for epoch in range(run.epoch[i])
            ]
    return Trained(records.frame("runs", run_rows), records.frame("history", history_rows), filters)


class Finished(tuple):
    """Runs on the host, one `training.Run` per update, without the padding; and on the device."""

    on_device: tuple[training.Run, ...]


def train_all(
    program: training.Program, seeds: np.ndarray, rates: np.ndarray, part: Part, session: Session
) -> Finished:
    """Epoch after epoch until every run has ended, from a checkpoint if there is one."""
    splits, runs = program.init(seeds, rates)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(seeds), *x.shape[1:]), x.dtype), runs)
    saved = devices.from_first(session.checkpoints.restore(part, like), like)
    if saved is not None:
        runs = put_back(saved, runs)
    status = Status.of(runs, len(seeds))
    if saved is not None:
        session.say(f"{part.title}: going on after epoch {status.epoch}")
    samples = len(seeds) * len(program.updates) * program.phase.train_images
    (stopping,) = devices.any_process(session.interrupted())
    if stopping and status.active:
        raise Interrupted
    while status.active:
        start = time.perf_counter()
        runs = program.epoch(splits, runs, program.images)
        status = Status.of(runs, len(seeds))
        seconds = time.perf_counter() - start
        stopping, due = devices.any_process(session.interrupted(), session.checkpoints.due())
        # another process can take the last epoch along, too, until it is recorded
        if stopping or (due and (status.active or devices.several())):
            session.checkpoints.save(part, take_out(runs, len(seeds)), wait=stopping)
        # afterwards, so that what was reported is kept whatever happens to the other processes
        session.report(
            EpochReport(
                part.title,
                status.epoch,
                program.phase.max_epochs,
                status.active,
                status.runs,
                status.val_error,
                samples / seconds,
                seconds,
            )
        )
        if stopping:
            raise Interrupted
    finished = Finished(take_out(runs, len(seeds)))
    finished.on_device = runs
    return finished


def part_of(
    table: str, group: Group, seeds: np.ndarray, rates: np.ndarray, config: Config, data: Dataset
) -> Part:
    """What a group's program is called, and what its state must not be mixed with."""
    versions = [importlib.metadata.version(name) for name in VERSIONS]
    platform_name = jax.devices()[0].platform
    identity = [config.fingerprint(), data.sha256, code(), *versions, platform_name]
    return Part(
        title=f"{'train' if table == 'runs' else table} depth {group.depth}",
        fingerprint=fingerprint_of([table, *identity, group.updates, seeds, rates]),
        covers=tuple(sorted(records.names(table, group.cells()))),
    )


def take_out(tree: Any, count: int) -> Any:
    """The first `count` seeds on the host: copies, which a later epoch leaves alone."""
    return jax.tree.map(lambda x: np.array(x[:count]), to_host(tree))


def put_back(saved: Any, runs: Any) -> Any:
    """The saved seeds in place of the first of `runs`; the padding depends on the devices."""
    whole = jax.tree.map(
        lambda new, old: np.concatenate([new, old[len(new) :]]), saved, to_host(runs)
    )
    return jax.tree.map(
        lambda x, on: jax.make_array_from_callback(x.shape, on.sharding, lambda index: x[index]),
        whole,
        runs,
    )


@dataclass(frozen=True)
class Status:
    """How far a program's runs are."""

    epoch: int
    active: int
    runs: int
    val_error: float

    @classmethod
    def of(cls, runs: tuple[training.Run, ...], count: int) -> Status:
        reason, epochs, errors = to_host(
            (
                [run.reason for run in runs],
                [run.epoch for run in runs],
                [run.history.val_error for run in runs],
            )
        )
        reason, epochs = np.stack(reason)[:, :count], np.stack(epochs)[:, :count]
        now = last(np.stack(errors)[:, :count], epochs)
        known = now[np.isfinite(now)]
        return cls(
            epoch=int(epochs.max()),
            active=int((reason == protocol.RUNNING).sum()),
            runs=reason.size,
            val_error=float(known.mean()) if known.size else float("nan"),
        )


def missing(config: Config, table: pd.DataFrame) -> list[Group]:
    """The runs of the config that `table` has no row of, as groups that train together."""
    have = set(zip(table["depth"], table["update"], table["run"], strict=True))
    groups = []
    for depth in config.depths:
        by_runs: dict[tuple[int, ...], list[str]] = {}
        for update in config.updates:
            runs = tuple(run for run in range(config.runs) if (depth, update, run) not in have)
            if runs:
                by_runs.setdefault(runs, []).append(update)
        groups += [Group(depth, tuple(updates), runs) for runs, updates in by_runs.items()]
    return groups


def make_program(
    seeds: int, config: Config, data: Dataset, group: Group, phase: training.Phase
) -> training.Program:
    """The program that trains a group over so many seeds."""
    return training.Program(
        seeds,
        config,
        group.depth,
        group.updates,
        phase,
        training.Images(data.train_images, data.train_labels),
        training.Images(data.test_images, data.test_labels),
        data.classes,
    )


def base_rates(sweep: pd.DataFrame, group: Group) -> np.ndarray:
    """The chosen rates of a group, shape (runs, updates); NaN where every rate diverged.

    Raises:
      UserError: a run has not been swept.
    """
    rates = np.full((len(group.runs), len(group.updates)), np.nan)
    for column, update in enumerate(group.updates):
        for i, run in enumerate(group.runs):
            tried = sweep[
                (sweep["depth"] == group.depth)
                & (sweep["update"] == update)
                & (sweep["run"] == run)
            ]
            if tried.empty:
                raise UserError(
                    f"depth {group.depth}, {update}, run {run}: no base learning rate is recorded; "
                    "run `unitnorm sweep` first"
                )
            chosen = tried.loc[tried["chosen"], "base_lr"]
            if len(chosen):
                rates[i, column] = chosen.iloc[0]
    return rates


def last(values: np.ndarray, epochs: np.ndarray) -> np.ndarray:
    """Each run's value after its last epoch: (…, max_epochs) and (…,) → (…,); NaN without any."""
    index = np.maximum(np.asarray(epochs) - 1, 0)
    return np.take_along_axis(np.asarray(values), index[..., None], -1)[..., 0]


def exact(errors: np.ndarray, images: int) -> np.ndarray:
    """Error rates as the fractions that they are; XLA multiplies by 1 / images, which rounds."""
    return np.round(np.asarray(errors, np.float64) * images) / images


def to_host(tree: Any) -> Any:
    """Arrays as NumPy, whole, also where other processes hold parts of them."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)


def fingerprint_of(parts: list[Any]) -> str:
    """SHA-256 of plain values and arrays."""
    text = json.dumps([np.asarray(p).tolist() if not isinstance(p, str) else p for p in parts])
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def code() -> str:
    """SHA-256 of this package's source: a state of other code is not gone on with."""
    digest = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"\n{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- provenance


def provenance(config: Config, data: Dataset) -> dict[str, Any]:
    """What a folder's records have in common: the protocol and the data."""
    return {
        "config": config.protocol(),
        "config_sha256": config.fingerprint(),
        "data": {
            "name": data.name,
            "sha256": data.sha256,
            "image_shape": list(data.image_shape),
        },
        "commands": [],
    }


def command_entry(command: str, started: float, wall_s: float, rows: int) -> dict[str, Any]:
    """What one command added, and on what: for the list `commands` of the provenance."""
    return {
        "command": command,
        "started": datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat("T", "seconds"),
        "wall_s": round(wall_s, 1),
        "rows": rows,
        "commit": commit(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in VERSIONS},
        "device": device(),
    }


def device() -> dict[str, Any]:
    """The devices that JAX computes on."""
    found = jax.devices()
    kind = found[0].device_kind
    return {
        "platform": found[0].platform,
        "kind": devices.cpu_model() if kind == "cpu" else kind,
        "count": len(found),
        "processes": jax.process_count(),
        "machine": platform.machine(),
    }


def commit() -> str | None:
    """The commit of the code, with "+" if it has been changed since; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        head = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "")


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()
