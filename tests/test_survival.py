"""Experiments that are killed, stopped, doubled, starved of disk or spoilt: nothing is lost.

Real processes, by `faults`; more kills than here on demand: python -m tests.faults --kills 200
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest

from tests.faults import MOMENTS, RECORDS, Life, Workshop, contents, found, kill, small_disk
from unitnorm.cli import INTERRUPTED
from unitnorm.errors import UserError

REFUSED = UserError.exit_code


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def cache(workshop):
    return workshop.cache("shared")


@pytest.fixture(scope="module")
def once(workshop, cache):
    """The records of a training that nothing happened to."""
    out = workshop.folder / "once"
    run(workshop, cache, workshop.train(out))
    return out


def run(workshop, cache, words, code=0, **environment) -> str:
    """Run a command to its end; what it printed, or where a fault is expected, its line."""
    ended, said, errors = workshop.start([str(word) for word in words], cache, **environment).end()
    assert ended == code, said + errors
    if code == REFUSED:
        assert errors.count("\n") == 1, errors
        assert errors.startswith("error: ")
        return errors
    return said


def halted(workshop, cache, words, table="train", state=1) -> Life:
    """A command that stands still, having saved so many states of a sweep or training."""
    out = Path(words[words.index("--out") + 1])
    life = workshop.start(words, cache)
    life.wait_until(lambda: found(out, f".checkpoints/{table}-*/{state}.safetensors"))
    life.send(signal.SIGSTOP)
    return life


def stopped(workshop, cache, words, number=signal.SIGKILL, **at) -> tuple[int, str, str]:
    """A command that got a signal at that point."""
    life = halted(workshop, cache, words, **at)
    life.send(number)
    life.send(signal.SIGCONT)
    return life.end()


def test_three_kills_at_any_moment_cost_nothing(workshop):
    assert kill(workshop, 3, seed=0).total() == 3


@pytest.mark.slow
def test_thirty_kills_at_any_moment_cost_nothing(workshop):
    killed = kill(workshop, 30, seed=0)
    assert killed.total() == 30
    assert set(killed) == set(MOMENTS)


def test_the_same_command_twice_gives_the_same_bytes(workshop, cache, once, tmp_path):
    run(workshop, cache, workshop.train(tmp_path / "again"))
    assert contents(tmp_path / "again") == contents(once)
    for out in (once, tmp_path / "again"):
        run(workshop, cache, ["report", "--out", out])
    made = [path.relative_to(once) for path in once.rglob("*") if path.is_file()]
    assert len(made) > len(RECORDS) + 8
    for name in set(made) - {Path("provenance.json")}:
        assert (tmp_path / "again" / name).read_bytes() == (once / name).read_bytes(), name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_epoch_and_the_command_it_names_goes_on(
    number, workshop, cache, once, tmp_path
):
    code, _, errors = stopped(workshop, cache, workshop.train(tmp_path / "out"), number)
    assert code == INTERRUPTED
    assert errors.splitlines()[0] == "stopping …"
    words = shlex.split(errors.partition("Go on with: ")[2])
    assert words == ["unitnorm", *workshop.train(tmp_path / "out")]
    said = run(workshop, cache, words[1:])
    last = int(said.partition("train depth 1: going on after epoch ")[2].split()[0])
    assert last >= 1
    assert "epoch 1/30" not in said
    assert contents(tmp_path / "out") == contents(once)


@pytest.mark.parametrize(("command", "table"), [("sweep", "sweep"), ("reproduce", "train")])
def test_sweep_and_reproduce_go_on_too(command, table, workshop, cache, once, tmp_path):
    out = tmp_path / "out"
    words = [command, *workshop.train(out)[1:]]
    assert stopped(workshop, cache, words, table=table)[0] == -signal.SIGKILL
    assert f"{table} depth 1: going on after epoch" in run(workshop, cache, words)
    run(workshop, cache, workshop.train(out))
    assert contents(out) == contents(once)


def test_fresh_starts_over(workshop, cache, once, tmp_path):
    stopped(workshop, cache, workshop.train(tmp_path / "out"))
    said = run(workshop, cache, workshop.train(tmp_path / "out", "--fresh"))
    assert "going on" not in said
    assert "epoch 1/30" in said
    assert contents(tmp_path / "out") == contents(once)


def test_two_at_once_the_second_is_told_and_the_first_is_not_disturbed(
    workshop, cache, once, tmp_path
):
    first = halted(workshop, cache, workshop.train(tmp_path / "out"))
    line = run(workshop, cache, workshop.train(tmp_path / "out"), REFUSED)
    assert "another unitnorm process is at work here" in line
    said = run(workshop, cache, ["report", "--out", tmp_path / "out"])  # may look meanwhile
    assert said.splitlines() == ["0 of 2 runs so far"]
    first.send(signal.SIGCONT)
    assert first.end()[::2] == (0, "")
    assert contents(tmp_path / "out") == contents(once)


def test_a_damaged_checkpoint_is_set_aside_and_said_so(workshop, cache, once, tmp_path):
    stopped(workshop, cache, workshop.train(tmp_path / "out"), signal.SIGTERM)
    (place,) = (tmp_path / "out" / ".checkpoints").glob("train-*")
    newest = max(int(path.stem) for path in place.glob("*.safetensors"))
    path = place / f"{newest}.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    said = run(workshop, cache, workshop.train(tmp_path / "out"))
    assert f"checkpoint {newest} is damaged" in said
    assert f"set aside as damaged-{newest}.safetensors" in said
    assert "going on after epoch" in said
    assert contents(tmp_path / "out") == contents(once)


@pytest.mark.parametrize("name", [*RECORDS, "provenance.json"])
def test_damaged_records_are_refused_by_every_command_and_kept(
    name, workshop, cache, once, tmp_path
):
    out = tmp_path / "out"
    shutil.copytree(once, out)
    content = (out / name).read_bytes()
    (out / name).write_bytes(content[: len(content) // 2])
    for words in (workshop.train(out), ["report", "--out", out], ["verify", "--out", out]):
        assert name in run(workshop, cache, words, REFUSED)
    assert (out / name).read_bytes() == content[: len(content) // 2]


def test_a_full_disk_is_a_line_and_what_was_saved_stays(workshop, cache, once, tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        if disk is None:
            pytest.skip("mounting a small file system is not permitted here")
        out = disk / "out"
        life = halted(workshop, cache, workshop.train(out))  # with none to make room with
        ballast = disk / "ballast"
        with ballast.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                try:
                    while file.write(bytes(size)) == size:
                        pass
                except OSError:
                    pass
        life.send(signal.SIGCONT)
        code, _, errors = life.end()
        assert code == REFUSED, errors
        assert errors.count("\n") == 1, errors
        assert "No space left on device" in errors
        assert "free some space" in errors
        ballast.unlink()
        assert "going on after epoch" in run(workshop, cache, workshop.train(out))
        assert contents(out) == contents(once)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_computed(
    workshop, cache, tmp_path
):
    with small_disk(tmp_path / "disk", "1m", read_only=True) as disk:
        if disk is None:
            pytest.skip("mounting a small file system is not permitted here")
        line = run(workshop, cache, workshop.train(disk / "out"), REFUSED)
        assert str(disk / "out") in line


def test_no_home_folder_does_no_harm(workshop, once, tmp_path):
    nowhere = {"HOME": "/nowhere/at/all", "XDG_CACHE_HOME": "", "UNITNORM_CACHE": ""}
    run(workshop, Path(), workshop.train(tmp_path / "out"), **nowhere)
    assert contents(tmp_path / "out") == contents(once)


def test_a_loss_that_is_not_finite_is_recorded_with_its_epoch_and_reported(
    workshop, cache, tmp_path
):
    # without ε, a mini-batch of two equal images has no variance to divide by
    data = tmp_path / "data"
    shutil.copytree(workshop.data, data)
    images = data / "train-images-idx3-ubyte"
    content = bytearray(images.read_bytes())
    size = 6 * 6
    for image in range(0, 300, 8):
        content[16 + image * size : 16 + (image + 1) * size] = bytes(size)
    images.write_bytes(content)
    settings = ["loss.batch_size=2", "model.bn_epsilon=0.0", "sweep.train_images=4",
                "sweep.epochs=1", "sweep.validation_images=4"]  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    out = tmp_path / "out"
    run(workshop, cache, [*workshop.train(out, *words), "--data-dir", data])
    runs = pd.read_csv(out / "runs.csv")
    assert list(runs["stop_reason"]) == ["non-finite"] * 2
    assert runs["diverged"].all()
    history = pd.read_csv(out / "history.csv")
    assert (history.groupby("run").size().to_numpy() == runs["epochs"]).all()
    said = run(workshop, cache, ["report", "--out", out])
    for text in (said, (out / "table2.md").read_text()):
        assert "Diverged and non-finite runs, left out of every mean" in text
        assert text.count("non-finite") == 1 + 2  # in the title, and of both runs


# ---------------------------------------------------------------- verify


def test_verify_says_that_every_bit_matches(workshop, cache, once):
    said = run(
        workshop, cache,
        ["verify", "--out", once, "--run", 0, "--data-dir", workshop.data],
    )  # fmt: skip
    for name in ("config", "data", "sweep.csv", "history.csv", "runs.csv", "filters"):
        assert name in said
    assert "differ" not in said


def test_verify_says_what_does_not_match(workshop, cache, once, tmp_path):
    """Records that were altered with care, hashes and all."""
    out = tmp_path / "out"
    shutil.copytree(once, out)
    path = out / "history.csv"
    lines = path.read_text().splitlines()
    cells = lines[5].split(",")
    column = lines[0].split(",").index("train_loss")
    cells[column] = str(float(cells[column]) * 1.5)
    lines[5] = ",".join(cells)
    path.write_text("\n".join(lines) + "\n")
    provenance = json.loads((out / "provenance.json").read_text())
    provenance["files"]["history.csv"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (out / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    words = ["verify", "--out", out, "--data-dir", workshop.data]
    said = run(workshop, cache, words, 1)
    assert "history.csv" in said
    assert "1 of 30 rows differ from epoch" in said
    assert "recorded elsewhere" not in said
    for command in provenance["commands"]:
        command["commit"] = "an older one"
    (out / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    assert "are to be expected: commit an older one, here" in run(workshop, cache, words, 1)


def test_verify_says_that_the_data_are_others(workshop, cache, once, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(workshop.data, data)
    labels = data / "train-labels-idx1-ubyte"
    content = bytearray(labels.read_bytes())
    content[20] ^= 1
    labels.write_bytes(content)
    said = run(workshop, cache, ["verify", "--out", once, "--data-dir", data], 1)
    recorded = json.loads((once / "provenance.json").read_text())["data"]["sha256"]
    (line,) = [line for line in said.splitlines() if line.startswith("data: ")]
    assert line.endswith(f"…, recorded {recorded[:12]}…")
    assert "DOES NOT MATCH its record" in said
