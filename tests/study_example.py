"""Invented runs of a study, for the tests of what is computed, drawn and explored."""

import math

import numpy as np
import pandas as pd

from unitnorm.run.records import Records
from unitnorm.study.config import ComparisonPlan, Plan
from unitnorm.study.report import Findings
from unitnorm.study.schema import SCHEMA
from unitnorm.study.statistics import add_looks, compare, pack_wrong, with_looks

_GAINS = {"b-sgd": 0.0, "un": -0.0017, "un@effective": 0.0, "weight-norm": 0.0012, "sgd-wd": 0.004}
RATES = (0.001, 0.01, 0.1, 1.0)


def plan_comparison(name: str, arm: str, baseline: str, metric: str = "test_error"):
    """Without the check of a plan's names: the statistics take any."""
    return ComparisonPlan.model_construct(name=name, arm=arm, baseline=baseline, metric=metric)


COMPARISONS = (
    plan_comparison("UN against B-SGD", "un", "b-sgd"),
    plan_comparison("UN against B-SGD, early", "un", "b-sgd", "test_error_10"),
    plan_comparison("UN with B-SGD's rates", "un@effective", "b-sgd"),
    plan_comparison("weight normalisation", "weight-norm", "b-sgd"),
    plan_comparison("training loss", "un", "b-sgd", "train_loss"),
)


def run_row(arm: str, seed: int, error: float, **columns: object) -> dict[str, object]:
    """A run on MNIST; all its figures are `error`, a fraction, or NaN where it has diverged."""
    figures = ("train_loss", "val_error", "test_error", "test_error_10")
    return {
        "dataset": "mnist", "network": "archbn", "depth": 2, "arm": arm,
        "update": arm.split("@")[0], "purpose": "compare", "seed": seed, "filters_rate": 0.01,
        "rest_rate": 0.01, "decay": 0.0, "schedule": "bold-driver", "start": "balanced",
        "spread": 0.0, "batch_size": 100, "reduction": "sum", "diverged": not math.isfinite(error),
        "epochs": 40, **dict.fromkeys(figures, error), "effective_rate": 0.01,
        "layer_rates": "0.01 0.02", "wrong": "", **columns,
    }  # fmt: skip


def find(runs: pd.DataFrame, comparisons=COMPARISONS, looked_at: int = 0) -> Findings:
    """What a report makes of runs; `looked_at`: so many pairs were looked at before."""
    plan = Plan.model_construct(
        question="At their best rates?", datasets=["mnist", "fashion"], depths=[2, 4], networks=[],
        margin=0.05, alpha=0.05, arms={}, comparisons=list(comparisons),
    )  # fmt: skip
    commands = [{"started": "2026-11-25T13:29:53+00:00", "wall_s": 7.0}]
    known = Records(SCHEMA, {"runs": runs}, {}, {"commands": commands, "plan_committed": None})
    compared = compare(runs, comparisons)
    looks = add_looks(None, compared.assign(n=looked_at), "monday")
    looks = add_looks(looks, compared, "tuesday")
    return Findings(known, plan, with_looks(compared, looks), looks)


def invent_runs(
    seeds: int = 12, images: int = 400, datasets: tuple[str, ...] = ("mnist", "fashion")
) -> pd.DataFrame:
    """Tuning and comparison runs of five arms at depths 2 and 4: the same runs every time."""
    rng = np.random.default_rng(0)
    rows = []
    for dataset, depth in ((name, depth) for name in datasets for depth in (2, 4)):
        base = {"mnist": 0.021, "fashion": 0.11}[dataset]
        hard = rng.beta(0.3, 0.3 / base, images)
        luck = rng.random((seeds, images))  # of a seed: its runs are wrong on the same images
        plans = [("compare", s + 1000, 0.01, 0.01) for s in range(seeds)]
        plans += [("tune", s, f, r) for s in range(3) for f in RATES for r in (0.01, 0.1)]
        for arm, (purpose, seed, filters, rest) in ((a, p) for a in _GAINS for p in plans):
            chance = hard * (1 + _GAINS[arm] / base + 0.01 * rng.standard_normal())
            if purpose == "tune":
                chance = chance * (1 + 0.5 * np.log10(filters / 0.01) ** 2 + rest)
            wrong = luck[seed % 1000] < np.clip(chance, 0, 1)
            lost = (purpose == "tune" and filters == 1.0 and arm == "b-sgd") or (
                arm == "sgd-wd" and seed == 1003
            )
            error = np.nan if lost else float(wrong.mean())
            early = {f"test_error_{b}": error * (1 + 4 / b) for b in (5, 10, 25)}
            rows.append(run_row(
                arm, seed, error, dataset=dataset, depth=depth, purpose=purpose, rest_rate=rest,
                filters_rate=filters, effective_rate=filters, epochs=int(rng.integers(26, 60)),
                train_loss=error / 10, wrong=pack_wrong(wrong) if purpose == "compare" else "",
                **early,
            ))  # fmt: skip
    return pd.DataFrame(rows)


def invent_spread_runs(seeds: int = 8) -> pd.DataFrame:
    """Full trainings from starts of growing spread: UN flat, B-SGD ever worse, some diverged."""
    rng = np.random.default_rng(1)
    balanced = invent_runs(seeds)
    balanced = balanced[(balanced["purpose"] == "compare") & balanced["arm"].isin(["un", "b-sgd"])]
    parts = [balanced.assign(start="filters")]  # at spread 0 all kinds of start are one
    for start, spread in ((s, x) for s in ("filters", "pairs") for x in (0.5, 1.0, 2.0)):
        part = balanced.assign(start=start, spread=spread, wrong="")
        worse = np.where(part["arm"] == "b-sgd", 1 + 0.4 * spread**2, 1.0)
        part["test_error"] *= worse * (1 + 0.02 * rng.standard_normal(len(part)))
        lost = (part["arm"] == "b-sgd") & (spread == 2.0) & (part["seed"] < 1002)
        parts.append(part.assign(diverged=part["diverged"] | lost))
    return pd.concat(parts, ignore_index=True)
