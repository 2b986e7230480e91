"""The experiment's configuration: every number that the protocol depends on, with its range.

The defaults are the paper's protocol (section 4) and equal `configs/table2.toml`. To add a key, add
a field here with its bounds; the command line, the checks and the provenance follow from it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, Field, field_validator, model_validator

from unitnorm.errors import UserError
from unitnorm.run.config import ExperimentConfig, Section, check_updates

Count = Annotated[int, Field(ge=1, le=10_000_000)]
Epochs = Annotated[int, Field(ge=1, le=100_000)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(gt=0.0, le=1e6)]


def check_distinct(rates: list[float]) -> list[float]:
    """Raise ValueError where a rate stands twice: as a float32 it names a row of the records."""
    if len({np.float32(rate) for rate in rates}) < len(rates):
        raise ValueError("each rate may stand once (they are kept as float32)")
    return rates


Rates = Annotated[list[Rate], Field(min_length=1, max_length=64), AfterValidator(check_distinct)]
WARM = 0.1  # the part of a training in which the schedule "warm-up" rises


class Data(Section):
    """Which images. `mnist` ships with the package."""

    dataset: Annotated[str, Field(min_length=1)] = "mnist"  # or a prepared TFDS data set
    data_dir: str | None = None  # a folder with four IDX files of your own


class Model(Section):
    """ArchBN (paper, section 2)."""

    # filters per layer; even, because pooling joins pairs
    width: Annotated[int, Field(ge=2, le=65_536, multiple_of=2)] = 64
    # which two features are pooled: (2i, 2i+1), or (i, i + width/2)
    pool_pairs: Literal["adjacent", "halves"] = "adjacent"
    # weight of the old value in the running mean and variance
    bn_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    bn_epsilon: Fraction = 1e-5  # added to the variance inside batch normalisation


class Loss(Section):
    """Cross-entropy over the mini-batch."""

    # images per mini-batch, at least 2 (a batch of 1 has no variance)
    batch_size: Annotated[int, Field(ge=2, le=1_000_000)] = 100
    reduction: Literal["sum", "mean"] = "sum"  # how the mini-batch's losses are joined


class Sweep(Section):
    """The choice of the base learning rate (section 4, second paragraph)."""

    rates: Rates = Field([1e-2, 1e-3, 1e-4, 1e-5])
    train_images: Count = 1_000  # drawn at random per run
    validation_images: Count = 500  # the same
    epochs: Epochs = 50  # at a fixed rate

    @property
    def min_epochs(self) -> int:
        """A sweep has no early stop."""
        return self.epochs

    @property
    def max_epochs(self) -> int:
        """`epochs`, by the name that a full training has for them."""
        return self.epochs

    @field_validator("rates")
    @classmethod
    def _largest_first(cls, rates: list[float]) -> list[float]:
        return sorted(rates, reverse=True)


class Train(Section):
    """The full training of a run."""

    train_images: Count = 50_000  # drawn at random per run
    validation_images: Count = 10_000  # held out to decide stopping
    min_epochs: Epochs = 25
    max_epochs: Epochs = 60

    @model_validator(mode="after")
    def _ordered(self) -> Train:
        if self.min_epochs > self.max_epochs:
            raise ValueError(
                f"min_epochs = {self.min_epochs} is above max_epochs = {self.max_epochs}"
            )
        return self


Sizes = Sweep | Train


class BoldDriver(Section):
    """Annealing (Battiti 1989; the paper's [19])."""

    watch: Literal["train_loss", "val_error"] = "train_loss"  # decides between `up` and `down`
    up: Annotated[float, Field(ge=1.0, le=10.0)] = 1.05  # after a decrease
    down: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5  # after an increase


class Stopping(Section):
    """When a run ends, from `train.min_epochs` on."""

    train_error: Fraction = 1e-5  # stop when the training error is below this
    # stop when the validation error is above that of so many epochs before
    lookback: Annotated[int, Field(ge=1, le=1_000)] = 5
    flat: Fraction = 1e-5  # stop when two successive validation errors differ by less
    # a run that ends with a validation error of at least this, and a training loss above that of
    # its first epoch, has diverged, like one whose loss is not finite
    diverged_error: Fraction = 0.8


class Config(ExperimentConfig):
    """One experiment. `runs`, `depths` and `updates` select what is run; the rest is protocol."""

    selection = frozenset({"runs", "depths", "updates"})

    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0  # run k has seed + k
    runs: Annotated[int, Field(ge=1, le=100_000)] = 10  # of each cell
    depths: list[Annotated[int, Field(ge=1, le=64)]] = Field([2, 4], min_length=1, max_length=64)
    updates: list[str] = Field(["b-sgd", "un"], min_length=1, max_length=64)
    data: Data = Data()
    model: Model = Model()
    loss: Loss = Loss()
    sweep: Sweep = Sweep()
    train: Train = Train()
    bold_driver: BoldDriver = BoldDriver()
    stopping: Stopping = Stopping()

    _known = field_validator("updates")(check_updates)

    def __hash__(self) -> int:
        """Its lists have none; equal configs, which programs are kept by, have equal protocols."""
        return hash(self.fingerprint())

    @field_validator("depths")
    @classmethod
    def _once(cls, depths: list[int]) -> list[int]:
        return list(dict.fromkeys(depths))

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.seed + self.runs > 2**31:
            raise ValueError(f"seed + runs = {self.seed + self.runs} is above 2^31")
        size = self.loss.batch_size
        for name in ("sweep", "train"):
            images = getattr(self, name).train_images
            if images < size:
                raise ValueError(
                    f"loss.batch_size = {size} is above {name}.train_images = {images}"
                )
        return self

    def check_images(self, available: int, phases: tuple[str, ...] = ("sweep", "train")) -> None:
        """Refuse more training and validation images, in these phases, than the data has.

        Raises:
          UserError: naming the section, the counts and the images available.
        """
        for name in phases:
            part = getattr(self, name)
            wanted = part.train_images + part.validation_images
            if wanted > available:
                raise UserError(
                    f"config: {name}.train_images + {name}.validation_images = {wanted}, but the "
                    f"data set has {available} training images; allowed: at most {available}"
                )
