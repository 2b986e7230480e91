"""From a plan and the runs so far to the runs to come.

Everything of one data set, depth and config is one program: its arms, rates and starts are the
lanes of each seed, which share the seed's mini-batches and first product. A seed's lanes are always
trained together, so that its bits do not depend on which of them were missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from unitnorm.data import Dataset
from unitnorm.errors import UserError
from unitnorm.run.checkpoints import Part
from unitnorm.run.loop import Session, train
from unitnorm.run.provenance import fingerprint
from unitnorm.run.records import Records
from unitnorm.study.config import ArmPlan, Plan
from unitnorm.study.schema import BUDGETS, CELL, MEASURED, SCHEMA
from unitnorm.study.statistics import choose_rates, pack_wrong
from unitnorm.table2 import protocol, training
from unitnorm.table2.config import Config
from unitnorm.table2.experiment import at_end, exact

SEEDS_AT_ONCE = 4  # in a program; its runs are recorded together
LANES_AT_ONCE = 32  # of a seed, in a program; more leave the caches and gain nothing


@dataclass(frozen=True)
class LanePlan:
    """One lane of a program."""

    arm: str
    plan: ArmPlan
    filters_rate: float
    rest_rate: float
    spread: float


@dataclass(frozen=True)
class Batch:
    """Seeds that one program trains."""

    dataset: str
    depth: int
    purpose: str  # "tune" or "compare"
    config: Config
    lanes: tuple[LanePlan, ...]
    seeds: tuple[int, ...]

    def title(self) -> str:
        """What the user calls it."""
        name = f"{self.purpose} {self.dataset} depth {self.depth}"
        return f"{name} {self.lanes[0].arm} seed {self.seeds[0]}"

    def cells_of(self, seed: int) -> list[tuple[Any, ...]]:
        """What names each run of a seed, in the order of `CELL`."""
        return [
            (self.dataset, self.depth, lane.arm, self.purpose, seed, lane.filters_rate,
             lane.rest_rate, lane.plan.start, lane.spread)
            for lane in self.lanes
        ]  # fmt: skip

    def cells(self) -> pd.DataFrame:
        """One row per run."""
        rows = [cell for seed in self.seeds for cell in self.cells_of(seed)]
        return pd.DataFrame(rows, columns=list(CELL))


def list_batches(plan: Plan, runs: pd.DataFrame) -> Iterator[Batch]:
    """What is missing of a plan, tuning first; for the comparison only where tuning is done.

    All data sets and depths get their first seeds before any gets more.
    """
    have = set(runs[list(CELL)].itertuples(index=False, name=None))
    for purpose in ("tune", "compare"):
        batches = []
        for dataset in plan.datasets:
            for depth in plan.depths:
                for program in plan_programs(plan, runs, dataset, depth, purpose):
                    seeds = plan.tune if purpose == "tune" else plan.compare
                    whole = Batch(dataset, depth, purpose, *program, ())
                    missing = [
                        seed
                        for seed in range(seeds.first, seeds.first + seeds.count)
                        if any(cell not in have for cell in whole.cells_of(seed))
                    ]
                    for start in range(0, len(missing), SEEDS_AT_ONCE):
                        some = tuple(missing[start : start + SEEDS_AT_ONCE])
                        batches.append(Batch(dataset, depth, purpose, *program, some))
        yield from sorted(batches, key=lambda batch: batch.seeds[0])


def plan_programs(
    plan: Plan, runs: pd.DataFrame, dataset: str, depth: int, purpose: str
) -> list[tuple[Config, tuple[LanePlan, ...]]]:
    """The programs of a purpose: configs, and the lanes that are trained so, of one reading.

    For the comparison, the rates are those that tuning chose; an arm that is not tuned yet, where
    it has to be, has no lane.
    """
    programs: dict[tuple[str, ...], tuple[Config, list[LanePlan]]] = {}
    tuned = [name for name, arm in plan.arms.items() if len(arm.rate_pairs()) > 1]
    chosen = _chosen_rates(plan, runs, dataset, depth, tuned) if purpose == "compare" else {}
    for name, arm in plan.arms.items():
        pairs = arm.rate_pairs()
        if purpose == "tune" and name not in tuned:
            continue
        if purpose == "compare" and name in tuned:
            if name not in chosen:
                continue
            pairs = [chosen[name]]
        config = plan.config_of(name)
        lanes = programs.setdefault((config.fingerprint(), *arm.reading()), (config, []))[1]
        spreads = arm.spreads if purpose == "compare" else [0.0]
        lanes += [LanePlan(name, arm, *pair, spread) for pair in pairs for spread in spreads]
    parts = []
    for config, lanes in programs.values():
        # lanes that follow the first one stay with it
        together = any(lane.plan.schedule == "follow" for lane in lanes)
        size = len(lanes) if together else LANES_AT_ONCE
        starts = range(0, len(lanes), size)
        parts += [(config, tuple(lanes[start : start + size])) for start in starts]
    return parts


def _chosen_rates(
    plan: Plan, runs: pd.DataFrame, dataset: str, depth: int, tuned: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """The tuned rates of each arm whose tuning is complete."""
    mine = runs[
        (runs["dataset"] == dataset) & (runs["depth"] == depth) & (runs["purpose"] == "tune")
    ]
    done = [
        name
        for name in tuned
        if (mine["arm"] == name).sum() == plan.tune.count * len(plan.arms[name].rate_pairs())
    ]
    if not done:
        return {}
    best = choose_rates(mine[mine["arm"].isin(done)])
    return {
        row["arm"]: (float(row["filters_rate"]), float(row["rest_rate"]))
        for row in best.to_dict("records")
    }


def run_study(
    plan: Plan, data: Mapping[str, Dataset], records: Records, session: Session
) -> Iterator[Records]:
    """Train what is missing, batch after batch.

    Yields:
      The records with one more batch.

    Raises:
      Interrupted: after saving a checkpoint.
    """
    while True:
        batch = next(list_batches(plan, records["runs"]), None)
        if batch is None:
            return
        rows = train_batch(batch, data[batch.dataset], session)
        records = records.with_rows("runs", rows)
        yield records


def recompute(
    plan: Plan, runs: pd.DataFrame, chosen: Mapping[str, Any], data: Dataset, session: Session
) -> pd.DataFrame:
    """A recorded run trained again, with the lanes that it was trained beside, as a row of `runs`.

    Args:
      chosen: the recorded row.

    Raises:
      UserError: the plan has no such run.
    """
    place = (chosen["dataset"], chosen["depth"], chosen["purpose"])
    for program in plan_programs(plan, runs, *place):
        batch = Batch(*place, *program, (chosen["seed"],))
        cell = tuple(chosen[name] for name in CELL)
        if cell in batch.cells_of(chosen["seed"]):
            rows = train_batch(batch, data, session)
            wanted = pd.DataFrame([cell], columns=list(CELL))
            return SCHEMA.rows_of(rows, wanted)
    raise UserError(f"{', '.join(map(str, place))}: the plan has no such run")


def train_batch(batch: Batch, data: Dataset, session: Session) -> pd.DataFrame:
    """The runs of a batch, as rows of the table `runs`."""
    config, reading = batch.config, batch.lanes[0].plan
    phase = training.train_phase(config)._replace(
        budgets=BUDGETS if batch.purpose == "compare" else (),
        side_by_side=True,
        stop_by=reading.stop_by,
        statistics=reading.statistics,
    )
    arms, lanes = lanes_of(batch)
    program = training.Program(
        batch.title(), config, batch.depth, phase, arms, np.asarray(batch.seeds), lanes, data
    )
    identity = fingerprint(
        training.__name__, [arm.update for arm in arms], config.fingerprint(), data.sha256,
        batch.depth, list(batch.seeds),
        *reading.reading(), batch.purpose,
        json.dumps([arm._asdict() for arm in arms], default=str), *lanes,
    )  # fmt: skip
    covers = tuple(sorted(SCHEMA.names("runs", batch.cells())))
    state = train(Part(batch.title(), identity, covers), program, session)
    return make_rows(batch, program.take(state), *program.find_wrong(state))


def lanes_of(batch: Batch) -> tuple[list[training.Arm], training.Lanes]:
    """A batch's lanes as the training takes them; neighbours with one update are one arm."""
    arms: list[training.Arm] = []
    for lane in batch.lanes:
        options = tuple(sorted(lane.plan.options.items()))
        arm = training.Arm(lane.plan.update, 1, options, lane.plan.start != "balanced")
        if arms and arms[-1]._replace(lanes=1) == arm:
            arms[-1] = arms[-1]._replace(lanes=arms[-1].lanes + 1)
        else:
            arms.append(arm)
    spread = np.zeros((len(batch.lanes), 3))
    for place, lane in enumerate(batch.lanes):
        if lane.plan.start != "balanced":
            spread[place, protocol.START.index(lane.plan.start)] = lane.spread
    one = training.Lanes(
        rate=np.array([lane.rest_rate for lane in batch.lanes]),
        ratio=np.array([lane.filters_rate / lane.rest_rate for lane in batch.lanes]),
        schedule=np.array([protocol.SCHEDULES.index(lane.plan.schedule) for lane in batch.lanes]),
        spread=spread,
    )
    count = len(batch.seeds)
    return arms, training.Lanes(*(np.repeat(np.asarray(x)[None], count, 0) for x in one))


def make_rows(
    batch: Batch, runs: training.Runs, wrong: np.ndarray, test_loss: np.ndarray
) -> pd.DataFrame:
    """The rows of a trained batch.

    Args:
      runs: on the host.
      wrong, test_loss: see `training.Program.find_wrong`.
    """
    config, rows = batch.config, []
    phase = training.train_phase(config)
    for place, lane in enumerate(batch.lanes):
        run = training.lane_of(runs, place)
        end, history = at_end(run, config, phase), run.history
        val_error = exact(history.val_error, phase.validation_images)
        for i, seed in enumerate(batch.seeds):
            epochs = int(run.epoch[i])
            measured = {
                "train_loss": end.train_loss[i],
                "val_error": end.val_error[i],
                "val_loss": history.val_loss[i, epochs - 1],
                "test_error": wrong[i, place].mean(),
                "test_loss": test_loss[i, place],
            }
            for epoch in BUDGETS:
                values = [np.nan] * len(MEASURED)
                if epoch <= epochs:
                    values = [
                        val_error[i, epoch - 1] if name == "val_error"
                        else getattr(history, name)[i, epoch - 1]
                        for name in MEASURED
                    ]  # fmt: skip
                measured |= {f"{name}_{epoch}": x for name, x in zip(MEASURED, values, strict=True)}
            rows.append(
                {
                    "dataset": batch.dataset, "depth": batch.depth, "arm": lane.arm,
                    "purpose": batch.purpose, "seed": seed, "filters_rate": lane.filters_rate,
                    "rest_rate": lane.rest_rate, "start": lane.plan.start, "spread": lane.spread,
                    "update": lane.plan.update, "schedule": lane.plan.schedule,
                    "batch_size": config.loss.batch_size, "reduction": config.loss.reduction,
                    "epochs": epochs, "stop_reason": protocol.STOP_REASONS[run.reason[i]],
                    "diverged": end.diverged[i],
                    "effective_rate": history.effective_rate[i, epochs - 1],
                    "wrong": pack_wrong(wrong[i, place]) if batch.purpose == "compare" else "",
                    **measured,
                }
            )  # fmt: skip
    return SCHEMA.frame("runs", rows)


def count_runs(plan: Plan) -> dict[str, int]:
    """How many runs a whole plan has, by purpose."""
    cells = len(plan.datasets) * len(plan.depths)
    grids = [len(arm.rate_pairs()) for arm in plan.arms.values()]
    levels = sum(len(arm.spreads) for arm in plan.arms.values())
    return {
        "tune": cells * plan.tune.count * sum(size for size in grids if size > 1),
        "compare": cells * plan.compare.count * levels,
    }


def time_run(plan: Plan, data: Dataset, images: int = 2000) -> float:
    """Seconds of a run of the comparison on this machine, from two epochs on a few images.

    Args:
      data: any data set; only its size matters.

    Returns:
      The mean over the plan's depths.
    """
    return float(np.mean([_time_depth(plan, depth, data, images) for depth in plan.depths]))


def _time_depth(plan: Plan, depth: int, data: Dataset, images: int) -> float:
    nothing = SCHEMA.frame("runs", [])
    programs = plan_programs(plan, nothing, plan.datasets[0], depth, "compare")
    if not programs:  # all arms have to be tuned first; a large rate could end at once
        name, arm = next(iter(plan.arms.items()))
        programs = [(plan.config_of(name), (LanePlan(name, arm, *min(arm.rate_pairs()), 0.0),))]
    config, mine = programs[0]
    batch = Batch(plan.datasets[0], depth, "compare", config, mine, tuple(range(SEEDS_AT_ONCE)))
    phase = training.train_phase(config)._replace(
        train_images=images, validation_images=500, side_by_side=True
    )
    arms, values = lanes_of(batch)
    program = training.Program(
        "timing", config, depth, phase, arms, np.asarray(batch.seeds), values, data
    )
    state = program.advance(program.start())
    program.status(state)
    started = time.perf_counter()
    program.status(program.advance(state))
    per_image = (time.perf_counter() - started) / (images * len(batch.seeds) * len(mine))
    epochs = (config.train.min_epochs + config.train.max_epochs) / 2
    return per_image * epochs * (config.train.train_images + config.train.validation_images / 3)
