"""The pages say what the records say, and point at what exists."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from flax import nnx

import unitnorm
from tests.common import ROOT

readme = SimpleNamespace(**runpy.run_path(str(ROOT / ".ci" / "readme.py")))


@pytest.mark.parametrize("page", readme.pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_numbers_and_links_of_a_page_are_right(page):
    text = page.read_text()
    assert readme.filled(text) == text, "behind results/: run `make readme`"
    for name in re.findall(r"<!-- from (\S+)", text):
        assert (ROOT / name).exists()
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not link.startswith("http") and "/build/" not in link:  # drawn when docs are built
            assert page.parent.joinpath(link).exists(), link


@pytest.mark.parametrize(
    ("old", "mark", "filled"),
    [
        ("9.99", "<!--=table2/table2.csv:1/3-->", "0.33"),
        ("−9.9", "<!--=table2/table2.csv:-1/3-->", "−0.3"),
        ("+9.9", "<!--=table2/table2.csv:-1/300-->", "0.0"),
        ("9", "<!--=study/starts/runs.csv.gz:t.seed.min()-->", "2,000"),
    ],
)
def test_a_marked_number_is_computed(old, mark, filled):
    assert readme.filled(f"a {old}{mark} b") == f"a {filled}{mark} b"


def test_the_quickstart_runs_as_it_stands():
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"<!-- quickstart -->\n```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(compile(code, "quickstart", "exec"), names)
    assert len(code.splitlines()) <= 6
    dense, norm = names["model"].layers
    assert unitnorm.filter_norms(dense.kernel[...]) == pytest.approx(1, abs=1e-6)
    assert not (norm.bias[...] == nnx.BatchNorm(4, rngs=nnx.Rngs(0)).bias[...]).all()


def test_every_promise_names_tests_that_exist():
    promised = set(re.findall(r"`(test_\w+)`", (ROOT / "CONTRIBUTING.md").read_text()))
    assert len(promised) > 20
    defined = "\n".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert promised <= set(re.findall(r"^def (test_\w+)", defined, re.MULTILINE))
