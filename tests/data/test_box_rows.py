"""Rows with boxes, in JSON lines, image folders and tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmtune.data.boxes import Box, read_boxes
from vlmtune.data.formats import FORMATS
from vlmtune.data.loading import load_samples
from vlmtune.data.sample import Sample
from vlmtune.errors import QuarantineError

Make = Callable[..., Path]


def read(place: Path, **options: Any) -> list[Sample]:
    return [Sample.from_row(row) for row in load_samples(place, **options).dataset]


@pytest.mark.parametrize(
    "objects",
    [
        {"id": [1, 2], "bbox": [[1, 2, 10, 8], [0, 0, 5, 5]], "category": ["dog", "cat"]},
        {"bbox": [[1, 2, 10, 8], [0, 0, 5, 5]], "categories": ["dog", "cat"]},
        [{"bbox": [1, 2, 10, 8], "label": "dog"}, {"bbox": [0, 0, 5, 5], "label": "cat"}],
    ],
    ids=["lists", "imagefolder", "objects"],
)
def test_objects_are_detection(messages_file: Make, objects: Any) -> None:
    (sample,) = read(messages_file([{"image": "0.jpg", "objects": objects}]))
    assert read_boxes(sample.target or "") == [Box((1, 2, 11, 10), "dog"), Box((0, 0, 5, 5), "cat")]
    assert sample.meta["boxes"] == {"task": "detection", "ask": []}
    (sample,) = read(messages_file([{"image": "0.jpg", "objects": objects}]), prompt="Find all.")
    assert sample.prompt[0].text == "Find all."


def test_an_image_folder_of_objects(layouts: Any) -> None:
    place = layouts.imagefolder()
    row = {"file_name": "0.jpg", "objects": {"bbox": [[1.0, 2.0, 10.0, 8.0]], "categories": [0]}}
    (place / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    data = load_samples(place)
    assert (data.format, data.metrics) == ("imagefolder", ("map", "map50"))
    assert read_boxes(Sample.from_row(data.dataset[0]).target or "") == [Box((1, 2, 11, 10), "0")]


@pytest.mark.parametrize(("image", "phrase"), [("image", "sent"), ("img_path", "expression"), ("image", "phrase")])
def test_a_phrase_and_its_box_are_grounding(messages_file: Make, image: str, phrase: str) -> None:
    row = {image: "0.jpg", phrase: "the left dog", "bbox": [1, 2, 11, 10], "dataset_name": "refcoco"}
    data = load_samples(messages_file([row]), prompt="Where is {phrase}?")
    (sample,) = map(Sample.from_row, data.dataset)
    assert read_boxes(sample.target or "") == [Box((1, 2, 11, 10), "the left dog")]
    assert sample.prompt[0].text == "Where is the left dog?"
    assert data.metrics == ("iou", "acc@0.5")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"objects": {"bbox": [[1, 2, 3, 4]]}}, "has no label"),
        ({"objects": {"bbox": [[1, 2, 3, 4]], "category": []}}, "has another form"),
        ({"objects": {"bbox": [[1, 2, -3, 4]], "category": ["x"]}}, r"encloses nothing as \[x, y, width, height\]"),
        ({"objects": 7}, "has another form"),
        ({"sent": "dog", "bbox": [10, 10, 5, 5]}, r"encloses nothing as \[x1, y1, x2, y2\]"),
        ({"sent": "dog", "bbox": [1, 2, 30, 4], "width": 20, "height": 20}, "outside of its image of 20 x 20"),
        ({"sent": " ", "bbox": [1, 2, 3, 4]}, "its phrase is empty"),
        ({"sent": "dog", "bbox": [1, 2, 3, 4], "image": ["0.jpg", "1.jpg"]}, "has boxes and 2 images"),
    ],
    ids=str,
)
def test_boxes_that_cannot_be_are_named(messages_file: Make, row: Any, reason: str) -> None:
    with pytest.raises(QuarantineError, match=reason):
        load_samples(messages_file([{"image": "0.jpg"} | row]))


def test_metrics_of_mixed_rows_are_the_formats(messages_file: Make) -> None:
    rows = [
        {"image": "0.jpg", "sent": "dog", "bbox": [1, 2, 3, 4]},
        {"image": "0.jpg", "question": "What?", "answer": "dog"},
    ]
    assert load_samples(messages_file(rows)).metrics == FORMATS["messages"].metrics
