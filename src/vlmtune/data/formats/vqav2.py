"""VQAv2 as downloaded: questions and annotations in two JSON files, images by COCO's numbers (visualqa.org).

``v2_OpenEnded_mscoco_train2014_questions.json``, ``v2_mscoco_train2014_annotations.json`` and ``train2014/``. The
target is ``multiple_choice_answer``, or else the most frequent answer; all ten answers are references, repeats kept,
since VQA accuracy counts them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmtune.data.formats.base import QUESTION, Format, Source
from vlmtune.data.formats.files import (
    RowError,
    find_folder,
    has_keys,
    id_prefix,
    is_file,
    json_list,
    name_splits,
    plain_name,
    require_split,
    samples_of,
    split_name,
)
from vlmtune.data.formats.questions import question_sample
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import ImageRef, Sample
from vlmtune.errors import DataError

_TAG = re.compile(r"(train|val|test)(-dev)?(\d{4})", re.IGNORECASE)


def detect(path: Path) -> bool:
    """Whether ``path`` is a questions file of VQAv2, or a folder that holds some."""
    return bool(_files(path))


def splits(path: Path) -> tuple[str, ...]:
    """Names of the splits: ``train`` for ``..._train2014_questions.json``, ``test-dev``; none for a file."""
    return tuple(name for name in _files(path) if name)


def load(source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    """Yield one sample a question; questions without annotations only where their split is asked for."""
    files = _files(source.path)
    require_split(source, files)
    answered = [split for split, file in files.items() if _annotations_file(file)]
    for split, file in files.items():
        if split == source.split or (source.split is None and (split in answered or not answered)):
            yield from _load_file(file, id_prefix(split), source, quarantine)


def _load_file(file: Path, prefix: str, source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    questions = json_list(file, "questions")
    annotations = _annotations(file, quarantine)
    tag = _tag(file)
    numbers = [row.get("image_id") for row in questions[:20] if isinstance(row, dict)]
    # COCO named its images after their split until 2014, and by their number alone since.
    forms = (f"COCO_{tag}_{{:012d}}.jpg", "{:012d}.jpg", "{}.jpg", "{}.png")
    names = [form.format(number) for number in numbers if isinstance(number, int) for form in forms]
    folder = find_folder(names, _image_folders(file, tag), source, file.name)
    form = next((f for f in forms for n in numbers if isinstance(n, int) and is_file(folder, f.format(n))), forms[0])

    def make(_: str, row: Any) -> Sample:
        number, image = row["question_id"], row["image_id"]
        if not isinstance(image, int):
            raise RowError(f"its image_id is {image!r}, not a number")
        if annotations is not None and number not in annotations:
            raise RowError(f"the annotations have no answer to question {number}", "no answer")
        found = annotations[number] if annotations is not None else {}
        meta = {name: found[name] for name in ("question_type", "answer_type") if found.get(name)}
        return question_sample(
            f"{prefix}{number}",
            [ImageRef(path=str(folder / form.format(image)))],
            row["question"],
            [answer["answer"] for answer in found.get("answers", ())],
            target=found.get("multiple_choice_answer"),
            prompt=source.prompt,
            meta=meta | {"image": form.format(image)},
        )

    rows = ((f"{file.name}, questions[{index}]", row) for index, row in enumerate(questions))
    yield from samples_of(rows, make, quarantine)


def _annotations(questions: Path, quarantine: Quarantine) -> dict[Any, dict[str, Any]] | None:
    file = _annotations_file(questions)
    if file is None:
        return None
    found = {}
    for index, row in enumerate(json_list(file, "annotations")):
        if isinstance(row, dict) and isinstance(row.get("question_id"), int | str):
            found[row["question_id"]] = row
        else:
            quarantine.add(f"{file.name}, annotations[{index}]", "unreadable row", "it lacks 'question_id'")
    return found


def _annotations_file(questions: Path) -> Path | None:
    """The annotations beside a file of questions: of the same split and year.

    Raises:
        DataError: there are several.
    """
    found = [
        file
        for file in sorted(questions.parent.glob("*annotations*.json*"))
        if file.is_file() and _tag(file) == _tag(questions) and not plain_name(file).startswith("captions")
    ]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise DataError(f"{questions} goes with more than one file of annotations ({names}). Leave one of them there.")
    return found[0] if found else None


def _tag(file: Path) -> str:
    match = _TAG.search(file.name)
    return f"{match[1]}{match[3]}".lower() if match else split_name(file.name) or ""


def _image_folders(file: Path, tag: str) -> list[Path]:
    roots = [file.parent, file.parent.parent] if file.parent.name in ("annotations", "questions") else [file.parent]
    names = [name for name in (tag, tag.rstrip("0123456789") + "2017") if name]
    return [root / place for root in roots for name in names for place in (name, f"images/{name}", "images", "")]


def _files(path: Path) -> dict[str, Path]:
    """Split name -> questions file; the name is empty for a file by itself."""
    if path.is_file():
        return {"": path} if _is_questions(path) else {}
    found = [file for folder in (path, path / "questions") if folder.is_dir() for file in sorted(folder.iterdir())]
    files = [file for file in found if file.is_file() and _is_questions(file)]
    tags = [_TAG.search(file.name) for file in files]
    names = [f"{tag[1]}{tag[2] or ''}".lower() if tag else "" for tag in tags]
    # Only where the test questions lie beside those of test-dev does a name need more than the split.
    return dict(zip(names, files, strict=True)) if all(names) and len(set(names)) == len(names) else name_splits(files)


def _is_questions(file: Path) -> bool:
    name = plain_name(file).lower()
    return "questions" in name and name.endswith(".json") and has_keys(file, "questions", "question_id", "image_id")


FORMAT = Format(
    name="vqav2",
    looks_like="*_questions.json and *_annotations.json beside folders of images such as train2014/",
    detect=detect,
    splits=splits,
    load=load,
    metrics=("vqa_accuracy", "exact_match"),
    asks=(QUESTION,),
)
