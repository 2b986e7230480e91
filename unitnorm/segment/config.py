"""The configuration of a segmentation: every number that its results depend on, with its range.

The defaults are a plain training, nothing changed at random but flips; what gave the results is in
`configs/`. To add a key, add a field here. Nothing here reads data or touches JAX.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator

from unitnorm.archbn.config import Epochs, Rate, Rates
from unitnorm.run.config import ExperimentConfig, Section, check_updates

Pixels = Annotated[int, Field(ge=1, le=4096)]
Scale = Annotated[float, Field(gt=0.0, le=1.0)]


def current_name(statistics: Any) -> Any:
    """A value of `train.statistics`; older configs and records call "images" "anew"."""
    return "images" if statistics == "anew" else statistics


class ScenesConfig(Section):
    """Which images, and the size at which they are measured."""

    dataset: Literal["camvid", "synthetic"] = "camvid"  # synthetic: road scenes that we draw
    data_dir: str | None = None  # the folder of CamVid
    height: Pixels = 90  # rows of pixels
    width: Pixels = 120  # columns of pixels


class SegNetConfig(Section):
    """SegNet-Basic."""

    features: Annotated[int, Field(ge=1, le=4096)] = 64  # filters per layer
    kernel_size: Annotated[int, Field(ge=1, le=31)] = 7  # odd
    # The same up to rounding: XLA's own, or, in large layers, through Fourier transforms of tiles,
    # which is faster on a CPU; auto: these there, XLA's elsewhere.
    convolution: Literal["auto", "direct", "fourier"] = "auto"
    stages: Annotated[int, Field(ge=1, le=8)] = 4  # encoders, and decoders
    # weight of the old value in the running mean and variance
    bn_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    bn_epsilon: Annotated[float, Field(ge=0.0, le=1.0)] = 1e-5  # added to the variance
    # Of the convolutions; parameters and statistics are float32. tensorfloat32: float32, whose
    # factors a device that is faster at it may round to 10 bits.
    dtype: Literal["float32", "tensorfloat32", "bfloat16"] = "float32"

    @field_validator("kernel_size")
    @classmethod
    def _odd(cls, size: int) -> int:
        if size % 2 == 0:
            raise ValueError("expected an odd number, which has a middle")
        return size


class Augmentation(Section):
    """What is changed at random in each training image, alike for all updates."""

    flip: bool = True  # left to right, half of the images
    # scaled by 1/zoom to zoom, uniform in the logarithm; never to less than the part trained on
    zoom: Annotated[float, Field(ge=1.0, le=8.0)] = 1.0
    brightness: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0  # times e^x, x uniform within ± this
    colour: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0  # the same of red, green and blue each


class Stage(Section):
    """Epochs on images of a part of their size."""

    epochs: Epochs
    scale: Scale


class SegmentTraining(Section):
    """The training, the same for every update but for its learning rate."""

    epochs: Epochs = 100  # in all; the paper's 100
    stages: list[Stage] = Field([])  # the first epochs, at a part of the size
    # height and width of the part of an image trained on, at most
    crop: list[Pixels] = Field([4096, 4096], min_length=2, max_length=2)
    # images per mini-batch, over all devices; a multiple of their number
    batch_size: Annotated[int, Field(ge=2, le=10_000)] = 8
    decay: Literal["none", "cosine"] = "cosine"  # of the learning rate, to zero
    # in the loss: by median frequency, the SegNet authors' own numbers, or 1
    class_weights: Literal["median", "published", "none"] = "median"
    # Where it is measured: the classes as frequent as the loss weighs them, or, with its weights
    # divided out of the probabilities, as the labels have them.
    class_prior: Literal["weights", "labels"] = "weights"
    # of all parameters but the filters (the authors: 5e-4, of all)
    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    measure_every: Epochs = 1  # epochs between measurements on val
    # Of batch normalisation where it is measured: the running ones, or the mean over an epoch's
    # mini-batches, cut out and changed as in training, or over mini-batches of whole training
    # images, as in the authors' code.
    statistics: Annotated[
        Literal["batches", "images", "running"], BeforeValidator(current_name)
    ] = "running"

    def scales(self) -> list[float]:
        """Of each epoch, the part of the size at which it is trained."""
        first = [stage.scale for stage in self.stages for _ in range(stage.epochs)]
        return (first + [1.0] * self.epochs)[: self.epochs]


class SegmentSweep(Section):
    """The choice of an update's base learning rate, on training images that are held out."""

    rates: Rates = Field([0.1, 0.3, 1.0, 3.0])
    epochs: Epochs = 10  # of each rate
    scale: Scale = 1.0  # part of the size, for training and measurement
    held_out: str = "0006R0"  # the sequence of train/ that is measured on


class SegmentConfig(ExperimentConfig):
    """One experiment. `updates` and `runs` select what is trained; the rest is protocol."""

    selection: ClassVar[frozenset[str]] = frozenset({"updates", "runs"})

    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0  # run k has seed + k
    runs: Annotated[int, Field(ge=1, le=10_000)] = 1  # of each update
    updates: list[str] = Field(["b-sgd", "un"], min_length=1, max_length=64)
    # base learning rates; an update without one is given the sweep's
    learning_rates: dict[str, Rate] = Field({"b-sgd": 1.0, "un": 1.0})
    data: ScenesConfig = ScenesConfig()
    network: SegNetConfig = SegNetConfig()
    augmentation: Augmentation = Augmentation()
    train: SegmentTraining = SegmentTraining()
    sweep: SegmentSweep = SegmentSweep()

    _known = field_validator("updates")(check_updates)

    def conflict(self, recorded: Any) -> str | None:
        """As for every config; but a rate of an update that is new to the records is none."""
        try:
            rates, train = recorded["learning_rates"], recorded["train"]
            train = train | {"statistics": current_name(train["statistics"])}
            recorded = recorded | {"learning_rates": self.learning_rates | rates, "train": train}
        except (TypeError, KeyError):  # records that were changed by hand
            return super().conflict(recorded)
        mine = self.model_copy(update={"learning_rates": rates | self.learning_rates})
        return super(SegmentConfig, mine).conflict(recorded)
