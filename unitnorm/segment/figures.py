"""What a segmentation looks like: Figure 2 of the paper, single photos, and the training's curves.

In the style of `unitnorm.report.style`, whose settings and `encode` are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from unitnorm.report import style as base
from unitnorm.report.style import label
from unitnorm.segment.palette import COLOURS, NAMES, coloured

_GAP, _LEGEND = 0.05, 0.5  # inches


def samples(
    images: Sequence[NDArray[np.uint8]],
    truth: Sequence[NDArray[np.uint8]] | None,
    predictions: Mapping[str, Sequence[NDArray[np.uint8]]],
) -> Figure:
    """Figure 2: a column per image; below it the ground truth and each prediction.

    Args:
      images: uint8 (h, w, 3), all of one size.
      truth: labels uint8 (h, w) of each image.
      predictions: by the title of their row, labels of each image.
    """
    rows = {"image": list(images)}
    if truth is not None:
        rows["ground truth"] = [coloured(labels) for labels in truth]
    rows |= {title: [coloured(x) for x in labels] for title, labels in predictions.items()}
    height, width = images[0].shape[:2]
    margin = 0.22
    wide = (base.WIDTH - margin - 0.05 - _GAP * (len(images) - 1)) / len(images)
    tall = wide * height / width
    total = _LEGEND + len(rows) * (tall + _GAP)
    with base.settings():
        figure = Figure(figsize=(base.WIDTH, total))
        for place, (title, pictures) in enumerate(rows.items()):
            bottom = total - (place + 1) * (tall + _GAP) + _GAP
            for column, picture in enumerate(pictures):
                left = margin + column * (wide + _GAP)
                _picture(figure, picture, left, bottom, wide, tall)
            x, y = margin / 2 / base.WIDTH, (bottom + tall / 2) / total
            figure.text(x, y, title, rotation=90, ha="center", va="center")
        _legend(figure, with_unlabelled=truth is not None)
        return figure


def photo(image: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Figure:
    """One photo and its prediction: beside each other, or stacked if it is very wide.

    Args:
      image: uint8 (h, w, 3).
      labels: uint8 (h, w).
    """
    height, width = labels.shape
    stacked = width > 2 * height
    columns, rows = (1, 2) if stacked else (2, 1)
    # tall photos are limited in height, and everything stays large enough to be seen
    wide = (base.WIDTH - 0.1 - _GAP * (columns - 1)) / columns
    tall = min(wide * height / width, 6.0)
    wide = max(tall * width / height, 0.01)
    tall = max(tall, 0.01)
    total = _LEGEND + rows * (tall + _GAP)
    left = (base.WIDTH - columns * wide - (columns - 1) * _GAP) / 2
    with base.settings():
        figure = Figure(figsize=(base.WIDTH, total))
        for place, picture in enumerate((image, coloured(labels))):
            column, row = (0, place) if stacked else (place, 0)
            bottom = total - (row + 1) * (tall + _GAP) + _GAP
            _picture(figure, picture, left + column * (wide + _GAP), bottom, wide, tall)
        _legend(figure, with_unlabelled=False)
        return figure


def curves(metrics: pd.DataFrame, history: pd.DataFrame) -> Figure:
    """Training loss, and global accuracy, class average and mean IoU on val, over the epochs."""
    val = metrics[metrics["split"] == "val"]
    panels = [
        (history, "loss", 1, "training loss"),
        (val, "global_accuracy", 100, "global accuracy on val [%]"),
        (val, "class_accuracy", 100, "class average on val [%]"),
        (val, "mean_iou", 100, "mean IoU on val [%]"),
    ]
    styles = base.assign_styles(history["update"])
    with base.settings():
        figure = Figure(figsize=(base.WIDTH, 5.2), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True)
        for axis, (table, column, factor, name) in zip(axes.flat, panels, strict=True):
            # the first on top: its dashes show the line below where the two coincide
            for update, drawn in reversed(styles.items()):
                rows = table[table["update"] == update].sort_values("epoch")
                axis.plot(
                    rows["epoch"], factor * rows[column], color=drawn.colour, ls=drawn.line, lw=1.5
                )
            axis.set_ylabel(name)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        for axis in axes[-1]:
            axis.set_xlabel("epoch")
        handles = [
            Line2D([], [], color=s.colour, ls=s.line, lw=1.5, label=label(update))
            for update, s in styles.items()
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=5, handlelength=3.2)
        return figure


def _picture(
    figure: Figure, picture: NDArray, left: float, bottom: float, wide: float, tall: float
) -> None:
    width, height = figure.get_size_inches()
    axis = figure.add_axes((left / width, bottom / height, wide / width, tall / height))
    axis.imshow(picture, interpolation="none", aspect="auto")
    axis.set_axis_off()


def _legend(figure: Figure, *, with_unlabelled: bool) -> None:
    names = [*NAMES, "unlabelled"] if with_unlabelled else list(NAMES)
    handles = [
        Patch(facecolor=colour / 255, edgecolor="#666666", lw=0.4, label=name)
        for name, colour in zip(names, COLOURS, strict=False)
    ]
    figure.legend(
        handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0.0), ncols=6,
        handlelength=1.1, handleheight=1.0, columnspacing=1.6, borderpad=0.1, borderaxespad=0.1,
    )  # fmt: skip
