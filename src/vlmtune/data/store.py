"""Samples to the rows of a data set, a few thousand at a time: small ones in memory, large ones in a file.

Shape legend: N rows.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import Sample, meta_text
from vlmtune.data.scratch import folder

logger = logging.getLogger("vlmtune.data")

IMAGE = pa.struct({"path": pa.string(), "bytes": pa.binary()})
PART = pa.struct({"type": pa.string(), "text": pa.string()})
MESSAGE = pa.struct({"role": pa.string(), "content": pa.list_(PART)})
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "images": pa.list_(IMAGE),
        "messages": pa.list_(MESSAGE),
        "references": pa.list_(pa.string()),
        "meta": pa.string(),
    }
)
ROWS_AT_ONCE = 2_000
# Images given as bytes make rows large; no more than this many bytes are collected before they are written.
BYTES_AT_ONCE = 32 << 20


class Store:
    """Collects samples into a data set; more than ``ROWS_AT_ONCE`` of them lie in a temporary file.

    The file is memory-mapped, so rows cost memory only while they are read. It lies where ``TMPDIR`` says and goes
    with the process.
    """

    def __init__(self) -> None:
        self._tables: list[pa.Table] = []
        self._writer: Any = None
        self._path: Path | None = None
        self._contents: list[npt.NDArray[np.int64]] = []
        self._ids: list[npt.NDArray[np.int64]] = []

    def add_all(self, samples: Iterable[Sample], quarantine: Quarantine) -> None:
        """Add samples; those with a text that is no Unicode are set aside."""
        for chunk in _chunks(samples):
            try:
                table = table_of(chunk)
            except UnicodeEncodeError:
                chunk = [one for one in chunk if _is_unicode(one, quarantine)]
                table = table_of(chunk)
            self._contents.append(np.array([hash((one.images, one.messages)) for one in chunk], dtype=np.int64))
            self._ids.append(np.array([hash(one.id) for one in chunk], dtype=np.int64))
            self._add(table)

    def _add(self, table: pa.Table) -> None:
        if self._writer is None and not self._tables:
            self._tables.append(table)
            return
        if self._writer is None:
            self._path = Path(tempfile.mkstemp(suffix=".arrow", dir=folder())[1])
            self._writer = pa.ipc.new_stream(str(self._path), SCHEMA)
            self._writer.write_table(self._tables.pop())
        self._writer.write_table(table)

    def dataset(self) -> datasets.Dataset:
        """Return the rows; nothing can be added after that."""
        if self._writer is None:
            return datasets.Dataset(self._tables[0] if self._tables else SCHEMA.empty_table())
        self._writer.close()
        return datasets.Dataset.from_file(str(self._path))

    def repeats(self, dataset: datasets.Dataset, quarantine: Quarantine) -> npt.NDArray[np.bool_]:
        """Set aside rows that repeat the images and texts of an earlier one.

        Returns:
            (N,) which of them do.
        """
        if not self._contents:
            return np.zeros(0, dtype=bool)
        first = _first_of(np.concatenate(self._contents))
        repeated: npt.NDArray[np.bool_] = first != np.arange(len(first))
        for index in np.flatnonzero(repeated).tolist():
            other = dataset[int(first[index])]["id"]
            quarantine.add(dataset[index]["id"], "duplicate", f"it has the same images and texts as {other}")
        return repeated

    def with_own_ids(self, dataset: datasets.Dataset, passed_over: npt.NDArray[np.bool_]) -> datasets.Dataset:
        """Return the rows with an id of its own each: of LLaVA's, all rows about an image have one id.

        Args:
            dataset: the rows.
            passed_over: (N,) which of them are not used.
        """
        places = np.flatnonzero(~passed_over)
        first = _first_of(np.concatenate(self._ids)[places]) if self._ids else places
        again = places[first != np.arange(len(places))].tolist()
        if not again:
            return dataset
        ids = dataset["id"][:]
        taken, counts = set(ids), Counter[str]()
        for index in again:
            name = ids[index]
            while ids[index] in taken:
                counts[name] += 1
                ids[index] = f"{name}#{counts[name] + 1}"
            taken.add(ids[index])
        logger.info(
            "%d rows have the id of another; they are called by a number besides: %s", len(again), ids[again[0]]
        )
        return dataset.remove_columns("id").add_column("id", ids).select_columns(SCHEMA.names)


def discard(dataset: datasets.Dataset) -> None:
    """Delete the temporary file that holds the rows of a store's data set, where there is one."""
    for file in dataset.cache_files:
        if Path(file["filename"]).parent == Path(folder()):
            Path(file["filename"]).unlink(missing_ok=True)


def table_of(samples: Sequence[Sample]) -> pa.Table:
    """Return the rows of samples, as :meth:`~vlmtune.data.sample.Sample.to_row` gives them, as one table."""
    images = [one.images for one in samples]
    messages = [one.messages for one in samples]
    contents = [message.parts for one in messages for message in one]
    references = [one.references for one in samples]
    parts = list(chain.from_iterable(contents))
    refs = list(chain.from_iterable(images))
    roles = [message.role for one in messages for message in one]
    content = _lists(contents, _structs(PART, [[part.type for part in parts], [part.text for part in parts]]))
    columns = [
        pa.array([one.id for one in samples], pa.string()),
        _lists(images, _structs(IMAGE, [[ref.path for ref in refs], [ref.bytes for ref in refs]])),
        _lists(messages, pa.StructArray.from_arrays([pa.array(roles, pa.string()), content], fields=list(MESSAGE))),
        _lists(references, pa.array(chain.from_iterable(references), pa.string())),
        pa.array([meta_text(one.meta) for one in samples], pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _chunks(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    iterator = iter(samples)
    chunk: list[Sample] = []
    size = 0
    for sample in iterator:
        chunk.append(sample)
        size += sum(len(image.bytes) for image in sample.images if image.bytes is not None)
        if len(chunk) == ROWS_AT_ONCE or size >= BYTES_AT_ONCE:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _is_unicode(sample: Sample, quarantine: Quarantine) -> bool:
    try:
        table_of([sample])
    except UnicodeEncodeError:
        name = sample.id.encode("utf-8", "replace").decode()
        quarantine.add(name, "unreadable row", "it has a text with half a character (a lone surrogate)")
        return False
    return True


def _structs(kind: Any, columns: Sequence[Sequence[Any]]) -> Any:
    arrays = [pa.array(values, field.type) for values, field in zip(columns, kind, strict=True)]
    return pa.StructArray.from_arrays(arrays, fields=list(kind))


def _lists(rows: Sequence[Sequence[Any]], values: Any) -> Any:
    lengths = np.fromiter(map(len, rows), dtype=np.int32, count=len(rows))
    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), values)


def _first_of(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(N,) index of the first place of each value."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return first[inverse]
