"""The cache of prepared copies: where it is, who may write to it, and when a copy is trusted.

Change here how copies are kept. A copy is prepared beside its final place and renamed into it as a
whole, by one process at a time; it is hashed on every read. So a process killed at any moment
leaves a folder that nobody takes for good and that the next preparation removes, and a damaged copy
is noticed and prepared again.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from unitnorm.data.arrays import Arrays, hashes

log = logging.getLogger(__name__)

_UNFINISHED = ".preparing-"


class DamagedCopyError(OSError):
    """A prepared copy that cannot be read, or does not hold what it should."""


def default_folder() -> Path:
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


def key(files: tuple[Path, ...]) -> str:
    """The name of the copy of these files: a hash of their bytes, names, and of the copy's form.

    Raises:
      OSError: if one of them cannot be read.
    """
    from unitnorm.data.builder import VERSION

    digest = hashlib.sha256(VERSION.encode())
    for path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"\n{path.name} {content}".encode())
    return digest.hexdigest()[:32]


def fetch(
    name: str,
    make: Callable[[], Arrays],
    folder: Path,
    known: tuple[str, ...] | None = None,
) -> tuple[Arrays, tuple[str, ...]]:
    """The arrays of the copy `name` in `folder` and their hashes; prepares it where it is missing.

    Args:
      name: from `key`.
      make: reads the source; called only if there is no good copy, and before anything is written.
      folder: of the cache; made if it does not exist.
      known: the hashes of the arrays where they are known beforehand; otherwise a copy must have
        those that it noted when it was prepared.

    Raises:
      OSError: if the folder cannot be used or the copy cannot be written.
    """
    copy = folder / name
    with contextlib.suppress(DamagedCopyError):
        if copy.exists():
            return _read(copy, known)
    arrays = make()
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one(folder):
        if copy.exists():  # another process was faster, or the copy is damaged
            try:
                return _read(copy, known)
            except DamagedCopyError as problem:
                log.warning("the prepared copy is damaged and is prepared again: %s", problem)
        for leftover in (copy, *folder.glob(f"{_UNFINISHED}*")):
            _remove(leftover)
        unfinished = folder / f"{_UNFINISHED}{name}"
        try:
            return _prepare(arrays, unfinished, copy)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


def _prepare(arrays: Arrays, unfinished: Path, copy: Path) -> tuple[Arrays, tuple[str, ...]]:
    from unitnorm.data import builder

    log.info("preparing the data in %s (first use only)", copy)
    unfinished.mkdir()
    builder.prepare(arrays, unfinished)
    # Read back before anyone else can see it: a write that failed in silence fails here.
    result = _read(unfinished, hashes(arrays))
    unfinished.rename(copy)
    return result


def _read(copy: Path, known: tuple[str, ...] | None) -> tuple[Arrays, tuple[str, ...]]:
    from unitnorm.data import builder

    try:
        arrays, noted = builder.read(copy)
        found = hashes(arrays)
    except Exception as problem:  # TFDS raises all kinds on damaged files
        reason = " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
        raise DamagedCopyError(f"{copy}: {reason}") from problem
    if found != (known or noted):
        raise DamagedCopyError(f"{copy}: the images or labels are not those that were prepared")
    return arrays, found


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Holds a lock on the folder itself, which ends with the process, however that ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("waiting for another process that prepares data in %s", folder)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
