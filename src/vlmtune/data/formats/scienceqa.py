"""ScienceQA as downloaded: ``problems.json`` and images by the problem's number (Lu et al. 2022, arXiv:2209.09513).

``problems.json`` maps a number to ``question``, ``choices``, ``answer`` (the right choice's place), ``hint``,
``image`` and ``split``; images lie in ``train/NUMBER/image.png``, also in ``images/``. The answer to learn is the
letter. Problems without an image are text alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmtune.data.formats.base import QUESTION, Format, Source
from vlmtune.data.formats.files import find_folder, head_of, read_json, require_split, samples_of
from vlmtune.data.formats.questions import LETTERS, choice_question, question_sample
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import ImageRef, Sample
from vlmtune.errors import DataError


def detect(path: Path) -> bool:
    """Whether ``path`` is ScienceQA's ``problems.json``, or a folder that holds it."""
    return _file(path) is not None


def splits(path: Path) -> tuple[str, ...]:
    """Names of the splits that the problems name."""
    file = _file(path)
    return tuple(sorted({str(row["split"]) for row in _problems(file).values() if _split(row)})) if file else ()


def load(source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    """Yield one sample a problem."""
    file = _file(source.path)
    if file is None:
        raise DataError(f"{source.path} holds no problems.json of ScienceQA.")
    require_split(source, splits(source.path))
    problems = _problems(file)
    chosen = {number: row for number, row in problems.items() if source.split in (None, _split(row))}
    names = [_image(number, row) for number, row in chosen.items() if isinstance(row, dict) and row.get("image")]
    roots = [file.parent, file.parent.parent, file.parent.parent.parent]
    candidates = [root / place for root in roots for place in ("", "images")]
    images = find_folder(names[:20], candidates, source, file.name) if names else file.parent

    def make(_: str, item: Any) -> Sample:
        number, row = item
        refs = [ImageRef(path=str(images / _image(number, row)))] if row.get("image") else []
        question, letter, letters = choice_question(row["question"], row["choices"], row["answer"], row.get("hint"))
        meta = {name: row[name] for name in ("split", "subject", "topic") if row.get(name)} | {LETTERS: letters}
        return question_sample(number, refs, question, [letter], prompt=source.prompt, meta=meta)

    rows = ((f"{file.name}, problem {number}", (number, row)) for number, row in chosen.items())
    yield from samples_of(rows, make, quarantine)


def _image(number: str, row: dict[str, Any]) -> str:
    return "/".join(part for part in (_split(row), number, str(row["image"])) if part)


def _split(row: Any) -> str | None:
    return row.get("split") if isinstance(row, dict) and isinstance(row.get("split"), str) else None


def _problems(file: Path) -> dict[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise DataError(f"{file} is not an object of problems by number. Download it again.")
    return content


def _file(path: Path) -> Path | None:
    places = [path] if path.is_file() else [path / "problems.json", path / "data" / "scienceqa" / "problems.json"]
    return next((file for file in places if file.is_file() and _is_problems(file)), None)


def _is_problems(file: Path) -> bool:
    if file.suffix.lower() != ".json":
        return False
    head = head_of(file).lstrip()
    try:
        number, end = json.JSONDecoder().raw_decode(head[1:].lstrip()) if head.startswith("{") else ("", 0)
        first, _ = json.JSONDecoder().raw_decode(head[1:].lstrip()[end:].lstrip().removeprefix(":").lstrip())
    except (ValueError, RecursionError):
        return False
    return isinstance(number, str) and isinstance(first, dict) and {"question", "choices", "answer"} <= first.keys()


FORMAT = Format(
    name="scienceqa",
    looks_like="problems.json of 'question', 'choices' and 'answer' beside train/NUMBER/image.png",
    detect=detect,
    splits=splits,
    load=load,
    metrics=("multiple_choice",),
    asks=(QUESTION,),
)
