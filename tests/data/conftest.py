"""Folders of data to read, made of the shared images."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


@pytest.fixture
def flickr_folder(tmp_path: Path, image_folder: Path) -> Callable[..., Path]:
    """Make a folder with one captions file beside ``Images/`` of ``0.jpg`` to ``11.jpg``."""

    def make(name: str, content: str | bytes, *, images: str = "Images", **others: str) -> Path:
        folder = tmp_path / "flickr"
        shutil.copytree(image_folder, folder / images)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        for other, text in others.items():
            (folder / f"Flickr_8k.{other}Images.txt").write_text(text, encoding="utf-8")
        return folder

    return make


@pytest.fixture
def messages_file(tmp_path: Path, image_folder: Path) -> Callable[..., Path]:
    """Write rows (objects, or lines as they are) into ``chat/NAME.jsonl`` beside ``0.jpg`` to ``11.jpg``."""

    def write(rows: Sequence[Any], name: str = "train") -> Path:
        folder = tmp_path / "chat"
        if not folder.exists():
            shutil.copytree(image_folder, folder)
        lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
        path = folder / f"{name}.jsonl"
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return write


def _json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


class Layouts:
    """Writes a small data set in each published layout; the images are ``0.jpg`` to ``11.jpg`` under other names."""

    def __init__(self, root: Path, images: Path) -> None:
        self.root, self.images = root, images

    def image(self, number: int, *place: str) -> bytes:
        """Copy an image to a place, and return its bytes."""
        content = (self.images / f"{number}.jpg").read_bytes()
        if place:
            target = self.root.joinpath(*place)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return content

    def flickr(self) -> Path:
        self.image(0, "flickr", "Images", "0.jpg")
        (self.root / "flickr" / "captions.txt").write_text("image,caption\n0.jpg,A dog.\n0.jpg,A cat.\n")
        return self.root / "flickr"

    def coco_captions(self, extra: Sequence[Any] = ()) -> Path:
        root = self.root / "coco"
        for split, numbers in (("train", (0, 1)), ("val", (2,))):
            names = [f"{number:012d}.jpg" for number in numbers]
            for number, name in zip(numbers, names, strict=True):
                self.image(number, "coco", f"{split}2017", name)
            content = {
                "info": {"year": 2017},
                "licenses": [],
                "images": [{"id": n, "file_name": name} for n, name in zip(numbers, names, strict=True)],
                "annotations": [
                    {"id": 10 * n + k, "image_id": n, "caption": f"Caption {k} of {n}. "}
                    for k in (0, 1)
                    for n in numbers
                ]
                + list(extra),
            }
            _json(root / "annotations" / f"captions_{split}2017.json", content)
        return root

    def size(self, number: int) -> tuple[int, int]:
        """Width and height of an image."""
        with Image.open(self.images / f"{number}.jpg") as image:
            return image.size

    def coco_instances(self, annotation: Any = None, **image: Any) -> Path:
        """Image 0 has a dog, two cats and a crowd, 1 nothing, 2 a dog; boxes are fractions of an image's sides."""
        root = self.root / "instances"
        objects = {
            0: [
                (18, (0.5, 0.5, 0.25, 0.25), 0),
                (17, (0, 0, 0.25, 0.25), 0),
                (17, (0.25, 0, 0.75, 1), 0),
                (18, (0, 0, 1, 1), 1),
            ],
            1: [],
            2: [(18, (0.1, 0.2, 0.5, 0.5), 0)],
        }
        for split, numbers in (("train", (0, 1)), ("val", (2,))):
            images, annotations = [], []
            for number in numbers:
                name = f"{number:012d}.jpg"
                self.image(number, "instances", f"{split}2017", name)
                width, height = self.size(number)
                images.append({"id": number, "file_name": name, "width": width, "height": height} | image)
                for place, (category, (x, y, w, h), crowd) in enumerate(objects[number]):
                    box = [round(x * width, 2), round(y * height, 2), round(w * width, 2), round(h * height, 2)]
                    annotations.append(
                        {"segmentation": [[0.0] * 8], "area": box[2] * box[3], "iscrowd": crowd, "image_id": number}
                        | {"bbox": box, "category_id": category, "id": 10 * number + place}
                    )
            content = {
                "info": {"year": 2017},
                "licenses": [],
                "images": images,
                "annotations": annotations + ([annotation] if annotation and split == "train" else []),
                "categories": [
                    {"supercategory": "animal", "id": id, "name": name}
                    for id, name in ((17, "cat"), (18, "dog"), (19, "horse"))
                ],
            }
            _json(root / "annotations" / f"instances_{split}2017.json", content)
        return root

    def refcoco(self, *refs: Any) -> Path:
        root = self.root / "refcoco"
        images, annotations, phrases = [], [], list(refs)
        for number, split in ((3, "train"), (4, "val"), (5, "testA")):
            name = f"COCO_train2014_{number:012d}.jpg"
            self.image(number, "refcoco", "images", "mscoco", "images", "train2014", name)
            width, height = self.size(number)
            images.append({"id": number, "file_name": name, "width": width, "height": height})
            box = [1.5, 2.0, width / 2, height / 2]
            annotations.append({"id": 100 + number, "image_id": number, "category_id": 1, "bbox": box, "iscrowd": 0})
            sentences = [
                {"sent": f"{word} person {number}", "raw": f"{word} person {number}!", "sent_id": 10 * number + n}
                | {"tokens": [word, "person", str(number)]}
                for n, word in enumerate(("left", "tall"))
            ]
            phrases.append(
                {"ref_id": number, "ann_id": 100 + number, "image_id": number, "category_id": 1, "split": split}
                | {
                    "file_name": f"COCO_train2014_{number:012d}_{number}.jpg",
                    "sentences": sentences,
                    "sent_ids": [1, 2],
                }
            )
        _json(
            root / "instances.json",
            {"info": {}, "images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]},
        )
        # Published with Python 2's protocols.
        (root / "refs(unc).p").write_bytes(pickle.dumps(phrases, protocol=2))
        (root / "refs(google).p").write_bytes(pickle.dumps(phrases[:1], protocol=0))
        return root

    def mdetr(self, **image: Any) -> Path:
        """RefCOCO as MDETR writes it."""
        root = self.root / "mdetr"
        name = "COCO_train2014_000000000003.jpg"
        self.image(3, "mdetr", "train2014", name)
        width, height = self.size(3)
        row = {"file_name": name, "width": width, "height": height, "original_id": 3, "dataset_name": "refcoco"}
        _json(
            root / "finetune_refcoco_train.json",
            {
                "images": [row | {"id": n, "caption": f"person {n}"} for n in (0, 1)]
                + ([row | image] if image else []),
                "annotations": [
                    {"id": n, "image_id": n, "bbox": [1, 2, 10, 12], "category_id": 1, "tokens_positive": [[0, 6]]}
                    for n in (0, 1)
                ],
                "categories": [{"id": 1, "name": "person"}],
            },
        )
        return root

    def imagefolder(self) -> Path:
        rows = [("0.jpg", "A dog, running."), ("0.jpg", "A brown dog."), ("1.jpg", "A cat.")]
        for number in (0, 1):
            self.image(number, "folder", f"{number}.jpg")
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
        (self.root / "folder" / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return self.root / "folder"

    def image_text_pairs(self) -> Path:
        for number in (0, 1):
            self.image(number, "pairs", f"{number}.jpg")
            (self.root / "pairs" / f"{number}.txt").write_text(f"Caption of {number}.\n", encoding="utf-8")
        (self.root / "pairs" / "README.txt").write_text("Where this is from.\n")
        return self.root / "pairs"

    def class_folders(self) -> Path:
        for number, name in enumerate(("hot_dog", "dog", "cat")):
            for split in ("train", "test"):
                self.image(number, "classes", split, name, f"{split}.jpg")
        (self.root / "classes" / "README.md").write_text("Where this is from.")
        return self.root / "classes"

    def textvqa(self, **row: Any) -> Path:
        for split, number in (("train", 4), ("val", 5), ("test", 6)):
            self.image(number, "textvqa", f"{split.replace('val', 'train')}_images", f"{number}a.jpg")
            asked = {"question_id": number, "question": "What brand?", "image_id": f"{number}a", "set_name": split}
            answers = {} if split == "test" else {"answers": ["nokia"] * 6 + ["nok"] * 4}
            rows = [asked | answers, *([asked | answers | {"question_id": 9} | row] if row else [])]
            file = self.root / "textvqa" / f"TextVQA_0.5.1_{split}.json"
            _json(file, {"dataset_type": split, "dataset_name": "textvqa", "data": rows})
        return self.root / "textvqa"

    def easy_vqa(self) -> Path:
        self.image(0, "easy", "images", "0.png")
        _json(self.root / "easy" / "questions.json", [["what shape?", "circle", 0]])
        return self.root / "easy"

    def vqav2(self, question: Any = None, annotation: Any = None) -> Path:
        root = self.root / "vqav2"
        answers = ["yes"] * 6 + ["no"] * 4
        for split, number in (("train", 9), ("val", 10), ("test", 11)):
            self.image(number, "vqav2", f"{split}2014", f"COCO_{split}2014_{number:012d}.jpg")
            asked = [
                {"question_id": number * 10 + k, "image_id": number, "question": f"Is it {k}?"} for k in (0, 1)
            ] + ([question] if question else [])
            _json(
                root / f"v2_OpenEnded_mscoco_{split}2014_questions.json",
                {"info": {}, "task_type": "Open-Ended", "data_subtype": f"{split}2014", "questions": asked},
            )
            if split != "test":
                given = [
                    {
                        "question_id": number * 10 + k,
                        "image_id": number,
                        "question_type": "is",
                        "answer_type": "yes/no",
                        "answers": [
                            {"answer": a, "answer_id": i, "answer_confidence": "yes"} for i, a in enumerate(answers)
                        ],
                    }
                    | ({"multiple_choice_answer": "no"} if k else {})
                    for k in (0, 1)
                ] + ([annotation] if annotation else [])
                _json(root / f"v2_mscoco_{split}2014_annotations.json", {"info": {}, "annotations": given})
        return root

    def docvqa(self, **row: Any) -> Path:
        self.image(3, "docvqa", "documents", "page_1.jpg")
        asked = [
            {"questionId": 7, "question": "What date?", "image": "documents/page_1.jpg", "answers": ["1 May", "May 1"]},
            *(
                [{"questionId": 8, "question": "Who?", "image": "documents/page_1.jpg", "answers": ["I"]} | row]
                if row
                else []
            ),
        ]
        _json(
            self.root / "docvqa" / "train_v1.0_withQT.json",
            {"dataset_name": "docvqa", "dataset_split": "train", "data": asked},
        )
        return self.root / "docvqa"

    def chartqa(self, *rows: Any) -> Path:
        for split in ("train", "test"):
            self.image(4, "chartqa", split, "png", "4.png")
            for kind in ("human", "augmented"):
                asked = [{"imgname": "4.png", "query": f"How many, {kind}?", "label": "5"}, *rows]
                _json(self.root / "chartqa" / split / f"{split}_{kind}.json", asked)
        return self.root / "chartqa"

    def scienceqa(self, **row: Any) -> Path:
        self.image(5, "scienceqa", "images", "train", "1", "image.png")
        first = {
            "question": "Which?",
            "choices": ["a fish", "a bird"],
            "answer": 1,
            "hint": "It flies.",
            "image": "image.png",
        }
        problems: dict[str, Any] = {"1": first | {"split": "train"}, "2": first | {"split": "test", "image": None}}
        if row:
            problems["3"] = first | {"split": "train"} | row
        _json(self.root / "scienceqa" / "problems.json", problems)
        _json(self.root / "scienceqa" / "pid_splits.json", {"train": ["1"], "test": ["2"]})
        return self.root / "scienceqa"

    def llava(self, *rows: Any) -> Path:
        self.image(6, "llava", "coco", "6.jpg")
        talk = [
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": "A dog."},
            {"from": "human", "value": "Is it brown?"},
            {"from": "gpt", "value": "Yes."},
        ]
        content = [{"id": "a", "image": "coco/6.jpg", "conversations": talk}, {"id": "b", "conversations": talk[2:]}]
        _json(self.root / "llava" / "llava_instruct.json", [*content, *rows])
        return self.root / "llava"

    def messages(self) -> Path:
        self.image(7, "messages", "7.jpg")
        row = {"messages": _turns("<image>What?", "A dog."), "images": ["7.jpg"]}
        (self.root / "messages" / "train.jsonl").write_text(json.dumps(row) + "\n")
        return self.root / "messages"

    def tables(self) -> Path:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [
            {"image": {"bytes": self.image(number), "path": "image.jpg"}, "text": f"Caption of {number}."}
            for number in (8, 9)
        ]
        folder = self.root / "tables" / "data"
        folder.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows[:1]), folder / "train-00000-of-00002.parquet")
        pq.write_table(pa.Table.from_pylist(rows[1:]), folder / "train-00001-of-00002.parquet")
        return self.root / "tables"

    def webdataset(self) -> Path:
        rows = [{"messages": _turns("<image>What?", "A dog.")}, {"messages": _turns("Who?", "A cat.")}]
        folder = self.root / "shards"
        folder.mkdir(parents=True)
        for number, kind, text in ((10, "json", json.dumps(rows)), (11, "txt", "A bird.")):
            with tarfile.open(folder / f"train-{number:06d}.tar", "w") as shard:
                for name, content in (("jpg", self.image(number)), (kind, text.encode())):
                    member = tarfile.TarInfo(f"{number}.{name}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))
        return folder

    def mixture(self) -> Path:
        path = self.root / "mixture.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"datasets:\n  - path: {self.flickr()}\n  - path: {self.messages()}\n    max_samples: 1\n")
        return path


@pytest.fixture
def layouts(tmp_path: Path, image_folder: Path) -> Layouts:
    """Writes a small data set in each published layout."""
    return Layouts(tmp_path / "layouts", image_folder)
