"""WebDataset: tar shards whose members of one key are one sample, ``0017.jpg`` beside ``0017.json`` or ``0017.txt``.

A file, or a folder of shards (``train-000000.tar``), split by their names. The key is the name up to the first dot
after the last slash. ``.json`` holds a row with any columns of JSON rows, or a list of rows about the same images; a
``.txt`` or ``.caption`` is a caption. Images stay in the shards: a sample names their places, so that rows can be drawn
in any order, texts share images across shards, and each process reads no more than the images of its own samples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, groupby
from pathlib import Path, PurePosixPath
from typing import Any

from vlmtune.data import archives
from vlmtune.data.archives import Member
from vlmtune.data.formats.base import Format, Source
from vlmtune.data.formats.columns import IMAGE_COLUMNS, shape_of
from vlmtune.data.formats.files import RowError, chosen, id_prefix, samples_of, shard_split, split_folders, visible
from vlmtune.data.formats.rows import make_samples
from vlmtune.data.images import EXTENSIONS
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import Sample
from vlmtune.errors import DataError

TEXTS = ("txt", "caption", "text")
# Members that are looked at to tell whether a tar holds samples.
HEAD = 64


def detect(path: Path) -> bool:
    """Whether ``path`` is a tar shard with images and texts of the same key, or a folder that holds some."""
    return any(_holds_samples(shards[0]) for shards in _shards(path).values())


def splits(path: Path) -> tuple[str, ...]:
    """Names of the splits, from the shards' names."""
    return tuple(name for name in _shards(path) if name)


def load(source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    """Yield one sample a row, shard after shard."""
    for split, shards in chosen(source, _shards(source.path)):
        for shard in shards:
            yield from _load_shard(shard, id_prefix(split), source, quarantine)


def _load_shard(shard: Path, prefix: str, source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    images = source.image_dir or shard.parent

    def make(_: str, item: tuple[str, Any]) -> list[Sample]:
        return make_samples(item[1], f"{prefix}{item[0]}", images, source)

    yield from samples_of(_rows(shard, quarantine), make, quarantine)


def _rows(shard: Path, quarantine: Quarantine) -> Iterator[tuple[str, tuple[str, Any]]]:
    """Yield the place, the default id and the content of every row of a shard."""
    with shard.open("rb") as file:
        shown = (member for member in archives.tar_members(shard) if not _hidden(member.name))
        for key, members in groupby(shown, key=lambda member: _parts(member.name)[0]):
            place = f"{shard.name}, {key}"
            try:
                rows = _rows_of(list(members), file)
            except RowError as error:
                quarantine.add(place, error.kind, str(error))
                continue
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                quarantine.add(place, "unreadable row", f"its text cannot be read ({type(error).__name__})")
                continue
            for number, row in enumerate(rows):
                several = len(rows) > 1
                yield f"{place}, row {number}" if several else place, (f"{key}#{number}" if several else key, row)


def _rows_of(members: list[Member], file: Any) -> list[Any]:
    images: list[str] = []
    texts: dict[str, Member] = {}
    for member in members:
        kind = _parts(member.name)[1]
        if f".{kind.rpartition('.')[2]}" in EXTENSIONS:
            images.append(str(member))
        else:
            texts.setdefault(kind, member)

    def content(member: Member) -> str:
        file.seek(member.offset)
        return str(file.read(member.size).decode("utf-8-sig"))

    captions = [kind for kind in TEXTS if kind in texts]
    found = json.loads(content(texts["json"])) if "json" in texts else {}
    rows = found if isinstance(found, list) else [found]
    # What crawlers write beside a caption, such as img2dataset, describes the image and is no row.
    if captions and not any(_is_row(row) for row in rows):
        if not images:
            raise RowError("it has a caption and no image", "missing image")
        meta = found if isinstance(found, dict) else {}
        rows = [{"caption": content(texts[captions[0]]), "meta": meta}]
    if not rows:
        raise RowError("it has no row")
    if not images and not captions and "json" not in texts:
        raise RowError(f"it has neither an image nor a text, only {', '.join(texts) or 'nothing'}")
    if images and not captions and "json" not in texts:
        raise RowError("it has an image and neither a .json nor a .txt", "missing caption")
    return [_with_images(row, images) for row in rows]


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and shape_of([name for name, value in row.items() if value is not None] + ["image"]) is not None
    )


def _with_images(row: Any, images: list[str]) -> Any:
    """A row with the images of its key, unless it holds images itself."""
    if not images or not isinstance(row, dict):
        return row
    return {name: row[name] for name in row if name not in IMAGE_COLUMNS} | {"images": images}


def _parts(name: str) -> tuple[str, str]:
    """Key and kind of a member: ``a/0017`` and ``jpg``."""
    base = PurePosixPath(name).name
    stem, _, kind = base.partition(".")
    return name[: len(name) - len(base)].removeprefix("./") + stem, kind.lower()


def _hidden(name: str) -> bool:
    """Whether a system put a file there unseen: ``._dog.jpg``, ``.DS_Store``."""
    return PurePosixPath(name).name.startswith(".")


def _holds_samples(shard: Path) -> bool:
    kinds: dict[str, set[str]] = {}
    try:
        for number, member in enumerate(archives.tar_members(shard)):
            if _hidden(member.name):
                continue
            key, kind = _parts(member.name)
            kinds.setdefault(key, set()).add(kind)
            if "json" in kinds[key] or not kinds[key].isdisjoint(TEXTS):
                return True
            if number == HEAD:
                break
    except DataError:
        # A shard that cannot be read is named when it is loaded.
        return any(kinds.values())
    return False


def _shards(path: Path) -> dict[str, list[Path]]:
    """Split name -> shards in order; the name is empty where nothing names one."""
    if path.is_file():
        return {"": [path]} if path.suffix.lower() == ".tar" else {}
    found: dict[str, list[Path]] = {}
    for file in visible(path) if path.is_dir() else []:
        if file.suffix.lower() == ".tar" and file.is_file():
            found.setdefault(shard_split(file), []).append(file)
    inside = {name: _shards(folder) for name, folder in split_folders(path).items()} if not found else {}
    return found or {name: list(chain(*shards.values())) for name, shards in inside.items() if shards}


FORMAT = Format(
    name="webdataset",
    looks_like=".tar shards of 0017.jpg with 0017.json or 0017.txt",
    detect=detect,
    splits=splits,
    load=load,
    asks=(),
    shards=_shards,
)
