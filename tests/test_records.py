"""Records: written whole or not at all, and every damage named in one line."""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.common import a_line, contents
from tests.faults import small_disk
from unitnorm.errors import UserError
from unitnorm.run import records
from unitnorm.run.records import About, Records, Schema, Table
from unitnorm.table2 import experiment, schema

ARRAYS = "arrays.safetensors"
FILES = ("songs.csv", "notes.csv.gz", ARRAYS, "provenance.json")


class AboutSongs(About):
    text: str


SCHEMA = Schema(
    kind="songs",
    tables={
        "songs": Table(
            {"voice": "s", "take": "i", "length": "f", "loud": "b", "range": "f"},
            ("voice", "take"), later={"range": 2.0},
        ),
        "notes": Table(
            {"voice": "s", "take": "i", "bar": "i", "pitch": "d"},
            ("voice", "take", "bar"), ("bar",), packed=True,
        ),
    },
    cell=("voice", "take"),
    files=r"[a-z]+\.wav",
    about=AboutSongs,
    required=(ARRAYS,),
)  # fmt: skip
COMMAND = {
    "command": "unitnorm sing", "started": "2026-01-01T00:00:00+00:00", "rows": 4,
    "versions": {"jax": "1"}, "device": {"platform": "cpu"},
}  # fmt: skip
ABOUT = {"config": {"key": 0}, "config_sha256": "0" * 64, "data": {"text": ""}}


def example(takes: int = 2, length: float = 0.0701) -> Records:
    """Two voices' songs of two bars, a length missing."""
    cells = [{"voice": voice, "take": take} for voice in ("b", "a") for take in range(takes)]
    songs = [
        {**cell, "length": length, "loud": cell["voice"] == "a", "range": math.nan}
        for cell in cells
    ]
    songs[-1]["length"] = math.nan
    notes = [{**cell, "bar": bar, "pitch": 0.1 + bar} for cell in cells for bar in (1, 2)]
    tables = {"songs": SCHEMA.frame("songs", songs), "notes": SCHEMA.frame("notes", notes)}
    known = Records(SCHEMA, tables, {"song.wav": b"la"}, {**ABOUT, "commands": [COMMAND]})
    return known.with_arrays({ARRAYS: {"a": np.full((4, 36), length, np.float32)}})


def put(folder: Path, content: Records) -> None:
    with records.locked(folder):
        records.write(folder, content)


@pytest.fixture
def out(tmp_path):
    put(tmp_path / "out", example())
    return tmp_path / "out"


def refused(folder: Path, match: str) -> None:
    with a_line(match, folder):
        records.read(folder, SCHEMA).arrays(ARRAYS)


def with_provenance(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the provenance, which no hash guards."""
    provenance = json.loads((folder / "provenance.json").read_text())
    change(provenance)
    (folder / "provenance.json").write_text(json.dumps(provenance))


def rehashed(out: Path, name: str, content: bytes) -> None:
    """Put a file in place as if unitnorm had written it."""
    (out / name).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    with_provenance(out, lambda provenance: provenance["files"].update({name: digest}))


# ---------------------------------------------------------------- reading


def test_what_is_read_is_what_was_written(out):
    before, found, expected = contents(out), records.read(out, SCHEMA), example()
    assert set(before) == {*FILES, "song.wav"}
    for name, table in expected.tables.items():
        pd.testing.assert_frame_equal(found[name], table, check_exact=True)
    assert found["songs"]["length"].to_list()[2:] == [0.0701, 0.0701]  # a float32's shortest
    assert found["notes"].query("voice == 'a'")["bar"].to_list() == [2, 1, 2, 1]
    assert found.files == expected.files
    cells = ("a/0", "a/1", "b/0", "b/1")
    assert found.recorded() == {f"{table}/{cell}" for table in SCHEMA.tables for cell in cells}
    put(out, found)
    assert contents(out) == before  # reading and writing again changes no digit


def test_rows_take_the_place_of_those_of_the_same_run_and_leave_together():
    known, cell = example(takes=1), {"voice": "b", "take": 0}
    longer = SCHEMA.frame("notes", [{**cell, "bar": bar, "pitch": 9.0} for bar in (3, 4, 5)])
    merged = known.with_rows("notes", longer).with_rows("notes", longer)
    assert merged["notes"]["bar"].to_list() == [2, 1, 5, 4, 3]
    assert known["notes"]["bar"].to_list() == [2, 1, 2, 1]  # what was there stays as it was
    assert merged.without(pd.DataFrame([cell])).recorded() == {"songs/a/0", "notes/a/0"}
    assert not merged.is_empty()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "altered", "empty", "gone", "a folder"])
def test_a_damaged_file_is_named(name, damage, out):
    path, content = out / name, (out / name).read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "gone":
        path.write_bytes({"cut": content[:-9], "altered": content[::-1], "empty": b""}[damage])
    refused(out, f"{name}.*{records.REPAIR}")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("length", "lenght"), ("a,0", "a,x"), ("a,0", ",0"), ("a,0", "a,"), ("a,0", "a,1e400"),
        ("a,0", "a,0,5,6,7"), ("a,0", '"a,0'), ("a,0", "a,\0"), ("True", "maybe"),
        ("a,0", "a,1"), ("voice,take", "take,voice"), (",0.0701", ",loud"),
    ],
)  # fmt: skip
def test_a_table_with_a_valid_hash_and_wrong_content_is_refused(old, new, out):
    text = (out / "songs.csv").read_text()
    assert old in text
    rehashed(out, "songs.csv", text.replace(old, new).encode())
    refused(out, "songs.csv")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("songs.csv", b""), ("notes.csv.gz", b""), ("notes.csv.gz", b"\x1f\x8b"),
        ("notes.csv.gz", gzip.compress(b"voice,bar\n", mtime=0)),
        ("notes.csv.gz", b"voice,take,bar,pitch\n"),
        (ARRAYS, b""), (ARRAYS, b"\xff" * 8), (ARRAYS, (2**60).to_bytes(8, "little") + b"{}"),
    ],
)  # fmt: skip
def test_a_file_with_a_valid_hash_that_is_something_else_is_refused(name, content, out):
    rehashed(out, name, content)
    refused(out, name)


@pytest.mark.parametrize("name", ["no-depth", "x/un"])
def test_filters_are_those_of_runs_of_table_2(name):
    known = Records(schema.SCHEMA, {}).with_arrays({schema.FILTERS: {name: np.zeros(3)}})
    with a_line(f"{schema.FILTERS}: not the filters of runs"):
        experiment.filters_of(known)


def test_a_column_that_came_later_has_its_default_in_older_records(out):
    text = "voice,take,length,loud\na,0,1.5,True\n"
    rehashed(out, "songs.csv", text.encode())
    found = records.read(out, SCHEMA)["songs"]
    assert list(found.columns) == list(SCHEMA.tables["songs"].columns)
    assert found["range"].to_list() == [2.0]
    rehashed(out, "songs.csv", b"voice,take,length\na,0,1.5\n")
    refused(out, "songs.csv: columns voice,take,length,range; expected voice,take,length,loud,r")


@pytest.mark.parametrize("name", ["../evil.wav", "/tmp/evil.wav", "evil.exe", "song.wav\n", "."])
def test_names_cannot_leave_the_folder(name, out, tmp_path):
    """The schema says which files there are; a provenance from elsewhere cannot add any."""
    for evil in ("evil.wav", "out/evil.exe"):
        (tmp_path / evil).write_bytes(b"secret")
    digest = hashlib.sha256(b"secret").hexdigest()
    with_provenance(out, lambda provenance: provenance["files"].update({name: digest}))
    refused(out, "provenance.json: damaged")


def test_a_folder_of_another_kind_or_format_is_not_called_damaged(out):
    """It is healthy; the command that wrote it is named."""
    with a_line("holds records of the kind songs, not table2; .* command `unitnorm sing`", out):
        records.read(out, schema.SCHEMA)
    assert records.kind_of(out) == "songs"
    assert records.kind_of(out.parent) is None
    with_provenance(out, lambda provenance: provenance.pop("kind"))  # as the first records
    assert len(records.read(out, SCHEMA)["songs"]) == 4
    with_provenance(out, lambda provenance: provenance.update(format=records.FORMAT + 1))
    refused(out, f"reads format {records.FORMAT}; give another --out")


def places(node: object, path: tuple = ()) -> list[tuple]:
    """The path of every value in a JSON document."""
    inner: Any = enumerate(node) if isinstance(node, list) else ()
    inner = node.items() if isinstance(node, dict) else inner
    return [path, *(p for key, value in inner for p in places(value, (*path, key)))]


def test_provenance_of_any_shape_is_refused_in_a_line_or_usable(out):
    good = json.loads((out / "provenance.json").read_bytes())
    for *path, last in places(good)[1:]:
        for value in (None, True, -3, 0.5, "x", "", [], [{}], {}, {"x": []}, ...):  # ...: none
            document = copy.deepcopy(good)
            parent: Any = document
            for key in path:
                parent = parent[key]
            parent[last] = value
            if value is ...:
                del parent[last]
            (out / "provenance.json").write_text(json.dumps(document))
            try:
                found = records.read(out, SCHEMA).provenance
            except UserError as error:
                line = str(error)
                assert "\n" not in line
                assert any(x in line for x in ("provenance.json", "SHA-256", "of the kind"))
            else:  # what the commands rely on is there
                assert all(command["rows"] < 9 for command in found["commands"])
                assert isinstance(found["data"]["text"], str)
                assert isinstance(found["config_sha256"], str)
                assert isinstance(found["config"], dict)


# ---------------------------------------------------------------- writing


class KilledError(BaseException):
    """What no `except` in the way catches."""


def fatal(real, left: list[int]):
    """A call that kills when there are no more left."""

    def call(*words, **options):
        left[0] -= 1
        if left[0] < 0:
            raise KilledError
        return real(*words, **options)

    return call


CALLS = ("mkdir", "rename", "replace", "rmdir", "unlink", "fsync")


def test_killed_at_any_call_the_old_records_or_the_new_ones_are_there(tmp_path, monkeypatch):
    old, new = example(), example(takes=3, length=2.5)
    put(tmp_path / "old", old)
    put(tmp_path / "new", new)
    before, after = contents(tmp_path / "old"), contents(tmp_path / "new")
    seen, done = [], False
    while not done:
        folder = tmp_path / f"killed-{len(seen)}"
        put(folder, old)
        with records.locked(folder), monkeypatch.context() as patch:
            left = [len(seen)]
            for name in CALLS:
                patch.setattr(os, name, fatal(getattr(os, name), left))
            with contextlib.suppress(KilledError):
                records.write(folder, new)
                done = True
        with records.locked(folder):  # the next process
            records.read(folder, SCHEMA)
        assert contents(folder) in (before, after), len(seen)
        seen.append(contents(folder) == after)
    assert seen == sorted(seen)  # up to one moment the old ones, from then on the new ones
    assert seen.count(False) > 4
    assert seen.count(True) > 4


def test_a_full_disk_leaves_the_old_records(out):
    """Or one without room for a file so large, which takes no right to mount anything."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))
    try:
        with a_line(r"File too large.*free some space", out):
            records.write(out, example(takes=300))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_folder_that_cannot_be_written_is_refused_at_once_and_can_be_read(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        put(disk / "out", example())
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, capture_output=True)
        for folder in (disk / "out", disk / "new"):
            with a_line(r"cannot be.*give another --out"), records.locked(folder):
                pass
        assert len(records.read_alone(disk / "out", SCHEMA)["songs"]) == 4


@pytest.mark.parametrize("name", ["x" * 300, "file/out", "file"])
def test_a_place_where_no_folder_can_be(name, tmp_path):
    (tmp_path / "file").write_text("")
    with a_line("cannot be used as a results folder"), records.locked(tmp_path / name):
        pass


def test_a_missing_folder_is_not_made_where_only_reading_is_meant(tmp_path):
    assert records.read(tmp_path, SCHEMA).is_empty()
    folder = tmp_path / "none"
    assert records.read(folder, SCHEMA).is_empty()
    with a_line("no records: there is no such folder"), records.locked(folder, make=False):
        pass
    assert not folder.exists()


def test_files_of_a_pattern_give_way_to_the_new_ones_and_others_stay(tmp_path):
    with records.locked(tmp_path):
        records.write_files(tmp_path, {"a/x1": b"", "a/x2": b"", "a/y": b""})
        records.write_files(tmp_path, {"a/x2": b"new", "b": b""}, replacing="a/x*")
    assert contents(tmp_path) == {"a/x2": b"new", "a/y": b"", "b": b""}


# ---------------------------------------------------------------- several processes

HOLD = """
import sys, pathlib
from unitnorm.run import records
with records.locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """Another process holds the folder, until it is killed."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLD, out], stdin=pipe, stdout=pipe) as holder:
        assert holder.stdout.readline() == b"held\n"
        yield
        holder.send_signal(signal.SIGKILL)


def test_readers_look_while_another_process_writes(out, monkeypatch):
    """They see one set or the next, whole, and leave alone what is being put in place; a second
    writer is refused, and a killed one holds nothing."""
    monkeypatch.setattr(records, "WRITING_S", 0.3)
    with held(out):
        with a_line("another unitnorm process is at work here"), records.locked(out):
            pass
        assert len(records.read_alone(out, SCHEMA)["songs"]) == 4
        valid = out / records._VALID
        valid.mkdir()  # the writer is about to put this in place
        (out / "songs.csv").rename(valid / "songs.csv")
        threading.Timer(0.1, lambda: (valid / "songs.csv").rename(out / "songs.csv")).start()
        assert len(records.read_alone(out, SCHEMA)["songs"]) == 4
        assert len(records.read(out, SCHEMA)["songs"]) == 4
        assert valid.exists()
        (out / "songs.csv").write_text("damaged")
        with a_line(r"songs.csv: altered or cut", out):
            records.read_alone(out, SCHEMA)
        valid.rmdir()
    with records.locked(out):
        pass
    assert {path.name for path in out.iterdir()} == {*FILES, "song.wav"}  # and no locks


TAKE = """
import sys, pathlib
from unitnorm.errors import UserError
from unitnorm.run import records
folder, entered = pathlib.Path(sys.argv[1]), 0
while entered < 60:
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
    takers = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for taker in takers:
        assert taker.communicate(timeout=120)[1] == ""
        assert taker.returncode == 0
    assert list(tmp_path.iterdir()) == []
