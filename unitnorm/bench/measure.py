"""How everything is measured and written: workers, turns, medians, tables and files."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from unitnorm.errors import UserError
from unitnorm.report.style import encode
from unitnorm.report.tables import Cells, to_csv, to_markdown
from unitnorm.run.devices import count_cores, cpu_model
from unitnorm.run.provenance import commit

Key = TypeVar("Key", bound=Hashable)
Say = Callable[[str], None]

PACKAGES = ("unitnorm", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "geoopt")
PATIENCE_S = 20  # a worker that takes longer to leave is ended
WARM_UP = 2  # the first compiles, the second writes the first checkpoint
# XLA sizes its threads by PJRT_NPROC, PyTorch by OMP_NUM_THREADS
ONE_THREAD = {"PJRT_NPROC": "1", "OMP_NUM_THREADS": "1"}


class Range(NamedTuple):
    """A measurement: the median of its repetitions, the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Of at least one value."""
        return cls(float(np.median(values)), float(min(values)), float(max(values)))


@dataclass(frozen=True)
class Measurement:
    """What was measured, ready to be written and shown."""

    name: str  # of its files, without the ending
    tables: Mapping[str, pd.DataFrame]  # by what follows the name
    cells: Cells  # what is printed
    facts: Mapping[str, Any]  # for the JSON file
    figures: Mapping[str, Figure] = field(default_factory=dict)  # by what follows the name

    def files(self, command: str, started: float, wall_s: float) -> dict[str, bytes]:
        """The files of the results folder by name; `started` in seconds since the epoch."""
        versions = {"python": platform.python_version()}
        for name in PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
        when = datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat("T", "seconds")
        facts = {
            "command": command, "started": when, "wall_s": round(wall_s, 1), "commit": commit(),
            "versions": versions, "processor": cpu_model(), "cores": count_cores(), **self.facts,
        }  # fmt: skip
        texts = {f"{self.name}{part}.csv": to_csv(t, 7) for part, t in self.tables.items()}
        texts[f"{self.name}.json"] = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
        texts[f"{self.name}.md"] = to_markdown(self.cells) + "\n"
        files = {name: text.encode() for name, text in texts.items()}
        for part, figure in self.figures.items():
            for ending, content in encode(figure).items():
                files[f"{self.name}{part}.{ending}"] = content
        return files


def make_cells(
    title: str, frame: pd.DataFrame, columns: Mapping[str, str], remarks: Iterable[str] = ()
) -> Cells:
    """A table to be read, and remarks: `columns` has by header a format that takes the values of
    a row of `frame`, such as "{low:.2f}–{high:.2f}"."""
    rows = [[text.format_map(row) for text in columns.values()] for row in frame.to_dict("records")]
    note = "\n".join(f"- {remark}" for remark in remarks)
    return Cells(title, pd.DataFrame(rows, columns=list(columns)), note)


@dataclass(frozen=True)
class Contestant:
    """Something to be measured: a generator of a module here, its options, in how many processes.

    Several processes are independent copies, each with data of its own and one thread.
    """

    kind: str  # "module.generator"
    options: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 1


class Found(NamedTuple):
    """What a contestant has said."""

    about: dict[str, Any]  # itself
    samples: int  # of a repetition, over all copies; 0 where there are none
    # of each repetition; of several processes the longest time and the sum of the memory
    answers: list[dict[str, float]]

    def range_of(self, name: str, scale: float = 1.0) -> Range:
        """Of one of its figures, times `scale`."""
        return Range.of([scale * answer[name] for answer in self.answers])


class Worker:
    """A contestant's processes; `ready`, then `repeat` as often as wanted."""

    def __init__(self, contestant: Contestant, stack: contextlib.ExitStack):
        self._kind = contestant.kind
        options = json.dumps(contestant.options)
        # several JAX processes share one GPU: none may take it whole
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
        environment |= ONE_THREAD if contestant.processes > 1 else {}
        errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._errors = stack.enter_context(errors)
        self._processes: list[subprocess.Popen[str]] = []
        for _ in range(contestant.processes):
            process = subprocess.Popen(
                [sys.executable, "-m", "unitnorm.bench.worker", contestant.kind, options],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
                text=True, env=environment,
            )  # fmt: skip
            stack.callback(_end, process)
            self._processes.append(process)

    def ready(self) -> list[dict[str, Any]]:
        """What each process tells of itself, or the package that it lacks."""
        return [self._answer(process) for process in self._processes]

    def repeat(self) -> dict[str, float]:
        """One repetition."""
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                print(file=process.stdin, flush=True)
        answers = self.ready()
        return {
            **answers[0],
            "seconds": max(answer["seconds"] for answer in answers),
            "peak_memory_mb": sum(answer["peak_memory_mb"] for answer in answers),
        }

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        if line := process.stdout.readline():
            return json.loads(line)
        process.wait()
        self._errors.seek(0)
        said = [line.strip() for line in self._errors if line.strip()]
        last = said[-1] if said else f"exit code {process.returncode}"
        kind = self._kind.partition(".")[2]
        raise UserError(f"bench: {kind} failed while it was measured: {last}")


def _end(process: subprocess.Popen[str]) -> None:
    try:
        process.communicate(timeout=PATIENCE_S)  # the end of its input ends it
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def in_turns(
    contestants: Mapping[Key, Contestant], rounds: int, say: Say = lambda _: None
) -> tuple[dict[Key, Found], dict[Key, str]]:
    """Start all of them, and repeat them in turn; a contestant that fails is a `UserError`.

    Each round begins with another one, so that none is always measured after the same neighbour.

    Returns:
      What was found, and for the others the package that is missing.
    """
    with contextlib.ExitStack() as stack:
        say(f"starting {sum(c.processes for c in contestants.values())} processes")
        workers = {key: Worker(contestant, stack) for key, contestant in contestants.items()}
        said = {key: worker.ready() for key, worker in workers.items()}
        missing = {key: a["missing"] for key, each in said.items() for a in each if "missing" in a}
        keys = [key for key in workers if key not in missing]
        found = {}
        for key in keys:
            about = said[key][0]["ready"]
            found[key] = Found(about, len(said[key]) * about.get("samples", 0), [])
            for _ in range(WARM_UP if rounds else 0):
                say(f"warming up {key}")
                workers[key].repeat()
        for number in range(rounds):
            for key in keys:
                say(f"round {number + 1} of {rounds}: {key}")
                found[key].answers.append(workers[key].repeat())
            keys = keys[1:] + keys[:1]
    return found, missing


def one_by_one(
    contestants: Mapping[Key, Contestant], rounds: int, say: Say
) -> Iterator[tuple[Key, Found]]:
    """`in_turns`, one contestant after the other, each alone on the machine."""
    for key, contestant in contestants.items():
        found, _ = in_turns({key: contestant}, rounds, say)
        yield key, found[key]


def find_device() -> dict[str, Any]:
    """What JAX computes on, as `run.provenance.device` tells it; asked in another process, which
    leaves a GPU's memory to the workers."""
    found, _ = in_turns({"device": Contestant("contestants.nothing")}, 0)
    return found["device"].about["device"]


def slug(device: Mapping[str, Any]) -> str:
    """The name of a device, as `find_device` gives it, as a file's: `amd-epyc-2-cores`."""
    name = re.sub(r"\((r|tm)\)|cpu|processor|@.*", " ", str(device["kind"]).lower())
    name = re.sub(r"[^a-z0-9]+", "-", name).strip("-") or str(device["platform"])
    count, unit = device["count"], "cores" if device["platform"] == "cpu" else "devices"
    return name if count == 1 and unit == "devices" else f"{name}-{count}-{unit}"
