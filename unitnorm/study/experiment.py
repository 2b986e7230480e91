"""A study: which runs its plan has, as programs that can be trained now, and their rows.

All of one data set, network and config is one program, in parts of `VARIANTS_AT_ONCE`: its arms,
rates and starts are the variants of each seed. A group is a program with a few seeds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd

from unitnorm.archbn import protocol, run_many
from unitnorm.archbn.model import START, archbn
from unitnorm.archbn.resnet import convolutional
from unitnorm.archbn.training import Arm, Run, Settings, Task
from unitnorm.data import Dataset
from unitnorm.errors import UserError
from unitnorm.run.checkpoints import Part
from unitnorm.run.config import parse
from unitnorm.run.loop import Session, train
from unitnorm.run.planner import Found, Group
from unitnorm.run.provenance import fingerprint
from unitnorm.run.records import PROVENANCE, Records
from unitnorm.study.config import ARCHBN, Plan, Rates
from unitnorm.study.schema import BUDGETS, CELL, LAYERS, MEASURED, SCHEMA
from unitnorm.study.statistics import PLACE, RATES, best_rates, pack_wrong

SEEDS_AT_ONCE = 4  # in a program; its runs are recorded together
SEEDS_ON_GPU = 100  # there a step of a few runs is all launches of kernels
VARIANTS_AT_ONCE = 32  # of a seed, in a program; all of a large grid would be recorded late
_AXES = ("filters_rates", "rates", "decays")  # of an arm's grid, in the order of `Rates`


@dataclass(frozen=True)
class Study:
    """The experiment of a plan; see `planner.Experiment`."""

    plan: Plan
    schema = SCHEMA

    def missing(self, records: Records) -> Iterator[Group]:
        """Tuning first; the comparison only where tuning is done.

        All data sets and networks get their first seeds before any gets more.

        Raises:
          UserError: see `check_compared`.
        """
        runs = records["runs"]
        planned = {p: list_runs(self.plan, runs, p) for p in ("tune", "compare")}
        check_compared(self.plan, planned["compare"], runs)
        size = SEEDS_AT_ONCE if jax.default_backend() == "cpu" else SEEDS_ON_GPU
        for wanted in planned.values():
            lacking = wanted[~SCHEMA.among(wanted, runs)]
            batch = (lacking.groupby("program")["seed"].rank("dense") - 1) // size
            parts = [part for _, part in lacking.groupby(["program", batch], sort=False)]
            for part in sorted(parts, key=lambda part: part["seed"].min()):
                yield self._group(part, wanted)

    def again(self, records: Records, chosen: Mapping[str, Any]) -> Iterator[Group]:
        """The run alone, with the one that it may follow.

        Raises:
          UserError: the plan has no such run.
        """
        wanted = list_runs(self.plan, records["runs"], chosen["purpose"])
        wanted = wanted.assign(seed=chosen["seed"]).drop_duplicates()  # of which there may be fewer
        mine = wanted[SCHEMA.among(wanted, pd.DataFrame([chosen], columns=list(CELL)))]
        if mine.empty:
            named = *(chosen[name] for name in PLACE), chosen["purpose"]
            raise UserError(f"{', '.join(map(str, named))}: the plan has no such run")
        yield self._group(mine.head(1), wanted)

    def _group(self, runs: pd.DataFrame, planned: pd.DataFrame) -> Group:
        """Runs of a program, and of each seed its first run where any of them follows that."""
        if any(self.plan.arms[arm].schedule == "follow" for arm in runs["arm"].unique()):
            program = planned[planned["program"] == runs["program"].iloc[0]]
            leading = program[program["seed"].isin(runs["seed"])].drop_duplicates("seed")
            runs = pd.concat([leading, runs]).drop_duplicates()
        first = runs.iloc[0]
        where = f"depth {first['depth']}" if first["network"] == ARCHBN else first["network"]
        title = f"{first['purpose']} {first['dataset']} {where} {first['arm']} seed {first['seed']}"
        return Group(title, "runs", runs[list(CELL)], data=first["dataset"])

    def compute(self, group: Group, data: Dataset, session: Session) -> Found:
        """The runs of a group, as rows of the table `runs`."""
        cells, task = group.cells, task_of(self.plan, group.cells, data)
        arms = split_by_arm(self.plan, cells)
        given = [(arm, settings_of(self.plan, mine)) for arm, mine in arms.items()]
        program = run_many.Program(group.title, task, given, data)
        first = cells.iloc[0]
        identity = fingerprint(
            ("archbn", "study"), [arm.update for arm in arms], task.config.fingerprint(),
            data.sha256, *first[PLACE], task.stop_by, task.statistics, first["purpose"],
            json.dumps([arm._asdict() for arm in arms], default=str),
            *(values for _, settings in given for values in settings if values is not None),
        )  # fmt: skip
        part = Part(group.title, identity, tuple(sorted(group.names(SCHEMA))))
        state = train(part, program, session)
        ended = zip(arms.values(), program.take(state), program.find_wrong(state), strict=True)
        rows = [row for mine, *each in ended for row in make_rows(self.plan, mine, task, *each)]
        return Found({"runs": SCHEMA.frame("runs", rows)})


def plan_of(known: Records) -> Plan:
    """The plan that a folder's records were made by."""
    return parse(known.provenance["config"], PROVENANCE, Plan)


def check_compared(plan: Plan, planned: pd.DataFrame, runs: pd.DataFrame) -> None:
    """Raise UserError where an arm was compared at other rates than its wider grid chooses now;
    `planned` are the runs of the comparison."""
    tuned = planned[planned["arm"].isin([n for n, arm in plan.arms.items() if arm.is_tuned()])]
    others = runs[runs["purpose"] == "compare"]
    for columns, there in (([*PLACE, "arm"], True), ([*PLACE, "arm", *RATES], False)):
        known = pd.MultiIndex.from_frame(tuned[columns])
        others = others[pd.MultiIndex.from_frame(others[columns]).isin(known) == there]
    for arm, dataset in others[["arm", "dataset"]].itertuples(index=False):
        raise UserError(
            f"{arm} in {dataset} was compared at other rates than tuning chooses now: give the "
            "wider grid an arm of another name"
        )


def list_runs(plan: Plan, runs: pd.DataFrame, purpose: str) -> pd.DataFrame:
    """Every run of a purpose, recorded or not: what names it, and the number of its `program`.

    For the comparison, the rates are those that tuning chose; an arm that is not tuned yet, where
    it has to be, has no run. All runs of a program are `Plan.alike`; they stand variant after
    variant, each with all of its seeds.
    """
    rows: list[tuple[Any, ...]] = []
    number = 0
    for place in plan.places():
        programs: dict[Any, list[tuple[str, Rates, float]]] = {}
        here = runs[PLACE].eq(pd.Series(place._asdict())).all(axis=1)
        tuning = runs[here & (runs["purpose"] == "tune")]
        for name, arm in plan.arms.items():
            fresh = plan.seeds_of(name, "compare")
            rungs, spreads = [(arm.grid(), fresh)], arm.spreads
            if arm.is_tuned():
                rungs, chosen = tuning_of(plan, name, tuning[tuning["arm"] == name])
                rungs = rungs if purpose == "tune" else [(chosen, fresh)]
            elif purpose == "tune":
                continue
            spreads = spreads[:1] if purpose == "tune" else spreads
            for grid, seeds in rungs:
                mine = [(name, rates, spread) for rates in grid for spread in spreads]
                programs.setdefault((seeds, plan.alike(name)), []).extend(mine)
        for (seeds, _), variants in programs.items():
            # variants that follow the first one stay with it
            together = any(plan.arms[name].schedule == "follow" for name, *_ in variants)
            size = len(variants) if together else VARIANTS_AT_ONCE
            rows += [
                (*place, name, purpose, seed, *rates, plan.arms[name].start, spread,
                 number + k // size)
                for k, (name, rates, spread) in enumerate(variants) for seed in seeds
            ]  # fmt: skip
            number += len(variants)
    return pd.DataFrame(rows, columns=[*CELL, "program"]).astype({"seed": int, "depth": int})


def tuning_of(
    plan: Plan, name: str, runs: pd.DataFrame
) -> tuple[list[tuple[list[Rates], range]], list[Rates]]:
    """An arm's rungs so far, and the rates that it is compared with: [] until its tuning ends.

    Every rung has the seeds after those of the rung before, for the settings that were best there;
    `runs` are the arm's tuning runs in one place.
    """
    grid, seeds, rungs = plan.arms[name].grid(), plan.seeds_of(name, "tune"), []
    for _, start, end, keep in plan.rungs(grid):
        rungs.append((grid, seeds[start:end]))
        settings = pd.MultiIndex.from_frame(runs[RATES]).isin(grid)
        done = runs[settings & runs["seed"].isin(seeds[:end])]
        if len(done) < len(grid) * end:
            return rungs, []
        grid = [Rates(*each) for each in best_rates(done, keep)]
    return rungs, grid


def task_of(plan: Plan, cells: pd.DataFrame, data: Dataset) -> Task:
    """What a program's runs have in common."""
    first = cells.iloc[0]
    arm, config = plan.arms[first["arm"]], plan.config_of(first["arm"])
    if first["network"] == ARCHBN:
        features = data.train_images.shape[1]
        network = archbn(config.model, features, data.classes, int(first["depth"]))
    else:
        network = convolutional(first["network"], tuple(data.image_shape), data.classes)
    compare = first["purpose"] == "compare"
    return Task(
        config, network, "train", arm.stop_by, arm.statistics,
        budgets=BUDGETS if compare else (), layers=compare,
    )  # fmt: skip


def split_by_arm(plan: Plan, cells: pd.DataFrame) -> dict[Arm, pd.DataFrame]:
    """A program's runs by what is compiled in, those of the first run first."""
    names: dict[Arm, list[str]] = {}
    for name in cells["arm"].unique():
        mine = plan.arms[name]
        options = tuple(sorted(mine.options.items()))
        arm = Arm(mine.update, options, mine.start != "balanced", tuple(mine.factors))
        names.setdefault(arm, []).append(name)
    return {arm: cells[cells["arm"].isin(those)] for arm, those in names.items()}


def settings_of(plan: Plan, cells: pd.DataFrame) -> Settings:
    """An arm's runs, in the order of `cells`."""
    schedules = [protocol.SCHEDULES.index(plan.arms[name].schedule) for name in cells["arm"]]
    starts = cells["start"].to_numpy()[:, None] == np.array(START, object)
    rates = cells[RATES].to_numpy()
    return Settings(
        cells["seed"].to_numpy(), rates[:, 1], rates[:, 0] / rates[:, 1], schedules,
        starts * cells[["spread"]].to_numpy(),
        rates[:, 2] if plan.arms[cells["arm"].iloc[0]].decays else None,
    )  # fmt: skip


def make_rows(
    plan: Plan,
    cells: pd.DataFrame,
    task: Task,
    run: Run,
    measured: tuple[np.ndarray, np.ndarray],
) -> list[dict[Any, Any]]:
    """The rows of a trained arm, whose runs are those of `cells`.

    `measured` is what `run_many.Program.find_wrong` gives.
    """
    wrong, test_loss = measured
    diverged, history = run_many.at_end(run, task)["diverged"], run_many.exact_history(run, task)
    rows = []
    for i, cell in enumerate(cells.to_dict("records")):
        arm, epochs = plan.arms[cell["arm"]], int(run.epoch[i])
        row: dict[Any, Any] = {
            **cell, "update": arm.update, "schedule": arm.schedule,
            "batch_size": task.config.loss.batch_size, "reduction": task.config.loss.reduction,
            "epochs": epochs, "stop_reason": protocol.STOP_REASONS[run.reason[i]],
            "diverged": diverged[i], "effective_rate": history["effective_rate"][i, epochs - 1],
            "wrong": pack_wrong(wrong[i]) if cell["purpose"] == "compare" else "",
            **_after(history, i, epochs), "test_error": wrong[i].mean(), "test_loss": test_loss[i],
        }  # fmt: skip
        for epoch in BUDGETS:
            if epoch <= epochs:
                values = _after(history, i, epoch)
            else:
                values = dict.fromkeys(MEASURED, np.nan) | dict.fromkeys(LAYERS, "")
            row |= {f"{name}_{epoch}": value for name, value in values.items()}
        rows.append(row)
    return rows


def _after(history: Mapping[str, np.ndarray], run: int, epoch: int) -> dict[str, Any]:
    """What was measured of a run after an epoch; figures by layer are texts."""
    values: dict[str, Any] = {name: history[name][run, epoch - 1] for name in MEASURED}
    for name in LAYERS:
        layers = history[name.removesuffix("s")]
        texts = [] if layers is None else [f"{x:.4g}" for x in layers[run, epoch - 1]]
        values[name] = " ".join(texts)
    return values


def count_runs(plan: Plan) -> dict[str, int]:
    """How many runs a whole plan has, by purpose."""
    tuned = compared = 0
    for name, arm in plan.arms.items():
        rungs = plan.rungs(arm.grid()) if arm.is_tuned() else ()
        tuned += sum(settings * (end - start) for settings, start, end, _ in rungs)
        compared += len(arm.spreads) * len(plan.seeds_of(name, "compare"))
    cells = len(plan.places())
    return {"tune": cells * tuned, "compare": cells * compared}


def count_recorded(plan: Plan, runs: pd.DataFrame) -> dict[str, int]:
    """How many of `count_runs` are recorded; others may be, which the plan does not ask for."""
    planned = {purpose: list_runs(plan, runs, purpose) for purpose in ("tune", "compare")}
    return {purpose: int(SCHEMA.among(mine, runs).sum()) for purpose, mine in planned.items()}


class Pace(NamedTuple):
    """How fast a plan goes on this machine, in seconds."""

    run: float  # of a run of the comparison
    program: float  # until a program is compiled

    def of(self, plan: Plan, missing: int) -> float:
        """Until so many runs are there, each program compiled once."""
        purposes = sum(count > 0 for count in count_runs(plan).values())
        networks = len(plan.depths) + len(plan.networks)
        programs = networks * purposes * len({plan.alike(arm) for arm in plan.arms})
        return self.run * missing + self.program * programs * bool(missing)


def measure_pace(plan: Plan, data: Dataset, images: int = 2000) -> Pace:
    """The mean over the plan's networks, from two epochs of each on a few images of any data."""
    plan, none = plan.model_copy(update={"datasets": plan.datasets[:1]}), SCHEMA.frame("runs", [])
    planned = list_runs(plan, none, "compare")
    if planned.empty:  # all arms have to be tuned first; a large rate could end at once
        name, arm = next(iter(plan.arms.items()))
        rates = zip(_AXES, min(arm.grid()), strict=True)
        least = {axis: [rate] for axis, rate in rates if getattr(arm, axis)}
        plan = plan.model_copy(update={"arms": {name: arm.model_copy(update=least)}})
        planned = list_runs(plan, none, "compare")
    # of each network its first program, with the first seeds
    programs = planned.groupby(PLACE)["program"].transform("min")
    few = planned["seed"] < planned.groupby("program")["seed"].transform("min") + SEEDS_AT_ONCE
    first = planned[(planned["program"] == programs) & few]
    found = [_measure_cells(plan, cells, data, images) for _, cells in first.groupby(PLACE)]
    return Pace(*np.mean(found, 0))


def _measure_cells(plan: Plan, cells: pd.DataFrame, data: Dataset, images: int) -> Pace:
    task = task_of(plan, cells, data)
    sizes = task.config.train
    few = min(images, sizes.train_images)
    fewer = {"train_images": few, "validation_images": min(500, sizes.validation_images)}
    short = task.config.model_copy(update={"train": sizes.model_copy(update=fewer)})
    given = [(arm, settings_of(plan, mine)) for arm, mine in split_by_arm(plan, cells).items()]
    started = time.perf_counter()
    program = run_many.Program("timing", task._replace(config=short), given, data)
    state = program.advance(program.start())
    program.status(state)
    compiled = time.perf_counter()
    program.status(program.advance(state))
    epoch = time.perf_counter() - compiled
    per_image = epoch / (few * len(cells))
    epochs = (sizes.min_epochs + sizes.max_epochs) / 2
    seen = sizes.train_images + sizes.validation_images / 3
    return Pace(per_image * epochs * seen, compiled - started - epoch)
