"""This machine: its devices, on Linux and macOS, and the same bits whatever their number and
whatever is set in the shell."""

from __future__ import annotations

import os
import pathlib
import platform
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests import faults
from unitnorm.archbn.config import Config
from unitnorm.data import load_dataset
from unitnorm.run import devices
from unitnorm.run.config import parse
from unitnorm.run.loop import Session
from unitnorm.run.planner import Group
from unitnorm.table2 import experiment


def test_products_of_float32_are_of_float32_whatever_the_device():
    code = (
        "import jax, jax.numpy as jnp; from unitnorm.run import devices; devices.prepare(1); "
        "x = jnp.ones((2, 2)); print(jax.jit(jnp.matmul).lower(x, x).as_text())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "precision = [HIGHEST, HIGHEST]" in done.stdout


def test_devices_that_are_not_there_are_a_line():
    for name in ("cuda", "nonsense"):
        done = subprocess.run(
            [sys.executable, "-m", "unitnorm", "segment", "evaluate", "--synthetic"],
            env={**os.environ, "JAX_PLATFORMS": name}, capture_output=True, text=True,
        )  # fmt: skip
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
    for name in ("sched_getaffinity", "sched_setaffinity"):
        monkeypatch.delattr(os, name, raising=False)


def test_on_macos_every_core_is_used(on_macos, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
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
        assert devices.count_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert devices.count_cores() == len(allowed)


SMALL = {
    "runs": 3, "depths": [1],
    "model": {"width": 8}, "loss": {"batch_size": 20},
    "sweep": {"rates": [1e-2], "train_images": 100, "validation_images": 50, "epochs": 1},
    "train": {
        "train_images": 400, "validation_images": 150, "min_epochs": 3, "max_epochs": 3
    },
}  # fmt: skip
DEVICES = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 3)
from pathlib import Path
from tests.test_devices import train_small
found = jax.devices()
for number in (1, 2, 3):
    jax.devices = lambda *_: found[:number]
    print(train_small(Path(sys.argv[1])))
"""


def train_small(images: pathlib.Path) -> list[object]:
    """The history of three runs, on the devices there are."""
    table2 = experiment.Table2(parse(SMALL, "", Config))
    cells = experiment.Cells(1, ("un",), (0, 1, 2), np.full((3, 1), 0.01))
    group = Group("train depth 1", "runs", cells.table(), cells)
    found = table2.compute(group, load_dataset(data_dir=images), Session())
    values = np.ravel(found.rows["history"].to_numpy())
    return [value.hex() if isinstance(value, float) else value for value in values]


def test_every_number_of_devices_gives_the_same_bits(idx_folder):
    # 3 runs: 2 devices do not share them evenly
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", DEVICES, idx_folder], cwd=root, capture_output=True, text=True,
        env={**os.environ, "XLA_FLAGS": faults.QUICK},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two, three = done.stdout.splitlines()
    assert one.count("0x1.") > 3 * 3 * 5  # numbers, and not NaN
    assert one == two
    assert one == three
