"""A folder of images with ``metadata.jsonl``, ``.csv`` or ``.parquet``, as Hugging Face's ``imagefolder`` reads it.

Each row names an image by ``file_name`` (or several by ``file_names``), counted from the metadata's folder, and holds
``text`` or ``caption``, or ``question`` and ``answer``, or ``messages``, or other columns of any JSON row. The metadata
lies in the folder, or in ``train/``, ``test/`` and so on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from vlmtune.data.formats.base import Format, Source
from vlmtune.data.formats.captions import Caption, caption_samples
from vlmtune.data.formats.columns import CAPTION_COLUMNS, shape_of
from vlmtune.data.formats.files import SPLITS, RowError, chosen, first_keys, id_prefix, json_rows, samples_of
from vlmtune.data.formats.rows import make_samples
from vlmtune.data.formats.table_files import columns_of, table_rows
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import Sample

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
NAMING = ("file_name", "file_names")


def detect(path: Path) -> bool:
    """Whether ``path`` is such a file of metadata, or a folder that holds one."""
    return any(shape_of(_columns(file)) is not None for file in _files(path).values())


def splits(path: Path) -> tuple[str, ...]:
    """Names of the split folders; none for a folder without."""
    return tuple(name for name in _files(path) if name)


def load(source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    """Yield one sample a row, the captions of an image together."""
    for split, file in chosen(source, _files(source.path)):
        yield from _load_file(file, id_prefix(split), source, quarantine)


def _load_file(file: Path, prefix: str, source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    images = source.image_dir or file.parent
    rows = json_rows(file, quarantine) if file.suffix.lower() == ".jsonl" else _table_rows(file, quarantine)
    captions = list[Caption]()

    def others() -> Iterator[tuple[str, tuple[str, Any]]]:
        for place, number, row in rows:
            shape = shape_of(row) if isinstance(row, dict) else None
            name = row.get("file_name") if isinstance(row, dict) and not source.columns else None
            text = row[shape] if shape in CAPTION_COLUMNS else None
            if name and isinstance(name, str) and text and isinstance(text, str | list):
                captions.extend(Caption(place, name, str(one)) for one in (text if isinstance(text, list) else [text]))
            else:
                yield place, (number, row)

    def make(_: str, item: Any) -> list[Sample]:
        number, row = item
        named = next((row[name] for name in NAMING if row.get(name)), None) if isinstance(row, dict) else None
        if not named:
            raise RowError("it names no image by 'file_name'")
        return make_samples(row, f"{prefix}{named if isinstance(named, str) else named[0]}#{number}", images, source)

    yield from samples_of(others(), make, quarantine)
    yield from caption_samples(captions, images, source.prompt, quarantine, prefix=prefix)


def _table_rows(file: Path, quarantine: Quarantine) -> Iterator[tuple[str, str, Any]]:
    for place, row in table_rows(file, quarantine):
        yield place, place.rpartition(" ")[2], row


def _files(path: Path) -> dict[str, Path]:
    """Split name -> metadata; the name is empty for a folder without splits, or a file."""
    if path.is_file():
        return {"": path} if is_metadata(path) else {}
    if own := _in_folder(path):
        return {"": own}
    return {name: file for name in SPLITS if (file := _in_folder(path / name))}


def _in_folder(folder: Path) -> Path | None:
    return next((folder / name for name in NAMES if is_metadata(folder / name)), None)


def is_metadata(file: Path) -> bool:
    """Whether a file is such metadata, whatever its other columns are."""
    return file.name.lower() in NAMES and file.is_file() and any(name in _columns(file) for name in NAMING)


def _columns(file: Path) -> Collection[str]:
    return first_keys(file) if file.suffix.lower() == ".jsonl" else columns_of(file)


FORMAT = Format(
    name="imagefolder",
    looks_like="metadata.jsonl, .csv or .parquet with 'file_name' and 'text', beside the images or in train/, test/",
    detect=detect,
    splits=splits,
    load=load,
    asks=(),
)
