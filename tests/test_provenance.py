"""Where records come from, and what makes two programs the same one."""

from __future__ import annotations

import datetime
import re
import shutil
import subprocess

import numpy as np
import pytest

import unitnorm
from unitnorm.run import provenance

TOY = '''"""A toy."""
from unitnorm.toy_parts import link
from unitnorm.run import toy_bars
from unitnorm.data.toy_images import read
from unitnorm.report.toy_tables import show

class Program:
    """What it does."""

    def advance(self, x):  # one step
        """Twice."""
        return link(2 * x)
'''
PARTS = "from unitnorm import toy_far\n\ndef link(x):\n    return toy_far.add(x)\n"
FAR = "import numpy as np\n\nSTEP = 1\n\ndef add(x):\n    return np.add(x, STEP)\n"
APART = ("run/toy_bars.py", "data/toy_images.py", "report/toy_tables.py")


@pytest.fixture
def identity(tmp_path, monkeypatch):
    """Writes files of a package beside unitnorm's own, and gives the identity of `toy`."""
    monkeypatch.setattr(unitnorm, "__path__", [*unitnorm.__path__, str(tmp_path)])

    def write(files: dict[str, str]) -> str:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        provenance.code_identity.cache_clear()
        return provenance.code_identity("unitnorm.toy")

    write({"toy.py": TOY, "toy_parts.py": PARTS, "toy_far.py": FAR, **dict.fromkeys(APART, "")})
    yield write
    provenance.code_identity.cache_clear()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# one step", "# a step, or so"),
        ('"""A toy."""\n', ""),
        ('"""Twice."""', '"""Two times.\n\n        Or more.\n        """'),
        ("link(2 * x)", "link(\n            2 * x\n        )"),
    ],
)
def test_comments_docstrings_and_layout_change_no_identity(old, new, identity):
    before = identity({})
    assert old in TOY
    assert identity({"toy.py": TOY.replace(old, new)}) == before


def test_a_statement_changes_it_also_in_what_is_imported(identity):
    seen = {identity({})}
    for name, text in (
        ("toy.py", TOY.replace("2 * x", "3 * x")),
        ("toy_parts.py", PARTS.replace("add(x)", "add(-x)")),
        ("toy_far.py", FAR.replace("STEP = 1", "STEP = 2")),  # imported by an import
        ("toy_far.py", FAR.replace("STEP = 1", "STEP = 1.0")),
    ):
        seen.add(identity({name: text}))
    assert len(seen) == 5


@pytest.mark.parametrize("name", APART)
def test_what_runs_reads_and_shows_has_no_say(name, identity):
    before = identity({})
    assert (
        identity({name: "import unitnorm.toy_other\nBAR = 3\n", "toy_other.py": "X = 1"}) == before
    )


def test_the_updates_are_a_part_of_a_training_and_the_figures_are_not():
    """Nor is what else stands in the package: one experiment does not discard another's states."""
    needed = provenance.modules_of("unitnorm.archbn.training")
    for name in (
        "geometry",
        "updates.manifold",
        "updates.parts",
        "table2.protocol",
        "table2.model",
    ):
        assert f"unitnorm.{name}" in needed
    for name in needed:
        assert not re.match(r"unitnorm\.(run|data|report|segment|symmetry|study|bench|cli)\b", name)


def test_two_hosts_have_the_same_sources_or_not(identity):
    """Processes that train together compare all of it, whatever they are about to train."""
    before = provenance.hash_sources()
    assert provenance.hash_sources() == before
    identity({"run/toy_bars.py": "# a comment\n"})
    assert provenance.hash_sources() != before


def test_a_fingerprint_is_of_all_that_it_is_given():
    rates = np.array([[1e-2, 1e-3]])

    def of(module="unitnorm.geometry", updates=("un",), what="sweep", seeds=(0, 1), rates=rates):
        return provenance.fingerprint(module, updates, what, seeds, rates)

    assert of() == of(rates=rates.copy(), updates=["UN"])
    others = [
        of("unitnorm.errors"), of(updates=("sm",)), of(what="train"), of(seeds=(0, 2)),
        of(rates=rates * (1 + 1e-15)), of(rates=rates.T),
    ]  # fmt: skip
    assert len({of(), *others}) == 7


def test_a_fingerprint_is_of_the_code_of_an_update_from_another_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for rate in (1, 2):
        (tmp_path / "elsewhere.py").write_text(
            f"import unitnorm\ndef mine(rate, *, axis=None): return unitnorm.un({rate} * rate)\n"
        )
        found += 2 * [provenance.fingerprint("unitnorm.geometry", ["elsewhere:mine"])]
    assert found[0] == found[1] != found[2] == found[3]


def test_a_command_is_told_with_when_what_and_on_what():
    started = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    entry = provenance.command_entry("unitnorm train", started.timestamp(), 1.26, 40)
    assert (entry["command"], entry["wall_s"], entry["rows"]) == ("unitnorm train", 1.3, 40)
    assert entry["started"] == "2026-01-02T03:04:05+00:00"
    assert entry["versions"]["unitnorm"]
    assert {"python", "jax", "jaxlib", "numpy", "optax", "flax"} <= set(entry["versions"])
    assert (entry["device"]["platform"], entry["device"]["count"]) == ("cpu", 2)


def test_the_commit_is_that_of_the_code_and_of_nothing_around_it(tmp_path, monkeypatch):
    """A package that is installed inside a checkout of something else has no commit."""
    package = tmp_path / "unitnorm"
    (package / "run").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(provenance, "__file__", str(package / "run" / "provenance.py"))

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    def commit() -> str | None:
        provenance.commit.cache_clear()
        return provenance.commit()

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() is None
    git("init", "-q")
    (tmp_path / "README").write_text("something else")
    git("add", "README")
    git("commit", "-qm", "first")
    assert commit() is None
    git("add", "unitnorm")
    git("commit", "-qm", "second")
    head = git("rev-parse", "HEAD")
    assert commit() == head
    (tmp_path / "README").write_text("changed")  # not the code
    assert commit() == head
    (package / "new.py").write_text("")
    assert commit() == head + "+"
    monkeypatch.setenv("PATH", "")
    assert commit() is None
    shutil.rmtree(tmp_path / ".git")
    provenance.commit.cache_clear()
