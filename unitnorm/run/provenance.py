"""Where records come from: versions, device, commit, and the identity of the code.

Every results folder tells them for each command that added to it; checkpoints use the identity.
"""

from __future__ import annotations

import ast
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

import unitnorm
from unitnorm.run import devices
from unitnorm.run.config import ExperimentConfig
from unitnorm.updates import UPDATES, check_update_name, find_update

# What these do to the numbers is told by other parts of an identity: the data's hash, the config.
APART = ("unitnorm.run", "unitnorm.data", "unitnorm.report", "unitnorm.errors")
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
        "processes": jax.process_count(),
        "machine": platform.machine(),
    }


@functools.cache
def commit() -> str | None:
    """The commit of the code, with "+" if it has been changed since; None outside a checkout."""
    folder = Path(__file__).parents[1]
    try:
        # a package may be installed inside a checkout of something else
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        head = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "")


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


def fingerprint(module: str, updates: Iterable[str], *parts: Any) -> str:
    """SHA-256 of all that a program's numbers depend on, for its checkpoints.

    Args:
      module: the module that computes, such as `unitnorm.archbn.training`; see `code_identity`.
      updates: their names; the code of those from other packages counts as well.
      *parts: texts, numbers and arrays: the config, the data's hash, seeds, rates.
    """
    code = [code_identity(module), *map(outside_code, updates)]
    told = [*code, *versions().values(), jax.devices()[0].platform, *parts]
    text = json.dumps([p if isinstance(p, str) else np.asarray(p).tolist() for p in told])
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def code_identity(module: str) -> str:
    """SHA-256 of what a module computes with: itself and all of unitnorm that it imports.

    Comments, docstrings and layout are left out, so that they discard no state, and so are the
    packages `APART`.
    """
    found = {name: ast.dump(tree) for name, tree in modules_of(module).items()}
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()


def outside_code(update: str) -> str:
    """An update's name, and the SHA-256 of the module that it lives in where that is not ours."""
    name = check_update_name(update)
    source = None if name in UPDATES else inspect.getsourcefile(find_update(name).filters)
    return name if source is None else name + hashlib.sha256(Path(source).read_bytes()).hexdigest()


def hash_sources() -> str:
    """SHA-256 of every source file of unitnorm: whether two hosts have the same version of it."""
    digest = hashlib.sha256()
    for root in map(Path, unitnorm.__path__):
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def modules_of(module: str) -> dict[str, ast.Module]:
    """A module and all of unitnorm that it imports but `APART`, by name, without docstrings."""
    found: dict[str, ast.Module] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _source(name)
        if path is None or name in found or name.startswith(APART):
            continue
        found[name] = tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unitnorm"):
                # a name is a module, or in one; those of unitnorm itself are imported on first use
                waiting += [f"{node.module}.{alias.name}" for alias in node.names]
                waiting += [str(node.module)] if node.module != "unitnorm" else []
            elif isinstance(node, ast.Import):
                waiting += [a.name for a in node.names if a.name.startswith("unitnorm.")]
            elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                node.body = [statement for statement in node.body if not _is_text(statement)]
    return found


def _source(module: str) -> Path | None:
    """The file of a module of unitnorm, without importing anything; None if there is none."""
    for root in unitnorm.__path__:
        place = Path(root, *module.split(".")[1:])
        for path in (place / "__init__.py", place.with_suffix(".py")):
            if path.is_file():
                return path
    return None


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def describe(config: ExperimentConfig, data: dict[str, Any]) -> dict[str, Any]:
    """What a folder's records have in common: the protocol and the data."""
    return {
        "config": config.protocol(),
        "config_sha256": config.fingerprint(),
        "data": data,
        "commands": [],
    }


def committed(path: Path) -> str | None:
    """When a file was last committed, as it stands now; None if it is not, or has changed since."""
    try:
        if _git(path.resolve().parent, "status", "--porcelain", "--", path.resolve().name):
            return None
        form = ("log", "-1", "--format=%cI %h", "--", path.resolve().name)
        return _git(path.resolve().parent, *form) or None
    except (OSError, subprocess.SubprocessError):
        return None
