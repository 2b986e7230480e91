"""The README says what the results say, and points at what exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_tables_are_those_of_the_results():
    spec = importlib.util.spec_from_file_location("readme", ROOT / ".ci" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for page in module.PAGES:
        text = (ROOT / page).read_text()
        assert module.filled(text) == text, page
    for name in re.findall(r"<!-- from (\S+) -->", README):
        assert (ROOT / name).exists()


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 10
    for link in links:
        if not link.startswith("http"):
            assert (ROOT / link).exists(), link


def test_every_promise_names_tests_that_exist():
    promised = set(re.findall(r"`(test_\w+)`", README))
    assert len(promised) > 20
    defined = {
        name
        for path in Path(__file__).parent.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert promised <= defined, promised - defined
