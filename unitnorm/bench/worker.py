"""The process that serves one contestant, and its answers through a pipe.

A contestant is a generator. It sets up and gives what it tells of itself, then one repetition after
the other, each with what it has found. An order asks for the next one; the process ends with the
pipe, and so with whoever holds its other end.
"""

import importlib
import os
import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

RATE = 1e-3  # at which every update trains at every depth; speed does not depend on it
OPTIONAL = ("torch", "geoopt", "emerging_optimizers")


def serve(
    pipe: Connection, kind: str, options: Mapping[str, Any], environment: Mapping[str, str]
) -> None:
    """Answer with a dict for each order; {"failed": why} is the last one."""
    os.environ.update(environment)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)  # what fails is told by the pipe
    try:
        for answer in answers(kind, options):
            pipe.send(answer)
            pipe.recv()
    except EOFError:
        pass
    except Exception as error:
        pipe.send({"failed": repr(error)})


def answers(kind: str, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What a contestant tells of itself, or {"missing": package}; then its repetitions.

    Args:
      kind: "module.generator", a module of this room or the path of another.
      options: of the generator.
    """
    module, _, name = kind.rpartition(".")
    try:
        found = importlib.import_module(module if "." in module else f"unitnorm.bench.{module}")
        contestant = getattr(found, name)(**options)
        yield next(contestant)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        yield {"missing": error.name}
        return
    while True:
        started = time.perf_counter()
        answer = next(contestant)
        seconds = time.perf_counter() - started
        yield {"seconds": seconds, "peak_memory_mb": peak_memory_mb(), **answer}


def peak_memory_mb() -> float:
    """The most memory that this process has had, in MB (10⁶ bytes)."""
    status = Path("/proc/self/status")  # Linux; its ru_maxrss counts the parent's memory as well
    if status.exists() and (peak := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(peak[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
