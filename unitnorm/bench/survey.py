"""A survey: what is measured, the table of it that is written, and the one that is read."""

import contextlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from unitnorm.bench.measure import Contestant, Found, Say, in_turns, slug
from unitnorm.report.style import encode
from unitnorm.report.tables import Cells, to_csv, to_page
from unitnorm.run import devices, provenance

Device = Mapping[str, Any]  # as `measure.find_device` gives it
PEERS = ("torch", "geoopt")  # of which the version is told as well


@dataclass(frozen=True)
class Survey:
    """A table: how it is measured, and how it is told."""

    name: str  # of its files; may hold {device}
    title: str
    # those of a group take turns, and a group has the machine alone
    groups: Iterable[Sequence[Contestant]]
    rows: Callable[[list[Found]], Iterable[dict[str, Any]]]  # of a group, by column of the CSV file
    columns: Mapping[str, str]  # to be read: by header, a format that takes the values of a row
    note: Sequence[str] = ()  # what stands below the table
    facts: Mapping[str, Any] = field(default_factory=dict)  # for the JSON file
    read: Callable[[pd.DataFrame], pd.DataFrame] = lambda frame: frame  # what `columns` takes
    # of all rows and all that was found: more facts, and figures by what follows their name
    conclude: Callable[
        [pd.DataFrame, list[Found]], tuple[Mapping[str, Any], Mapping[str, Figure]]
    ] = lambda *_: ({}, {})


def measure(
    surveys: Sequence[Survey], device: Device, command: str, rounds: int, say: Say
) -> tuple[list[Cells], dict[str, bytes]]:
    """Measure each survey.

    Args:
      command: which the JSON file tells.

    Returns:
      The tables to be read, and the files by name; those of all surveys together by the first's.
    """
    started, pages, tables = time.time(), [], {}
    files: dict[str, bytes] = {}
    facts = {
        "device": device, "processor": devices.cpu_model(), "cores": devices.count_cores(),
        "rounds": rounds, "what": "\n".join(surveys[0].note),
    }  # fmt: skip
    names = [survey.name.format(device=slug(device)) for survey in surveys]
    for name, survey in zip(names, surveys, strict=True):
        groups = [in_turns(group, rounds, say) for group in survey.groups]
        frame = pd.DataFrame([row for group in groups for row in survey.rows(group)])
        more, figures = survey.conclude(frame, [found for group in groups for found in group])
        facts |= {**survey.facts, **more}
        rows = survey.read(frame).to_dict("records")
        texts = [[text.format_map(row) for text in survey.columns.values()] for row in rows]
        note = "\n".join(f"- {line}" for line in survey.note)
        pages.append(Cells(survey.title, pd.DataFrame(texts, columns=list(survey.columns)), note))
        tables[f"{name}.csv"] = frame
        for part, figure in figures.items():
            files |= {f"{name}{part}.{end}": drawn for end, drawn in encode(figure).items()}
    count = sum(map(len, tables.values()))
    # by now the workers have ended, and this process may ask for the device
    entry = provenance.command_entry(command, started, time.time() - started, count)
    for peer in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            entry["versions"][peer] = importlib.metadata.version(peer)
    text = json.dumps(entry | facts, indent=2, ensure_ascii=False)
    files |= {name: to_csv(frame, 7).encode() for name, frame in tables.items()}
    files |= {f"{names[0]}.json": f"{text}\n".encode(), f"{names[0]}.md": to_page(pages).encode()}
    return pages, files
