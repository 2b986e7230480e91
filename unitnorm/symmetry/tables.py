"""What the tables of `measure` come to, as tables to be read. To add a row, add it here."""

from functools import partial

import numpy as np
import pandas as pd

from unitnorm.report.style import label, sort_updates
from unitnorm.report.tables import Cells, format_columns, format_short
from unitnorm.symmetry.measure import CLAIM, TRAINED, Measured

NOTICEABLE = 0.01  # relative change of the loss, and share of ε in a variance


def list_tables(measured: Measured, about: str) -> list[Cells]:
    """Loss and gradient on the mini-batches `about`, the trajectories of each depth, row norms."""
    walks = measured.trajectories.groupby("depth")
    gaps = [_gap_cells(part, f"Depth {depth}") for depth, part in walks]
    return [_loss_cells(measured, about), *gaps, _norm_cells(measured.norms)]


def name_cases(table: pd.DataFrame) -> list[str]:
    """The claim's arithmetic and that of training in words: "ε = 1e−5, float32"."""
    epsilons = table.groupby("dtype")["bn_epsilon"].first()
    return [f"ε = {format_short(epsilons[dtype], 2)}, {dtype}" for dtype in (CLAIM, TRAINED)]


def select(table: pd.DataFrame, dtype: str) -> pd.DataFrame:
    """The rows of the claim, or of training."""
    return table[table["dtype"] == dtype]


def _loss_cells(measured: Measured, about: str) -> Cells:
    exact, practice = name_cases(measured.scaling)
    columns = {}
    for depth, scaling in measured.scaling.groupby("depth"):
        gradient = measured.gradient[measured.gradient["depth"] == depth]
        claim, trained = select(scaling, CLAIM), select(scaling, TRAINED)
        alike = trained[(trained["filters"] == "all") & (trained["alpha"] > 0)]
        steep = select(gradient, TRAINED).query("filters == 'all' and point == 'start'")
        least = steep[steep["alpha"] > 0].nsmallest(1, "alpha").iloc[0]
        one, negative = _pick(claim, 1.0), _pick(claim, -1.0)
        columns[f"depth {depth}"] = {
            "largest |Δ loss| / loss, α > 0": claim.loc[claim["alpha"] > 0, "change"].max(),
            "the same, α < 0 and γ → −γ": claim.loc[claim["compensated"], "change"].max(),
            "loss, trained": one["loss"],
            "loss, trained, α < 0": negative["loss"],
            "training error, trained": one["error"],
            "training error, trained, α < 0": negative["error"],
            "largest ‖α∇ℓ(αW) − ∇ℓ(W)‖ / ‖∇ℓ(W)‖": select(gradient, CLAIM)["deviation"].max(),
            f"loss, trained, α = 0, {practice}": _pick(trained, 0.0)["loss"],
            f"largest α with |Δ loss| / loss > {NOTICEABLE:.0%}, {practice}": alike.loc[
                alike["change"] > NOTICEABLE, "alpha"
            ].max(),
            # of the feature whose variance is least
            f"α where ε = {NOTICEABLE:.0%} of α²σ², trained, {practice}": np.sqrt(
                _pick(trained, 1.0)["epsilon_share"] / NOTICEABLE
            ),
            f"α‖∇ℓ(αW)‖ / ‖∇ℓ(W)‖, α = {format_short(least['alpha'])}, {practice}": least["norm"]
            / least["expected"],
        }
    frame = pd.DataFrame(columns).map(lambda value: format_short(value, 2))
    note = f"{about}; {exact} where nothing else stands; |α| from 1e−5 to 1e5."
    title = "Loss and gradient, every filter scaled by the same α or each by its own"
    return Cells(title, frame.rename_axis("quantity").reset_index(), note)


def _pick(table: pd.DataFrame, alpha: float) -> pd.Series:
    """The row of the trained network where every filter has this α and nothing is compensated."""
    rows = table.query("point == 'trained' and filters == 'all' and not compensated")
    return rows[rows["alpha"] == alpha].iloc[0]


def _gap_cells(walks: pd.DataFrame, title: str) -> Cells:
    """How far apart the outputs are: every update in the claim's case, UN as it is trained."""
    exact, practice = select(walks, CLAIM), select(walks, TRAINED)
    steps = sorted(walks["steps"].unique())
    marks = [step for step in steps if str(step).strip("0") in ("", "1") or step == steps[-1]]
    parts = [exact[exact["update"] == update] for update in sort_updates(exact["update"])]
    parts += [part for _, part in practice[practice["update"] == "un"].groupby("update")]
    rows = []
    for part in parts:
        end, gaps = part.iloc[-1], part.set_index("steps")["gap"][marks]
        as_trained = f", {TRAINED}" if end["dtype"] == TRAINED else ""
        rows.append(
            {"update": label(end["update"]) + as_trained, "rate": format_short(end["rate"])}
            | {str(mark): format_short(gap, 1) for mark, gap in gaps.items()}
            | {"rounding": format_short(end["rounding_gap"], 1)}
            | {"differ": f"{100 * end['differing']:.1f} %"}
        )
    names = name_cases(walks)
    title += ": the gap between trainings from W and from diag(α)W"
    note = (
        "‖Δ logits‖ / ‖logits‖ after so many steps on the same mini-batches. rounding: the same at "
        "the end from Orth(diag(α)W), which is W but for rounding. differ: test images on which "
        f"the two trainings disagree at the end. {names[0]}; the last row: {names[1]}."
    )
    return Cells(title, pd.DataFrame(rows), note)


def _norm_cells(norms: pd.DataFrame) -> Cells:
    end = norms[norms["step"] == norms["step"].max()]
    one, two = (partial(format_short, digits=digits) for digits in (1, 2))
    cells = format_columns(end, {
        "depth": (str, "depth"), "update": (label, "update"), "layer": (str, "layer"),
        "‖w‖": (two, "norm_median"), "λ/‖w‖²": (two, "effective_median"),
        "largest fall": (one, "norm_fall"),
    })  # fmt: skip
    rate, epochs = (format_short(end[column].max()) for column in ("rate", "epoch"))
    note = (
        f"After {epochs} epochs at λ = {rate}: medians of the layer's filters, and the largest "
        "relative fall of any norm in one step."
    )
    return Cells("Row norms and effective rates", cells, note)
