"""The scaling symmetry made visible: sections 2 and 3 of the paper, measured on real mini-batches.

`run` gives the content of every file and what is printed; the caller writes.
"""

import json
import math
from collections.abc import Callable, Sequence

from rich.console import RenderableType

from unitnorm.archbn.config import Config
from unitnorm.data import Dataset
from unitnorm.errors import UserError
from unitnorm.report.style import encode
from unitnorm.report.tables import to_csv, to_page, to_screen
from unitnorm.run import devices, provenance
from unitnorm.symmetry import figures, measure, tables

__all__ = ["run"]


def run(
    config: Config,
    data: Dataset,
    updates: Sequence[str],
    rate: float | None = None,
    steps: int = 1000,
    epochs: int = 5,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, bytes], RenderableType]:
    """Measure the symmetry at the config's depths. The same arguments give the same bytes.

    Args:
      data: training images for the mini-batches, test images to compare outputs.
      updates: to compare trajectories under.
      rate: learning rate; default: the largest candidate of the config's sweep, which Table 2's
        sweep chooses in nearly every run.
      steps, epochs: lengths of the trajectories, and of the training whose norms are recorded.
      say: called with each part that is done.

    Returns:
      The files by name, and the tables for the terminal.

    Raises:
      UserError: the rate is not a positive number.
    """
    rate = max(config.sweep.rates) if rate is None else rate
    if not (math.isfinite(rate) and rate > 0):
        raise UserError(f"--rate {rate}: expected a positive number, for example 0.01")
    measured = measure.measure_all(config, data, updates, rate, steps, epochs, say)
    files = {f"{n}.csv": to_csv(table, 6).encode() for n, table in measured._asdict().items()}
    shown = f"Mini-batches of {config.loss.batch_size} images of {data.name}, seed {config.seed}"
    found = tables.list_tables(measured, shown)
    files["summary.md"] = to_page(found).encode()
    about = {"name": data.name, "sha256": data.sha256, "image_shape": list(data.image_shape)}
    record = {
        **provenance.describe(config, about), "depths": sorted(config.depths),
        "updates": list(updates), "rate": rate, "steps": steps, "epochs": epochs,
        "versions": provenance.versions(), "cpu": devices.cpu_model(),
        "commit": provenance.commit(),
    }  # fmt: skip
    files["provenance.json"] = (json.dumps(record, indent=2) + "\n").encode()
    for name, figure in figures.draw_all(measured).items():
        encoded = encode(figure, palette=True)
        files |= {f"{name}.{ending}": content for ending, content in encoded.items()}
    return files, to_screen(found)
