"""Every format recognises its own layout and none of the others'."""

from __future__ import annotations

from typing import Any

import pytest

from vlmtune.data.formats import FORMATS
from vlmtune.data.loading import load_samples
from vlmtune.data.recognition import choose_format
from vlmtune.data.sample import Sample


@pytest.mark.parametrize("name", FORMATS)
def test_a_layout_is_its_own_formats_alone(layouts: Any, name: str) -> None:
    place = getattr(layouts, name)()
    assert [format.name for format in FORMATS.values() if format.detect(place)] == [name]
    data = load_samples(place, verify_images="full")
    assert data.format == name
    assert not data.quarantine.rows
    samples = [Sample.from_row(row) for row in data.dataset]
    assert samples and all(sample.problem() is None and sample.target for sample in samples)


@pytest.mark.parametrize("name", FORMATS)
def test_each_file_of_a_layout_belongs_to_one_format_at_most(layouts: Any, name: str) -> None:
    place = getattr(layouts, name)()
    owners = {
        file.name: [format.name for format in FORMATS.values() if format.detect(file)]
        for file in (place.rglob("*") if place.is_dir() else [place])
        if file.is_file()
    }
    assert all(found in ([], [name]) for found in owners.values()), owners
    if name not in ("image_text_pairs", "class_folders", "easy_vqa"):
        assert [name] in owners.values()


@pytest.mark.parametrize("name", FORMATS)
def test_splits_are_names_that_can_be_loaded(layouts: Any, name: str) -> None:
    place = getattr(layouts, name)()
    for split in choose_format(place).splits(place):
        assert len(load_samples(place, split=split).dataset)


def test_boxes_beside_images_are_no_captions(layouts: Any) -> None:
    place = layouts.image_text_pairs()
    for number in (0, 1):
        (place / f"{number}.txt").write_text("0 0.5 0.5 0.1 0.2\n")
    assert not FORMATS["image_text_pairs"].detect(place)


def test_questions_in_rows_with_text_are_no_captions(layouts: Any) -> None:
    place = layouts.messages()
    (place / "train.jsonl").write_text('{"question_id": 1, "image": "7.jpg", "text": "What is this?"}\n')
    assert not any(format.detect(place) for format in FORMATS.values())
