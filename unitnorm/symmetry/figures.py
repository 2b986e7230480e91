"""The figures of `unitnorm symmetry`, one per table of `measure`, in the style of `report.style`.

One public function per figure, a row of panels per depth. Change here what a figure shows.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from unitnorm.report import style
from unitnorm.report.style import GREY, Style
from unitnorm.report.tables import format_short
from unitnorm.symmetry.measure import CLAIM, TRAINED, Measured
from unitnorm.symmetry.tables import name_cases, select

HEIGHT = 2.7  # inches, of a row of panels
FLOOR = 1e-17  # where a difference of exactly zero is drawn on a logarithmic axis
# Okabe and Ito's colours, as in the report
_CLAIM = Style("#0072B2", "-", "o")
_TRAINED = Style("#E69F00", (0, (5, 1.5)), "s")
_NEGATIVE = Style("#D55E00", (0, (1, 1)), "v")
_COMPENSATED = Style("#000000", "none", "x")
_SIZES = "Large: α for every filter. Small: α times a factor of each filter's own, from 0.1 to 10. "

Curve = tuple[str, int, bool, Style]  # dtype, sign of α, whether it is compensated, how it is drawn


def draw_all(measured: Measured) -> dict[str, Figure]:
    """A figure of each table, by its name."""
    with style.settings():
        return {
            "scaling": draw_scaling(measured.scaling),
            "gradient": draw_gradient(measured.gradient),
            "trajectories": draw_trajectories(measured.trajectories),
            "norms": draw_norms(measured.norms),
        }


def draw_scaling(table: pd.DataFrame) -> Figure:
    """Relative change of the loss over |α|: the start on the left, the trained network right."""
    claim, trained = name_cases(table)
    curves: dict[str, Curve] = {
        f"α > 0, {claim}": (CLAIM, 1, False, _CLAIM),
        f"α > 0, {trained}": (TRAINED, 1, False, _TRAINED),
        f"α < 0, {claim}": (CLAIM, -1, False, _NEGATIVE),
        "α < 0 and γ → −γ, the same": (CLAIM, -1, True, _COMPENSATED),
    }
    handles = [_make_handle(drawn, name) for name, (*_, drawn) in curves.items()]
    note = (
        f"{_SIZES}γ: the trainable scale behind the normalisation. Largest of the mini-batches; "
        f"no change at all is drawn at {format_short(FLOOR)}."
    )
    depths, points = table["depth"].unique(), (("start", "trained"), ("at the start", "trained"))
    figure, axes = style.lay_out((len(depths), 2), HEIGHT, handles, note, legend_columns=2)
    for row, depth in zip(axes, depths, strict=True):
        for axis, point, words in zip(row, *points, strict=True):
            panel = table[(table["depth"] == depth) & (table["point"] == point)]
            _draw_over_alpha(axis, panel, "change", curves.values())
            axis.set(title=f"depth {depth}, {words}", ylabel="|Δ loss| / loss", xlabel="|α|")
    style.set_log_axes(axes.flat, low=FLOOR / 3)
    return figure


def draw_gradient(table: pd.DataFrame) -> Figure:
    """Norm of the gradient over α beside 1/α, and how far it is from it, at the start."""
    curves: list[Curve] = [(CLAIM, 1, False, _CLAIM), (TRAINED, 1, False, _TRAINED)]
    named = zip(curves, name_cases(table), strict=True)
    handles = [_make_handle(drawn, name) for (*_, drawn), name in named]
    handles.append(style.make_handle("", "-", color="black", lw=1, label="‖∇ℓ(W)‖ / α"))
    note = (
        f"{_SIZES}At the start; the gradient of the loss with respect to all filters. Right: "
        "‖α∇ℓ(αW) − ∇ℓ(W)‖ / ‖∇ℓ(W)‖, largest of the mini-batches."
    )
    table, depths = table[table["point"] == "start"], table["depth"].unique()
    figure, axes = style.lay_out((len(depths), 2), HEIGHT, handles, note, sharey="col")
    for (left, right), depth in zip(axes, depths, strict=True):
        panel = table[table["depth"] == depth]
        alike = panel[panel["filters"] == "all"]
        _draw_over_alpha(left, alike, "norm", curves)
        _draw_over_alpha(right, panel, "deviation", curves)
        line = select(alike[alike["alpha"] > 0], CLAIM)
        left.plot(line["alpha"], line["expected"], color="black", lw=1, zorder=4)
        left.set(title=f"depth {depth}", ylabel="‖∇ℓ(αW)‖", xlabel="α")
        right.set(title=f"depth {depth}", ylabel="relative distance from 1/α", xlabel="α")
    style.set_log_axes(axes[:, 0])
    style.set_log_axes(axes[:, 1], low=FLOOR / 3)
    return figure


def draw_trajectories(table: pd.DataFrame) -> Figure:
    """How far apart the outputs of two trainings are, from W and from diag(α) W."""
    distinct, others = style.tell_apart(table["update"])
    styles = style.assign_styles(distinct)
    handles = style.make_handles(styles)
    if others:
        handles.append(
            style.make_handle("", ":", color=GREY, lw=1.2, label=f"{len(others)} others")
        )
    handles.append(style.make_handle("", "-", color=GREY, lw=0.8, label="rounding"))
    note = (
        "Thick: from W against from diag(α)W, each filter with an α of its own from 0.1 to 10. "
        "Thin grey: from W against from Orth(diag(α)W), the same point but for rounding, a line "
        "for each update. Δ logits: over a fixed batch of test images, in training mode."
        + (f" Others: {', '.join(others)}." if others else "")
    )
    table, depths = table[table["steps"] > 0], table["depth"].unique()
    figure, axes = style.lay_out((len(depths), 2), HEIGHT + 0.3, handles, note)
    for row, depth in zip(axes, depths, strict=True):
        for axis, dtype, words in zip(row, (CLAIM, TRAINED), name_cases(table), strict=True):
            part = select(table[table["depth"] == depth], dtype)
            for place, update in enumerate([*styles, *others]):
                walk = part[part["update"] == update]
                steps, rounding = walk["steps"], walk["rounding_gap"].clip(lower=FLOOR)
                axis.plot(steps, rounding, color=GREY, lw=0.8, zorder=1)
                if update in styles:
                    _plot(axis, steps, walk["gap"], styles[update], (place % 3, 3))
                else:
                    gap = walk["gap"].clip(lower=FLOOR)
                    axis.plot(steps, gap, color=GREY, ls=":", lw=1.2, zorder=1)
            title = f"depth {depth}, {words}"
            axis.set(title=title, ylabel="‖Δ logits‖ / ‖logits‖", xlabel="mini-batches")
    style.set_log_axes(axes.flat, low=FLOOR / 3)
    return figure


def draw_norms(table: pd.DataFrame) -> Figure:
    """Row norms and effective learning rates over the epochs."""
    styles = style.assign_styles(table["update"])
    note = (
        "Lines: median over a layer's filters. Shaded, for the first and last layer: from the "
        f"smallest to the largest. Learning rate λ = {table['rate'].iloc[0]:g} throughout."
    )
    depths, handles = table["depth"].unique(), style.make_handles(styles, markers=False)
    shown = table[table["layer"].isin([1, *table.groupby("depth")["layer"].max()])]
    panels = {"norm": "row norm ‖w‖", "effective": "effective rate λ/‖w‖²"}
    figure, axes = style.lay_out((len(depths), 2), HEIGHT + 0.3, handles, note, sharey="col")
    for (column, name), axis_column in zip(panels.items(), axes.T, strict=True):
        for axis, depth in zip(axis_column, depths, strict=True):
            for update, drawn in styles.items():
                part = table[(table["depth"] == depth) & (table["update"] == update)]
                _draw_layers(axis, part, column, drawn)
            axis.set(title=f"depth {depth}", ylabel=name, xlabel="epoch")
        style.set_log_scale(
            axis_column[0], shown[f"{column}_min"].min(), shown[f"{column}_max"].max()
        )
    return figure


def _draw_over_alpha(axis: Axes, table: pd.DataFrame, column: str, curves: Iterable[Curve]) -> None:
    """A line where every filter has the same factor, small points where each has its own."""
    for dtype, sign, compensated, drawn in curves:
        part = select(table, dtype)
        part = part[(np.sign(part["alpha"]) == sign) & (part["compensated"] == compensated)]
        part = part.assign(size=part["alpha"].abs()).sort_values("size")
        alike, own = (part[part["filters"] == kind] for kind in ("all", "own"))
        _plot(axis, alike["size"], alike[column], drawn, (0, 2))
        if sign > 0:
            y = own[column].clip(lower=FLOOR)
            axis.plot(own["size"], y, drawn.marker, color=drawn.colour, markersize=2, zorder=2)


def _plot(axis: Axes, x: pd.Series, y: pd.Series, drawn: Style, every: tuple[int, int]) -> None:
    axis.plot(
        x, y.clip(lower=FLOOR), color=drawn.colour, ls=drawn.line, marker=drawn.marker,
        markersize=4.5, markevery=every, lw=1.5, zorder=3,
    )  # fmt: skip


def _draw_layers(axis: Axes, part: pd.DataFrame, column: str, drawn: Style) -> None:
    """A line per layer, named at its end where the layers part."""
    last, epochs = part["layer"].max(), part["epoch"].max()
    for layer, values in part.groupby("layer"):
        x, middle = values["epoch"].to_numpy(), values[f"{column}_median"].to_numpy()
        if layer in (1, last):
            low, high = values[f"{column}_min"], values[f"{column}_max"]
            axis.fill_between(x, low, high, color=drawn.colour, alpha=0.15, lw=0)
        axis.plot(x, middle, color=drawn.colour, ls=drawn.line, lw=1.6)
        parted = abs(middle[-1] / middle[0] - 1) > 0.05  # at unit norm all layers are one line
        if parted and (last <= 6 or layer in (1, last)):
            axis.annotate(
                f"layer {layer}", (x[-1], middle[-1]), (4, 0), textcoords="offset points",
                va="center", color=drawn.colour,
            )  # fmt: skip
    axis.set_xlim(0, epochs * 1.2)
    ticks = MaxNLocator(integer=True).tick_values(0, epochs)
    axis.set_xticks([tick for tick in ticks if tick <= epochs])


def _make_handle(drawn: Style, name: str) -> Line2D:
    return style.make_handle(drawn.marker, drawn.line, color=drawn.colour, ms=5, lw=1.6, label=name)
