"""TextVQA as downloaded: questions about texts in photos, with ten answers each (Singh et al. 2019, arXiv:1904.08920).

``TextVQA_0.5.1_train.json``, ``..._val.json`` and ``..._test.json`` hold ``data``: a list of ``question_id``,
``question``, ``image_id`` and ``answers``. The photos ``IMAGE_ID.jpg`` lie in ``train_images/`` (those of ``val`` too)
and ``test_images/``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmtune.data.formats.base import QUESTION, Format, Source
from vlmtune.data.formats.files import (
    chosen,
    find_folder,
    has_keys,
    id_prefix,
    json_list,
    name_splits,
    plain_name,
    samples_of,
    visible,
)
from vlmtune.data.formats.questions import question_sample
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import ImageRef, Sample

PHOTO_FOLDERS = ("train_images", "test_images", "train_val_images/train_images", "images", "")


def detect(path: Path) -> bool:
    """Whether ``path`` is a file of TextVQA's questions, or a folder that holds some."""
    return bool(_files(path))


def splits(path: Path) -> tuple[str, ...]:
    """Names of the splits, from the files' names; none for a file."""
    return tuple(name for name in _files(path) if name)


def load(source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    """Yield one sample a question; questions without answers only where their split is asked for."""
    files = _files(source.path)
    for split, file in chosen(source, files):
        if source.split is not None or len(files) == 1 or has_keys(file, "answers"):
            yield from _load_file(file, id_prefix(split), source, quarantine)


def _load_file(file: Path, prefix: str, source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    rows = json_list(file, "data")
    names = [f"{row.get('image_id')}.jpg" for row in rows[:20] if isinstance(row, dict)]
    photos = find_folder(names, [file.parent / place for place in PHOTO_FOLDERS], source, file.name)

    def make(_: str, row: Any) -> Sample:
        name = f"{row['image_id']}.jpg"
        return question_sample(
            f"{prefix}{row['question_id']}",
            [ImageRef(path=str(photos / name))],
            row["question"],
            row.get("answers") or (),
            prompt=source.prompt,
            meta={"image": name},
        )

    yield from samples_of(((f"{file.name}, data[{i}]", row) for i, row in enumerate(rows)), make, quarantine)


def _files(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {"": path} if _is_questions(path) else {}
    return (
        name_splits(file for file in visible(path) if file.is_file() and _is_questions(file)) if path.is_dir() else {}
    )


def _is_questions(file: Path) -> bool:
    return plain_name(file).lower().endswith(".json") and has_keys(file, "data", "image_id", "question_id", "question")


FORMAT = Format(
    name="textvqa",
    looks_like="TextVQA_*_train.json, whose 'data' hold 'question_id', 'question', 'image_id', beside train_images/",
    detect=detect,
    splits=splits,
    load=load,
    metrics=("vqa_accuracy", "exact_match"),
    asks=(QUESTION,),
)
