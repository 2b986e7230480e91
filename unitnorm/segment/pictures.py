"""What a segmentation looks like: Figure 2 of the paper, photos, and the training's curves."""

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
from unitnorm.segment.palette import COLOURS, NAMES

TALLEST = 12.0  # inches
Images = Sequence[NDArray[np.uint8]]


def draw_samples(images: NDArray[np.uint8], labels: Mapping[str, Images]) -> Figure:
    """Figure 2: a column per image (h, w, 3), below it the labels (h, w) of each titled row."""
    rows = {title: [COLOURS[x] for x in row] for title, row in labels.items()}
    return _draw_grid({"image": list(images)} | rows, [*NAMES, "unlabelled"])


def draw_photo(image: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Figure:
    """A photo (h, w, 3) and its prediction (h, w), beside each other; stacked if it is wide."""
    height, width = labels.shape
    rows: dict[str, Images] = {"": [image, COLOURS[labels]]}
    if width > 2 * height:
        rows = {"": [image], " ": [COLOURS[labels]]}
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
        handles = style.make_handles(styles, markers=False)
        figure, axes = style.lay_out((2, 2), 2.4, handles, "", sharey=False)
        for axis, (table, column, factor, name) in zip(axes.flat, panels, strict=True):
            # the first on top: its dashes show the line below where the two coincide
            for update, (colour, dashes, _) in reversed(styles.items()):
                rows = table[table["update"] == update]
                lines = factor * rows.pivot(index="epoch", columns="run", values=column)
                if lines.shape[1] > 1:
                    axis.plot(lines.index, lines, color=colour, lw=0.5, alpha=0.5)
                axis.plot(lines.index, lines.mean(axis=1), color=colour, ls=dashes, lw=1.5)
            axis.set_ylabel(name)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        for axis in axes[-1]:
            axis.set_xlabel("epoch")
        return figure


def _draw_grid(rows: Mapping[str, Images], classes: list[str]) -> Figure:
    """Pictures of one size, a row each with its title, above a legend of classes."""
    first = next(iter(rows.values()))
    columns, (height, width) = len(first), first[0].shape[:2]
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
