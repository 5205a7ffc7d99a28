"""RefCOCO: phrases and their boxes, splits, divisions, and a pickle that would run code."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from vlmtune.data.boxes import read_boxes
from vlmtune.data.formats import FORMATS, refcoco
from vlmtune.data.loading import load_samples
from vlmtune.data.sample import Sample
from vlmtune.errors import DataError


def read(place: Path, **options: Any) -> list[Sample]:
    return [Sample.from_row(row) for row in load_samples(place, **options).dataset]


def test_a_phrase_is_one_sample(layouts: Any) -> None:
    place = layouts.refcoco()
    assert refcoco.splits(place) == ("testA", "train", "val")
    first, second = read(place, split="train")
    width, height = layouts.size(3)
    assert (first.id, second.id) == ("train/3#30", "train/3#31")
    (box,) = read_boxes(first.target or "") or ()
    assert box.label == "left person 3"
    assert box.corners == pytest.approx((1.5, 2, 1.5 + width / 2, 2 + height / 2))
    assert first.references == (first.target,)
    assert "left person 3" in first.prompt[0].text
    assert first.meta["boxes"] == {"task": "grounding", "ask": "left person 3", "size": [width, height]}
    assert Path(first.images[0].path or "").is_file()
    assert len(read(place)) == 6


def test_a_prompt_of_ones_own_needs_the_phrase(layouts: Any) -> None:
    place = layouts.refcoco()
    assert read(place, split="val", prompt="Where is the {phrase}?")[0].prompt[0].text == "Where is the left person 4?"
    with pytest.raises(DataError, match=r"refcoco takes one with \{phrase\}"):
        read(place, prompt="Where is it?")


def test_another_division_is_named_by_its_file(layouts: Any) -> None:
    place = layouts.refcoco()
    assert {sample.meta["split"] for sample in read(place / "refs(google).p")} == {"train"}
    (place / "refs(unc).p").unlink()
    assert len(read(place)) == 2


def test_bad_phrases_are_named(layouts: Any) -> None:
    good = {"ref_id": 9, "ann_id": 103, "image_id": 3, "split": "train"}
    said = {"sent_id": 1, "sent": "it"}
    place = layouts.refcoco(
        good | {"sentences": [said | {"sent": " "}]},
        good | {"sentences": [said], "ann_id": 7},
        good | {"sentences": [said], "image_id": 7},
        good,
        "no phrase",
    )
    data = load_samples(place, split="train", max_bad_fraction=0.9)
    assert [row.kind for row in data.quarantine.rows] == [
        "empty text",
        "unusable box",
        "unknown image",
        "unreadable row",
        "unreadable row",
    ]


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def test_a_pickle_runs_nothing(layouts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = layouts.refcoco()
    (place / "refs(unc).p").write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(DataError, match=r"refs\(unc\).p is not a plain list of phrases.*pathlib"):
        read(place)
    assert not Path("ran").exists()
    (place / "refs(unc).p").write_bytes(b"no pickle")
    with pytest.raises(DataError, match="is not a plain list of phrases"):
        read(place)


def test_as_mdetr_writes_it(layouts: Any) -> None:
    place = layouts.mdetr()
    assert [format.name for format in FORMATS.values() if format.detect(place)] == ["refcoco"]
    first, second = read(place)
    assert (first.id, second.id) == ("train/0", "train/1")
    assert read_boxes(first.target or "") != read_boxes(second.target or "")
    assert [box.corners for box in read_boxes(first.target or "") or ()] == [(1, 2, 11, 14)]
    shutil.rmtree(place)
    data = load_samples(layouts.mdetr(id=7, caption="nobody"), max_bad_fraction=0.5)
    assert [row.reason for row in data.quarantine.rows] == ["it has 0 boxes; a phrase describes one"]
