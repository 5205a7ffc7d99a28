"""DocVQA, ChartQA and ScienceQA as downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vlmtune.data.formats import FORMATS
from vlmtune.data.loading import load_samples
from vlmtune.data.sample import Sample
from vlmtune.errors import DataError


def read(place: Path, **options: Any) -> list[Sample]:
    return [Sample.from_row(row) for row in load_samples(place, **options).dataset]


def test_docvqa(layouts: Any) -> None:
    place = layouts.docvqa()
    (sample,) = read(place, split="train")
    assert (sample.id, sample.target, sample.references) == ("train/7", "1 May", ("1 May", "May 1"))
    assert sample.images[0].path == str(place / "documents" / "page_1.jpg")
    (place / "documents").rename(place / "spdocvqa_images")
    assert read(place)[0].images[0].path == str(place / "spdocvqa_images" / "page_1.jpg")


@pytest.mark.parametrize("row", [{"question": ""}, {"answers": [""]}, {"questionId": 7, "answers": [" "]}], ids=str)
def test_bad_docvqa_rows(layouts: Any, row: dict[str, Any]) -> None:
    data = load_samples(layouts.docvqa(**row), max_bad_fraction=0.5)
    assert [(bad.id, bad.kind) for bad in data.quarantine.rows] == [("train_v1.0_withQT.json, data[1]", "empty text")]


def test_chartqa(layouts: Any) -> None:
    place = layouts.chartqa()
    assert FORMATS["chartqa"].splits(place) == ("train", "test")
    samples = read(place, split="test")
    assert [sample.id for sample in samples] == ["test/augmented/0", "test/human/0"]
    assert [sample.target for sample in samples] == ["5", "5"]
    assert samples[0].images[0].path == str(place / "test" / "png" / "4.png")
    assert [sample.id for sample in read(place / "test")] == ["augmented/0", "human/0"]


@pytest.mark.parametrize(
    "row", [{"imgname": "4.png", "query": "How?"}, "text", {"imgname": "4.png", "query": "How?", "label": ""}], ids=str
)
def test_bad_chartqa_rows(layouts: Any, row: Any) -> None:
    data = load_samples(layouts.chartqa(row), split="train", max_bad_fraction=0.5)
    assert {bad.id for bad in data.quarantine.rows} == {"train_human.json, row 1", "train_augmented.json, row 1"}
    assert len(data.dataset) == 2


def test_scienceqa(layouts: Any) -> None:
    place = layouts.scienceqa()
    assert FORMATS["scienceqa"].splits(place) == ("test", "train")
    pictured, bare = read(place)
    assert pictured.prompt[0].text == (
        "Context: It flies.\nWhich?\nA. a fish\nB. a bird\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert pictured.target == "B" and pictured.references == ("B",)
    assert pictured.images[0].path == str(place / "images" / "train" / "1" / "image.png")
    assert not bare.images
    assert [sample.id for sample in read(place, split="test")] == ["2"]


@pytest.mark.parametrize(
    ("row", "found"),
    [({"answer": 2}, "none of its 2 choices"), ({"answer": True}, "none of its"), ({"answer": None}, "none of its"),
     ({"choices": []}, "2 to 26 texts"), ({"choices": ["a", ""]}, "2 to 26"), ({"question": " "}, "question is empty")],
    ids=str,
)  # fmt: skip
def test_bad_scienceqa_problems(layouts: Any, row: dict[str, Any], found: str) -> None:
    data = load_samples(layouts.scienceqa(**row), max_bad_fraction=0.5)
    (bad,) = data.quarantine.rows
    assert bad.id == "problems.json, problem 3" and found in bad.reason


@pytest.mark.parametrize(("answer", "letter"), [(0, "A"), ("a bird", "B"), ("b", "B")])
def test_answers_by_number_text_or_letter(layouts: Any, answer: Any, letter: str) -> None:
    assert read(layouts.scienceqa(answer=answer, hint="", image=None))[-1].target == letter


@pytest.mark.parametrize("name", ["vqav2", "docvqa", "chartqa", "scienceqa", "easy_vqa"])
def test_a_prompt_of_ones_own_holds_the_question(layouts: Any, name: str) -> None:
    place = getattr(layouts, name)()
    plain = load_samples(place).dataset
    asked = load_samples(place, prompt="Q: {question}\nIn one word.").dataset
    for before, after in zip(map(Sample.from_row, plain), map(Sample.from_row, asked), strict=True):
        assert after.prompt[-1].text == f"Q: {before.prompt[-1].text}\nIn one word."
        assert after.target == before.target
    with pytest.raises(DataError, match=rf"prompt is 'Describe\.'; {name} takes one with \{{question\}}"):
        load_samples(place, prompt="Describe.")


def test_captions_take_no_question(layouts: Any) -> None:
    with pytest.raises(DataError, match="flickr takes one without a field"):
        load_samples(layouts.flickr(), prompt="{question}")
