"""What data is converted to: each target writes rows and the images' bytes as they are, and names its files."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vlmtune.data.images import EXTENSIONS, content_of
from vlmtune.data.sample import ImageRef, Message, Sample, meta_text
from vlmtune.data.store import PART

# Row groups of Parquet files: small enough to be unpacked one at a time.
GROUP_BYTES, GROUP_ROWS = 32 << 20, 1000
_PARQUET = pa.schema(
    {
        "id": pa.string(),
        "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.list_(PART)})),
        "references": pa.list_(pa.string()),
        "meta": pa.string(),
    }
)


class Target(Protocol):
    """Writes the samples of one split after the other."""

    def add(self, split: str, sample: Sample) -> None:
        """Write a sample.

        Raises:
            ImageError: one of its images cannot be read; nothing of the sample was written.
        """

    def close(self) -> None:
        """Write what is left."""


def row_of(sample: Sample, images: Sequence[Any]) -> dict[str, Any]:
    """Return a sample as a row of messages, which every target holds."""
    return {
        "id": sample.id,
        "messages": [{"role": one.role, "content": _content(one)} for one in sample.messages],
        "images": list(images),
        "references": list(sample.references),
        "meta": sample.meta,
    }


def _content(message: Message) -> str | list[dict[str, str]]:
    if len(message.parts) == 1 and message.parts[0].type == "text":
        return message.text
    return [part.to_template() for part in message.parts]


class MessagesTarget:
    """``SPLIT.jsonl`` files, and the images in ``images/`` under the names they had."""

    def __init__(self, folder: Path, *, shard_bytes: int, keep_images: bool) -> None:
        del shard_bytes
        self._folder, self._keep = folder, keep_images
        self._files: dict[str, Any] = {}
        self._names: dict[ImageRef, str] = {}
        self._contents: dict[str, str] = {}

    def add(self, split: str, sample: Sample) -> None:
        """Write a line, and the images that are new."""
        names = [self._name(ref) for ref in sample.images]
        if split not in self._files:
            self._files[split] = (self._folder / f"{split}.jsonl").open("w", encoding="utf-8")
        self._files[split].write(json.dumps(row_of(sample, names), ensure_ascii=False) + "\n")

    def _name(self, ref: ImageRef) -> str:
        if self._keep and ref.path is not None and ref.bytes is None:
            return ref.path
        if ref in self._names:
            return self._names[ref]
        content = content_of(ref)
        digest = hashlib.sha256(content).hexdigest()
        name = f"images/{file_name(ref, content, digest)}"
        if self._contents.get(name.lower(), digest) != digest:
            name = f"images/{digest[:16]}{Path(name).suffix}"
        if name.lower() not in self._contents:
            path = self._folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            self._contents[name.lower()] = digest
        if ref.bytes is None:
            self._names[ref] = name
        return name

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


class ParquetTarget:
    """``SPLIT-00000.parquet`` files with the images' bytes inside, of about ``shard_bytes`` each."""

    def __init__(self, folder: Path, *, shard_bytes: int, keep_images: bool) -> None:
        del keep_images
        self._folder, self._most = folder, shard_bytes
        self._writers: dict[str, Any] = {}
        self._numbers: dict[str, int] = {}
        self._written: dict[str, int] = {}
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._sizes: dict[str, int] = {}

    def add(self, split: str, sample: Sample) -> None:
        """Collect a row; a full group is written."""
        contents = [content_of(ref) for ref in sample.images]
        names = [ref.filename or None for ref in sample.images]
        row = sample.to_row() | {
            "images": [{"bytes": content, "path": name} for content, name in zip(contents, names, strict=True)],
            "meta": meta_text(sample.meta),
        }
        self._rows.setdefault(split, []).append(row)
        self._sizes[split] = self._sizes.get(split, 0) + sum(map(len, contents))
        if self._sizes[split] >= min(GROUP_BYTES, self._most) or len(self._rows[split]) >= GROUP_ROWS:
            self._flush(split)

    def _flush(self, split: str) -> None:
        rows, size = self._rows.pop(split, []), self._sizes.pop(split, 0)
        if not rows:
            return
        if split in self._writers and self._written[split] + size > self._most:
            self._writers.pop(split).close()
        if split not in self._writers:
            number = self._numbers[split] = self._numbers.get(split, -1) + 1
            self._writers[split] = pq.ParquetWriter(self._folder / f"{split}-{number:05d}.parquet", _PARQUET)
            self._written[split] = 0
        self._writers[split].write_table(pa.Table.from_pylist(rows, schema=_PARQUET))
        self._written[split] += size

    def close(self) -> None:
        """Write the last groups and close the files."""
        for split in list(self._rows):
            self._flush(split)
        for writer in self._writers.values():
            writer.close()


class WebDatasetTarget:
    """``SPLIT-000000.tar`` shards; rows about the same images that follow each other share a key."""

    def __init__(self, folder: Path, *, shard_bytes: int, keep_images: bool) -> None:
        del keep_images
        self._folder, self._most = folder, shard_bytes
        self._split = ""
        self._pending: list[Sample] = []
        self._contents: list[tuple[str, bytes]] = []
        self._shard: tarfile.TarFile | None = None
        self._numbers: dict[str, int] = {}
        self._keys = 0

    def add(self, split: str, sample: Sample) -> None:
        """Collect rows of the same images; those before are written."""
        if split != self._split or not self._pending or self._pending[0].images != sample.images or not sample.images:
            # Read first, so that an image that cannot be read leaves nothing behind.
            contents = [self._named(ref) for ref in sample.images]
            self._flush()
            if split != self._split:
                self._next_shard(split)
            self._contents = contents
        self._pending.append(sample)

    @staticmethod
    def _named(ref: ImageRef) -> tuple[str, bytes]:
        content = content_of(ref)
        return Path(file_name(ref, content, "image")).suffix, content

    def _flush(self) -> None:
        if not self._pending:
            return
        rows = [row_of(sample, ()) for sample in self._pending]
        for row in rows:
            del row["images"]
        text = json.dumps(rows if len(rows) > 1 else rows[0], ensure_ascii=False).encode()
        size = len(text) + sum(len(content) for _, content in self._contents)
        if self._shard is None or (self._shard.offset and self._shard.offset + size > self._most):
            self._next_shard(self._split)
        key = f"{self._keys:09d}"
        self._keys += 1
        for number, (suffix, content) in enumerate(self._contents):
            middle = f".{number}" if len(self._contents) > 1 else ""
            self._write(f"{key}{middle}{suffix}", content)
        self._write(f"{key}.json", text)
        self._pending, self._contents = [], []

    def _write(self, name: str, content: bytes) -> None:
        assert self._shard is not None
        # Without times and owners, so that the same data give the same shard.
        info = tarfile.TarInfo(name)
        info.size = len(content)
        self._shard.addfile(info, io.BytesIO(content))
        self._shard.members = []  # type: ignore[attr-defined]

    def _next_shard(self, split: str) -> None:
        if self._shard is not None:
            self._shard.close()
        self._split = split
        number = self._numbers[split] = self._numbers.get(split, -1) + 1
        self._shard = tarfile.open(self._folder / f"{split}-{number:06d}.tar", "w")  # noqa: SIM115

    def close(self) -> None:
        """Write the last rows and close the shard."""
        self._flush()
        if self._shard is not None:
            self._shard.close()


def file_name(ref: ImageRef, content: bytes, digest: str) -> str:
    """Return the name that an image had, with an ending that is an image's; by its digest where it had none."""
    name = ref.filename
    if Path(name).suffix.lower() in EXTENSIONS:
        return name
    with Image.open(io.BytesIO(content)) as opened:
        kind = (opened.format or "").lower()
    suffix = {"jpeg": ".jpg", "tiff": ".tif"}.get(kind, f".{kind}")
    return f"{name or digest[:16]}{suffix if suffix in EXTENSIONS else '.png'}"


TARGETS: Mapping[str, type[MessagesTarget | ParquetTarget | WebDatasetTarget]] = {
    "messages": MessagesTarget,
    "parquet": ParquetTarget,
    "webdataset": WebDatasetTarget,
}
