"""A data set's fingerprint, from its Arrow columns: a million texts take a few seconds.

Shape legend: N rows.
"""

from __future__ import annotations

import hashlib
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlmtune.data.pages import batches
from vlmtune.data.sample import ImageRef

COLUMNS = ["id", "images", "messages", "references"]
ROWS_AT_ONCE = 1_000


def fingerprint(dataset: datasets.Dataset) -> str:
    """Return a hash of the rows' contents and order (of image names, not pixels), the same on every machine."""
    digest = hashlib.sha256()
    for _, batch in batches(dataset, COLUMNS, ROWS_AT_ONCE):
        for name in COLUMNS:
            column = batch[name].combine_chunks()
            if name == "images":
                column = _names(column)
            _add(digest, column)
    return digest.hexdigest()[:16]


def _names(images: Any) -> Any:
    """(N,) lists of images -> (N,) lists of their files' names, or of the hashes of those given as bytes."""
    known: dict[str, str] = {}

    def name(image: dict[str, Any]) -> str:
        path = image.get("path")
        if not path:
            return hashlib.sha256(image["bytes"]).hexdigest()
        if path not in known:
            known[path] = ImageRef(path).filename
        return known[path]

    return pa.array([[name(image) for image in row] for row in images.to_pylist()], pa.list_(pa.string()))


def _add(digest: Any, array: Any) -> None:
    """Add values whatever the layout of their buffers: the lengths of lists and texts, then what they hold."""
    kind = array.type
    if pa.types.is_struct(kind):
        for index in sorted(range(kind.num_fields), key=lambda index: kind.field(index).name):
            _add(digest, array.flatten()[index])
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        digest.update(_lengths(pc.list_value_length(array)))
        _add(digest, array.flatten())
    elif pa.types.is_null(kind):
        digest.update(np.full(len(array), -1, dtype="<i8").tobytes())
    else:
        digest.update(_lengths(pc.binary_length(array)))
        digest.update("".join(array.fill_null("").to_pylist()).encode())


def _lengths(lengths: Any) -> bytes:
    """-1 stands for what is absent."""
    return bytes(lengths.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False).astype("<i8").tobytes())
