"""What the tables of `measure` show, in one table and a few sentences, for the terminal and README.

Every verdict is drawn from the numbers; the sentences give the reasons, which are mathematics. To
add a line, add it to a function of `lines` and, if it needs a reason, to `reasons`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from rich.console import Group
from rich.text import Text

from unitnorm.report.frames import in_order, label
from unitnorm.report.tables import Cells, Fitting, markdown
from unitnorm.symmetry.figures import named, short
from unitnorm.symmetry.measure import RATE_SHARE, Case, Measured

TITLE = "Scaling every filter in front of a batch normalisation by an α of its own"
ROUNDING = 1e-12  # in float64, what a sum over a mini-batch may lose
DRIFT = 100  # times what rounding does to the same training: beyond, it is drift
NOTICEABLE = 0.01  # relative change of the loss


class Settings(NamedTuple):
    """What was asked for, for the text and the record."""

    data: str
    batch_size: int
    seed: int
    rate: float
    steps: int
    epochs: int


def terminal(measured: Measured, cases: tuple[Case, Case], settings: Settings) -> Group:
    """What `unitnorm symmetry` prints."""
    table = tall(lines(measured, cases))
    return Group(Fitting(table), Text("\n" + legend(measured, cases, settings)))


def summary(measured: Measured, cases: tuple[Case, Case], settings: Settings) -> str:
    """`summary.md`: the table, how it was measured, and the reasons."""
    table = wide(lines(measured, cases))
    parts = [f"**{table.title}**", markdown(table), legend(measured, cases, settings)]
    parts.append("\n".join(f"- {reason}" for reason in reasons(measured, cases, settings)))
    return "\n\n".join(parts) + "\n"


class Line(NamedTuple):
    """A line of the table: what was measured, and what it shows."""

    quantity: str
    measured: str
    finding: str


def lines(measured: Measured, cases: tuple[Case, Case]) -> dict[int, list[Line]]:
    """The lines of each depth, the same quantities in each."""
    found = {}
    for depth in measured.scaling["depth"].unique().tolist():
        at_depth = Measured(*(table[table["depth"] == depth] for table in measured))
        found[depth] = [
            *_loss(at_depth.scaling, cases),
            *_gradient(at_depth.gradient, cases),
            *_gaps(at_depth.trajectories, cases),
            *_norms(at_depth.norms),
        ]
    return found


def tall(found: dict[int, list[Line]]) -> Cells:
    """One depth below the other, for 80 columns."""
    header = ["depth", *Line._fields]
    rows = [[str(depth), *line] for depth, part in found.items() for line in part]
    return Cells(TITLE, header, rows, frozenset(header[1:]))


def wide(found: dict[int, list[Line]]) -> Cells:
    """The depths side by side."""
    header = ["quantity", *(f"depth {depth}" for depth in found), "finding"]
    rows = [
        [
            same[0].quantity,
            *(line.measured for line in same),
            "; ".join(dict.fromkeys(line.finding for line in same)),
        ]
        for same in zip(*found.values(), strict=True)
    ]
    return Cells(TITLE, header, rows, frozenset(header))


def legend(measured: Measured, cases: tuple[Case, Case], settings: Settings) -> str:
    """How to read the table."""
    claim, trained = cases
    marks = ", ".join(map(str, marks_of(measured.trajectories)))
    slow = [u for u in in_order(measured.trajectories["update"]) if u in RATE_SHARE]
    other = f" ({', '.join(slow)}: {short(settings.rate * RATE_SHARE[slow[0]])})" if slow else ""
    return (
        f"Mini-batches of {settings.batch_size} images of {settings.data}, seed {settings.seed}; "
        f"{named(claim)} unless another ε stands there (then {trained.dtype}). loss: largest "
        "relative change over ten decades of |α|, or from → to for the trained network. gap: "
        f"‖Δ logits‖ / ‖logits‖ of the trainings from W and from diag(α)W after {marks} steps at "
        f"learning rate {short(settings.rate)}{other}; rounding: the same from Orth(diag(α)W), "
        "which is W but for rounding. ‖w‖ and λ/‖w‖²: median of the layers after "
        f"{settings.epochs} epochs."
    )


def reasons(measured: Measured, cases: tuple[Case, Case], settings: Settings) -> list[str]:
    """Why: one Markdown paragraph each, with the numbers of the deepest network."""
    depth = measured.scaling["depth"].max()
    at_depth = Measured(*(table[table["depth"] == depth] for table in measured))
    trained = at_depth.scaling[at_depth.scaling["point"] == "trained"]
    exact, practice = (_of(trained, case) for case in cases)
    texts = [_any_real(exact, practice, cases[1], depth)]
    if cases[1].bn_epsilon:
        texts.append(_epsilon(practice, cases[1], depth))
    texts.append(_drift(measured.trajectories, cases, settings))
    texts.append(_what_un_changes(at_depth.norms, settings, depth))
    return texts


def _any_real(exact: pd.DataFrame, practice: pd.DataFrame, case: Case, depth: int) -> str:
    plain, flipped, zero = _at(exact, 1.0), _at(exact, -1.0), _at(practice, 0.0)
    lost = f"loss {short(zero['loss'])} with ε = {short(case.bn_epsilon)}, " * (case.bn_epsilon > 0)
    return (
        "**Any real α?** Any positive one. Batch normalisation turns αh into "
        "αh / √(α²σ²) = sign(α) h/σ: a negative α turns the sign of the feature, in front of the "
        f"trainable scale γ, the shift and the ReLU. The trained network of depth {depth} goes "
        f"from a loss of {short(plain['loss'])} to {short(flipped['loss'])} (training error "
        f"{plain['error']:.0%} to {flipped['error']:.0%}). What holds for every α ≠ 0 is w → αw "
        "together with γ → sign(α)γ. At α = 0 there is no symmetry, the feature is gone: "
        f"{lost}0/0 with ε = 0."
    )


def _epsilon(practice: pd.DataFrame, case: Case, depth: int) -> str:
    reached = np.sqrt(_at(practice, 1.0)["epsilon_share"] / NOTICEABLE)
    return (
        f"**ε.** Batch normalisation divides by √(α²σ² + ε), so ε = {short(case.bn_epsilon)} ends "
        f"the symmetry at small α: in the trained network of depth {depth}, ε is "
        f"{NOTICEABLE:.0%} of some feature's α²σ² at α = {short(reached)}. Further down the "
        "features fade, and the gradient no longer grows as 1/α."
    )


def _drift(walks: pd.DataFrame, cases: tuple[Case, Case], settings: Settings) -> str:
    claim, trained = cases
    exact, practice = (_of(walks, case) for case in cases)
    found = {
        update: {verdict(part) for _, part in exact[exact["update"] == update].groupby("depth")}
        for update in in_order(exact["update"])
    }
    stay, drift = (
        [update for update, verdicts in found.items() if verdicts == {wanted}]
        for wanted in (STAYS, DRIFTS)
    )
    first, last = (practice[practice["steps"] == step] for step in (0, settings.steps))

    def ends(updates: Sequence[str]) -> float:
        end = exact[(exact["steps"] == settings.steps) & exact["update"].isin(updates)]
        return float(end["differing"].max()) if len(end) else 0.0

    text = (
        "**Drift or chaos?** Trainings that differ by rounding alone part as well, once a feature "
        "falls on the other side of a ReLU or a maximum; the rows of rounding show when. "
        f"With {named(claim)}, {_listed(drift)} drift, and after {settings.steps} steps "
        f"disagree on up to {ends(drift):.1%} of the test images; {_listed(stay)} do not leave "
        f"rounding, and disagree on {ends(stay):.1%}. "
    )
    if trained.bn_epsilon:
        text += (
            f"With {named(trained)}, W and diag(α)W are not the same network: their outputs differ "
            f"by up to {short(first['gap'].max())} before the first step, and training spreads it "
            "under any update. "
        )
    before, after = (float(rows["rounding_gap"].max()) for rows in (first, last))
    text += (
        f"Normalised once, they differ by rounding alone, by {short(before)} in {trained.dtype} "
        f"and by up to {short(after)} after {settings.steps} steps"
    )
    return text + (": there rounding has become chaos." if after > DRIFT * before else ".")


def _what_un_changes(norms: pd.DataFrame, settings: Settings, depth: int) -> str:
    end = norms[norms["step"] == norms["step"].max()]
    free, held = (end[end["update"] == update]["effective_median"] for update in ("b-sgd", "un"))
    return (
        "**What UN changes.** As the loss does not depend on ‖w‖, its gradient is orthogonal to w, "
        "and each step of B-SGD makes w longer: ‖w‖² grows by λ²‖∇ℓ‖². The step turns w as much as "
        "a step at unit norm with the effective rate λ/‖w‖² would. At a fixed λ of "
        f"{short(settings.rate)} that rate is {_span(free)} after {settings.epochs} epochs (median "
        f"of a layer, depth {depth}), and every filter has its own: B-SGD anneals itself. UN keeps "
        f"it at {_span(held)} and leaves annealing to the schedule."
    )


# ---------------------------------------------------------------- the lines of the table

STAYS, DRIFTS = "stays, to rounding", "drifts"


def verdict(walk: pd.DataFrame) -> str:
    """Whether the trajectories of one update and depth part more than rounding makes them.

    Args:
      walk: its rows of `measure.trajectories`.
    """
    walk = walk[walk["steps"] > 0]
    gap, rounding = walk["gap"].to_numpy(float), walk["rounding_gap"].to_numpy(float)
    if not (np.isfinite(gap).all() and np.isfinite(rounding).all()):
        return "not finite"
    least = np.finfo(walk["dtype"].iloc[0]).eps
    # rounding once grown does not shrink again, whichever of the two trainings it hit first
    allowed = DRIFT * np.maximum.accumulate(np.maximum(rounding, least))
    return DRIFTS if (gap > allowed).any() else STAYS


def marks_of(walks: pd.DataFrame) -> list[int]:
    """The steps that the table shows: 1, 10, 100, … and the last."""
    steps = sorted(walks.loc[walks["steps"] > 0, "steps"].unique().tolist())
    return [step for step in steps if str(step).strip("0") == "1" or step == steps[-1]]


def _loss(scaling: pd.DataFrame, cases: tuple[Case, Case]) -> Iterator[Line]:
    claim, trained = cases
    exact, practice = _of(scaling, claim), _of(scaling, trained)
    positive = exact[exact["alpha"] > 0]["change"].max()
    compensated = exact[exact["compensated"]]["change"].max()
    network = exact[exact["point"] == "trained"]
    flipped = exact[(exact["alpha"] < 0) & ~exact["compensated"]]["change"].min()
    start, end = (short(_at(network, alpha)["loss"]) for alpha in (1.0, -1.0))
    yield Line("loss, α > 0", short(positive, 1), _same(positive))
    yield Line("loss, α < 0", f"{start} → {end}", "changed" if flipped > ROUNDING else "unchanged")
    yield Line("loss, α < 0, γ → −γ", short(compensated, 1), _same(compensated))
    network = practice[practice["point"] == "trained"]
    start, end = (short(_at(network, alpha)["loss"]) for alpha in (1.0, 0.0))
    change = _at(network, 0.0)["change"]
    epsilon = f"ε = {short(trained.bn_epsilon)}"
    yield Line(f"loss, α = 0, {epsilon}", f"{start} → {end}", _same(change, 1e-5))
    if trained.bn_epsilon:
        alike = practice[(practice["alpha"] > 0) & (practice["filters"] == "all")]
        broken = alike[alike["change"] > NOTICEABLE]["alpha"].max()
        intact = np.isnan(broken)
        measured = "< 1%" if intact else f"> {NOTICEABLE:.0%} at α ≤ {short(broken)}"
        finding = "unchanged, to 1%" if intact else "changed where α is small"
        yield Line(f"loss, α > 0, {epsilon}", measured, finding)


def _gradient(gradient: pd.DataFrame, cases: tuple[Case, Case]) -> Iterator[Line]:
    alike = gradient[(gradient["point"] == "start") & (gradient["filters"] == "all")]
    alike = alike[alike["alpha"] > 0]
    exact, practice = (_of(alike, case) for case in cases)
    slope = np.polyfit(np.log(exact["alpha"]), np.log(exact["norm"]), 1)[0]
    finding = "falls as 1/α" if abs(slope + 1) < 1e-6 else "does not fall as 1/α"
    yield Line("‖∇ℓ(αW)‖, slope", f"{slope:.6f}".replace("-", "−"), finding)
    if cases[1].bn_epsilon:
        low = practice[practice["alpha"] == practice["alpha"].min()].iloc[0]
        ratio = low["norm"] / low["expected"]
        yield Line(
            f"α‖∇ℓ(αW)‖, ε = {short(cases[1].bn_epsilon)}",
            f"× {short(ratio, 1)} at α = {short(low['alpha'])}",
            "changed" if abs(ratio - 1) > NOTICEABLE else "unchanged",
        )


def _gaps(walks: pd.DataFrame, cases: tuple[Case, Case]) -> Iterator[Line]:
    marks = marks_of(walks)
    exact = _of(walks, cases[0])
    updates = in_order(exact["update"])
    for update in updates:
        walk = exact[exact["update"] == update]
        yield Line(f"gap, {label(update)}", _series(walk, "gap", marks), verdict(walk))
    worst = exact.groupby("steps")["rounding_gap"].max().reset_index()
    yield Line("gap, rounding (largest)", _series(worst, "rounding_gap", marks), "the yardstick")
    if "un" in updates:
        practice = _of(walks, cases[1])
        practice = practice[practice["update"] == "un"]
        epsilon = f"ε = {short(cases[1].bn_epsilon)}" if cases[1].bn_epsilon else cases[1].dtype
        found = verdict(practice)
        finding = f"{DRIFTS}, for ε" if found == DRIFTS and cases[1].bn_epsilon else found
        yield Line(f"gap, UN, {epsilon}", _series(practice, "gap", marks), finding)
        grown = practice["rounding_gap"].max() > DRIFT * practice["rounding_gap"].iloc[0]
        rounding = _series(practice, "rounding_gap", marks)
        finding = "rounding grows" if grown else "the yardstick"
        yield Line(f"gap, UN rounding, {epsilon}", rounding, finding)


def _norms(norms: pd.DataFrame) -> Iterator[Line]:
    end = norms[norms["step"] == norms["step"].max()]
    for update, part in end.groupby("update", sort=False):
        only_grows = part["norm_fall"].max() < 1e-5 and part["norm_median"].min() > 1 + 1e-5
        held = np.allclose(part[["norm_min", "norm_max"]], 1, rtol=0, atol=1e-5)
        falls = part["effective_median"].max() < part["rate"].max()
        moved = "only grows" if only_grows else "stays 1" if held else "moves"
        yield Line(f"‖w‖, {label(str(update))}", _span(part["norm_median"]), moved)
        finding = "stays λ" if held else "falls" if falls else "moves"
        yield Line(f"λ/‖w‖², {label(str(update))}", _span(part["effective_median"]), finding)


def _at(table: pd.DataFrame, alpha: float) -> pd.Series:
    """The row where every filter has this α and nothing is compensated."""
    rows = table[(table["alpha"] == alpha) & (table["filters"] == "all") & ~table["compensated"]]
    return rows.iloc[0]


def _of(table: pd.DataFrame, case: Case) -> pd.DataFrame:
    return table[(table["dtype"] == case.dtype) & (table["bn_epsilon"] == case.bn_epsilon)]


def _same(change: float, tolerance: float = ROUNDING) -> str:
    return "unchanged, to rounding" if change <= tolerance else "changed"


def _series(walk: pd.DataFrame, column: str, marks: Sequence[int]) -> str:
    values = walk.set_index("steps")[column]
    return " ".join(short(values[mark], 1) for mark in marks)


def _span(values: pd.Series) -> str:
    low, high = short(values.min()), short(values.max())
    return low if low == high else f"{low} to {high}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(label, names)) if names else "none"
