"""The report: from the records alone to Table 2, its figures and what they show.

Pure functions of data frames: `build` gives the content of every file by name, `terminal` what is
printed, and the caller writes. To add a file to the report, add it to `build`.

    frames      the records as the report takes them: columns, checks, order
    statistics  Table 2, the paired differences and what may be said of them
    tables      the tables as Markdown, LaTeX, CSV and for the terminal
    figures     the figures as PNG and SVG
"""

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from unitnorm.report import figures, tables
from unitnorm.report.statistics import (
    PAPER,
    Paper,
    conduct,
    failed_runs,
    paired_differences,
    sweep_summary,
    table2,
    verdict,
)
from unitnorm.report.tables import terminal

__all__ = ["build", "paired_differences", "table2", "terminal", "verdict", "write"]


def build(
    runs: pd.DataFrame,
    history: pd.DataFrame,
    sweep: pd.DataFrame,
    filters: Mapping[tuple[int, str], np.ndarray],
    image_shape: tuple[int, int] = (28, 28),
    paper: Paper = PAPER,
) -> dict[str, bytes]:
    """Every file of the report: the same records give the same bytes.

    Args:
        runs: one row per run, columns `frames.RUNS`.
        history: one row per run and epoch, columns `frames.HISTORY`.
        sweep: one row per run and candidate rate, columns `frames.SWEEP`.
        filters: per (depth, update) the first layer's filters of one run, shape
            (filters, features); a depth without any has no figure of them.
        image_shape: rows and columns of an image; their product is the number of features.
        paper: (depth, update) to the mean and std to set beside ours; `{}` for runs on other data
            than the paper's.

    Returns:
        Content by file name, relative to the results folder: `table2.csv`, `.md` and `.tex`,
        `differences.csv`, `runs.md`, and `figures/NAME.png` and `.svg`.

    Raises:
        UserError: a frame is empty or damaged, or the filters are not images of that shape.
    """
    table, differences, failed = table2(runs, paper), paired_differences(runs), failed_runs(runs)
    texts = {
        "table2.csv": tables.to_csv(table),
        "table2.md": tables.table2_markdown(table, differences, failed),
        "table2.tex": tables.table2_latex(table, differences),
        "differences.csv": tables.to_csv(differences),
        "runs.md": tables.runs_markdown(conduct(runs, history), sweep_summary(sweep), failed),
    }
    drawn = {
        "curves": figures.curves(runs, history),
        "learning_rates": figures.learning_rates(runs, history),
        "test_errors": figures.errors(runs, paper),
    }
    for depth in sorted({depth for depth, _ in filters}):
        weights = {update: array for (at, update), array in filters.items() if at == depth}
        drawn[f"filters_depth{depth}"] = figures.filters(weights, image_shape, depth)
    files = {name: text.encode() for name, text in texts.items()}
    for name, figure in drawn.items():
        encoded = figures.encode(figure)
        files |= {f"figures/{name}.{ending}": content for ending, content in encoded.items()}
    return files


def write(files: Mapping[str, bytes], write_file: Callable[[str, bytes], None]) -> None:
    """Hand each file of `build` to `write_file(name, content)`, in a fixed order."""
    for name, content in files.items():
        write_file(name, content)
