"""Groups computed by other processes: the same records, whoever dies, comes late or differs."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from tests.cluster_example import Kept, Squares
from tests.common import ROOT, a_line
from tests.faults import QUICK
from unitnorm.errors import Interrupted
from unitnorm.run import cluster

distributed = pytest.importorskip("distributed", reason="needs unitnorm[cluster]")


@contextlib.contextmanager
def dask(*words: str, path: Path = ROOT) -> Iterator[subprocess.Popen]:
    """A process of dask, which finds unitnorm in a folder."""
    process = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_" + words[0], *words[1:], "--no-dashboard",
         "--host", "127.0.0.1"],
        env={**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=path,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def worker(address: str, path: Path = ROOT) -> contextlib.AbstractContextManager:
    return dask("worker", address, "--nthreads", "1", "--no-nanny", path=path)


@pytest.fixture
def scheduler(tmp_path) -> Iterator[str]:
    """The address of a scheduler without workers."""
    file = tmp_path / "scheduler.json"
    with dask("scheduler", "--port", "0", "--scheduler-file", str(file)) as process:
        while not file.exists():
            assert process.poll() is None
        with distributed.Client(scheduler_file=str(file), set_as_default=False) as client:
            yield client.scheduler.address


def test_a_worker_that_dies_costs_its_group_alone_and_one_that_comes_late_helps(
    scheduler, tmp_path
):
    mark, coming, late = tmp_path / "killed", [worker(scheduler)], contextlib.ExitStack()

    def look() -> bool:  # once the first worker has died, a second one comes
        if mark.exists() and coming:
            late.enter_context(coming.pop())
        return False

    kept = Kept(Squares(8, seconds=0.2, kills=2, mark=mark), look)
    with worker(scheduler), late, cluster.connect(scheduler, None, 1) as engine:
        found = kept.complete(engine)
    pd.testing.assert_frame_equal(found, Kept(Squares(8)).complete())
    assert mark.exists()
    assert len(set(kept.workers.values())) == 2
    assert len(kept.workers) == 8


def test_a_worker_of_another_version_is_refused_by_name(scheduler, tmp_path):
    """And the other computes all of it; interrupted, what has ended is kept."""
    shutil.copytree(ROOT / "unitnorm", tmp_path / "unitnorm")
    with (tmp_path / "unitnorm" / "geometry.py").open("a") as file:
        file.write("# another version\n")
    kept = Kept(Squares(4, seconds=0.1))
    stopped = Kept(Squares(9, seconds=0.1), lambda: len(stopped.stored) >= 3)
    with (
        worker(scheduler, tmp_path),
        worker(scheduler),
        cluster.connect(scheduler, None, 1) as engine,
    ):
        engine.client.wait_for_workers(2)
        found = kept.complete(engine)
        with pytest.raises(Interrupted):
            stopped.complete(engine)
    pd.testing.assert_frame_equal(found, Kept(Squares(4)).complete())
    (line,) = [line for line in kept.said if "refused" in line]
    assert "is refused: code of unitnorm" in line
    assert len(set(kept.workers.values())) == 1
    assert len(stopped.stored[-1]["runs"]) >= 3


def test_nobody_there_is_a_line(scheduler, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE_S", 0.3)
    monkeypatch.setattr(cluster, "own_workers", lambda count: contextlib.nullcontext(scheduler))
    for address, workers, said in (
        ("tcp://127.0.0.1:1", None, "start `dask scheduler`"),
        (scheduler, None, "no scheduler with a worker"),
        (scheduler, 2, "give one"), (None, 2, "--workers 2: not all came up within 0.3 s"),
    ):  # fmt: skip
        with a_line(said), cluster.connect(address, workers, 1):
            pass


def test_the_command_computes_the_same_bits_with_workers_of_its_own(
    small_toml, idx_folder, tmp_path
):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": QUICK}
    for out, more in (("here", []), ("there", ["--workers", "2"])):
        words = ["sweep", "--config", small_toml, "--data-dir", idx_folder, "--out", tmp_path / out,
                 "--depth", 1, "--runs", 1, *more]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "unitnorm", *map(str, words)],
            capture_output=True, text=True, cwd=tmp_path, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    here, there = ((tmp_path / out / "sweep.csv").read_bytes() for out in ("here", "there"))
    assert here == there
    assert '"workers"' in (tmp_path / "there" / "provenance.json").read_text()
