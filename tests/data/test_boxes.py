"""Boxes in samples: what is a box, and how an answer of boxes stands in a sample."""

from __future__ import annotations

import pytest

from vlmtune.data.boxes import Box, BoxError, box_of, boxes_sample, boxes_text, read_boxes
from vlmtune.data.sample import ImageRef

IMAGE = ImageRef(path="a.jpg")


def test_a_box_of_corners_and_one_of_sides_are_the_same() -> None:
    assert box_of([10, 20, 30, 45.678], " a  dog ") == Box((10, 20, 30, 45.68), "a dog")
    assert box_of([10, 20, 20, 25.678], "a dog", sides=True) == Box((10, 20, 30, 45.68), "a dog")


@pytest.mark.parametrize(
    ("numbers", "sides", "reason"),
    [
        ([1, 2, 3], False, "is not four numbers"),
        (None, True, "is not four numbers"),
        (["1", "2", "x", "4"], False, "is not four numbers"),
        ([0, 0, float("nan"), 1], False, "is not four finite numbers"),
        ([5, 5, 5, 9], False, r"encloses nothing as \[x1, y1, x2, y2\]"),
        ([5, 5, 3, 0], True, r"encloses nothing as \[x, y, width, height\]"),
        ([-5, 0, 10, 10], False, "lies outside of its image of 40 x 30 pixels"),
        ([0, 0, 10, 32], False, "lies outside"),
        ([40, 0, 40.5, 10], False, "lies outside"),
    ],
    ids=str,
)
def test_what_is_no_box(numbers, sides: bool, reason: str) -> None:
    with pytest.raises(BoxError, match=reason):
        box_of(numbers, "dog", size=(40, 30), sides=sides)


def test_a_pixel_beyond_the_border_is_cut_off() -> None:
    assert box_of([-0.5, -1, 40.9, 30.2], "dog", size=(40, 30)).corners == (0, 0, 40, 30)


def test_the_text_of_an_answer_is_read_back() -> None:
    boxes = [Box((1, 2, 3.5, 4.25), 'the "big" dog, größer'), Box((0, 0, 9, 9), "dogs", crowd=True)]
    text = boxes_text(boxes)
    assert text.startswith('[{"bbox": [1, 2, 3.5, 4.25], "label": "the \\"big\\" dog, größer"}')
    assert read_boxes(text) == boxes
    assert read_boxes("[]") == []
    for other in ("a dog", "{}x", "[1, 2, 3, 4]", '[{"bbox": [1, 2], "label": 3}, 4]'):
        assert read_boxes(other) is None


def test_crowds_are_references_and_not_learned() -> None:
    boxes = [Box((1, 2, 3, 4), "dog"), Box((0, 0, 9, 9), "dog", crowd=True)]
    sample = boxes_sample("a", IMAGE, boxes, task="detection", ask=["cat", "dog"], size=(9, 9), meta={"x": 1})
    assert sample.target == '[{"bbox": [1, 2, 3, 4], "label": "dog"}]'
    assert read_boxes(sample.references[0]) == boxes
    assert "cat, dog" in sample.prompt[0].text
    assert sample.meta == {"x": 1, "boxes": {"task": "detection", "ask": ["cat", "dog"], "size": [9, 9]}}
    assert sample.problem() is None


def test_a_prompt_of_ones_own_stays_as_it_is() -> None:
    sample = boxes_sample("a", IMAGE, [Box((1, 2, 3, 4), "x")], task="grounding", ask="x", prompt="Where is {phrase}?")
    assert sample.prompt[0].text == "Where is x?"
    assert sample.meta["boxes"] == {"task": "grounding"}
