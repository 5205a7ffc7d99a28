"""DocVQA and its relatives (InfographicVQA): questions about pages with several right answers (docvqa.org).

``train_v1.0_withQT.json`` holds ``data``: a list of ``questionId``, ``question``, ``image`` and ``answers``. It lies in
the folder named, in one of the split (``train/``), or in one of questions (``spdocvqa_qas/``); pages in ``documents/``,
``spdocvqa_images/`` or beside the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmtune.data.formats.base import QUESTION, Format, Source
from vlmtune.data.formats.files import (
    SPLITS,
    RowError,
    chosen,
    find_folder,
    has_keys,
    id_prefix,
    is_file,
    json_list,
    name_splits,
    plain_name,
    samples_of,
)
from vlmtune.data.formats.questions import question_sample
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import ImageRef, Sample

QUESTION_FOLDERS = ("spdocvqa_qas", "infographicsvqa_qas", "qas")
PAGE_FOLDERS = ("", "spdocvqa_images", "documents", "images", "infographicsvqa_images")


def detect(path: Path) -> bool:
    """Whether ``path`` is a file of DocVQA questions, or a folder that holds some."""
    return bool(_files(path))


def splits(path: Path) -> tuple[str, ...]:
    """Names of the splits, from the files' names; none for a file."""
    return tuple(name for name in _files(path) if name)


def load(source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    """Yield one sample a question."""
    for split, file in chosen(source, _files(source.path)):
        yield from _load_file(file, id_prefix(split), source, quarantine)


def _load_file(file: Path, prefix: str, source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    rows = json_list(file, "data")
    named = [_page(row) for row in rows[:20] if isinstance(row, dict) and isinstance(_page(row), str)]
    roots = [file.parent, file.parent.parent]
    # Files name a page as documents/x.png, whatever the folder of the download is called.
    whole = [root / place for root in roots for place in PAGE_FOLDERS]
    short = not any(is_file(folder, name) for folder in whole for name in named)
    sought = [Path(name).name for name in named] if short else named
    pages = find_folder(sought, whole, source, file.name)

    def make(_: str, row: Any) -> Sample:
        page = _page(row)
        if not isinstance(page, str):
            raise RowError(f"its image is {str(page)[:80]!r}, not a name")
        path = pages / (page if is_file(pages, page) or not short else Path(page).name)
        meta = {"image": page} | ({"question_types": row["question_types"]} if row.get("question_types") else {})
        return question_sample(
            f"{prefix}{row['questionId']}",
            [ImageRef(path=str(path))],
            row["question"],
            row.get("answers") or (),
            target=(row.get("answers") or [None])[0],
            prompt=source.prompt,
            meta=meta,
        )

    yield from samples_of(((f"{file.name}, data[{i}]", row) for i, row in enumerate(rows)), make, quarantine)


def _page(row: dict[str, Any]) -> Any:
    return row.get("image") or row.get("image_local_name")


def _files(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {"": path} if _is_questions(path) else {}
    return name_splits(
        _in_folder(path) or [file for name in (*QUESTION_FOLDERS, *SPLITS) for file in _in_folder(path / name)]
    )


def _in_folder(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("*.json*")) if file.is_file() and _is_questions(file)]


def _is_questions(file: Path) -> bool:
    return plain_name(file).lower().endswith(".json") and has_keys(file, "data", "questionId", "question")


FORMAT = Format(
    name="docvqa",
    looks_like="train_v1.0.json and the like, whose 'data' hold 'questionId', 'question', 'image' and 'answers'",
    detect=detect,
    splits=splits,
    load=load,
    metrics=("anls", "exact_match"),
    asks=(QUESTION,),
)
