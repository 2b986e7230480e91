"""Where records come from: versions, device, commit, and the identity of the code.

Every results folder tells them for each command; checkpoints and workers are compared by them.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import inspect
import json
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from unitnorm.run import devices
from unitnorm.run.config import ExperimentConfig
from unitnorm.updates import find_update

PACKAGE = Path(__file__).parents[1]
LIBRARY = ("geometry.py", "updates")  # what every program computes with
VERSIONS = ("unitnorm", "jax", "jaxlib", "flax", "optax", "numpy")


def versions() -> dict[str, str]:
    """Of the libraries that the numbers depend on."""
    return {name: importlib.metadata.version(name) for name in VERSIONS}


def command_entry(command: str, started: float, wall_s: float, rows: int) -> dict[str, Any]:
    """What one command added, and on what: for the list `commands` of the provenance."""
    return {
        "command": command,
        "started": datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat("T", "seconds"),
        "wall_s": round(wall_s, 1),
        "rows": rows,
        "commit": commit(),
        "versions": {"python": platform.python_version()} | versions(),
        "device": device(),
    }


def device() -> dict[str, Any]:
    """The devices that JAX computes on."""
    found = jax.devices()
    kind = found[0].device_kind
    return {
        "platform": found[0].platform,
        "kind": devices.cpu_model() if kind == "cpu" else kind,
        "count": len(found),
        "machine": platform.machine(),
    }


@functools.cache
def commit() -> str | None:
    """The commit of the code, with "+" if it has been changed since; None outside a checkout."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        # a package may be installed inside a checkout of something else
        _git(PACKAGE, "ls-files", "--error-unmatch", "__init__.py")
        changed = _git(PACKAGE, "status", "--porcelain", "--", ".")
        return _git(PACKAGE, "rev-parse", "HEAD") + ("+" if changed else "")
    return None


def committed(path: Path) -> str | None:
    """When a file was last committed, as it stands now; None if it is not, or has changed since."""
    folder, name = path.resolve().parent, path.resolve().name
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if not _git(folder, "status", "--porcelain", "--", name):
            return _git(folder, "log", "-1", "--format=%cI %h", "--", name) or None
    return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


def fingerprint(rooms: Iterable[str], updates: Iterable[str], *parts: Any) -> str:
    """SHA-256 of all that a program's numbers depend on, for its checkpoints.

    Args:
      rooms: the folders of the code that computes, beside the library: ("archbn",).
      updates: their names; the code of those from other packages counts as well.
      *parts: texts, numbers and arrays: the config, the data's hash, seeds, rates.
    """
    code = [code_identity(*LIBRARY, *rooms), *map(code_of_update, updates)]
    known = [*code, *versions().values(), jax.devices()[0].platform, *parts]
    text = json.dumps([p if isinstance(p, str) else np.asarray(p).tolist() for p in known])
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def code_identity(*rooms: str) -> str:
    """SHA-256 of the source files in these folders of the package, or of these files; all: "."."""
    digest = hashlib.sha256()
    for room in map(PACKAGE.joinpath, rooms):
        for path in sorted(room.rglob("*.py")) if room.is_dir() else [room]:
            digest.update(f"{path.relative_to(PACKAGE)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def code_of_update(name: str) -> str:
    """An update's name, and the SHA-256 of the module that it lives in where that is not ours."""
    source = inspect.getsourcefile(find_update(name).filters)
    if source is None or Path(source).is_relative_to(PACKAGE):
        return name
    return name + hashlib.sha256(Path(source).read_bytes()).hexdigest()


def describe(config: ExperimentConfig, data: dict[str, Any]) -> dict[str, Any]:
    """What a folder's records have in common: the protocol and the data."""
    return {
        "config": config.protocol(),
        "config_sha256": config.fingerprint(),
        "data": data,
        "commands": [],
    }
