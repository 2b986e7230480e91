"""How long a user waits: from typing `unitnorm train` to the first epoch, and for --help.

The command runs as typed, with an empty cache (cold) or with that of another start (warm). It is
timed up to its first line about an epoch: this epoch, well under a second, is counted in.
"""

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

from unitnorm.bench.measure import Contestant
from unitnorm.bench.survey import Device, Survey
from unitnorm.errors import UserError

STARTS = (("unitnorm --help", ""), ("unitnorm train", "cold"), ("unitnorm train", "warm"))
COMMAND = [sys.executable, "-m", "unitnorm"]


def seconds_until(mark: str, words: Sequence[str], cache: str = "") -> float:
    """Of a command up to its first line that holds `mark`, where it is ended; "": of all of it."""
    said, begun = [], time.perf_counter()
    process = subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"UNITNORM_CACHE": cache},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        for line in process.stdout:
            said.append(line)
            if mark and mark in line:
                return time.perf_counter() - begun
        if process.wait() == 0 and not mark:
            return time.perf_counter() - begun
    finally:
        process.terminate()
        process.communicate()
    failed = "ended without an epoch" if mark else "failed"
    raise UserError(f"unitnorm {words[0]} {failed}: {' '.join(''.join(said).split())[-300:]}")


def start(cache: str) -> Iterator[dict[str, Any]]:
    """A start of `unitnorm train`, its cache "cold" or "warm"; "": of `unitnorm --help`."""
    with tempfile.TemporaryDirectory() as folder:
        yield {}
        for number in itertools.count():
            words = ["train", "--out", os.path.join(folder, f"out-{number}")]
            kept = os.path.join(folder, cache if cache == "warm" else f"{cache}-{number}")
            asked = (": epoch ", words, kept) if cache else ("", ["--help"], kept)
            yield {"seconds": seconds_until(*asked)}


def survey(device: Device, quick: bool) -> Survey:
    """Every start; `quick` changes nothing."""
    return Survey(
        name="startup",
        title="Seconds until --help is over, or the first epoch",
        groups=[[
            Contestant("startup.start", {"cache": cache}, row={"what": what, "cache": cache},
                       warm_up=int(cache == "warm"))
            for what, cache in STARTS
        ]],
        rows=lambda found: [
            {**each.row, **each.range_of("seconds").named("seconds")} for each in found
        ],
        columns={
            "what": "{what}", "cache": "{cache}", "seconds": "{seconds:.2f}",
            "(range)": "{low:.2f} – {high:.2f}",
        },
        note=["cold: no compiled program is cached; warm: all are, from a start before."],
    )  # fmt: skip
