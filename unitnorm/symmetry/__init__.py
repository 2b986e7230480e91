"""The scaling symmetry made visible: sections 2 and 3 of the paper, measured on real mini-batches.

`run` gives the content of every file and what is printed; the caller writes.

    measure   the numbers: loss, gradient, trajectories and norms under w → α w
    findings  what they show: one table, a finding in each row
    figures   a figure for each table
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.console import RenderableType

from unitnorm.archbn.config import Config
from unitnorm.data import Dataset
from unitnorm.errors import UserError
from unitnorm.report.style import encode
from unitnorm.report.tables import to_csv
from unitnorm.run import devices, provenance
from unitnorm.symmetry import figures, findings, measure
from unitnorm.table2.experiment import describe_data

__all__ = ["Result", "run"]


class Result(NamedTuple):
    """Files by name, and the table for the terminal."""

    files: dict[str, bytes]
    shown: RenderableType


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
    measured = measure.measure_all(config, data, updates, rate, steps, epochs, say)
    cases = measure.list_cases(config)
    request = findings.Request(data.name, config.loss.batch_size, config.seed, rate, steps, epochs)
    found = findings.find(measured, cases)
    note = findings.explain(measured.trajectories, cases, request)
    files = {f"{n}.csv": to_csv(table, 6).encode() for n, table in measured._asdict().items()}
    files["summary.md"] = findings.write_summary(found, note).encode()
    record = {
        **provenance.describe(config, describe_data(data)),
        "depths": sorted(config.depths),
        "updates": list(updates),
        **{key: getattr(request, key) for key in ("rate", "steps", "epochs")},
        "versions": provenance.versions(),
        "cpu": devices.cpu_model(),
        "commit": provenance.commit(),
    }
    files["provenance.json"] = (json.dumps(record, indent=2) + "\n").encode()
    for name, figure in figures.draw_all(measured, cases).items():
        encoded = encode(figure, palette=True)
        files |= {f"{name}.{ending}": content for ending, content in encoded.items()}
    return Result(files, findings.show(found, note))
