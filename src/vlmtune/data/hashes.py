"""Content hashes of many images: in parallel, and remembered on disk for files that have not changed since.

A file counts as unchanged while its size and its time of change are the same, as for make, rsync and git. What must
never be stale (features kept under a hash) is hashed anew by its writer.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import chain
from pathlib import Path

import datasets

from vlmtune.data import archives
from vlmtune.data.images import content_hash
from vlmtune.data.pages import batches
from vlmtune.data.sample import ImageRef

logger = logging.getLogger("vlmtune.data")

ROWS_AT_ONCE = 1_000
# A thread's share: handing over an image takes as long as hashing a small one.
IMAGES_AT_ONCE = 16
# Each write to the database waits for the disk.
WRITTEN_AT_ONCE = 10_000
# A file changed this lately could change again within one tick of its clock, unseen.
SETTLED_NS = 2_000_000_000

_TABLE = (
    "CREATE TABLE IF NOT EXISTS hashes (path TEXT PRIMARY KEY, size INTEGER, changed INTEGER, hash BLOB) WITHOUT ROWID"
)
_State = tuple[int, int]


def user_cache_dir() -> Path:
    """The user's cache folder of vlmtune (``XDG_CACHE_HOME`` is honoured)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmtune"


class Hasher:
    """Hashes images; use it in a ``with``.

    Args:
        memory: the file that hashes are remembered in; by default one in the user's cache folder. Where it cannot be
            used, every image is hashed anew.
        remember: whether there is one at all.
    """

    def __init__(self, memory: Path | None = None, *, remember: bool = True) -> None:
        self._memory = memory or user_cache_dir() / "hashes.sqlite3"
        self._pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        self._database: sqlite3.Connection | None = None
        self._new: list[tuple[str | None, int, int, bytes]] = []
        if not remember:
            return
        try:
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self._memory, timeout=5)
            self._database.execute(_TABLE)
        except (OSError, sqlite3.Error) as error:
            self._forget(error)

    def __enter__(self) -> Hasher:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self._write()
        if self._database is not None:
            self._database.close()

    def hashes(self, images: Sequence[ImageRef]) -> list[str]:
        """Return each image's :func:`~vlmtune.data.images.content_hash`.

        Raises:
            ImageError: an image cannot be read.
        """
        states = {image.path: state for image in images if image.bytes is None and (state := _state(image.path))}
        known = self._known(states)
        absent = [image for image in images if image.bytes is not None or image.path not in known]
        slices = [absent[start : start + IMAGES_AT_ONCE] for start in range(0, len(absent), IMAGES_AT_ONCE)]
        new = dict(zip(absent, chain.from_iterable(self._pool.map(_hashes, slices)), strict=True))
        self._remember({image.path: value for image, value in new.items() if image.path in states}, states)
        return [new[image] if image in new else known[image.path] for image in images]

    def _known(self, states: dict[str | None, _State]) -> dict[str | None, str]:
        if self._database is None or not states:
            return {}
        marks = ", ".join("?" * len(states))
        try:
            with closing(
                self._database.execute(
                    f"SELECT path, size, changed, hash FROM hashes WHERE path IN ({marks})", list(states)
                )
            ) as rows:
                return {path: value.hex() for path, size, changed, value in rows if states[path] == (size, changed)}
        except sqlite3.Error as error:
            self._forget(error)
            return {}

    def _remember(self, hashes: dict[str | None, str], states: dict[str | None, _State]) -> None:
        latest = time.time_ns() - SETTLED_NS
        self._new += [
            (path, *states[path], bytes.fromhex(value)) for path, value in hashes.items() if states[path][1] < latest
        ]
        if len(self._new) >= WRITTEN_AT_ONCE:
            self._write()

    def _write(self) -> None:
        rows, self._new = self._new, []
        if self._database is None or not rows:
            return
        try:
            with self._database:
                self._database.executemany("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?)", rows)
        except sqlite3.Error as error:
            self._forget(error)

    def _forget(self, error: Exception) -> None:
        logger.info("image hashes are not remembered: %s cannot be used (%s)", self._memory, error)
        self._database = None


def row_hashes(dataset: datasets.Dataset, *, remember: bool = True) -> Iterator[list[list[str]]]:
    """Yield the content hashes of the images of each row, in batches of rows; ``remember`` is :class:`Hasher`'s.

    Raises:
        ImageError: an image cannot be read.
    """
    found: dict[int, bytes] = {}
    with Hasher(remember=remember) as hasher:
        for _, batch in batches(dataset, ["images"], ROWS_AT_ONCE):
            rows = [[ImageRef(**image) for image in row] for row in batch["images"].to_pylist()]
            new = _new(rows, found)
            of_batch = dict(zip(new, hasher.hashes(new), strict=True))
            # By the hash of its path: the paths of millions of images take gigabytes.
            found |= {hash(ref): bytes.fromhex(value) for ref, value in of_batch.items() if ref.bytes is None}
            yield [[of_batch.get(ref) or found[hash(ref)].hex() for ref in row] for row in rows]


def _hashes(images: Sequence[ImageRef]) -> list[str]:
    return [content_hash(image) for image in images]


def _new(rows: Iterable[Iterable[ImageRef]], found: dict[int, bytes]) -> list[ImageRef]:
    return [ref for ref in dict.fromkeys(chain.from_iterable(rows)) if hash(ref) not in found]


def _state(path: str | None) -> _State | None:
    """Size and time of change of a file or of the archive it lies in; ``None`` where there is none."""
    member = archives.parse(path or "")
    try:
        stat = os.stat(member.archive if member else path or "")  # noqa: PTH116 - a million Path objects take seconds
    except (OSError, ValueError):
        return None
    return stat.st_size, stat.st_mtime_ns
