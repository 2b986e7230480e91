"""Compiled programs, kept for the next process by JAX, and bounded.

The one place that knows how JAX keeps them: as NAME-cache, written in place, and then NAME-atime,
by which it tells which to remove first; both while it holds `.lockfile`. JAX leaves what a killed
process has half written: it would warn and compile anew each time, and could keep no further
program, for it asks every one for its NAME-atime. `tests/test_compiled.py` fails where a version
of JAX does otherwise.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import filelock
import jax

MAX_BYTES = 1 << 30  # beyond that, what was not used for longest goes
PATIENCE_S = 10.0  # for another process that is reading or writing a program


def keep_compiled() -> None:
    """Have JAX keep compiled programs in the folder `programs` of the cache, where there is one."""
    try:
        folder = cache_folder() / "programs"
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(folder, os.W_OK):
        return
    with contextlib.suppress(OSError):  # another process holds the lock: no harm, only a warning
        remove_unfinished(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes have half written."""
    with filelock.FileLock(folder / ".lockfile", timeout=PATIENCE_S):
        for program in folder.glob("*-cache"):
            if not program.with_name(f"{program.name.removesuffix('-cache')}-atime").exists():
                program.unlink()


def cache_folder() -> Path:
    """UNITNORM_CACHE, else XDG_CACHE_HOME/unitnorm, else ~/.cache/unitnorm.

    Raises:
      OSError: if none of them is set and there is no home folder.
    """
    if own := os.environ.get("UNITNORM_CACHE"):
        return Path(own)
    # The XDG standard says that a relative path is to be ignored.
    if (shared := Path(os.environ.get("XDG_CACHE_HOME", ""))).is_absolute():
        return shared / "unitnorm"
    try:
        return Path.home() / ".cache" / "unitnorm"
    except RuntimeError as problem:
        raise OSError("there is no home folder") from problem
