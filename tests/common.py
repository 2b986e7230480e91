"""What tests of several rooms share: a refusal in a line, the bytes of a folder, commands."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from unitnorm.cli import main
from unitnorm.errors import UserError

ROOT = Path(__file__).parents[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@contextlib.contextmanager
def a_line(match: str | None = None, folder: Path | None = None) -> Iterator[pytest.ExceptionInfo]:
    """It is refused in one line, and nothing in the folder changes."""
    before = folder and contents(folder)
    with pytest.raises(UserError, match=match) as caught:
        yield caught
    assert "\n" not in str(caught.value)
    assert before == (folder and contents(folder))


def call(*words: object, code: int = 0) -> str:
    """What a command prints in this process, where it ends with this exit code."""
    done = CliRunner().invoke(main, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.output


def python(
    code: str, *words: object, cwd: Path = ROOT, **environment: object
) -> subprocess.CompletedProcess[str]:
    """Run a program in a process that was not set up for tests."""
    given = {name: str(value) for name, value in environment.items()}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **given}, timeout=300,
    )  # fmt: skip
