"""From a config and the records so far to the records to come, update after update.

`run` trains what is not recorded; the records on disk grow with every epoch, so that a look at them
is possible at any time, and the checkpoints allow to go on from any step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import pandas as pd

from unitnorm.run import provenance as base
from unitnorm.run import records as base_records
from unitnorm.run.checkpoints import Part
from unitnorm.segment import records
from unitnorm.segment.config import SegmentConfig
from unitnorm.segment.data import SPLITS, Scenes
from unitnorm.segment.metrics import measure
from unitnorm.segment.records import Records
from unitnorm.segment.training import Program, Session, State, train


def run(
    config: SegmentConfig,
    scenes: Scenes,
    known: Records,
    session: Session,
    store: Callable[[Records], None],
) -> Records:
    """Train every update of the config that `known` has no test results of.

    Args:
      store: is given the records after every epoch and every update.

    Raises:
      Interrupted: after saving a checkpoint.
    """
    for update in config.updates:
        if update in known.trained():
            session.say(f"{update}: is recorded; --fresh starts over")
            continue
        program = Program(config, update, scenes.splits["train"], scenes.splits["val"])

        def epoch_done(program: Program, state: State, seconds: float) -> None:
            nonlocal known
            known = after_epoch(known, config, scenes, program, state)
            store(known)
            session.epoch_done(program, state, seconds)

        state = train(
            program, part_of(config, update, scenes), replace(session, epoch_done=epoch_done)
        )
        known = after_training(known, config, scenes, program, state)
        store(known)
    return known


def after_epoch(
    known: Records, config: SegmentConfig, scenes: Scenes, program: Program, state: State
) -> Records:
    """The records with an update's epochs so far, and its best weights."""
    update, done = program.update, int(state.step) // program.steps
    history = jax.device_get(state.history)
    rows = [
        records.row(update, scenes.size, "val", epoch + 1, measure(history.confusion[epoch]))
        for epoch in range(done)
    ]
    curves = pd.DataFrame(
        {
            "update": update,
            "epoch": range(1, done + 1),
            "learning_rate": [
                base_records.shortest(float(program.rate(epoch * program.steps)))
                for epoch in range(done)
            ],
            "loss": [base_records.shortest(x) for x in history.loss[:done]],
            "norm_deviation": [base_records.shortest(x) for x in history.norm_deviation[:done]],
        },
        columns=list(records.HISTORY),
    )
    known = known.replaced(update, pd.DataFrame(rows, columns=list(records.COLUMNS)), curves)
    known.weights[update] = records.pack(
        jax.device_get(state.best), config.network, update, scenes.size
    )
    return known


def after_training(
    known: Records, config: SegmentConfig, scenes: Scenes, program: Program, state: State
) -> Records:
    """The records with an update's test results: of its best epoch on val, and of the last."""
    known = after_epoch(known, config, scenes, program, state)
    weights = {program.epochs: state.now, int(state.best_epoch): state.best}
    rows = [
        records.row(
            program.update, scenes.size, "test", epoch,
            measure(program.confusion(weights[epoch], scenes.splits["test"])),
        )
        for epoch in sorted(weights)
    ]  # fmt: skip
    both = pd.concat([known.metrics, pd.DataFrame(rows)], ignore_index=True)
    return replace(known, metrics=both)


def part_of(config: SegmentConfig, update: str, scenes: Scenes) -> Part:
    """What a training is called, and what its state must not be mixed with."""
    return Part(
        title=f"segment {update}",
        fingerprint=base.fingerprint(
            "unitnorm.segment.training", config.fingerprint(update), scenes.sha256
        ),
        covers=(covered(update),),
    )


def covered(update: str) -> str:
    """The name of an update's records, for the checkpoints."""
    return f"segment/{update}"


def provenance(config: SegmentConfig, scenes: Scenes) -> dict[str, Any]:
    """What a folder's records have in common."""
    return {
        "config": config.protocol(),
        "config_sha256": config.fingerprint(),
        "data": {
            "name": scenes.name,
            "sha256": scenes.sha256,
            "images": {name: len(scenes.splits[name].labels) for name in SPLITS},
            "height": scenes.size[0],
            "width": scenes.size[1],
        },
        "commands": [],
    }
