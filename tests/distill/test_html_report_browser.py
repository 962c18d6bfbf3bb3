"""The report in a real browser: no errors, no requests, names for all charts, no sideways scrolling, light and dark."""

import pytest
from browser import Browser, find_browser
from toy_reports import CONFIG, LAYERS, alone, joint, raster, summary, write_run

from distill.html_report import write_report
from distill.html_report.palette import ROLES

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no chromium or chrome is installed")

WIDTH = "document.documentElement.scrollWidth"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
# drawings that are shown and wider than the window, or empty
CUT_OFF = """[...document.querySelectorAll('svg')].filter(svg => {
  const box = svg.getBoundingClientRect();
  return getComputedStyle(svg).display != 'none' && (box.width < 100 || box.height < 40 || box.right > innerWidth);
}).length"""
OPEN_ALL = "document.querySelectorAll('details').forEach(d => d.open = true)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    long = tuple(f"stages_{i}.blocks.{i}.a_very_long_name_without_any_break_in_it_at_all" for i in range(4))
    layers = tuple(f"{tap}.act" for tap in long)
    runs = {
        "whole": write_run(folder / "whole", joint(), summary(), raster()),
        "begun": write_run(folder / "begun", alone(1)),
        "long": write_run(
            folder / "long", joint(60, long, layers), summary(long, layers), raster(long, LAYERS, 32),
            CONFIG | {"data": {"name": "x" * 300, "root": "y" * 300}},
        ),
    }  # fmt: skip
    for run in runs.values():
        write_report(run)
    return runs


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize(("name", "images"), [("whole", 6 + 2 + 2), ("begun", 3), ("long", 6 + 4 + 4)])
def test_a_browser_shows_it_without_complaint(browser, folders, name, images, width, dark):
    browser.open(folders[name] / "report.html", width, dark=dark)
    assert browser.complaints() == []
    page, *others = browser.requests()
    assert page.startswith("file://") and all(address.startswith("data:") for address in others)
    named = browser.accessible("image")
    assert len(named) == images and all(len(text) > 10 for text in named)
    assert browser.evaluate(CUT_OFF) == 0
    colour = "#{:02x}{:02x}{:02x}".format(*map(int, browser.evaluate(BACKGROUND)[4:-1].split(",")))
    assert colour == ROLES["page"][dark]
    assert browser.evaluate(WIDTH) == width
    browser.evaluate(OPEN_ALL)
    assert browser.evaluate(WIDTH) == width  # tables scroll in their boxes
    assert browser.evaluate("document.querySelectorAll('table').length") >= 3


def test_the_browser_would_complain(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<meta name='viewport' content='width=device-width'><script>console.error('oh'); nothing()</script>"
        "<img src='gone.png'><p style='width: 900px'>x</p>"
    )
    browser.open(page, 390)
    found = " ".join(browser.complaints())
    assert "oh" in found and "ReferenceError" in found and "gone.png" in " ".join(browser.requests())
    assert "ERR_FILE_NOT_FOUND" in found and browser.evaluate(WIDTH) >= 900
