"""easy-VQA: the installed package, and folders laid out like it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmtune.data.formats import easy_vqa
from vlmtune.data.loading import load_samples
from vlmtune.data.sample import Sample
from vlmtune.errors import DataError, MissingDependencyError, QuarantineError

ROWS: list[Any] = [
    ["what color is the shape?", "blue", 0],
    ["is there a circle?", "no", 0],
    ["what shape is it?", "triangle", 1],
]


@pytest.fixture
def vqa_folder(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder of questions for each split given, with images 0 to 3; the split "" is the folder itself."""

    def make(**splits: Any) -> Path:
        for split, rows in splits.items():
            folder = tmp_path / "vqa" / split.strip("_")
            (folder / "images").mkdir(parents=True)
            (folder / "questions.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
            for number in range(4):
                Image.new("RGB", (8, 8), (number * 60, 0, 0)).save(folder / "images" / f"{number}.png")
        return tmp_path / "vqa"

    return make


def test_the_installed_package_is_read() -> None:
    package = pytest.importorskip("easy_vqa")
    data = load_samples("easy-vqa", split="test", verify_images="off")
    assert data.format == "easy_vqa"
    questions, answers, numbers = package.get_test_questions()
    expected = dict.fromkeys(zip(questions, answers, [f"{number}.png" for number in numbers], strict=True))
    samples = [Sample.from_row(row) for row in data.dataset]
    assert [(sample.prompt[0].text, sample.target, sample.meta["image"]) for sample in samples] == list(expected)
    assert Path(samples[0].images[0].path or "").is_file()


def test_a_missing_package_is_answered_with_its_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'vlmtune\[demo\]'"):
        load_samples("easy-vqa")


def test_questions_become_samples(vqa_folder: Callable[..., Path]) -> None:
    folder = vqa_folder(train=ROWS, test=ROWS[:1])
    assert easy_vqa.splits(folder) == ("train", "test")
    samples = [Sample.from_row(row) for row in load_samples(folder, split="train").dataset]
    assert [sample.id for sample in samples] == ["train/0#0", "train/0#1", "train/1#0"]
    assert [sample.target for sample in samples] == ["blue", "no", "triangle"]
    assert [sample.references for sample in samples] == [("blue",), ("no",), ("triangle",)]
    assert [sample.meta["answer_type"] for sample in samples] == ["color", "yes/no", "shape"]
    assert samples[2].images[0].path == str(folder / "train" / "images" / "1.png")
    assert all(sample.problem() is None for sample in samples)


def test_without_a_split_both_are_read(vqa_folder: Callable[..., Path]) -> None:
    data = load_samples(vqa_folder(train=ROWS, test=ROWS[:1]))
    assert data.dataset["id"][:] == ["train/0#0", "train/0#1", "train/1#0", "test/0#0"]


@pytest.mark.parametrize("text", [json.dumps(ROWS), json.dumps(ROWS, indent=2)], ids=["one line", "indented"])
def test_a_folder_of_one_split_is_recognised(vqa_folder: Callable[..., Path], text: str) -> None:
    folder = vqa_folder(_=text)
    assert easy_vqa.splits(folder) == ()
    assert load_samples(folder).dataset["id"][:] == ["0#0", "0#1", "1#0"]
    with pytest.raises(DataError, match="no split 'train'; its rows are not split"):
        load_samples(folder, split="train")


def test_an_unknown_split_is_answered_with_those_there_are(vqa_folder: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"no split 'tset'; it has train, test. Did you mean 'test'"):
        load_samples(vqa_folder(train=ROWS, test=ROWS), split="tset")


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ("text", "unreadable row"),
        (["question", "answer"], "unreadable row"),
        (["question", "answer", [1]], "unreadable row"),
        (["question", "answer", None], "unreadable row"),
        (["", "yes", 1], "empty text"),
        ([None, "yes", 1], "empty text"),
        (["question", " ", 1], "empty text"),
        (["question", None, 1], "empty text"),
    ],
    ids=str,
)
def test_bad_rows_are_set_aside(vqa_folder: Callable[..., Path], row: Any, kind: str) -> None:
    folder = vqa_folder(train=[*ROWS, row])
    data = load_samples(folder, max_bad_fraction=0.25)
    assert len(data.dataset) == 3
    assert [(bad.id, bad.kind) for bad in data.quarantine.rows] == [("train/questions.json, row 3", kind)]


def test_a_missing_picture_is_named(vqa_folder: Callable[..., Path]) -> None:
    folder = vqa_folder(train=[*ROWS, ["what?", "red", 99]])
    with pytest.raises(QuarantineError, match=r"train/99#0: .*99\.png does not exist"):
        load_samples(folder)


def test_a_broken_file_is_named(vqa_folder: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"questions\.json is not JSON"):
        load_samples(vqa_folder(train='[["what?", "red", 1], '))
