"""Experiments that are killed, stopped, doubled, starved of disk or spoilt: nothing is lost.

Real processes, by `faults`; more kills than here on demand: python -m tests.faults --kills 200
"""

import hashlib
import json
import shlex
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from tests.faults import EPOCHS, MOMENTS, RECORDS, Life, Workshop, contents, found, kill, small_disk
from unitnorm.cli import INTERRUPTED, main
from unitnorm.errors import UserError

REFUSED = UserError.exit_code


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def once(workshop):
    """The records and the report of a training that nothing happened to."""
    out = workshop.folder / "once"
    run(workshop, reproduce(workshop, out))
    return out


def reproduce(workshop, out: Path) -> list[str]:
    return ["reproduce", *workshop.train(out)[1:]]


def run(workshop, words, code=0, **environment) -> str:
    """Run a command to its end; what it printed, or where a fault is expected, its line."""
    ended, said, errors = workshop.start([str(word) for word in words], **environment).end()
    assert ended == code, said + errors
    if code == REFUSED:
        assert (errors.count("\n"), errors[:7]) == (1, "error: "), errors
        return errors
    return said


def halted(workshop, words, table="train") -> Life:
    """A command that stands still, having saved a state of a sweep or training."""
    out = Path(words[words.index("--out") + 1])
    life = workshop.start(words, HALT=table)
    life.wait_until(lambda: found(out, f".checkpoints/{table}-*/1.safetensors"))
    assert life.running(), life.end()
    return life


def stopped(workshop, words, number=signal.SIGKILL, **at) -> tuple[int, str, str]:
    """A command that got a signal at that point."""
    life = halted(workshop, words, **at)
    life.send(number)
    return life.end()


def interrupted(workshop, words, number, table) -> list[str]:
    """The command that one named that was stopped by this signal."""
    code, _, errors = stopped(workshop, words, number, table=table)
    assert code == INTERRUPTED
    assert errors.splitlines()[0] == "stopping …"
    named = shlex.split(errors.partition("Go on with: ")[2])
    assert named == ["unitnorm", *words]
    return named[1:]


def test_three_kills_at_any_moment_cost_nothing(workshop, once):
    killed = kill(workshop, contents(once), 3, seed=0)
    assert set(killed) == {"writing records", "checkpointing", "training"}


@pytest.mark.slow
def test_thirty_kills_at_any_moment_cost_nothing(workshop, once):
    killed = kill(workshop, contents(once), 30, seed=3)
    assert killed.total() == 30
    assert set(killed) == set(MOMENTS)


def test_the_same_command_twice_gives_the_same_bytes(workshop, once, tmp_path):
    run(workshop, reproduce(workshop, tmp_path / "again"))
    assert contents(tmp_path / "again") == contents(once)
    made = [path.relative_to(once) for path in once.rglob("*") if path.is_file()]
    assert len(made) > len(RECORDS) + 8
    for name in set(made) - {Path("provenance.json")}:
        assert (tmp_path / "again" / name).read_bytes() == (once / name).read_bytes(), name


def test_a_signal_ends_the_epoch_and_the_command_it_names_goes_on(workshop, once, tmp_path):
    words = interrupted(workshop, workshop.train(tmp_path / "out"), signal.SIGTERM, "sweep")
    words = interrupted(workshop, words, signal.SIGINT, "train")
    copy = shutil.copytree(tmp_path / "out", tmp_path / "copy")
    said = run(workshop, words)
    assert int(said.partition("train depth 1: going on after epoch ")[2].split()[0]) >= 1
    assert f"epoch 1/{EPOCHS}" not in said
    assert contents(tmp_path / "out") == contents(once)
    said = run(workshop, ["sweep", *workshop.train(copy, "--fresh")[1:]])
    assert "going on" not in said  # --fresh starts over
    assert "sweep depth 1: epoch 1/" in said
    assert not (copy / ".checkpoints").exists()
    assert (copy / "sweep.csv").read_bytes() == (once / "sweep.csv").read_bytes()


def test_sweep_and_reproduce_go_on_too(workshop, once, tmp_path):
    words = reproduce(workshop, tmp_path / "out")
    sweep = ["sweep", *words[1:]]
    assert stopped(workshop, sweep, table="sweep")[0] == -signal.SIGKILL
    code, said, _ = stopped(workshop, words)
    assert code == -signal.SIGKILL
    assert "sweep depth 1: going on after epoch" in said
    assert "train depth 1: going on after epoch" in run(workshop, words)
    for name in RECORDS:
        assert (tmp_path / "out" / name).read_bytes() == (once / name).read_bytes()


def test_two_at_once_the_second_is_told_and_the_first_is_not_disturbed(workshop, once, tmp_path):
    first = halted(workshop, workshop.train(tmp_path / "out"), table="sweep")
    line = run(workshop, workshop.train(tmp_path / "out"), REFUSED)
    assert "another unitnorm process is at work here" in line
    said = run(workshop, ["report", "--out", tmp_path / "out"])  # may look, before any group's end
    assert said.splitlines() == ["0 of 2 runs so far"]
    assert first.end()[::2] == (0, "")
    assert contents(tmp_path / "out") == contents(once)


@pytest.mark.parametrize("name", [*RECORDS, "provenance.json"])
def test_damaged_records_are_refused_by_every_command_and_kept(
    name, workshop, once, tmp_path, monkeypatch
):
    monkeypatch.setattr("unitnorm.run.devices.prepare", lambda *_: None)
    out = shutil.copytree(once, tmp_path / "out")
    content = (out / name).read_bytes()
    (out / name).write_bytes(content[: len(content) // 2])
    for words in (workshop.train(out), ["report", "--out", out], ["verify", "--out", out]):
        done = CliRunner().invoke(main, [str(word) for word in words])
        assert done.exit_code == REFUSED
        assert (done.stderr.count("\n"), done.stderr[:7]) == (1, "error: ")
        assert name in done.stderr
    assert (out / name).read_bytes() == content[: len(content) // 2]


def test_a_full_disk_is_a_line_and_what_was_saved_stays(workshop, once, tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        out = disk / "out"
        life = halted(workshop, workshop.train(out))  # with none to make room with
        ballast = disk / "ballast"
        with ballast.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                try:
                    while file.write(bytes(size)) == size:
                        pass
                except OSError:
                    pass
            code, _, errors = life.end()
        assert (code, errors.count("\n")) == (REFUSED, 1), errors
        assert "No space left on device" in errors
        assert "free some space" in errors
        ballast.unlink()
        assert "going on after epoch" in run(workshop, workshop.train(out))
        assert contents(out) == contents(once)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_computed(workshop, tmp_path):
    with small_disk(tmp_path / "disk", "1m", read_only=True) as disk:
        line = run(workshop, workshop.train(disk / "out"), REFUSED)
        assert str(disk / "out") in line


def test_verify_says_that_every_bit_matches(workshop, once):
    words = ["verify", "--out", once, "--run", 0, "--data-dir", workshop.data]
    said = run(workshop, words)
    for name in ("config", "data", "sweep.csv", "history.csv", "runs.csv", "filters"):
        assert name in said
    assert "differ" not in said


def test_verify_says_what_does_not_match(workshop, once, tmp_path):
    """Records that were altered with care, hashes and all, and said to be of other data."""
    out = shutil.copytree(once, tmp_path / "out")
    history = pd.read_csv(out / "history.csv", dtype=str)
    history.loc[4, "train_loss"] = str(1.5 * float(history.loc[4, "train_loss"]))
    history.to_csv(out / "history.csv", index=False)
    provenance = json.loads((out / "provenance.json").read_text())
    digest = hashlib.sha256((out / "history.csv").read_bytes()).hexdigest()
    provenance["files"]["history.csv"] = digest
    provenance["data"]["sha256"] = "0" * 64
    provenance["commands"][0]["commit"] = "an older one"
    (out / "provenance.json").write_text(json.dumps(provenance))
    said = run(workshop, ["verify", "--out", out, "--data-dir", workshop.data], 1)
    assert f"history.csv: 1 of {EPOCHS} rows differ from epoch 5 on: train_loss by up to" in said
    assert "…, recorded 000000000000…\n" in said
    assert "DOES NOT MATCH its record" in said
    assert "are to be expected: commit an older one, here" in said
