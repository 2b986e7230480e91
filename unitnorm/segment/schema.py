"""The tables and files of a results folder of segmentations.

`UPDATE.safetensors` holds the best weights of an update's run 0, see `weights`. To add a column,
add it here and fill it in `experiment`.
"""

from unitnorm.run.records import About, Schema, Table
from unitnorm.segment.palette import NAMES

CELL = ("update", "run")  # what names a run
RUN = {"update": "s", "run": "i"}
ALL = "all"  # the sequence of the rows that count all images of a split
FIGURES = ("global_accuracy", "class_accuracy", "mean_iou")
COLUMNS = (*FIGURES, *NAMES)


class AboutScenes(About):
    """What the provenance says of the data."""

    name: str
    sha256: str
    images: dict[str, int]
    height: int
    width: int


SCHEMA = Schema(
    kind="segmentation",
    tables={
        # of a run whose training is complete; the epoch with the highest mean IoU on val
        "runs": Table(
            RUN | {"seed": "i", "base_lr": "f", "epochs": "i", "best_epoch": "i"}, CELL
        ),
        # loss: mean over the epoch's mini-batches; norm_deviation: max |‖w‖ − 1| of the filters
        "history": Table(
            RUN | {"epoch": "i", "scale": "f", "lr": "f", "train_loss": "f", "norm_deviation": "f"},
            (*CELL, "epoch"),
        ),
        # fractions; by class the IoU, empty where undefined. val where it was measured; test of
        # the best epoch and the last, also by sequence
        "metrics": Table(
            RUN | {"split": "s", "sequence": "s", "epoch": "i"} | dict.fromkeys(COLUMNS, "f"),
            (*CELL, "split", "sequence", "epoch"),
        ),
        # on the training images held out
        "sweep": Table(
            RUN | {"seed": "i", "base_lr": "f", "train_loss": "f"} | dict.fromkeys(FIGURES, "f")
            | {"chosen": "b"},
            (*CELL, "base_lr"), descending=("base_lr",),
        ),
    },
    cell=CELL,
    files=r"\w[\w.+:=@-]*\.safetensors",
    about=AboutScenes,
)  # fmt: skip
