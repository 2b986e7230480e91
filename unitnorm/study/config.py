"""A study's plan: arms, how they are trained, seeds for tuning and for comparing, comparisons.

The plan is a TOML file, written and committed before its results; `configs/study/template.toml`
explains every key. To add a factor, give it a field here, a column in `schema` and its place in
`experiment.settings_of`. Nothing here touches JAX.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from unitnorm.archbn.config import Config
from unitnorm.run.config import ExperimentConfig, Section, parse

Rate = Annotated[float, Field(gt=0.0, le=1e6)]
Name = Annotated[str, Field(pattern=r"^[\w.+@=-]+$", max_length=60)]
Schedule = Literal["bold-driver", "bold-driver-back", "constant", "cosine", "follow", "warm-up"]
Start = Literal["balanced", "filters", "pairs", "theta", "norms"]


class Seeds(Section):
    """Seeds `first`, `first` + 1, …"""

    first: Annotated[int, Field(ge=0, le=2**30)] = 1000
    count: Annotated[int, Field(ge=0, le=100_000)] = 0

    def all(self) -> range:
        """Each of them."""
        return range(self.first, self.first + self.count)


class ArmPlan(Section):
    """One thing that is compared: an update with its options, rates, schedule and start."""

    update: str = Field(description="if not given: the arm's name, as far as its @")
    options: dict[str, float | int | bool | str] = Field({}, description="of the update")
    rates: list[Rate] = Field(
        min_length=1,
        max_length=64,
        description="base rates; of several, the one with the lowest mean validation error of the "
        "tuning seeds is compared",
    )
    filters_rates: list[Rate] = Field(
        [], description="of the filters, apart from the rest; empty: one rate for both"
    )
    decays: list[Annotated[float, Field(ge=0.0, le=1e3)]] = Field(
        [], description="weight decay of the filters, tuned with the rates; empty: the update's"
    )
    factors: list[Rate] = Field(
        [], description="of the filters' rate, layer by layer; empty: one rate for all layers"
    )
    schedule: Schedule = Field(
        "bold-driver", description="follow: the rate of the first arm, epoch by epoch"
    )
    start: Start = Field("balanced", description="what of the start is unbalanced")
    spreads: list[Annotated[float, Field(ge=0.0, le=8.0)]] = Field(
        [0.0], description="over how many decades; each is a level of its own"
    )
    stop_by: Literal["val_error", "val_loss"] = Field(
        "val_error", description="what the stopping rule calls validation error"
    )
    statistics: Literal["running", "anew"] = Field(
        "running",
        description="of batch normalisation in evaluations; anew: those of the training images",
    )
    training: dict[str, Any] = Field({}, description="keys of Table 2's config, for this arm alone")
    count: Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        None, description="seeds of the comparison, if not the plan's compare.count"
    )

    @field_validator("update")
    @classmethod
    def _known(cls, update: str) -> str:
        from unitnorm.updates import check_update_name

        return check_update_name(update)

    def reading(self) -> tuple[str, str]:
        """What all variants of a program have in common, beside the config."""
        return self.stop_by, self.statistics

    def grid(self) -> list[tuple[float, float, float]]:
        """(rate of the filters, rate of the rest, weight decay), every combination."""
        pairs: Iterable[tuple[float, float]] = [(rate, rate) for rate in self.rates]
        if self.filters_rates:
            pairs = itertools.product(self.filters_rates, self.rates)
        return [(*pair, decay) for decay, pair in itertools.product(self.decays or [0.0], pairs)]


class ComparisonPlan(Section):
    """The difference arm − baseline, in every data set and at every depth."""

    name: str = Field(min_length=1, max_length=80)
    arm: Name
    baseline: Name
    metric: str = Field(
        "test_error", pattern=r"^(test_error|test_loss|val_error|train_loss)(_\d+)?$"
    )


class Plan(ExperimentConfig):
    """A study."""

    question: str = Field(min_length=1, description="what it is to answer, in a sentence")
    datasets: list[Name] = Field(min_length=1, description="mnist, and names that --data places")
    depths: list[Annotated[int, Field(ge=1, le=64)]] = Field([2, 4], description="of ArchBN")
    networks: list[Literal["resnet9-narrow", "resnet9"]] = Field(
        [], description="others, beside ArchBN at its depths"
    )
    tune: Seeds = Seeds(first=1000, count=10)
    compare: Seeds = Seeds(first=2000, count=100)
    margin: Annotated[float, Field(gt=0.0, le=100.0)] = Field(
        0.05, description="differences within so many percentage points are equivalent"
    )
    alpha: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.05
    training: dict[str, Any] = Field({}, description="keys of Table 2's config, by section")
    all_arms: dict[str, Any] = Field(
        {}, exclude=True, description="keys of an arm, for each that does not say otherwise"
    )
    arms: dict[Name, ArmPlan] = Field(min_length=1)
    comparisons: list[ComparisonPlan] = Field([], description="Holm's correction is over all")

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, values: Any) -> Any:
        """With what all arms share in each, and a comparison for each of its `arms`."""
        values = dict(values)
        arms, shared = values.get("arms"), values.get("all_arms")
        if isinstance(arms, dict):
            shared = shared if isinstance(shared, dict) else {}
            values["arms"] = {
                name: {"update": name.split("@")[0], **shared, **arm}
                if isinstance(arm, dict)
                else arm
                for name, arm in arms.items()
            }
        if isinstance(values.get("comparisons"), list):
            values["comparisons"] = [
                one for plan in values["comparisons"] for one in _spell_out(plan)
            ]
        return values

    @model_validator(mode="after")
    def _fits(self) -> Plan:
        for comparison in self.comparisons:
            for name in (comparison.arm, comparison.baseline):
                if name not in self.arms:
                    raise ValueError(
                        f"comparison {comparison.name!r}: no arm {name!r}; there are "
                        f"{', '.join(self.arms)}"
                    )
        if not self.depths and not self.networks:
            raise ValueError("neither depths nor networks: nothing to train")
        for name, arm in self.arms.items():
            if self.networks and arm.start != "balanced":
                raise ValueError(f"arm {name}: start = {arm.start!r} is of ArchBN alone")
            if self.depths and arm.schedule == "warm-up":
                raise ValueError(f'arm {name}: schedule = "warm-up" is of networks, not of depths')
        if self.tune.count == 0:
            for name, arm in self.arms.items():
                if len(arm.grid()) > 1:
                    raise ValueError(f"arm {name} has several rates, but tune.count = 0")
        most = max([self.compare.count, *(arm.count or 0 for arm in self.arms.values())])
        compare = Seeds(first=self.compare.first, count=most)
        low, high = sorted((self.tune, compare), key=lambda seeds: seeds.first)
        if low.first + low.count > high.first:
            raise ValueError("tune and compare share seeds; fresh ones are needed to compare")
        alike = {name: self.alike(name) for name in self.arms}  # refuses what is no training
        first = next(iter(alike.values()))
        for name, arm in self.arms.items():
            if arm.schedule == "follow" and alike[name] != first:
                raise ValueError(
                    f"arm {name} follows the first arm, but has another training, reading or count"
                )
        return self

    def places(self) -> list[tuple[str, str, int]]:
        """(data set, network, depth) of every cell; networks other than ArchBN have depth 0."""
        networks = [*(("archbn", depth) for depth in self.depths), *((n, 0) for n in self.networks)]
        return [(dataset, *network) for dataset in self.datasets for network in networks]

    def alike(self, arm: str) -> tuple[Any, ...]:
        """What the arms of one program have in common: training, reading and count."""
        return self.config_of(arm).fingerprint(), *self.arms[arm].reading(), self.arms[arm].count

    def seeds_of(self, arm: str, purpose: str) -> range:
        """The seeds that tune an arm, or compare it."""
        if purpose == "tune":
            return self.tune.all()
        count = self.arms[arm].count
        more = {} if count is None else {"count": count}
        return self.compare.model_copy(update=more).all()

    def config_of(self, arm: str) -> Config:
        """How an arm is trained, as a config of Table 2."""
        values = _merge(self.training, self.arms[arm].training)
        return parse(values, f"training of {arm}", Config)

    def protocol(self) -> dict[str, Any]:
        """What was declared, all of it: the plan stands in the provenance."""
        return self.model_dump()

    def conflict(self, recorded: Any) -> str | None:
        """Where the plan contradicts what is recorded.

        Seeds and comparisons may be added, arms too; an arm that is there must stay as it was.
        """
        mine = json.loads(json.dumps(self.protocol()))
        for key in ("training", "tune", "compare"):
            old, new = recorded.get(key), mine[key]
            if key != "training":
                old, new = (old or {}).get("first"), new["first"]
            if old != new:
                return f" ({key}: {old} there, {new} here)"
        defaults = ArmPlan(update="un", rates=[1.0]).model_dump()  # of keys newer than the records
        for name, arm in mine["arms"].items():
            there = recorded.get("arms", {}).get(name, arm)
            if {**defaults, **there, "count": arm["count"]} != arm:
                return f" (arm {name} is another there)"
        return None


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _spell_out(plan: Any) -> list[Any]:
    """The comparisons that one with `arms` stands for; one without a name has those of its arms."""
    if not isinstance(plan, dict):
        return [plan]
    arms = plan["arms"] if isinstance(plan.get("arms"), list) else [plan.get("arm")]
    if "name" in plan and len(arms) > 1:
        raise ValueError(f"comparison {plan['name']!r}: several arms are named by themselves")
    rest = {key: value for key, value in plan.items() if key != "arms"}
    return [{"name": f"{arm} − {plan.get('baseline')}", **rest, "arm": arm} for arm in arms]
