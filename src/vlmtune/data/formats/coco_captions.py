"""COCO captions as downloaded: ``captions_*.json`` and the folders of images (cocodataset.org; Chen et al. 2015).

A folder with ``annotations/captions_train2017.json`` beside ``train2017/``, or the JSON file itself. The file lists
``images`` (``id``, ``file_name``) and ``annotations`` (``image_id``, ``caption``).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmtune.data.formats.base import CAPTION_METRICS, Format, Source
from vlmtune.data.formats.captions import Caption, caption_samples
from vlmtune.data.formats.coco import files_of, image_folders, rows_of
from vlmtune.data.formats.files import chosen, find_folder, has_keys, id_prefix, plain_name
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import Sample


def detect(path: Path) -> bool:
    """Whether ``path`` is a file of COCO captions, or a folder that holds some."""
    return bool(_files(path))


def splits(path: Path) -> tuple[str, ...]:
    """Names of the splits: ``train`` for ``captions_train2017.json``; none for a file."""
    return tuple(name for name in _files(path) if name)


def load(source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    """Yield one sample a caption, the captions of an image together."""
    for split, file in chosen(source, _files(source.path)):
        rows = rows_of(file, "images", "annotations")
        names = _image_names(rows["images"], file, quarantine)
        known = list(names.values())[:20]
        images = find_folder(known, image_folders(file, "captions_"), source, file.name)
        captions = _captions(rows["annotations"], names, split or None, file, quarantine)
        yield from caption_samples(captions, images, source.prompt, quarantine, prefix=id_prefix(split))


def _image_names(rows: list[Any], file: Path, quarantine: Quarantine) -> dict[Any, str]:
    names = {}
    for index, row in enumerate(rows):
        if isinstance(row, dict) and isinstance(row.get("file_name"), str) and isinstance(row.get("id"), int | str):
            names[row["id"]] = row["file_name"]
        else:
            quarantine.add(f"{file.name}, images[{index}]", "unreadable row", "it lacks 'id' or 'file_name'")
    return names


def _captions(
    rows: list[Any], names: dict[Any, str], split: str | None, file: Path, quarantine: Quarantine
) -> Iterator[Caption]:
    for index, row in enumerate(rows):
        place = f"{file.name}, annotations[{index}]"
        text, image = (row.get("caption"), row.get("image_id")) if isinstance(row, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(image, int | str):
            quarantine.add(place, "unreadable row", "it lacks 'caption' or 'image_id'")
        elif image not in names:
            quarantine.add(place, "unknown image", f"no image of the file has the id {image}")
        else:
            yield Caption(place, names[image], text, split)


def _files(path: Path) -> dict[str, Path]:
    return files_of(path, _is_captions)


def _is_captions(file: Path) -> bool:
    name = plain_name(file).lower()
    if not name.endswith(".json"):
        return False
    if name.startswith("captions"):
        return has_keys(file, "images") or has_keys(file, "annotations")
    # MDETR's RefCOCO has captions and boxes.
    return has_keys(file, "images", "annotations", "image_id", "caption") and not has_keys(file, "bbox")


FORMAT = Format(
    name="coco_captions",
    looks_like="captions_*.json, also in annotations/, beside folders of images such as train2017/",
    detect=detect,
    splits=splits,
    load=load,
    metrics=CAPTION_METRICS,
)
