"""Several processes: the bits of one, and an end that nobody waits for.

The processes are real ones, over loopback, with the command line as a user types it.
"""

from __future__ import annotations

import dataclasses
import re
import signal
import socket
import subprocess
import sys
import threading

import jax
import pytest
from click.testing import CliRunner

from unitnorm import cli
from unitnorm.errors import UserError
from unitnorm.run import processes, records
from unitnorm.table2.experiment import pack_filters
from unitnorm.table2.schema import FILTERS, SCHEMA

EPOCHS = 24
CONFIG = f"""
runs = 3
depths = [1]
[model]
width = 8
[loss]
batch_size = 20
[sweep]
rates = [1e-2]
train_images = 100
validation_images = 50
epochs = 1
[train]
train_images = 400
validation_images = 150
min_epochs = {EPOCHS}
max_epochs = {EPOCHS}
"""
PATIENCE_S = 120  # a process that takes so long hangs
# The command line, with a line for every epoch.
COMMAND = "import unitnorm.run.progress as p, unitnorm.cli as c; p.PLAIN_EVERY_S = 0; c.main()"
# Compiles in half the time.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


class Process:
    """A Python process whose output lines can be waited for."""

    def __init__(self, code: str, *words: object):
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said: list[str] = []
        self._ended = False
        self.errors = ""
        self._news = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read_output),
            threading.Thread(target=self._read_errors),
        ]
        for reader in self._readers:
            reader.start()

    def _read_output(self) -> None:
        for line in self._process.stdout:
            with self._news:
                self.said.append(line)
                self._news.notify()
        with self._news:
            self._ended = True
            self._news.notify()

    def _read_errors(self) -> None:
        self.errors = self._process.stderr.read()

    def wait_for(self, text: str) -> None:
        """Until a line has `text` in it."""
        with self._news:
            arrived = self._news.wait_for(
                lambda: any(text in line for line in self.said) or self._ended,
                PATIENCE_S,
            )
        assert arrived
        assert any(text in line for line in self.said), self.said

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> int:
        """Its exit code; negative where a signal has ended it."""
        try:
            code = self._process.wait(PATIENCE_S)
        finally:
            self._process.kill()
            for reader in self._readers:
                reader.join()
            self._process.stdout.close()
            self._process.stderr.close()
        return code

    def epochs(self) -> list[int]:
        """The epochs that were reported."""
        return [int(n) for n in re.findall(r"epoch (\d+)/", "".join(self.said))]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def is_free(port: int) -> bool:
    with socket.socket() as found:
        return found.connect_ex(("127.0.0.1", port)) != 0


def pair(code: str, *words: object) -> list[Process]:
    """Two processes that meet."""
    meet = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2, "--process"]
    return [Process(code, *words, *meet, number) for number in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, idx_folder):
    """A process that has trained on two devices: its folder, and the options it was given."""
    config = tmp_path_factory.mktemp("config") / "config.toml"
    config.write_text(CONFIG)
    out = tmp_path_factory.mktemp("records") / "alone"
    options = ["--config", str(config), "--data-dir", str(idx_folder), "--update", "un"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNITNORM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XLA_FLAGS", QUICK)
        process = Process(COMMAND, "train", "--out", out, "--devices", 2, *options)
        assert process.end() == 0, process.errors
        yield out, options


def test_two_processes_stop_die_and_go_on_to_the_same_bits(alone, tmp_path):
    once, options = alone
    whole, nothing = records.read(once, SCHEMA), records.Records.empty(SCHEMA)
    swept = nothing.with_rows("sweep", whole["sweep"]).with_files({FILTERS: pack_filters({})})
    out = tmp_path / "two"
    with records.locked(out):
        records.write(out, dataclasses.replace(swept, provenance=whole.provenance))
    words = ["train", "--out", out, "--devices", 1, *options]

    first, second = pair(COMMAND, *words)
    first.wait_for("epoch 3/")
    second.send(signal.SIGTERM)
    assert (first.end(), second.end()) == (cli.INTERRUPTED, cli.INTERRUPTED), first.errors
    assert "interrupted; what is saved stays" in first.errors
    assert not second.said  # process 0 speaks for both
    last = first.epochs()[-1]

    first, second = pair(COMMAND, *words)
    first.wait_for(f"going on after epoch {last}")
    first.wait_for(f"epoch {last + 3}/")
    second.send(signal.SIGKILL)
    assert second.end() == -signal.SIGKILL
    assert first.end() == UserError.exit_code, first.errors
    assert re.search("^error: another process has ended.*saved", first.errors, re.M)
    last = first.epochs()[-1]

    first, second = pair(COMMAND, *words)
    assert (first.end(), second.end()) == (0, 0), first.errors
    assert first.epochs() == list(range(last + 1, EPOCHS + 1))  # no finished epoch is lost
    assert not (out / ".checkpoints").exists()
    for name in ("runs.csv", "history.csv", "sweep.csv", "filters.safetensors"):
        assert (out / name).read_bytes() == (once / name).read_bytes()


EXCHANGE = """
import os, signal, sys
from unitnorm.run import devices, processes
from unitnorm.errors import UserError
import jax, numpy as np
fails, detected = (word == "True" for word in sys.argv[1:3])
devices.prepare(1)
if detected:
    processes.join(None, None, None, detect=True)
else:
    processes.join(sys.argv[4], int(sys.argv[6]), int(sys.argv[8]))
own = jax.process_index()

def fault(of):
    if own == of:
        raise UserError("the disk is full")
    return own

def said(call, *arguments):
    try:
        return call(*arguments)
    except processes.AgreedError as error:
        return error

print(processes.any_process(own == 1, False, True))
print(processes.text_from_first(f"from {own}: " + "Weiß, τ"))
print(processes.from_first(np.float32([own, np.nan]), np.zeros(2, np.float32)).tolist())
print(processes.from_first(None if own == 0 else np.ones(2), np.zeros(2)))
print(said(processes.in_all, lambda: "fine"))
print(said(processes.in_all, lambda: fault(0)))
print(said(processes.in_all, lambda: fault(1)))
print(said(processes.check_same, "config", "same"))
print(said(processes.check_same, "config", "a" * own))
with processes.together():
    if own == 1 and fails:
        raise UserError("only here")
    if own == 0 and not fails:
        os.kill(os.getpid(), signal.SIGKILL)
    processes.any_process(True)
"""


@pytest.mark.parametrize("fails", [True, False])
def test_processes_exchange_agree_on_faults_and_hear_of_an_end(fails, monkeypatch):
    if fails:
        first, second = pair(EXCHANGE, True, False)
    else:  # as Slurm starts them; JAX makes the port of the job's number
        job = next(port for port in range(61_440, 65_536) if is_free(port)) - 61_440
        step = {"JOB_ID": job, "STEP_NODELIST": "127.0.0.1", "NTASKS": 2}
        started = []
        for number in (0, 1):
            for name, value in {**step, "PROCID": number, "LOCALID": number}.items():
                monkeypatch.setenv(f"SLURM_{name}", str(value))
            started.append(Process(EXCHANGE, False, True))
        first, second = started
    codes = first.end(), second.end()
    for process in (first, second):
        assert "".join(process.said).splitlines() == [
            "(True, False, True)",
            "from 0: Weiß, τ",
            "[0.0, nan]",
            "None",
            "fine",
            "the disk is full",
            "process 1: the disk is full",
            "None",
            "process 1: another config than process 0; start every process with the same options "
            "and code",
        ]
    if fails:
        assert codes == (UserError.exit_code, UserError.exit_code)
        assert "UserError: another process has ended" in first.errors
        assert "UserError: only here" in second.errors
    else:  # JAX itself ends the others when process 0 is no more
        assert codes[0] == -signal.SIGKILL
        assert codes[1] != 0
        assert "another task died" in second.errors or "another process" in second.errors


def test_processes_with_different_numbers_of_devices_are_refused(alone, tmp_path):
    meet = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2, "--process"]
    words = ["train", "--out", tmp_path / "out", *alone[1], *meet]
    both = [Process(COMMAND, *words, number, "--devices", 1 + number) for number in (0, 1)]
    assert [process.end() for process in both] == [UserError.exit_code] * 2
    for process in both:
        assert "different numbers of devices (1, 2); give all of them" in process.errors


@pytest.mark.parametrize("present", [0, 1])
def test_a_process_that_waits_in_vain_says_so(present):
    code = "from unitnorm.run import processes; processes.MEETING_S = 1; processes.join("
    process = Process(f"{code}'localhost:{free_port()}', 2, {present})")
    assert process.end() == UserError.exit_code
    assert re.match(r"error: not all processes came to localhost:\d+ in 1 s; ", process.errors)


NOTHING = {"coordinator": None, "processes": None, "process": None}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"coordinator": "node1:1234", "processes": 2}, "go together: give all three"),
        ({"processes": 2, "process": 0}, "go together: give all three"),
        ({"coordinator": "node1:1", "processes": 2, "process": 2}, "numbered 0 to 1 with"),
        ({"coordinator": "node1", "processes": 2, "process": 1}, "expected HOST:PORT"),
        ({"coordinator": "node1:port", "processes": 2, "process": 1}, "expected HOST:PORT"),
        ({"coordinator": ":70000", "processes": 2, "process": 1}, "expected HOST:PORT"),
        ({"processes": 2, "detect": True}, "--distributed finds the other processes itself"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options, says, monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(jax.distributed, "initialize", None)  # is never come to
    with pytest.raises(UserError, match=says):
        processes.join(**NOTHING | options)


def test_a_port_that_is_taken_is_refused():
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = holder.getsockname()[1]
        words = ["sweep", "--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process"]
        done = CliRunner().invoke(cli.main, [*words, "0"])
    assert done.exit_code == UserError.exit_code
    assert f"port {port} cannot be used" in done.stderr


@pytest.mark.parametrize("detect", [True, False])
def test_jax_detects_the_other_processes_only_where_it_is_asked_to(detect, monkeypatch):
    asked = {}

    def initialize(*meet: object, **options: object) -> None:
        asked.update(options, meet=meet)
        raise ValueError("coordinator_address\nshould be defined.")

    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    meet = (None, None, None) if detect else ("node1:1234", 3, 1)
    with pytest.raises(UserError, match=r"did not meet through .*coordinator_address should be"):
        processes.join(*meet, detect=detect)
    assert asked["meet"] == meet
    # else a process that Slurm started would be given one GPU, whatever it was told
    assert asked["cluster_detection_method"] == (None if detect else "deactivate")
