"""Formats of JSON rows: each is told by the keys of its first row alone, the files and splits are the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from vlmtune.data.formats.base import Format, Source
from vlmtune.data.formats.files import (
    chosen,
    first_keys,
    id_prefix,
    json_rows,
    plain_name,
    samples_of,
    split_folders,
    split_name,
    visible,
)
from vlmtune.data.formats.rows import make_samples
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import Sample

SUFFIXES = (".jsonl", ".ndjson", ".json")


def row_format(*, name: str, looks_like: str, wants: Callable[[Collection[str]], bool]) -> Format:
    """Make a format of JSON lines or lists, a file or a folder of files.

    Args:
        name: the format's name.
        looks_like: one line on its files.
        wants: whether rows with these keys are of this format.
    """

    def is_mine(file: Path) -> bool:
        return plain_name(file).lower().endswith(SUFFIXES) and wants(first_keys(file))

    def parts(path: Path) -> dict[str, list[Path]]:
        if path.is_file():
            return {"": [path]}
        # Where a person names the format, and what columns of their own are, every file of rows is meant.
        return _parts(path, is_mine) or _parts(path, has_rows)

    def detect(path: Path) -> bool:
        return bool(_parts(path, is_mine)) if path.is_dir() else is_mine(path)

    def splits(path: Path) -> tuple[str, ...]:
        return tuple(name for name in parts(path) if name)

    def load(source: Source, quarantine: Quarantine) -> Iterator[Sample]:
        for split, files in chosen(source, parts(source.path)):
            for file in files:
                # Numbers of rows repeat from file to file.
                inside = f"{plain_name(file)}/" if len(files) > 1 else ""
                yield from _load_file(file, f"{id_prefix(split)}{inside}", source, quarantine)

    return Format(name=name, looks_like=looks_like, detect=detect, splits=splits, load=load, asks=())


def _parts(path: Path, fits: Callable[[Path], bool]) -> dict[str, list[Path]]:
    """Split name -> its files, in the folder or in one for each split."""
    inside = {name: _rows_in(folder, fits) for name, folder in split_folders(path).items()}
    return _by_split(path, fits) or {name: files for name, files in inside.items() if files}


def _rows_in(folder: Path, fits: Callable[[Path], bool]) -> list[Path]:
    return [file for file in visible(folder) if file.is_file() and fits(file)]


def _by_split(folder: Path, fits: Callable[[Path], bool]) -> dict[str, list[Path]]:
    """Split name -> its files; a file whose name holds no split is one by its stem."""
    found = _rows_in(folder, fits)
    stems = [Path(plain_name(file)).stem for file in found]
    parts: dict[str, list[Path]] = {}
    for stem, file in zip(stems, found, strict=True):
        # train.json beside train.jsonl may well hold the same rows: each goes by its whole name.
        name = (split_name(stem) or stem) if stems.count(stem) == 1 else file.name
        parts.setdefault(name, []).append(file)
    return parts


def has_rows(file: Path) -> bool:
    """Whether a file holds JSON rows of any columns."""
    return plain_name(file).lower().endswith(SUFFIXES) and bool(first_keys(file))


def _load_file(file: Path, prefix: str, source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    images = source.image_dir or file.parent
    numbered = ((place, (number, row)) for place, number, row in json_rows(file, quarantine))
    yield from samples_of(
        numbered,
        lambda _, item: make_samples(item[1], f"{prefix}{item[0]}", images, source),
        quarantine,
    )
