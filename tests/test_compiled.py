"""Compiled programs are kept, within a bound; what a killed process has half written does no harm.

These tests hold what `unitnorm.run.compiled` takes for granted of JAX against the version at hand.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import filelock
import jax
import pytest

from unitnorm.run import compiled

PROGRAMS = """
import sys
from unitnorm.run import compiled, devices
compiled.MAX_BYTES = int(sys.argv[1])
devices.prepare(1)
import jax, jax.numpy as jnp
assert jax.config.jax_compilation_cache_max_size == int(sys.argv[1])
for number in map(float, sys.argv[2:]):
    print(jax.jit(lambda x: jnp.sin(x) + number)(jnp.float32(0.0)))
"""


@pytest.fixture
def kept(tmp_path):
    return tmp_path / "programs"


def compute(kept: Path, *numbers: int, most: int = compiled.MAX_BYTES) -> None:
    """Run a program for each number in a process that says nothing but its results."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAMS, *map(str, (most, *numbers))],
        env={**os.environ, "UNITNORM_CACHE": str(kept.parent)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [f"{number}.0" for number in numbers]


def programs(kept: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in kept.glob("*-cache")}


def test_a_program_is_compiled_once_and_kept_in_the_way_that_we_rely_on(kept):
    compute(kept, 1, 2)
    before = programs(kept)
    assert len(before) >= 2
    used = {f"{name.removesuffix('-cache')}-atime" for name in before}
    assert {path.name for path in kept.iterdir()} == {*before, *used, ".lockfile"}
    compute(kept, 1, 2)
    assert programs(kept) == before


@pytest.mark.parametrize("cut", [True, False])
def test_what_a_killed_process_was_writing_is_compiled_again_without_a_word(cut, kept):
    compute(kept, 1)
    before = programs(kept)
    for name, content in before.items():  # killed before, or after the last byte
        (kept / name).write_bytes(content[: len(content) // 2] if cut else content)
        (kept / f"{name.removesuffix('-cache')}-atime").unlink()
    compute(kept, 1, 2)
    after = programs(kept)
    assert before.keys() < after.keys()
    assert all(len(after[name]) > len(before[name]) // 2 for name in before)
    for name in after:
        assert (kept / f"{name.removesuffix('-cache')}-atime").exists()


def test_the_programs_stay_within_their_bound(kept):
    compute(kept, 1)
    one = sum(map(len, programs(kept).values()))
    compute(kept, *range(2, 8), most=2 * one)
    assert 0 < sum(map(len, programs(kept).values())) <= 2 * one


def test_a_program_that_another_process_is_writing_is_not_removed(kept, monkeypatch):
    monkeypatch.setattr(compiled, "PATIENCE_S", 0.01)
    kept.mkdir()
    unfinished = kept / "jit_f-0-cache"
    unfinished.write_bytes(b"x")
    with filelock.FileLock(kept / ".lockfile"), pytest.raises(filelock.Timeout):
        compiled.remove_unfinished(kept)
    assert unfinished.exists()
    compiled.remove_unfinished(kept)
    assert not unfinished.exists()


@pytest.mark.parametrize("where", ["/proc/none", "/dev/null/none"])
def test_where_nothing_can_be_kept_one_does_without(where, monkeypatch):
    told = {}
    monkeypatch.setenv("UNITNORM_CACHE", where)
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    compiled.keep_compiled()
    assert told == {}


def test_the_cache_is_where_the_user_or_the_system_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("UNITNORM_CACHE", raising=False)
    assert compiled.cache_folder() == tmp_path / ".cache" / "unitnorm"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard says to ignore
    assert compiled.cache_folder() == tmp_path / ".cache" / "unitnorm"
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert compiled.cache_folder() == Path("/shared/unitnorm")
    monkeypatch.setenv("UNITNORM_CACHE", "/own")
    assert compiled.cache_folder() == Path("/own")
