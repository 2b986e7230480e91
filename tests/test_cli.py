"""The real command line in real processes, from IDX files to the report."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

import unitnorm
from unitnorm.cli import main

FILES = {
    "runs.csv", "history.csv", "sweep.csv", "filters.safetensors", "provenance.json",
    "table2.csv", "table2.md", "table2.tex", "differences.csv", "runs.md",
    *(f"figures/{name}.{ending}"
      for name in ("curves", "learning_rates", "test_errors", "filters_depth1", "filters_depth2")
      for ending in ("png", "svg")),
}  # fmt: skip


@pytest.fixture(scope="module")
def call(tmp_path_factory, idx_folder, small_toml):
    """Runs a command in a process of its own and gives what it printed."""
    cache = tmp_path_factory.mktemp("cache")
    train = ["--config", str(small_toml), "--data-dir", str(idx_folder)]

    def run(command, *words, code=0, trains=True):
        line = [sys.executable, "-W", "error::DeprecationWarning:unitnorm", "-m", "unitnorm"]
        done = subprocess.run(
            [*line, command, *(train if trains else []), *map(str, words)],
            capture_output=True, text=True, timeout=240,
            env={**os.environ, "UNITNORM_CACHE": str(cache), "COLUMNS": "100"},
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def reproduced(call, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "results"
    return out, call("reproduce", "--out", out)


def files_of(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_reproduce_writes_every_file_and_prints_the_table(reproduced):
    out, done = reproduced
    assert files_of(out) == FILES
    assert done.stderr == ""
    for text in ("sweep depth 1", "train depth 2", "runs active", "samples/s", "left", "B-SGD"):
        assert text in done.stdout
    runs = pd.read_csv(out / "runs.csv")
    assert (out / "runs.csv").read_text().splitlines()[0] == (
        "depth,update,run,seed,base_lr,epochs,train_loss,val_error,test_error,diverged,stop_reason"
    )
    assert len(runs) == 2 * 2 * 3
    assert runs["test_error"].between(0, 0.75).all()
    assert not runs["diverged"].any()
    history = pd.read_csv(out / "history.csv")
    assert (history.groupby(["depth", "update", "run"]).size().to_numpy() == runs["epochs"]).all()
    un = history[history["update"] == "un"]
    assert (un["norm_deviation"] < 1e-6).all()
    assert (history[history["update"] == "b-sgd"]["norm_deviation"] > 1e-3).all()
    sweep = pd.read_csv(out / "sweep.csv")
    chosen = sweep[sweep["chosen"]].set_index(["depth", "update", "run"])["base_lr"]
    assert (chosen == runs.set_index(["depth", "update", "run"])["base_lr"]).all()
    best = sweep.groupby(["depth", "update", "run"])["val_error"].min()
    assert (sweep[sweep["chosen"]].set_index(["depth", "update", "run"])["val_error"] == best).all()
    table = pd.read_csv(out / "table2.csv")
    mean = runs.groupby(["depth", "update"])["test_error"].mean()
    assert table["mean"].to_numpy() == pytest.approx(mean.to_numpy())


def test_one_run_trained_alone_has_the_same_bits(reproduced, call, tmp_path):
    out, _ = reproduced
    done = call("train", "--depth", 2, "--update", "un", "--runs", 1, "--out", tmp_path)
    assert "no base learning rate yet, sweeping first" in done.stdout
    lines = (out / "runs.csv").read_text().splitlines()
    alone = (tmp_path / "runs.csv").read_text().splitlines()
    assert alone == [lines[0], *[line for line in lines if line.startswith("2,un,0,")]]


def test_report_needs_the_records_alone_and_repeats_its_bytes(reproduced, call):
    out, _ = reproduced
    before = {name: (out / name).read_bytes() for name in FILES}
    for name in ("table2.csv", "figures/curves.png"):
        (out / name).unlink()
    done = call("report", "--out", out, trains=False)
    assert "B-SGD" in done.stdout
    assert {name: (out / name).read_bytes() for name in FILES} == before


def test_what_is_recorded_is_not_trained_again_and_another_config_is_refused(reproduced, call):
    out, _ = reproduced
    before = {name: (out / name).read_bytes() for name in FILES}
    assert "every selected run is recorded" in call("train", "--out", out).stdout
    done = call("train", "--out", out, "--set", "loss.batch_size=10", code=2)
    assert done.stderr.count("\n") == 1
    assert "holds records of another config (loss.batch_size: 20 there, 10 here)" in done.stderr
    assert {name: (out / name).read_bytes() for name in FILES} == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "--config", "none.toml"], "config none.toml: cannot be read"),
        (["train", "--depth", "0"], "depths.0 = 0"),
        (["train", "--update", "sgd"], "'sgd' is not an update; allowed: b-sgd, un"),
        (["sweep", "--set", "sweep.rates=[]"], "sweep.rates = []"),
        (["sweep", "--set", "batch=1"], "unknown key batch; allowed"),
        (["train", "--set", "train.train_images=70000"], "has 60000 training images"),
        (["train", "--data-dir", "/nowhere/at/all"], "/nowhere/at/all"),
        (["report", "--out", "/nowhere/at/all/there"], "no records"),
    ],
)
def test_a_fault_is_one_line_and_exit_code_2(words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("unitnorm.run.devices.prepare", lambda *_, **__: None)
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2, done.output
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert not list(tmp_path.iterdir())


def test_help_of_every_command_has_an_example():
    for name in main.commands:
        done = CliRunner().invoke(main, [name, "--help"])
        assert done.exit_code == 0
        assert f"unitnorm {name}" in done.output.partition("Example")[2], name


def test_version_and_module():
    done = subprocess.run(
        [sys.executable, "-m", "unitnorm", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"unitnorm, version {unitnorm.__version__}"


def test_help_does_not_wait_for_jax():
    code = "import sys, unitnorm.cli; print([m for m in ('jax', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists():
    for name in unitnorm.__all__:
        assert getattr(unitnorm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = unitnorm.nothing
