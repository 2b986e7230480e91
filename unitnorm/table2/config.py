"""The experiment's configuration: every number that the protocol depends on, with its range.

The defaults are the paper's protocol (section 4) and equal `configs/table2.toml`. To add a key, add
a field here with its bounds and one line of description; the command line, the checks and the
provenance follow from it. Nothing here reads data or touches JAX.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, overload

import pydantic
from pydantic import ConfigDict, Field, field_validator, model_validator

from unitnorm.errors import UserError

Count = Annotated[int, Field(ge=1, le=10_000_000)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(pydantic.BaseModel):
    """Strict by default: an unknown key or a wrong type is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Schema = TypeVar("Schema", bound=Section)


class Data(Section):
    """Which images. `mnist` ships with the package."""

    dataset: str = Field("mnist", min_length=1, description="mnist, or a prepared TFDS data set")
    data_dir: str | None = Field(None, description="a folder with four IDX files of your own")


class Model(Section):
    """ArchBN (paper, section 2)."""

    width: Annotated[int, Field(ge=2, le=65_536, multiple_of=2)] = Field(
        64, description="filters per layer; even, because pooling joins pairs"
    )
    pool_pairs: Literal["adjacent", "halves"] = Field(
        "adjacent", description="which two features are pooled: (2i, 2i+1), or (i, i + width/2)"
    )
    bn_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.99, description="weight of the old value in the running mean and variance"
    )
    bn_epsilon: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        1e-5, description="added to the variance inside batch normalisation"
    )


class Loss(Section):
    """Cross-entropy over the mini-batch."""

    batch_size: Annotated[int, Field(ge=2, le=1_000_000)] = Field(
        100, description="images per mini-batch, at least 2 (a batch of 1 has no variance)"
    )
    reduction: Literal["sum", "mean"] = Field(
        "sum", description="how the mini-batch's losses are joined"
    )


class Sweep(Section):
    """The choice of the base learning rate (section 4, second paragraph)."""

    rates: list[Annotated[float, Field(gt=0.0, le=1e6)]] = Field(
        [1e-2, 1e-3, 1e-4, 1e-5], min_length=1, max_length=64, description="candidate rates 10^-p"
    )
    train_images: Count = Field(1_000, description="training images, drawn at random per run")
    validation_images: Count = Field(500, description="validation images, drawn at random per run")
    epochs: Annotated[int, Field(ge=1, le=100_000)] = Field(50, description="at a fixed rate")

    @field_validator("rates")
    @classmethod
    def _distinct(cls, rates: list[float]) -> list[float]:
        if len(set(rates)) != len(rates):
            raise ValueError("each rate may stand once")
        return sorted(rates, reverse=True)


class Train(Section):
    """The full training of a run."""

    train_images: Count = Field(50_000, description="training images, drawn at random per run")
    validation_images: Count = Field(10_000, description="the images held out to decide stopping")
    min_epochs: Annotated[int, Field(ge=1, le=100_000)] = 25
    max_epochs: Annotated[int, Field(ge=1, le=100_000)] = 60

    @model_validator(mode="after")
    def _ordered(self) -> Train:
        if self.min_epochs > self.max_epochs:
            raise ValueError(
                f"min_epochs = {self.min_epochs} is above max_epochs = {self.max_epochs}"
            )
        return self


class BoldDriver(Section):
    """Annealing (Battiti 1989; the paper's [19])."""

    watch: Literal["train_loss", "val_error"] = Field(
        "train_loss", description="the value that decides between `up` and `down`"
    )
    up: Annotated[float, Field(ge=1.0, le=10.0)] = Field(1.05, description="after a decrease")
    down: Annotated[float, Field(gt=0.0, le=1.0)] = Field(0.5, description="after an increase")


class Stopping(Section):
    """When a run ends, from `train.min_epochs` on."""

    train_error: Fraction = Field(1e-5, description="stop when the training error is below this")
    lookback: Annotated[int, Field(ge=1, le=1_000)] = Field(
        5, description="stop when the validation error is above that of so many epochs before"
    )
    flat: Fraction = Field(
        1e-5, description="stop when two successive validation errors differ by less"
    )
    diverged_error: Fraction = Field(
        0.8,
        description="a run that ends with a validation error of at least this, and a training loss "
        "above that of its first epoch, has diverged, like one whose loss is not finite",
    )


class Config(Section):
    """One experiment. `runs`, `depths` and `updates` select what is run; the rest is protocol."""

    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = Field(0, description="run k has seed + k")
    runs: Annotated[int, Field(ge=1, le=100_000)] = Field(10, description="runs of each cell")
    depths: list[Annotated[int, Field(ge=1, le=64)]] = Field([2, 4], min_length=1, max_length=64)
    updates: list[str] = Field(["b-sgd", "un"], min_length=1, max_length=64)
    data: Data = Data()
    model: Model = Model()
    loss: Loss = Loss()
    sweep: Sweep = Sweep()
    train: Train = Train()
    bold_driver: BoldDriver = BoldDriver()
    stopping: Stopping = Stopping()

    @field_validator("updates")
    @classmethod
    def _known(cls, updates: list[str]) -> list[str]:
        from unitnorm.updates import UPDATES

        for name in updates:
            if name not in UPDATES:
                allowed = ", ".join(UPDATES)
                raise ValueError(f"{name!r} is not an update; allowed: {allowed}")
        return list(dict.fromkeys(updates))

    @field_validator("depths")
    @classmethod
    def _once(cls, depths: list[int]) -> list[int]:
        return list(dict.fromkeys(depths))

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.seed + self.runs > 2**31:
            raise ValueError(f"seed + runs = {self.seed + self.runs} is above 2^31")
        for name in ("sweep", "train"):
            images = getattr(self, name).train_images
            if images < self.loss.batch_size:
                raise ValueError(
                    f"loss.batch_size = {self.loss.batch_size} is above "
                    f"{name}.train_images = {images}"
                )
        return self

    def protocol(self) -> dict[str, Any]:
        """Everything that changes a run's numbers: all but the selection of runs."""
        exclude: dict[str, Any] = dict.fromkeys(("runs", "depths", "updates"), True)
        # where the images lie changes nothing; what they are is told by their hash
        return self.model_dump(exclude=exclude | {"data": {"data_dir"}})

    def fingerprint(self) -> str:
        """SHA-256 of `protocol()`; two folders with equal fingerprints hold comparable runs."""
        text = json.dumps(self.protocol(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def check_images(self, available: int) -> None:
        """Refuse more training and validation images than the data has.

        Raises:
          UserError: naming the section, the counts and the images available.
        """
        for name in ("sweep", "train"):
            part = getattr(self, name)
            wanted = part.train_images + part.validation_images
            if wanted > available:
                raise UserError(
                    f"config: {name}.train_images + {name}.validation_images = {wanted}, but the "
                    f"data set has {available} training images; allowed: at most {available}"
                )


@overload
def load(path: str | Path | None = None, overrides: dict[str, Any] | None = None) -> Config: ...
@overload
def load(
    path: str | Path | None, overrides: dict[str, Any] | None, schema: type[Schema]
) -> Schema: ...
def load(
    path: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    schema: type[Section] = Config,
) -> Section:
    """Read a TOML file (None: the defaults), put `overrides` (dotted key → value) on top, check.

    Raises:
      UserError: the file cannot be read, or a key or value is not allowed; one line names the key,
        the value and what is allowed.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            text = Path(path).read_bytes().decode("utf-8")
            values = tomllib.loads(text)
        except OSError as error:
            raise UserError(
                f"config {path}: cannot be read ({error.strerror or error}); give the path of a "
                "TOML file with --config"
            ) from None
        except UnicodeDecodeError:
            raise UserError(f"config {path}: not UTF-8 text, expected a TOML file") from None
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise UserError(f"config {path}: not valid TOML: {_one_line(error)}") from None
        except ValueError:  # a null character, or one that no file system encodes
            raise UserError(f"config {path}: no file can have this name") from None
    for key, value in (overrides or {}).items():
        _put(values, key, value)
    where = f"config {path}" if path is not None else "config"
    return parse(values, where, schema)


@overload
def parse(values: dict[str, Any], where: str = "config") -> Config: ...
@overload
def parse(values: dict[str, Any], where: str, schema: type[Schema]) -> Schema: ...
def parse(values: dict[str, Any], where: str = "config", schema: type[Section] = Config) -> Section:
    """Check a mapping against the schema.

    Raises:
      UserError: as `load`.
    """
    try:
        return schema.model_validate(values)
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {_explain(error, schema)}") from None


def parse_override(text: str) -> tuple[str, Any]:
    """Split `section.key=value`; the value is TOML, or a bare string.

    Raises:
      UserError: no `=`, or an empty key.
    """
    key, sign, raw = text.partition("=")
    key = key.strip()
    if not sign or not key:
        raise UserError(f"--set {text!r}: expected KEY=VALUE, for example loss.batch_size=50")
    try:
        value = tomllib.loads(f"value = {raw}")
        if value.keys() == {"value"}:
            return key, value["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        pass
    return key, raw.strip()


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for name in sections:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {key}: {name!r} is a value, not a section")
    values[last] = value


def _explain(error: pydantic.ValidationError, schema: type[Section]) -> str:
    """The first fault in one line: key, value, what is allowed."""
    faults = error.errors(include_url=False)
    fault = faults[0]
    key = ".".join(str(part) for part in fault["loc"]) or "the file"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if fault["type"] == "extra_forbidden":
        section: Any = schema
        for part in fault["loc"][:-1]:
            section = section.model_fields[str(part)].annotation
        return f"unknown key {key}; allowed: {', '.join(section.model_fields)}{more}"
    message = fault["msg"].removeprefix("Value error, ")
    value = repr(fault.get("input"))
    if fault["type"] == "value_error" and isinstance(fault.get("input"), dict):
        return _one_line(message + more)
    if len(value) > 80:
        value = value[:77] + "..."
    return _one_line(f"{key} = {value}: {message}{more}")


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
