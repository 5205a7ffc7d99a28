"""Parquet and Arrow files, and data sets that Hugging Face's ``datasets`` saved or prepared.

A file, a folder of files (split by their names, as in ``train-00000-of-00003.parquet``, also in ``data/``), a folder of
``save_to_disk``, or one of the cache of ``datasets``, where ``hf://`` addresses lead. Rows have the columns of any JSON
row (``messages``, ``prompt`` and ``completion``, ``question`` and ``answer``, ``image`` and ``text``); images are bytes
or paths, and numbers of a ``ClassLabel`` become its names. Files are read in batches.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from vlmtune.data.formats.base import Format, Source
from vlmtune.data.formats.files import RowError, chosen, id_prefix, samples_of, shard_split
from vlmtune.data.formats.rows import make_sample, shape_of
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import Sample
from vlmtune.errors import DataError

SUFFIXES = (".parquet", ".arrow")
# What a file of Arrow's begins with where it is no stream.
_ARROW_FILE = b"ARROW1"
# Rows with their images' bytes: a few hundred megabytes at most.
ROWS_AT_ONCE = 256


def detect(path: Path) -> bool:
    """Whether ``path`` is such a file with columns that are known, or a folder that holds some."""
    return bool(_prepared(path)) or any(shape_of(_columns(files[0])) for files in _files(path).values())


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
    features = _features(file)
    labels = _class_names(features.get(source.columns.get("objects", "objects")))
    names = {name: kind.names for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}

    def make(_: str, item: tuple[int, Any]) -> Sample:
        row = dict(item[1])
        for name in names.keys() & row.keys():
            row[name] = _class_name(names[name], row[name]) if row[name] is not None else None
        return make_sample(row, f"{prefix}{item[0]}", images, source, labels=labels)

    yield from samples_of(_rows(file, numbers), make, quarantine)


def _class_name(names: list[str], number: int) -> str:
    """The name of a class; -1 stands for none where data are published without their labels."""
    if not 0 <= number < len(names):
        raise RowError(f"its label {number} is none of the {len(names)} that the data name", "unusable label")
    return names[number]


def _rows(file: Path, numbers: Iterator[int]) -> Iterator[tuple[str, tuple[int, Any]]]:
    index = 0
    try:
        for batch in _batches(file):
            # Places that a damaged file names outside of itself would be read all the same.
            batch.validate(full=True)
            for row in batch.to_pylist():
                yield f"{file.name}, row {index}", (next(numbers), row)
                index += 1
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read from row {index} on ({error}). Download or write it again.") from error


def _batches(file: Path) -> Iterator[Any]:
    if file.suffix.lower() == ".parquet":
        with pq.ParquetFile(file) as table:
            # Over all row groups at once, what was unpacked stays in memory until the end.
            for group in range(table.num_row_groups):
                yield from table.iter_batches(ROWS_AT_ONCE, row_groups=[group])
        return
    # Not mapped: of a file cut short the missing part would end the process by a signal (SIGBUS).
    with pa.OSFile(str(file)) as opened:
        for batch in _arrow_batches(opened):
            yield from (batch.slice(start, ROWS_AT_ONCE) for start in range(0, batch.num_rows, ROWS_AT_ONCE))


def _arrow_batches(opened: Any) -> Iterator[Any]:
    """Batches of either of Arrow's two layouts: a stream, which ``datasets`` writes, or a file."""
    is_file = opened.read(len(_ARROW_FILE)) == _ARROW_FILE
    opened.seek(0)
    if not is_file:
        yield from pa.ipc.open_stream(opened)
        return
    batches = pa.ipc.open_file(opened)
    for index in range(batches.num_record_batches):
        yield batches.get_batch(index)


def _schema(file: Path) -> Any:
    try:
        if file.suffix.lower() == ".parquet":
            return pq.read_schema(file)
        batch = next(_batches(file), None)
        return batch.schema if batch is not None else pa.schema({})
    except (OSError, pa.ArrowException):
        return pa.schema({})


def _columns(file: Path) -> list[str]:
    return list(_schema(file).names)


def _features(file: Path) -> dict[str, Any]:
    """What ``datasets`` noted about the columns when it wrote a file; nothing where something else did."""
    schema = _schema(file)
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    try:
        return dict(datasets.Features.from_arrow_schema(schema))
    except (KeyError, TypeError, ValueError):  # of a kind that this version of datasets does not know
        return {}


def _class_names(feature: Any) -> list[str]:
    """The names of the first ``ClassLabel`` inside a feature; none where there is none."""
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    inside = list(feature.values()) if isinstance(feature, dict) else [getattr(feature, "feature", None)]
    return next((names for one in inside if one is not None and (names := _class_names(one))), [])


def _files(path: Path) -> dict[str, list[Path]]:
    """Split name -> files in order; the name is empty where nothing names one."""
    if path.is_file():
        return {"": [path]} if path.suffix.lower() in SUFFIXES else {}
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
    return found


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
    files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in SUFFIXES]
    # The caches of datasets.map lie beside what save_to_disk wrote.
    return [file for file in files if not file.name.startswith("cache-")]


FORMAT = Format(
    name="tables",
    looks_like="Parquet or Arrow files, or a saved Hugging Face data set, with columns such as 'image' and 'text'",
    detect=detect,
    splits=splits,
    load=load,
    asks=(),
)
