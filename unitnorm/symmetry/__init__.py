"""The scaling symmetry made visible: sections 2 and 3 of the paper, measured on real mini-batches.

`run` gives the content of every file and what is printed; the caller writes.

    measure   the numbers: loss, gradient, trajectories and norms under w → α w
    findings  what they show: one table and its reasons
    figures   a figure for each table
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pandas as pd
import PIL.Image
from rich.console import Group

from unitnorm.data import Dataset
from unitnorm.errors import UserError
from unitnorm.report.figures import PNG_DPI, encode
from unitnorm.run import devices, provenance
from unitnorm.symmetry import figures, findings, measure
from unitnorm.table2.config import Config
from unitnorm.table2.experiment import describe_data

__all__ = ["Result", "run"]


class Result(NamedTuple):
    """Files by name, and the table for the terminal."""

    files: dict[str, bytes]
    shown: Group


def run(
    config: Config,
    data: Dataset,
    updates: Sequence[str],
    rate: float | None = None,
    steps: int = 1000,
    epochs: int = 5,
    say: Callable[[str], None] = lambda text: None,
) -> Result:
    """Measure the symmetry at the config's depths. The same arguments give the same bytes.

    Args:
      config: model, loss, depths and seed.
      data: whose training images make the mini-batches.
      updates: to follow trajectories under.
      rate: learning rate; default: the largest candidate of the config's sweep, which Table 2's
        sweep chooses in nearly every run.
      steps: length of the trajectories.
      epochs: length of the training whose norms are recorded.
      say: told of each part that is done.

    Raises:
      UserError: the rate is not a positive number.
    """
    rate = max(config.sweep.rates) if rate is None else rate
    if not (math.isfinite(rate) and rate > 0):
        raise UserError(f"--rate {rate}: expected a positive number, for example 0.01")
    measured = measure.everything(config, data, updates, rate, steps, epochs, say)
    cases = measure.cases(config)
    settings = findings.Settings(
        data.name, config.loss.batch_size, config.seed, rate, steps, epochs
    )
    files = {f"{name}.csv": to_csv(table) for name, table in measured._asdict().items()}
    files["summary.md"] = findings.summary(measured, cases, settings).encode()
    record = {
        **provenance.describe(config, describe_data(data)),
        "depths": sorted(config.depths),
        "updates": list(updates),
        **{key: getattr(settings, key) for key in ("rate", "steps", "epochs")},
        "versions": provenance.versions(),
        "cpu": devices.cpu_model(),
        "commit": provenance.commit(),
    }
    files["provenance.json"] = (json.dumps(record, indent=2) + "\n").encode()
    for name, figure in figures.every(measured._asdict(), cases).items():
        encoded = encode(figure)
        files[f"{name}.png"] = in_palette(encoded["png"])
        files[f"{name}.svg"] = encoded["svg"]
    return Result(files, findings.terminal(measured, cases, settings))


def to_csv(table: pd.DataFrame) -> bytes:
    """A table of `measure` in six digits; NaN as an empty field."""
    return table.to_csv(index=False, lineterminator="\n", float_format="%.6g").encode()


def in_palette(png: bytes) -> bytes:
    """A picture in 256 colours, which is enough for lines: a third of the size."""
    content = io.BytesIO()
    picture = PIL.Image.open(io.BytesIO(png)).convert("RGB")
    small = picture.quantize(256, dither=PIL.Image.Dither.NONE)
    small.save(content, "PNG", optimize=True, dpi=(PNG_DPI, PNG_DPI))
    return content.getvalue()
