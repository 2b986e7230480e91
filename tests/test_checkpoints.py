"""Checkpoints: what is restored is what was saved; damage, faults, other runs, full disks."""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
from typing import NamedTuple

import jax
import numpy as np
import pandas as pd
import pytest
import safetensors.numpy

from tests.common import a_line
from unitnorm.archbn.config import Config
from unitnorm.data import load_dataset
from unitnorm.errors import Interrupted, UserError
from unitnorm.run import checkpoints
from unitnorm.run.checkpoints import Folder, Part
from unitnorm.run.config import load
from unitnorm.run.loop import Session
from unitnorm.run.planner import Group
from unitnorm.table2 import experiment
from unitnorm.table2.schema import CELL

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


@pytest.fixture
def said():
    return []


@pytest.fixture
def kept(tmp_path):
    return tmp_path / "kept"


@pytest.fixture
def opened(kept, said):
    """Opens the folder anew, as the next process does."""
    folders = []

    def start(**options) -> Folder:
        folders.append(Folder(kept, say=said.append, **options))
        return folders[-1]

    yield start
    for folder in folders:
        folder.finish()


def saved(folder: Folder, *steps: int, part: Part = PART) -> None:
    for step in steps:
        folder.save(part, state(step), wait=False)
    folder.finish()


def assert_restored(folder: Folder, step: int | None, part: Part = PART, like=None) -> None:
    """The state of this step comes back bit for bit, or none."""
    found = folder.restore(part, state(0) if like is None else like)
    expected = None if step is None else state(step)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def files(kept) -> set[str]:
    """Those of the only program."""
    return {path.name for path in kept.glob("*/*")}


def test_the_newest_state_comes_back_bit_for_bit_and_two_are_kept(opened, kept, said):
    folder = opened()
    assert_restored(folder, None)
    assert not kept.exists()  # before a save
    saved(folder, 1, 2)
    again = opened()
    assert_restored(again, 2)
    saved(again, 3)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state(0))
    assert_restored(opened(), 3, like=shapes)
    assert files(kept) == {"about.json", "2.safetensors", "3.safetensors"}
    (about,) = kept.glob("*/about.json")
    assert json.loads(about.read_text()) == {
        "format": checkpoints.FORMAT, "fingerprint": PART.fingerprint, "covers": list(PART.covers)
    }  # fmt: skip
    assert said == []


def damages(content: bytes):
    """A file cut at any place, and with a bit turned at any place."""
    for at in range(0, len(content), 61):
        yield content[:at]
        yield content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]


def test_whatever_is_damaged_an_older_state_is_taken_and_the_damaged_one_set_aside(
    opened, kept, said
):
    saved(opened(), 1, 2)
    (newest,) = kept.glob("*/2.safetensors")
    spoilt = list(damages(newest.read_bytes()))
    assert len(spoilt) > 60
    for content in spoilt:
        newest.write_bytes(content)
        assert_restored(opened(), 1)
        (line,) = said
        assert "checkpoint 2 is damaged" in line
        assert "is set aside as damaged-2.safetensors" in line
        assert "\n" not in line
        assert newest.with_name("damaged-2.safetensors").read_bytes() == content
        assert not newest.exists()
        said.clear()
    saved(opened(), 3)  # and the number of the one set aside is not given again
    damaged = {"damaged-2.safetensors"}
    assert files(kept) == {"about.json", "1.safetensors", "3.safetensors", *damaged}
    for path in kept.glob("*/?.safetensors"):
        path.write_bytes(b"")
    assert_restored(opened(), None)  # without a good state one starts anew, and nothing is deleted
    saved(opened(), 7)
    assert_restored(opened(), 7)
    damaged |= {"damaged-1.safetensors", "damaged-3.safetensors"}
    assert files(kept) == {"about.json", "4.safetensors", *damaged}
    opened().drop(PART.covers)
    assert not kept.exists()


@pytest.mark.parametrize("name", ["pathlib.Path.read_bytes", "os.listdir"])
def test_what_hinders_reading_but_is_no_damage_ends_the_command_and_loses_nothing(
    name, opened, kept, said, monkeypatch
):
    def no_more_files(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    saved(opened(), 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(name, no_more_files)
        with a_line(r"cannot be read \(Too many open files\)"):
            opened().restore(PART, state(0))
    assert said == []
    assert files(kept) == {"about.json", "1.safetensors", "2.safetensors"}
    assert_restored(opened(), 2)


def test_a_state_of_a_newer_format_is_refused_and_kept(opened, kept):
    saved(opened(), 1, 2)
    (newest,) = kept.glob("*/2.safetensors")
    metadata = {"format": "99", "sha256": checkpoints.BLANK}
    content = safetensors.numpy.save(safetensors.numpy.load(newest.read_bytes()), metadata)
    digest = hashlib.sha256(content).hexdigest()
    newest.write_bytes(content.replace(checkpoints.BLANK.encode(), digest.encode(), 1))
    with pytest.raises(UserError, match="of format 99, this version of unitnorm reads 1"):
        opened().restore(PART, state(0))
    assert newest.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": np.zeros((2,), np.int32)},
        {"epoch": np.zeros((), np.int64)},
        {"epoch": {"more": np.zeros((), np.int32)}},
        {"params": {}},
    ],
)
def test_a_state_of_another_shape_is_refused_and_kept(changes, opened):
    saved(opened(), 1)
    with pytest.raises(UserError, match=r"its .* is not that of this program.*--fresh"):
        opened().restore(PART, state(0)._replace(**changes))
    assert_restored(opened(), 1)


@pytest.mark.parametrize(
    "last", [lambda folder: folder.save(PART, state(3), wait=False), Folder.finish]
)
def test_a_failed_write_is_told_by_the_next_save_or_the_end_and_the_states_before_stay(
    last, opened, kept, monkeypatch
):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    saved(opened(), 1)
    folder = opened()
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        folder.save(PART, state(2), wait=False)
        with pytest.raises(UserError, match=r"No space left on device.*free some space"):
            last(folder)
    folder.finish()  # says it once
    assert files(kept) == {"about.json", "1.safetensors"}
    assert_restored(opened(), 1)


def test_nothing_is_written_in_place(opened, kept, monkeypatch):
    """Whatever a kill leaves unfinished is not taken for a state, and goes with the next save."""
    saved(opened(), 1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    folder = opened()
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.save(PART, state(2), wait=True)
    assert files(kept) == {"about.json", "1.safetensors", "unfinished.tmp"}
    folder = opened()
    assert_restored(folder, 1)
    saved(folder, 2)
    assert files(kept) == {"about.json", "1.safetensors", "2.safetensors"}


@pytest.mark.parametrize("about", [None, b"", b"[]", b'{"format": 99, "covers": []}'])
def test_a_folder_without_a_sound_description_goes_only_if_it_has_no_state(about, opened, kept):
    saved(opened(), 1)
    (place,) = kept.iterdir()
    (place / "about.json").unlink()
    if about is not None:
        (place / "about.json").write_bytes(about)
    opened().drop(PART.covers)
    assert_restored(opened(), 1)
    for path in place.glob("*.safetensors"):
        path.unlink()
    opened().drop([])
    assert not kept.exists()


def test_other_runs_settings_or_code_do_not_share_a_checkpoint_and_it_is_said(opened, said):
    saved(opened(), 1)
    other = Part(PART.title, "0" * 64, ("runs/2/b-sgd/0",))
    folder = opened()
    assert_restored(folder, None, other)
    (line,) = said
    assert "is of other runs, settings or code and is not used; --fresh removes it" in line
    saved(folder, 5, part=other)
    assert_restored(opened(), 5, other)
    assert_restored(opened(), 1)  # which lost nothing
    assert_restored(opened(), None, Part("train depth 20", "1" * 64))
    assert len(said) == 1


def test_a_checkpoint_goes_with_the_first_of_its_runs_that_is_recorded(opened, kept):
    other = Part("train depth 4", "0" * 64, ("runs/4/un/0",))
    folder = opened()
    saved(folder, 1)
    saved(folder, 2, part=other)
    stray = kept / ".DS_Store"
    stray.write_bytes(b"x")
    folder.drop(["runs/2/un/7", "sweep/2/un/0"])
    assert_restored(folder, 1)
    folder.drop(["runs/2/un/1"])
    assert_restored(folder, None)
    assert_restored(folder, 2, other)
    folder.drop(["runs/4/un/0"])
    assert list(kept.iterdir()) == [stray]  # what is no checkpoint is left alone


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


def test_another_seed_rate_or_data_set_is_another_fingerprint(idx_folder, monkeypatch):
    """Code and versions, too: see test_provenance."""
    settings = {"train.train_images": 400, "train.validation_images": 100}
    data, found = load_dataset(data_dir=idx_folder), []

    def stop(part: Part, *_: object) -> None:
        found.append(part.fingerprint)
        raise Interrupted  # before anything is trained

    monkeypatch.setattr(experiment, "train", stop)

    def look(sweep=False, updates=("un",), runs=(0, 1), rate=1e-2, data=data, **changes):
        cells = pd.DataFrame(itertools.product([2], updates, runs), columns=list(CELL))
        group = Group("train", "sweep" if sweep else "runs", cells.assign(base_lr=rate))
        table2 = experiment.Table2(load(None, settings | changes, Config))
        with contextlib.suppress(Interrupted):
            table2.compute(group, data, Session())

    for changes in (
        {}, {"sweep": True}, {"updates": ("b-sgd",)}, {"runs": (0, 2)}, {"rate": 1e-3},
        {"data": dataclasses.replace(data, sha256="0" * 64)}, {"loss.batch_size": 50},
    ):  # fmt: skip
        look(**changes)
    assert len(set(found)) == len(found) == 7
    look()
    assert found[0] == found[-1]
