"""How long a user waits: from typing `unitnorm train` to the first epoch, and for --help.

The command runs as typed, with an empty cache (cold), then again with the cache it left (warm). It
is timed up to its first line about an epoch: this epoch, well under a second, is counted in.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from unitnorm.bench import measure
from unitnorm.bench.measure import Contestant, Measurement, Say
from unitnorm.errors import UserError

COLUMNS = ["what", "cache", "seconds", "low", "high"]
COMMAND = [sys.executable, "-m", "unitnorm"]


def startup() -> Iterator[dict[str, Any]]:
    """Seconds of each start."""
    yield {}
    while True:
        with tempfile.TemporaryDirectory() as folder:
            yield {
                "help": seconds_of_help(),
                **{c: seconds_to_first_epoch(Path(folder), c) for c in ("cold", "warm")},
            }


def seconds_of_help() -> float:
    """The whole of `unitnorm --help`."""
    start = time.perf_counter()
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"unitnorm --help failed: {done.stderr.strip()}")
    return time.perf_counter() - start


def seconds_to_first_epoch(folder: Path, name: str) -> float:
    """`unitnorm train` into an empty folder `name` up to its first line about an epoch; then it is
    ended. `folder` holds the cache, too, that successive calls share."""
    words = [*COMMAND, "train", "--out", str(folder / name)]
    environment = {**os.environ, "UNITNORM_CACHE": str(folder / "cache")}
    said = []
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                said.append(line)
                if ": epoch " in line:
                    return time.perf_counter() - start
        finally:
            process.terminate()
            process.communicate()
        errors.seek(0)
        detail = " ".join((errors.read() or "".join(said)).split())[-300:]
    raise UserError(f"unitnorm train ended without an epoch: {detail}")


def measure_startup(rounds: int, *, say: Say) -> Measurement:
    """Every start; low and high are the fastest and the slowest."""
    starts = {"startup": Contestant("startup.startup")}
    found = measure.in_turns(starts, rounds, say, warm_up=0)[0]["startup"]
    rows = [
        ["unitnorm --help", "", *found.spread("help")],
        ["unitnorm train", "cold", *found.spread("cold")],
        ["unitnorm train", "warm", *found.spread("warm")],
    ]
    frame = pd.DataFrame(rows, columns=COLUMNS)
    facts = {
        "rounds": rounds,
        "what": "seconds of the whole of --help, and from the start of `unitnorm train` to the end "
        "of its first epoch; cold: no compiled program cached; low and high the fastest and the "
        "slowest of the rounds",
    }
    columns = {
        "what": "{what}", "cache": "{cache}", "seconds": "{seconds:.2f}",
        "(range)": "{low:.2f} – {high:.2f}",
    }  # fmt: skip
    title = "Seconds until --help is over, or the first epoch"
    return Measurement("startup", {"": frame}, measure.make_cells(title, frame, columns), facts)
