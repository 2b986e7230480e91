"""Invented runs of a study, for the tests of what is drawn and explored."""

import numpy as np
import pandas as pd

from unitnorm.study.config import ComparisonPlan
from unitnorm.study.statistics import pack_wrong


def plan_comparison(
    name: str, arm: str, baseline: str, metric: str = "test_error"
) -> ComparisonPlan:
    """Without the check of a plan's names: the statistics take any."""
    return ComparisonPlan.model_construct(name=name, arm=arm, baseline=baseline, metric=metric)


COMPARISONS = (
    plan_comparison("UN against B-SGD", "un", "b-sgd"),
    plan_comparison("UN against B-SGD, early", "un", "b-sgd", "test_error_10"),
    plan_comparison("UN with B-SGD's rates", "un@effective", "b-sgd"),
    plan_comparison("weight normalisation", "weight-norm", "b-sgd"),
    plan_comparison("training loss", "un", "b-sgd", "train_loss"),
)
_GAINS = {"b-sgd": 0.0, "un": -0.0017, "un@effective": 0.0, "weight-norm": 0.0012, "sgd-wd": 0.004}
RATES = (0.001, 0.01, 0.1, 1.0)


def invent_runs(
    seeds: int = 12, images: int = 400, datasets: tuple[str, ...] = ("mnist", "fashion"), **columns
) -> pd.DataFrame:
    """Tuning and comparison runs of five arms at depths 2 and 4: the same runs every time."""
    rng = np.random.default_rng(0)
    rows = []
    for dataset in datasets:
        for depth in (2, 4):
            base = {"mnist": 0.021, "fashion": 0.11}[dataset]
            hard = rng.beta(0.3, 0.3 / base, images)
            luck = rng.random((seeds, images))  # of a seed: its runs are wrong on the same images
            for arm, gain in _GAINS.items():
                key = {"dataset": dataset, "depth": depth, "arm": arm, "update": arm.split("@")[0]}
                plans = [("compare", s + 1000, 0.01, 0.01) for s in range(seeds)] + [
                    ("tune", s, f, r) for s in range(3) for f in RATES for r in (0.01, 0.1)
                ]
                for purpose, seed, filters, rest in plans:
                    chance = hard * (1 + gain / base + 0.01 * rng.standard_normal())
                    if purpose == "tune":
                        chance = chance * (1 + 0.5 * np.log10(filters / 0.01) ** 2 + rest)
                    wrong = luck[seed % 1000] < np.clip(chance, 0, 1)
                    error = float(wrong.mean())
                    lost = (purpose == "tune" and filters == 1.0 and arm == "b-sgd") or (
                        arm == "sgd-wd" and seed == 1003
                    )
                    rows.append(
                        {
                            **key, "purpose": purpose, "seed": seed, "filters_rate": filters,
                            "rest_rate": rest, "schedule": "bold-driver", "batch_size": 100,
                            "reduction": "sum", "start": "balanced", "spread": 0.0,
                            "epochs": int(rng.integers(20, 60)),
                            "stop_reason": "diverged" if lost else "val-rise", "diverged": lost,
                            "train_loss": np.nan if lost else error / 10,
                            "val_error": np.nan if lost else error,
                            "test_error": np.nan if lost else error,
                            **{
                                f"test_error_{b}": np.nan if lost else error * (1 + more)
                                for b, more in ((5, 0.8), (10, 0.4), (25, 0.1))
                            },
                            "effective_rate": 0.01,
                            "wrong": pack_wrong(wrong) if purpose == "compare" else "",
                            **columns,
                        }
                    )  # fmt: skip
    return pd.DataFrame(rows)


def invent_spread_runs(seeds: int = 8) -> pd.DataFrame:
    """Full trainings from starts of growing spread: UN flat, B-SGD ever worse, some diverged."""
    rng = np.random.default_rng(1)
    balanced = invent_runs(seeds)
    balanced = balanced[(balanced["purpose"] == "compare") & balanced["arm"].isin(["un", "b-sgd"])]
    parts = [balanced.assign(start="filters")]  # at spread 0 all kinds of start are one
    for start in ("filters", "pairs"):
        for spread in (0.5, 1.0, 2.0):
            part = balanced.assign(start=start, spread=spread, wrong="")
            worse = np.where(part["arm"] == "b-sgd", 1 + 0.4 * spread**2, 1.0)
            part["test_error"] *= worse * (1 + 0.02 * rng.standard_normal(len(part)))
            lost = (part["arm"] == "b-sgd") & (spread == 2.0) & (part["seed"] < 1002)
            parts.append(part.assign(diverged=part["diverged"] | lost))
    return pd.concat(parts, ignore_index=True)
