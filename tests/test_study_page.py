"""The page of the studies: what it holds, and that it works in a real browser, by keys as well."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.study_example import COMPARISONS, find, invent_runs, invent_spread_runs, plan_comparison
from unitnorm.errors import UserError
from unitnorm.study.figures import CHARTS
from unitnorm.study.page import build_page, is_page
from unitnorm.study.report import Findings, read_answer
from unitnorm.study.statistics import pair_runs, rank

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NASTY = '</script><b id="injected">x & /*{DATA}*/'


@pytest.fixture(scope="module")
def studies() -> dict[str, Findings]:
    one = [plan_comparison("starts", "un", "b-sgd")]
    return {
        "best-rates": find(invent_runs(), looked_at=5),
        "starts": find(invent_spread_runs(), one),
    }


@pytest.fixture(scope="module")
def page(studies) -> bytes:
    return build_page(studies)


def data_of(page: bytes) -> dict:
    return json.loads(re.search(r"STUDIES = (.*), CHARTS = ", page.decode()).group(1))


def test_page_is_one_small_file_that_loads_nothing(page, studies):
    assert len(page) < 3e6
    assert b"default-src 'none'" in page  # what the browser's tests see it obey
    assert build_page(studies) == page
    assert is_page(page)
    with pytest.raises(UserError, match="no study to show"):
        build_page({})


def test_page_holds_the_pairs_and_tables_of_each_study(page, studies):
    data = data_of(page)
    assert list(data) == ["best-rates", "starts"]
    runs, table = studies["best-rates"].known["runs"], studies["best-rates"].compared
    packed = data["best-rates"]["comparisons"]
    assert [row["verdict"] for row in packed] == list(table["verdict"])
    cell = runs.query("purpose == 'compare' and dataset == 'fashion' and depth == 2")
    both = pair_runs(*(cell[cell["arm"] == arm] for arm in ("un", "b-sgd")), "test_error")
    assert packed[0]["pairs"]["seed"] == list(both.index)
    assert packed[0]["pairs"]["difference"] == pytest.approx(list(both["difference"]), rel=1e-4)
    assert packed[0]["looks"].startswith("extended after a look at n = 5: ")
    assert data["best-rates"]["ranks"]["arm"] == list(rank(runs)["arm"])
    assert "wrong" not in json.dumps(data)
    levels = [row["level"] for row in data["starts"]["comparisons"][:3]]
    assert levels == [f"start filters, spread {x}" for x in ("0", "0.5", "1")]


def test_a_ranking_keeps_its_pairs():
    arms = ("weight-norm", "sgd-wd", "un")
    ranking = [plan_comparison(f"{arm} − b-sgd", arm, "b-sgd") for arm in arms]
    packed = data_of(build_page({"x": find(invent_runs(), ranking)}))["x"]["comparisons"]
    assert packed[0]["arm"] == "un"  # the best first
    for row in packed:
        pairs = [pair for pair in row["pairs"]["difference"] if pair is not None]
        assert sum(pairs) / len(pairs) == pytest.approx(row["difference"], abs=1e-3), row["title"]


def test_charts_draw_only_columns_that_the_rows_have(page):
    data = data_of(page)
    for name, rows in {**data["best-rates"]["charts"], **data["starts"]["charts"]}.items():
        fields = set(re.findall(r'"field": "([^"]+)"', json.dumps(CHARTS[name])))
        assert fields - {"lost", "is_best"} <= set(rows), name


def test_the_first_screen_says_the_answer_that_a_readme_gives(tmp_path, studies):
    (tmp_path / "README.md").write_text(
        "# A study\n\n**In short:** the *rate*, by 0.35<!--=a.csv:t.x[0]-->\npoints "
        "([plan](p.toml)).\n\nMore.\n"
    )
    answer = read_answer(tmp_path)
    assert answer == "the rate, by 0.35 points (plan)."
    assert read_answer(tmp_path / "none") == ""
    data = data_of(build_page({"one": studies["starts"]._replace(answer=answer)}))
    assert data["one"]["answer"] == answer


def test_unfinished_studies_have_a_page():
    runs = invent_runs(seeds=3, images=200, datasets=("mnist",))
    compared = runs[runs["purpose"] == "compare"]
    assert "rates" not in data_of(build_page({"x": find(compared, [])}))["x"]["charts"]
    lost = compared.assign(diverged=True, test_error=float("nan"))
    packed = data_of(build_page({"x": find(lost, COMPARISONS[:1])}))["x"]
    assert packed["comparisons"][0]["difference"] is None
    assert packed["charts"] == {}


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Debian's chromium through Playwright."""
    api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install .[dev]")
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"needs a browser, one of {', '.join(BROWSERS)}: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_page(browser, folder: Path, content: bytes, width: int):
    """The page at this width; every complaint and every request of it is kept."""
    file = folder / "index.html"
    file.write_bytes(content)
    tab = browser.new_page(viewport={"width": width, "height": 844})
    tab.complaints, tab.requests = [], []
    tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
    tab.on("console", lambda m: m.type == "error" and tab.complaints.append(m.text))
    tab.on("request", lambda request: tab.requests.append(request.url))
    tab.goto(file.as_uri())
    tab.wait_for_selector("#budgets svg")
    return tab


@pytest.mark.parametrize("width", [1280, 390])
def test_filters_and_comparisons_work_by_keyboard(browser, page, tmp_path, width):
    tab = open_page(browser, tmp_path, page, width)
    assert tab.locator("#comparisons > tr").count() == 20
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.id") == "study"
    tab.keyboard.press("Tab")
    tab.keyboard.press("m")  # a list by its first letter: mnist
    assert tab.locator("#dataset").input_value() == "mnist"
    tab.wait_for_function("document.querySelectorAll('#comparisons > tr').length === 10")
    assert "10 of 20" in tab.locator("#count").inner_text()
    for _ in range(3):  # network, update, the first comparison
        tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "UN against B-SGD"
    tab.keyboard.press("Enter")
    tab.wait_for_function("document.querySelectorAll('.detail svg').length === 3")
    assert tab.locator(".detail tbody tr").count() == 12
    assert "Extended after a look at n = 5" in tab.locator(".detail").inner_text()
    texts = tab.locator("#forest text").all_text_contents()
    assert "difference [percentage points]" in texts
    assert tab.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
    tab.keyboard.press("Enter")
    assert tab.locator(".detail").count() == 0
    assert tab.complaints == []
    assert [url for url in tab.requests if not url.startswith(("file:", "data:"))] == []
    tab.close()


def test_another_study_and_an_update_are_chosen(browser, page, tmp_path):
    tab = open_page(browser, tmp_path, page, 1280)
    tab.select_option("#update", "weight-norm")
    assert tab.locator("#comparisons > tr").count() == 4
    assert set(tab.locator("#ranks td:nth-child(3)").all_inner_texts()) == {"weight-norm"}
    tab.select_option("#study", "starts")  # which has no such update: all are shown
    assert tab.locator("#update").input_value() == ""
    tab.wait_for_selector("#spreads svg")
    assert tab.locator("#rates").count() == 0
    assert "spread 2" in tab.locator("#comparisons").inner_text()
    assert tab.complaints == []
    tab.close()


def test_names_are_text_whatever_they_hold(browser, tmp_path):
    runs = invent_runs(seeds=3, images=200, datasets=("mnist",))
    runs = runs[runs["arm"].isin(["un", "b-sgd"])].replace({"arm": {"un": NASTY}})
    found = find(runs, [plan_comparison(NASTY, NASTY, "b-sgd")])
    tab = open_page(browser, tmp_path, build_page({NASTY: found}), 1280)
    assert tab.locator("#injected").count() == 0
    assert tab.locator("#comparisons button").first.inner_text() == NASTY
    assert tab.complaints == []
    tab.close()
