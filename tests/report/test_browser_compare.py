"""The page of ``vlmtune compare`` in a real headless Chromium, made by the command of two runs with evil texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from chromium import Page
from command_line import vlmtune
from PIL import Image

from vlmtune.evaluation.answering import Prediction

from .conftest import EVIL, make_predictions, write_evaluation, write_run
from .test_browser import CONTRAST, SHOWN, brightness, press

pytestmark = pytest.mark.browser
COUNT = 200
# The name of a run's folder is text of the page too.
EVIL_NAME = 'two <img src=x onerror="window.evil = 4">'


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of 200 answers about 200 photos: 40 became better, 10 worse; six samples hold a script."""
    folder = tmp_path_factory.mktemp("compare")
    pictures = folder / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((800, 600), Image.Resampling.BICUBIC).save(pictures / f"{number}.jpg")
    for name, right, rate in (("one", range(100), 1e-4), (EVIL_NAME, range(10, 140), 2e-4)):
        run = folder / name
        rows = [
            Prediction(**vars(row) | {"images": (str(pictures / f"{number}.jpg"),)})
            for number, row in enumerate(make_predictions(pictures, set(right), COUNT))
        ]
        evil = {"answer": EVIL, "prompt": EVIL, "meta": {"answer_type": EVIL}}
        rows = [Prediction(**vars(row) | evil) if number in range(194, 200) else row for number, row in enumerate(rows)]
        write_run(run, learning_rate=rate, run_note=f"{EVIL} {rate}")
        write_evaluation(run / "evaluation", rows, model=run)
    assert vlmtune("compare", folder / "one", folder / EVIL_NAME) == 0
    return folder / EVIL_NAME / "compare.html"


@pytest.fixture
def page(browser: Page, compared: Path) -> Page:
    browser.requests.clear()
    browser.messages.clear()
    browser.media()
    browser.open(compared)
    return browser


def test_size(compared: Path, page: Page) -> None:
    assert page.run("document.querySelectorAll('.card img').length") >= 50
    assert page.run("[...document.querySelectorAll('.card img')].every(i => i.complete && i.naturalWidth > 0 && i.alt)")
    assert compared.stat().st_size < 5_000_000


def test_recipes_and_differences(page: Page) -> None:
    rows = "[...document.querySelectorAll('#differences tbody tr')].map(row => [...row.children].map(c => c.innerText))"
    assert ["learning_rate", "0.0001", "0.0002"] in page.run(rows)
    assert "40 became better" in page.run("document.getElementById('scores').innerText")
    assert "10 became worse" in page.run("document.getElementById('scores').innerText")
    cells = "[...document.querySelectorAll('#scores .stack tbody tr:first-child td')].map(c => c.innerText)"
    assert page.run(cells)[-1].startswith("+15.0 (")


def test_filter_of_the_samples_that_flipped(page: Page) -> None:
    assert page.run(SHOWN) == 30
    page.run("document.querySelector('input[value=worsened]').click()")
    assert page.run("shown.value").startswith("10 of ") and page.run(SHOWN) == 10
    marks = "[...c.querySelectorAll('.mark')].map(m => m.title)"
    assert (
        page.run(f"[...document.querySelectorAll('.card:not([hidden])')].map(c => {marks})")
        == [["right", "wrong"]] * 10
    )
    press(page, "/")
    for key in "shape 9?":
        press(page, key)
    assert page.run(SHOWN) == 1 and "What color is shape 9?" in page.run(
        "document.querySelector('.card:not([hidden])').innerText"
    )
    press(page, "Escape")
    assert page.run(SHOWN) == 10


def test_text_stays_text(page: Page) -> None:
    assert page.run("window.evil") is None
    assert page.run("document.querySelectorAll('script').length") == 1
    assert page.run("[...document.querySelectorAll('img')].every(i => i.src.startsWith('data:image/'))")
    for place in ("h1", "#differences thead", "#scores thead"):
        assert "<img src=x" in page.run(f"document.querySelector('{place}').textContent")
    for place in ("#differences tbody", ".gallery"):
        assert "<script>window.evil" in page.run(f"document.querySelector('{place}').textContent")


def test_no_request_leaves_the_page(page: Page) -> None:
    asked = [address for address in page.requests if not address.startswith("data:")]
    assert len(asked) == 1 and asked[0].startswith("file://") and asked[0].endswith("compare.html")
    assert not page.messages
    assert page.run("fetch('http://127.0.0.1:9/x').then(() => 'sent', () => 'refused')") == "refused"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(page: Page, scheme: str) -> None:
    page.media(prefers_color_scheme=scheme)
    light = brightness(page.run("getComputedStyle(document.body).backgroundColor"))
    assert (light > 200) if scheme == "light" else (light < 60)
    lowest = page.run(CONTRAST)
    assert lowest[0] >= 4.5, lowest


def test_print(page: Page) -> None:
    page.media("print", prefers_color_scheme="dark")
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.run("document.querySelector('.filter').getClientRects().length") == 0
