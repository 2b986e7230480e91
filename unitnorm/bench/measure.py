"""Starts workers, takes turns among them and condenses what they answer."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple, TypeVar

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


class Spread(NamedTuple):
    """A measurement: the median of its repetitions, the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(float(np.median(values)), float(min(values)), float(max(values)))


@dataclass(frozen=True)
class Measurement:
    """What was measured, ready to be written and shown.

    Attributes:
      name: of its files, without the ending.
      tables: frames by what follows the name.
      cells: what is printed, its remarks as the note.
      facts: of the measurement, for the JSON file.
      figures: by what follows the name.
    """

    name: str
    tables: Mapping[str, pd.DataFrame]
    cells: Cells
    facts: Mapping[str, Any]
    figures: Mapping[str, Figure] = field(default_factory=dict)

    def files(self, command: str, started: float, wall_s: float) -> dict[str, bytes]:
        """The files of the results folder by name, with the command and when it was started."""
        facts = {**describe_setting(command, started, wall_s), **self.facts}
        return {
            **{f"{self.name}{k}.csv": to_csv(t, 7).encode() for k, t in self.tables.items()},
            f"{self.name}.json": (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode(),
            f"{self.name}.md": (to_markdown(self.cells) + "\n").encode(),
            **{
                f"{self.name}{part}.{ending}": content
                for part, figure in self.figures.items()
                for ending, content in encode(figure).items()
            },
        }


@dataclass(frozen=True)
class Contestant:
    """Something to be measured: a kind of `worker.KINDS`, its options, in how many processes.

    Several processes are independent copies, each with data of its own and one thread; or they
    work together (`joint`), as ours can.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 1
    joint: bool = False


class Worker:
    """A contestant in its own process, or in several; `wait_until_ready` before the first use.

    Attributes:
      about: what it tells of itself when it is ready.
      samples: of a repetition, over all copies; 0 where there are none.
      missing: the package that it needs and that is not installed.
    """

    def __init__(self, contestant: Contestant, stack: contextlib.ExitStack):
        self._contestant, count = contestant, contestant.processes
        copies = count > 1 and not contestant.joint
        # several JAX processes share one GPU: none may take it whole
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
        environment |= ONE_THREAD if copies else {}
        port = find_free_port()
        self.about: dict[str, Any] = {}
        self.samples, self.missing = 0, ""
        self._members: list[tuple[subprocess.Popen[str], IO[str]]] = []
        stack.callback(self._end)
        for number in range(count):
            options = dict(contestant.options)
            if contestant.joint:
                place = {"coordinator": f"127.0.0.1:{port}", "processes": count, "process": number}
                options |= place
            errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
            stack.enter_context(errors)
            process = subprocess.Popen(
                [sys.executable, "-m", "unitnorm.bench.worker", contestant.kind,
                 json.dumps(options)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=environment,
            )  # fmt: skip
            self._members.append((process, errors))

    def wait_until_ready(self) -> None:
        """Return when all processes are set up, or lack a package."""
        answers = self._answers()
        self.missing = next((a["missing"] for a in answers if "missing" in a), "")
        if not self.missing:
            self.about = answers[0]["ready"]
            copies = 1 if self._contestant.joint else len(answers)
            self.samples = copies * self.about.get("samples", 0)

    def repeat(self) -> dict[str, float]:
        """One repetition; of several processes the longest time and the sum of their memory."""
        for process, _ in self._members:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write("again\n")
                process.stdin.flush()
        answers = self._answers()
        return {
            **answers[0],
            "seconds": max(answer["seconds"] for answer in answers),
            "peak_memory_mb": sum(answer["peak_memory_mb"] for answer in answers),
        }

    def _answers(self) -> list[dict[str, Any]]:
        return [self._answer(*member) for member in self._members]

    def _answer(self, process: subprocess.Popen[str], errors: IO[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            process.wait()
            errors.seek(0)
            said = [text.strip() for text in errors if text.strip()]
            last = said[-1] if said else f"exit code {process.returncode}"
            raise UserError(f"bench: {self._contestant.kind} failed while it was measured: {last}")
        return json.loads(line)

    def _end(self) -> None:
        """Ask all to leave, then see to it: processes that work together leave together."""
        for process, _ in self._members:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process, _ in self._members:
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()


@contextlib.contextmanager
def started(
    contestants: Mapping[Key, Contestant],
) -> Iterator[tuple[dict[Key, Worker], dict[Key, str]]]:
    """Workers by name, all of them ready; and for the others the package that is missing."""
    with contextlib.ExitStack() as stack:
        everyone = {key: Worker(contestant, stack) for key, contestant in contestants.items()}
        for worker in everyone.values():
            worker.wait_until_ready()
        yield (
            {key: worker for key, worker in everyone.items() if not worker.missing},
            {key: worker.missing for key, worker in everyone.items() if worker.missing},
        )


def take_turns(
    workers: Mapping[Key, Worker], rounds: int, say: Say = lambda _: None
) -> dict[Key, list[dict[str, float]]]:
    """Repeat all of them in turn, after `WARM_UP` repetitions of each that do not count.

    Each round begins with another one, so that none is always measured after the same neighbour.
    """
    keys = list(workers)
    for key in keys:
        say(f"warming up {key}")
        for _ in range(WARM_UP):
            workers[key].repeat()
    found: dict[Key, list[dict[str, float]]] = {key: [] for key in keys}
    for number in range(rounds):
        first = number % len(keys)
        for key in keys[first:] + keys[:first]:
            say(f"round {number + 1} of {rounds}: {key}")
            found[key].append(workers[key].repeat())
    return found


def find_free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def slug(device: Mapping[str, Any]) -> str:
    """A device's name as a file's: `amd-epyc-2-cores`, `nvidia-h200`.

    Args:
      device: as `run.provenance.device` gives it.
    """
    name = re.sub(r"\((r|tm)\)|cpu|processor|@.*", " ", str(device["kind"]).lower())
    name = re.sub(r"[^a-z0-9]+", "-", name).strip("-") or str(device["platform"])
    count, unit = device["count"], "cores" if device["platform"] == "cpu" else "devices"
    return name if count == 1 and unit == "devices" else f"{name}-{count}-{unit}"


def describe_setting(command: str, started: float, wall_s: float) -> dict[str, Any]:
    """What a measurement was made with: command, time, code, versions and processor.

    It asks JAX for no device: those are for the workers.
    """
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "command": command,
        "started": datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat("T", "seconds"),
        "wall_s": round(wall_s, 1),
        "commit": commit(),
        "versions": versions,
        "processor": cpu_model(),
        "cores": count_cores(),
    }


def list_remarks(remarks: Iterable[str]) -> str:
    """The note of a table: a line each."""
    return "\n".join(f"- {remark}" for remark in remarks)
