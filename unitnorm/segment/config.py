"""The configuration of a segmentation: every number that its results depend on, with its range.

The defaults are a plain training, nothing changed at random but flips; what gave the results is in
`configs/`. To add a key, add a field here. Nothing here reads data or touches JAX.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from unitnorm.run.config import ExperimentConfig, Section, difference

Rate = Annotated[float, Field(gt=0.0, le=1e6)]
Pixels = Annotated[int, Field(ge=1, le=4096)]
Epochs = Annotated[int, Field(ge=1, le=100_000)]
Scale = Annotated[float, Field(gt=0.0, le=1.0)]


class ScenesConfig(Section):
    """Which images, and the size at which they are measured."""

    dataset: Literal["camvid", "synthetic"] = Field(
        "camvid", description="camvid, or road scenes that we draw (no data needed)"
    )
    data_dir: str | None = Field(None, description="the folder of CamVid, with train/ and the rest")
    height: Pixels = Field(90, description="rows of pixels")
    width: Pixels = Field(120, description="columns of pixels")


class SegNetConfig(Section):
    """SegNet-Basic."""

    features: Annotated[int, Field(ge=1, le=4096)] = Field(64, description="filters per layer")
    kernel_size: Annotated[int, Field(ge=1, le=31)] = Field(7, description="odd")
    convolution: Literal["auto", "direct", "fourier"] = Field(
        "auto",
        description="the same up to rounding: XLA's own, or, in large layers, through Fourier "
        "transforms of tiles, which is faster on a CPU; auto: these there, XLA's elsewhere",
    )
    stages: Annotated[int, Field(ge=1, le=8)] = Field(4, description="encoders, and decoders")
    bn_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.9, description="weight of the old value in the running mean and variance"
    )
    bn_epsilon: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        1e-5, description="added to the variance inside batch normalisation"
    )
    dtype: Literal["float32", "tensorfloat32", "bfloat16"] = Field(
        "float32",
        description="of the convolutions; parameters and statistics are float32. tensorfloat32: "
        "float32, whose factors a device that is faster at it may round to 10 bits",
    )

    @field_validator("kernel_size")
    @classmethod
    def _odd(cls, size: int) -> int:
        if size % 2 == 0:
            raise ValueError("expected an odd number, which has a middle")
        return size


class Augmentation(Section):
    """What is changed at random in each training image, alike for all updates."""

    flip: bool = Field(True, description="left to right, half of the images")
    zoom: Annotated[float, Field(ge=1.0, le=8.0)] = Field(
        1.0,
        description="scaled by 1/zoom to zoom, uniform in the logarithm; never to less than the "
        "part that is trained on",
    )
    brightness: Annotated[float, Field(ge=0.0, le=2.0)] = Field(
        0.0, description="times e^x, x uniform within ± this"
    )
    colour: Annotated[float, Field(ge=0.0, le=2.0)] = Field(
        0.0, description="red, green and blue each times e^x, x uniform within ± this"
    )


class Stage(Section):
    """Epochs on images of a part of their size."""

    epochs: Epochs
    scale: Scale


class SegmentTraining(Section):
    """The training, the same for every update but for its learning rate."""

    epochs: Epochs = Field(100, description="in all; the paper's 100")
    stages: list[Stage] = Field([], description="the first epochs, at a part of the size")
    crop: Annotated[list[Pixels], Field(min_length=2, max_length=2)] = Field(
        [4096, 4096], description="height and width of the part of an image trained on, at most"
    )
    batch_size: Annotated[int, Field(ge=2, le=10_000)] = Field(
        8, description="images per mini-batch, over all devices; a multiple of their number"
    )
    decay: Literal["none", "cosine"] = Field(
        "cosine", description="learning rate: constant, or down to zero along half a cosine"
    )
    class_weights: Literal["median", "published", "none"] = Field(
        "median",
        description="in the loss: by median frequency, the SegNet authors' own numbers, or 1",
    )
    class_prior: Literal["weights", "labels"] = Field(
        "weights",
        description="where it is measured: the classes as frequent as the loss weighs them, or, "
        "with its weights divided out of the probabilities, as the labels have them",
    )
    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.0, description="of all parameters but the filters (the authors: 5e-4, of all)"
    )
    measure_every: Epochs = Field(1, description="epochs between measurements on val")
    statistics: Literal["batches", "anew", "running"] = Field(
        "running",
        description="of batch normalisation where it is measured: averaged anew over an epoch's "
        "mini-batches, cut out and changed as in training, or (anew) over whole training images, "
        "as the authors' code does; or the running ones",
    )

    def scale_of(self, epoch: int) -> float:
        """The part of the size at which an epoch, counted from 0, is trained."""
        for stage in self.stages:
            if epoch < stage.epochs:
                return stage.scale
            epoch -= stage.epochs
        return 1.0


class SegmentSweep(Section):
    """The choice of an update's base learning rate, on training images that are held out."""

    rates: list[Rate] = Field([0.1, 0.3, 1.0, 3.0], min_length=1, max_length=64)
    epochs: Epochs = Field(10, description="of each rate")
    scale: Scale = Field(1.0, description="part of the size, for training and measurement")
    held_out: str = Field("0006R0", description="the sequence of train/ that is measured on")


class SegmentConfig(ExperimentConfig):
    """One experiment. `updates` and `runs` select what is trained; the rest is protocol."""

    selection: ClassVar[frozenset[str]] = frozenset({"updates", "runs"})

    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = Field(0, description="run k has seed + k")
    runs: Annotated[int, Field(ge=1, le=10_000)] = Field(1, description="of each update")
    updates: list[str] = Field(["b-sgd", "un"], min_length=1, max_length=64)
    learning_rates: dict[str, Rate] = Field(
        {"b-sgd": 1.0, "un": 1.0},
        description="base learning rates; an update without one is given the sweep's",
    )
    data: ScenesConfig = ScenesConfig()
    network: SegNetConfig = SegNetConfig()
    augmentation: Augmentation = Augmentation()
    train: SegmentTraining = SegmentTraining()
    sweep: SegmentSweep = SegmentSweep()

    @field_validator("updates")
    @classmethod
    def _known(cls, updates: list[str]) -> list[str]:
        from unitnorm.updates import check_update_name  # which imports JAX

        return list(dict.fromkeys(map(check_update_name, updates)))

    def protocol_of(self, update: str, rate: float) -> dict[str, Any]:
        """Everything that changes the numbers of one update, trained at one rate."""
        return self.protocol() | {"learning_rates": {update: rate}}

    def conflict(self, recorded: Any) -> str | None:
        """As for every config; but a rate of an update that is new to the records is none."""
        mine = json.loads(json.dumps(self.protocol()))
        try:
            rates = {**mine["learning_rates"], **recorded["learning_rates"]}
            mine["learning_rates"] |= {
                k: mine["learning_rates"].get(k, v) for k, v in rates.items()
            }
            recorded = {**recorded, "learning_rates": rates}
        except (TypeError, KeyError, AttributeError):
            pass
        return None if recorded == mine else difference(recorded, mine)
