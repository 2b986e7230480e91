"""The tables and files of a results folder of Table 2.

To add a column, add it here and fill it in `experiment`.
"""

from __future__ import annotations

import math

from unitnorm.run.records import About, Schema, Table

CELL = ("depth", "update", "run")  # what names a run
FILTERS = "filters.safetensors"  # (depth, update) → the first layer's filters of run 0


class AboutImages(About):
    """What the provenance says of the data."""

    name: str
    sha256: str
    image_shape: list[int]


SCHEMA = Schema(
    kind="table2",
    tables={
        "runs": Table(
            {
                "depth": "i", "update": "s", "run": "i", "seed": "i", "base_lr": "f",
                "epochs": "i", "train_loss": "f", "val_error": "f", "test_error": "f",
                "diverged": "b", "stop_reason": "s",
            },
            CELL,
        ),
        "history": Table(
            {
                "depth": "i", "update": "s", "run": "i", "epoch": "i", "lr": "f",
                "train_loss": "f", "train_error": "f", "val_error": "f", "val_loss": "f",
                "norm_deviation": "f", "norm_mean": "f",
            },
            (*CELL, "epoch"),
            later={"val_loss": math.nan},
        ),
        "sweep": Table(
            {
                "depth": "i", "update": "s", "run": "i", "seed": "i", "base_lr": "f",
                "val_error": "f", "train_loss": "f", "diverged": "b", "chosen": "b",
            },
            (*CELL, "base_lr"),
            descending=("base_lr",),
        ),
    },
    cell=CELL,
    about=AboutImages,
    required=(FILTERS,),
)  # fmt: skip
