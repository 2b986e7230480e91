"""A study: which runs its plan has, as programs that can be trained now, and their rows.

All of one data set, network and config is one program, in parts of `VARIANTS_AT_ONCE`: its arms,
rates and starts are the variants of each seed. A group is a program with a few seeds. To add a
factor, give it a field in `config`, a column in `schema` and its place in `settings_of`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd

from unitnorm.archbn import protocol, run_many
from unitnorm.archbn.config import Config
from unitnorm.archbn.model import START, archbn
from unitnorm.archbn.resnet import convolutional
from unitnorm.archbn.training import Arm, Run, Settings, Task
from unitnorm.data import Dataset
from unitnorm.errors import UserError
from unitnorm.run.checkpoints import Part
from unitnorm.run.loop import Session, train
from unitnorm.run.planner import Found, Group
from unitnorm.run.provenance import fingerprint
from unitnorm.run.records import Records, Schema
from unitnorm.study.config import ArmPlan, Plan
from unitnorm.study.schema import BUDGETS, CELL, LAYERS, MEASURED, SCHEMA
from unitnorm.study.statistics import choose_rates, pack_wrong

SEEDS_AT_ONCE = 4  # in a program; its runs are recorded together
SEEDS_ON_GPU = 100  # there a step of a few runs is all launches of kernels
VARIANTS_AT_ONCE = 32  # of a seed, in a program; all of a large grid would be recorded late
ARCHBN = "archbn"


class Rates(NamedTuple):
    """What is tuned of an arm."""

    filters: float
    rest: float
    decay: float = 0.0  # weight decay of the filters


class Place(NamedTuple):
    """Where a plan's arms are compared."""

    dataset: str
    network: str
    depth: int


@dataclass(frozen=True)
class Variant:
    """One variant of a program."""

    arm: str
    plan: ArmPlan
    rates: Rates
    spread: float


@dataclass(frozen=True)
class Trials:
    """What one program trains."""

    place: Place
    purpose: str  # "tune" or "compare"
    config: Config
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]

    def title(self) -> str:
        """What the user calls it."""
        where = f"depth {self.place.depth}" if self.place.network == ARCHBN else self.place.network
        name = f"{self.purpose} {self.place.dataset} {where}"
        return f"{name} {self.variants[0].arm} seed {self.seeds[0]}"

    def cell(self, variant: Variant, seed: int) -> tuple[Any, ...]:
        """What names a run, in the order of `CELL`."""
        return (*self.place, variant.arm, self.purpose, seed, *variant.rates, variant.plan.start,
                variant.spread)  # fmt: skip

    def cells_of(self, seed: int) -> list[tuple[Any, ...]]:
        """What names each run of a seed."""
        return [self.cell(variant, seed) for variant in self.variants]

    def group(self) -> Group:
        """As the planner takes it."""
        rows = [cell for seed in self.seeds for cell in self.cells_of(seed)]
        cells = pd.DataFrame(rows, columns=list(CELL))
        return Group(self.title(), "runs", cells, self, self.place.dataset)


@dataclass(frozen=True)
class Study:
    """The experiment of a plan; see `planner.Experiment`."""

    plan: Plan
    schema: Schema = SCHEMA

    def missing(self, records: Records) -> Iterator[Group]:
        """Tuning first; the comparison only where tuning is done.

        All data sets and networks get their first seeds before any gets more.
        """
        runs = records["runs"]
        have = set(runs[list(CELL)].itertuples(index=False, name=None))
        size = SEEDS_AT_ONCE if jax.default_backend() == "cpu" else SEEDS_ON_GPU
        for purpose in ("tune", "compare"):
            found = []
            for whole in whole_trials(self.plan, runs, purpose):
                lacking: dict[tuple[int, ...], list[int]] = {}  # seeds, by the variants they lack
                for seed in whole.seeds:
                    cells = whole.cells_of(seed)
                    lacks = tuple(k for k, cell in enumerate(cells) if cell not in have)
                    if lacks:
                        lacking.setdefault(lacks, []).append(seed)
                for lacks, seeds in lacking.items():
                    variants = with_leader([whole.variants[k] for k in lacks], whole.variants)
                    found += [
                        replace(whole, variants=variants, seeds=tuple(seeds[k : k + size]))
                        for k in range(0, len(seeds), size)
                    ]
            yield from (t.group() for t in sorted(found, key=lambda trials: trials.seeds[0]))

    def again(self, records: Records, chosen: Mapping[str, Any]) -> Iterator[Group]:
        """The run alone, with the one that it may follow.

        Raises:
          UserError: the plan has no such run.
        """
        place = Place(*(chosen[name] for name in Place._fields))
        purpose, cell = chosen["purpose"], tuple(chosen[name] for name in CELL)
        for config, variants in plan_programs(self.plan, records["runs"], place, purpose):
            trials = Trials(place, purpose, config, variants, (chosen["seed"],))
            cells = trials.cells_of(chosen["seed"])
            if cell in cells:
                variant = variants[cells.index(cell)]
                yield replace(trials, variants=with_leader([variant], variants)).group()
                return
        raise UserError(f"{', '.join(map(str, (*place, purpose)))}: the plan has no such run")

    def compute(self, group: Group, data: Dataset, session: Session) -> Found:
        """The runs of a group, as rows of the table `runs`."""
        trials: Trials = group.what
        task, arms = task_of(trials, data), group_by_arm(trials.variants)
        given = {arm: settings_of(variants, trials.seeds) for arm, variants in arms.items()}
        program = run_many.Program(group.title, task, list(given.items()), data)
        identity = fingerprint(
            ("archbn", "study"), [arm.update for arm in given], task.config.fingerprint(),
            data.sha256, *trials.place, *trials.variants[0].plan.reading(), trials.purpose,
            json.dumps([arm._asdict() for arm in given], default=str),
            *(values for settings in given.values() for values in settings if values is not None),
        )  # fmt: skip
        part = Part(group.title, identity, tuple(sorted(group.names(SCHEMA))))
        state = train(part, program, session)
        ended = zip(arms.values(), program.take(state), program.find_wrong(state), strict=True)
        rows = [row for each in ended for row in make_rows(trials, task, *each)]
        return Found({"runs": SCHEMA.frame("runs", rows)})


def places(plan: Plan) -> list[Place]:
    """Every data set with every network."""
    return [Place(*place) for place in plan.places()]


def whole_trials(plan: Plan, runs: pd.DataFrame, purpose: str) -> list[Trials]:
    """Every program of a purpose with all of its seeds, recorded or not."""
    return [
        Trials(place, purpose, *program, tuple(plan.seeds_of(program[1][0].arm, purpose)))
        for place in places(plan)
        for program in plan_programs(plan, runs, place, purpose)
    ]


def with_leader(some: Sequence[Variant], variants: Sequence[Variant]) -> tuple[Variant, ...]:
    """Some of a program's variants, and the first one where any of them follows it."""
    follows = any(variant.plan.schedule == "follow" for variant in some)
    leader = variants[:1] if follows and variants[0] not in some else ()
    return (*leader, *some)


def plan_programs(
    plan: Plan, runs: pd.DataFrame, place: Place, purpose: str
) -> list[tuple[Config, tuple[Variant, ...]]]:
    """The programs of a purpose: configs, and the variants that are trained so, all `Plan.alike`.

    For the comparison, the rates are those that tuning chose; an arm that is not tuned yet, where
    it has to be, has no variant.
    """
    programs: dict[tuple[Any, ...], tuple[Config, list[Variant]]] = {}
    tuned = [name for name, arm in plan.arms.items() if len(arm.grid()) > 1]
    chosen = _chosen_rates(plan, runs, place, tuned) if purpose == "compare" else {}
    for name, arm in plan.arms.items():
        grid = [Rates(*values) for values in arm.grid()]
        if purpose == "tune" and name not in tuned:
            continue
        if purpose == "compare" and name in tuned:
            if name not in chosen:
                continue
            grid = [chosen[name]]
        config = plan.config_of(name)
        variants = programs.setdefault(plan.alike(name), (config, []))[1]
        spreads = arm.spreads if purpose == "compare" else arm.spreads[:1]
        variants += [Variant(name, arm, rates, spread) for rates in grid for spread in spreads]
    parts = []
    for config, variants in programs.values():
        # variants that follow the first one stay with it
        together = any(variant.plan.schedule == "follow" for variant in variants)
        size = len(variants) if together else VARIANTS_AT_ONCE
        starts = range(0, len(variants), size)
        parts += [(config, tuple(variants[start : start + size])) for start in starts]
    return parts


def _chosen_rates(
    plan: Plan, runs: pd.DataFrame, place: Place, tuned: Sequence[str]
) -> dict[str, Rates]:
    """The tuned rates of each arm whose tuning is complete."""
    here = runs[list(Place._fields)].eq(pd.Series(place._asdict())).all(axis=1)
    mine = runs[here & (runs["purpose"] == "tune")]
    done = [
        name
        for name in tuned
        if (mine["arm"] == name).sum() == plan.tune.count * len(plan.arms[name].grid())
    ]
    if not done:
        return {}
    best = choose_rates(mine[mine["arm"].isin(done)])
    return {
        row["arm"]: Rates(row["filters_rate"], row["rest_rate"], row.get("decay", 0.0))
        for row in best.to_dict("records")
    }


def task_of(trials: Trials, data: Dataset) -> Task:
    """What a program's runs have in common."""
    place, features = trials.place, data.train_images.shape[1]
    if place.network == ARCHBN:
        network = archbn(trials.config.model, features, data.classes, place.depth)
    else:
        network = convolutional(place.network, tuple(data.image_shape), data.classes)
    stop_by, statistics = trials.variants[0].plan.reading()
    compare = trials.purpose == "compare"
    budgets = BUDGETS if compare else ()
    return Task(trials.config, network, "train", stop_by, statistics, budgets, layers=compare)


def group_by_arm(variants: Sequence[Variant]) -> dict[Arm, list[Variant]]:
    """The variants by what is compiled in, the first one's first."""
    arms: dict[Arm, list[Variant]] = {}
    for variant in variants:
        plan = variant.plan
        options = tuple(sorted(plan.options.items()))
        arm = Arm(plan.update, options, plan.start != "balanced", tuple(plan.factors))
        arms.setdefault(arm, []).append(variant)
    return arms


def settings_of(variants: Sequence[Variant], seeds: Sequence[int]) -> Settings:
    """An arm's runs, variant after variant, each with all seeds."""
    spread = np.zeros((len(variants), len(START)))
    for row, variant in zip(spread, variants, strict=True):
        if variant.plan.start != "balanced":
            row[START.index(variant.plan.start)] = variant.spread
    each = {
        "rate": [variant.rates.rest for variant in variants],
        "ratio": [variant.rates.filters / variant.rates.rest for variant in variants],
        "schedule": [protocol.SCHEDULES.index(variant.plan.schedule) for variant in variants],
        "spread": spread,
    }
    if variants[0].plan.decays:
        each["decay"] = [variant.rates.decay for variant in variants]
    repeated = {name: np.repeat(np.asarray(x), len(seeds), 0) for name, x in each.items()}
    return Settings(np.tile(seeds, len(variants)), **repeated)


def make_rows(
    trials: Trials,
    task: Task,
    variants: Sequence[Variant],
    run: Run,
    measured: tuple[np.ndarray, np.ndarray],
) -> list[dict[str, Any]]:
    """The rows of a trained arm.

    Args:
      run: the arm's runs on the host, in the order of `settings_of`.
      measured: see `run_many.Program.find_wrong`.
    """
    rows, seeds, (wrong, test_loss) = [], trials.seeds, measured
    end, history = run_many.at_end(run, task), run_many.exact_history(run, task)
    for place, variant in enumerate(variants):
        for i, seed in enumerate(seeds, place * len(seeds)):
            epochs = int(run.epoch[i])
            found = {
                "train_loss": end.train_loss[i],
                "val_error": end.val_error[i],
                "val_loss": history["val_loss"][i, epochs - 1],
                "test_error": wrong[i].mean(),
                "test_loss": test_loss[i],
                **_layers(history, i, epochs - 1),
            }
            for epoch in BUDGETS:
                values = dict.fromkeys(MEASURED, np.nan) | dict.fromkeys(LAYERS, "")
                if epoch <= epochs:
                    values = {name: history[name][i, epoch - 1] for name in MEASURED}
                    values |= _layers(history, i, epoch - 1)
                found |= {f"{name}_{epoch}": value for name, value in values.items()}
            rows.append(
                {
                    **dict(zip(CELL, trials.cell(variant, seed), strict=True)),
                    "update": variant.plan.update, "schedule": variant.plan.schedule,
                    "batch_size": task.config.loss.batch_size,
                    "reduction": task.config.loss.reduction,
                    "epochs": epochs, "stop_reason": protocol.STOP_REASONS[run.reason[i]],
                    "diverged": end.diverged[i],
                    "effective_rate": history["effective_rate"][i, epochs - 1],
                    "wrong": pack_wrong(wrong[i]) if trials.purpose == "compare" else "",
                    **found,
                }
            )  # fmt: skip
    return rows


def _layers(history: Mapping[str, np.ndarray], run: int, epoch: int) -> dict[str, str]:
    """A run's figures by layer, as texts."""
    figures = {name: history[name.removesuffix("s")] for name in LAYERS}
    return {
        name: "" if values is None else " ".join(f"{x:.4g}" for x in values[run, epoch])
        for name, values in figures.items()
    }


def count_runs(plan: Plan) -> dict[str, int]:
    """How many runs a whole plan has, by purpose."""
    cells = len(places(plan))
    grids = [len(arm.grid()) for arm in plan.arms.values()]
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
            for trials in whole_trials(plan, runs, purpose)
            for seed in trials.seeds
            for cell in trials.cells_of(seed)
        )
        for purpose in ("tune", "compare")
    }


class Pace(NamedTuple):
    """How fast a plan goes on this machine, in seconds."""

    run: float  # of a run of the comparison
    program: float  # until a program is compiled

    def of(self, plan: Plan, missing: int) -> float:
        """Until so many runs are there, each program compiled once."""
        purposes = sum(count > 0 for count in count_runs(plan).values())
        programs = len(plan.depths) * purposes * len({plan.alike(arm) for arm in plan.arms})
        return self.run * missing + self.program * programs * bool(missing)


def measure_pace(plan: Plan, data: Dataset, images: int = 2000) -> Pace:
    """The mean over the plan's networks, from two epochs of each on a few images.

    Args:
      data: any data set; only its size matters.
    """
    first = [place for place in places(plan) if place.dataset == plan.datasets[0]]
    return Pace(*np.mean([_measure_place(plan, place, data, images) for place in first], 0))


def _measure_place(plan: Plan, place: Place, data: Dataset, images: int) -> Pace:
    programs = plan_programs(plan, SCHEMA.frame("runs", []), place, "compare")
    if not programs:  # all arms have to be tuned first; a large rate could end at once
        name, arm = next(iter(plan.arms.items()))
        programs = [(plan.config_of(name), (Variant(name, arm, Rates(*min(arm.grid())), 0.0),))]
    config, variants = programs[0]
    sizes = config.train
    few = min(images, sizes.train_images), min(500, sizes.validation_images)
    fewer = sizes.model_copy(update={"train_images": few[0], "validation_images": few[1]})
    short = config.model_copy(update={"train": fewer})
    trials = Trials(place, "compare", short, variants, tuple(range(SEEDS_AT_ONCE)))
    arms = group_by_arm(variants).items()
    given = [(arm, settings_of(mine, trials.seeds)) for arm, mine in arms]
    started = time.perf_counter()
    program = run_many.Program("timing", task_of(trials, data), given, data)
    state = program.advance(program.start())
    program.status(state)
    compiled = time.perf_counter()
    program.status(program.advance(state))
    epoch = time.perf_counter() - compiled
    per_image = epoch / (few[0] * len(trials.seeds) * len(variants))
    epochs = (sizes.min_epochs + sizes.max_epochs) / 2
    seen = sizes.train_images + sizes.validation_images / 3
    return Pace(per_image * epochs * seen, compiled - started - epoch)
