"""The process that serves one contestant: `python -m unitnorm.bench.worker KIND OPTIONS`.

A contestant is a generator, KIND its module here and its name. It sets up and gives what it tells
of itself, then one repetition after the other, each with what it has found. The process passes
both on as lines of JSON, a repetition for each line on its standard input, and ends with the input.
"""

import importlib
import json
import os
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RATE = 1e-3  # at which every update trains at every depth; speed does not depend on it
OPTIONAL = ("torch", "geoopt", "emerging_optimizers")


def serve(kind: str, options: dict[str, Any], orders: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The answers of a contestant: {"ready": …} or {"missing": package}, then one per order."""
    module, _, name = kind.partition(".")
    try:
        contestant = getattr(importlib.import_module(f"unitnorm.bench.{module}"), name)(**options)
        yield {"ready": next(contestant)}
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        yield {"missing": error.name}
        return
    for _ in orders:
        started = time.perf_counter()
        found = next(contestant)
        seconds = time.perf_counter() - started
        yield {"seconds": seconds, "peak_memory_mb": peak_memory_mb(), **found}


def peak_memory_mb() -> float:
    """The most memory that this process has had, in MB (10⁶ bytes)."""
    status = Path("/proc/self/status")  # Linux; its ru_maxrss counts the parent's memory as well
    if status.exists() and (peak := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(peak[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to the error stream, not among the answers
    for answer in serve(sys.argv[1], json.loads(sys.argv[2]), iter(sys.stdin.readline, "")):
        print(json.dumps(answer), file=answers, flush=True)
