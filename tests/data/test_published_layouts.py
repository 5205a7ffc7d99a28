"""The folders that the archives of data sets unpack to, named as downloaded: each is read, by its own format alone."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmtune.data.formats import FORMATS
from vlmtune.data.loading import load_samples
from vlmtune.errors import FormatError

PAGE = "documents/xnbl0037_1.png"
PHOTO = "COCO_train2014_000000000003.jpg"
SPLITS = ("train", "val", "test")


@pytest.fixture
def write(tmp_path: Path, image_folder: Path) -> Callable[..., Path]:
    """Write files into a folder by their names: images for those of images, JSON for anything that is no text."""

    def make(**files: Any) -> Path:
        numbers = iter(sorted(image_folder.glob("*.jpg")))
        for name, content in files.items():
            path = tmp_path / "downloaded" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                shutil.copy(next(numbers), path)
            elif isinstance(content, bytes):
                path.write_bytes(content)
            else:
                path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return tmp_path / "downloaded"

    return make


def asked(split: str, **row: Any) -> dict[str, Any]:
    """A file of DocVQA's; the test questions come without answers."""
    whole = {"questionId": 1, "question": f"What of {split}?", "docId": 1, "data_split": split, "image": PAGE} | row
    return {"dataset_split": split, "data": [whole | ({"answers": ["May 1"]} if split != "test" else {})]}


def problem(split: str) -> dict[str, Any]:
    return {"question": split, "choices": ["a", "b"], "answer": 0, "hint": "", "image": "image.png", "split": split}


def phrases() -> dict[str, Any]:
    sentence = {"sent": "left", "raw": "left", "sent_id": 0, "tokens": ["left"]}
    ref = {"ref_id": 0, "ann_id": 9, "image_id": 3, "category_id": 1, "split": "train", "sentences": [sentence]}
    return {
        "refcoco/instances.json": {
            "images": [{"id": 3, "file_name": PHOTO}],
            "annotations": [{"id": 9, "image_id": 3, "category_id": 1, "bbox": [1, 2, 10, 12], "iscrowd": 0}],
            "categories": [{"id": 1, "name": "person"}],
        },
        "refcoco/refs(unc).p": pickle.dumps([ref], protocol=2),
    }


def vqa(split: str) -> dict[str, Any]:
    return {"data_subtype": split, "questions": [{"image_id": 3, "question": f"In {split}?", "question_id": 3000}]}


ANSWERS = {"annotations": [{"question_id": 3000, "image_id": 3, "answers": [{"answer": "yes", "answer_id": 1}] * 10}]}
CAPTIONED = "1.jpg#0\tTwo dogs .\n1.jpg#1\tDogs run .\n"
LISTS = "raw,sentids,split,filename,img_id\n"
# Name, format, files, splits, rows in all, the folder to name.
LAYOUTS: list[tuple[str, str, dict[str, Any], tuple[str, ...], int, str]] = [
    ("DocVQA, a folder a split", "docvqa",
     {f"{s}/{s}_v1.0.json": asked(s) for s in SPLITS} | {f"{s}/{PAGE}": None for s in SPLITS}, SPLITS, 3, "."),
    ("DocVQA, questions apart", "docvqa",
     {f"spdocvqa_qas/{s}_v1.0{'' if s == 'test' else '_withQT'}.json": asked(s) for s in SPLITS}
     | {f"spdocvqa_images/{Path(PAGE).name}": None}, ("test", "train", "val"), 3, "."),
    ("InfographicVQA", "docvqa",
     {"infographicsvqa_qas/infographicsVQA_train_v1.0.json": asked("train", image=None, image_local_name="5.jpeg"),
      "infographicsvqa_images/5.jpeg": None}, ("train",), 1, "."),
    ("ChartQA, the repository", "chartqa",
     {f"ChartQA Dataset/{s}/{s}_{kind}.json": [{"imgname": "4.png", "query": f"{kind}?", "label": "5"}]
      for s in SPLITS for kind in ("human", "augmented")}
     | {f"ChartQA Dataset/{s}/png/4.png": None for s in SPLITS}, SPLITS, 6, "."),
    ("ScienceQA", "scienceqa",
     {"problems.json": {str(n): problem(s) for n, s in enumerate(SPLITS)}, "pid_splits.json": {"train": ["0"]}}
     | {f"images/{s}/{n}/image.png": None for n, s in enumerate(SPLITS)}, ("test", "train", "val"), 3, "."),
    ("Flickr30k of Kaggle", "flickr",
     {"flickr30k_images/results.csv": "image_name| comment_number| comment\n1.jpg| 0| Two dogs .\n",
      "flickr30k_images/flickr30k_images/1.jpg": None}, (), 1, "."),
    ("Flickr30k, official", "flickr",
     {"results_20130124.token": CAPTIONED, "flickr30k-images/1.jpg": None}, (), 2, "."),
    ("Flickr30k of the Hub", "flickr",
     {"flickr_annotations_30k.csv": LISTS + '"[""Dogs, two."", ""Run.""]","[0, 1]",val,1.jpg,0\n',
      "flickr30k-images/1.jpg": None}, ("val",), 2, "."),
    ("Flickr8k, both archives", "flickr",
     {"Flickr8k_text/Flickr8k.token.txt": CAPTIONED, "Flickr8k_text/Flickr8k.lemma.token.txt": CAPTIONED,
      "Flickr8k_text/ExpertAnnotations.txt": "1.jpg\t2.jpg#2\t1\t1\t1\n",
      "Flickr8k_text/Flickr_8k.devImages.txt": "1.jpg\n",
      "Flicker8k_Dataset/1.jpg": None}, ("dev",), 2, "."),
    *(("RefCOCO, " + place, "refcoco", phrases() | {f"{place}/{PHOTO}": None}, ("train",), 1, "refcoco")
      for place in ("images/mscoco/images/train2014", "images/mscoco", "images/train2014", "coco/train2014")),
    ("VQAv2 with both test sets", "vqav2",
     {f"v2_OpenEnded_mscoco_{s}_questions.json": vqa(s) for s in ("train2014", "test2015", "test-dev2015")}
     | {"v2_mscoco_train2014_annotations.json": ANSWERS, f"train2014/{PHOTO}": None,
        f"test2015/{PHOTO.replace('train2014', 'test2015')}": None}, ("test-dev", "test", "train"), 1, "."),
]  # fmt: skip


@pytest.mark.parametrize(
    ("format", "files", "splits", "rows", "place"), [layout[1:] for layout in LAYOUTS], ids=[one[0] for one in LAYOUTS]
)
def test_an_unpacked_archive_is_read(
    write: Callable[..., Path], format: str, files: dict[str, Any], splits: tuple[str, ...], rows: int, place: str
) -> None:
    root = write(**files) / place
    assert [found.name for found in FORMATS.values() if found.detect(root)] == [format]
    assert FORMATS[format].splits(root) == splits
    data = load_samples(root, verify_images="full")
    assert (len(data.dataset), data.quarantine.rows) == (rows, [])
    for split in splits:
        assert len(load_samples(root, split=split).dataset)


def test_captions_of_a_list(write: Callable[..., Path]) -> None:
    good = '"[""Dogs, two."", ""Run.""]","[0, 1]",restval,1.jpg,0\n'
    root = write(**{"flickr_annotations_30k.csv": LISTS + good + "Run.,[2],val,1.jpg,0\n", "images/1.jpg": None})
    data = load_samples(root, split="train", max_bad_fraction=0.5)
    assert [row["references"] for row in data.dataset] == [["Dogs, two.", "Run."]] * 2
    assert [row.id for row in data.quarantine.rows] == ["flickr_annotations_30k.csv, line 3"]


def test_all_of_coco_is_to_be_chosen_from(layouts: Any) -> None:
    """The one folder that is two data sets: captions and boxes of the same images."""
    place = layouts.coco_captions()
    annotations = {"annotations": [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 2, 10, 12], "iscrowd": 0}]}
    images = {"images": [{"id": 0, "file_name": f"{0:012d}.jpg"}], "categories": [{"id": 1, "name": "dog"}]}
    file = place / "annotations" / "instances_train2017.json"
    file.write_text(json.dumps(annotations | images))
    with pytest.raises(FormatError, match=r"looks like coco_captions and coco_instances. Choose one by dataset_format"):
        load_samples(place)
    assert len(load_samples(place, format="coco_instances").dataset) == 1
    assert load_samples(file).format == "coco_instances"
    assert len(load_samples(place, format="coco_captions").dataset) == 6
