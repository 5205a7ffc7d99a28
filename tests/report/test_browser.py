"""The page in a real headless Chromium: filter, escaping, no network, dark mode, keyboard, print."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Page
from PIL import Image

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
    assert page.run(SHOWN) == 30 and page.run("shown.value") == "30 of 40 shown"
    page.run("filter.value = 'shape 39'; filter.dispatchEvent(new Event('input'))")
    assert page.run(SHOWN) == 1 and page.run("shown.value") == "1 of 40 match"
    page.run("filter.value = 'no such text'; filter.dispatchEvent(new Event('input'))")
    assert page.run(SHOWN) == 0 and page.run("document.getElementById('none').getClientRects().length") == 1
    page.run("filter.value = ''; filter.dispatchEvent(new Event('input'))")
    page.run("document.querySelector('input[value=worsened]').click()")
    assert page.run(SHOWN) == page.run("document.querySelectorAll('[data-groups~=worsened]').length") > 0


def test_more_cards_and_where_the_keyboard_goes_on(page: Page) -> None:
    button = "document.getElementById('more-cards')"
    assert page.run(f"{button}.getClientRects().length") == 1
    page.run(f"{button}.click()")
    assert page.run(SHOWN) == 40 and page.run("shown.value") == "40 of 40 shown"
    assert page.run(f"{button}.getClientRects().length") == 0
    assert page.run("[...document.querySelectorAll('.card')].indexOf(document.activeElement.closest('.card'))") == 30


def test_all_cards_at_once(page: Page) -> None:
    page.run("document.getElementById('all-cards').click()")
    assert page.run(SHOWN) == 40
    # A new filter begins with few again.
    page.run("filter.value = 'shape'; filter.dispatchEvent(new Event('input'))")
    assert page.run(SHOWN) == 30


def test_a_picture_is_enlarged_by_the_keyboard(page: Page) -> None:
    page.run("document.querySelectorAll('.picture')[1].focus()")
    width = "document.querySelectorAll('.picture')[1].getBoundingClientRect().width"
    before = page.run(width)
    for _ in range(2):
        press(page, "Enter", text="\r")
        assert page.run("document.activeElement.getAttribute('aria-pressed')") in ("true", "false")
        after = page.run(width)
        assert (after > 1.5 * before) == (page.run("document.activeElement.getAttribute('aria-pressed')") == "true")
    assert after == before


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
    assert brightness(light[0]) > 200 > 60 > brightness(light[1])
    assert brightness(dark[0]) < 60 < 200 < brightness(dark[1])


def brightness(color: str) -> float:
    return sum(int(part) for part in color[color.index("(") + 1 : -1].split(",")[:3]) / 3


def press(page: Page, key: str, text: str = "") -> None:
    for kind in ("keyDown", "keyUp"):
        extra = {"text": text or key} if (text or len(key) == 1) and kind == "keyDown" else {}
        page.call("Input.dispatchKeyEvent", type=kind, key=key, **extra)


def test_keyboard(page: Page) -> None:
    press(page, "/")
    assert page.run("document.activeElement.id") == "filter" and page.run("filter.value") == ""
    for key in "39?":
        press(page, key)
    assert page.run(SHOWN) == 1
    press(page, "Escape")
    assert page.run(SHOWN) == 30 and page.run("filter.value") == ""


def test_the_first_stop_of_the_tab_key_leads_past_the_header(page: Page) -> None:
    for kind in ("rawKeyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
    assert page.run("document.activeElement.className") == "skip"


def test_print(page: Page) -> None:
    page.media("print", prefers_color_scheme="dark")
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    for gone in (".filter", ".more", "nav"):
        assert page.run(f"document.querySelector('{gone}').getClientRects().length") == 0
    assert page.run(SHOWN) == 30


CONTRAST = """
(() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgb = (color, under) => {
    canvas.fillStyle = under; canvas.fillRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const css = (values) => `rgb(${values.join(' ')})`;
  const light = (values) => values.map((v) => v / 255).map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = (element) => element ? rgb(getComputedStyle(element).backgroundColor, css(behind(element.parentElement))) : [255, 255, 255];
  return [...document.querySelectorAll('p, td, th, dd, dt, a, label, h1, h2, summary, output, .mark, .more button, svg text')]
    .filter((element) => element.textContent.trim() && element.getClientRects().length)
    .map((element) => {
      const style = getComputedStyle(element), ground = behind(element.closest('svg') ? element.closest('figure, button') : element);
      const [a, b] = [light(ground), light(rgb(element.closest('svg') ? style.fill : style.color, css(ground)))].sort((x, y) => y - x);
      return [Math.round((a + .05) / (b + .05) * 100) / 100, element.tagName + '.' + element.className, element.textContent.slice(0, 30)];
    }).sort((one, other) => one[0] - other[0])[0];
})()
"""  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out(page: Page, scheme: str) -> None:
    """WCAG 2.1 asks for a contrast of 4.5 (https://www.w3.org/TR/WCAG21/#contrast-minimum)."""
    page.media(prefers_color_scheme=scheme)
    lowest = page.run(CONTRAST)
    assert lowest[0] >= 4.5, lowest


@pytest.fixture
def phone(browser: Page) -> Iterator[Page]:
    browser.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    yield browser
    browser.call("Emulation.clearDeviceMetricsOverride")


def test_nothing_is_wider_than_a_phone(page: Page, phone: Page) -> None:
    assert phone.run("document.documentElement.scrollWidth") <= 360
    # Every score is seen without moving a table aside.
    hidden = """[...document.querySelectorAll('.stack td')].filter(cell => cell.getClientRects().length
        && (cell.getBoundingClientRect().right > 360 || cell.scrollWidth > cell.clientWidth + 1)).length"""
    assert phone.run("document.querySelectorAll('.stack td').length") > 10 and phone.run(hidden) == 0


def test_long_names_and_texts_on_a_phone(phone: Page, tmp_path: Path, pictures: Path) -> None:
    long = "a_run_with_quite_a_long_name_and_a_learning_rate_of_2e-4"
    for name in ("base", long, f"{long}-again"):
        rows = make_predictions(pictures, {1}, answer="word " * 60 + "x" * 90, references=("r" * 70,))
        write_evaluation(tmp_path / "e" / name, rows)
    phone.open(write_report(read_records([tmp_path / "e"]), tmp_path / "page.html", title=long))
    assert phone.run("document.documentElement.scrollWidth") <= 360
    assert phone.run("document.querySelector('.card dd').clientWidth") > 200
    assert phone.run("document.querySelector('.card img').getBoundingClientRect().width") > 200


def test_boxes_lie_where_they_should(browser: Page, tmp_path: Path) -> None:
    """On the picture's own pixels, small and enlarged."""
    Image.new("RGB", (800, 400), "white").save(tmp_path / "white.jpg")
    row = make_predictions(tmp_path, set(), 1)[0]
    changes = {"images": (str(tmp_path / "white.jpg"),), "answer": "[0, 0, 800, 400]"}
    box = Prediction(**vars(row) | changes | {"references": ("[400, 100, 600, 300]",)})
    write_evaluation(tmp_path / "e", [box])
    browser.open(write_report(read_records([tmp_path / "e"]), tmp_path / "page.html", title="Boxes"))
    places = """(() => {
      const place = (name) => { const r = document.querySelector(name).getBoundingClientRect();
        return [r.left, r.top, r.width, r.height]; };
      return [place('.box-0 rect'), place('.box-reference rect')];
    })()"""
    for _ in range(2):
        whole, part = browser.run(places)
        # The whole image's box is twice as wide as high.
        assert whole[2] == pytest.approx(2 * whole[3], abs=1) and whole[2] > 100
        expected = [whole[0] + whole[2] / 2, whole[1] + whole[3] / 4, whole[2] / 4, whole[3] / 2]
        assert part == pytest.approx(expected, abs=1.5)
        browser.run("document.querySelector('.picture').click()")
