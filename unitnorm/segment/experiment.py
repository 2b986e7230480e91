"""SegNet on CamVid: which sweeps and trainings a config has, and their rows.

A group is the sweep of an update, or the training of one of its runs. A training's records grow
with every measurement, so that a look at them is possible at any time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
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
from unitnorm.segment.metrics import Metrics, measure
from unitnorm.segment.palette import NAMES
from unitnorm.segment.schema import ALL, CELL, FIGURES, SCHEMA
from unitnorm.segment.training import SegNetProgram, SegNetState
from unitnorm.segment.weights import pack_weights

ROOMS = ("archbn", "segment")  # whose code computes


@dataclass(frozen=True)
class Segmentation:
    """The experiment of a config; see `planner.Experiment`."""

    config: SegmentConfig
    sweep_only: bool = False
    schema: Schema = SCHEMA

    def missing(self, records: Records) -> Iterator[Group]:
        """Sweeps of the updates without a rate, and trainings of those with one."""
        config, runs = self.config, range(self.config.runs)
        untrained = [] if self.sweep_only else self._lacking(records["runs"], runs)
        sweep = records["sweep"]
        chosen = sweep[sweep["chosen"]].set_index("update")["base_lr"].to_dict()
        wanted = {update for update, _ in untrained if update not in config.learning_rates}
        for update, run in self._lacking(sweep, range(1)):
            if self.sweep_only or update in wanted:
                yield _group("sweep", update, run, None)
        for update, run in untrained:
            rate = config.learning_rates.get(update, chosen.get(update))
            if rate is not None:
                yield _group("runs", update, run, rate)

    def again(self, records: Records, chosen: Mapping[str, Any]) -> Iterator[Group]:
        """A run's training at the rate recorded."""
        yield _group("runs", chosen["update"], chosen["run"], chosen["base_lr"])

    def compute(self, group: Group, data: SceneData, session: Session) -> Found:
        """The rows of a sweep, or of a training.

        Raises:
          Interrupted: after saving a checkpoint.
          UserError: a loss is not finite any more, or the images cannot be divided.
        """
        update, run, rate = group.what
        if group.table == "sweep":
            return self._sweep(group, update, run, data, session)
        return self._train(group, update, run, rate, data, session)

    def _lacking(self, table: pd.DataFrame, runs: range) -> list[tuple[str, int]]:
        """The runs that a table has no row of; the updates of a run follow one another."""
        have = set(table[list(CELL)].itertuples(index=False, name=None))
        return [(u, run) for run in runs for u in self.config.updates if (u, run) not in have]

    def _sweep(
        self, group: Group, update: str, run: int, data: SceneData, session: Session
    ) -> Found:
        """Every rate, measured on a sequence of the training images that is held out.

        The rate with the highest mean IoU is chosen, the larger of equals. A rate whose loss does
        not stay finite cannot be.
        """
        part, images = self.config.sweep, data.splits["train"]
        out = images.sequences == part.held_out
        if out.all() or not out.any():
            raise UserError(
                f"sweep.held_out = {part.held_out!r}: the training images are of the sequences "
                f"{', '.join(np.unique(images.sequences))}; expected one of several"
            )
        scales, rows = [part.scale] * part.epochs, []
        for rate in sorted(part.rates, reverse=True):
            program = SegNetProgram(
                f"{group.title} at {rate:g}", self.config, update, self.config.seed + run, rate,
                scales, images.only(~out), images.only(out),
            )  # fmt: skip
            state = self._run(program, group, rate, data, session)
            figures = jax.device_get(state.figures)
            found = measure(figures.confusion[-1])
            rows.append(
                {"update": update, "run": run, "seed": self.config.seed + run, "base_lr": rate,
                 "train_loss": figures.loss[-1], **dict(zip(FIGURES, found, strict=False))}
            )  # fmt: skip
            if int(state.best_epoch) == 0:  # it did not come to its end
                rows[-1] |= dict.fromkeys(("train_loss", *FIGURES), np.nan)
        best = int(np.argmax([-1.0 if np.isnan(r["mean_iou"]) else r["mean_iou"] for r in rows]))
        if np.isnan(rows[best]["mean_iou"]):
            raise UserError(f"sweep {update}: no rate keeps the loss finite; add smaller ones")
        rows = [row | {"chosen": place == best} for place, row in enumerate(rows)]
        return Found({"sweep": SCHEMA.frame("sweep", rows)})

    def _train(
        self, group: Group, update: str, run: int, rate: float, data: SceneData, session: Session
    ) -> Found:
        """A run of an update, with its results on the test images."""
        config = self.config
        scales = [config.train.scale_of(epoch) for epoch in range(config.train.epochs)]
        program = SegNetProgram(
            group.title, config, update, config.seed + run, rate, scales, data.splits["train"],
            data.splits["val"],
        )  # fmt: skip

        def grow(state: SegNetState, status: Status) -> None:
            if np.any(np.asarray(state.figures.confusion[status.epoch - 1])):
                session.grow(epochs_of(config, run, program, state))

        state = self._run(program, group, rate, data, session, grow)
        status = program.status(state)
        if status.epoch < program.epochs or not int(state.best_epoch):
            raise UserError(
                f"{program.title}: the loss is not finite in epoch {status.epoch}; take a smaller "
                f"rate, --set learning_rates.{update}=…"
            )
        return results_of(config, data, run, rate, program, state)

    def _run(
        self,
        program: SegNetProgram,
        group: Group,
        rate: float,
        data: SceneData,
        session: Session,
        after_epoch: Callable[[SegNetState, Status], None] = lambda state, status: None,
    ) -> SegNetState:
        """Train a program to its end."""
        update, run, _ = group.what
        protocol = json.dumps(self.config.protocol_of(update, rate), sort_keys=True)
        identity = fingerprint(
            ROOMS, [update], group.table, protocol, data.sha256, self.config.seed + run,
            program.scales,
        )  # fmt: skip
        covers = tuple(sorted(group.names(SCHEMA)))
        state: SegNetState = train(
            Part(program.title, identity, covers), program, session, after_epoch
        )
        return state


def _group(table: str, update: str, run: int, rate: float | None) -> Group:
    title = f"train {update} run {run}" if table == "runs" else f"sweep {update}"
    cells = pd.DataFrame([(update, run)], columns=list(CELL))
    return Group(title, table, cells, (update, run, rate))


def list_cells(config: SegmentConfig) -> pd.DataFrame:
    """The runs of a config's selection: one row per update and run."""
    cells = [(update, run) for run in range(config.runs) for update in config.updates]
    return pd.DataFrame(cells, columns=list(CELL))


def describe_data(data: SceneData) -> dict[str, Any]:
    """What the provenance says of the data."""
    counts = {name: len(scenes.labels) for name, scenes in data.splits.items()}
    height, width = data.size
    return {
        "name": data.name, "sha256": data.sha256, "images": counts, "height": height,
        "width": width,
    }  # fmt: skip


def make_rows(
    update: str, run: int, split: str, epoch: int, matrices: np.ndarray, sequences: np.ndarray
) -> list[dict[str, Any]]:
    """Rows of `metrics`: of all images and, where there are several sequences, of each.

    Args:
      matrices: of each image, (n, classes, classes).
      sequences: of each image, (n,).
    """
    groups = {ALL: np.full(len(sequences), True)}
    if len(np.unique(sequences)) > 1:
        groups |= {str(name): sequences == name for name in np.unique(sequences)}
    return [
        {"update": update, "run": run, "split": split, "sequence": name, "epoch": epoch}
        | to_columns(measure(matrices[chosen].sum(0)))
        for name, chosen in groups.items()
    ]


def to_columns(found: Metrics) -> dict[str, float]:
    """Figures by the name of their column."""
    return dict(zip((*FIGURES, *NAMES), (*found[:3], *found.iou), strict=True))


def epochs_of(
    config: SegmentConfig,
    run: int,
    program: SegNetProgram,
    state: SegNetState,
    more: list[dict[str, Any]] | None = None,
) -> Found:
    """A run's epochs so far, with `more` rows of metrics, and run 0's best weights."""
    done = int(state.step) // program.steps
    figures = jax.device_get(state.figures)
    name = {"update": program.update, "run": run}
    history = [
        name
        | {"epoch": epoch + 1, "scale": program.scales[epoch],
           "lr": float(program.rate_at(epoch * program.steps)), "train_loss": figures.loss[epoch],
           "norm_deviation": figures.norm_deviation[epoch]}
        for epoch in range(done)
    ]  # fmt: skip
    everywhere = np.array([ALL])
    metrics = [
        row
        for epoch in range(done)
        if figures.confusion[epoch].any()
        for row in make_rows(
            program.update, run, "val", epoch + 1, figures.confusion[[epoch]], everywhere
        )
    ]
    rows = {"history": history, "metrics": metrics + (more or [])}
    weights = {}
    if run == 0 and int(state.best_epoch):
        packed = pack_weights(
            jax.device_get(state.best), config.network, program.update, program.final_size
        )
        weights = {f"{program.update}.safetensors": packed}
    return Found({name: SCHEMA.frame(name, mine) for name, mine in rows.items()}, weights)


def results_of(
    config: SegmentConfig,
    data: SceneData,
    run: int,
    rate: float,
    program: SegNetProgram,
    state: SegNetState,
) -> Found:
    """A complete run, with its test results, of its best epoch on val and the last."""
    best, last = int(state.best_epoch), program.epochs
    weights = {last: program.measured(state.now, last), best: state.best}
    test = data.splits["test"].scaled(program.scales[-1])
    rows = [
        row
        for epoch in sorted(weights)
        for row in make_rows(
            program.update, run, "test", epoch, program.evaluator.confusion(weights[epoch], test),
            test.sequences,
        )
    ]  # fmt: skip
    found = epochs_of(config, run, program, state, rows)
    done = {"update": program.update, "run": run, "seed": config.seed + run, "base_lr": rate,
            "epochs": last, "best_epoch": best}  # fmt: skip
    return found._replace(rows={**found.rows, "runs": SCHEMA.frame("runs", [done])})
