"""Records: written whole or not at all, and every damage named in one line."""

from __future__ import annotations

import contextlib
import copy
import gzip
import hashlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults import small_disk
from unitnorm.errors import UserError
from unitnorm.run import records
from unitnorm.run.records import About, Records, Schema, Table
from unitnorm.table2.experiment import filters_of
from unitnorm.table2.schema import FILTERS, SCHEMA

FILES = ("runs.csv", "history.csv", "sweep.csv", FILTERS, "provenance.json")


def example(seed: int = 0, runs: int = 2) -> Records:
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
                 "val_error": 0.1, "val_loss": loss, "norm_deviation": 1e-7, "norm_mean": 1.0}
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
    tables = {"runs": run_rows, "history": history, "sweep": sweep}
    return Records(
        SCHEMA,
        tables={name: SCHEMA.frame(name, rows) for name, rows in tables.items()},
        files=filters(rng.standard_normal((4, 36))),
        provenance={
            "config": {"seed": 0},
            "config_sha256": "0" * 64,
            "data": {"name": "mnist", "sha256": "1" * 64, "image_shape": [6, 6]},
            "commands": [command],
        },
    )


def filters(array: np.ndarray) -> dict[str, bytes]:
    return {FILTERS: safetensors.numpy.save({"2/un": array.astype(np.float32)})}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    with records.locked(folder):
        records.write(folder, example())
    return folder


def refused(folder: Path, schema: Schema = SCHEMA) -> str:
    """The one line with which a folder is refused; nothing in it may change."""
    before = contents(folder)
    with pytest.raises(UserError) as caught:
        filters_of(records.read(folder, schema))
    assert "\n" not in str(caught.value)
    assert contents(folder) == before
    return str(caught.value)


def test_what_is_read_is_what_was_written(out):
    assert set(contents(out)) == set(FILES)
    found, expected = records.read(out, SCHEMA), example()
    for name, table in expected.tables.items():
        pd.testing.assert_frame_equal(found[name], table, check_exact=True)
    assert found.files == expected.files
    ours, theirs = filters_of(found), filters_of(expected)
    assert ours.keys() == theirs.keys() == {(2, "un")}
    assert (ours[2, "un"] == theirs[2, "un"]).all()
    before = contents(out)
    records.write(out, found)
    assert contents(out) == before  # reading and writing again changes no digit


def test_a_folder_without_records_is_empty(tmp_path):
    assert records.read(tmp_path, SCHEMA).is_empty()
    assert records.read(tmp_path / "missing", SCHEMA).is_empty()
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
    digest = hashlib.sha256(content).hexdigest()
    with_provenance(out, lambda provenance: provenance["files"].update({name: digest}))


def with_provenance(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the provenance, which no hash guards."""
    provenance = json.loads((folder / "provenance.json").read_text())
    change(provenance)
    (folder / "provenance.json").write_text(json.dumps(provenance))


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
    with_provenance(out, lambda provenance: provenance.update(format=records.FORMAT + 1))
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
        found = records.read(out, SCHEMA)
    except UserError as error:
        message = str(error)
    finally:
        (out / "provenance.json").write_bytes(good)
    if message:
        assert "\n" not in message
        assert any(part in message for part in ("provenance.json", "SHA-256", "of the kind"))
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
            records.read(folder, SCHEMA)
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
    assert len(records.read(out, SCHEMA)["runs"]) == 4
    assert contents(out) == after


def test_a_full_disk_leaves_the_old_records(tmp_path):
    with small_disk(tmp_path / "disk", "256k") as disk:
        if disk is None:
            pytest.skip("mounting a small file system is not permitted here")
        with records.locked(disk / "out"):
            records.write(disk / "out", example())
            before = contents(disk / "out")
            large = example().with_files(filters(np.zeros((100, 1000))))
            with pytest.raises(UserError, match=r"No space left on device.*free some space") as e:
                records.write(disk / "out", large)
            assert contents(disk / "out") == before
        assert "\n" not in str(e.value)


def test_a_file_size_limit_is_a_full_disk_too(out):
    """The same without the right to mount anything."""
    before, large = contents(out), example(1, runs=300)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))
    try:
        with pytest.raises(UserError, match=r"File too large.*free some space") as caught:
            records.write(out, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value)
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
        assert len(records.read_alone(disk / "out", SCHEMA)["runs"]) == 4


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
        records.read_alone(tmp_path / "none", SCHEMA)
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
        assert ".lock" in contents(out)
        with (
            pytest.raises(UserError, match="another unitnorm process is at work here"),
            records.locked(out),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with records.locked(out):
        assert len(records.read(out, SCHEMA)["runs"]) == 4
    assert set(contents(out)) == set(FILES)  # nothing is left of the locks


TAKE = """
import sys, pathlib
from unitnorm.errors import UserError
from unitnorm.run import records
folder, entered = pathlib.Path(sys.argv[1]), 0
while entered < 100:
    try:
        with records.locked(folder):
            (folder / "inside").mkdir()  # fails where another is inside
            (folder / "inside").rmdir()
            entered += 1
    except UserError:
        pass
"""


def test_a_lock_that_goes_with_its_holder_lets_no_two_in(tmp_path):
    words = [sys.executable, "-c", TAKE, tmp_path]
    takers = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for taker in takers:
        assert taker.communicate(timeout=120)[1] == ""
        assert taker.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_pattern_give_way_to_the_new_ones_and_others_stay(tmp_path):
    with records.locked(tmp_path):
        records.write_files(tmp_path, {"a/x1": b"", "a/x2": b"", "a/y": b""})
        records.write_files(tmp_path, {"a/x2": b"new", "b": b""}, replacing="a/x*")
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"a/x2", "a/y", "b"}
    assert (tmp_path / "a" / "x2").read_bytes() == b"new"


# ---------------------------------------------------------------- other experiments


class AboutNotes(About):
    text: str


NOTES = Schema(
    kind="notes",
    tables={
        "notes": Table({"voice": "s", "bar": "i", "pitch": "d"}, ("voice", "bar"), ("bar",), True),
        "voices": Table(
            {"voice": "s", "loud": "b", "range": "f"}, ("voice",), later={"range": math.nan}
        ),
    },
    cell=("voice",),
    files=r"[a-z]+\.wav",
    about=AboutNotes,
)


@pytest.fixture
def notes(tmp_path):
    folder = tmp_path / "notes"
    rows = [{"voice": voice, "bar": bar, "pitch": 0.1 + bar} for voice in "ba" for bar in (1, 2)]
    tables = {
        "notes": NOTES.frame("notes", rows),
        "voices": NOTES.frame(
            "voices", [{"voice": v, "loud": v == "a", "range": 0.1} for v in "ab"]
        ),
    }
    with records.locked(folder):
        records.write(
            folder,
            Records(
                NOTES, tables, {"song.wav": b"la"},
                {"config": {}, "config_sha256": "", "data": {"text": ""}, "commands": []},
            ),
        )  # fmt: skip
    return folder


def test_an_experiment_brings_its_schema_and_nothing_else(notes):
    found = records.read(notes, NOTES)
    assert list(found["notes"].itertuples(index=False, name=None)) == [
        ("a", 2, 2.1), ("a", 1, 1.1), ("b", 2, 2.1), ("b", 1, 1.1)
    ]  # fmt: skip
    assert found["voices"]["loud"].to_list() == [True, False]
    assert found["voices"]["range"].to_list() == [0.1, 0.1]  # a float32's shortest decimal
    assert found.files == {"song.wav": b"la"}
    assert found.recorded() == {"notes/a", "notes/b", "voices/a", "voices/b"}
    before = contents(notes)
    records.write(notes, found)
    assert contents(notes) == before


def test_rows_take_the_place_of_those_of_the_same_run_and_leave_together(notes):
    found = records.read(notes, NOTES)
    longer = NOTES.frame("notes", [{"voice": "b", "bar": bar, "pitch": 9.0} for bar in (3, 4, 5)])
    merged = found.with_rows("notes", longer).with_rows("notes", longer)
    assert merged["notes"]["bar"].to_list() == [2, 1, 5, 4, 3]
    left = merged.without(NOTES.frame("voices", [{"voice": "a", "loud": True, "range": 0.0}]))
    assert left.recorded() == {"notes/b", "voices/b"}
    assert found["notes"]["bar"].to_list() == [2, 1, 2, 1]  # what was read stays as it was
    assert Records.empty(NOTES).is_empty()
    assert not left.is_empty()


def test_a_packed_table_is_checked_like_any_other(notes):
    for content in (b"", b"\x1f\x8b", gzip.compress(b"voice,bar\n"), b"voice,bar,pitch\n"):
        rehashed(notes, "notes.csv.gz", content)
        assert "notes.csv.gz" in refused(notes, NOTES)


def test_a_column_that_came_later_is_not_a_number_in_older_records(notes):
    rehashed(notes, "voices.csv", b"voice,loud\na,True\nb,False\n")
    found = records.read(notes, NOTES)["voices"]
    assert list(found.columns) == ["voice", "loud", "range"]
    assert found["range"].isna().all()
    rehashed(notes, "voices.csv", b"voice,range\na,1.0\n")
    assert "voices.csv: columns voice,range; expected voice,loud,range" in refused(notes, NOTES)


@pytest.mark.parametrize(
    "name", ["../evil.wav", "/tmp/evil.wav", "a/../../evil.wav", "song.wav/../../evil.wav",
             "evil.exe", "song.wav\n", "", ".", "other.csv"],
)  # fmt: skip
def test_names_cannot_leave_the_folder(name, notes, tmp_path):
    """The schema says which files there are; a provenance from elsewhere cannot add any."""
    for evil in ("evil.wav", "notes/evil.exe", "notes/other.csv"):
        (tmp_path / evil).write_bytes(b"secret")

    def add(provenance):
        provenance["files"][name] = hashlib.sha256(b"secret").hexdigest()

    with_provenance(notes, add)
    assert "provenance.json: damaged" in refused(notes, NOTES)


@pytest.mark.parametrize("key", ["data", "config", "config_sha256", "commands", "files"])
def test_a_provenance_without_what_is_relied_on_is_a_line(key, notes, out):
    for folder, schema in ((notes, NOTES), (out, SCHEMA)):
        with_provenance(folder, lambda provenance: provenance.pop(key))
        assert "provenance.json: damaged" in refused(folder, schema)


def test_what_is_said_of_the_data_is_checked_by_the_experiment(notes):
    with_provenance(notes, lambda provenance: provenance.update(data={"name": "mnist"}))
    assert "provenance.json: damaged" in refused(notes, NOTES)


def test_a_folder_of_another_kind_is_not_called_damaged(notes, out):
    """It is healthy; the command that wrote it is named."""
    line = refused(out, NOTES)
    assert "holds records of the kind table2, not notes" in line
    assert "they are of the command `unitnorm train`" in line
    assert records.kind_of(out) == "table2"
    assert "of the kind notes, not table2" in refused(notes, SCHEMA)
    with_provenance(out, lambda provenance: provenance.pop("kind"))  # as the first records
    assert len(records.read(out, SCHEMA)["runs"]) == 4
    assert records.kind_of(out.parent) is None


def test_arrays_join_a_file_beside_those_that_are_there(out):
    known = records.read(out, SCHEMA)
    old = known.arrays(FILTERS)["2/un"]
    joined = known.with_arrays({FILTERS: {"4/un": np.ones(3, np.float32)}})
    assert {name: a.shape for name, a in joined.arrays(FILTERS).items()} == {
        "2/un": old.shape, "4/un": (3,)
    }  # fmt: skip
    assert known.arrays("none.safetensors") == {}


def test_readers_look_while_another_process_writes(out):
    """They see one set or the next, whole, and leave alone what is being put in place."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        assert len(records.read_alone(out, SCHEMA)["runs"]) == 4
        (out / records._VALID).mkdir()  # the writer is about to put these in place
        (out / "runs.csv").rename(out / records._VALID / "runs.csv")

        def put() -> None:
            (out / records._VALID / "runs.csv").rename(out / "runs.csv")
            (out / records._VALID).rmdir()

        threading.Timer(0.3, put).start()
        assert len(records.read_alone(out, SCHEMA)["runs"]) == 4
        (out / "runs.csv").write_text("damaged")
        with pytest.raises(UserError, match=r"runs.csv: altered or cut"):
            records.read_alone(out, SCHEMA)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
