"""The process that serves one contestant: `python -m unitnorm.bench.worker KIND OPTIONS`.

It says in one line of JSON that it is ready, or what it lacks. Each line on standard input then
asks for a repetition, which it answers with the seconds; the end of the input ends it.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RATE = 1e-3  # at which every update trains at every depth; speed does not depend on it
OPTIONAL = ("torch", "geoopt", "emerging_optimizers")
KINDS = {  # kind → the module whose function of that name serves it
    "program": "unitnorm.bench.contestants",
    "optax_loop": "unitnorm.bench.contestants",
    "machine": "unitnorm.bench.contestants",
    "torch_sgd": "unitnorm.bench.peers",
    "geoopt": "unitnorm.bench.peers",
    "oblique_sgd": "unitnorm.bench.peers",
    "updates": "unitnorm.bench.updates",
    "convolution": "unitnorm.bench.convolution",
}


class Orders:
    """What a contestant hears and says.

    Args:
      send: takes a dictionary for the process that asks.
    """

    def __init__(self, send: Callable[[dict[str, Any]], None]):
        self._send = send
        self._started = 0.0

    def ready(self, **about: Any) -> None:
        """Tell that repetitions may begin, and what they are."""
        self._send({"ready": about})

    def wait(self) -> bool:
        """Return when the next repetition is asked for; False if there is none."""
        asked = bool(sys.stdin.readline())
        self._started = time.perf_counter()
        return asked

    def done(self, **found: float) -> None:
        """Tell that the repetition is over."""
        seconds = time.perf_counter() - self._started
        self._send({"seconds": seconds, "peak_memory_mb": peak_memory_mb(), **found})

    def serve(self, repetition: Callable[[], dict[str, float] | None], **about: Any) -> None:
        """Repeat as often as it is asked for."""
        self.ready(**about)
        while self.wait():
            found = repetition()
            self.done(**(found or {}))


def peak_memory_mb() -> float:
    """The most memory that this process has had, in MB (10⁶ bytes)."""
    status = Path("/proc/self/status")  # Linux; its ru_maxrss counts the parent's memory as well
    if status.exists() and (peak := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(peak[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def main() -> None:
    """Serve the contestant that the command line names."""
    kind, options = sys.argv[1], json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to the error stream, not among the answers

    def send(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    try:
        contestant = getattr(importlib.import_module(KINDS[kind]), kind)
        contestant(Orders(send), **options)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        send({"missing": error.name})


if __name__ == "__main__":
    main()
