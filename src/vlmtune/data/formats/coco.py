"""What the formats of COCO's JSON files share: where they lie, and where their images do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from vlmtune.data.formats.files import SPLITS, name_splits, plain_name, read_json
from vlmtune.errors import DataError


def files_of(path: Path, is_mine: Callable[[Path], bool]) -> dict[str, Path]:
    """Split name -> file; the name is empty for a file by itself.

    Args:
        path: the file, a folder that holds some (also in ``annotations/``), or one with a folder for each split.
        is_mine: whether a file is of the format.
    """
    if path.is_file():
        return {"": path} if is_mine(path) else {}
    found = _in_folder(path, is_mine) + _in_folder(path / "annotations", is_mine)
    if found:
        return name_splits(found)
    return {name: own[0] for name in SPLITS if len(own := _in_folder(path / name, is_mine)) == 1}


def _in_folder(folder: Path, is_mine: Callable[[Path], bool]) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.is_file() and is_mine(file)] if folder.is_dir() else []


def image_folders(file: Path, beginning: str) -> list[Path]:
    """Return where the images of a file usually lie: ``train2017/`` for ``BEGINNINGtrain2017.json``, and so on."""
    tag = plain_name(file).removesuffix(".json").removeprefix(beginning)
    roots = [file.parent.parent, file.parent] if file.parent.name == "annotations" else [file.parent]
    return [root / place for root in roots for place in (tag, f"images/{tag}", "images", "")]


def with_id(rows: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Yield the objects that have an ``id`` to be found by."""
    return (row for row in rows if isinstance(row, dict) and isinstance(row.get("id"), int | str))


def rows_of(file: Path, *keys: str) -> dict[str, list[Any]]:
    """Return the lists under some keys of a JSON object.

    Raises:
        DataError: it is not JSON, or has no such lists.
    """
    content = read_json(file)
    for key in keys:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{file} has no list {key!r}. Download it again.")
    return {key: content[key] for key in keys}
