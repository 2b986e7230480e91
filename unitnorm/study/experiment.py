"""A study: which runs its plan has, as programs that can be trained now, and their rows.

All of one data set, network and config is one program, in parts of `VARIANTS_AT_ONCE`: its arms,
rates and starts are the variants of each seed. A group is a program with a few seeds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from unitnorm.run.config import parse
from unitnorm.run.loop import Session, train
from unitnorm.run.planner import Found, Group
from unitnorm.run.provenance import fingerprint
from unitnorm.run.records import PROVENANCE, Records
from unitnorm.study.config import ARCHBN, ArmPlan, Place, Plan, Rates
from unitnorm.study.schema import BUDGETS, CELL, LAYERS, MEASURED, SCHEMA
from unitnorm.study.statistics import best_rates, pack_wrong

SEEDS_AT_ONCE = 4  # in a program; its runs are recorded together
SEEDS_ON_GPU = 100  # there a step of a few runs is all launches of kernels
VARIANTS_AT_ONCE = 32  # of a seed, in a program; all of a large grid would be recorded late


class Variant(NamedTuple):
    """One variant of a program."""

    arm: str
    plan: ArmPlan
    rates: Rates
    spread: float


class Trials(NamedTuple):
    """What one program trains."""

    place: Place
    purpose: str  # "tune" or "compare"
    config: Config
    variants: tuple[Variant, ...]
    seeds: Sequence[int]

    def cell(self, variant: Variant, seed: int) -> tuple[Any, ...]:
        """What names a run, in the order of `CELL`."""
        arm, plan, rates, spread = variant
        return (*self.place, arm, self.purpose, seed, *rates, plan.start, spread)

    def cells_of(self, seed: int) -> list[tuple[Any, ...]]:
        """What names each run of a seed."""
        return [self.cell(variant, seed) for variant in self.variants]

    def only(self, chosen: Sequence[int], seeds: Sequence[int]) -> Trials:
        """Some of the variants and seeds, and the first variant where any of them follows it."""
        variants = [self.variants[k] for k in chosen]
        if 0 not in chosen and any(variant.plan.schedule == "follow" for variant in variants):
            variants.insert(0, self.variants[0])
        return self._replace(variants=tuple(variants), seeds=tuple(seeds))

    def group(self) -> Group:
        """As the planner takes it."""
        network, depth = self.place.network, self.place.depth
        where = f"depth {depth}" if network == ARCHBN else network
        title = f"{self.purpose} {self.place.dataset} {where}"
        title += f" {self.variants[0].arm} seed {self.seeds[0]}"
        rows = [cell for seed in self.seeds for cell in self.cells_of(seed)]
        cells = pd.DataFrame(rows, columns=list(CELL))
        return Group(title, "runs", cells, self, self.place.dataset)


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
        have = _cells_in(records["runs"])
        trials = {p: whole_trials(self.plan, records["runs"], p) for p in ("tune", "compare")}
        check_compared(trials["compare"], records["runs"])
        size = SEEDS_AT_ONCE if jax.default_backend() == "cpu" else SEEDS_ON_GPU
        for wholes in trials.values():
            found = []
            for whole in wholes:
                lacking: dict[tuple[int, ...], list[int]] = {}  # seeds, by the variants they lack
                for seed in whole.seeds:
                    cells = whole.cells_of(seed)
                    lacks = tuple(k for k, cell in enumerate(cells) if cell not in have)
                    if lacks:
                        lacking.setdefault(lacks, []).append(seed)
                for lacks, seeds in lacking.items():
                    starts = range(0, len(seeds), size)
                    found += [whole.only(lacks, seeds[k : k + size]) for k in starts]
            yield from (t.group() for t in sorted(found, key=lambda trials: trials.seeds[0]))

    def again(self, records: Records, chosen: Mapping[str, Any]) -> Iterator[Group]:
        """The run alone, with the one that it may follow.

        Raises:
          UserError: the plan has no such run.
        """
        cell, seed = tuple(chosen[name] for name in CELL), chosen["seed"]
        for whole in whole_trials(self.plan, records["runs"], chosen["purpose"]):
            cells = whole.cells_of(seed)
            if cell in cells:
                yield whole.only([cells.index(cell)], [seed]).group()
                return
        named = *(chosen[name] for name in Place._fields), chosen["purpose"]
        raise UserError(f"{', '.join(map(str, named))}: the plan has no such run")

    def compute(self, group: Group, data: Dataset, session: Session) -> Found:
        """The runs of a group, as rows of the table `runs`."""
        trials: Trials = group.what
        task, arms = task_of(trials, data), group_by_arm(trials)
        given = [(arm, settings_of(variants, trials.seeds)) for arm, variants in arms.items()]
        program = run_many.Program(group.title, task, given, data)
        identity = fingerprint(
            ("archbn", "study"), [arm.update for arm in arms], task.config.fingerprint(),
            data.sha256, *trials.place, task.stop_by, task.statistics, trials.purpose,
            json.dumps([arm._asdict() for arm in arms], default=str),
            *(values for _, settings in given for values in settings if values is not None),
        )  # fmt: skip
        part = Part(group.title, identity, tuple(sorted(group.names(SCHEMA))))
        state = train(part, program, session)
        ended = zip(arms.values(), program.take(state), program.find_wrong(state), strict=True)
        rows = [row for each in ended for row in make_rows(trials, task, *each)]
        return Found({"runs": SCHEMA.frame("runs", rows)})


def plan_of(known: Records) -> Plan:
    """The plan that a folder's records were made by."""
    return parse(known.provenance["config"], PROVENANCE, Plan)


def _cells_in(runs: pd.DataFrame) -> set[tuple[Any, ...]]:
    return set(runs[list(CELL)].itertuples(index=False, name=None))


def check_compared(trials: Sequence[Trials], runs: pd.DataFrame) -> None:
    """Raise UserError where an arm was compared at other rates than its wider grid chooses now;
    `trials` are those of the comparison."""
    columns = [*Place._fields, "arm", *Rates._fields]
    compared = runs.loc[runs["purpose"] == "compare", columns]
    found = {*compared.itertuples(index=False, name=None)}
    for whole in trials:
        for variant in whole.variants:
            arm = (*whole.place, variant.arm)
            others = {row for row in found if row[: len(arm)] == arm} - {(*arm, *variant.rates)}
            if variant.plan.is_tuned() and others:
                raise UserError(
                    f"{variant.arm} in {whole.place.dataset} was compared at other rates than "
                    "tuning chooses now: give the wider grid an arm of another name"
                )


def whole_trials(plan: Plan, runs: pd.DataFrame, purpose: str) -> list[Trials]:
    """Every program of a purpose with all of its seeds, recorded or not.

    For the comparison, the rates are those that tuning chose; an arm that is not tuned yet, where
    it has to be, has no variant. All variants of a program are `Plan.alike`.
    """
    found = []
    for place in plan.places():
        programs: dict[Any, list[Variant]] = {}
        here = runs[list(Place._fields)].eq(pd.Series(place._asdict())).all(axis=1)
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
                mine = [Variant(name, arm, rates, spread) for rates in grid for spread in spreads]
                programs.setdefault((seeds, plan.alike(name)), []).extend(mine)
        for (seeds, _), variants in programs.items():
            # variants that follow the first one stay with it
            together = any(variant.plan.schedule == "follow" for variant in variants)
            size = len(variants) if together else VARIANTS_AT_ONCE
            for start in range(0, len(variants), size):
                some = tuple(variants[start : start + size])
                found.append(Trials(place, purpose, plan.config_of(some[0].arm), some, seeds))
    return found


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
        settings = pd.MultiIndex.from_frame(runs[list(Rates._fields)]).isin(grid)
        done = runs[settings & runs["seed"].isin(seeds[:end])]
        if len(done) < len(grid) * end:
            return rungs, []
        grid = [Rates(*each) for each in best_rates(done, keep)]
    return rungs, grid


def task_of(trials: Trials, data: Dataset) -> Task:
    """What a program's runs have in common."""
    place, first = trials.place, trials.variants[0].plan
    if place.network == ARCHBN:
        features = data.train_images.shape[1]
        network = archbn(trials.config.model, features, data.classes, place.depth)
    else:
        network = convolutional(place.network, tuple(data.image_shape), data.classes)
    compare = trials.purpose == "compare"
    return Task(
        trials.config, network, "train", first.stop_by, first.statistics,
        budgets=BUDGETS if compare else (), layers=compare,
    )  # fmt: skip


def group_by_arm(trials: Trials) -> dict[Arm, list[Variant]]:
    """The variants by what is compiled in, the first one's first."""
    arms: dict[Arm, list[Variant]] = {}
    for variant in trials.variants:
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
        "rate": [variant.rates.rest_rate for variant in variants],
        "ratio": [variant.rates.filters_rate / variant.rates.rest_rate for variant in variants],
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
    """The rows of a trained arm, whose runs are in the order of `settings_of`.

    `measured` is what `run_many.Program.find_wrong` gives.
    """
    wrong, test_loss = measured
    diverged, history = run_many.at_end(run, task)["diverged"], run_many.exact_history(run, task)
    rows = []
    cells = [trials.cell(variant, seed) for variant in variants for seed in trials.seeds]
    for i, cell in enumerate(cells):
        plan, epochs = variants[i // len(trials.seeds)].plan, int(run.epoch[i])
        row = {
            **dict(zip(CELL, cell, strict=True)),
            "update": plan.update, "schedule": plan.schedule,
            "batch_size": task.config.loss.batch_size, "reduction": task.config.loss.reduction,
            "epochs": epochs, "stop_reason": protocol.STOP_REASONS[run.reason[i]],
            "diverged": diverged[i], "effective_rate": history["effective_rate"][i, epochs - 1],
            "wrong": pack_wrong(wrong[i]) if trials.purpose == "compare" else "",
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
    have = _cells_in(runs)
    return {
        purpose: sum(
            len(have.intersection(whole.cells_of(seed)))
            for whole in whole_trials(plan, runs, purpose)
            for seed in whole.seeds
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
        networks = len(plan.depths) + len(plan.networks)
        programs = networks * purposes * len({plan.alike(arm) for arm in plan.arms})
        return self.run * missing + self.program * programs * bool(missing)


def measure_pace(plan: Plan, data: Dataset, images: int = 2000) -> Pace:
    """The mean over the plan's networks, from two epochs of each on a few images of any data."""
    plan = plan.model_copy(update={"datasets": plan.datasets[:1]})
    whole = whole_trials(plan, SCHEMA.frame("runs", []), "compare")
    if not whole:  # all arms have to be tuned first; a large rate could end at once
        name, arm = next(iter(plan.arms.items()))
        config, variants = plan.config_of(name), (Variant(name, arm, min(arm.grid()), 0.0),)
        whole = [Trials(place, "compare", config, variants, ()) for place in plan.places()]
    first = {trials.place: trials for trials in reversed(whole)}  # of each network
    return Pace(*np.mean([_measure_trials(trials, data, images) for trials in first.values()], 0))


def _measure_trials(trials: Trials, data: Dataset, images: int) -> Pace:
    sizes = trials.config.train
    few = min(images, sizes.train_images)
    fewer = {"train_images": few, "validation_images": min(500, sizes.validation_images)}
    short = trials.config.model_copy(update={"train": sizes.model_copy(update=fewer)})
    trials = trials._replace(config=short, seeds=range(SEEDS_AT_ONCE))
    arms = group_by_arm(trials).items()
    given = [(arm, settings_of(variants, trials.seeds)) for arm, variants in arms]
    started = time.perf_counter()
    program = run_many.Program("timing", task_of(trials, data), given, data)
    state = program.advance(program.start())
    program.status(state)
    compiled = time.perf_counter()
    program.status(program.advance(state))
    epoch = time.perf_counter() - compiled
    per_image = epoch / (few * len(trials.seeds) * len(trials.variants))
    epochs = (sizes.min_epochs + sizes.max_epochs) / 2
    seen = sizes.train_images + sizes.validation_images / 3
    return Pace(per_image * epochs * seen, compiled - started - epoch)
