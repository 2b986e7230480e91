"""The configuration of a segmentation: every number that its results depend on, with its range.

The defaults are those of `configs/segnet_cpu.toml`. To add a key, add a field here. Nothing
here reads data or touches JAX.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from unitnorm.run import config as base
from unitnorm.run.config import Section

Rate = Annotated[float, Field(gt=0.0, le=1e6)]


class Data(Section):
    """Which images, and at which size they are trained and measured."""

    dataset: Literal["camvid", "synthetic"] = Field(
        "camvid", description="camvid, or road scenes that we draw (no data needed)"
    )
    data_dir: str | None = Field(None, description="the folder of CamVid, with train/ and the rest")
    height: Annotated[int, Field(ge=1, le=4096)] = Field(90, description="rows of pixels")
    width: Annotated[int, Field(ge=1, le=4096)] = Field(120, description="columns of pixels")
    flip: bool = Field(True, description="flip half of the training images, left to right")


class Network(Section):
    """SegNet-Basic."""

    features: Annotated[int, Field(ge=1, le=4096)] = Field(64, description="filters per layer")
    kernel_size: Annotated[int, Field(ge=1, le=31)] = Field(7, description="odd")
    convolution: Literal["direct", "fourier"] = Field(
        "fourier",
        description="the same up to rounding: XLA's own, or, in large layers, through Fourier "
        "transforms of tiles, which is faster on a CPU",
    )
    stages: Annotated[int, Field(ge=1, le=8)] = Field(4, description="encoders, and decoders")
    bn_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.9, description="weight of the old value in the running mean and variance"
    )
    bn_epsilon: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        1e-5, description="added to the variance inside batch normalisation"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the convolutions; parameters and statistics are float32"
    )

    @field_validator("kernel_size")
    @classmethod
    def _odd(cls, size: int) -> int:
        if size % 2 == 0:
            raise ValueError("expected an odd number, which has a middle")
        return size


class Train(Section):
    """The training, the same for every update but for its learning rate."""

    epochs: Annotated[int, Field(ge=1, le=100_000)] = Field(100, description="the paper's 100")
    batch_size: Annotated[int, Field(ge=2, le=10_000)] = Field(
        8, description="images per mini-batch, over all devices; a multiple of their number"
    )
    decay: Literal["none", "cosine"] = Field(
        "cosine", description="learning rate: constant, or down to zero along half a cosine"
    )
    class_weights: bool = Field(True, description="median-frequency weights in the loss")


class SegmentConfig(Section):
    """One experiment. `updates` selects what is trained; the rest is protocol."""

    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    updates: list[str] = Field(["b-sgd", "un"], min_length=1, max_length=64)
    learning_rates: dict[str, Rate] = Field(
        {"b-sgd": 1.0, "un": 1.0}, description="base learning rate of each update"
    )
    data: Data = Data()
    network: Network = Network()
    train: Train = Train()

    @field_validator("updates")
    @classmethod
    def _known(cls, updates: list[str]) -> list[str]:
        from unitnorm.updates import UPDATES

        for name in updates:
            if name not in UPDATES:
                raise ValueError(f"{name!r} is not an update; allowed: {', '.join(UPDATES)}")
        return list(dict.fromkeys(updates))

    @model_validator(mode="after")
    def _rates(self) -> SegmentConfig:
        for name in self.updates:
            if name not in self.learning_rates:
                raise ValueError(
                    f"{name} has no learning rate; add --set learning_rates.{name}=1.0 or the "
                    "like, or the key to the file"
                )
        return self

    def protocol(self, update: str | None = None) -> dict[str, Any]:
        """Everything that changes numbers: of all updates, or of one alone."""
        values = self.model_dump(exclude={"updates": True, "data": {"data_dir"}})
        if update is not None:
            values["learning_rates"] = {update: self.learning_rates[update]}
        return values

    def fingerprint(self, update: str | None = None) -> str:
        """SHA-256 of `protocol`."""
        text = json.dumps(self.protocol(update), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def load(path: str | Path | None, overrides: dict[str, Any]) -> SegmentConfig:
    """Read a TOML file (None: the defaults), put `overrides` (dotted key → value) on top, check.

    Raises:
      UserError: as `unitnorm.table2.config.load`.
    """
    return base.load(path, overrides, SegmentConfig)
