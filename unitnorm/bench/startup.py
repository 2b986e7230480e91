"""How long a user waits: from typing `unitnorm train` to the first epoch, and for --help.

The command runs as typed, with an empty cache (cold), then again with the cache it left (warm). It
is timed up to its first line about an epoch: this epoch, well under a second, is counted in.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import pandas as pd

from unitnorm.bench import measure
from unitnorm.bench.measure import Measurement, Range, Say
from unitnorm.errors import UserError

COLUMNS = ["what", "cache", "seconds", "low", "high"]
COMMAND = [sys.executable, "-m", "unitnorm"]


def seconds_until(mark: str, words: Sequence[str], cache: str = "") -> float:
    """Of a command up to its first line that holds `mark`, where it is ended; "": of all of it."""
    environment = os.environ | {"UNITNORM_CACHE": cache}
    said = []
    start = time.perf_counter()
    process = subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        for line in process.stdout:
            said.append(line)
            if mark and mark in line:
                return time.perf_counter() - start
        if process.wait() == 0 and not mark:
            return time.perf_counter() - start
    finally:
        process.terminate()
        process.communicate()
    failed = "ended without an epoch" if mark else "failed"
    raise UserError(f"unitnorm {words[0]} {failed}: {' '.join(''.join(said).split())[-300:]}")


def measure_startup(rounds: int, *, quick: bool, say: Say) -> Measurement:
    """Every start; low and high are the fastest and the slowest; `quick` changes nothing."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        seconds.setdefault(("unitnorm --help", ""), []).append(seconds_until("", ["--help"]))
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("cold", "warm"):
                words = ["train", "--out", os.path.join(folder, cache)]
                found = seconds_until(": epoch ", words, os.path.join(folder, "cache"))
                seconds.setdefault(("unitnorm train", cache), []).append(found)
    rows = [[*what, *Range.of(values)] for what, values in seconds.items()]
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
