"""A study's plan: arms, how they are trained, seeds for tuning and for comparing, comparisons.

`configs/study/template.toml` explains every key. To add a factor, give it a field here, a column in
`schema` and its place in `experiment.settings_of`. Nothing here touches JAX.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field, field_validator, model_validator

from unitnorm.archbn.config import Config
from unitnorm.run.config import ExperimentConfig, Section, check_updates, parse
from unitnorm.run.records import as_float32
from unitnorm.study.schema import BUDGETS

_FLOAT32 = AfterValidator(as_float32)  # as the records hold it, where a run is found by it
Rate = Annotated[float, _FLOAT32, Field(gt=0.0, le=1e6)]
Decay = Annotated[float, _FLOAT32, Field(ge=0.0, le=1e3)]
Spread = Annotated[float, _FLOAT32, Field(ge=0.0, le=8.0)]
Factor = Annotated[float, Field(gt=0.0, le=1e6)]
Depth = Annotated[int, Field(ge=1, le=64)]
Count = Annotated[int, Field(ge=1, le=100_000)]
Name = Annotated[str, Field(pattern=r"^[\w.+@=-]+$", max_length=60)]
Schedule = Literal["bold-driver", "bold-driver-back", "constant", "cosine", "follow", "warm-up"]
Start = Literal["balanced", "filters", "pairs", "theta", "norms"]
ARCHBN = "archbn"
_METRICS = rf"^(test_error|test_loss|val_error|train_loss)(_({'|'.join(map(str, BUDGETS))}))?$"


class Place(NamedTuple):
    """Where a plan's arms are compared; networks other than ArchBN have depth 0."""

    dataset: str
    network: str
    depth: int


class Rates(NamedTuple):
    """What is tuned of an arm: the base rates, and the weight decay of the filters."""

    filters_rate: float
    rest_rate: float
    decay: float


class Seeds(Section):
    """Seeds `first`, `first` + 1, …"""

    first: Annotated[int, Field(ge=0, le=2**30)] = 1000
    count: Annotated[int, Field(ge=0, le=100_000)] = 0


class ArmPlan(Section):
    """One thing that is compared: an update with its options, rates, schedule and start."""

    update: str
    options: dict[str, float | int | bool | str] = Field({})
    rates: list[Rate] = Field(min_length=1, max_length=64)
    filters_rates: list[Rate] = Field([])
    decays: list[Decay] = Field([])
    factors: list[Factor] = Field([])
    schedule: Schedule = "bold-driver"
    start: Start = "balanced"
    spreads: list[Spread] = Field([0.0])
    stop_by: Literal["val_error", "val_loss"] = "val_error"
    statistics: Literal["running", "images"] = "running"
    training: dict[str, Any] = Field({})
    count: Count | None = None

    @field_validator("update")
    @classmethod
    def _known(cls, update: str) -> str:
        return check_updates([update])[0]

    def grid(self) -> list[Rates]:
        """Every combination that tuning tries."""
        filters, rates, decays = self.filters_rates, self.rates, self.decays or [0.0]
        pairs = itertools.product(filters, rates) if filters else zip(rates, rates, strict=True)
        return [Rates(*pair, decay) for decay, pair in itertools.product(decays, pairs)]

    def is_tuned(self) -> bool:
        """Whether there is anything to choose."""
        return len(self.grid()) > 1


class ComparisonPlan(Section):
    """The difference arm − baseline, in every data set and at every depth."""

    name: str = Field(min_length=1, max_length=80)
    arm: Name
    baseline: Name
    metric: str = Field("test_error", pattern=_METRICS)


class Plan(ExperimentConfig):
    """A study."""

    question: str = Field(min_length=1)
    datasets: list[Name] = Field(min_length=1)
    depths: list[Depth] = Field([2, 4])
    networks: list[Literal["resnet9-narrow", "resnet9"]] = Field([])
    tune: Seeds = Seeds(first=1000, count=10)
    compare: Seeds = Seeds(first=2000, count=100)
    halving: list[Annotated[list[Count], Field(min_length=2, max_length=2)]] = Field([])
    margin: Annotated[float, Field(gt=0.0, le=100.0)] = 0.05
    alpha: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.05
    training: dict[str, Any] = Field({})
    all_arms: dict[str, Any] = Field({}, exclude=True)
    arms: dict[Name, ArmPlan] = Field(min_length=1)
    comparisons: list[ComparisonPlan] = Field([])

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, values: Any) -> Any:
        """With what all arms share in each, and a comparison for each of its `arms`."""
        values = dict(values)
        arms, shared, plans = (values.get(key) for key in ("arms", "all_arms", "comparisons"))
        shared = shared if isinstance(shared, dict) else {}
        if isinstance(arms, dict):
            values["arms"] = dict(arms)
            for name, arm in arms.items():
                if isinstance(arm, dict):
                    values["arms"][name] = {"update": name.split("@")[0], **shared, **arm}
        if isinstance(plans, list):
            values["comparisons"] = [one for plan in plans for one in _spell_out(plan)]
        return values

    @model_validator(mode="after")
    def _fits(self) -> Plan:
        for plan in self.comparisons:
            for name in sorted({plan.arm, plan.baseline} - self.arms.keys()):
                there = ", ".join(self.arms)
                raise ValueError(f"comparison {plan.name!r}: no arm {name!r}; there are {there}")
        if not self.depths and not self.networks:
            raise ValueError("neither depths nor networks: nothing to train")
        for name, arm in self.arms.items():
            if self.networks and arm.start != "balanced":
                raise ValueError(f"arm {name}: start = {arm.start!r} is of ArchBN alone")
            if self.depths and arm.schedule == "warm-up":
                raise ValueError(f'arm {name}: schedule = "warm-up" is of networks, not of depths')
            if len({*arm.grid()}) < len(arm.grid()) or len({*arm.spreads}) < len(arm.spreads):
                raise ValueError(f"arm {name}: a rate, decay or spread stands twice, as a float32")
            if arm.start == "balanced" and any(arm.spreads):
                raise ValueError(f'arm {name}: start = "balanced" has no spread but 0')
            if self.tune.count == 0 and arm.is_tuned():
                raise ValueError(f"arm {name} has several rates, but tune.count = 0")
        ends = [*(seeds for seeds, _ in self.halving), self.tune.count]
        if sorted({*ends}) != ends:
            raise ValueError(
                f"halving: after {', '.join(map(str, ends[:-1]))} of {ends[-1]} tuning seeds; "
                "expected rising numbers"
            )
        most = max(self.compare.count, *(arm.count or 0 for arm in self.arms.values()))
        purposes = (self.tune.first, self.tune.count), (self.compare.first, most)
        (low, count), (high, _) = sorted(purposes, key=itemgetter(0))
        if low + count > high:
            raise ValueError("tune and compare share seeds; fresh ones are needed to compare")
        alike = {name: self.alike(name) for name in self.arms}  # refuses what is no training
        first = next(iter(alike.values()))
        for name, arm in self.arms.items():
            if arm.schedule == "follow" and alike[name] != first:
                raise ValueError(
                    f"arm {name} follows the first arm, but has another training, reading or count"
                )
        return self

    def places(self) -> list[Place]:
        """Every data set with every network."""
        networks = [*((ARCHBN, depth) for depth in self.depths), *((n, 0) for n in self.networks)]
        return [Place(dataset, *network) for dataset in self.datasets for network in networks]

    def alike(self, arm: str) -> tuple[Any, ...]:
        """What the arms of one program have in common."""
        mine = self.arms[arm]
        return self.config_of(arm).fingerprint(), mine.stop_by, mine.statistics, mine.count

    def seeds_of(self, arm: str, purpose: str) -> range:
        """The seeds that tune an arm, or compare it."""
        seeds = self.tune if purpose == "tune" else self.compare
        own = self.arms[arm].count if purpose == "compare" else None
        return range(seeds.first, seeds.first + (own or seeds.count))

    def rungs(self, grid: Sequence[Any]) -> Iterator[tuple[int, int, int, int]]:
        """Of the tuning of so many settings: the settings of a rung, its first seed and the end of
        its seeds, counted from 0, and how many settings go on to the next; of the last, one."""
        count, start = len(grid), 0
        for end, keep in [*self.halving, (self.tune.count, 1)]:
            yield count, start, end, keep
            count, start = min(count, keep), end

    def config_of(self, arm: str) -> Config:
        """How an arm is trained, as a config of Table 2."""
        values = _merge(self.training, self.arms[arm].training)
        return parse(values, f"training of {arm}", Config)

    def conflict(self, recorded: Any) -> str | None:
        """Where the plan contradicts what is recorded.

        Seeds and comparisons may be added, arms too; an arm that is there must stay as it was, but
        for a grid that only grows.
        """
        mine = json.loads(json.dumps(self.protocol()))
        for key in ("training", "tune", "compare", "halving"):
            old, new = recorded.get(key, []), mine[key]  # some records are older than halving
            if key in ("tune", "compare"):
                old, new = old["first"], new["first"]
            if old != new:
                return f" ({key}: {old} there, {new} here)"
        defaults = ArmPlan(update="un", rates=[1.0]).model_dump()  # of keys newer than the records
        for name, arm in mine["arms"].items():
            there = {**defaults, **recorded.get("arms", {}).get(name, arm), "count": arm["count"]}
            for axis in ("rates", "filters_rates", "decays"):
                if there[axis] and {*there[axis]} <= {*arm[axis]}:
                    there[axis] = arm[axis]
            if there != arm:
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
