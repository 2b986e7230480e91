"""Keeps the pages equal to results/: tables between marks, and single numbers in a sentence.

`<!-- from FILE -->` … `<!-- end -->` holds FILE; with a number after FILE, that part of it (parts
begin with a bold line). A number followed by `<!--=FILE:EXPRESSION-->` is the value of EXPRESSION,
where `t` is FILE, a CSV below results/, and every name of Python's and pandas' may stand. It is
written with as many decimals as it has, and with a sign if it has one. The words around are free.
"""

import re
from functools import cache
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parent.parent
PAGES = ("*.md", "configs/*.md", "results/**/README.md", ".docs/*.md")
PLACE = re.compile(r"(<!-- from (\S+)(?: (\d+))? -->\n).*?(<!-- end -->)", re.DOTALL)
NUMBER = re.compile(r"([+−-]?)\d[\d,]*(\.\d+)?(<!--=(\S+?\.(?:csv|gz)):(.+?)-->)")
_table = cache(pd.read_csv)


def filled(text: str) -> str:
    """A page's text with every place and every marked number taken from its file."""

    def fill(match: re.Match[str]) -> str:
        source = ROOT / match[2]
        if not source.exists():
            return match[0]
        content = source.read_text().strip()
        if match[3]:
            content = re.split(r"\n\n(?=\*\*)", content)[int(match[3]) - 1]
        return f"{match[1]}\n{content}\n\n{match[4]}"

    def number(match: re.Match[str]) -> str:
        decimals = len(match[2] or ".") - 1
        names = {"t": _table(ROOT / "results" / match[4]), "pd": pd}
        value = float(eval(match[5], names))  # noqa: S307 - our own pages
        if value != value:
            raise ValueError(f"{match[0]}: no number")
        value = 0.0 if round(value, decimals) == 0 else value  # no sign before zero
        sign = "+" if match[1] and value else ""
        return f"{value:{sign},.{decimals}f}".replace("-", "−") + match[3]

    return NUMBER.sub(number, PLACE.sub(fill, text))


def pages() -> list[Path]:
    return sorted(path for pattern in PAGES for path in ROOT.glob(pattern))


if __name__ == "__main__":
    for path in pages():
        path.write_text(filled(path.read_text()))
