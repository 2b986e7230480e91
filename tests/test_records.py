"""Records: written whole or not at all, and every damage named in one line."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults import small_disk
from unitnorm.errors import UserError
from unitnorm.run import records

FILES = ("runs.csv", "history.csv", "sweep.csv", "filters.safetensors", "provenance.json")


def example(seed: int = 0, runs: int = 2) -> records.Records:
    """Records of a depth, with a failed run among them."""
    rng = np.random.default_rng(seed)
    run_rows, history, sweep = [], [], []
    for update in ("b-sgd", "un"):
        for run in range(runs):
            name = {"depth": 2, "update": update, "run": run}
            failed = run == 1 and update == "un"
            loss = np.nan if failed else rng.random()
            run_rows.append(
                {**name, "seed": run, "base_lr": 0.01, "epochs": 2, "train_loss": loss,
                 "val_error": 0.1, "test_error": 0.0701, "diverged": failed,
                 "stop_reason": "non-finite" if failed else "max-epochs"}
            )  # fmt: skip
            history += [
                {**name, "epoch": epoch, "lr": 0.01, "train_loss": loss, "train_error": 0.2,
                 "val_error": 0.1, "norm_deviation": 1e-7, "norm_mean": 1.0}
                for epoch in (1, 2)
            ]  # fmt: skip
            sweep += [
                {**name, "seed": run, "base_lr": rate, "val_error": 0.2, "train_loss": 1.0,
                 "diverged": False, "chosen": rate == 0.01}
                for rate in (0.01, 0.001)
            ]  # fmt: skip
    command = {
        "command": "unitnorm train",
        "started": "2026-01-01T00:00:00+00:00",
        "rows": 4,
        "versions": {"jax": "1"},
        "device": {"platform": "cpu"},
    }
    return records.Records(
        runs=records.frame("runs", run_rows),
        history=records.frame("history", history),
        sweep=records.frame("sweep", sweep),
        filters={(2, "un"): rng.standard_normal((4, 36)).astype(np.float32)},
        provenance={
            "config": {"seed": 0},
            "config_sha256": "0" * 64,
            "data": {"name": "mnist", "sha256": "1" * 64, "image_shape": [6, 6]},
            "commands": [command],
        },
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    with records.locked(folder):
        records.write(folder, example())
    return folder


def refused(folder: Path) -> str:
    """The one line with which a folder is refused; nothing in it may change."""
    before = contents(folder)
    with pytest.raises(UserError) as caught:
        records.read(folder)
    assert "\n" not in str(caught.value)
    assert contents(folder) == before
    return str(caught.value)


def test_what_is_read_is_what_was_written(out):
    assert set(contents(out)) == set(FILES)
    found, expected = records.read(out), example()
    for table in ("runs", "history", "sweep"):
        pd.testing.assert_frame_equal(
            getattr(found, table), getattr(expected, table), check_exact=True
        )
    assert found.filters.keys() == expected.filters.keys()
    assert (found.filters[2, "un"] == expected.filters[2, "un"]).all()
    before = contents(out)
    records.write(out, found)
    assert contents(out) == before  # reading and writing again changes no digit


def test_a_folder_without_records_is_empty(tmp_path):
    assert records.read(tmp_path).is_empty()
    assert records.read(tmp_path / "missing").is_empty()
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "altered", "empty", "gone", "a folder", "garbage"])
def test_a_damaged_file_is_named(name, damage, out):
    path = out / name
    content = path.read_bytes()
    middle = len(content) // 2
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:middle])
    elif damage == "altered":
        flipped = bytes([content[middle] ^ 1])
        path.write_bytes(content[:middle] + flipped + content[middle + 1 :])
        if name == "provenance.json":  # a text of which any letter may be another
            path.write_bytes(content.replace(b'"started": "', b'"started": 7, "x": "'))
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "a folder":
        path.mkdir()
    elif damage == "garbage":
        path.write_bytes(bytes(range(256)) * 9)
    message = refused(out)
    assert name in message
    assert records.REPAIR in message


def rehashed(out: Path, name: str, content: bytes) -> None:
    """Put a file in place as if unitnorm had written it."""
    (out / name).write_bytes(content)
    provenance = json.loads((out / "provenance.json").read_text())
    provenance["files"][name] = hashlib.sha256(content).hexdigest()
    (out / "provenance.json").write_text(json.dumps(provenance))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: "not a table",
        lambda text: text.replace("seed", "sead"),
        lambda text: text.replace("2,un,0", "x,un,0"),
        lambda text: text.replace("2,un,0", ",un,0"),
        lambda text: text.replace("2,un,0", "2,,0"),
        lambda text: text.replace("2,un,0", "2,un,1e400"),
        lambda text: text.replace("2,un,0", "2,un,0,5,6,7"),
        lambda text: text.replace("2,un,0", '2,"un,0'),
        lambda text: text.replace("2,un,0", "2,\0un,0", 1),
        lambda text: text.replace("False", "maybe"),
        lambda text: text + text.splitlines()[1] + "\n",
    ],
)
@pytest.mark.parametrize("name", ["runs.csv", "sweep.csv"])
def test_a_table_with_a_valid_hash_and_wrong_content_is_refused(change, name, out):
    text = (out / name).read_text()
    assert change(text) != text
    rehashed(out, name, change(text).encode())
    assert name in refused(out)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        (2**60).to_bytes(8, "little") + b"{}",
        safetensors.numpy.save({"no-depth": np.zeros(3, np.float32)}),
        safetensors.numpy.save({"x/un": np.zeros(3, np.float32)}),
    ],
)
def test_filters_with_a_valid_hash_and_wrong_content(content, out):
    rehashed(out, "filters.safetensors", content)
    assert "filters.safetensors" in refused(out)


def test_records_of_another_format_are_told_apart(out):
    provenance = json.loads((out / "provenance.json").read_text())
    provenance["format"] = records.FORMAT + 1
    (out / "provenance.json").write_text(json.dumps(provenance))
    assert f"reads format {records.FORMAT}; give another --out" in refused(out)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def places(node: object, path: tuple = ()) -> list[tuple]:
    """The path of every value in a JSON document."""
    inner = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    return [path, *(p for key, value in inner for p in places(value, (*path, key)))]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_provenance_of_any_shape_is_refused_in_a_line_or_usable(data, out):
    good = (out / "provenance.json").read_bytes()
    document = json.loads(good)
    path = data.draw(st.sampled_from(places(document)))
    value = data.draw(JSON)
    if not path:
        document = value
    else:
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = value
    (out / "provenance.json").write_text(json.dumps(document))
    message = ""
    try:
        found = records.read(out)
    except UserError as error:
        message = str(error)
    finally:
        (out / "provenance.json").write_bytes(good)
    if message:
        assert "\n" not in message
        assert "provenance.json" in message or "SHA-256" in message
    else:  # what the commands rely on is there
        assert found.provenance["commands"] == [] or found.provenance["commands"][-1]["rows"] < 9
        assert [*found.provenance["data"]["image_shape"], found.provenance["data"]["name"]]
        assert isinstance(found.provenance["config_sha256"], str)
        assert isinstance(found.provenance["config"], dict)


# ---------------------------------------------------------------- writing


class Killed(BaseException):
    """What no `except` in the way catches."""


def fatal(real, left: list[int]):
    """A call that kills when there are no more left."""

    def call(*words, **options):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return real(*words, **options)

    return call


CALLS = ("mkdir", "rename", "replace", "rmdir", "unlink", "fsync")


def test_killed_at_any_call_the_old_records_or_the_new_ones_are_there(tmp_path, monkeypatch):
    new = example(seed=1, runs=3)
    reference = tmp_path / "reference"
    for folder, content in ((reference, new), (tmp_path / "old", example())):
        with records.locked(folder):
            records.write(folder, copy.deepcopy(content))
    before, after = contents(tmp_path / "old"), contents(reference)
    seen = []
    for survived in range(1000):
        folder = tmp_path / f"killed-{survived}"
        with records.locked(folder):
            records.write(folder, example())
            left = [survived]
            with monkeypatch.context() as patch:
                for name in CALLS:
                    patch.setattr(os, name, fatal(getattr(os, name), left))
                done = False
                with contextlib.suppress(Killed):
                    records.write(folder, copy.deepcopy(new))
                    done = True
        with records.locked(folder):  # the next process
            records.read(folder)
        assert contents(folder) in (before, after), survived
        seen.append(contents(folder) == after)
        if done:
            break
    assert done
    assert seen == sorted(seen)  # up to one moment the old ones, from then on the new ones
    assert len(seen) > 15
    assert seen.count(False) > 4
    assert seen.count(True) > 4


def test_a_reader_completes_what_a_killed_writer_had_made_valid(out):
    after = contents(out)
    (out / records._VALID).mkdir()
    for name in FILES[2:]:
        (out / name).rename(out / records._VALID / name)
    assert len(records.read(out).runs) == 4
    assert contents(out) == after


def test_a_full_disk_leaves_the_old_records(tmp_path):
    with small_disk(tmp_path / "disk", "256k") as disk:
        if disk is None:
            pytest.skip("mounting a small file system is not permitted here")
        with records.locked(disk / "out"):
            records.write(disk / "out", example())
            before = contents(disk / "out")
            large = example(1)
            large.filters[4, "un"] = np.zeros((100, 1000), np.float32)
            with pytest.raises(UserError, match=r"No space left on device.*free some space") as e:
                records.write(disk / "out", large)
        assert "\n" not in str(e.value)
        assert contents(disk / "out") == before


def test_a_file_size_limit_is_a_full_disk_too(out):
    """The same without the right to mount anything."""
    code = (
        "import resource, signal, sys, pathlib\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from tests.test_records import example\n"
        "from unitnorm.run import records\n"
        "from unitnorm.errors import UserError\n"
        "out, large = pathlib.Path(sys.argv[1]), example(1, runs=300)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "with records.locked(out):\n"
        "    try:\n"
        "        records.write(out, large)\n"
        "    except UserError as error:\n"
        "        print(error)\n"
    )
    before = contents(out)
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code, out, root], capture_output=True, text=True, check=True
    )
    assert "File too large" in done.stdout
    assert "free some space" in done.stdout
    assert done.stdout.count("\n") == 1
    assert contents(out) == before


def test_a_folder_that_cannot_be_written_is_refused_at_once_and_can_be_read(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        if disk is None:
            pytest.skip("mounting a small file system is not permitted here")
        with records.locked(disk / "out"):
            records.write(disk / "out", example())
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, capture_output=True)
        for folder in (disk / "out", disk / "new"):
            with (
                pytest.raises(UserError, match=r"cannot be.*give another --out") as caught,
                records.locked(folder),
            ):
                pass
            assert "\n" not in str(caught.value)
        assert len(records.read_alone(disk / "out").runs) == 4


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "file/out", "file"])
def test_a_place_where_no_folder_can_be(name, tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot be used as a results folder") as caught,
        records.locked(tmp_path / name),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_not_made_where_only_reading_is_meant(tmp_path):
    with (
        pytest.raises(UserError, match="no records: there is no such folder"),
        records.locked(tmp_path / "none", make=False),
    ):
        pass
    with pytest.raises(UserError, match="no records"):
        records.read_alone(tmp_path / "none")
    assert not list(tmp_path.iterdir())


HOLD = """
import sys, pathlib
from unitnorm.run import records
with records.locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_and_a_killed_one_holds_nothing(out):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        busy = pytest.raises(UserError, match="another unitnorm process is at work here")
        with busy, records.locked(out):
            pass
        with busy:
            records.read_alone(out)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with records.locked(out):
        assert len(records.read(out).runs) == 4


def test_files_of_a_pattern_give_way_to_the_new_ones_and_others_stay(tmp_path):
    with records.locked(tmp_path):
        records.write_files(tmp_path, {"a/x1": b"", "a/x2": b"", "a/y": b""})
        records.write_files(tmp_path, {"a/x2": b"new", "b": b""}, replacing="a/x*")
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found - {".lock"} == {"a/x2", "a/y", "b"}
    assert (tmp_path / "a" / "x2").read_bytes() == b"new"


def test_names_cannot_leave_the_folder(out, tmp_path):
    """File names of a set come from our own code alone; those in damaged provenance are refused."""
    provenance = json.loads((out / "provenance.json").read_text())
    (tmp_path / "outside").write_text("secret")
    provenance["files"]["../outside"] = hashlib.sha256(b"secret").hexdigest()
    (out / "provenance.json").write_text(json.dumps(provenance))
    assert "provenance.json" in refused(out)
