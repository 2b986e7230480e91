"""The figures of `unitnorm symmetry`, one per table of `measure`, in the style of the report's.

One public function per figure, a row of panels per depth. Change here what a figure shows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from unitnorm.report.figures import Style, grid, settings, style, update_handles
from unitnorm.report.frames import label
from unitnorm.symmetry.measure import Case

HEIGHT = 1.9  # inches, of a panel
FLOOR = 1e-17  # where a difference of exactly zero is drawn on a logarithmic axis
_GREY = "#666666"
# Okabe and Ito's colours, as in the report
_CLAIM = Style("#0072B2", "-", "o")
_TRAINED = Style("#E69F00", (0, (5, 1.5)), "s")
_NEGATIVE = Style("#D55E00", (0, (1, 1)), "v")
_COMPENSATED = Style("#000000", "none", "x")


def scaling(table: pd.DataFrame, cases: tuple[Case, Case]) -> Figure:
    """Relative change of the loss over |α|: the start on the left, the trained network right.

    Args:
      table: `measure.Measured.scaling`.
      cases: the claim's and as it is trained.
    """
    claim, trained = cases
    curves = {
        f"α > 0, {named(claim)}": (claim, 1, False, _CLAIM),
        f"α > 0, {named(trained)}": (trained, 1, False, _TRAINED),
        f"α < 0, {named(claim)}": (claim, -1, False, _NEGATIVE),
        "α < 0 and γ → −γ, the same": (claim, -1, True, _COMPENSATED),
    }
    handles = [_handle(drawn, name) for name, (*_, drawn) in curves.items()]
    note = (
        "Large: α for every filter. Small: α times a factor of each filter's own, from 0.1 to 10. "
        "γ: the trainable scale behind the normalisation. Largest of the mini-batches; "
        f"no change at all is drawn at {short(FLOOR)}."
    )
    depths = table["depth"].unique()
    with settings():
        figure, axes = grid(len(depths), 2, HEIGHT, handles, note, xlabel="|α|", legend_columns=2)
        for row, depth in zip(axes, depths, strict=True):
            for axis, point in zip(row, ("start", "trained"), strict=True):
                panel = table[(table["depth"] == depth) & (table["point"] == point)]
                for case, sign, compensated, drawn in curves.values():
                    part = _of(panel, case)
                    part = part[np.sign(part["alpha"]) == sign]
                    part = part[part["compensated"] == compensated]
                    _draw(axis, part[part["filters"] == "all"], "change", drawn)
                    if sign > 0:
                        _draw_own(axis, part, "change", drawn)
                axis.set_title(f"depth {depth}, {_POINTS[point]}", loc="left")
                axis.set_ylabel("|Δ loss| / loss")
        _log(axes, x=True, low=FLOOR / 3)
        return figure


def gradient(table: pd.DataFrame, cases: tuple[Case, Case]) -> Figure:
    """Norm of the gradient over α beside 1/α, and how far it is from it, at the start.

    Arguments as in `scaling`.
    """
    curves = {named(case): (case, drawn) for case, drawn in zip(cases, _BOTH, strict=True)}
    handles = [_handle(drawn, name) for name, (_, drawn) in curves.items()]
    handles.append(Line2D([], [], color="black", lw=1, label="‖∇ℓ(W)‖ / α"))
    note = (
        "Large: α for every filter. Small: α times a factor of each filter's own, from 0.1 to 10. "
        "At the start; the gradient of the loss with respect to all filters. Right: "
        "‖α∇ℓ(αW) − ∇ℓ(W)‖ / ‖∇ℓ(W)‖, largest of the mini-batches."
    )
    table = table[(table["point"] == "start") & (table["alpha"] > 0)]
    depths = table["depth"].unique()
    with settings():
        figure, axes = grid(len(depths), 2, HEIGHT, handles, note, xlabel="α", sharey="col")
        for (left, right), depth in zip(axes, depths, strict=True):
            panel = table[table["depth"] == depth]
            for case, drawn in curves.values():
                part = _of(panel, case)
                _draw(left, part[part["filters"] == "all"], "norm", drawn)
                _draw(right, part[part["filters"] == "all"], "deviation", drawn)
                _draw_own(right, part, "deviation", drawn)
            line = _of(panel, cases[0])
            line = line[line["filters"] == "all"]
            left.plot(line["alpha"], line["expected"], color="black", lw=1, zorder=4)
            left.set_ylabel("‖∇ℓ(αW)‖")
            right.set_ylabel("relative distance from 1/α")
            for axis in (left, right):
                axis.set_title(f"depth {depth}", loc="left")
        _log(axes[:, :1], x=True)
        _log(axes[:, 1:], x=True, low=FLOOR / 3)
        return figure


def trajectories(table: pd.DataFrame, cases: tuple[Case, Case]) -> Figure:
    """How far apart the outputs of two trainings are, from W and from diag(α) W.

    Arguments as in `scaling`, with `measure.Measured.trajectories`.
    """
    styles = style(table["update"])
    handles = [*update_handles(styles), Line2D([], [], color=_GREY, lw=0.8, label="rounding")]
    note = (
        "Thick: from W against from diag(α)W, each filter with an α of its own from 0.1 to 10. "
        "Thin grey: from W against from Orth(diag(α)W), the same point but for rounding, a line "
        "for each update. Δ logits: over a fixed batch of test images, in training mode."
    )
    depths = table["depth"].unique()
    table = table[table["steps"] > 0]
    with settings():
        figure, axes = grid(len(depths), 2, 2.2, handles, note, xlabel="mini-batches")
        for row, depth in zip(axes, depths, strict=True):
            for axis, case in zip(row, cases, strict=True):
                part = _of(table[table["depth"] == depth], case)
                for place, (update, drawn) in enumerate(styles.items()):
                    walk = part[part["update"] == update]
                    steps = walk["steps"].to_numpy()
                    rounding = np.maximum(walk["rounding_gap"].to_numpy(float), FLOOR)
                    axis.plot(steps, rounding, color=_GREY, lw=0.8, zorder=1)
                    _line(axis, steps, walk["gap"].to_numpy(float), drawn, (place % 3, 3))
                axis.set_title(f"depth {depth}, {named(case)}", loc="left")
                axis.set_ylabel("‖Δ logits‖ / ‖logits‖")
        _log(axes, x=True, low=FLOOR / 3)
        return figure


def norms(table: pd.DataFrame) -> Figure:
    """Row norms and effective learning rates over the epochs.

    Args:
      table: `measure.Measured.norms`.
    """
    styles = style(table["update"])
    handles = [
        Line2D([], [], color=drawn.colour, ls=drawn.line, lw=2, label=label(update))
        for update, drawn in styles.items()
    ]
    note = (
        "Lines: median over a layer's filters. Shaded, for the first and last layer: from the "
        "smallest to the largest. "
        f"Learning rate λ = {table['rate'].iloc[0]:g} throughout."
    )
    depths = table["depth"].unique()
    panels = [("norm", "row norm ‖w‖"), ("effective", "effective rate λ/‖w‖²")]
    with settings():
        figure, axes = grid(len(depths), 2, 2.2, handles, note, sharey="col")
        for row, depth in zip(axes, depths, strict=True):
            for axis, (column, name) in zip(row, panels, strict=True):
                for update, drawn in styles.items():
                    part = table[(table["depth"] == depth) & (table["update"] == update)]
                    _draw_layers(axis, part, column, drawn)
                axis.set_title(f"depth {depth}", loc="left")
                axis.set_ylabel(name)
        _log(axes)
        for place, axis in enumerate(axes.ravel()):
            subs = (1, 2, 3, 5, 7) if place % 2 else (1, 1.5, 2, 3, 5, 7)
            axis.yaxis.set_major_locator(LogLocator(subs=subs))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        return figure


_POINTS = {"start": "at the start", "trained": "trained"}
_BOTH = (_CLAIM, _TRAINED)


def named(case: Case) -> str:
    """A case in words: "ε = 1e-5, float32"."""
    return f"ε = {short(case.bn_epsilon)}, {case.dtype}"


def short(value: float, digits: int = 2) -> str:
    """A number with few digits and no padded exponent: 0.013, 1e-5, 2.2e-16."""
    return re.sub(r"e([+-])0*", lambda m: "e" + m[1].strip("+"), f"{value:.{digits}g}")


def _of(table: pd.DataFrame, case: Case) -> pd.DataFrame:
    return table[(table["dtype"] == case.dtype) & (table["bn_epsilon"] == case.bn_epsilon)]


def _draw_own(axis: Axes, part: pd.DataFrame, column: str, drawn: Style) -> None:
    """Small points where every filter has a factor of its own."""
    own = part[part["filters"] == "own"]
    y = np.maximum(own[column].to_numpy(float), FLOOR)
    axis.plot(own["alpha"].abs(), y, drawn.marker, color=drawn.colour, markersize=2, zorder=2)


def _draw(axis: Axes, part: pd.DataFrame, column: str, drawn: Style) -> None:
    part = part.assign(size=part["alpha"].abs()).sort_values("size")
    _line(axis, part["size"].to_numpy(), part[column].to_numpy(float), drawn, (0, 2))


def _line(axis: Axes, x: np.ndarray, y: np.ndarray, drawn: Style, every: tuple[int, int]) -> None:
    axis.plot(
        x,
        np.maximum(y, FLOOR),
        color=drawn.colour,
        ls=drawn.line,
        marker=drawn.marker,
        markersize=4.5,
        markevery=every,
        lw=1.5,
        zorder=3,
    )


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
                f"layer {layer}",
                (x[-1], middle[-1]),
                (4, 0),
                textcoords="offset points",
                va="center",
                color=drawn.colour,
            )
    epochs = part["epoch"].max()
    axis.set_xlim(0, epochs * 1.2)
    axis.set_xticks(
        [tick for tick in MaxNLocator(integer=True).tick_values(0, epochs) if tick <= epochs]
    )


def _log(axes: np.ndarray, *, x: bool = False, low: float | None = None) -> None:
    """Logarithmic axes with no more numbers than fit."""
    for axis in axes.ravel():
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(numticks=7))
        axis.yaxis.set_minor_locator(NullLocator())
        if x:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(numticks=6))
            axis.xaxis.set_minor_locator(NullLocator())
        if low is not None:
            axis.set_ylim(bottom=low)


def _handle(drawn: Style, name: str) -> Line2D:
    return Line2D(
        [], [], color=drawn.colour, ls=drawn.line, marker=drawn.marker, ms=5, lw=1.6, label=name
    )


def every(tables: Mapping[str, pd.DataFrame], cases: tuple[Case, Case]) -> dict[str, Figure]:
    """All figures by name.

    Args:
      tables: `measure.Measured` as a mapping.
      cases: as in `scaling`.
    """
    return {
        "scaling": scaling(tables["scaling"], cases),
        "gradient": gradient(tables["gradient"], cases),
        "trajectories": trajectories(tables["trajectories"], cases),
        "norms": norms(tables["norms"]),
    }
