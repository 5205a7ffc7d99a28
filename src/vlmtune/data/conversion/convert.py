"""Convert data: every row is checked, written and named in a manifest; the folder appears whole or not at all."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlmtune.data import images
from vlmtune.data.conversion.targets import TARGETS, Target, row_of
from vlmtune.data.formats.files import RowError
from vlmtune.data.formats.rows import make_sample
from vlmtune.data.loading import load_samples
from vlmtune.data.quarantine import BadRow
from vlmtune.data.recognition import choose_format, resolve
from vlmtune.data.sample import ImageRef, Sample
from vlmtune.errors import DataError, ImageError, OutputError, nearest

MANIFEST = "manifest.json"
# The split's name where the data name none.
WHOLE = "data"
# Called with (rows done, rows in all).
Progress = Callable[[int, int], None]


@dataclass
class _Split:
    """What became of a split's rows."""

    read: int = 0
    written: int = 0
    left_out: list[BadRow] = field(default_factory=list)


def convert(
    path: str | Path,
    output: str | Path,
    target: str,
    *,
    format: str = "auto",
    split: str | None = None,
    image_dir: str | Path | None = None,
    prompt: str | None = None,
    columns: Sequence[str] = (),
    max_bad_fraction: float = 0.01,
    verify_images: images.Check = "full",
    max_pixels: int | None = None,
    allow_remote_images: bool = False,
    private_image_hosts: Sequence[str] = (),
    keep_images: bool = False,
    shard_mb: int = 256,
    progress: Callable[[str], Progress] | None = None,
) -> dict[str, Any]:
    """Convert data into a new folder.

    Args:
        path: a folder or file of any known format.
        output: the folder to make; it appears when all of it has been written.
        target: ``messages``, ``parquet`` or ``webdataset``.
        format: the data's format, or ``auto``.
        split: the split to convert; by default all that the data name.
        image_dir: as :func:`~vlmtune.data.loading.load_samples`.
        prompt: as there.
        columns: as there.
        max_bad_fraction: largest share of rows that may be left out.
        verify_images: how images are checked; ``full`` by default, so that none is written that cannot be decoded.
        max_pixels: larger images are left out.
        allow_remote_images: as for :func:`vlmtune.data.loading.load_samples`.
        private_image_hosts: as there.
        keep_images: with ``messages``, name the images where they lie instead of copying them.
        shard_mb: about how many megabytes a file of the other targets holds.
        progress: makes a progress display of a title.

    Returns:
        The manifest.

    Raises:
        DataError: the data cannot be read, or too many rows are bad.
        OutputError: the folder is not empty, or cannot be written.
    """
    if target not in TARGETS:
        raise DataError(f"There is no target {target!r}; use {', '.join(TARGETS)}.{nearest(target, TARGETS)}")
    place = resolve(path)
    chosen = choose_format(place, format)
    names: list[str | None] = [split] if split is not None else [*chosen.splits(place)] or [None]
    counts: dict[str, _Split] = {}
    with _folder(Path(output)) as folder:
        writer = TARGETS[target](folder, shard_bytes=shard_mb << 20, keep_images=keep_images)
        for name in names:
            data = load_samples(
                path, format=chosen.name, split=name, image_dir=image_dir, prompt=prompt, columns=columns,
                max_bad_fraction=max_bad_fraction, verify_images=verify_images, max_pixels=max_pixels,
                allow_remote_images=allow_remote_images, private_image_hosts=private_image_hosts,
            )  # fmt: skip
            title = name or WHOLE
            found = counts[title] = _Split(len(data.dataset) + len(data.quarantine), 0, list(data.quarantine.rows))
            show = progress(f"Converting {title}") if progress else None
            for number, row in enumerate(data.dataset, 1):
                sample = Sample.from_row(row)
                problem = _write(writer, title, sample)
                if problem:
                    found.left_out.append(BadRow(sample.id, *problem))
                else:
                    found.written += 1
                if show:
                    show(number, len(data.dataset))
            if len(found.left_out) > max_bad_fraction * found.read:
                raise DataError(
                    f"{len(found.left_out):,} of {found.read:,} rows of {title} cannot be converted, more than "
                    f"max_bad_fraction {max_bad_fraction:g} allows; the last: {found.left_out[-1].reason}"
                )
        writer.close()
        manifest = _manifest(folder, str(path), chosen.name, target, counts)
        text = json.dumps(manifest, ensure_ascii=False, indent=1)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest


def _write(writer: Target, split: str, sample: Sample) -> tuple[str, str] | None:
    """Write a sample; returns kind and reason where that would lose something."""
    # Read back by the reader of every target: what it makes of the row must be the sample.
    names = [f"/{number}" for number in range(len(sample.images))]
    expected = replace(sample, images=tuple(ImageRef(name) for name in names))
    try:
        back = make_sample(json.loads(json.dumps(row_of(sample, names))), "", Path("/"))
    except RowError as error:
        return "cannot be held", f"messages cannot hold it: {error}"
    # Without references the last answer is one, in every format.
    if back != (expected if expected.references else replace(expected, references=back.references)):
        return "cannot be held", "it would be read back otherwise than it is"
    try:
        writer.add(split, sample)
    except ImageError as error:
        return "unreadable image", str(error)
    return None


@contextlib.contextmanager
def _folder(output: Path) -> Iterator[Path]:
    """Yield a folder beside ``output`` that takes its name at the end, or goes when anything fails."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output} exists already, and nothing in it will be overwritten. Choose another --output.")
    made = output.absolute().parent / f".{output.name}-{uuid.uuid4().hex[:8]}.part"
    try:
        made.mkdir(parents=True)
        yield made
        made.replace(output)
    except OSError as error:
        raise OutputError(
            f"{output} cannot be written ({error.strerror or error}). Choose another --output."
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _manifest(folder: Path, source: str, format: str, target: str, counts: dict[str, _Split]) -> dict[str, Any]:
    return {
        "made_by": f"vlmtune {version('vlmtune')}",
        "made_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "source": source,
        "format": format,
        "target": target,
        "splits": {
            name: {
                "rows_read": one.read,
                "rows_written": one.written,
                "left_out": len(one.left_out),
                "left_out_kinds": dict(Counter(row.kind for row in one.left_out)),
            }
            for name, one in counts.items()
        },
        "files": {
            str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        },
        "left_out": [
            {"split": name, "id": row.id, "kind": row.kind, "reason": row.reason}
            for name, one in counts.items()
            for row in one.left_out
        ],
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
