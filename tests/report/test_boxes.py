"""Boxes are read as the metrics read them, and placed by what all of them together count in."""

from __future__ import annotations

import pytest

from vlmtune.report.boxes import Box, boxes_of, on_picture, units_of


def of(*corners: float) -> Box:
    return Box(corners)  # type: ignore[arg-type]


def test_boxes_of_a_text() -> None:
    assert boxes_of("It is at [1, 2, 3.5, 4]; not at [5, 6, 7, 8].") == (of(1, 2, 3.5, 4),)
    assert boxes_of('```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "Dog"}]```') == (Box((1, 2, 3, 4), "dog"),)
    assert boxes_of("nowhere") == boxes_of("[]") == ()


@pytest.mark.parametrize(
    ("corners", "size", "units"),
    [
        ((0.1, 0.2, 0.5, 1), (640, 480), "shares"),
        ((10, 20, 600, 400), (640, 480), "pixels"),
        ((10, 20, 700, 400), (640, 480), "thousandths"),
        ((10, 20, 600, 490), (640, 480), "thousandths"),
        # As far as thousandths reach, on a photo far larger.
        ((10, 20, 990, 400), (4000, 3000), "thousandths"),
        ((10, 20, 1400, 400), (4000, 3000), "pixels"),
    ],
)
def test_units(corners: tuple[float, ...], size: tuple[int, int], units: str) -> None:
    assert units_of([([of(*corners)], size)]) == units


def test_one_box_decides_for_all() -> None:
    small = ([of(1, 1, 20, 20)], (640, 480))
    assert units_of([small]) == "pixels"
    assert units_of([small, ([of(1, 1, 900, 20)], (640, 480))]) == "thousandths"
    assert units_of([]) == "shares"


def test_places() -> None:
    assert on_picture(of(100, 50, 300, 150), "pixels", (800, 400), (400, 200)) == (50, 25, 100, 50)
    assert on_picture(of(0.5, 0, 1, 0.5), "shares", (800, 400), (400, 200)) == (200, 0, 200, 100)
    assert on_picture(of(500, 0, 1000, 500), "thousandths", (800, 400), (400, 200)) == (200, 0, 200, 100)
    assert on_picture(of(300, 50, 100, 150), "pixels", (800, 400), (400, 200)) is None
