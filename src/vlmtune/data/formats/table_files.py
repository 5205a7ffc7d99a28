"""Rows of Parquet, Arrow and CSV files, read in batches, and what the files say of their columns."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from vlmtune.data.formats.files import NO_TEXT, is_text
from vlmtune.data.quarantine import Quarantine
from vlmtune.errors import DataError

BINARY = (".parquet", ".arrow")
TEXT = (".csv", ".tsv")
# What a file of Arrow's begins with where it is no stream.
_ARROW_FILE = b"ARROW1"
# Rows with their images' bytes: a few hundred megabytes at most.
ROWS_AT_ONCE = 256
_SEPARATORS = (",", ";", "\t", "|")
_LONGEST_CELL = 1 << 24


def columns_of(file: Path) -> list[str]:
    """Return the names of a file's columns; none where it cannot be read."""
    if file.suffix.lower() in TEXT:
        return _header(file)[0]
    return list(_schema(file).names)


def features_of(file: Path) -> dict[str, Any]:
    """What ``datasets`` noted about the columns when it wrote a file; nothing where something else did."""
    schema = pa.schema({}) if file.suffix.lower() in TEXT else _schema(file)
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    try:
        return dict(datasets.Features.from_arrow_schema(schema))
    except (KeyError, TypeError, ValueError):  # of a kind that this version of datasets does not know
        return {}


def table_rows(file: Path, quarantine: Quarantine) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the content of every row; lines of CSV that are none are set aside.

    Raises:
        DataError: the file is damaged.
    """
    if file.suffix.lower() in TEXT:
        yield from _csv_rows(file, quarantine)
        return
    index = 0
    try:
        for batch in _batches(file):
            # Places that a damaged file names outside of itself would be read all the same.
            batch.validate(full=True)
            for row in batch.to_pylist():
                yield f"{file.name}, row {index}", row
                index += 1
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read from row {index} on ({error}). Download or write it again.") from error


def _csv_rows(file: Path, quarantine: Quarantine) -> Iterator[tuple[str, dict[str, Any]]]:
    columns, separator, encoding = _header(file)
    with file.open(encoding=encoding, errors="surrogateescape", newline="") as opened:
        csv.field_size_limit(_LONGEST_CELL)
        reader = csv.reader(opened, delimiter=separator)
        try:
            next(reader, None)
            for cells in reader:
                place = f"{file.name}, line {reader.line_num}"
                if not cells:
                    continue
                if len(cells) != len(columns):
                    quarantine.add(place, "unreadable row", f"it has {len(cells)} of the {len(columns)} columns")
                elif not all(map(is_text, cells)):
                    quarantine.add(place, "unreadable row", NO_TEXT)
                else:
                    yield place, {name: cell or None for name, cell in zip(columns, cells, strict=True)}
        except (csv.Error, UnicodeError) as error:
            raise DataError(f"{file} cannot be read from line {reader.line_num} on ({error}).") from error


def _header(file: Path) -> tuple[list[str], str, str]:
    """Columns, separator and encoding of a CSV file; Excel writes semicolons, tabs and UTF-16 in some countries."""
    try:
        with file.open("rb") as opened:
            head = opened.read(100_000)
    except OSError:
        head = b""
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    text = head[: len(head) // 2 * 2].decode(encoding, "ignore")
    line = text.split("\n", 1)[0]
    separator = max(_SEPARATORS, key=line.count)
    try:
        columns = next(csv.reader(io.StringIO(text, newline=""), delimiter=separator), [])
    except csv.Error:
        columns = []
    return [column.strip() for column in columns], separator, encoding


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
