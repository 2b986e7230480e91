"""This machine: its devices, on Linux and macOS, the same bits whatever their number, and compiled
programs that are kept within a bound."""

import os
import pathlib
import platform
import re
import subprocess
import sys

import filelock
import jax
import pytest

from tests import faults
from tests.common import python
from unitnorm.run import devices
from unitnorm.run.devices import count_cores


@pytest.mark.parametrize("name", ["cuda", "nonsense"])
def test_devices_that_are_not_there_are_a_line(name):
    code = "from unitnorm.cli import main; main(['segment', 'evaluate', '--synthetic'])"
    done = python(code, JAX_PLATFORMS=name)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(f"error: JAX_PLATFORMS={name}: .* no such device .*\n", done.stderr)


@pytest.fixture
def on_macos(monkeypatch):
    """What macOS has not got is taken away."""
    read_text = pathlib.Path.read_text

    def read(path: pathlib.Path, *words: object, **options: object) -> str:
        if str(path).startswith("/proc/"):
            raise FileNotFoundError(path)
        return read_text(path, *words, **options)

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(pathlib.Path, "read_text", read)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)


def test_on_macos_every_core_is_used(on_macos, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    monkeypatch.setattr(devices, "count_cores", count_cores)
    told = {}
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    for asked, used in ((None, 10), (3, 3)):
        devices.prepare(asked)
        assert told["jax_num_cpu_devices"] == used


@pytest.mark.parametrize("tells", [True, False])
def test_on_macos_the_processor_is_asked_of_sysctl(tells, on_macos, monkeypatch):
    def run(words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert words == ["sysctl", "-n", "machdep.cpu.brand_string"]
        if not tells:
            raise FileNotFoundError(words[0])
        return subprocess.CompletedProcess(words, 0, "Apple M3 Pro\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    assert devices.cpu_model() == ("Apple M3 Pro" if tells else "arm")


@pytest.mark.parametrize(
    ("flags", "told"),
    [("avx avx2 avx512f", "EPYC, AVX-512"), ("avx avx2", "EPYC, AVX2"), ("fpu", "EPYC")],
)
def test_processors_of_one_name_are_told_apart_by_their_vectors(flags, told, monkeypatch):
    text = f"processor\t: 0\nmodel name\t: EPYC\nflags\t\t: {flags}\n\n" * 2
    monkeypatch.setattr(pathlib.Path, "read_text", lambda *_, **__: text)
    assert devices.cpu_model() == told


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not tell")
def test_only_the_cores_that_this_process_may_use_are_counted():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert count_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert count_cores() == len(allowed)


# ---------------------------------------------------------------- bits

PRODUCT = """
from unitnorm.run import devices
devices.prepare(1)
import jax, jax.numpy as jnp
x = jnp.ones((2, 2))
print(jax.jit(jnp.matmul).lower(x, x).as_text())
"""


def test_products_of_float32_are_computed_in_float32():
    assert python(PRODUCT).stdout.count("precision = [HIGHEST, HIGHEST]") == 1


def test_every_number_of_devices_gives_the_same_bits(small_toml, idx_folder, tmp_path):
    """With 3 runs, which 2 devices do not share evenly."""
    for number in (1, 2):
        done = python(
            "from unitnorm.cli import main; main()", "train", "--config", small_toml,
            "--data-dir", idx_folder, "--out", tmp_path / str(number), "--devices", number,
            "--depth", 1, "--update", "un", XLA_FLAGS=faults.QUICK,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
    for name in ("sweep.csv", "runs.csv", "history.csv"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


# ---------------------------------------------------------------- compiled programs

PROGRAMS = """
import sys
from unitnorm.run import devices
devices.CACHE_BYTES = int(sys.argv[1])
devices.prepare(1)
import jax, jax.numpy as jnp
for number in map(float, sys.argv[2:]):
    print(jax.jit(lambda x: jnp.sin(x) + number)(jnp.float32(0.0)))
"""


def compute(kept: pathlib.Path, *numbers: int, most: int = 1 << 30) -> dict[str, bytes]:
    """The programs that are kept, after one for each number has run without a word of anything."""
    done = python(PROGRAMS, most, *numbers, UNITNORM_CACHE=kept.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [f"{number}.0" for number in numbers]
    return {path.name: path.read_bytes() for path in kept.glob("*-cache")}


def test_programs_are_compiled_once_anew_where_a_process_was_killed_and_within_a_bound(tmp_path):
    """As `devices` takes for granted of JAX: NAME-cache is written first, and then NAME-atime."""
    kept = tmp_path / "programs"
    before = compute(kept, 1, 2)
    assert len(before) >= 2
    used = {name: f"{name.removesuffix('-cache')}-atime" for name in before}
    assert {path.name for path in kept.iterdir()} == {*before, *used.values(), ".lockfile"}
    assert compute(kept, 1, 2) == before
    for number, (name, content) in enumerate(before.items()):  # killed before, or after, its end
        (kept / name).write_bytes(content[: len(content) // 2] if number % 2 else content)
        (kept / used[name]).unlink()
    after = compute(kept, 1, 2, 3)
    assert before.keys() < after.keys()
    assert all(len(after[name]) > len(before[name]) // 2 for name in before)
    assert all((kept / used[name]).exists() for name in before)
    most = sum(map(len, before.values()))
    bounded = compute(kept, *range(4, 9), most=most)
    assert 0 < sum(map(len, bounded.values())) <= most


def test_a_program_that_another_process_is_writing_is_not_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "CACHE_PATIENCE_S", 0.01)
    unfinished = tmp_path / "jit_f-0-cache"
    unfinished.write_bytes(b"x")
    with filelock.FileLock(tmp_path / ".lockfile"), pytest.raises(filelock.Timeout):
        devices.remove_unfinished(tmp_path)
    assert unfinished.exists()
    devices.remove_unfinished(tmp_path)
    assert not unfinished.exists()


@pytest.mark.parametrize("name", ["UNITNORM_CACHE", "XDG_CACHE_HOME", "HOME"])
@pytest.mark.parametrize("where", ["/proc/none", "/dev/null/none"])
def test_where_nothing_can_be_kept_one_does_without(where, name, monkeypatch):
    told = {}
    for other in ("UNITNORM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, where)
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    devices.keep_compiled()
    assert told == {}


def test_the_cache_is_where_the_user_or_the_system_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for own, shared, expected in (
        ("", "", tmp_path / ".cache/unitnorm"),
        ("", "relative", tmp_path / ".cache/unitnorm"),  # which the standard says to ignore
        ("", "/shared", pathlib.Path("/shared/unitnorm")),
        ("/own", "/shared", pathlib.Path("/own")),
    ):
        monkeypatch.setenv("UNITNORM_CACHE", own)
        monkeypatch.setenv("XDG_CACHE_HOME", shared)
        assert devices.cache_folder() == expected
