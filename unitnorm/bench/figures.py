"""The benchmark's figures, in the style of the report's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from unitnorm.bench.measure import Spread
from unitnorm.report.style import WIDTH, encode, settings

__all__ = ["encode", "roofs", "scaling"]

_GREY = "#666666"


class _Drawn(NamedTuple):
    colour: str
    marker: str


# Okabe and Ito's colours, as in the report
_STYLES = {
    "unitnorm": _Drawn("#0072B2", "o"),
    "geoopt": _Drawn("#D55E00", "s"),
    "torch-sgd": _Drawn("#E69F00", "D"),
    "optax-loop": _Drawn("#009E73", "^"),
}


def roofs(points: pd.DataFrame, machine: Mapping[str, Spread]) -> Figure:
    """The contestants under the machine's two roofs: products a second over operations per byte.

    Args:
      points: columns name, depth, intensity, flops_per_s, low, high.
      machine: `flops_per_s` and `bytes_per_s`.
    """
    flops, moved = machine["flops_per_s"].median, machine["bytes_per_s"].median
    depths = sorted(points["depth"].unique())
    with settings():
        figure = Figure(figsize=(WIDTH, 4.3))
        axis = figure.add_axes((0.09, 0.2, 0.88, 0.68))
        ridge = flops / moved
        intensities = [*points["intensity"], ridge]
        left, right = min(intensities) / 4, max(intensities) * 4
        x = np.geomspace(left, right, 200)
        axis.plot(x, np.minimum(flops, moved * x) / 1e9, color="black", lw=2, zorder=2)
        for place, depth in enumerate(depths):
            part = points[points["depth"] == depth]
            for name, _, intensity, speed, low, high in part.itertuples(index=False):
                drawn = _STYLES[name]
                axis.errorbar(
                    intensity,
                    speed / 1e9,
                    yerr=[[(speed - low) / 1e9], [(high - speed) / 1e9]],
                    fmt=drawn.marker,
                    color=drawn.colour,
                    markerfacecolor=drawn.colour if place == 0 else "white",
                    markersize=8,
                    capsize=3,
                    lw=1.2,
                    zorder=3,
                )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlim(left, right)
        lowest = min(points["low"].min(), moved * left)
        axis.set_ylim(lowest / 1e9 / 1.8, flops / 1e9 * 1.7)
        axis.annotate(
            f"matrix products: {flops / 1e9:,.0f} GFLOP/s",
            (right, flops / 1e9),
            (-4, 5),
            textcoords="offset points",
            ha="right",
        )
        axis.annotate(
            f"memory: {moved / 1e9:,.0f} GB/s",
            (left * 1.2, moved * left * 1.2 / 1e9),
            (8, -8),
            textcoords="offset points",
            va="top",
        )
        _plain_ticks(axis.xaxis, right / left)
        low_y, high_y = axis.get_ylim()
        _plain_ticks(axis.yaxis, high_y / low_y)
        axis.set_xlabel("floating-point operations per byte, least traffic")
        axis.set_ylabel("GFLOP/s")
        handles = [
            Line2D([], [], linestyle="none", marker=d.marker, color=d.colour, ms=8, label=name)
            for name, d in _STYLES.items()
            if name in set(points["name"])
        ]
        handles += [
            Line2D([], [], linestyle="none", marker="o", color=_GREY, ms=8, label=f"depth {depth}",
                   markerfacecolor=_GREY if place == 0 else "white")
            for place, depth in enumerate(depths)
        ]  # fmt: skip
        figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.02, 0.995), ncols=6)
        note = (
            "Training samples a second × the operations of a sample's matrix products. "
            "Bars: slowest and fastest repetition."
        )
        figure.text(0.012, 0.02, note, color=_GREY)
        return figure


def scaling(frame: pd.DataFrame) -> Figure:
    """Seconds of an epoch and peak memory over runs and over depth, with proportional growth.

    Args:
      frame: as `scaling.scaling` gives it; points on fewer devices or in several processes are
        left to the table.
    """
    common = frame[(frame["devices"] == frame["devices"].max()) & (frame["processes"] == 1)]
    few = common["depth"].min()
    at = {"runs": common[common["depth"] == few].sort_values("runs")}
    usual = common.loc[common["depth"] != few, "runs"]
    if len(usual):
        at["depth"] = common[common["runs"] == usual.iloc[0]].sort_values("depth")
    titles = {"runs": f"depth {few}", "depth": f"{usual.iloc[0] if len(usual) else ''} runs"}
    with settings():
        figure = Figure(figsize=(WIDTH, 5.2))
        axes = figure.subplots(
            2,
            len(at),
            squeeze=False,
            gridspec_kw={
                "left": 0.09, "right": 0.98, "top": 0.88, "bottom": 0.14,
                "wspace": 0.22, "hspace": 0.32,
            },
        )  # fmt: skip
        for column, (name, part) in zip(axes.T, at.items(), strict=True):
            x = part[name].to_numpy(float)
            _growth(column[0], x, part["epoch_s"].to_numpy(float), proportional=True)
            column[0].vlines(x, part["low"], part["high"], color="#0072B2", lw=1.2)
            column[0].set_ylabel("seconds of an epoch")
            column[0].set_title(titles[name], loc="left")
            _growth(column[1], x, part["peak_memory_mb"].to_numpy(float) / 1e3, proportional=False)
            column[1].set_ylabel("peak memory [GB]")
            for axis in column:
                axis.set_xticks(x, [f"{value:.0f}" for value in x])
                axis.xaxis.set_minor_locator(NullLocator())
            column[1].set_xlabel("runs trained at once" if name == "runs" else "depth")
        handles = [
            Line2D([], [], color="#0072B2", marker="o", lw=2, ms=5, label="measured"),
            Line2D([], [], color=_GREY, ls=":", lw=1.5, label="in proportion to the first"),
        ]
        figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.03, 0.995), ncols=2)
        images, devices = int(common["images"].iloc[0]), int(common["devices"].iloc[0])
        note = (
            f"Epochs of {images:,} training images, {devices} device{'s' * (devices > 1)}; median, "
            "fastest and slowest; memory of the whole process."
        )
        figure.text(0.012, 0.015, note, color=_GREY)
        return figure


def _growth(axis: Axes, x: np.ndarray, y: np.ndarray, *, proportional: bool) -> None:
    axis.plot(x, y, color="#0072B2", marker="o", lw=2, ms=5, zorder=3)
    axis.set_xscale("log")
    if proportional:
        axis.plot(x, y[0] * x / x[0], color=_GREY, ls=":", lw=1.5)
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        _plain_ticks(axis.yaxis, high / low)
    else:
        axis.set_ylim(0, 1.15 * max(y))


def _plain_ticks(axis: object, ratio: float) -> None:
    """Numbers as people write them, and enough of them for a short axis."""
    subs = (1.0,) if ratio > 300 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs))  # type: ignore[attr-defined]
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # type: ignore[attr-defined]
    axis.set_minor_locator(NullLocator())  # type: ignore[attr-defined]
