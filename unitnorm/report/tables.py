"""The report's tables as text: Markdown, LaTeX, CSV and the terminal.

Each table is laid out once, as a header and rows of strings in plain Unicode, and then written in
each of the formats. Change what a table shows in its `_..._cells` function, and its numbers in
`statistics`.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from unitnorm.report import statistics
from unitnorm.report.frames import label

TABLE2_TITLE = "Test error after the last training epoch (fraction of the test images)"
DIFFERENCES_TITLE = "Paired differences of the test error (percentage points)"
FAILED_TITLE = "Diverged and non-finite runs, left out of every mean"


COLUMNS = 80  # of an ordinary terminal, and of output that is piped


class Cells(NamedTuple):
    """A table ready to be written: `text` names the columns that are left-aligned."""

    title: str
    header: list[str]
    rows: list[list[str]]
    text: frozenset[str]


def to_csv(frame: pd.DataFrame) -> str:
    """`table2.csv` or `differences.csv`: full precision, NaN as an empty field."""
    return frame.to_csv(index=False, lineterminator="\n")


def table2_markdown(table: pd.DataFrame, differences: pd.DataFrame, failed: pd.DataFrame) -> str:
    """`table2.md`: Table 2 beside the paper's figures, the paired differences, what they show.

    Args:
        table: from `statistics.table2`.
        differences: from `statistics.paired_differences`.
        failed: from `statistics.failed_runs`; listed only if there are any.
    """
    parts = [f"**{TABLE2_TITLE}**", markdown(_table2_cells(table)), _notes(table)]
    if len(differences):
        cells = _difference_cells(differences)
        parts += [f"**{cells.title}**", markdown(cells), _difference_notes(differences)]
    parts.append("\n".join(f"- {_sentence(line)}" for line in _findings(table, differences)))
    if len(failed):
        parts += [f"**{FAILED_TITLE}**", markdown(_failed_cells(failed))]
    return "\n\n".join(parts) + "\n"


def table2_latex(table: pd.DataFrame, differences: pd.DataFrame) -> str:
    """`table2.tex`: the same two tables for a LaTeX document that loads booktabs."""
    parts = [
        "% Needs \\usepackage{booktabs}.",
        _latex(_table2_cells(table), _notes(table), "tab:2"),
    ]
    if len(differences):
        notes = _difference_notes(differences)
        parts.append(_latex(_difference_cells(differences), notes, "tab:differences"))
    return "\n".join(parts)


def runs_markdown(conduct: pd.DataFrame, sweep: pd.DataFrame, failed: pd.DataFrame) -> str:
    """`runs.md`: how the runs went, which rates the sweep chose, and which runs failed.

    Args:
        conduct: from `statistics.conduct`.
        sweep: from `statistics.sweep_summary`.
        failed: from `statistics.failed_runs`.
    """
    parts = []
    for cells in (_conduct_cells(conduct), _sweep_cells(sweep)):
        parts += [f"**{cells.title}**", markdown(cells)]
    parts += [f"**{FAILED_TITLE}**", markdown(_failed_cells(failed)) if len(failed) else "None."]
    return "\n\n".join(parts) + "\n"


def table2_rich(table: pd.DataFrame) -> Table:
    """Table 2 for the terminal, from `statistics.table2`; 80 columns are enough."""
    return _rich(_table2_cells(table))


def differences_rich(differences: pd.DataFrame) -> Table:
    """The paired differences for the terminal, from `statistics.paired_differences`."""
    return _rich(_difference_cells(differences))


def failed_rich(failed: pd.DataFrame) -> Table:
    """The failed runs for the terminal, from `statistics.failed_runs`."""
    return _rich(_failed_cells(failed))


def terminal(runs: pd.DataFrame, paper: statistics.Paper = statistics.PAPER) -> Group:
    """All that `unitnorm report` prints: both tables, what they show, and the failed runs.

    `paper` is as in `statistics.table2`.
    """
    table, differences = statistics.table2(runs, paper), statistics.paired_differences(runs)
    parts: list[RenderableType] = [Fitting(_table2_cells(table)), Text(_notes(table) + "\n")]
    if len(differences):
        notes = Text(_difference_notes(differences) + "\n")
        parts += [Fitting(_difference_cells(differences)), notes]
    parts += [Text(_sentence(line)) for line in _findings(table, differences)]
    failed = statistics.failed_runs(runs)
    if len(failed):
        parts += [Text(), Fitting(_failed_cells(failed))]
    return Group(*parts)


def _table2_cells(table: pd.DataFrame) -> Cells:
    header = ["depth", "update", "n", "diverged", "mean ± std", "95 % interval", "paper"]
    rows = [
        [
            str(row["depth"]),
            label(row["update"]),
            str(row["n"]),
            str(row["diverged"]),
            _plus_minus(row["mean"], row["std"]),
            _range(row["ci_low"], row["ci_high"]),
            _plus_minus(row["paper_mean"], row["paper_std"]),
        ]
        for row in table.to_dict("records")
    ]
    return Cells(TABLE2_TITLE, header, rows, frozenset({"update"}))


def _difference_cells(differences: pd.DataFrame) -> Cells:
    header = ["depth", "difference", "n", "left out", "mean ± std", "95 % interval"]
    header += ["p (t)", "p (W)"]
    rows = []
    for row in differences.to_dict("records"):
        mean, low, high = (statistics.points(row[key]) for key in ("mean", "ci_low", "ci_high"))
        spread = "–" if np.isnan(row["std"]) else f"{100 * row['std']:.2f}"
        rows.append(
            [
                str(row["depth"]),
                f"{label(row['update'])} − {label(row['baseline'])}",
                str(row["n"]),
                str(row["left_out"]),
                "–" if np.isnan(row["mean"]) else f"{mean} ± {spread}",
                "–" if np.isnan(row["std"]) else f"{low} to {high}",
                _p(row["p_t"]),
                _p(row["p_wilcoxon"]),
            ]
        )
    return Cells(DIFFERENCES_TITLE, header, rows, frozenset({"difference"}))


def _failed_cells(failed: pd.DataFrame) -> Cells:
    header = ["depth", "update", "run", "seed", "base rate", "epoch", "reason"]
    rows = [
        [
            str(row["depth"]),
            label(row["update"]),
            str(row["run"]),
            str(row["seed"]),
            f"{row['base_lr']:g}",
            str(row["epoch"]),
            row["stop_reason"],
        ]
        for row in failed.to_dict("records")
    ]
    return Cells(FAILED_TITLE, header, rows, frozenset({"update", "reason"}))


def _conduct_cells(conduct: pd.DataFrame) -> Cells:
    header = ["depth", "update", "runs", "epochs (median)", "stopped by (runs)", "base rate (runs)"]
    header += ["max |‖w‖ − 1|"]
    rows = [
        [
            str(row["depth"]),
            label(row["update"]),
            str(row["runs"]),
            f"{row['epochs_min']}–{row['epochs_max']} ({row['epochs_median']:g})",
            ", ".join(f"{reason} ({count})" for reason, count in row["stop_reasons"].items()),
            ", ".join(f"{rate:g} ({count})" for rate, count in row["base_lrs"].items()),
            "–" if np.isnan(row["norm_deviation"]) else f"{row['norm_deviation']:.2g}",
        ]
        for row in conduct.to_dict("records")
    ]
    return Cells(
        "How the runs went",
        header,
        rows,
        frozenset({"update", "stopped by (runs)", "base rate (runs)"}),
    )


def _sweep_cells(sweep: pd.DataFrame) -> Cells:
    header = [
        "depth",
        "update",
        "base rate",
        "runs",
        "diverged",
        "mean validation error",
        "chosen by",
    ]
    rows = [
        [
            str(row["depth"]),
            label(row["update"]),
            f"{row['base_lr']:g}",
            str(row["runs"]),
            str(row["diverged"]),
            _number(row["val_error"]),
            str(row["chosen"]),
        ]
        for row in sweep.to_dict("records")
    ]
    return Cells("The sweep of the base learning rate", header, rows, frozenset({"update"}))


def _findings(table: pd.DataFrame, differences: pd.DataFrame) -> list[str]:
    return [*statistics.verdict(differences), statistics.against_paper(table)]


def _notes(table: pd.DataFrame) -> str:
    note = "n: runs in the mean; std with n − 1; t-interval of the mean."
    if table["diverged"].any():
        note += " Diverged runs are counted and left out of the mean."
    if table["paper_mean"].notna().any():
        note += " Paper: mean ± std over 10 runs."
    return note


def _difference_notes(differences: pd.DataFrame) -> str:
    note = (
        "n: pairs of runs with the same start, split and order; p of the paired t-test (t) and of "
        "Wilcoxon's signed-rank test (W), two-sided."
    )
    if differences["left_out"].any():
        note += " Left out: runs without a partner (diverged, not trained, or of another seed)."
    if differences["update"].nunique() > 1:
        note += f" Not corrected for there being {len(differences)} comparisons."
    return note


def markdown(cells: Cells) -> str:
    """A table in Markdown, without its title."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (cells.header, *cells.rows)]
    rows.insert(1, ["---" if name in cells.text else "---:" for name in cells.header])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "−": r"$-$", "–": "--", "×": r"$\times$", "<": r"$<$", ">": r"$>$",
    "|": r"$|$", "‖": r"$\|$",
}  # fmt: skip


def _latex(cells: Cells, note: str, name: str) -> str:
    def tex(text: str) -> str:
        return "".join(_TEX.get(character, character) for character in text)

    align = "".join("l" if column in cells.text else "r" for column in cells.header)
    lines = [" & ".join(map(tex, row)) + r" \\" for row in (cells.header, *cells.rows)]
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{tex(cells.title)}. {tex(note)}}}",
            rf"  \label{{{name}}}",
            rf"  \begin{{tabular}}{{{align}}}",
            r"    \toprule",
            f"    {lines[0]}",
            r"    \midrule",
            *(f"    {line}" for line in lines[1:]),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _rich(cells: Cells) -> Table:
    table = Table(
        title=Text(cells.title),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(
            0,
            int(_width(cells, gap=2) <= COLUMNS),
            0,
            0,
        ),  # on top of the one space of the box
    )
    for name in cells.header:
        justify: JustifyMethod = "left" if name in cells.text else "right"
        table.add_column(Text(name), justify=justify, overflow="fold")
    for row in cells.rows:
        # Text, not str: an update's name in brackets is a name, not markup.
        table.add_row(*(Text(cell) for cell in row))
    return table


def _width(cells: Cells, gap: int) -> int:
    columns = zip(cells.header, *cells.rows, strict=True)
    return sum(max(map(len, column)) for column in columns) + gap * (len(cells.header) - 1)


class Fitting(NamedTuple):
    """A table for the terminal; where that is too narrow for it, a paragraph per row."""

    cells: Cells

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width >= _width(self.cells, gap=1):
            yield _rich(self.cells)
            return
        yield Text(self.cells.title, style="bold")
        for row in self.cells.rows:
            named = zip(self.cells.header, row, strict=True)
            yield Text("; ".join(f"{name}: {cell}" for name, cell in named))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.4f}"


def _plus_minus(mean: float, std: float) -> str:
    return "–" if np.isnan(mean) else f"{mean:.4f} ± {_number(std)}"


def _range(low: float, high: float) -> str:
    return "–" if np.isnan(low) else f"{_number(low)} to {_number(high)}"


def _p(value: float) -> str:
    return "–" if np.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"
