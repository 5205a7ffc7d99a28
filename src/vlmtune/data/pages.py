"""Rows in batches of few bytes, whose pages are let go of once they were read.

Pages of a mapped file count as a process's memory as long as there is room for them: reading a file through once would
seem to take all of its size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import pyarrow as pa

from vlmtune.data import scratch

ROWS_AT_ONCE = 4_000
# Rows with images in them are large; as Python's objects they are held once more.
BYTES_AT_ONCE = 32 << 20
_DONTNEED = 4


def batches(
    dataset: datasets.Dataset, columns: Sequence[str], rows_at_once: int = ROWS_AT_ONCE
) -> Iterator[tuple[int, pa.Table]]:
    """Yield some columns of a data set, so many rows at once that they are of no more than about ``BYTES_AT_ONCE``.

    Yields:
        the first row's index, and the rows.
    """
    rows = _rows_at_once(dataset, rows_at_once)
    chosen = dataset.select_columns(list(columns)).with_format("arrow")
    read = 0
    for start in range(0, len(dataset), rows):
        batch = chosen[start : start + rows]
        yield start, batch
        read += batch.nbytes
        del batch
        if read > BYTES_AT_ONCE:
            let_go()
            read = 0


def number_of_batches(dataset: datasets.Dataset, rows_at_once: int = ROWS_AT_ONCE) -> int:
    """Return how many batches of all of a data set's columns :func:`batches` yields."""
    return -(-len(dataset) // _rows_at_once(dataset, rows_at_once))


def _rows_at_once(dataset: datasets.Dataset, most: int) -> int:
    table: pa.Table = dataset.data
    return max(1, min(most, len(table) * BYTES_AT_ONCE // max(int(table.nbytes), 1)))


def let_go() -> None:
    """Let go of what was read of this process's files of rows; it is read anew where it is needed again."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:  # another system than Linux
        return
    libc = ctypes.CDLL(None)
    for line in maps.splitlines():
        if scratch.folder() in line:
            start, end = (int(text, 16) for text in line.split(maxsplit=1)[0].split("-"))
            # Read-only pages of a file: none of them holds anything that is not in the file.
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)
