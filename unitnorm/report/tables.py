"""Tables as text, one way for every experiment: Markdown, LaTeX, CSV and the terminal.

A table to be read is a data frame of text (`Cells`), which each format takes as it is.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from operator import methodcaller
from typing import Any, NamedTuple

import pandas as pd
from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

COLUMNS = 80  # of an ordinary terminal, and of output that is piped


class Cells(NamedTuple):
    """A table ready to be written, in plain Unicode."""

    title: str
    frame: pd.DataFrame  # of text, its columns the header; a column of words is left-aligned
    note: str = ""


def to_page(tables: Iterable[Cells]) -> str:
    """Several tables as a Markdown file; those without rows are left out."""
    return "\n\n".join(to_markdown(cells) for cells in tables if len(cells.frame)) + "\n"


def to_screen(tables: Iterable[Cells]) -> Group:
    """Several tables for the terminal, a line apart; those without rows are left out."""
    shown = [cells for cells in tables if len(cells.frame)]
    return Group(*[part for cells in shown for part in (Fitting(cells), Text())])


def to_csv(frame: pd.DataFrame, digits: int | None = None) -> str:
    """A table of numbers: full precision unless `digits` are given, NaN as an empty field."""
    shown = f"%.{digits}g" if digits else None
    return frame.to_csv(index=False, lineterminator="\n", float_format=shown)


def to_markdown(cells: Cells) -> str:
    """Title, table and note."""
    escape = methodcaller("replace", "|", "\\|")
    table = cells.frame.map(escape).rename(columns=escape)
    sides = ["left" if words else "right" for words in _are_words(cells.frame)]
    text = table.to_markdown(index=False, disable_numparse=True, colalign=sides)
    return "\n\n".join(part for part in (f"**{cells.title}**", text, cells.note) if part)


def to_latex(cells: Cells, name: str) -> str:
    """A table for a document that loads booktabs; title and note make its caption."""
    caption = f"{cells.title}. {cells.note}".strip()
    styler = cells.frame.map(_escape_tex).rename(columns=_escape_tex).style.hide(axis="index")
    return styler.to_latex(
        column_format="".join("l" if words else "r" for words in _are_words(cells.frame)),
        position_float="centering",
        hrules=True,
        label=f"tab:{name}",
        caption=_escape_tex(caption),
    )


class Fitting(NamedTuple):
    """A table for the terminal; where that is too narrow for it, a paragraph per row."""

    cells: Cells

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        title, frame, note = self.cells
        rows = frame.to_numpy().tolist()
        columns = list(zip(frame.columns, *rows, strict=True))
        least = sum(max(map(len, column)) for column in columns) + len(columns) - 1
        if options.max_width >= least:
            roomy = least + len(columns) - 1 <= COLUMNS
            table = Table(
                title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
                show_edge=False, pad_edge=False,
                padding=(0, int(roomy), 0, 0),  # on top of the one space of the box
            )  # fmt: skip
            for name, words in zip(frame.columns, _are_words(frame), strict=True):
                table.add_column(Text(name), justify="left" if words else "right", overflow="fold")
            for row in rows:
                # Text, not str: an update's name in brackets is a name, not markup.
                table.add_row(*map(Text, row))
            yield table
        else:
            yield Text(title, style="bold")
            for row in rows:
                named = zip(frame.columns, row, strict=True)
                yield Text("; ".join(f"{name}: {cell}" for name, cell in named))
        if note:
            yield Text(note)


def _are_words(frame: pd.DataFrame) -> list[bool]:
    """Per column, whether any cell begins with a letter."""
    return [any(cell[:1].isalpha() for cell in frame[name]) for name in frame.columns]


_TEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "−": r"$-$", "–": "--", "×": r"$\times$", "<": r"$<$", ">": r"$>$",
    "|": r"$|$", "‖": r"$\|$",
})  # fmt: skip


def _escape_tex(text: str) -> str:
    return text.translate(_TEX)


# ---------------------------------------------------------------- cells


def format_columns(table: pd.DataFrame, columns: Mapping[str, tuple[Any, ...]]) -> pd.DataFrame:
    """A table of text: by header, a format and the names of the columns of numbers it takes."""
    cells = {}
    for header, (form, *names) in columns.items():
        cells[header] = list(map(form, *(table[name] for name in names)))
    return pd.DataFrame(cells)


def format_number(value: float, digits: int = 4) -> str:
    """A fraction: 0.0207; a dash where it is not known."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def format_short(value: float, digits: int = 6) -> str:
    """Any number in few digits, with no padded exponent: 0.013, 1e−5, −2.2e−16."""
    text = re.sub(r"e([+-])0*", lambda match: "e" + match[1].strip("+"), f"{value:.{digits}g}")
    return "–" if math.isnan(value) else text.replace("-", "−")


def format_spread(mean: float, std: float, form: Callable[[float], str] = format_number) -> str:
    """A mean and its standard deviation: 0.0207 ± 0.0017."""
    return "–" if math.isnan(mean) else f"{form(mean)} ± {form(std).lstrip('+')}"


def format_signed(value: float, digits: int) -> str:
    """With a sign, unless it is zero to that many digits: −0.12, +0.05, 0.00."""
    if math.isnan(value):
        return "–"
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def format_points(value: float) -> str:
    """A difference of errors in percentage points, signed: −0.0012 is "−0.12"."""
    return format_signed(100 * value, 2)


def format_p(value: float) -> str:
    """A p-value: 0.012, < 0.001."""
    return "–" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def format_range(low: float, high: float, form: Callable[[float], str] = format_number) -> str:
    """An interval: 0.0195 to 0.0219."""
    ends = form(low), form(high)
    return "–" if "–" in ends else " to ".join(ends)
