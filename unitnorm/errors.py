"""The exceptions that a user is meant to see, each as one line; any other is a defect of ours."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """What the user can mend, in one line: what is wrong, where, what was expected, what to do."""

    exit_code = 2


class Interrupted(KeyboardInterrupt):
    """The user or the system asked to stop, and everything up to there is saved."""


def expect(good: object, where: object, expected: str, found: object) -> None:
    """Raises the `UserError` "where: expected …, found …" unless `good` holds."""
    if not good:
        raise UserError(f"{where}: expected {expected}, found {found}")


@contextlib.contextmanager
def system_faults(path: Path, what: str) -> Iterator[None]:
    """Turns whatever the system refuses into the `UserError` "path: cannot be `what` (…)"."""
    try:
        yield
    except (OSError, MemoryError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
        hint = "mend that" if what == "read" else "mend that, or give another --out"
        if getattr(problem, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "free some space"
        raise UserError(
            f"{path}: cannot be {what} ({reason}); {hint} and repeat the command"
        ) from problem


def one_line(text: object) -> str:
    """An error's text, say, without its line breaks."""
    return " ".join(str(text).split())
