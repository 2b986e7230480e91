"""Checkpoints: what is restored is what was saved; damage, faults, other runs, full disks."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
from typing import NamedTuple

import jax
import numpy as np
import pytest
import safetensors.numpy

from unitnorm.archbn.config import Config
from unitnorm.data import load_dataset
from unitnorm.errors import UserError
from unitnorm.run import checkpoints, provenance
from unitnorm.run.checkpoints import Folder, Part
from unitnorm.run.config import load
from unitnorm.run.loop import Session
from unitnorm.run.planner import Group
from unitnorm.table2 import experiment

PART = Part("train depth 2", "f" * 64, ("runs/2/un/0", "runs/2/un/1"))


class State(NamedTuple):
    """Every kind of container and leaf that a state may have."""

    params: dict
    opt_state: tuple
    epoch: np.ndarray


def state(step: int) -> State:
    rng = np.random.default_rng(step)
    layers = {number: {"W": rng.standard_normal((2, 3, 5), np.float32)} for number in range(12)}
    layers[3]["W"][0, 0, :3] = np.nan, np.inf, -0.0
    return State(
        params={"layers": layers, "list": [rng.integers(0, 2**32, (2,), np.uint32), ()]},
        opt_state=((), (rng.standard_normal((2,)), np.asarray([True, step % 2 == 0]))),
        epoch=np.asarray(step, np.int32),
    )


def assert_same(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


@pytest.fixture
def said():
    return []


@pytest.fixture
def opened(tmp_path, said):
    """Opens the folder anew, as the next process does."""
    folders = []

    def start(**options) -> Folder:
        folders.append(Folder(tmp_path / "kept", say=said.append, **options))
        return folders[-1]

    yield start
    for folder in folders:
        folder.finish()


def saved(folder: Folder, *steps: int, part: Part = PART) -> None:
    for step in steps:
        folder.save(part, state(step), wait=False)
    folder.finish()


def test_the_newest_state_comes_back_bit_for_bit_and_two_are_kept(opened, tmp_path, said):
    folder = opened()
    assert folder.restore(PART, state(0)) is None
    saved(folder, 1, 2, 3)
    assert_same(opened().restore(PART, state(0)), state(3))
    (place,) = (tmp_path / "kept").iterdir()
    assert {path.name for path in place.iterdir()} == {
        "about.json", "2.safetensors", "3.safetensors",
    }  # fmt: skip
    assert said == []


def test_a_state_may_be_described_by_shapes_alone(opened):
    saved(opened(), 1)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state(0))
    assert_same(opened().restore(PART, like), state(1))


def test_saving_goes_on_after_a_restart(opened):
    saved(opened(), 1, 2)
    folder = opened()
    folder.restore(PART, state(0))
    saved(folder, 3)
    assert_same(opened().restore(PART, state(0)), state(3))


def damages(content: bytes):
    """A file cut at any place, and with a bit turned at any place."""
    for at in range(0, len(content), 61):
        yield content[:at]
        yield content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]


def test_whatever_is_damaged_an_older_state_is_taken_and_the_damaged_one_set_aside(
    opened, tmp_path, said
):
    saved(opened(), 1, 2)
    (place,) = (tmp_path / "kept").iterdir()
    newest, aside = place / "2.safetensors", place / "damaged-2.safetensors"
    good = newest.read_bytes()
    spoilt = list(damages(good))
    assert len(spoilt) > 60
    for content in spoilt:
        newest.write_bytes(content)
        assert_same(opened().restore(PART, state(0)), state(1))
        assert len(said) == 1
        assert "checkpoint 2 is damaged" in said[0]
        assert "is set aside as damaged-2.safetensors" in said[0]
        assert "\n" not in said[0]
        assert aside.read_bytes() == content
        assert not newest.exists()
        aside.unlink()
        said.clear()
    newest.write_bytes(good)
    assert_same(opened().restore(PART, state(0)), state(2))


def test_the_number_of_a_state_that_was_set_aside_is_not_given_again(opened, tmp_path):
    saved(opened(), 1, 2)
    (place,) = (tmp_path / "kept").iterdir()
    (place / "2.safetensors").write_bytes(b"cut")
    folder = opened()
    assert_same(folder.restore(PART, state(0)), state(1))
    saved(folder, 3)
    assert {path.name for path in place.iterdir()} == {
        "about.json", "1.safetensors", "3.safetensors", "damaged-2.safetensors",
    }  # fmt: skip


def test_without_a_good_state_one_starts_anew_and_nothing_is_deleted(opened, tmp_path, said):
    saved(opened(), 1, 2)
    for path in (tmp_path / "kept").glob("*/*.safetensors"):
        path.write_bytes(b"")
    folder = opened()
    assert folder.restore(PART, state(0)) is None
    assert len(said) == 2
    saved(folder, 7)
    assert_same(opened().restore(PART, state(0)), state(7))
    assert len(list((tmp_path / "kept").glob("*/damaged-*"))) == 2
    opened().drop(PART.covers)
    assert not (tmp_path / "kept").exists()


def rewritten(path, **metadata: str) -> None:
    """A state with other metadata, and the SHA-256 of that."""
    metadata = {"format": str(checkpoints.FORMAT), "sha256": checkpoints.BLANK} | metadata
    content = safetensors.numpy.save(safetensors.numpy.load(path.read_bytes()), metadata)
    digest = hashlib.sha256(content).hexdigest()
    path.write_bytes(content.replace(checkpoints.BLANK.encode(), digest.encode(), 1))


def no_more_files(*_, **__):
    raise OSError(errno.EMFILE, "Too many open files")


def not_permitted(*_, **__):
    raise PermissionError(errno.EACCES, "Permission denied")


def unknown_to_the_library(*_, **__):
    raise safetensors.SafetensorError("unknown variant `F3`")


@pytest.mark.parametrize(
    ("name", "fault", "says"),
    [
        ("pathlib.Path.read_bytes", no_more_files, r"cannot be read \(Too many open files\)"),
        ("os.listdir", no_more_files, r"cannot be read \(Too many open files\)"),
        ("pathlib.Path.read_bytes", not_permitted, r"cannot be read \(Permission denied\)"),
        ("safetensors.numpy.load", unknown_to_the_library, "whole, but safetensors [0-9.]+ cannot"),
    ],
)
def test_what_hinders_reading_but_is_no_damage_ends_the_command_and_loses_nothing(
    name, fault, says, opened, tmp_path, said, monkeypatch
):
    saved(opened(), 1, 2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(name, fault)
        for _ in range(3):
            with pytest.raises(UserError, match=says) as line:
                opened().restore(PART, state(0))
            assert "\n" not in str(line.value)
    assert said == []
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert_same(opened().restore(PART, state(0)), state(2))


def test_a_state_of_a_newer_format_is_refused_and_kept(opened, tmp_path):
    saved(opened(), 1, 2)
    (newest,) = (tmp_path / "kept").glob("*/2.safetensors")
    rewritten(newest)
    assert_same(opened().restore(PART, state(0)), state(2))
    rewritten(newest, format="99")
    with pytest.raises(UserError, match="of format 99, this version of unitnorm reads 1"):
        opened().restore(PART, state(0))
    assert newest.exists()


def test_a_state_of_another_shape_is_refused_and_kept(opened, tmp_path):
    saved(opened(), 1)
    others = [
        state(0)._replace(epoch=np.zeros((2,), np.int32)),
        state(0)._replace(epoch=np.zeros((), np.int64)),
        state(0)._replace(epoch={"more": np.zeros((), np.int32)}),
        state(0)._replace(params={}),
    ]
    for other in others:
        with pytest.raises(UserError, match=r"its .* is not that of this program.*--fresh"):
            opened().restore(PART, other)
    assert_same(opened().restore(PART, state(0)), state(1))


def test_a_failed_write_is_told_by_the_next_save_or_the_end_and_the_states_before_stay(
    opened, tmp_path, monkeypatch
):
    saved(opened(), 1)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for last in (lambda folder: folder.save(PART, state(3), wait=False), Folder.finish):
        folder = opened()
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            folder.save(PART, state(2), wait=False)
            with pytest.raises(UserError, match=r"No space left on device.*free some space"):
                last(folder)
        folder.finish()  # says it once
        assert {path.name for path in (tmp_path / "kept").glob("*/*")} == {
            "about.json", "1.safetensors",
        }  # fmt: skip
    assert_same(opened().restore(PART, state(0)), state(1))


def test_nothing_is_written_in_place(opened, tmp_path, monkeypatch):
    """Whatever a kill leaves unfinished is not taken for a state, and goes with the next save."""
    saved(opened(), 1)
    (place,) = (tmp_path / "kept").iterdir()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    folder = opened()
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.save(PART, state(2), wait=True)
    assert {path.name for path in place.iterdir()} == {
        "about.json", "1.safetensors", "unfinished.tmp",
    }  # fmt: skip
    folder = opened()
    assert_same(folder.restore(PART, state(0)), state(1))
    saved(folder, 2)
    assert not (place / "unfinished.tmp").exists()
    assert_same(opened().restore(PART, state(0)), state(2))


@pytest.mark.parametrize("about", [None, b"", b"{", b"[]", b'{"format": 99, "covers": []}'])
def test_a_folder_without_a_sound_description_goes_only_if_it_has_no_state(about, opened, tmp_path):
    saved(opened(), 1)
    (place,) = (tmp_path / "kept").iterdir()
    (place / "about.json").unlink()
    if about is not None:
        (place / "about.json").write_bytes(about)
    opened().drop(PART.covers)
    folder = opened()
    assert_same(folder.restore(PART, state(0)), state(1))
    saved(folder, 2)  # describes it again
    (place / "about.json").write_bytes(about or b"")
    for path in place.glob("*.safetensors"):
        path.unlink()
    opened().drop([])
    assert not (tmp_path / "kept").exists()


def test_other_runs_settings_or_code_do_not_share_a_checkpoint_and_it_is_said(opened, said):
    saved(opened(), 1)
    other = Part(PART.title, "0" * 64, ("runs/2/b-sgd/0",))
    folder = opened()
    assert folder.restore(other, state(0)) is None
    assert len(said) == 1
    assert "is of other runs, settings or code and is not used; --fresh removes it" in said[0]
    saved(folder, 5, part=other)
    assert_same(opened().restore(other, state(0)), state(5))
    assert_same(opened().restore(PART, state(0)), state(1))  # which lost nothing
    longer = Part("train depth 20", "1" * 64)
    assert opened().restore(longer, state(0)) is None
    assert len(said) == 1


def test_a_checkpoint_goes_with_the_first_of_its_runs_that_is_recorded(opened, tmp_path):
    other = Part("train depth 4", "0" * 64, ("runs/4/un/0",))
    folder = opened()
    folder.save(PART, state(1), wait=False)
    folder.save(other, state(2), wait=False)
    folder.drop(["runs/2/un/7", "sweep/2/un/0"])
    assert_same(folder.restore(PART, state(0)), state(1))
    folder.drop(["runs/2/un/1"])
    assert folder.restore(PART, state(0)) is None
    assert_same(folder.restore(other, state(0)), state(2))
    folder.drop(["runs/4/un/0"])
    assert not (tmp_path / "kept").exists()


def test_a_save_is_due_after_so_many_seconds_and_not_before(opened, monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    folder = opened(every_s=5.0)
    now = 104.9
    assert not folder.due()
    now = 105.0
    assert folder.due()
    folder.save(PART, state(1), wait=True)
    assert not folder.due()
    assert opened(every_s=0.0).due()


def test_what_is_not_a_checkpoint_is_left_alone(opened, tmp_path):
    saved(opened(), 1)
    stray = tmp_path / "kept" / ".DS_Store"
    stray.write_bytes(b"x")
    opened().drop(PART.covers)
    assert list((tmp_path / "kept").iterdir()) == [stray]


def test_without_a_save_there_is_no_folder(opened, tmp_path):
    folder = opened()
    folder.drop(["x"])
    assert folder.restore(Part("a", "b"), {}) is None
    folder.finish()
    assert not (tmp_path / "kept").exists()


def test_another_seed_rate_data_set_or_code_is_another_fingerprint(idx_folder, monkeypatch):
    settings = {"train.train_images": 400, "train.validation_images": 100}
    data = load_dataset(data_dir=idx_folder)
    parts = []

    class Stop(Exception):
        """Before anything is trained."""

    def stop(part: Part, *_: object) -> None:
        parts.append(part)
        raise Stop

    monkeypatch.setattr(experiment, "train", stop)

    def fingerprint(sweep=False, updates=("un",), runs=(0, 1), rate=1e-2, data=data, **changes):
        rates = None if sweep else np.full((len(runs), len(updates)), rate)
        cells = experiment.Cells(2, updates, runs, rates)
        group = Group("train", "sweep" if sweep else "runs", cells.table(), cells)
        with pytest.raises(Stop):
            experiment.Table2(load(None, settings | changes, Config)).compute(
                group, data, Session()
            )
        return parts[-1].fingerprint

    found = [
        fingerprint(),
        fingerprint(sweep=True),
        fingerprint(updates=("b-sgd",)),
        fingerprint(runs=(0, 2)),
        fingerprint(rate=1e-3),
        fingerprint(data=dataclasses.replace(data, sha256="0" * 64)),
        fingerprint(**{"loss.batch_size": 50}),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "code_identity", lambda *rooms: f"another {rooms}")
        found.append(fingerprint())
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda name: f"another {name}")
        found.append(fingerprint())
    assert len(set(found)) == len(found)
    assert fingerprint() == found[0]


def test_a_description_says_what_is_covered(opened, tmp_path):
    saved(opened(), 1)
    (about,) = (tmp_path / "kept").glob("*/about.json")
    assert json.loads(about.read_text()) == {
        "format": checkpoints.FORMAT,
        "fingerprint": PART.fingerprint,
        "covers": list(PART.covers),
    }
