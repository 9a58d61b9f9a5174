"""report.html in a browser: it renders, makes no request, and its clicks and keys work."""

import shutil
from pathlib import Path

import pytest
from helpers import ROOT
from playwright.sync_api import sync_playwright

from benchmarks.report import synthetic_run
from model_card.report.page import write_report

WIDE, NARROW = {"width": 1600, "height": 1000}, {"width": 400, "height": 800}
UNNAMED = """() => [...document.querySelectorAll('button, select, input, [tabindex="0"], svg[role=img], a')]
    .filter((one) => one.checkVisibility() && !(one.getAttribute('aria-label') || one.textContent.trim() || one.labels?.length))
    .map((one) => one.outerHTML.slice(0, 80))"""
COLOR = """getComputedStyle(document.body.appendChild(Object.assign(document.createElement('i'), { style: 'color: var(--c0)' }))).color"""
BLANK = """() => [...document.querySelectorAll('canvas')].filter((canvas) => {
    const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    return !pixels.some((value) => value);
}).length"""


@pytest.fixture(scope="module")
def browser():
    """One headless chromium for all tests."""
    path = shutil.which("chromium")
    if path is None:
        pytest.fail("no chromium, in which report.html is looked at: apt-get install -y chromium (.ci/run does it)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """{name: report.html} of a run, of its evaluation, of two runs over each other, of a study and of a tuning."""
    folder = tmp_path_factory.mktemp("pages")
    first, second = (synthetic_run(folder / name, lines, 11, 44) for name, lines in (("first", 400), ("second", 200)))
    study = ROOT / "benchmarks" / "studies" / "resume"
    return {
        "run": write_report(first),
        "evaluation": write_report(folder / "first-eval"),
        "two": write_report([first, second], folder / "two.html"),
        "study": write_report(study, folder / "study.html"),
        "adapter": write_report(ROOT / "tests/compatibility/f587f49/adapter", folder / "adapter.html"),
    }


@pytest.fixture
def open_page(browser, pages):
    """`open_page(name)` is the page, drawn; at the end of the test it must have made no request and no error."""
    problems, contexts = [], []

    def call(name: str, viewport: dict = WIDE, scheme: str = "light"):
        contexts.append(browser.new_context(viewport=viewport, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda message: problems.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        address = pages[name].as_uri()
        page.on("request", lambda request: problems.append(request.url) if request.url != address else None)
        page.goto(address)
        page.wait_for_selector("body[data-ready]")
        return page

    yield call
    for context in contexts:
        context.close()
    assert problems == []


def shown_range(page) -> str:
    """What the loss chart's lowest and highest point of the axis are, from its cursor at both ends."""
    page.evaluate("settled()")
    chart = page.locator(".plot .u-over").first
    box = chart.bounding_box()
    found = []
    for x in (1, box["width"] - 1):
        chart.hover(position={"x": x, "y": 40})
        found.append(page.locator(".legend .at").first.inner_text())
    return " ".join(found)


@pytest.mark.parametrize("name", ["run", "evaluation", "two", "study"])
@pytest.mark.parametrize(("viewport", "scheme"), [(WIDE, "light"), (NARROW, "dark")])
def test_a_page_renders_at_any_width_in_light_and_dark(open_page, name, viewport, scheme):
    page = open_page(name, viewport, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert page.locator("canvas").count() > 0 and page.evaluate(BLANK) == 0
    assert page.evaluate(UNNAMED) == []
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 28)")
    sections = page.locator("main > section:visible h2").all_inner_texts()
    assert len(sections) == page.locator("nav li").count()


def test_a_run_shows_all_of_its_parts(open_page):
    page = open_page("run")
    assert page.locator("main > section:visible h2").all_inner_texts() == [
        "Curves",
        "What happened",
        "Samples along training",
        "Scores",
        "Items along training",
        "Calibration",
        "Sensitivity and robustness",
        "Tables",
    ]
    assert page.locator("#charts .chart").count() == 10
    assert "validation" in page.locator("#charts .legend").first.inner_text()
    assert page.locator("#tables table").count() > 3


def test_a_drag_zooms_all_charts_and_a_double_click_shows_all(open_page):
    page = open_page("run")
    whole = shown_range(page)
    assert whole == "at 2.048k at 819.2k"
    box = page.locator(".plot .u-over").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 50, steps=4)
    page.mouse.up()
    narrow = shown_range(page)
    low, high = (float(text.removesuffix("k")) for text in narrow.replace("at", "").split())
    assert 190 < low < 230 and 390 < high < 430
    page.locator(".plot .u-over").nth(3).dblclick()
    assert shown_range(page) == whole


def test_zoom_buttons_and_keys_do_the_same(open_page):
    page = open_page("run")
    whole = shown_range(page)
    page.get_by_label("zoom in", exact=True).click()
    assert shown_range(page) != whole
    page.get_by_label("show all", exact=True).click()
    assert shown_range(page) == whole
    page.mouse.move(0, 0)
    page.locator(".plot").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowRight")
    read = page.locator("#reading").inner_text()
    assert read.startswith("22.53k: training ") and "validation" in read  # the eleventh of steps of 2,048 tokens
    page.keyboard.press("+")
    page.keyboard.press("Escape")
    assert shown_range(page) == whole


def test_the_axis_is_tokens_step_or_time(open_page):
    page = open_page("run")
    for name, ends in (("step", "at 1 at 400"), ("time", "at 20.1 s at 64 s"), ("tokens", "at 2.048k at 819.2k")):
        page.get_by_role("button", name=name, exact=True).click()
        assert shown_range(page) == ends
    page.get_by_label("log x axis").click()
    assert shown_range(page) == "at 2.048k at 819.2k"


def test_a_spike_names_its_documents_where_one_points(open_page):
    page = open_page("run")
    chart = page.locator(".plot").first
    over = chart.locator(".u-over")
    box = over.bounding_box()
    step = 100  # the first of three spikes
    over.hover(position={"x": box["width"] * (step - 1) / 399, "y": 60})
    tip = chart.locator(".tip")
    assert tip.is_visible() and "spike · step 100" in tip.inner_text()
    assert "numpy/lib/part_2_0.py" in tip.inner_text()
    over.hover(position={"x": box["width"] * 0.4, "y": 60})
    assert tip.is_hidden()
    row = page.locator("#events tr", has_text="spike").first
    assert "numpy/lib/part_2_3.py" in row.inner_text()
    row.get_by_role("button").click()
    low, high = (float(text.removesuffix("k")) for text in shown_range(page).replace("at", "").split())
    assert low < 204.8 < high and high - low < 50


def test_lines_and_runs_can_be_hidden(open_page):
    page = open_page("two")
    first = page.locator("#charts .legend").first
    before = first.locator("button").count()
    assert "second" in first.inner_text()
    page.locator(".runs button", has_text="second").click()
    page.evaluate("settled()")
    assert "second" not in first.inner_text()
    assert first.locator("button").count() == before / 2
    button = first.locator("button").first
    button.click()
    assert first.locator("button").first.get_attribute("aria-pressed") == "false"


def test_smoothing_keeps_the_line_and_draws_the_mean(open_page):
    page = open_page("run")
    over = page.locator(".plot .u-over").first
    over.hover(position={"x": over.bounding_box()["width"] - 1, "y": 40})
    last = "() => +document.querySelector('#charts .legend .value').textContent"
    raw = page.evaluate(last)
    page.get_by_label("smooth over").select_option("200 lines")
    page.evaluate("settled()")
    assert page.evaluate(last) > raw  # the mean of a falling line is above it


def test_samples_stand_side_by_side_for_each_prompt(open_page):
    page = open_page("run")
    cards = page.locator("#samples .sample")
    assert cards.count() == 11
    assert cards.first.locator("b").inner_text() == "Returns the"
    page.locator("#samples button", has_text="This function").click()
    assert page.locator("#samples .sample b").first.inner_text() == "This function is used to"


def test_a_tuning_shows_its_answers_before_and_after(open_page):
    page = open_page("adapter")
    assert page.locator("#samples h2").inner_text() == "Answers before and after tuning"
    assert page.locator("#samples .sample h3").all_inner_texts() == ["before tuning", "after tuning"]


def test_items_are_sorted_by_when_they_were_learnt_and_filtered(open_page):
    page = open_page("run")
    section = page.locator("#items")
    section.get_by_role("combobox", name="right by", exact=True).select_option("acc")

    def grid() -> list[list[bool]]:
        return page.evaluate("""() => [...document.querySelectorAll('#items .row')].map((row) =>
            [...row.querySelectorAll('.cell')].map((cell) => cell.classList.contains('right')))""")

    rows = grid()
    assert len(rows) == 44 and {len(row) for row in rows} == {11}
    learnt = [next((index for index in range(11) if all(row[index:])), 11) for row in rows]
    assert learnt == sorted(learnt) and len(set(learnt)) > 4
    section.get_by_role("combobox", name="show", exact=True).select_option("forgotten")
    forgotten = grid()
    assert forgotten and all(any(row) and not row[-1] for row in forgotten)
    section.get_by_role("combobox", name="show", exact=True).select_option("all")
    section.get_by_role("combobox", name="subject", exact=True).select_option("virology")
    assert 0 < len(grid()) < 44
    assert all("virology" in name for name in section.locator(".row .name").all_inner_texts())
    section.get_by_role("combobox", name="subject", exact=True).select_option("all")
    section.get_by_label("name contains").fill("cloze 13")
    assert len(grid()) == 1
    section.get_by_role("combobox", name="task", exact=True).select_option("docs")
    assert len(grid()) == 44 and "Bits per byte" in section.inner_text()


def test_an_item_shows_its_probability_as_a_line_by_click_and_by_key(open_page):
    page = open_page("run")
    rows = page.locator("#items .row")
    rows.nth(5).click()
    name = rows.nth(5).locator(".name").inner_text()
    detail = page.locator("#items .detail")
    assert detail.locator("h3").first.inner_text() == name
    detail.locator("canvas").wait_for()
    assert "Probability of the right answer" in detail.inner_text()
    rows.first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert detail.locator("h3").first.inner_text() == rows.nth(2).locator(".name").inner_text()
    assert page.locator("#items .row[tabindex='0']").count() == 1
    assert "right" in rows.nth(2).get_attribute("aria-label")


def test_calibration_prompts_and_differences_can_be_explored(open_page):
    page = open_page("run")
    assert page.locator("#calibration figure").count() == 11
    assert "items at" in page.locator("#calibration svg").first.get_attribute("aria-label")
    page.locator("#variants").get_by_label("factor").select_option("casing")
    assert page.locator("#variants tr.factor").all_inner_texts()[0].startswith("casing")
    assert page.locator("#variants .forest tr").count() == 3
    page = open_page("study")
    before = page.locator("#differences .forest").inner_text()
    page.locator("#differences").get_by_label("outcome").select_option(index=1)
    assert page.locator("#differences .forest").inner_text() != before


def test_light_becomes_dark_and_the_charts_follow(open_page):
    page = open_page("run")
    canvas = page.locator("canvas").first
    before = canvas.screenshot()
    page.get_by_label("Change between light and dark").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
    page.evaluate("settled()")
    assert canvas.screenshot() != before


def test_a_print_is_a_light_report_without_controls(open_page, tmp_path):
    page = open_page("run", WIDE, "dark")
    pdf = page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert pdf.startswith(b"%PDF") and 4 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") <= 20
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(f"() => {COLOR}") == "rgb(0, 114, 178)"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(f"() => {COLOR}") == "rgb(86, 180, 233)"
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator(".tools:visible, nav:visible").count() == 0
