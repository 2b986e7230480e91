"""The real command line in real processes, from IDX files to the report."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pandas as pd
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

import unitnorm
from tests import faults
from unitnorm.cli import main
from unitnorm.errors import UserError
from unitnorm.run import records
from unitnorm.table2.schema import SCHEMA

ROOT = Path(__file__).parents[1]

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
    root = str(Path(unitnorm.__file__).parents[1])

    def run(command, *words, code=0, trains=True, before="", cwd=None):
        start = f"{before}\nfrom unitnorm.cli import main; main(prog_name='unitnorm')"
        line = [sys.executable, "-W", "error::DeprecationWarning:unitnorm", "-c", start]
        done = subprocess.run(
            [*line, command, *(train if trains else []), *map(str, words)],
            capture_output=True, text=True, timeout=faults.PATIENCE_S, cwd=cwd,
            env={**os.environ, "UNITNORM_CACHE": str(cache), "COLUMNS": "100", "PYTHONPATH": root,
                 "XLA_FLAGS": faults.QUICK},
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
    # as on macOS, which does not tell which cores a process may use
    before = "import os; vars(os).pop('sched_getaffinity', None)"
    words = ["--depth", 2, "--update", "un", "--runs", 1, "--out", tmp_path]
    done = call("train", *words, before=before)
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


# ---------------------------------------------------------------- what is kept and what is yours


def test_make_table2_then_make_test_changes_nothing_that_git_tracks(
    reproduced, call, idx_folder, small_toml, tmp_path
):
    """What `make table2` runs, in a checkout on a machine of other bits than the published ones."""
    out, _ = reproduced

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    (tmp_path / ".ci").mkdir()
    for name in (".gitignore", ".ci/readme.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(out, tmp_path / "results" / "table2")
    table = (out / "table2.md").read_text().strip()
    page = f"<!-- from results/table2/table2.md -->\n\n{table}\n\n<!-- end -->\n"
    (tmp_path / "README.md").write_text(page)
    for folder in ("results", "configs", "results/symmetry"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "README.md").write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "published")

    target = (ROOT / "Makefile").read_text().partition("\ntable2:")[2].partition("\n\n")[0]
    command, *words = shlex.split(target.partition("/unitnorm ")[2])
    for _ in range(2):  # another seed for other bits
        call(command, *words, "--seed", 7, "--runs", 2, cwd=tmp_path)
        call("report", "--out", "results/table2", trains=False, cwd=tmp_path)
        assert git("status", "--porcelain") == ""
    made = tmp_path / "runs" / "table2" / "table2.md"
    assert made.read_text() != (tmp_path / "results" / "table2" / "table2.md").read_text()
    check = [sys.executable, tmp_path / ".ci" / "readme.py", "--check"]
    subprocess.run(check, check=True, cwd=tmp_path)
    assert git("status", "--porcelain") == ""


def every_command(group=main, name="unitnorm"):
    for word, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from every_command(command, f"{name} {word}")
        else:
            yield f"{name} {word}", command


COMMANDS = dict(every_command())


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_command_writes_goes_to_runs_unless_told_otherwise(name):
    for option in COMMANDS[name].params:
        if option.name == "out":
            assert option.default.parts[0] == "runs"
            assert len(option.default.parts) == 2


def test_presets_are_printed_and_given_by_name_from_an_empty_folder(call, idx_folder, tmp_path):
    listed = CliRunner().invoke(main, ["config"]).stdout.splitlines()
    for name in ("quick", "table2", "segnet"):
        (line,) = [line for line in listed if line.startswith(f"{name} ")]
        assert len(line) > 40  # with what it is
    text = CliRunner().invoke(main, ["config", "quick"]).stdout
    assert tomllib.loads(text)["runs"] == 3
    sizes = ("train_images=100", "validation_images=50", "epochs=1", "rates=[0.1, 0.01]")
    words = [word for size in sizes for word in ("--set", f"sweep.{size}")]
    words += [
        "--update",
        "un_momentum",
        "--data-dir",
        idx_folder,
        "--set",
        "train.train_images=400",
    ]
    words += ["--set", "train.validation_images=100", "--set", "model.width=8"]
    call("sweep", "--config", "quick", *words, trains=False, cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    sweep = pd.read_csv(tmp_path / "runs" / "table2" / "sweep.csv")
    assert list(sweep["update"]) == ["un-momentum"] * 6
    assert list(sweep["depth"]) == [2] * 6
    assert list(sweep["run"]) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("folder", "command"),
    [("segnet", "`unitnorm segment report`"), ("table2", None), ("50-runs", None)],
)
def test_published_records_are_read_or_their_command_is_named(folder, command):
    out = ROOT / "results" / folder
    if command is None:
        assert records.read(out, SCHEMA)["runs"]["test_error"].between(0.01, 0.05).all()
    else:
        with pytest.raises(UserError, match=f"holds records of the kind.*{command}"):
            records.read(out, SCHEMA)


# ---------------------------------------------------------------- faults and help


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "--config", "none.toml"], "config none.toml: cannot be read"),
        (["train", "--config", "quack"], "no preset; there are"),
        (["config", "quack"], "no preset; there are"),
        (["train", "--depth", "0"], "depths.0 = 0"),
        (["sweep", "--set", "sweep.rates=[]"], "sweep.rates = []"),
        (["sweep", "--set", "batch=1"], "unknown key batch; allowed"),
        (["train", "--set", "train.train_images=70000"], "has 60000 training images"),
        (["train", "--set", 'updates=["sgd"]'], "'sgd' is not an update"),
        (["train", "--update", "sgd"], "expected one of b-sgd, un"),
        (["train", "--sed", "3"], "No such option"),
        (["train", "--data-dir", "/nowhere/at/all"], "/nowhere/at/all"),
        (["report", "--out", "/nowhere/at/all/there"], "no records"),
        (["report", "--out", str(ROOT / "results/segnet")], "`unitnorm segment report` reads"),
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


@pytest.mark.parametrize("name", ["unitnorm", "unitnorm segment", *COMMANDS])
def test_help_fits_a_terminal_and_has_an_example(name):
    words = name.split()[1:]
    done = CliRunner().invoke(main, [*words, "--help"], terminal_width=80, prog_name="unitnorm")
    assert done.exit_code == 0
    assert max(map(len, done.output.splitlines())) <= 80
    assert "..." not in done.output.partition("Commands:")[2]  # no summary is cut
    example = done.output.partition("Example")[2]
    assert f"  {name}" in example or name.split()[-1] in example


def options_of(command):
    return [p for p in command.params if isinstance(p, click.Option) and not p.hidden]


@pytest.mark.parametrize("name", [n for n, c in COMMANDS.items() if len(options_of(c)) > 5])
def test_options_stand_in_groups(name):
    help_text = CliRunner().invoke(main, [*name.split()[1:], "--help"]).output
    groups = re.split(r"^(?=\S.*:$)", help_text, flags=re.MULTILINE)[1:]
    assert len(groups) > 2
    assert max(len(re.findall(r"^  -", group, re.MULTILINE)) for group in groups) <= 10


def test_names_are_offered_for_completion():
    def offered(word, *before):
        complete = ShellComplete(main, {}, "unitnorm", "_UNITNORM_COMPLETE")
        return {item.value for item in complete.get_completions(list(before), word)}

    assert {"un", "un-adam", "un-momentum"} <= offered("un", "train", "--update")
    assert "b-sgd" not in offered("un", "train", "--update")
    assert offered("qui", "train", "--config") >= {"quick"}
    assert "table2" in offered("t", "config")


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
