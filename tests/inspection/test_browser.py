"""The doctor's and the preview's pages in a real headless Chromium."""

from __future__ import annotations

from pathlib import Path

import pytest
from chromium import Page
from PIL import Image

from vlmtune.cli import main

pytestmark = pytest.mark.browser
EVIL = "<script>window.evil=1</script><img src=x onerror=window.evil=2>"


def opened(browser: Page, path: Path) -> Page:
    browser.requests.clear()
    browser.messages.clear()
    browser.media()
    browser.open(path)
    return browser


def nothing_fetched_or_run(page: Page) -> None:
    asked = [address for address in page.requests if not address.startswith("data:")]
    assert len(asked) == 1 and asked[0].startswith("file://")
    assert page.run("window.evil") is None and page.run("document.querySelectorAll('script').length") == 0
    assert not page.messages


@pytest.fixture
def spoilt(captions: Path) -> Path:
    """Captions with a script in a text, an image that is none and one with a script for a name."""
    (captions / "Images" / "0.jpg").write_bytes(b"no image")
    Image.open(captions / "Images" / "2.jpg").convert("CMYK").save(captions / "Images" / "2.jpg")
    with (captions / "captions.txt").open("a") as file:
        file.write(f'3.jpg,"{EVIL}"\n<b onclick=evil>.jpg,A name.\n')
    return captions


def test_the_doctors_page(browser: Page, spoilt: Path, tmp_path: Path) -> None:
    assert main(["check", str(spoilt), "--report_dir", str(tmp_path / "out"), "--max_bad_fraction", "0.5"]) == 0
    page = opened(browser, tmp_path / "out" / "check.html")
    nothing_fetched_or_run(page)
    assert "Training would start" in page.run("document.querySelector('.verdict').innerText")
    assert page.run("document.querySelectorAll('.finding').length") >= 2
    bars = page.run("[...document.querySelectorAll('.bars i')].map(bar => bar.getBoundingClientRect().width)")
    assert max(bars) > 50 and min(bars) >= 0
    shown = page.run("[...document.images].map(image => image.naturalWidth)")
    assert shown and all(width > 0 for width in shown)
    hidden = page.run("document.querySelector('details li').checkVisibility()")
    page.run("document.querySelector('details summary').click()")
    assert (hidden, page.run("document.querySelector('details li').checkVisibility()")) == (False, True)
    assert page.run("document.documentElement.scrollWidth <= innerWidth")


def test_the_previews_page(browser: Page, spoilt: Path, tiny_gemma3_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "preview.html"
    arguments = ["--model_name_or_path", str(tiny_gemma3_dir), "--rows", "8", "--output", str(path)]
    assert main(["preview", str(spoilt), *arguments, "--max_bad_fraction", "0.5"]) == 0
    page = opened(browser, path)
    nothing_fetched_or_run(page)
    learned, others = (
        page.run(f"getComputedStyle(document.querySelector('.row {kind}')).backgroundColor")
        for kind in (".learned", "span:not(.learned):not(.image)")
    )
    assert learned != others
    assert page.run("document.querySelector('.branch .learned').title").startswith("position ")
    assert page.run("[...document.querySelectorAll('.row')].some(row => row.innerText.includes('<script>'))")
    shown = page.run("[...document.querySelectorAll('.pictures img')].map(image => image.naturalWidth)")
    assert shown and all(width > 0 for width in shown)


def test_dark_mode(browser: Page, captions: Path, tmp_path: Path) -> None:
    assert main(["check", str(captions), "--report_dir", str(tmp_path / "out")]) == 0
    page = opened(browser, tmp_path / "out" / "check.html")
    page.media(prefers_color_scheme="light")
    ink = page.run("getComputedStyle(document.querySelector('h1')).color")
    page.media(prefers_color_scheme="dark")
    assert page.run("getComputedStyle(document.querySelector('h1')).color") != ink
