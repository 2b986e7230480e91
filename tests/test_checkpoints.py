"""Checkpoints: what is restored is what was saved, or nothing; damage, other runs, full disks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest

from unitnorm.data import load_dataset
from unitnorm.run import checkpoints
from unitnorm.run.checkpoints import Folder, Part
from unitnorm.table2 import config, experiment

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
        folder.close()


def saved(folder: Folder, *steps: int, part: Part = PART) -> None:
    for step in steps:
        folder.save(part, state(step), wait=False)
    folder.close()


def test_the_newest_state_comes_back_bit_for_bit_and_two_are_kept(opened, tmp_path, said):
    folder = opened()
    assert folder.restore(PART, state(0)) is None
    saved(folder, 1, 2, 3)
    assert_same(opened().restore(PART, state(0)), state(3))
    (place,) = (tmp_path / "kept").iterdir()
    assert {path.name for path in place.iterdir()} == {"about.json", "2", "3"}
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


def test_a_state_of_another_shape_is_not_taken(opened, said):
    saved(opened(), 1)
    other = state(0)._replace(epoch=np.zeros((2,), np.int32))
    assert opened().restore(PART, other) is None
    assert len(said) == 1


def damages(content: bytes):
    """The ways in which a file is spoilt."""
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :]
    return {"cut": content[:middle], "altered": flipped, "gone": None}


def test_whatever_is_damaged_the_state_is_whole_or_an_older_one_and_said_so(opened, tmp_path, said):
    saved(opened(), 1, 2)
    (place,) = (tmp_path / "kept").iterdir()
    shutil.copytree(place / "2", tmp_path / "good")
    files = [path.relative_to(place) for path in (place / "2").rglob("*") if path.is_file()]
    assert len(files) >= 8
    fell_back = set()
    for name in files:
        content = (place / name).read_bytes()
        for damage, spoilt in damages(content).items() if content else ():
            if spoilt is None:
                (place / name).unlink()
            else:
                (place / name).write_bytes(spoilt)
            found = opened().restore(PART, state(0))
            assert found is not None, f"{name} {damage}"
            if said:
                assert_same(found, state(1))
                assert len(said) == 1
                assert "checkpoint 2 is damaged and is left out" in said[0]
                assert "\n" not in said[0]
                assert not (place / "2").exists()
                fell_back.add((name.parts[1], damage))
            else:  # a file that nobody needs
                assert_same(found, state(2))
            said.clear()
            shutil.rmtree(place / "2", ignore_errors=True)
            shutil.copytree(tmp_path / "good", place / "2")
    assert {("state", "cut"), ("state", "altered"), ("state", "gone")} <= fell_back
    assert {("content", "cut"), ("content", "altered"), ("content", "gone")} <= fell_back


def test_a_state_that_orbax_takes_for_whole_but_is_not_what_was_saved(opened, tmp_path, said):
    saved(opened(), 1, 2)
    (place,) = (tmp_path / "kept").iterdir()
    shutil.rmtree(place / "2" / "state")
    shutil.copytree(place / "1" / "state", place / "2" / "state")
    assert_same(opened().restore(PART, state(0)), state(1))
    assert "SHA-256" in said[0]


def test_without_a_good_state_one_starts_anew(opened, tmp_path, said):
    saved(opened(), 1, 2)
    for path in (tmp_path / "kept").glob("*/*/state/**/*"):
        if path.is_file():
            path.write_bytes(b"")
    folder = opened()
    assert folder.restore(PART, state(0)) is None
    assert len(said) == 2
    saved(folder, 7)
    assert_same(opened().restore(PART, state(0)), state(7))


@pytest.mark.parametrize("about", [None, b"", b"{", b"[]", b'{"format": 99, "covers": []}'])
def test_a_folder_without_a_sound_description_is_removed(about, opened, tmp_path):
    saved(opened(), 1)
    (place,) = (tmp_path / "kept").iterdir()
    (place / "about.json").unlink()
    if about is not None:
        (place / "about.json").write_bytes(about)
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


def test_orbax_is_imported_only_when_there_is_something_to_keep(tmp_path):
    code = (
        "import sys, pathlib; from unitnorm.run.checkpoints import Folder, Part\n"
        "folder = Folder(pathlib.Path(sys.argv[1]), say=print)\n"
        "folder.drop(['x']); folder.restore(Part('a', 'b'), {}); folder.due(); folder.close()\n"
        "sys.exit('orbax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "none"], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "none").exists()


def test_another_seed_rate_data_set_or_code_is_another_fingerprint(idx_folder, tmp_path):
    settings = config.load(None, {"train.train_images": 400, "train.validation_images": 100})
    data = load_dataset(data_dir=idx_folder)

    def fingerprint(table="runs", updates=("un",), seeds=(0, 1), rate=1e-2, **changes) -> str:
        changed = config.load(None, settings.model_dump() | changes.pop("config", {}))
        group = experiment.Group(2, updates, (0, 1))
        rates = np.full((len(seeds), len(updates)), rate)
        part = experiment.part_of(table, group, np.asarray(seeds), rates, changed, data)
        return part.fingerprint

    found = [
        fingerprint(),
        fingerprint(table="sweep"),
        fingerprint(updates=("b-sgd",)),
        fingerprint(seeds=(0, 2)),
        fingerprint(rate=1e-3),
        fingerprint(config={"loss": {"batch_size": 50}}),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "code", lambda: "another")
        found.append(fingerprint())
    with pytest.MonkeyPatch.context() as patch:
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
