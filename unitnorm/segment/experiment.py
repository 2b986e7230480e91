"""From a config and the records so far to the records to come, run after run.

What is not recorded is trained; the records grow with every measurement, so that a look at them is
possible at any time, and the checkpoints allow to go on from any step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pandas as pd

from unitnorm.errors import UserError
from unitnorm.run.checkpoints import Part
from unitnorm.run.loop import Session, Status, train
from unitnorm.run.processes import to_host
from unitnorm.run.provenance import fingerprint
from unitnorm.run.records import Records
from unitnorm.segment import training
from unitnorm.segment.config import SegmentConfig
from unitnorm.segment.data import SceneData, Scenes
from unitnorm.segment.metrics import Metrics, measure
from unitnorm.segment.palette import NAMES
from unitnorm.segment.schema import ALL, CELL, FIGURES, SCHEMA
from unitnorm.segment.training import SegNetProgram, SegNetState
from unitnorm.segment.weights import pack_weights

Store = Callable[[Records], None]


def list_cells(config: SegmentConfig, runs: int | None = None) -> pd.DataFrame:
    """The runs of a config's selection: one row per update and run; of the sweep, run 0 alone."""
    count = config.runs if runs is None else runs
    return pd.DataFrame([(u, run) for run in range(count) for u in config.updates], columns=CELL)


def list_missing(cells: pd.DataFrame, table: pd.DataFrame) -> list[tuple[str, int]]:
    """The cells that a table has no row of; the updates of a run follow one another."""
    have = set(table[list(CELL)].itertuples(index=False, name=None))
    return [cell for cell in cells.itertuples(index=False, name=None) if cell not in have]


def describe_data(data: SceneData) -> dict[str, Any]:
    """What the provenance says of the data."""
    counts = {name: len(scenes.labels) for name, scenes in data.splits.items()}
    height, width = data.size
    return {
        "name": data.name, "sha256": data.sha256, "images": counts, "height": height,
        "width": width,
    }  # fmt: skip


def sweep_missing(
    config: SegmentConfig, data: SceneData, records: Records, session: Session, store: Store
) -> Records:
    """Try every rate for every update without a recorded sweep, on run 0's seed.

    One sequence of the training images is held out; the rate with the highest mean IoU on it is
    chosen, the larger of equals. A rate whose loss does not stay finite cannot be.

    Args:
      store: is given the records after every update.

    Raises:
      Interrupted: after saving a checkpoint.
      UserError: no image is of the sequence, or all are.
    """
    part, images = config.sweep, data.splits["train"]
    out = images.sequences == part.held_out
    if out.all() or not out.any():
        raise UserError(
            f"sweep.held_out = {part.held_out!r}: the training images are of the sequences "
            f"{', '.join(np.unique(images.sequences))}; expected one of several"
        )
    scales = [part.scale] * part.epochs
    for update, run in list_missing(list_cells(config, 1), records["sweep"]):
        rows = []
        for rate in sorted(part.rates, reverse=True):
            _, state = train_run(
                "sweep", config, data, update, run, rate, scales, images.only(~out),
                images.only(out), session,
            )  # fmt: skip
            figures = to_host(state.figures)
            found = measure(figures.confusion[-1])
            rows.append(
                {"update": update, "run": run, "seed": config.seed + run, "base_lr": rate,
                 "train_loss": figures.loss[-1], **dict(zip(FIGURES, found, strict=False))}
            )  # fmt: skip
            if int(state.best_epoch) == 0:  # it did not come to its end
                rows[-1] |= dict.fromkeys(("train_loss", *FIGURES), np.nan)
        best = int(np.argmax([-1.0 if np.isnan(r["mean_iou"]) else r["mean_iou"] for r in rows]))
        if np.isnan(rows[best]["mean_iou"]):
            raise UserError(f"sweep {update}: no rate keeps the loss finite; add smaller ones")
        rows = [row | {"chosen": place == best} for place, row in enumerate(rows)]
        records = records.with_rows("sweep", SCHEMA.frame("sweep", rows))
        store(records)
    return records


def find_unswept(config: SegmentConfig, records: Records) -> list[str]:
    """The updates that have runs to train, and no learning rate yet."""
    wanted = {update for update, _ in list_missing(list_cells(config), records["runs"])}
    missing = {update for update, _ in list_missing(list_cells(config, 1), records["sweep"])}
    return [u for u in config.updates if u in wanted & missing and u not in config.learning_rates]


def train_missing(
    config: SegmentConfig, data: SceneData, records: Records, session: Session, store: Store
) -> Records:
    """Train every run of the config that is not recorded, at its base learning rate.

    Args:
      store: is given the records after every measurement and every run.

    Raises:
      Interrupted: after saving a checkpoint.
      UserError: a loss is not finite any more.
    """
    scales = [config.train.scale_of(epoch) for epoch in range(config.train.epochs)]
    sweep = records["sweep"]
    chosen = sweep[sweep["chosen"]].set_index("update")["base_lr"].to_dict()
    for update, run in list_missing(list_cells(config), records["runs"]):
        rate = config.learning_rates.get(update, chosen.get(update))
        if rate is None:
            raise UserError(f"{update}: has no learning rate; run `unitnorm segment sweep`")

        def grow(program: SegNetProgram, state: SegNetState, run: int = run) -> None:
            nonlocal records
            records = with_epochs(records, config, run, program, state)
            store(records)

        program, state = train_run(
            "train", config, data, update, run, rate, scales, data.splits["train"],
            data.splits["val"], session, grow,
        )  # fmt: skip
        status = program.status(state)
        if status.epoch < program.epochs or not int(state.best_epoch):
            raise UserError(
                f"{program.title}: the loss is not finite in epoch {status.epoch}; take a smaller "
                f"rate, --set learning_rates.{update}=…"
            )
        records = with_results(records, config, data, run, rate, program, state)
        store(records)
    return records


def train_run(
    table: str,
    config: SegmentConfig,
    data: SceneData,
    update: str,
    run: int,
    rate: float,
    scales: list[float],
    images: Scenes,
    held_out: Scenes,
    session: Session,
    grow: Callable[[SegNetProgram, SegNetState], None] = lambda program, state: None,
) -> tuple[SegNetProgram, SegNetState]:
    """One training to its end; `grow` is called where it was measured."""
    title = f"{table} {update}" + (f" run {run}" if table == "train" else f" at {rate:g}")
    program = SegNetProgram(
        title, config, update, config.seed + run, rate, scales, images, held_out
    )
    told = json.dumps(config.protocol_of(update, rate), sort_keys=True)
    cell = pd.DataFrame([(update, run)], columns=CELL)
    part = Part(
        title,
        fingerprint(
            training.__name__, [update], table, told, data.sha256, config.seed + run, scales
        ),
        covers=tuple(SCHEMA.names("runs" if table == "train" else table, cell)),
    )

    def after_epoch(state: SegNetState, status: Status) -> None:
        if np.any(np.asarray(state.figures.confusion[status.epoch - 1])):
            grow(program, state)

    return program, train(part, program, session, after_epoch)


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


def with_epochs(
    records: Records,
    config: SegmentConfig,
    run: int,
    program: SegNetProgram,
    state: SegNetState,
    more: list[dict[str, Any]] | None = None,
) -> Records:
    """The records with a run's epochs so far, `more` rows of metrics, and run 0's best weights."""
    done = int(state.step) // program.steps
    figures = to_host(state.figures)
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
    records = records.with_rows("history", SCHEMA.frame("history", history))
    records = records.with_rows("metrics", SCHEMA.frame("metrics", metrics + (more or [])))
    if run or not int(state.best_epoch):
        return records
    packed = pack_weights(
        jax.device_get(state.best), config.network, program.update, program.final_size
    )
    return records.with_files({f"{program.update}.safetensors": packed})


def with_results(
    records: Records,
    config: SegmentConfig,
    data: SceneData,
    run: int,
    rate: float,
    program: SegNetProgram,
    state: SegNetState,
) -> Records:
    """The records with a complete run: its test results, of its best epoch on val and the last."""
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
    records = with_epochs(records, config, run, program, state, rows)
    done = {"update": program.update, "run": run, "seed": config.seed + run, "base_lr": rate,
            "epochs": last, "best_epoch": best}  # fmt: skip
    return records.with_rows("runs", SCHEMA.frame("runs", [done]))
