"""The benchmark's figures, in the style of the report's."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from unitnorm.bench.measure import Range
from unitnorm.report.style import GREY, lay_out, make_handle, set_log_scale, settings

_BLUE = "#0072B2"
# Okabe and Ito's colours, as in the report
_STYLES = {
    "unitnorm": (_BLUE, "o"),
    "geoopt": ("#D55E00", "s"),
    "oblique-sgd": ("#CC79A7", "v"),
    "torch-sgd": ("#E69F00", "D"),
    "optax-loop": ("#009E73", "^"),
}


def draw_roofs(points: pd.DataFrame, machine: Mapping[str, Range]) -> Figure:
    """The contestants under the machine's two roofs: products a second over operations per byte.

    Args:
      points: columns name, runs, depth, intensity, flops_per_s, low, high.
      machine: `flops_per_s` and `bytes_per_s`.
    """
    flops, moved = machine["flops_per_s"].median, machine["bytes_per_s"].median
    depths = sorted(points["depth"].unique())
    handles = [
        make_handle(marker, color=colour, ms=8, label=name)
        for name, (colour, marker) in _STYLES.items()
        if name in set(points["name"])
    ]
    handles += [
        make_handle("o", color=GREY, ms=8, label=f"depth {depth}", mfc="white" if place else GREY)
        for place, depth in enumerate(depths)
    ]
    handles.append(make_handle("o", color=GREY, ms=5, label="one run"))
    note = (
        "Training samples a second × the operations of a sample's matrix products. Bars: slowest "
        "and fastest repetition. Larger: several runs, of a peer one in each process."
    )
    with settings():
        figure, axes = lay_out((1, 1), 3.7, handles, note, legend_columns=4)
        axis = axes[0, 0]
        intensities = [*points["intensity"], flops / moved]
        left, right = min(intensities) / 2, max(intensities) * 2
        x = np.geomspace(left, right, 200)
        axis.plot(x, np.minimum(flops, moved * x) / 1e9, color="black", lw=2, zorder=2)
        for point in points.itertuples():
            colour, marker = _STYLES[str(point.name)]
            speed, low, high = np.array([point.flops_per_s, point.low, point.high]) / 1e9
            axis.errorbar(
                point.intensity, speed, yerr=[[speed - low], [high - speed]], fmt=marker,
                color=colour, mfc="white" if depths.index(point.depth) else colour,
                ms=5 if point.runs == 1 else 8, capsize=3, lw=1.2, zorder=3,
            )  # fmt: skip
        axis.set(xscale="log", xlim=(left, right), ylabel="GFLOP/s")
        axis.set_xlabel("floating-point operations per byte, least traffic")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        set_log_scale(axis, min(points["low"].min(), moved * left) / 1e9 / 1.3, flops / 1e9 * 1.3)
        axis.annotate(
            f"matrix products: {flops / 1e9:,.0f} GFLOP/s", (right, flops / 1e9), (-4, 5),
            textcoords="offset points", ha="right",
        )  # fmt: skip
        axis.annotate(
            f"memory: {moved / 1e9:,.0f} GB/s", (left * 1.1, moved * left * 1.1 / 1e9), (10, -4),
            textcoords="offset points", va="top",
        )  # fmt: skip
    return figure


def draw_scaling(frame: pd.DataFrame) -> Figure:
    """Cost and memory over runs, over depth, and over the variants of a seed.

    Args:
      frame: columns as `scaling.rows` gives them; points on fewer devices are left to the table.
    """
    common = frame[frame["devices"] == frame["devices"].max()]
    table2 = common[common["way"] == "table 2"]
    parts = [
        ("runs", "runs trained at once", "depth 2", table2[table2["depth"] == 2]),
        ("depth", "depth", "20 runs", table2[table2["runs"] == 20]),
        ("variants", "variants of each seed", "as in a study, depth 2",
         common[common["way"] == "study"]),
    ]  # fmt: skip
    handles = [
        make_handle("o", "-", color=_BLUE, lw=2, ms=5, label="measured"),
        make_handle("", ":", color=GREY, lw=1.5, label="in proportion to the first"),
    ]
    images, devices = int(common["images"].iloc[0]), int(common["devices"].iloc[0])
    note = (
        f"Epochs of {images:,} training images, {devices} device{'s' * (devices > 1)}; median, "
        "fastest and slowest; memory of the whole process."
    )
    with settings():
        figure, axes = lay_out((2, len(parts)), 2.2, handles, note, sharex=False, sharey=False)
        for (top, bottom), (name, label, title, part) in zip(axes.T, parts, strict=True):
            x, seconds = part[name].to_numpy(float), part["epoch_s"].to_numpy(float)
            for axis in (top, bottom):
                axis.set_xscale("log")
                axis.set_xticks(x, [f"{value:.0f}" for value in x])
                axis.xaxis.set_minor_locator(NullLocator())
            line = seconds[0] * x / x[0]
            top.plot(x, line, color=GREY, ls=":", lw=1.5)
            top.plot(x, seconds, color=_BLUE, marker="o", lw=2, ms=5, zorder=3)
            top.vlines(x, part["low"], part["high"], color=_BLUE, lw=1.2)
            set_log_scale(top, seconds.min(), max(*line, *seconds))
            memory = part["peak_memory_mb"].to_numpy(float) / 1e3
            bottom.plot(x, memory, color=_BLUE, marker="o", lw=2, ms=5, zorder=3)
            top.set(title=title, ylabel="seconds of an epoch")
            bottom.set(ylim=(0, 1.15 * memory.max()), xlabel=label, ylabel="peak memory [GB]")
    return figure
