"""An experiment of numbers, for workers in other processes: what a group gives, and how it ends.

`python -m tests.cluster_example --seconds 20` measures what the engine costs: groups that only wait
for so long, with data as large as MNIST, on 1, 2, 4 and 8 workers of this machine.
"""

import argparse
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from unitnorm.run import records
from unitnorm.run.cluster import connect, identity
from unitnorm.run.loop import Session
from unitnorm.run.planner import Found, Group, complete
from unitnorm.run.records import Records, Schema, Table

DATA = list(range(100))
SCHEMA = Schema("squares", {"runs": Table({"n": "i", "square": "i"}, ("n",))}, ("n",))


@dataclass(frozen=True)
class Squares:
    """The squares of 0 … count − 1, each a group of `seconds`.

    The worker that takes the group `kills` kills itself, unless the file `mark` says that one has.
    """

    count: int
    seconds: float = 0.0
    kills: int = -1
    mark: Path = Path()
    schema: Schema = SCHEMA

    def missing(self, known: Records) -> Iterator[Group]:
        for n in sorted({*range(self.count)} - {*known["runs"]["n"]}):
            yield Group(f"square {n}", "runs", pd.DataFrame({"n": [n]}), n)

    def compute(self, group: Group, data: list[Any], session: Session) -> Found:
        if group.what == self.kills and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        row = {"n": group.what, "square": data[group.what] ** 2}
        return Found({"runs": SCHEMA.frame("runs", [row])})


class Kept:
    """A job for the planner, which keeps what is stored, what is said, and who computed a group."""

    def __init__(self, experiment, interrupted=lambda: False, known=None, data=DATA):
        self.experiment, self.data, self.engine = experiment, {"": data}, None
        self.records = Records.empty(SCHEMA) if known is None else known
        self.stored: list[Records] = []
        self.said: list[str] = []
        self.workers: dict[str, str] = {}
        self.session = Session(say=self.said.append, interrupted=interrupted)

    def store(self, known, done=()) -> None:
        self.stored.append(known)
        self.workers |= {group.title: worker for group, _, worker in done}

    def complete(self, engine=None) -> pd.DataFrame:
        self.engine = engine
        complete(self)
        return self.stored[-1]["runs"]


def measure(workers: int, seconds: float, rounds: int) -> tuple[float, float]:
    """Seconds until workers have libraries and data, and those a group costs beside its own."""
    data = [*range(1000), np.zeros(55_000_000, np.uint8)]
    job = Kept(Squares(rounds * workers, seconds), data=data)
    about = {"config": {}, "config_sha256": "", "data": {}, "commands": []}
    started = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as name,
        records.locked(folder := Path(name)),
        connect(None, workers, 1) as engine,
    ):
        engine.client.wait_for_workers(workers)
        engine.client.run(identity)  # imports the libraries on each
        engine.sent[id(data)] = engine.client.scatter(data, hash=False, broadcast=True)
        there = time.perf_counter()
        job.store = lambda known, done=(): records.write(folder, replace(known, provenance=about))
        job.engine = engine
        complete(job)
        ended = time.perf_counter()
    return there - started, (ended - there) / rounds - seconds


if __name__ == "__main__":
    from tests.cluster_example import measure as importable_measure  # workers import it by name

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="CSV file to write")
    options = parser.parse_args()
    rows = []
    for workers in (1, 2, 4, 8):
        start, extra = importable_measure(workers, options.seconds, options.rounds)
        print(
            f"{workers} workers: ready after {start:.1f} s; {extra:.2f} s a group beside its "
            f"{options.seconds:g} s, {extra / options.seconds:.1%}"
        )
        rows.append((workers, options.seconds, options.rounds, start, extra))
    if options.out:
        columns = ["workers", "group_s", "rounds", "ready_s", "extra_s"]
        pd.DataFrame(rows, columns=columns).round(3).to_csv(options.out, index=False)
