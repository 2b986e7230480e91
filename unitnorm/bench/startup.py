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
from pathlib import Path

import pandas as pd

from unitnorm.bench.measure import Measurement, Say, Spread
from unitnorm.errors import UserError
from unitnorm.report.tables import Cells

COLUMNS = ["what", "cache", "seconds", "low", "high"]
COMMAND = [sys.executable, "-m", "unitnorm"]
HELP, TRAIN = "unitnorm --help", "unitnorm train"


def time_starts(rounds: int, *, say: Say = lambda _: None) -> pd.DataFrame:
    """Start the commands and wait.

    Args:
      rounds: how often each; the median counts.
      say: told what is being done.

    Returns:
      Rows of `COLUMNS`; low and high are the fastest and the slowest start.

    Raises:
      UserError: a command fails.
    """
    found: dict[tuple[str, str], list[float]] = {}

    def note(what: str, cache: str, seconds: float) -> None:
        found.setdefault((what, cache), []).append(seconds)

    for number in range(rounds):
        say(f"start {number + 1} of {rounds}")
        note(HELP, "", seconds_of_help())
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("cold", "warm"):
                note(TRAIN, cache, seconds_to_first_epoch(Path(folder), cache))
    rows = [[what, cache, *Spread.of(times)] for (what, cache), times in found.items()]
    return pd.DataFrame(rows, columns=COLUMNS)


def seconds_of_help() -> float:
    """The whole of `unitnorm --help`."""
    start = time.perf_counter()
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise UserError(f"bench: unitnorm --help failed: {done.stderr.strip()}")
    return seconds


def seconds_to_first_epoch(folder: Path, name: str) -> float:
    """`unitnorm train` into an empty folder up to its first line about an epoch; then it is ended.

    Args:
      folder: holds the cache that successive calls share, and the results.
      name: of the results' folder.
    """
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
    raise UserError(f"bench: unitnorm train ended without an epoch: {detail}")


def measure_startup(rounds: int, *, say: Say) -> Measurement:
    """`time_starts`, with its files and its table."""
    frame = time_starts(rounds, say=say)
    facts = {
        "rounds": rounds,
        "what": "seconds of the whole of --help, and from the start of `unitnorm train` to the end "
        "of its first epoch; cold: no compiled program cached; low and high the fastest and the "
        "slowest of the rounds",
    }
    return Measurement("startup", {"": frame}, make_cells(frame), facts)


def make_cells(frame: pd.DataFrame) -> Cells:
    """Seconds of every start."""
    rows = [
        [what, cache, f"{seconds:.2f}", f"{low:.2f} – {high:.2f}"]
        for what, cache, seconds, low, high in frame.itertuples(index=False)
    ]
    header = ["what", "cache", "seconds", "(range)"]
    title = "Seconds until --help is over, or the first epoch"
    return Cells(title, pd.DataFrame(rows, columns=header))
