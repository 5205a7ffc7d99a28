"""Parquet and Arrow files, and data sets that Hugging Face's ``datasets`` saved.

A file, a folder of files (split by their names, as in ``train-00000-of-00003.parquet``, also in ``data/``), or a
folder of ``save_to_disk``. Rows have the columns of any JSON row (``messages``, ``prompt`` and ``completion``,
``question`` and ``answer``, ``image`` and ``text``); images are bytes or paths. Files are read in batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlmtune.data.formats.base import Format, Source
from vlmtune.data.formats.files import chosen, id_prefix, samples_of, shard_split
from vlmtune.data.formats.rows import make_sample, shape_of
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import Sample
from vlmtune.errors import DataError

SUFFIXES = (".parquet", ".arrow")
# Rows with their images' bytes: a few hundred megabytes at most.
ROWS_AT_ONCE = 256


def detect(path: Path) -> bool:
    """Whether ``path`` is such a file with columns that are known, or a folder that holds some."""
    return any(shape_of(_columns(files[0])) for files in _files(path).values())


def splits(path: Path) -> tuple[str, ...]:
    """Names of the splits: of the files, or of the folders of a saved ``DatasetDict``."""
    return tuple(name for name in _files(path) if name)


def load(source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    """Yield one sample a row."""
    for split, files in chosen(source, _files(source.path)):
        first = 0
        for file in files:
            yield from _load_file(file, first, id_prefix(split), source, quarantine)
            first += _count(file)


def _load_file(file: Path, first: int, prefix: str, source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    images = source.image_dir or file.parent

    def make(_: str, item: tuple[int, Any]) -> Sample:
        return make_sample(item[1], f"{prefix}{item[0]}", images, prompt=source.prompt)

    yield from samples_of(_rows(file, first), make, quarantine)


def _rows(file: Path, first: int) -> Iterator[tuple[str, tuple[int, Any]]]:
    index = 0
    try:
        for batch in _batches(file):
            for row in batch.to_pylist():
                yield f"{file.name}, row {index}", (first + index, row)
                index += 1
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read from row {index} on ({error}). Download or write it again.") from error


def _batches(file: Path) -> Iterator[Any]:
    if file.suffix.lower() == ".parquet":
        with pq.ParquetFile(file) as table:
            yield from table.iter_batches(ROWS_AT_ONCE)
        return
    with pa.memory_map(str(file)) as mapped:
        for batch in _arrow_batches(mapped):
            yield from (batch.slice(start, ROWS_AT_ONCE) for start in range(0, batch.num_rows, ROWS_AT_ONCE))


def _arrow_batches(mapped: Any) -> Iterator[Any]:
    """Batches of either of Arrow's two layouts: a stream, which ``datasets`` writes, or a file."""
    try:
        yield from pa.ipc.open_stream(mapped)
    except pa.ArrowInvalid:
        mapped.seek(0)
        opened = pa.ipc.open_file(mapped)
        for index in range(opened.num_record_batches):
            yield opened.get_batch(index)


def _count(file: Path) -> int:
    if file.suffix.lower() == ".parquet":
        return int(pq.read_metadata(file).num_rows)
    return sum(batch.num_rows for batch in _batches(file))


def _columns(file: Path) -> list[str]:
    try:
        if file.suffix.lower() == ".parquet":
            return list(pq.read_schema(file).names)
        batch = next(_batches(file), None)
        return list(batch.schema.names) if batch is not None else []
    except (OSError, pa.ArrowException):
        return []


def _files(path: Path) -> dict[str, list[Path]]:
    """Split name -> files in order; the name is empty where nothing names one."""
    if path.is_file():
        return {"": [path]} if path.suffix.lower() in SUFFIXES else {}
    if (path / "dataset_dict.json").is_file():
        saved = {folder.name: _in_folder(folder) for folder in sorted(path.iterdir()) if folder.is_dir()}
        return {name: files for name, files in saved.items() if files}
    if (path / "state.json").is_file():
        return {"": _in_folder(path)}
    found: dict[str, list[Path]] = {}
    for file in _in_folder(path) or _in_folder(path / "data"):
        found.setdefault(shard_split(file), []).append(file)
    return found


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
