"""Real processes, killed at any moment and started again until they are done.

`python -m tests.faults --kills 200` runs as many as one likes; `test_survival.py` runs three, and
thirty. The processes come out of a fork server that has imported everything, so that a life is
spent on the experiment and not on imports. Change here what is killed, and when.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import glob
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.idx import write_blobs

RECORDS = ("runs.csv", "history.csv", "sweep.csv", "filters.safetensors")
EPOCHS = 20
CONFIG = f"""
runs = 2
depths = [1]
updates = ["un"]
model = {{ width = 4, bn_momentum = 0.9 }}
loss = {{ batch_size = 20 }}
[sweep]
rates = [1e-2, 1e-3]
train_images = 100
validation_images = 50
epochs = 8
[train]
train_images = 200
validation_images = 100
min_epochs = {EPOCHS}
max_epochs = {EPOCHS}
"""
# Compiles in half the time.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
PATIENCE_S = 300  # a process that takes so long hangs


class Workshop:
    """A config, a data set, a cache and a fork server in an empty folder: what commands need."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = folder / "config.toml"
        self.config.write_text(CONFIG)
        self.data = write_blobs(folder / "data", 300, 100)
        self.cache = folder / "cache"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.preloaded"])

    def train(self, out: Path, *more: object) -> list[str]:
        """The words of a command that trains, saving the state of every epoch."""
        words = ["train", "--config", self.config, "--data-dir", self.data, "--out", out]
        return [str(word) for word in (*words, "--checkpoint-every", 0, *more)]

    def start(self, words: list[str], **environment: str) -> Life:
        """Start a command in a process of its own; with HALT=sweep or train, it stands still when
        it has saved a first state of one."""
        own = {"UNITNORM_CACHE": str(self.cache), "XLA_FLAGS": QUICK, **environment}
        return Life(self._context, words, own)


class Life:
    """A process that runs a command."""

    def __init__(self, context, words: list[str], environment: dict[str, str]):
        self._folder = Path(tempfile.mkdtemp(prefix="life-"))
        self._process = context.Process(
            target=live, args=(words, environment, str(self._folder)), daemon=True
        )
        self._process.start()

    def running(self) -> bool:
        return self._process.is_alive()

    def send(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def wait_until(self, there: Callable[[], object]) -> None:
        """Return as soon as something is there, or the process has ended."""
        until = time.monotonic() + PATIENCE_S
        while self.running() and not there():
            assert time.monotonic() < until, f"hangs: {self._said()}"
            time.sleep(0.0005)

    def end(self) -> tuple[int, str, str]:
        """Let go on and wait; the exit code (negative: the signal), and what was printed and
        complained of."""
        self.wait_until(lambda: self.send(signal.SIGCONT))
        found = self._process.exitcode, *self._said()
        shutil.rmtree(self._folder)
        return found

    def _said(self) -> list[str]:
        paths = [self._folder / name for name in ("out", "err")]
        return [path.read_text() if path.exists() else "" for path in paths]


def live(words: list[str], environment: dict[str, str], folder: str) -> None:
    """The process: `unitnorm` with these words."""
    for name, descriptor in (("out", 1), ("err", 2)):
        handle = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, descriptor)
    os.environ |= environment
    os.replace = halting(os.replace, environment.get("HALT", "nowhere"))
    sys.addaudithook(no_pickle)
    sys.argv = ["unitnorm", *words]
    from unitnorm.cli import main

    main()


def halting(replace: Callable[..., None], table: str) -> Callable[..., None]:
    """`os.replace`, which stops the process where it puts a first state in place."""

    def replace_and_halt(old: Path, new: Path) -> None:
        replace(old, new)
        if fnmatch.fnmatch(str(new), f"*/.checkpoints/{table}-*/1.safetensors"):
            os.kill(os.getpid(), signal.SIGSTOP)

    return replace_and_halt


def no_pickle(event: str, _: tuple) -> None:
    """Complain, which every test hears, where anything is unpickled."""
    if event == "pickle.find_class":
        os.write(2, b"something was unpickled\n")


# ---------------------------------------------------------------- kills

# What a process is at, and the files that tell, in or beside the results folder `out`; and within
# how many seconds from then on it is killed.
MOMENTS = {
    "writing records": ("out/.records-*", 0.01),
    "checkpointing": ("out/.checkpoints/*/unfinished.tmp", 0.1),
    "training": ("out/.checkpoints/train-*", 0.3),
    "sweep": ("out/.checkpoints/sweep-*", 0.3),
    "start": (".", 2.0),
}


def found(folder: Path, pattern: str) -> bool:
    """There is a file of this name; unlike Path.glob's, folders may vanish meanwhile."""
    return bool(glob.glob(pattern, root_dir=folder, include_hidden=True))


def contents(out: Path) -> dict[str, bytes]:
    """The records' bytes, and the provenance without what a command did when."""
    provenance = json.loads((out / "provenance.json").read_bytes())
    provenance.pop("commands")
    tables = {name: (out / name).read_bytes() for name in RECORDS}
    return {**tables, "provenance.json": json.dumps(provenance).encode()}


def kill(workshop: Workshop, expected: dict[str, bytes], kills: int, seed: int) -> Counter:
    """Kill a training `kills` times, at each moment in turn; resume until done, and again.

    Returns:
      How often it was killed at which moment.

    Raises:
      AssertionError: other records, stray files, or a process that failed by itself.
    """
    rng, killed = random.Random(seed), Counter()
    folder = workshop.folder / f"killed-{seed}"
    folder.mkdir()
    out = folder / "out"
    while True:
        life = workshop.start(workshop.train(out))
        moment = list(MOMENTS)[killed.total() % len(MOMENTS)]
        if killed.total() < kills:
            pattern, spread_s = MOMENTS[moment]
            life.wait_until(lambda pattern=pattern: found(folder, pattern))
            time.sleep(rng.uniform(0.0, spread_s))
            life.send(signal.SIGKILL)
        code, said, errors = life.end()
        if code == -signal.SIGKILL:
            killed[moment] += 1
            continue
        assert (code, errors) == (0, ""), f"killed {dict(killed)}: exit code {code}\n{said}{errors}"
        left = {str(path.relative_to(out)) for path in out.rglob("*")} - {".lock"}
        assert left == {*RECORDS, "provenance.json"}, left
        assert {path.name for path in workshop.cache.iterdir()} == {"programs"}
        records = contents(out)
        differs = [name for name in expected if records[name] != expected[name]]
        assert not differs, f"{differs} after kills {dict(killed)}"
        if killed.total() >= kills:
            return killed
        shutil.rmtree(out)


@contextlib.contextmanager
def small_disk(folder: Path, size: str, *, read_only: bool = False) -> Iterator[Path]:
    """A file system of its own on `folder`; the test is skipped where none is permitted."""
    folder.mkdir(exist_ok=True)
    options = f"size={size}" + ",ro" * read_only
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        started, workshop, once = time.monotonic(), Workshop(Path(folder)), Path(folder) / "once"
        assert workshop.start(workshop.train(once)).end()[0] == 0
        killed = kill(workshop, contents(once), options.kills, options.seed)
    seconds = time.monotonic() - started
    print(f"{killed.total()} kills in {seconds:.0f} s (seed {options.seed}), identical records")
    for moment, count in sorted(killed.items()):
        print(f"  {count:4} {moment}")


if __name__ == "__main__":
    from tests.faults import main as importable_main  # the fork server imports it by name

    importable_main()
