"""The README says what the results say, and points at what exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "results/README.md",
    "results/symmetry/README.md",
    "configs/README.md",
)


@pytest.fixture(params=PAGES)
def page(request):
    return request.param


def test_the_tables_are_those_of_the_results(page):
    """Of the published results alone, whatever somebody has run."""
    spec = importlib.util.spec_from_file_location("readme", ROOT / ".ci" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / page).read_text()
    assert module.filled(text) == text
    for name in re.findall(r"<!-- from (\S+) -->", text):
        assert name.startswith("results/")
        assert (ROOT / name).exists()


def test_the_readme_has_the_table():
    assert "<!-- from results/table2/table2.md -->" in (ROOT / "README.md").read_text()


def test_every_link_leads_somewhere(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not link.startswith("http"):
            assert (ROOT / page).parent.joinpath(link).exists(), link


def test_every_promise_names_tests_that_exist():
    promised = set(re.findall(r"`(test_\w+)`", (ROOT / "CONTRIBUTING.md").read_text()))
    assert len(promised) > 20
    defined = {
        name
        for path in Path(__file__).parent.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert promised <= defined, promised - defined
