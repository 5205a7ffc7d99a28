"""The page in a real headless Chromium: filter, escaping, no network, dark mode, keyboard, print."""

from __future__ import annotations

from pathlib import Path

import pytest
from chromium import Page

from vlmtune.evaluation.answering import Prediction
from vlmtune.report.data import read_records
from vlmtune.report.page import write_report

from .conftest import EVIL, make_predictions, write_evaluation

pytestmark = pytest.mark.browser
SHOWN = "[...document.querySelectorAll('.card')].filter(c => c.getClientRects().length).length"


@pytest.fixture
def page(browser: Page, demo: Path, pictures: Path) -> Page:
    tuned = make_predictions(pictures, set(range(5, 35)))
    evil = {"answer": EVIL, "prompt": EVIL, "meta": {"answer_type": EVIL}}
    tuned = [Prediction(**vars(one) | evil) if i < 6 else one for i, one in enumerate(tuned)]
    write_evaluation(demo / "tuned", tuned, model=demo / "adapter")
    path = write_report(read_records([demo]), demo / "report.html", title=EVIL)
    browser.requests.clear()
    browser.messages.clear()
    browser.media()
    browser.open(path)
    return browser


def test_the_filter_by_text_and_group(page: Page) -> None:
    assert page.run(SHOWN) == 40
    page.run("filter.value = 'shape 39'; filter.dispatchEvent(new Event('input'))")
    assert page.run(SHOWN) == 1 and page.run("shown.value") == "1 of 40"
    page.run("filter.value = 'no such text'; filter.dispatchEvent(new Event('input'))")
    assert page.run(SHOWN) == 0 and page.run("document.getElementById('none').getClientRects().length") == 1
    page.run("filter.value = ''; filter.dispatchEvent(new Event('input'))")
    page.run("document.querySelector('input[value=worsened]').click()")
    assert page.run(SHOWN) == page.run("document.querySelectorAll('[data-groups~=worsened]').length") > 0


def test_text_stays_text(page: Page) -> None:
    assert page.run("window.evil") is None
    assert page.run("document.querySelectorAll('script').length") == 1
    assert page.run("document.querySelector('h1').textContent") == EVIL
    assert page.run("[...document.querySelectorAll('.card dd')].some(d => d.textContent.includes('<script>'))")
    # Even a script that found its way in would not run: the policy knows one only.
    page.run("const s = document.createElement('script'); s.textContent = 'window.evil = 3'; document.body.append(s)")
    assert page.run("window.evil") is None


def test_no_request_leaves_the_page(page: Page) -> None:
    asked = [address for address in page.requests if not address.startswith("data:")]
    assert len(asked) == 1 and asked[0].startswith("file://") and asked[0].endswith("report.html")
    assert not page.messages
    refused = page.run("fetch('http://127.0.0.1:9/x').then(() => 'sent', () => 'refused')")
    assert refused == "refused" and any("Content Security Policy" in message for message in page.messages)


def test_dark_mode(page: Page) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    ink = "getComputedStyle(document.querySelector('svg text')).fill"
    page.media(prefers_color_scheme="light")
    light = page.run(f"[{background}, {ink}]")
    page.media(prefers_color_scheme="dark")
    dark = page.run(f"[{background}, {ink}]")

    def brightness(color: str) -> float:
        return sum(int(part) for part in color[color.index("(") + 1 : -1].split(",")[:3]) / 3

    assert brightness(light[0]) > 200 > 60 > brightness(light[1])
    assert brightness(dark[0]) < 60 < 200 < brightness(dark[1])


def test_keyboard(page: Page) -> None:
    def press(key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            extra = {"text": key} if len(key) == 1 and kind == "keyDown" else {}
            page.call("Input.dispatchKeyEvent", type=kind, key=key, **extra)

    press("/")
    assert page.run("document.activeElement.id") == "filter" and page.run("filter.value") == ""
    for key in "39?":
        press(key)
    assert page.run(SHOWN) == 1
    press("Escape")
    assert page.run(SHOWN) == 40 and page.run("filter.value") == ""


def test_the_first_stop_of_the_tab_key_leads_past_the_header(page: Page) -> None:
    for kind in ("rawKeyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
    assert page.run("document.activeElement.className") == "skip"


def test_print(page: Page) -> None:
    page.media("print", prefers_color_scheme="dark")
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.run("document.querySelector('.filter').getClientRects().length") == 0
    assert page.run(SHOWN) == 40


def test_nothing_is_wider_than_a_phone(page: Page) -> None:
    page.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    try:
        assert page.run("document.documentElement.scrollWidth") <= 360
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")
