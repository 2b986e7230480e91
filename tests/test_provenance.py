"""Where records come from, and what makes two programs the same one."""

import datetime
import subprocess

import numpy as np
import pytest

from unitnorm.run import provenance


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of a few files in place of unitnorm's own."""
    for name in ("geometry.py", "updates/un.py", "room/program.py", "other/report.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path)
    yield tmp_path
    provenance.code_identity.cache_clear()
    provenance.commit.cache_clear()


def identity(*rooms: str) -> str:
    provenance.code_identity.cache_clear()
    return provenance.code_identity(*provenance.LIBRARY, *rooms)


def test_the_code_of_a_program_is_the_library_and_its_rooms_files(package):
    before, everything = identity("room"), identity(".")
    (package / "other" / "report.py").write_text("x = 2\n")
    assert identity("room") == before
    assert identity(".") != everything
    seen = {before}
    for name in ("geometry.py", "updates/un.py", "room/program.py", "room/new.py"):
        (package / name).write_text(f"y = {len(seen)}\n")
        seen.add(identity("room"))
    assert len(seen) == 5


def test_a_fingerprint_is_of_all_that_it_is_given_and_of_versions(monkeypatch):
    rates = np.array([[1e-2, 1e-3]])

    def of(rooms=("archbn",), updates=("un",), what="sweep", seeds=(0, 1), rates=rates):
        return provenance.fingerprint(rooms, updates, what, seeds, rates)

    assert of() == of(rates=rates.copy())
    others = [
        of(("segment",)), of(updates=("sm",)), of(what="train"), of(seeds=(0, 2)),
        of(rates=rates * (1 + 1e-15)), of(rates=rates.T),
    ]  # fmt: skip
    first = of()
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"another {name}")
    assert len({first, *others, of()}) == 8


def test_a_fingerprint_is_of_the_code_of_an_update_from_another_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for rate in (1, 2):
        (tmp_path / "elsewhere.py").write_text(
            f"import unitnorm\ndef mine(rate, *, axis=None): return unitnorm.un({rate} * rate)\n"
        )
        found += 2 * [provenance.fingerprint(("archbn",), ["elsewhere:mine"])]
    assert found[0] == found[1] != found[2] == found[3]


def test_a_command_is_told_with_when_what_and_on_what():
    started = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    entry = provenance.command_entry("unitnorm train", started.timestamp(), 1.26, 40)
    assert (entry["command"], entry["wall_s"], entry["rows"]) == ("unitnorm train", 1.3, 40)
    assert entry["started"] == "2026-01-02T03:04:05+00:00"
    assert entry["versions"]["unitnorm"]
    assert {"python", "jax", "jaxlib", "numpy", "optax", "flax"} <= set(entry["versions"])
    assert (entry["device"]["platform"], entry["device"]["count"]) == ("cpu", 2)


def test_the_commit_is_that_of_the_code_and_of_nothing_around_it(package, monkeypatch):
    """A package that is installed inside a checkout of something else has no commit."""
    answers = {"ls-files": "__init__.py", "rev-parse": "c0ffee", "status": ""}

    def git(folder, command, *_):
        assert folder == package
        if answers[command] is None:
            raise subprocess.CalledProcessError(1, "git")
        return answers[command]

    monkeypatch.setattr(provenance, "_git", git)
    for changed, expected in (
        ({}, "c0ffee"), ({"status": " M un.py"}, "c0ffee+"), ({"ls-files": None}, None)
    ):  # fmt: skip
        provenance.commit.cache_clear()
        answers |= changed
        assert provenance.commit() == expected
