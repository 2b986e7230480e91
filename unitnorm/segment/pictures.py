"""What a segmentation looks like: Figure 2 of the paper, single photos, and the training's curves.

In the style of `unitnorm.report.style`, whose settings and `encode` are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from unitnorm.report import style
from unitnorm.segment.palette import COLOURS, NAMES, coloured

TALLEST = 12.0  # inches


def draw_samples(
    images: Sequence[NDArray[np.uint8]],
    truth: Sequence[NDArray[np.uint8]],
    predictions: Mapping[str, Sequence[NDArray[np.uint8]]],
) -> Figure:
    """Figure 2: a column per image; below it the ground truth and each prediction.

    Args:
      images: uint8 (h, w, 3), all of one size.
      truth: labels uint8 (h, w) of each image.
      predictions: by the title of their row, labels of each image.
    """
    rows = {"image": list(images), "ground truth": [coloured(labels) for labels in truth]}
    rows |= {title: [coloured(x) for x in labels] for title, labels in predictions.items()}
    return _draw_grid(rows, [*NAMES, "unlabelled"])


def draw_photo(image: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Figure:
    """One photo and its prediction: beside each other, or stacked if it is very wide.

    Args:
      image: uint8 (h, w, 3).
      labels: uint8 (h, w).
    """
    height, width = labels.shape
    pictures = [image, coloured(labels)]
    stacked = width > 2 * height
    rows = {" " * i: [picture] for i, picture in enumerate(pictures)} if stacked else {"": pictures}
    return _draw_grid(rows, list(NAMES))


def draw_curves(metrics: pd.DataFrame, history: pd.DataFrame) -> Figure:
    """Training loss, and global accuracy, class average and mean IoU on val, over the epochs.

    A thin line per run; where there are several, their mean in bold.
    """
    val = metrics[metrics["split"] == "val"]
    panels = [
        (history, "train_loss", 1, "training loss"),
        (val, "global_accuracy", 100, "global accuracy on val [%]"),
        (val, "class_accuracy", 100, "class average on val [%]"),
        (val, "mean_iou", 100, "mean IoU on val [%]"),
    ]
    styles = style.assign_styles(history["update"])
    with style.settings():
        figure, axes = style.lay_out(
            2, 2, 2.4, style.make_handles(styles, markers=False), "", sharey=False
        )
        for axis, (table, column, factor, name) in zip(axes.flat, panels, strict=True):
            # the first on top: its dashes show the line below where the two coincide
            for update, drawn in reversed(styles.items()):
                rows = table[table["update"] == update]
                lines = factor * rows.pivot(index="epoch", columns="run", values=column)
                if lines.shape[1] > 1:
                    axis.plot(lines.index, lines, color=drawn.colour, lw=0.5, alpha=0.5)
                axis.plot(
                    lines.index, lines.mean(axis=1), color=drawn.colour, ls=drawn.line, lw=1.5
                )
            axis.set_ylabel(name)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        for axis in axes[-1]:
            axis.set_xlabel("epoch")
        return figure


def _draw_grid(rows: Mapping[str, Sequence[NDArray[np.uint8]]], classes: list[str]) -> Figure:
    """Pictures of one size, a row each with its title, above a legend of classes."""
    columns = len(next(iter(rows.values())))
    height, width = next(iter(rows.values()))[0].shape[:2]
    tall = style.WIDTH / columns * height / width * len(rows) + 0.5
    with style.settings():
        tight = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
        figure = Figure(figsize=(style.WIDTH, min(tall, TALLEST)), layout=tight)
        axes = figure.subplots(len(rows), columns, squeeze=False)
        for line, (title, pictures) in zip(axes, rows.items(), strict=True):
            for axis, picture in zip(line, pictures, strict=True):
                axis.imshow(picture, interpolation="none")
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
            line[0].set_ylabel(title)
        handles = [
            Patch(facecolor=colour / 255, edgecolor=style.GREY, lw=0.4, label=name)
            for name, colour in zip(classes, COLOURS, strict=False)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=6)
        return figure
