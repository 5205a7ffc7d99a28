"""easy-VQA: questions on 64 x 64 pictures of one shape each (github.com/vzhou842/easy-VQA, MIT).

A folder with ``train/`` and ``test/``, each with ``questions.json`` (``[question, answer, image number]``) and
``images/NUMBER.png``; or one such folder by itself. The name ``easy-vqa`` stands for the installed package.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmtune.data.formats.base import QUESTION, Format, Source
from vlmtune.data.formats.files import RowError, chosen, id_prefix, json_rows, samples_of
from vlmtune.data.formats.questions import question_sample
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import ImageRef, Sample
from vlmtune.errors import MissingDependencyError

PACKAGE_NAME = "easy-vqa"
COLORS = frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"})


def package_folder() -> Path:
    """Return the data folder of the installed package, without importing it.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "The data set easy-vqa needs its package. Install it by: pip install 'vlmtune[demo]' (or: pip install "
            "easy-vqa)."
        )
    return Path(spec.origin).parent / "data"


def detect(path: Path) -> bool:
    """Whether ``path`` holds easy-VQA's questions."""
    return bool(_folders(path))


def splits(path: Path) -> tuple[str, ...]:
    """``train`` and ``test``, or none for a folder of one split."""
    return tuple(name for name in _folders(path) if name)


def load(source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    """Yield one sample a question."""
    for split, folder in chosen(source, _folders(source.path)):
        yield from _load_folder(folder, id_prefix(split), source, quarantine)


def _load_folder(folder: Path, prefix: str, source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    file = folder / "questions.json"
    images = source.image_dir or folder / "images"
    numbers: dict[int | str, int] = {}

    def make(_: str, row: Any) -> Sample:
        question, answer, image = row
        if not isinstance(image, int | str):
            raise RowError(f"{row!r} names no image by number", "unreadable row")
        number = numbers.get(image, -1) + 1
        sample = question_sample(
            f"{prefix}{image}#{number}",
            [ImageRef(path=str(images / f"{image}.png"))],
            question,
            [answer],
            prompt=source.prompt,
            meta={"answer_type": _answer_type(str(answer)), "image": f"{image}.png"},
        )
        numbers[image] = number
        return sample

    rows = ((f"{prefix}{place}", row) for place, _, row in json_rows(file, quarantine))
    yield from samples_of(rows, make, quarantine)


def _answer_type(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "color" if answer in COLORS else "shape"


def _folders(path: Path) -> dict[str, Path]:
    """Split name -> folder; the name is empty for a folder of one split."""
    if _is_questions(path / "questions.json"):
        return {"": path}
    return {name: path / name for name in ("train", "test") if _is_questions(path / name / "questions.json")}


def _is_questions(file: Path) -> bool:
    """Whether a file begins as a list of lists of texts, however it is laid out in lines."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return b"".join(opened.read(200).split()).startswith(b'[["')


FORMAT = Format(
    name="easy_vqa",
    looks_like="train/ and test/ with questions.json and images/, or the name easy-vqa for the installed package",
    detect=detect,
    splits=splits,
    load=load,
    metrics=("exact_match", "vqa_accuracy"),
    asks=(QUESTION,),
)
