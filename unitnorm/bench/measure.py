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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import numpy as np

from unitnorm.errors import UserError
from unitnorm.report.tables import Cells, to_markdown

PACKAGES = ("unitnorm", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "geoopt")
PATIENCE_S = 20  # a worker that takes longer to leave is ended
WARM_UP = 2  # the first compiles, the second writes the first checkpoint


class Missing(Exception):
    """What is to be measured needs a package that is not installed."""

    def __init__(self, package: str):
        super().__init__(package)
        self.package = package


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
class Contestant:
    """Something to be measured: a kind of `worker.KINDS`, its options, in how many processes."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 1


class Worker:
    """A contestant in its own process, or in several that work together.

    Attributes:
      about: what it tells of itself when it is ready.
    """

    def __init__(self, contestant: Contestant, stack: contextlib.ExitStack):
        count = contestant.processes
        joint: dict[str, Any] = {}
        if count > 1:
            joint = {"coordinator": f"127.0.0.1:{free_port()}", "processes": count}
        self._members: list[tuple[subprocess.Popen[str], IO[str]]] = []
        stack.callback(self._end)
        for number in range(count):
            options = {**contestant.options, **joint} | ({"process": number} if joint else {})
            errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
            stack.enter_context(errors)
            command = [sys.executable, "-m", "unitnorm.bench.worker", contestant.kind]
            process = subprocess.Popen(
                [*command, json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                # several JAX processes share one GPU: none may take it whole
                env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ},
            )
            self._members.append((process, errors))
        self._kind = contestant.kind
        answers = self._answers()
        for answer in answers:
            if "missing" in answer:
                raise Missing(answer["missing"])
        self.about: dict[str, Any] = answers[0]["ready"]

    def repeat(self) -> dict[str, float]:
        """One repetition; of several processes the longest time and the sum of their memory."""
        for process, _ in self._members:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write("again\n")
                process.stdin.flush()
        answers = self._answers()
        joined = dict(answers[0])
        joined["seconds"] = max(answer["seconds"] for answer in answers)
        joined["peak_memory_mb"] = sum(answer["peak_memory_mb"] for answer in answers)
        return joined

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
            raise UserError(f"bench: {self._kind} failed while it was measured: {last}")
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
    contestants: Mapping[str, Contestant],
) -> Iterator[tuple[dict[str, Worker], dict[str, str]]]:
    """Workers by name, all of them ready; and for the others the package that is missing."""
    with contextlib.ExitStack() as stack:
        workers, missing = {}, {}
        for name, contestant in contestants.items():
            try:
                workers[name] = Worker(contestant, stack)
            except Missing as lacks:
                missing[name] = lacks.package
        yield workers, missing


def take_turns(
    workers: Mapping[str, Worker], rounds: int, say: Callable[[str], None] = lambda _: None
) -> dict[str, list[dict[str, float]]]:
    """Repeat all of them in turn, after `WARM_UP` repetitions of each that do not count.

    Each round begins with another one, so that none is always measured after the same neighbour.
    """
    names = list(workers)
    for name in names:
        say(f"warming up {name}")
        for _ in range(WARM_UP):
            workers[name].repeat()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            say(f"round {number + 1} of {rounds}: {name}")
            found[name].append(workers[name].repeat())
    return found


def free_port() -> int:
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


def provenance(command: str, started: float, wall_s: float) -> dict[str, Any]:
    """What a measurement was made with: command, time, code, versions, processor and its load."""
    from unitnorm.run.devices import cpu_model
    from unitnorm.run.provenance import commit

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
        "cores": cores(),
    }


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def as_json(facts: Mapping[str, Any]) -> bytes:
    """A file's content, for readers too."""
    return (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode()


def as_markdown(table: Cells, remarks: Sequence[str]) -> bytes:
    """A table and what stands below it."""
    lines = "\n".join(f"- {remark}" for remark in remarks)
    parts = [to_markdown(table), *([lines] if lines else [])]
    return ("\n\n".join(parts) + "\n").encode()
