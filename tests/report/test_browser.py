"""The claim that a browser shows the report as it is meant: every picture is there, nothing is complained about,
nothing is asked of the network, and a phone need not scroll sideways."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.chromium import CHROMIUM, Page, browser
from helpers.report import collapse, feature_run, image_run, text_run
from jepa_hf.report.run_report import write_report

torch.set_num_threads(1)

# CI installs Chromium, and there nothing may be left out.
needed = os.environ.get("JEPA_HF_NEED_CHROMIUM") == "1"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None and not needed, reason="Chromium is not installed: apt-get install chromium"),
]

PICTURES = "[...document.images].map(image => [image.alt, image.complete && image.naturalWidth > 0])"


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages by kind of run."""
    folder = tmp_path_factory.mktemp("runs")
    pages = {}
    for name, run in (("text", text_run), ("images", image_run), ("features", feature_run)):
        pages[name] = run(folder) / "report.html"
        write_report(pages[name].parent, max_samples=20)
    collapse(folder / "text")
    pages["collapsed"] = folder / "collapsed.html"
    write_report(folder / "text", pages["collapsed"], max_samples=20)
    return pages


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert CHROMIUM is not None, "JEPA_HF_NEED_CHROMIUM is set and Chromium is not installed"
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.mark.parametrize("name", ["text", "images", "features", "collapsed"])
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False)])
def test_every_picture_renders_and_nothing_is_logged(
    name: str, width: int, dark: bool, reports: dict[str, Path], page: Page
) -> None:
    page.open(reports[name], width, dark)
    pictures = page.evaluate(PICTURES)
    assert len(pictures) >= 10
    assert [description for description, rendered in pictures if not rendered] == []
    assert page.errors == []
    assert [address for address in page.requests if not address.startswith("data:image/")] == [reports[name].as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(13, 17, 23)") == dark


@pytest.mark.parametrize(
    ("body", "actual"),
    [
        ('<img src="data:image/png;base64,AAAA" alt="broken">', "pictures"),
        ("<script>console.error('wrong')</script>", "errors"),
        ("<script>missing()</script>", "errors"),
        ('<img src="http://localhost:9/picture.png" alt="elsewhere">', "requests"),
    ],
)
def test_the_browser_reports_faults(body: str, actual: str, page: Page, tmp_path: Path) -> None:
    """What the test above says of a page that is broken."""
    path = tmp_path / "page.html"
    path.write_text(f"<!DOCTYPE html><title>a</title>{body}", encoding="utf-8")
    page.open(path)
    output = {
        "pictures": [description for description, rendered in page.evaluate(PICTURES) if not rendered],
        "errors": page.errors,
        "requests": [address for address in page.requests if not address.startswith(("data:image/", "file:"))],
    }
    assert output[actual] != []
