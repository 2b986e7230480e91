"""What the tables of `measure` show: one table, a short finding in each of its rows.

Every number and every choice of a finding is drawn from the tables. To add a row, add it to one of
the four functions that `find` calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from rich.console import RenderableType

from unitnorm.report.style import label, sort_updates
from unitnorm.report.tables import Cells, Fitting, to_markdown
from unitnorm.symmetry.figures import named, select, shorten
from unitnorm.symmetry.measure import RATE_SHARE, Case, Measured

TITLE = "Scaling every filter in front of a batch normalisation by an α of its own"
ROUNDING = 1e-12  # in float64, what a sum over a mini-batch may lose
DRIFT = 100  # times what rounding does to the same training: beyond, it is drift
NOTICEABLE = 0.01  # relative change of the loss
SAME, CHANGED = "same, to rounding", "changed"
STAYS, DRIFTS = "stays, to rounding", "drifts"

Row = tuple[str, str, str]  # quantity, what was measured, finding


class Request(NamedTuple):
    """What was asked for, for the text and the record."""

    data: str
    batch_size: int
    seed: int
    rate: float
    steps: int
    epochs: int


def show(found: pd.DataFrame, note: str) -> RenderableType:
    """What `unitnorm symmetry` prints: one depth below the other, for 80 columns."""
    return Fitting(Cells(TITLE, found.astype({"depth": str}), "\n" + note))


def write_summary(found: pd.DataFrame, note: str) -> str:
    """`summary.md`: the depths side by side."""
    sides = found.groupby("quantity", sort=False)
    table = {"quantity": [str(name) for name in sides.groups]}
    for depth in found["depth"].unique():
        table[f"depth {depth}"] = found.loc[found["depth"] == depth, "measured"].to_list()
    table["finding"] = sides["finding"].agg(lambda same: "; ".join(dict.fromkeys(same))).to_list()
    return to_markdown(Cells(TITLE, pd.DataFrame(table), note)) + "\n"


def find(measured: Measured, cases: tuple[Case, Case]) -> pd.DataFrame:
    """The table: depth, quantity, measured, finding; the same quantities at each depth."""
    rows = []
    for depth in measured.scaling["depth"].unique().tolist():
        scaling, gradient, walks, norms = (table[table["depth"] == depth] for table in measured)
        lines = [
            *_judge_loss(scaling, cases),
            *_judge_gradient(gradient, cases),
            *_judge_gaps(walks, cases),
            *_judge_norms(norms),
        ]
        rows += [(depth, *line) for line in lines]
    return pd.DataFrame(rows, columns=["depth", "quantity", "measured", "finding"])


def explain(walks: pd.DataFrame, cases: tuple[Case, Case], request: Request) -> str:
    """How to read the table."""
    claim, trained = cases
    marks = ", ".join(map(str, choose_marks(walks)))
    slow = [u for u in sort_updates(walks["update"]) if u in RATE_SHARE]
    other = f" ({', '.join(slow)}: {shorten(request.rate * RATE_SHARE[slow[0]])})" if slow else ""
    return (
        f"Mini-batches of {request.batch_size} images of {request.data}, seed {request.seed}; "
        f"{named(claim)} unless another ε stands there (then {trained.dtype}). loss: largest "
        "relative change over ten decades of |α|, or from → to for the trained network. gap: "
        f"‖Δ logits‖ / ‖logits‖ of the trainings from W and from diag(α)W after {marks} steps at "
        f"learning rate {shorten(request.rate)}{other}; rounding: the same from Orth(diag(α)W), "
        "which is W but for rounding. α where ε = 1% of α²σ²: for some feature of the trained "
        "network. predictions: the largest share of test images on which the two trainings "
        "disagree at the end. ‖w‖ and λ/‖w‖²: median of the layers after "
        f"{request.epochs} epoch{'s' * (request.epochs > 1)}."
    )


def judge_walk(walk: pd.DataFrame) -> str:
    """Whether the trajectories of one update and depth part more than rounding makes them.

    Args:
      walk: its rows of `Measured.trajectories`.
    """
    walk = walk[walk["steps"] > 0]
    gap, rounding = walk["gap"].to_numpy(float), walk["rounding_gap"].to_numpy(float)
    if not (np.isfinite(gap).all() and np.isfinite(rounding).all()):
        return "not finite"
    least = np.finfo(walk["dtype"].iloc[0]).eps
    # rounding once grown does not shrink again, whichever of the two trainings it hit first
    allowed = DRIFT * np.maximum.accumulate(np.maximum(rounding, least))
    return DRIFTS if (gap > allowed).any() else STAYS


def choose_marks(walks: pd.DataFrame) -> list[int]:
    """The steps that the table shows: 1, 10, 100, … and the last."""
    steps = sorted(walks.loc[walks["steps"] > 0, "steps"].unique().tolist())
    return [step for step in steps if str(step).strip("0") == "1" or step == steps[-1]]


# ---------------------------------------------------------------- the rows


def _judge_loss(scaling: pd.DataFrame, cases: tuple[Case, Case]) -> Iterator[Row]:
    epsilon = f"ε = {shorten(cases[1].bn_epsilon)}"
    exact, practice = (select(scaling, case) for case in cases)
    positive = exact[exact["alpha"] > 0]["change"].max()
    compensated = exact[exact["compensated"]]["change"].max()
    flipped = exact[(exact["alpha"] < 0) & ~exact["compensated"]]["change"].min()
    plain, turned = (_pick(exact, alpha) for alpha in (1.0, -1.0))
    found = CHANGED if flipped > ROUNDING else SAME
    yield "loss, α > 0", shorten(positive, 1), SAME if positive <= ROUNDING else CHANGED
    yield "loss, α < 0", f"{shorten(plain['loss'])} → {shorten(turned['loss'])}", found
    yield "training error, α < 0", f"{plain['error']:.0%} → {turned['error']:.0%}", found
    found = SAME if compensated <= ROUNDING else CHANGED
    yield "loss, α < 0, γ → −γ", shorten(compensated, 1), found
    plain, gone = (_pick(practice, alpha) for alpha in (1.0, 0.0))
    found = SAME if gone["change"] <= 1e-5 else CHANGED
    yield f"loss, α = 0, {epsilon}", f"{shorten(plain['loss'])} → {shorten(gone['loss'])}", found
    if cases[1].bn_epsilon:
        alike = practice[(practice["alpha"] > 0) & (practice["filters"] == "all")]
        broken = alike[alike["change"] > NOTICEABLE]["alpha"].max()
        text, found = f"> {NOTICEABLE:.0%} at α ≤ {shorten(broken)}", "changed at small α"
        if np.isnan(broken):
            text, found = f"< {NOTICEABLE:.0%}", f"same, to {NOTICEABLE:.0%}"
        yield f"loss, α > 0, {epsilon}", text, found
        reached = np.sqrt(plain["epsilon_share"] / NOTICEABLE)
        yield f"α where ε = {NOTICEABLE:.0%} of α²σ²", shorten(reached), "below, ε counts"


def _judge_gradient(gradient: pd.DataFrame, cases: tuple[Case, Case]) -> Iterator[Row]:
    alike = gradient[(gradient["point"] == "start") & (gradient["filters"] == "all")]
    alike = alike[alike["alpha"] > 0]
    exact, practice = (select(alike, case) for case in cases)
    slope = np.polyfit(np.log(exact["alpha"]), np.log(exact["norm"]), 1)[0]
    found = "falls as 1/α" if abs(slope + 1) < 1e-6 else "does not fall as 1/α"
    yield "‖∇ℓ(αW)‖, slope", f"{slope:.6f}".replace("-", "−"), found
    if cases[1].bn_epsilon:
        low = practice[practice["alpha"] == practice["alpha"].min()].iloc[0]
        ratio = low["norm"] / low["expected"]
        quantity = f"α‖∇ℓ(αW)‖, ε = {shorten(cases[1].bn_epsilon)}"
        found = CHANGED if abs(ratio - 1) > NOTICEABLE else "same"
        yield quantity, f"× {shorten(ratio, 1)} at α = {shorten(low['alpha'])}", found


def _judge_gaps(walks: pd.DataFrame, cases: tuple[Case, Case]) -> Iterator[Row]:
    marks = choose_marks(walks)
    exact, practice = (select(walks, case) for case in cases)
    found = {u: judge_walk(exact[exact["update"] == u]) for u in sort_updates(exact["update"])}
    for update, finding in found.items():
        walk = exact[exact["update"] == update]
        yield f"gap, {label(update)}", _list_gaps(walk, "gap", marks), finding
    worst = exact.groupby("steps")["rounding_gap"].max().reset_index()
    yield "gap, rounding (largest)", _list_gaps(worst, "rounding_gap", marks), "the yardstick"
    end = exact[exact["steps"] == marks[-1]].set_index("update")["differing"]
    for name, finding in (("drifting", DRIFTS), ("others", STAYS)):
        shares = end[[update for update in found if found[update] == finding]]
        if len(shares):
            yield f"predictions, {name}", f"{shares.max():.1%}", finding
    if "un" in found:
        practice = practice[practice["update"] == "un"]
        epsilon = f"ε = {shorten(cases[1].bn_epsilon)}" if cases[1].bn_epsilon else cases[1].dtype
        finding = judge_walk(practice)
        if finding == DRIFTS and cases[1].bn_epsilon:
            finding = f"{DRIFTS}, for ε"
        start = _list_gaps(practice, "gap", [0])
        yield f"gap, UN, {epsilon}, at step 0", start, "ε, not rounding"
        yield f"gap, UN, {epsilon}", _list_gaps(practice, "gap", marks), finding
        grown = practice["rounding_gap"].max() > DRIFT * practice["rounding_gap"].iloc[0]
        finding = "rounding grows" if grown else "the yardstick"
        rounding = _list_gaps(practice, "rounding_gap", marks)
        yield f"gap, UN rounding, {epsilon}", rounding, finding


def _judge_norms(norms: pd.DataFrame) -> Iterator[Row]:
    end = norms[norms["step"] == norms["step"].max()]
    for update, part in end.groupby("update", sort=False):
        only_grows = part["norm_fall"].max() < 1e-5 and part["norm_median"].min() > 1 + 1e-5
        held = np.allclose(part[["norm_min", "norm_max"]], 1, rtol=0, atol=1e-5)
        falls = part["effective_median"].max() < part["rate"].max()
        found = "only grows" if only_grows else "stays 1" if held else "moves"
        yield f"‖w‖, {label(str(update))}", _span(part["norm_median"]), found
        found = "stays λ" if held else "falls" if falls else "moves"
        yield f"λ/‖w‖², {label(str(update))}", _span(part["effective_median"]), found


def _pick(table: pd.DataFrame, alpha: float) -> pd.Series:
    """The row of the trained network where every filter has this α and nothing is compensated."""
    rows = table[(table["point"] == "trained") & (table["alpha"] == alpha)]
    return rows[(rows["filters"] == "all") & ~rows["compensated"]].iloc[0]


def _list_gaps(walk: pd.DataFrame, column: str, marks: Sequence[int]) -> str:
    values = walk.set_index("steps")[column]
    return " ".join(shorten(values[mark], 1) for mark in marks)


def _span(values: pd.Series) -> str:
    low, high = shorten(values.min()), shorten(values.max())
    return low if low == high else f"{low} to {high}"
