"""The figures of `unitnorm symmetry`, one per table of `measure`, in the style of `report.style`.

One public function per figure, a row of panels per depth. Change here what a figure shows.
"""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from unitnorm.report.style import (
    GREY,
    Style,
    assign_styles,
    lay_out,
    make_handle,
    make_handles,
    set_log_scale,
    settings,
    tell_apart,
)
from unitnorm.symmetry.measure import Case, Measured

HEIGHT = 2.7  # inches, of a row of panels
FLOOR = 1e-17  # where a difference of exactly zero is drawn on a logarithmic axis
# Okabe and Ito's colours, as in the report
_CLAIM = Style("#0072B2", "-", "o")
_TRAINED = Style("#E69F00", (0, (5, 1.5)), "s")
_NEGATIVE = Style("#D55E00", (0, (1, 1)), "v")
_COMPENSATED = Style("#000000", "none", "x")
_SIZES = "Large: α for every filter. Small: α times a factor of each filter's own, from 0.1 to 10. "


def draw_all(measured: Measured, cases: tuple[Case, Case]) -> dict[str, Figure]:
    """A figure of each table, by its name."""
    return {
        "scaling": draw_scaling(measured.scaling, cases),
        "gradient": draw_gradient(measured.gradient, cases),
        "trajectories": draw_trajectories(measured.trajectories, cases),
        "norms": draw_norms(measured.norms),
    }


def draw_scaling(table: pd.DataFrame, cases: tuple[Case, Case]) -> Figure:
    """Relative change of the loss over |α|: the start on the left, the trained network right.

    Args:
      table: `Measured.scaling`.
      cases: the claim's and as it is trained.
    """
    claim, trained = cases
    curves = {
        f"α > 0, {named(claim)}": (claim, 1, False, _CLAIM),
        f"α > 0, {named(trained)}": (trained, 1, False, _TRAINED),
        f"α < 0, {named(claim)}": (claim, -1, False, _NEGATIVE),
        "α < 0 and γ → −γ, the same": (claim, -1, True, _COMPENSATED),
    }
    handles = [_make_handle(drawn, name) for name, (*_, drawn) in curves.items()]
    note = (
        f"{_SIZES}γ: the trainable scale behind the normalisation. Largest of the mini-batches; "
        f"no change at all is drawn at {shorten(FLOOR)}."
    )
    depths = table["depth"].unique()
    with settings():
        figure, axes = lay_out(len(depths), 2, HEIGHT, handles, note, legend_columns=2)
        for row, depth in zip(axes, depths, strict=True):
            points = {"start": "at the start", "trained": "trained"}
            for axis, (point, words) in zip(row, points.items(), strict=True):
                panel = table[(table["depth"] == depth) & (table["point"] == point)]
                for case, sign, compensated, drawn in curves.values():
                    part = select(panel, case)
                    part = part[np.sign(part["alpha"]) == sign]
                    part = part[part["compensated"] == compensated]
                    _draw_line(axis, part, "change", drawn)
                    if sign > 0:
                        _draw_points(axis, part, "change", drawn)
                axis.set(title=f"depth {depth}, {words}", ylabel="|Δ loss| / loss", xlabel="|α|")
        _set_log_axes(axes, low=FLOOR / 3)
        return figure


def draw_gradient(table: pd.DataFrame, cases: tuple[Case, Case]) -> Figure:
    """Norm of the gradient over α beside 1/α, and how far it is from it, at the start.

    Arguments as in `draw_scaling`, with `Measured.gradient`.
    """
    styles = dict(zip(cases, (_CLAIM, _TRAINED), strict=True))
    handles = [_make_handle(drawn, named(case)) for case, drawn in styles.items()]
    handles.append(make_handle("", "-", color="black", lw=1, label="‖∇ℓ(W)‖ / α"))
    note = (
        f"{_SIZES}At the start; the gradient of the loss with respect to all filters. Right: "
        "‖α∇ℓ(αW) − ∇ℓ(W)‖ / ‖∇ℓ(W)‖, largest of the mini-batches."
    )
    table = table[(table["point"] == "start") & (table["alpha"] > 0)]
    depths = table["depth"].unique()
    with settings():
        figure, axes = lay_out(len(depths), 2, HEIGHT, handles, note, sharey="col")
        for (left, right), depth in zip(axes, depths, strict=True):
            panel = table[table["depth"] == depth]
            for case, drawn in styles.items():
                part = select(panel, case)
                _draw_line(left, part, "norm", drawn)
                _draw_line(right, part, "deviation", drawn)
                _draw_points(right, part, "deviation", drawn)
            line = select(panel[panel["filters"] == "all"], cases[0])
            left.plot(line["alpha"], line["expected"], color="black", lw=1, zorder=4)
            left.set(title=f"depth {depth}", ylabel="‖∇ℓ(αW)‖", xlabel="α")
            right.set(title=f"depth {depth}", ylabel="relative distance from 1/α", xlabel="α")
        _set_log_axes(axes[:, :1])
        _set_log_axes(axes[:, 1:], low=FLOOR / 3)
        return figure


def draw_trajectories(table: pd.DataFrame, cases: tuple[Case, Case]) -> Figure:
    """How far apart the outputs of two trainings are, from W and from diag(α) W.

    Arguments as in `draw_scaling`, with `Measured.trajectories`.
    """
    distinct, others = tell_apart(table["update"])
    styles = assign_styles(distinct)
    handles = make_handles(styles)
    if others:
        handles.append(make_handle("", ":", color=GREY, lw=1.2, label=f"{len(others)} others"))
    handles.append(make_handle("", "-", color=GREY, lw=0.8, label="rounding"))
    note = (
        "Thick: from W against from diag(α)W, each filter with an α of its own from 0.1 to 10. "
        "Thin grey: from W against from Orth(diag(α)W), the same point but for rounding, a line "
        "for each update. Δ logits: over a fixed batch of test images, in training mode."
        + (f" Others: {', '.join(others)}." if others else "")
    )
    depths = table["depth"].unique()
    table = table[table["steps"] > 0]
    with settings():
        figure, axes = lay_out(len(depths), 2, HEIGHT + 0.3, handles, note)
        for row, depth in zip(axes, depths, strict=True):
            for axis, case in zip(row, cases, strict=True):
                part = select(table[table["depth"] == depth], case)
                for update in others:
                    walk = part[part["update"] == update]
                    gap = np.maximum(walk["gap"].to_numpy(float), FLOOR)
                    axis.plot(walk["steps"], gap, color=GREY, ls=":", lw=1.2, zorder=1)
                for place, (update, drawn) in enumerate(styles.items()):
                    walk = part[part["update"] == update]
                    rounding = np.maximum(walk["rounding_gap"].to_numpy(float), FLOOR)
                    axis.plot(walk["steps"], rounding, color=GREY, lw=0.8, zorder=1)
                    _plot(axis, walk["steps"], walk["gap"], drawn, (place % 3, 3))
                axis.set(
                    title=f"depth {depth}, {named(case)}", ylabel="‖Δ logits‖ / ‖logits‖",
                    xlabel="mini-batches",
                )  # fmt: skip
        _set_log_axes(axes, low=FLOOR / 3)
        return figure


def draw_norms(table: pd.DataFrame) -> Figure:
    """Row norms and effective learning rates over the epochs.

    Args:
      table: `Measured.norms`.
    """
    styles = assign_styles(table["update"])
    note = (
        "Lines: median over a layer's filters. Shaded, for the first and last layer: from the "
        f"smallest to the largest. Learning rate λ = {table['rate'].iloc[0]:g} throughout."
    )
    depths = table["depth"].unique()
    panels = [("norm", "row norm ‖w‖"), ("effective", "effective rate λ/‖w‖²")]
    with settings():
        handles = make_handles(styles, markers=False)
        figure, axes = lay_out(len(depths), 2, HEIGHT + 0.3, handles, note, sharey="col")
        for row, depth in zip(axes, depths, strict=True):
            for axis, (column, name) in zip(row, panels, strict=True):
                for update, drawn in styles.items():
                    part = table[(table["depth"] == depth) & (table["update"] == update)]
                    _draw_layers(axis, part, column, drawn)
                axis.set(title=f"depth {depth}", ylabel=name, xlabel="epoch")
        for axis, (column, _) in zip(axes[0], panels, strict=True):
            shown = table[table["layer"].isin([1, *table.groupby("depth")["layer"].max()])]
            set_log_scale(axis, shown[f"{column}_min"].min(), shown[f"{column}_max"].max())
        return figure


def named(case: Case) -> str:
    """A case in words: "ε = 1e-5, float32"."""
    return f"ε = {shorten(case.bn_epsilon)}, {case.dtype}"


def shorten(value: float, digits: int = 2) -> str:
    """A number with few digits and no padded exponent: 0.013, 1e-5, 2.2e-16."""
    return re.sub(r"e([+-])0*", lambda m: "e" + m[1].strip("+"), f"{value:.{digits}g}")


def select(table: pd.DataFrame, case: Case) -> pd.DataFrame:
    """The rows of a case."""
    return table[(table["dtype"] == case.dtype) & (table["bn_epsilon"] == case.bn_epsilon)]


def _draw_points(axis: Axes, part: pd.DataFrame, column: str, drawn: Style) -> None:
    """Small points where every filter has a factor of its own."""
    own = part[part["filters"] == "own"]
    y = np.maximum(own[column].to_numpy(float), FLOOR)
    axis.plot(own["alpha"].abs(), y, drawn.marker, color=drawn.colour, markersize=2, zorder=2)


def _draw_line(axis: Axes, part: pd.DataFrame, column: str, drawn: Style) -> None:
    """A line where every filter has the same factor."""
    part = part[part["filters"] == "all"]
    part = part.assign(size=part["alpha"].abs()).sort_values("size")
    _plot(axis, part["size"], part[column], drawn, (0, 2))


def _plot(axis: Axes, x: pd.Series, y: pd.Series, drawn: Style, every: tuple[int, int]) -> None:
    axis.plot(
        x, np.maximum(y.to_numpy(float), FLOOR), color=drawn.colour, ls=drawn.line,
        marker=drawn.marker, markersize=4.5, markevery=every, lw=1.5, zorder=3,
    )  # fmt: skip


def _draw_layers(axis: Axes, part: pd.DataFrame, column: str, drawn: Style) -> None:
    """A line per layer, named at its end where the layers part."""
    last = int(part["layer"].max())
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
    epochs = part["epoch"].max()
    axis.set_xlim(0, epochs * 1.2)
    ticks = MaxNLocator(integer=True).tick_values(0, epochs)
    axis.set_xticks([tick for tick in ticks if tick <= epochs])


def _set_log_axes(axes: np.ndarray, *, low: float | None = None) -> None:
    """Logarithmic axes with no more numbers than fit."""
    for axis in axes.ravel():
        axis.set(xscale="log", yscale="log")
        for side, ticks in ((axis.xaxis, 6), (axis.yaxis, 7)):
            side.set_major_locator(LogLocator(numticks=ticks))
            side.set_minor_locator(NullLocator())
        if low is not None:
            axis.set_ylim(bottom=low)


def _make_handle(drawn: Style, name: str) -> Line2D:
    return make_handle(drawn.marker, drawn.line, color=drawn.colour, ms=5, lw=1.6, label=name)
