"""A folder of images for each class, and what lies beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlmtune.data.formats import FORMATS, class_folders
from vlmtune.data.loading import load_samples
from vlmtune.data.sample import Sample
from vlmtune.errors import DataError


def read(place: Path, **options: Any) -> list[Sample]:
    return [Sample.from_row(row) for row in load_samples(place, **options).dataset]


def test_classes_are_answers(layouts: Any) -> None:
    place = layouts.class_folders()
    assert class_folders.splits(place) == ("train", "test")
    samples = read(place, split="train")
    assert [sample.target for sample in samples] == ["cat", "dog", "hot dog"]
    assert [sample.id for sample in samples][2] == "train/hot_dog/train.jpg"
    assert samples[0].prompt[0].text == "What is in this image? Answer with one of these: cat, dog, hot dog."
    assert samples[0].meta["category"] == "cat" and samples[0].references == ("cat",)
    assert [sample.id for sample in read(place / "test")] == ["cat/test.jpg", "dog/test.jpg", "hot_dog/test.jpg"]


def test_prompts(layouts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    place = layouts.class_folders()
    assert read(place, prompt="Which of {labels}?")[0].prompt[0].text == "Which of cat, dog, hot dog?"
    assert read(place, prompt="Which?")[0].prompt[0].text == "Which?"
    with pytest.raises(DataError, match=r"class_folders takes one without a field or one with \{labels\}"):
        load_samples(place, prompt="{question}")
    monkeypatch.setattr(class_folders, "MOST_LISTED", 2)
    assert read(place)[0].prompt[0].text == "What is in this image?"


@pytest.mark.parametrize(
    "change",
    [
        lambda place: (place / "labels.csv").write_text("file,label\n"),
        lambda place: (place / "cat" / "a.txt").write_text("A cat."),
        lambda place: (place / "cat").rename(place / "images"),
        lambda place: (place / "cat").rename(place / "val2017"),
        lambda place: (place / "empty").mkdir(),
    ],
    ids=["a file", "texts", "a folder of images", "a folder of a split", "an empty folder"],
)
def test_other_folders_of_images_are_none(layouts: Any, change: Any) -> None:
    place = layouts.class_folders() / "train"
    assert class_folders.detect(place)
    change(place)
    assert not class_folders.detect(place)


def test_other_files_are_named(layouts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    place = layouts.class_folders() / "train"
    (place / "cat" / ".DS_Store").touch()
    (place / "cat" / "notes.md").write_text("x")
    assert not class_folders.detect(place)
    # Beyond the first files of a folder.
    monkeypatch.setattr(class_folders, "_holds_images", lambda folder: True)
    data = load_samples(place, max_bad_fraction=0.5)
    assert [row.id for row in data.quarantine.rows] == ["cat/notes.md"] and len(data.dataset) == 3


def test_textvqa(layouts: Any) -> None:
    place = layouts.textvqa(question=" ")
    assert FORMATS["textvqa"].splits(place) == ("test", "train", "val")
    data = load_samples(place, max_bad_fraction=0.5)
    assert data.dataset["id"][:] == ["train/4", "val/5"] and data.metrics == ("vqa_accuracy", "exact_match")
    assert not (place / "val_images").exists()
    sample = Sample.from_row(data.dataset[1])
    assert sample.target == "nokia" and len(sample.references) == 10
    assert sample.images[0].path == str(place / "train_images" / "5a.jpg")
    assert [row.id for row in data.quarantine.rows] == [
        "TextVQA_0.5.1_train.json, data[1]",
        "TextVQA_0.5.1_val.json, data[1]",
    ]
    (asked,) = read(place, split="test", max_bad_fraction=0.5)
    assert asked.target is None and json.loads((place / "TextVQA_0.5.1_test.json").read_text())["data"][0]["question"]
