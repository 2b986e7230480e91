"""How everything is measured: workers that take turns, medians and ranges."""

import contextlib
import multiprocessing
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Self

import numpy as np

from unitnorm.bench.worker import serve
from unitnorm.errors import UserError

Say = Callable[[str], None]

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

    def named(self, median: str, ends: str = "") -> dict[str, float]:
        """As columns of a table: the median by its name, the ends as `low` and `high` after
        `ends`."""
        return {median: self.median, f"{ends}low": self.low, f"{ends}high": self.high}


@dataclass(frozen=True)
class Contestant:
    """Something to be measured: a generator, its options, in how many processes.

    Several processes are independent copies, each with data of its own and one thread.
    """

    kind: str  # as `worker.answers` takes it
    options: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 1
    row: Mapping[str, Any] = field(default_factory=dict)  # how its row of the table begins
    warm_up: int = WARM_UP  # repetitions that do not count

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.row.items())


class Found(NamedTuple):
    """What a contestant has said; one that lacks a package tells it in `about`, and no more."""

    row: Mapping[str, Any]  # of the contestant
    about: dict[str, Any]  # itself
    samples: int  # of a repetition, over all copies; 0 where there are none
    # of each repetition; of several processes the longest time and the sum of the memory
    answers: list[dict[str, float]]

    def range_of(self, name: str, scale: float = 1.0) -> Range:
        """Of one of its figures, times `scale`."""
        return Range.of([scale * answer[name] for answer in self.answers])


class Worker:
    """A contestant's processes; `answers` to what it is, then `repeat` as often as wanted."""

    def __init__(self, contestant: Contestant, stack: contextlib.ExitStack):
        self._kind = contestant.kind
        # several JAX processes share one GPU: none may take it whole
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
        environment |= ONE_THREAD if contestant.processes > 1 else {}
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        for _ in range(contestant.processes):
            ours, its = context.Pipe()
            given = its, contestant.kind, dict(contestant.options), environment
            process = context.Process(target=serve, args=given, daemon=True)
            process.start()
            its.close()
            self._pipes.append(ours)
            stack.callback(_end, process, ours)

    def answers(self) -> list[dict[str, Any]]:
        """Of each process; one that fails is a `UserError`."""
        found = []
        for pipe in self._pipes:
            try:
                found.append(pipe.recv())
            except (EOFError, ConnectionResetError):
                found.append({"failed": "its process was killed"})
            if "failed" in found[-1]:
                kind, why = self._kind.rpartition(".")[2], found[-1]["failed"]
                raise UserError(f"bench: {kind} failed while it was measured: {why}")
        return found

    def repeat(self) -> dict[str, float]:
        """One repetition."""
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.send(None)
        answers = self.answers()
        return {
            **answers[0],
            "seconds": max(answer["seconds"] for answer in answers),
            "peak_memory_mb": sum(answer["peak_memory_mb"] for answer in answers),
        }


def _end(process: BaseProcess, pipe: Connection) -> None:
    pipe.close()
    process.join(PATIENCE_S)
    process.kill()
    process.join()


def in_turns(
    contestants: Sequence[Contestant], rounds: int, say: Say = lambda _: None
) -> list[Found]:
    """Start all of them, and repeat them in turn; a contestant that fails is a `UserError`.

    Each round begins with another one, so that none is always measured after the same neighbour.
    """
    with contextlib.ExitStack() as stack:
        say(f"starting {sum(c.processes for c in contestants)} processes")
        workers = [Worker(contestant, stack) for contestant in contestants]
        found = []
        for contestant, worker in zip(contestants, workers, strict=True):
            about = worker.answers()[0]
            samples = contestant.processes * about.get("samples", 0)
            found.append(Found(contestant.row, about, samples, []))
        every = list(zip(contestants, workers, found, strict=True))
        turns = [each for each in every if "missing" not in each[2].about]
        for contestant, worker, _ in turns:
            for _ in range(contestant.warm_up):
                say(f"warming up {contestant}")
                worker.repeat()
        for number in range(rounds):
            for contestant, worker, told in turns:
                say(f"round {number + 1} of {rounds}: {contestant}")
                told.answers.append(worker.repeat())
            turns = turns[1:] + turns[:1]
    return found


def find_device() -> dict[str, Any]:
    """What JAX computes on, as `run.provenance.device` tells it; asked in another process, which
    leaves a GPU's memory to the workers."""
    return in_turns([Contestant("contestants.nothing", warm_up=0)], 0)[0].about["device"]


def slug(device: Mapping[str, Any]) -> str:
    """The name of a device, as `find_device` gives it, as a file's: `amd-epyc-2-cores`."""
    name = re.sub(r"\((r|tm)\)|cpu|processor|@.*", " ", str(device["kind"]).lower())
    name = re.sub(r"[^a-z0-9]+", "-", name).strip("-") or str(device["platform"])
    count, unit = device["count"], "cores" if device["platform"] == "cpu" else "devices"
    return name if count == 1 and unit == "devices" else f"{name}-{count}-{unit}"
