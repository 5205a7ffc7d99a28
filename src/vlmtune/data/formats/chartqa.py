"""ChartQA as downloaded (Masry et al. 2022, arXiv:2203.10244).

``train/train_human.json``, ``train/train_augmented.json`` and ``train/png/``, and so for ``val`` and ``test``. A row is
``imgname``, ``query`` and ``label``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmtune.data.formats.base import QUESTION, Format, Source
from vlmtune.data.formats.files import SPLITS, chosen, find_folder, first_keys, id_prefix, json_rows, samples_of
from vlmtune.data.formats.questions import question_sample
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import ImageRef, Sample

# Its folder in the repository and in the archive.
DOWNLOADED = "ChartQA Dataset"


def detect(path: Path) -> bool:
    """Whether ``path`` is a file of ChartQA questions, a folder of one split, or a folder of splits."""
    return bool(_files(path))


def splits(path: Path) -> tuple[str, ...]:
    """Names of the split folders; none for a file or a folder of one split."""
    return tuple(name for name in _files(path) if name)


def load(source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    """Yield one sample a question."""
    for split, files in chosen(source, _files(source.path)):
        for file in files:
            yield from _load_file(file, id_prefix(split), source, quarantine)


def _load_file(file: Path, prefix: str, source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    rows = [(place, (number, row)) for place, number, row in json_rows(file, quarantine)]
    names = [row["imgname"] for _, (_, row) in rows[:20] if isinstance(row, dict) and row.get("imgname")]
    charts = find_folder(names, [file.parent / place for place in ("png", "images", "")], source, file.name)
    # train_human.json and train_augmented.json number their rows alike.
    kind = file.stem.rpartition("_")[2]

    def make(_: str, item: Any) -> Sample:
        number, row = item
        return question_sample(
            f"{prefix}{kind}/{number}",
            [ImageRef(path=str(charts / row["imgname"]))],
            row["query"],
            [row["label"]],
            prompt=source.prompt,
            meta={"image": row["imgname"], "source": kind},
        )

    yield from samples_of(rows, make, quarantine)


def _files(path: Path) -> dict[str, list[Path]]:
    """Split name -> files of questions; the name is empty for a file or a folder of one split."""
    if path.is_file():
        return {"": [path]} if _is_questions(path) else {}
    if own := _in_folder(path):
        return {"": own}
    roots = [path, path / DOWNLOADED]
    return {name: files for root in roots for name in SPLITS if (files := _in_folder(root / name))}


def _in_folder(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("*.json")) if _is_questions(file)]


def _is_questions(file: Path) -> bool:
    return file.suffix.lower() == ".json" and {"imgname", "query", "label"} <= first_keys(file)


FORMAT = Format(
    name="chartqa",
    looks_like="train/, val/ and test/ with *_human.json, *_augmented.json ('imgname', 'query', 'label') and png/",
    detect=detect,
    splits=splits,
    load=load,
    metrics=("relaxed_accuracy", "exact_match"),
    asks=(QUESTION,),
)
