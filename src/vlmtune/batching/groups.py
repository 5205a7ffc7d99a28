"""Rows that share their images, as flat arrays: ten million groups take megabytes, and no list of them is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

Ints = npt.NDArray[np.int64]
Keys: TypeAlias = Sequence[str] | pa.Array | pa.ChunkedArray

KEYS_AT_ONCE = 1 << 16


def grouped(keys: Keys, *, with_empty: bool = True) -> tuple[Ints, Ints]:
    """Return the rows sorted by group, groups in the order of first sight, and where each begins.

    Keys are told apart by 64 bits of hash: that two of ten million are taken for one has a chance of 3 in a million,
    and costs no more than two images in one group.

    Args:
        keys: a name for each row; equal names form a group, empty ones a group of one. An Arrow array spares the
            memory of Python strings.
        with_empty: whether rows with an empty key are among the groups.

    Returns:
        ``members`` and ``starts``; group ``i`` is ``members[starts[i]:starts[i + 1]]``.
    """
    codes, empty = _codes(keys)
    members = np.argsort(codes, kind="stable")
    if not with_empty:
        members = members[~empty[members]]
    if not len(members):
        return members, np.zeros(1, np.int64)
    codes = codes[members]
    starts = np.concatenate([[0], np.flatnonzero(codes[1:] != codes[:-1]) + 1])
    del codes
    firsts = np.argsort(members[starts], kind="stable")
    sizes = np.diff(np.append(starts, len(members)))[firsts]
    return members[ranges(starts[firsts], sizes)], np.concatenate([[0], np.cumsum(sizes)])


def ranges(starts: Ints, sizes: Ints) -> Ints:
    """``start, start + 1, ...`` of each range, one after another."""
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()))


def _codes(keys: Keys) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """A number for each row, equal for equal keys, empty keys one of their own each; and which are empty."""
    codes, empty = np.empty(len(keys), np.uint64), np.empty(len(keys), np.bool_)
    done = 0
    for block in _blocks(keys):
        values = block.to_numpy(zero_copy_only=False)
        rows = slice(done, done + len(values))
        empty[rows] = values == ""
        own = pd.util.hash_array(np.arange(rows.start, rows.stop))
        codes[rows] = np.where(empty[rows], own, pd.util.hash_array(values, categorize=False))
        done = rows.stop
    return codes, empty


def _blocks(keys: Keys) -> Iterator[pa.Array]:
    if not isinstance(keys, pa.Array | pa.ChunkedArray):
        keys = pa.array(keys, pa.string())
    for chunk in keys.chunks if isinstance(keys, pa.ChunkedArray) else [keys]:
        for start in range(0, len(chunk), KEYS_AT_ONCE):
            yield chunk.slice(start, KEYS_AT_ONCE)
