"""The real command line in real processes, from IDX files to the report."""

import gzip
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pandas as pd
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from rich.console import Console

import unitnorm
from tests import faults
from tests.common import ROOT, contents, python
from unitnorm import cli
from unitnorm.cli import main
from unitnorm.cli.options import print_report
from unitnorm.run import progress, records
from unitnorm.run.loop import Status
from unitnorm.table2.schema import SCHEMA

FILES = {
    "runs.csv", "history.csv", "sweep.csv", "filters.safetensors", "provenance.json",
    "table2.csv", "table2.md", "table2.tex", "differences.csv", "runs.md",
    *(f"figures/{name}.{ending}"
      for name in ("curves", "learning_rates", "test_errors", "filters_depth1")
      for ending in ("png", "svg")),
}  # fmt: skip


def invoke(words, **settings):
    return CliRunner().invoke(main, list(map(str, words)), prog_name="unitnorm", **settings)


@pytest.fixture(scope="module")
def call(tmp_path_factory, idx_folder, small_toml):
    """Runs a command in a process of its own and gives what it printed."""
    cache = tmp_path_factory.mktemp("cache")
    train = ["--config", small_toml, "--data-dir", idx_folder, "--depth", 1]

    def run(command, *words, trains=True, before="", **shell):
        start = f"{before}\nfrom unitnorm.cli import main; main(prog_name='unitnorm')"
        setting = {"UNITNORM_CACHE": cache, "COLUMNS": 100, "XLA_FLAGS": faults.QUICK, **shell}
        warnings = "error::DeprecationWarning:unitnorm"
        more = train if trains else []
        done = python(start, command, *more, *words, PYTHONWARNINGS=warnings, **setting)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def reproduced(call, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "results"
    return out, call("reproduce", "--out", out)


def test_reproduce_writes_every_file_and_prints_the_table(reproduced):
    out, done = reproduced
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == FILES
    assert done.stderr == ""
    for text in ("sweep depth 1", "train depth 1", "runs active", "samples/s", "left", "B-SGD"):
        assert text in done.stdout
    runs = pd.read_csv(out / "runs.csv")
    assert ",".join(runs) == (
        "depth,update,run,seed,base_lr,epochs,train_loss,val_error,test_error,diverged,stop_reason"
    )
    assert len(runs) == 2 * 3
    assert runs["test_error"].between(0, 0.75).all()
    assert not runs["diverged"].any()
    history = pd.read_csv(out / "history.csv")
    key = ["depth", "update", "run"]
    assert (history.groupby(key).size().to_numpy() == runs["epochs"]).all()
    un = history["update"] == "un"
    assert (history["norm_deviation"][un] < 1e-6).all()
    assert (history["norm_deviation"][~un] > 1e-3).all()
    sweep = pd.read_csv(out / "sweep.csv")
    chosen = sweep[sweep["chosen"]].set_index(key)
    assert (chosen["base_lr"] == runs.set_index(key)["base_lr"]).all()
    assert (chosen["val_error"] == sweep.groupby(key)["val_error"].min()).all()
    table = pd.read_csv(out / "table2.csv")
    mean = runs.groupby(["depth", "update"])["test_error"].mean()
    assert table["mean"].to_numpy() == pytest.approx(mean.to_numpy())


# What people have in their shell: it would change the numbers, stop a healthy run, or has no ≤.
SHELL = {
    "JAX_ENABLE_X64": "1", "JAX_DEBUG_NANS": "1", "JAX_DEBUG_INFS": "1", "JAX_DISABLE_JIT": "1",
    "JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_TRANSFER_GUARD": "disallow", "JAX_CHECK_TRACER_LEAKS": "1", "JAX_NO_TRACING": "1",
    "JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_RANDOM_SEED_OFFSET": "1", "PYTHONIOENCODING": "ascii",
}  # fmt: skip


@pytest.mark.slow
def test_one_run_trained_alone_in_any_shell_has_the_same_bits(reproduced, call, tmp_path):
    out, _ = reproduced
    # as on macOS, which does not tell which cores a process may use
    before = "import os; vars(os).pop('sched_getaffinity', None)"
    words = ["--update", "un", "--runs", 1, "--out", tmp_path]
    done = call("train", *words, before=before, **SHELL)
    assert "no base learning rate yet, sweeping first" in done.stdout
    assert ", ? 0:00:00 left" in done.stdout
    lines = (out / "runs.csv").read_text().splitlines()
    alone = (tmp_path / "runs.csv").read_text().splitlines()
    assert alone == [lines[0], *[line for line in lines if line.startswith("1,un,0,")]]


def test_report_needs_the_records_alone_and_repeats_its_bytes(reproduced, call, capsys):
    out, _ = reproduced
    before = contents(out)
    for name in ("table2.csv", "figures/curves.png"):
        (out / name).unlink()
    # a home that cannot be written, where Matplotlib keeps nothing
    home = {"HOME": "/proc/none", "XDG_CONFIG_HOME": "", "XDG_CACHE_HOME": ""}
    done = call("report", "--out", out, "--json", trains=False, **home)
    assert done.stderr == ""
    assert contents(out) == before
    told = json.loads(done.stdout)
    assert set(told["files"]) < FILES
    means = [row["mean"] for row in told["tables"]["table2"]]
    assert means == pytest.approx([*pd.read_csv(out / "table2.csv")["mean"]])
    for quiet, said in ((True, ""), (False, f"shown\n1 files in {out}{os.sep}\n")):
        print_report("shown", {"a.csv": b""}, out, quiet=quiet)
        assert capsys.readouterr().out == said


def test_what_is_recorded_is_not_trained_again_and_another_config_is_refused(
    reproduced, idx_folder, small_toml, monkeypatch
):  # fmt: skip
    out, _ = reproduced
    before = contents(out)
    monkeypatch.setattr("unitnorm.run.devices.prepare", lambda *_, **__: None)
    words = ["train", "--config", small_toml, "--data-dir", idx_folder, "--depth", 1, "--out", out]
    assert "every selected run is recorded" in invoke(words).stdout
    done = invoke([*words, "--set", "loss.batch_size=10"])
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert "holds records of another config (loss.batch_size: 20 there, 10 here)" in done.stderr
    assert contents(out) == before


def test_list_says_what_was_run_in_which_state_and_how_to_go_on(reproduced, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke(["list"]).stdout == "nothing was run in runs yet\n"
    shutil.copytree(reproduced[0], "runs/done")
    for name in ("stopped", "busy", "damaged", "garbled"):
        shutil.copytree("runs/done", f"runs/{name}")
    Path("runs/stopped/.checkpoints").mkdir()
    Path("runs/damaged/provenance.json").write_text("{}")
    Path("runs/garbled/runs.csv.gz").write_bytes(gzip.compress(b"")[:10] + b"no such block")
    with records.locked(Path("runs/busy")):
        found = {about["folder"]: about for about in json.loads(invoke(["list", "--json"]).stdout)}
        text = invoke(["list"]).stdout
    states = {name.removeprefix("runs/"): about["state"] for name, about in found.items()}
    assert states == {
        "done": "recorded", "stopped": "unfinished", "busy": "running", "damaged": "damaged",
        "garbled": "damaged",
    }  # fmt: skip
    done = found["runs/done"]
    assert (done["experiment"], done["runs"]) == ("table2", 6)
    assert done["bytes"] == sum(map(len, contents(Path("runs/done")).values()))
    assert done["command"].startswith("unitnorm reproduce --config")
    size = f"{done['bytes'] / 1e6:.1f} MB"
    assert f"runs/done: table2, recorded, 6 runs, {size}\n  {done['command']}\n" in text


# ---------------------------------------------------------------- the terminal


def unitnorm_process(*words, **settings):
    line = [sys.executable, "-m", "unitnorm", *words]
    return subprocess.Popen(line, stderr=subprocess.PIPE, text=True, **settings)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux alone has a full device")
@pytest.mark.parametrize("words", [["config", "quick"], ["--help"]])
def test_output_that_cannot_be_written_is_a_line(words):
    with open("/dev/full", "w") as full:
        process = unitnorm_process(*words, stdout=full)
        _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.startswith("error: the output cannot be written (No space left on device)")
    assert errors.count("\n") == 1


def test_ctrl_c_within_an_import_comes_after_it(tmp_path, monkeypatch):
    (tmp_path / "slowly.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.1)\ndone = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def import_and_wait():
        importlib.import_module("slowly")
        time.sleep(30)

    before = signal.signal(signal.SIGINT, cli.interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            import_and_wait()
    finally:
        signal.signal(signal.SIGINT, before)
    assert sys.modules.pop("slowly").done


def test_ctrl_c_twice_at_once_is_a_line(tmp_path):
    for delay in (0.4, 1.0):
        words = ("train", "--config", "quick", "--out", tmp_path / "out")
        process = unitnorm_process(*words, stdout=subprocess.DEVNULL)
        time.sleep(delay)
        for pause in (0.02, 0.0):
            process.send_signal(signal.SIGINT)
            time.sleep(pause)
        _, errors = process.communicate()
        # Python may end itself by the signal, which a shell calls 130 as well
        assert process.returncode in (130, -signal.SIGINT)
        assert re.fullmatch("(stopping …\n)?interrupted; .* Go on with: unitnorm train.*\n", errors)


class Slow:
    """A program of ten epochs, the first of which compiles for a minute."""

    title, epochs, samples = "slow", 10, 100


@pytest.mark.parametrize("terminal", [False, True])
def test_the_time_left_counts_no_compilation_and_the_error_is_drawn(terminal, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), force_terminal=terminal, width=150)
    with progress.shown(console) as report:
        for epoch, seconds in enumerate([60.0, 2.0, 1.0, 3.0], 1):
            report(Slow, Status(epoch, True, "going", "step 1"), 0.1)
            report(Slow, Status(epoch, True, "going", val_error=1 / epoch), seconds)
    text = console.file.getvalue()
    assert "going ▁█" not in text
    assert "going █▃▂▁, 50.0 samples/s, ≤ 0:00:12 left" in text  # 6 epochs of 2 s
    second = "slow: epoch 2/10, going █▁, 50.0 samples/s, ≤ 0:00:16 left"
    assert terminal or text.splitlines()[:2] == ["slow: epoch 1/10, going", second]


# ---------------------------------------------------------------- faults and help


def every_command(group=main, name="unitnorm"):
    for word, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from every_command(command, f"{name} {word}")
        else:
            yield f"{name} {word}", command


COMMANDS = dict(every_command())


def test_what_a_command_writes_goes_to_runs_unless_told_otherwise():
    options = [option for command in COMMANDS.values() for option in command.params]
    assert {option.default.parts[0] for option in options if option.name == "out"} == {"runs"}
    assert "\n/runs/\n" in (ROOT / ".gitignore").read_text()


@pytest.mark.parametrize("folder", ["table2", "50-runs"])
def test_published_records_are_read(folder):
    known = records.read(ROOT / "results" / folder, SCHEMA)
    assert known["runs"]["test_error"].between(0.01, 0.05).all()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "--config", "none.toml"], "config none.toml: cannot be read"),
        (["train", "--set", "train.train_images=70000"], "has 60000 training images"),
        (["train", "--update", "sgd"], "expected one of b-sgd, un"),
        (["train", "--sed", "3"], "No such option"),
        (["train", "--checkpoint-every", "nan"], "nan is not a finite number"),
        (["train", "--config", "study/annealed"], "is one for `unitnorm study`, not for this"),
        (["train", "--config", "segnet"], "is one for `unitnorm segment train`, not for this"),
        (["study", "quick"], "is one for `unitnorm reproduce`, not for this"),
        (["train", "--data-dir", "/nowhere/at/all"], "/nowhere/at/all"),
        (["report", "--out", "/nowhere/at/all/there"], "no records"),
        (["report", "--out", ROOT / "results/segnet"], "of the command `unitnorm segment train"),
    ],
)
def test_a_fault_is_one_line_and_exit_code_2(words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("unitnorm.run.devices.prepare", lambda *_, **__: None)
    done = invoke(words)
    assert done.exit_code == 2, done.output
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["unitnorm", "unitnorm segment", *COMMANDS])
def test_help_fits_a_terminal_and_has_an_example(name):
    done = invoke([*name.split()[1:], "--help"], terminal_width=80)
    assert done.exit_code == 0
    assert max(map(len, done.output.splitlines())) <= 80
    assert "..." not in done.output.partition("Commands:")[2]  # no summary is cut
    # no argument without a text
    assert not re.search(r"^  [A-Z\[|\]]+(\.\.\.)?$", done.output, re.M)
    example = done.output.partition("Example")[2]
    assert f"  {name}" in example or name.split()[-1] in example
    groups = re.split(r"^(?=\S.*:$)", done.output, flags=re.M)[1:]
    options = [len(re.findall(r"^  -", group, re.M)) for group in groups]
    assert len(groups) > 2 or sum(options) < 7
    assert max(options) <= 10


def test_names_are_offered_for_completion():
    def offered(word, *before):
        complete = ShellComplete(main, {}, "unitnorm", "_UNITNORM_COMPLETE")
        return {item.value for item in complete.get_completions(list(before), word)}

    updates = offered("un", "train", "--update")
    assert {"un", "un-adam", "un-momentum"} <= updates
    assert "b-sgd" not in updates
    assert "quick" in offered("qui", "train", "--config") & offered("qui", "config")


def test_help_does_not_wait_for_jax():
    code = "import sys, unitnorm.cli; print([m for m in ('jax', 'pandas') if m in sys.modules])"
    assert python(code).stdout.strip() == "[]"
    assert invoke(["--version"]).stdout == f"unitnorm, version {unitnorm.__version__}\n"
