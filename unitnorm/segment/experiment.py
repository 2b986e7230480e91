"""SegNet on CamVid: which sweeps and trainings a config has, and their rows.

A group is the sweep of an update, or the training of one of its runs. A training's records grow
with every measurement, so that a look at them is possible at any time.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pandas as pd

from unitnorm.errors import UserError
from unitnorm.run.checkpoints import Part
from unitnorm.run.loop import Session, Status, train
from unitnorm.run.planner import Found, Group
from unitnorm.run.provenance import fingerprint
from unitnorm.run.records import Records, Schema
from unitnorm.segment.config import SegmentConfig
from unitnorm.segment.data import SceneData
from unitnorm.segment.evaluation import measure
from unitnorm.segment.schema import ALL, CELL, SCHEMA
from unitnorm.segment.training import SegNetProgram, SegNetState
from unitnorm.segment.weights import TrainedSegNet, pack_weights


@dataclass(frozen=True)
class Segmentation:
    """The experiment of a config; see `planner.Experiment`."""

    config: SegmentConfig
    sweep_only: bool = False
    schema: Schema = SCHEMA

    def missing(self, records: Records) -> Iterator[Group]:
        """Sweeps of the updates without a rate, and trainings of those with one."""
        given, sweep = self.config.learning_rates, records["sweep"]
        untrained = [] if self.sweep_only else self._lacking(records["runs"])
        rates = sweep[sweep["chosen"]].set_index("update")["base_lr"].to_dict() | given
        without = {update for update, _ in untrained} - given.keys()
        for update, run in self._lacking(sweep):
            if run == 0 and (self.sweep_only or update in without):
                yield _group("sweep", update, run, None)
        for update, run in untrained:
            if update in rates:
                yield _group("runs", update, run, rates[update])

    def compute(self, group: Group, data: SceneData, session: Session) -> Found:
        """The rows of a sweep, or of a training; a loss that is not finite is a `UserError`."""
        compute = self._sweep if group.table == "sweep" else self._train
        return compute(group, data, session)

    def _lacking(self, table: pd.DataFrame) -> list[tuple[str, int]]:
        """The runs that a table has no row of; the updates of a run follow one another."""
        cells = list_cells(self.config)
        return list(cells[~SCHEMA.among(cells, table)].itertuples(index=False, name=None))

    def _sweep(self, group: Group, data: SceneData, session: Session) -> Found:
        """Every rate, measured on a sequence of the training images that is held out.

        The rate with the highest mean IoU is chosen, the larger of equals. A rate whose loss does
        not stay finite cannot be.
        """
        (update, run, _), part, images = group.what, self.config.sweep, data.splits["train"]
        name = {"update": update, "run": run, "seed": self.config.seed + run}
        out = images.sequences == part.held_out
        if out.all() or not out.any():
            raise UserError(
                f"sweep.held_out = {part.held_out!r}: the training images are of the sequences "
                f"{', '.join(np.unique(images.sequences))}; expected one of several"
            )
        rows: list[dict[str, Any]] = []
        for rate in sorted(part.rates, reverse=True):
            program = SegNetProgram(
                f"{group.title} at {rate:g}", self.config, update, name["seed"], rate,
                [part.scale] * part.epochs, (images.only(~out), images.only(out)),
            )  # fmt: skip
            state = train(self._part(program, group, data), program, session)
            loss, _, confusion = state.figures
            found = measure(confusion[-1]) | {"train_loss": loss[-1]}
            if not np.isfinite(loss).all():
                found = dict.fromkeys(found, np.nan)
            rows.append(name | {"base_lr": rate} | found)
        best = max(rows, key=lambda row: np.nan_to_num(row["mean_iou"], nan=-1.0))
        if np.isnan(best["mean_iou"]):
            raise UserError(f"sweep {update}: no rate keeps the loss finite; add smaller ones")
        rows = [row | {"chosen": row is best} for row in rows]
        return Found({"sweep": SCHEMA.frame("sweep", rows)})

    def _train(self, group: Group, data: SceneData, session: Session) -> Found:
        """A run of an update, with its test results, of its best epoch on val and the last."""
        (update, run, rate), config, splits = group.what, self.config, data.splits
        program = SegNetProgram(
            group.title, config, update, config.seed + run, rate, config.train.scales(),
            (splits["train"], splits["val"]),
        )  # fmt: skip

        def grow(state: SegNetState, status: Status) -> None:
            if state.figures.confusion[status.epoch - 1].any():
                session.grow(epochs_of(config, run, program, state))

        state = train(self._part(program, group, data), program, session, grow)
        broken = np.flatnonzero(~np.isfinite(state.figures.loss))
        if broken.size:
            raise UserError(
                f"{program.title}: the loss is not finite in epoch {broken[0] + 1}; take a smaller "
                f"rate, --set learning_rates.{update}=…"
            )
        best, last = int(state.best_epoch), program.epochs
        weights = {last: program.measured(state.now, last), best: state.best}
        test = splits["test"].scaled(program.scales[-1])
        name = {"update": update, "run": run}
        rows = []
        for epoch, measured in weights.items():
            for sequence, matrix in program.evaluator.by_sequence(measured, test).items():
                cell = {"split": "test", "sequence": sequence, "epoch": epoch}
                rows.append(name | cell | measure(matrix))
        found = epochs_of(config, run, program, state, rows)
        done = {"seed": program.seed, "base_lr": rate, "epochs": last, "best_epoch": best}
        return found._replace(rows={**found.rows, "runs": SCHEMA.frame("runs", [name | done])})

    def _part(self, program: SegNetProgram, group: Group, data: SceneData) -> Part:
        """What the checkpoints of a program go by."""
        rates = {"learning_rates": {program.update: program.rate}}
        protocol = json.dumps(self.config.protocol() | rates, sort_keys=True)
        identity = fingerprint(
            ("archbn", "segment"), [program.update], group.table, protocol, data.sha256,
            program.seed, program.scales,
        )  # fmt: skip
        return Part(program.title, identity, tuple(sorted(group.names(SCHEMA))))


def list_cells(config: SegmentConfig) -> pd.DataFrame:
    """The runs of a config's selection: one row per update and run."""
    cells = [(update, run) for run in range(config.runs) for update in config.updates]
    return pd.DataFrame(cells, columns=list(CELL))


def describe_data(data: SceneData) -> dict[str, Any]:
    """What the provenance says of the data."""
    counts = {name: len(scenes.labels) for name, scenes in data.splits.items()}
    about = {"name": data.name, "sha256": data.sha256, "images": counts}
    height, width = data.size
    return about | {"height": height, "width": width}


def epochs_of(
    config: SegmentConfig, run: int, program: SegNetProgram, state: SegNetState,
    more: Sequence[dict[str, Any]] = (),
) -> Found:  # fmt: skip
    """A run's epochs so far, with `more` rows of metrics, and run 0's best weights."""
    figures, history, metrics = state.figures, [], []
    for epoch in range(int(state.step) // program.steps):
        matrix = figures.confusion[epoch]
        name = {"update": program.update, "run": run, "epoch": epoch + 1}
        history.append(name | {
            "scale": program.scales[epoch],
            "lr": float(program.rate_at(epoch * program.steps, program.rate)),
            "train_loss": figures.loss[epoch], "norm_deviation": figures.norm_deviation[epoch],
        })  # fmt: skip
        if matrix.any():
            metrics.append(name | {"split": "val", "sequence": ALL} | measure(matrix))
    files = {}
    if run == 0 and int(state.best_epoch):
        weights = jax.device_get(state.best)
        trained = TrainedSegNet(config.network, weights, program.update, program.final_size)
        files[f"{program.update}.safetensors"] = pack_weights(trained)
    rows = {"history": history, "metrics": [*metrics, *more]}
    return Found({table: SCHEMA.frame(table, mine) for table, mine in rows.items()}, files)


def _group(table: str, update: str, run: int, rate: float | None) -> Group:
    title = f"train {update} run {run}" if table == "runs" else f"sweep {update}"
    cells = pd.DataFrame([(update, run)], columns=list(CELL))
    return Group(title, table, cells, (update, run, rate))
