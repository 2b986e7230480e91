"""The page of the studies: what it holds, and that it works in a real browser, by keys as well."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from tests.study_example import COMPARISONS, invent_runs, invent_spread_runs, plan_comparison
from unitnorm.errors import UserError
from unitnorm.study.config import ComparisonPlan
from unitnorm.study.page import StudyFrames, build_charts, build_page
from unitnorm.study.statistics import compare, pair_runs, rank

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NASTY = '</script><b id="injected">x & /*{DATA}*/'


@pytest.fixture(scope="module")
def studies() -> dict[str, StudyFrames]:
    runs, starts = invent_runs(), invent_spread_runs()
    return {
        "best-rates": StudyFrames(runs, compare(runs, COMPARISONS), "At their best rates."),
        "starts": StudyFrames(starts, compare(starts, [plan_comparison("starts", "un", "b-sgd")])),
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


def test_page_holds_the_pairs_and_tables_of_each_study(page, studies):
    data = data_of(page)
    assert list(data) == ["best-rates", "starts"]
    runs, table = studies["best-rates"].runs, studies["best-rates"].comparisons
    packed = data["best-rates"]["comparisons"]
    assert [row["verdict"] for row in packed] == list(table["verdict"])
    cell = runs.query("purpose == 'compare' and dataset == 'fashion' and depth == 2")
    sides = (cell[cell["arm"] == arm] for arm in ("un", "b-sgd"))
    both = pair_runs(*sides, "test_error")
    assert packed[0]["pairs"]["seed"] == list(both.index)
    assert packed[0]["pairs"]["difference"] == pytest.approx(list(both["difference"]), rel=1e-4)
    assert data["best-rates"]["ranks"]["arm"] == list(rank(runs)["arm"])
    assert b"wrong" not in json.dumps(data).encode()
    levels = [row["level"] for row in data["starts"]["comparisons"][:3]]
    assert levels[0] == "start filters, spread 0"
    assert len(set(levels)) == 3


def test_no_two_arms_look_the_same():
    runs = invent_runs(seeds=3, images=200, datasets=("mnist",))
    many = [runs[runs["arm"] == "un"].assign(arm=f"un@{i}") for i in range(25)]
    arms = data_of(build_page({"many": frames_of(pd.concat(many), [])}))["many"]["arms"]
    assert len({(look["colour"], look["shape"]) for look in arms.values()}) == 25


def frames_of(runs: pd.DataFrame, comparisons: list[ComparisonPlan]) -> StudyFrames:
    return StudyFrames(runs, compare(runs, comparisons))


def test_unfinished_studies_have_a_page_and_none_has_not():
    runs = invent_runs(seeds=3, images=200, datasets=("mnist",))
    compared = runs[runs["purpose"] == "compare"]
    assert data_of(build_page({"x": frames_of(compared, [])}))["x"]["rates"] == {}
    lost = compared.assign(diverged=True, test_error=float("nan"))
    packed = data_of(build_page({"x": frames_of(lost, [COMPARISONS[0]])}))["x"]
    assert packed["comparisons"][0]["difference"] is None
    assert packed["budgets"] == {}
    with pytest.raises(UserError, match="no study to show"):
        build_page({})


def test_charts_draw_only_columns_that_the_page_gives_them(page):
    data = data_of(page)["best-rates"]
    arm = {"arm", *data["arms"]["un"]}
    row = set(data["comparisons"][0]) | {"colour", "label", "text", "margin_low", "margin_high"}
    given = {
        "forest": row | {"zero"},
        "rates": set(data["rates"]) | arm,
        "budgets": set(data["budgets"]) | arm,
        "pairs": set(data["comparisons"][0]["pairs"]) | {"zero"},
    }
    for name, spec in build_charts().items():
        fields = set(re.findall(r'"field": "([^"]+)"', json.dumps(spec)))
        assert fields, name
        assert fields <= given[name], name


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


def open_page(browser, file: Path, width: int):
    """The page at this width; every complaint and every request of it is kept."""
    tab = browser.new_page(viewport={"width": width, "height": 844})
    tab.complaints, tab.requests = [], []
    tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
    tab.on("console", lambda m: m.type == "error" and tab.complaints.append(m.text))
    tab.on("request", lambda request: tab.requests.append(request.url))
    tab.goto(file.as_uri())
    tab.wait_for_selector("#budgets svg")
    return tab


@pytest.fixture(scope="module")
def file(page, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("study") / "index.html"
    file.write_bytes(page)
    return file


@pytest.mark.parametrize("width", [1280, 390])
def test_filters_and_comparisons_work_by_keyboard(browser, file, width):
    tab = open_page(browser, file, width)
    assert tab.locator("#comparisons tr").count() == 20
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.id") == "study"
    tab.keyboard.press("Tab")
    tab.keyboard.press("m")  # a list by its first letter: mnist
    assert tab.locator("#dataset").input_value() == "mnist"
    tab.wait_for_function("document.querySelectorAll('#comparisons tr').length === 10")
    assert "10 of 20" in tab.locator("#count").inner_text()
    for _ in range(3):  # depth, update, the first comparison
        tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "UN against B-SGD"
    tab.keyboard.press("Enter")
    tab.wait_for_function("document.querySelectorAll('.detail svg').length === 3")
    assert tab.locator(".detail tbody tr").count() == 12
    assert tab.locator("[aria-expanded=true]").count() == 1
    wide = tab.evaluate("document.documentElement.scrollWidth")
    assert wide <= width  # nothing sticks out
    tab.keyboard.press("Enter")
    assert tab.locator(".detail").count() == 0
    assert tab.complaints == []
    assert [url for url in tab.requests if not url.startswith(("file:", "data:"))] == []
    tab.close()


def test_another_study_and_an_update_are_chosen(browser, file):
    tab = open_page(browser, file, 1280)
    tab.select_option("#update", "weight-norm")
    assert tab.locator("#comparisons tr").count() == 4
    assert set(tab.locator("#ranks td:nth-child(3)").all_inner_texts()) == {"weight-norm"}
    tab.select_option("#study", "starts")  # which has no such update: all are shown
    assert tab.locator("#update").input_value() == ""
    assert tab.locator("#rates").inner_text() == "Nothing here for this choice."
    assert "spread 2" in tab.locator("#comparisons").inner_text()
    assert tab.complaints == []
    tab.close()


def test_names_are_text_whatever_they_hold(browser, tmp_path):
    runs = invent_runs(seeds=3, images=200, datasets=("mnist",))
    runs = runs[runs["arm"].isin(["un", "b-sgd"])].replace({"arm": {"un": NASTY}})
    frames = frames_of(runs, [plan_comparison(NASTY, NASTY, "b-sgd")])
    file = tmp_path / "index.html"
    file.write_bytes(build_page({NASTY: frames}))
    tab = open_page(browser, file, 1280)
    assert tab.locator("#injected").count() == 0
    assert tab.locator("#comparisons button").first.inner_text() == NASTY
    assert tab.complaints == []
    tab.close()
