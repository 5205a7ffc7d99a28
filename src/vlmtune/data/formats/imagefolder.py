"""A folder of images with ``metadata.jsonl`` or ``metadata.csv``, as Hugging Face's ``imagefolder`` reads it.

Each row names an image by ``file_name``, counted from the metadata's folder, and holds ``text`` or ``caption``, or
``question`` and ``answer``, or ``messages``. The metadata lies in the folder, or in ``train/``, ``test/`` and so on.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmtune.data.formats.base import Format, Source, first_line
from vlmtune.data.formats.captions import Caption, caption_samples
from vlmtune.data.formats.files import SPLITS, RowError, chosen, first_keys, id_prefix, json_rows, samples_of
from vlmtune.data.formats.rows import CAPTION_COLUMNS, make_sample, shape_of
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import Sample
from vlmtune.errors import DataError

NAMES = ("metadata.jsonl", "metadata.csv")


def detect(path: Path) -> bool:
    """Whether ``path`` is such a file of metadata, or a folder that holds one."""
    return bool(_files(path))


def splits(path: Path) -> tuple[str, ...]:
    """Names of the split folders; none for a folder without."""
    return tuple(name for name in _files(path) if name)


def load(source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    """Yield one sample a row, the captions of an image together."""
    for split, file in chosen(source, _files(source.path)):
        yield from _load_file(file, id_prefix(split), source, quarantine)


def _load_file(file: Path, prefix: str, source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    images = source.image_dir or file.parent
    rows = _csv_rows(file, quarantine) if file.suffix.lower() == ".csv" else json_rows(file, quarantine)
    captions = list[Caption]()

    def others() -> Iterator[tuple[str, tuple[str, Any]]]:
        for place, number, row in rows:
            shape = shape_of(row) if isinstance(row, dict) else None
            named = isinstance(row, dict) and isinstance(row.get("file_name"), str) and not source.columns
            if named and shape in CAPTION_COLUMNS and isinstance(row[shape], str | list):
                texts = row[shape] if isinstance(row[shape], list) else [row[shape]]
                captions.extend(Caption(place, row["file_name"], str(text)) for text in texts)
            else:
                yield place, (number, row)

    def make(_: str, item: Any) -> Sample:
        number, row = item
        if not isinstance(row, dict) or not row.get("file_name"):
            raise RowError("it names no image by 'file_name'")
        return make_sample(row, f"{prefix}{row['file_name']}#{number}", images, source)

    yield from samples_of(others(), make, quarantine)
    yield from caption_samples(captions, images, source.prompt, quarantine, prefix=prefix)


def _csv_rows(file: Path, quarantine: Quarantine) -> Iterator[tuple[str, str, Any]]:
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
        reader = csv.DictReader(opened, restkey="", restval=None)
        try:
            for row in reader:
                place = f"{file.name}, line {reader.line_num}"
                if "" in row or None in row.values():
                    quarantine.add(place, "unreadable row", f"it has not the {len(reader.fieldnames or ())} columns")
                elif any("\udc80" <= sign <= "\udcff" for value in row.values() for sign in str(value)):
                    quarantine.add(place, "unreadable row", "it is not UTF-8 text")
                else:
                    yield place, str(reader.line_num), row
        except csv.Error as error:
            raise DataError(f"{file} cannot be read from line {reader.line_num} on ({error}).") from error


def _files(path: Path) -> dict[str, Path]:
    """Split name -> metadata; the name is empty for a folder without splits, or a file."""
    if path.is_file():
        return {"": path} if _is_metadata(path) else {}
    if own := _in_folder(path):
        return {"": own}
    return {name: file for name in SPLITS if (file := _in_folder(path / name))}


def _in_folder(folder: Path) -> Path | None:
    return next((folder / name for name in NAMES if _is_metadata(folder / name)), None)


def _is_metadata(file: Path) -> bool:
    if file.name.lower() not in NAMES or not file.is_file():
        return False
    if file.suffix.lower() == ".csv":
        columns = {name.strip().strip('"') for name in first_line(file).split(",")}
    else:
        columns = set(first_keys(file))
    return "file_name" in columns and shape_of(columns) is not None


FORMAT = Format(
    name="imagefolder",
    looks_like="metadata.jsonl or metadata.csv with 'file_name' and 'text', beside the images or in train/, test/",
    detect=detect,
    splits=splits,
    load=load,
    asks=(),
)
