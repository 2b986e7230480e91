"""From a plan and the runs so far to the runs to come.

Everything of one data set, depth and config is one program, in parts of `VARIANTS_AT_ONCE`: its
arms, rates and starts are the variants of each seed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from unitnorm.archbn import protocol, training
from unitnorm.archbn.config import Config
from unitnorm.data import Dataset
from unitnorm.errors import UserError
from unitnorm.run.checkpoints import Part
from unitnorm.run.loop import Session, train
from unitnorm.run.provenance import fingerprint
from unitnorm.run.records import Records
from unitnorm.study.config import ArmPlan, Plan
from unitnorm.study.schema import BUDGETS, CELL, MEASURED, SCHEMA
from unitnorm.study.statistics import choose_rates, pack_wrong
from unitnorm.table2.experiment import at_end, exact

SEEDS_AT_ONCE = 4  # in a program; its runs are recorded together
VARIANTS_AT_ONCE = 32  # of a seed, in a program; all of a large grid would be recorded late


@dataclass(frozen=True)
class Variant:
    """One variant of a program."""

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
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]

    def title(self) -> str:
        """What the user calls it."""
        name = f"{self.purpose} {self.dataset} depth {self.depth}"
        return f"{name} {self.variants[0].arm} seed {self.seeds[0]}"

    def cells_of(self, seed: int) -> list[tuple[Any, ...]]:
        """What names each run of a seed, in the order of `CELL`."""
        return [
            (self.dataset, self.depth, variant.arm, self.purpose, seed, variant.filters_rate,
             variant.rest_rate, variant.plan.start, variant.spread)
            for variant in self.variants
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
        for whole in whole_batches(plan, runs, purpose):
            missing: dict[tuple[int, ...], list[int]] = {}  # seeds, by the variants they lack
            for seed in whole.seeds:
                cells = whole.cells_of(seed)
                lacks = tuple(k for k, cell in enumerate(cells) if cell not in have)
                if lacks:
                    missing.setdefault(lacks, []).append(seed)
            for lacks, seeds in missing.items():
                variants = with_leader([whole.variants[k] for k in lacks], whole.variants)
                batches += [
                    replace(whole, variants=variants, seeds=tuple(seeds[k : k + SEEDS_AT_ONCE]))
                    for k in range(0, len(seeds), SEEDS_AT_ONCE)
                ]
        yield from sorted(batches, key=lambda batch: batch.seeds[0])


def whole_batches(plan: Plan, runs: pd.DataFrame, purpose: str) -> list[Batch]:
    """Every program of a purpose with all of its seeds, recorded or not."""
    return [
        Batch(dataset, depth, purpose, *program, tuple(plan.seeds_of(program[1][0].arm, purpose)))
        for dataset in plan.datasets
        for depth in plan.depths
        for program in plan_programs(plan, runs, dataset, depth, purpose)
    ]


def with_leader(some: Sequence[Variant], variants: Sequence[Variant]) -> tuple[Variant, ...]:
    """Some of a program's variants, and the first one where any of them follows it."""
    follows = any(variant.plan.schedule == "follow" for variant in some)
    leader = variants[:1] if follows and variants[0] not in some else ()
    return (*leader, *some)


def plan_programs(
    plan: Plan, runs: pd.DataFrame, dataset: str, depth: int, purpose: str
) -> list[tuple[Config, tuple[Variant, ...]]]:
    """The programs of a purpose: configs, and the variants that are trained so, all `Plan.alike`.

    For the comparison, the rates are those that tuning chose; an arm that is not tuned yet, where
    it has to be, has no variant.
    """
    programs: dict[tuple[Any, ...], tuple[Config, list[Variant]]] = {}
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
        variants = programs.setdefault(plan.alike(name), (config, []))[1]
        spreads = arm.spreads if purpose == "compare" else [0.0]
        variants += [Variant(name, arm, *pair, spread) for pair in pairs for spread in spreads]
    parts = []
    for config, variants in programs.values():
        # variants that follow the first one stay with it
        together = any(variant.plan.schedule == "follow" for variant in variants)
        size = len(variants) if together else VARIANTS_AT_ONCE
        starts = range(0, len(variants), size)
        parts += [(config, tuple(variants[start : start + size])) for start in starts]
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
    """A recorded run trained again, with the one that it may follow, as a row of `runs`.

    Args:
      chosen: the recorded row.

    Raises:
      UserError: the plan has no such run.
    """
    place = (chosen["dataset"], chosen["depth"], chosen["purpose"])
    cell = tuple(chosen[name] for name in CELL)
    for config, variants in plan_programs(plan, runs, *place):
        batch = Batch(*place, config, variants, (chosen["seed"],))
        cells = batch.cells_of(chosen["seed"])
        if cell in cells:
            variant = variants[cells.index(cell)]
            alone = replace(batch, variants=with_leader([variant], variants))
            wanted = pd.DataFrame([cell], columns=list(CELL))
            return SCHEMA.rows_of(train_batch(alone, data, session), wanted)
    raise UserError(f"{', '.join(map(str, place))}: the plan has no such run")


def train_batch(batch: Batch, data: Dataset, session: Session) -> pd.DataFrame:
    """The runs of a batch, as rows of the table `runs`."""
    config, reading = batch.config, batch.variants[0].plan
    phase = training.train_phase(config)._replace(
        budgets=BUDGETS if batch.purpose == "compare" else (),
        stop_by=reading.stop_by,
        statistics=reading.statistics,
    )
    arms = group_by_arm(batch.variants)
    given = {arm: settings_of(variants, batch.seeds) for arm, variants in arms.items()}
    program = training.Program(batch.title(), config, batch.depth, phase, list(given.items()), data)
    identity = fingerprint(
        training.__name__, [arm.update for arm in given], config.fingerprint(), data.sha256,
        batch.depth, *reading.reading(), batch.purpose,
        json.dumps([arm._asdict() for arm in given], default=str),
        *(values for settings in given.values() for values in settings),
    )  # fmt: skip
    covers = tuple(sorted(SCHEMA.names("runs", batch.cells())))
    state = train(Part(batch.title(), identity, covers), program, session)
    rows: list[dict[str, Any]] = []
    ended = zip(arms.values(), program.take(state), program.find_wrong(state), strict=True)
    for variants, runs, measured in ended:
        rows += make_rows(batch, variants, runs, *measured)
    return SCHEMA.frame("runs", rows)


def group_by_arm(variants: Sequence[Variant]) -> dict[training.Arm, list[Variant]]:
    """The variants by what is compiled in, the first one's first."""
    arms: dict[training.Arm, list[Variant]] = {}
    for variant in variants:
        options = tuple(sorted(variant.plan.options.items()))
        arm = training.Arm(variant.plan.update, options, variant.plan.start != "balanced")
        arms.setdefault(arm, []).append(variant)
    return arms


def settings_of(variants: Sequence[Variant], seeds: Sequence[int]) -> training.Settings:
    """An arm's runs, variant after variant, each with all seeds."""
    spread = np.zeros((len(variants), len(protocol.START)))
    for place, variant in enumerate(variants):
        if variant.plan.start != "balanced":
            spread[place, protocol.START.index(variant.plan.start)] = variant.spread
    each = {
        "rate": [variant.rest_rate for variant in variants],
        "ratio": [variant.filters_rate / variant.rest_rate for variant in variants],
        "schedule": [protocol.SCHEDULES.index(variant.plan.schedule) for variant in variants],
        "spread": spread,
    }
    repeated = {name: np.repeat(np.asarray(x), len(seeds), 0) for name, x in each.items()}
    return training.Settings(np.tile(seeds, len(variants)), **repeated)


def make_rows(
    batch: Batch,
    variants: Sequence[Variant],
    run: training.Run,
    wrong: np.ndarray,
    test_loss: np.ndarray,
) -> list[dict[str, Any]]:
    """The rows of a trained arm.

    Args:
      run: the arm's runs on the host, in the order of `settings_of`.
      wrong, test_loss: see `training.Program.find_wrong`.
    """
    config, rows = batch.config, []
    phase = training.train_phase(config)
    end, history = at_end(run, config, phase), run.history
    val_error = exact(history.val_error, phase.validation_images)
    for place, variant in enumerate(variants):
        for i, seed in enumerate(batch.seeds, place * len(batch.seeds)):
            epochs = int(run.epoch[i])
            measured = {
                "train_loss": end.train_loss[i],
                "val_error": end.val_error[i],
                "val_loss": history.val_loss[i, epochs - 1],
                "test_error": wrong[i].mean(),
                "test_loss": test_loss[i],
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
                    "dataset": batch.dataset, "depth": batch.depth, "arm": variant.arm,
                    "purpose": batch.purpose, "seed": seed, "filters_rate": variant.filters_rate,
                    "rest_rate": variant.rest_rate, "start": variant.plan.start,
                    "spread": variant.spread, "update": variant.plan.update,
                    "schedule": variant.plan.schedule,
                    "batch_size": config.loss.batch_size, "reduction": config.loss.reduction,
                    "epochs": epochs, "stop_reason": protocol.STOP_REASONS[run.reason[i]],
                    "diverged": end.diverged[i],
                    "effective_rate": history.effective_rate[i, epochs - 1],
                    "wrong": pack_wrong(wrong[i]) if batch.purpose == "compare" else "",
                    **measured,
                }
            )  # fmt: skip
    return rows


def count_runs(plan: Plan) -> dict[str, int]:
    """How many runs a whole plan has, by purpose."""
    cells = len(plan.datasets) * len(plan.depths)
    grids = [len(arm.rate_pairs()) for arm in plan.arms.values()]
    levels = [
        len(arm.spreads) * len(plan.seeds_of(name, "compare")) for name, arm in plan.arms.items()
    ]
    return {
        "tune": cells * plan.tune.count * sum(size for size in grids if size > 1),
        "compare": cells * sum(levels),
    }


def count_recorded(plan: Plan, runs: pd.DataFrame) -> dict[str, int]:
    """How many of `count_runs` are recorded; others may be, which the plan does not ask for."""
    have = set(runs[list(CELL)].itertuples(index=False, name=None))
    return {
        purpose: sum(
            cell in have
            for batch in whole_batches(plan, runs, purpose)
            for seed in batch.seeds
            for cell in batch.cells_of(seed)
        )
        for purpose in ("tune", "compare")
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
        programs = [(plan.config_of(name), (Variant(name, arm, *min(arm.rate_pairs()), 0.0),))]
    config, mine = programs[0]
    batch = Batch(plan.datasets[0], depth, "compare", config, mine, tuple(range(SEEDS_AT_ONCE)))
    phase = training.train_phase(config)._replace(train_images=images, validation_images=500)
    arms = group_by_arm(batch.variants).items()
    given = [(arm, settings_of(variants, batch.seeds)) for arm, variants in arms]
    program = training.Program("timing", config, depth, phase, given, data)
    state = program.advance(program.start())
    program.status(state)
    started = time.perf_counter()
    program.status(program.advance(state))
    per_image = (time.perf_counter() - started) / (images * len(batch.seeds) * len(mine))
    epochs = (config.train.min_epochs + config.train.max_epochs) / 2
    return per_image * epochs * (config.train.train_images + config.train.validation_images / 3)
