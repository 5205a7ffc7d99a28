"""COCO's detection: one sample an image, its objects in order, and boxes that cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from vlmtune.data.boxes import read_boxes
from vlmtune.data.formats import FORMATS, coco_instances
from vlmtune.data.loading import load_samples
from vlmtune.data.recognition import choose_format
from vlmtune.data.sample import Sample
from vlmtune.errors import DataError, FormatError, QuarantineError


def read(place: Path, **options: Any) -> list[Sample]:
    return [Sample.from_row(row) for row in load_samples(place, **options).dataset]


def test_an_image_is_one_sample_of_all_its_objects(layouts: Any) -> None:
    place = layouts.coco_instances()
    assert coco_instances.splits(place) == ("train", "val")
    first, empty = read(place, split="train")
    width, height = layouts.size(0)
    boxes = read_boxes(first.target or "")
    assert boxes is not None
    # By category, the larger first; the crowd is not learned.
    assert [box.label for box in boxes] == ["cat", "cat", "dog"]
    assert boxes[0].corners == pytest.approx((0.25 * width, 0, width, height), abs=0.02)
    assert boxes[1].corners == pytest.approx((0, 0, 0.25 * width, 0.25 * height), abs=0.02)
    references = read_boxes(first.references[0])
    assert references is not None
    assert [box.crowd for box in references] == [False, False, True, False]
    assert first.images[0].path == str(place / "train2017" / "000000000000.jpg")
    # Kinds that no image of the file shows are not asked for; those of other images are.
    assert first.meta["boxes"] == {"task": "detection", "ask": ["cat", "dog"], "size": [width, height]}
    assert (empty.target, empty.references) == ("[]", ("[]",))


def test_a_prompt_of_ones_own(layouts: Any) -> None:
    place = layouts.coco_instances()
    assert read(place, split="val", prompt="Find: {labels}")[0].prompt[0].text == "Find: dog"
    assert read(place, split="val", prompt="Find all.")[0].prompt[0].text == "Find all."
    with pytest.raises(DataError, match=r"coco_instances takes one without a field or one with \{labels\}"):
        read(place, prompt="Where is {phrase}?")


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        ({"bbox": [1, 2, 0, 5]}, "annotation 99: the box .* encloses nothing"),
        ({"bbox": [1, 2, 5]}, "annotation 99: .* not four numbers"),
        ({"bbox": [1, 2, 500, 5]}, "annotation 99: .* outside of its image"),
        ({"category_id": 5}, "annotation 99 has the category 5, which has no name"),
    ],
    ids=str,
)
def test_an_image_with_a_box_that_cannot_be_is_set_aside(layouts: Any, annotation: Any, reason: str) -> None:
    row = {"id": 99, "image_id": 1, "category_id": 17, "bbox": [1, 2, 3, 4]} | annotation
    data = load_samples(layouts.coco_instances(annotation=row), split="train", max_bad_fraction=0.5)
    assert len(data.dataset) == 1
    (bad,) = data.quarantine.rows
    assert bad.id == "instances_train2017.json, images[1]"
    with pytest.raises(QuarantineError, match=reason):
        load_samples(layouts.coco_instances(annotation=row))


def test_annotations_of_no_image_are_named(layouts: Any) -> None:
    data = load_samples(layouts.coco_instances(annotation={"id": 99}), split="train", max_bad_fraction=0.5)
    assert [row.id for row in data.quarantine.rows] == ["instances_train2017.json, annotations[4]"]


def test_the_whole_download_holds_two_formats_and_asks_which(layouts: Any) -> None:
    place = layouts.coco_instances()
    captions = layouts.coco_captions()
    for file in (captions / "annotations").iterdir():
        shutil.copy(file, place / "annotations")
    instances = json.loads((place / "annotations" / "instances_val2017.json").read_text())
    for row in instances["annotations"]:
        row["keypoints"] = [0] * 51
    for other in ("person_keypoints", "stuff", "panoptic"):
        (place / "annotations" / f"{other}_val2017.json").write_text(json.dumps(instances))
    with pytest.raises(FormatError, match=r"like coco_captions and coco_instances\. Choose one by dataset_format"):
        choose_format(place)
    assert coco_instances.splits(place) == ("train", "val")
    assert choose_format(place / "annotations" / "instances_val2017.json").name == "coco_instances"


def test_roboflows_layout(layouts: Any) -> None:
    """A folder for each split, the file beside the images, categories before annotations."""
    place = layouts.coco_instances()
    root = place.parent / "roboflow"
    for split, folder in (("train", "train"), ("val", "valid")):
        shutil.copytree(place / f"{split}2017", root / folder)
        content = json.loads((place / "annotations" / f"instances_{split}2017.json").read_text())
        content["categories"].insert(0, {"id": 0, "name": "animals", "supercategory": "none"})
        ordered = {key: content[key] for key in ("info", "licenses", "categories", "images", "annotations")}
        (root / folder / "_annotations.coco.json").write_text(json.dumps(ordered))
    assert [format.name for format in FORMATS.values() if format.detect(root)] == ["coco_instances"]
    assert coco_instances.splits(root) == ("train", "valid")
    assert len(read(root)) == 3
    assert read(root, split="valid")[0].id == "valid/000000000002.jpg"


def test_more_kinds_than_a_prompt_holds_are_not_listed(layouts: Any) -> None:
    place = layouts.coco_instances()
    file = place / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content["categories"] += [{"id": n, "name": f"kind {n}"} for n in range(100, 220)]
    content["annotations"] += [
        {"id": n, "image_id": 2, "category_id": n, "bbox": [1, 1, 5, 5], "iscrowd": 0} for n in range(100, 220)
    ]
    file.write_text(json.dumps(content))
    (sample,) = read(file)
    assert sample.meta["boxes"]["ask"] == []
    assert sample.prompt[0].text.startswith("Detect all objects in this image.")
