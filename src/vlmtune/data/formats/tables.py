"""Parquet, Arrow and CSV files, and data sets that Hugging Face's ``datasets`` saved or prepared.

A file, a folder of files (split by their names, as in ``train-00000-of-00003.parquet``, also in ``data/``), a folder of
``save_to_disk``, or one of the cache of ``datasets``, where ``hf://`` addresses lead. Rows have the columns of any JSON
row (``messages``, ``prompt`` and ``completion``, ``question`` and ``answer``, ``image`` and ``text``); images are bytes
or paths, and numbers of a ``ClassLabel`` become its names. Of CSV, empty cells count as none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import datasets

from vlmtune.data.formats import flickr, imagefolder
from vlmtune.data.formats.base import Format, Source
from vlmtune.data.formats.columns import shape_of
from vlmtune.data.formats.files import RowError, chosen, id_prefix, samples_of, shard_split, split_folders, visible
from vlmtune.data.formats.rows import make_samples
from vlmtune.data.formats.table_files import BINARY, TEXT, columns_of, features_of, table_rows
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import Sample


def detect(path: Path) -> bool:
    """Whether ``path`` is such a file with columns that are known, or a folder that holds some."""
    return bool(_prepared(path)) or any(shape_of(columns_of(files[0])) for files in _files(path).values())


def splits(path: Path) -> tuple[str, ...]:
    """Names of the splits: of the files, or of the folders of a saved ``DatasetDict``."""
    return tuple(name for name in _files(path) if name)


def load(source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    """Yield one sample a row."""
    for split, files in chosen(source, _files(source.path)):
        numbers = count()
        for file in files:
            yield from _load_file(file, numbers, id_prefix(split), source, quarantine)


def _load_file(
    file: Path, numbers: Iterator[int], prefix: str, source: Source, quarantine: Quarantine
) -> Iterator[Sample]:
    images = source.image_dir or file.parent
    features = features_of(file)
    labels = _class_names(features.get(source.columns.get("objects", "objects")))
    names = {name: kind.names for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}

    def make(_: str, content: dict[str, Any]) -> list[Sample]:
        number, row = next(numbers), dict(content)
        for name in names.keys() & row.keys():
            row[name] = _class_name(names[name], row[name]) if row[name] is not None else None
        return make_samples(row, f"{prefix}{number}", images, source, labels=labels)

    yield from samples_of(table_rows(file, quarantine), make, quarantine)


def _class_name(names: list[str], number: int) -> str:
    """The name of a class; -1 stands for none where data are published without their labels."""
    if not 0 <= number < len(names):
        raise RowError(f"its label {number} is none of the {len(names)} that the data name", "unusable label")
    return names[number]


def _class_names(feature: Any) -> list[str]:
    """The names of the first ``ClassLabel`` inside a feature; none where there is none."""
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    inside = list(feature.values()) if isinstance(feature, dict) else [getattr(feature, "feature", None)]
    return next((names for one in inside if one is not None and (names := _class_names(one))), [])


def _files(path: Path) -> dict[str, list[Path]]:
    """Split name -> files in order; the name is empty where nothing names one."""
    if path.is_file():
        return {"": [path]} if _is_table(path) else {}
    if (path / "dataset_dict.json").is_file():
        saved = {folder.name: _in_folder(folder) for folder in sorted(path.iterdir()) if folder.is_dir()}
        return {name: files for name, files in saved.items() if files}
    if (path / "state.json").is_file():
        return {"": _in_folder(path)}
    if prepared := _prepared(path):
        return prepared
    found: dict[str, list[Path]] = {}
    for file in _in_folder(path) or _in_folder(path / "data"):
        found.setdefault(shard_split(file), []).append(file)
    # As the Hub converts data sets to Parquet: train/0000.parquet.
    return found or {name: files for name, folder in split_folders(path).items() if (files := _in_folder(folder))}


def _prepared(path: Path) -> dict[str, list[Path]]:
    """Split name -> files in a folder of the cache of ``datasets``, whose record names the splits."""
    try:
        info = json.loads((path / "dataset_info.json").read_text(encoding="utf-8"))
        splits = list(info.get("splits") or ())
    except (OSError, ValueError, AttributeError):
        return {}
    found = {name: sorted([*path.glob(f"*-{name}.arrow"), *path.glob(f"*-{name}-*-of-*.arrow")]) for name in splits}
    return {name: files for name, files in found.items() if files}


def _in_folder(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    # The caches of datasets.map lie beside what save_to_disk wrote.
    files = [file for file in visible(folder) if not file.name.startswith("cache-") and _is_table(file)]
    return [file for file in files if file.suffix.lower() in BINARY] or files


def _is_table(file: Path) -> bool:
    if imagefolder.is_metadata(file):
        return False
    suffix = file.suffix.lower()
    return suffix in BINARY or (suffix in TEXT and flickr.captions_file(file) is None)


FORMAT = Format(
    name="tables",
    looks_like="Parquet, Arrow or CSV files, or a saved Hugging Face data set, with columns such as 'image' and 'text'",
    detect=detect,
    splits=splits,
    load=load,
    asks=(),
)
