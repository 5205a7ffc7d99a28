"""Detection as COCO has it: ``instances_*.json`` and the folders of images (cocodataset.org; Lin et al. 2014).

A folder with ``annotations/instances_train2017.json`` beside ``train2017/``; ``train/_annotations.coco.json`` beside
its images, as Roboflow exports it; or the JSON file itself. It lists ``images`` (``id``, ``file_name``, ``width``,
``height``), ``annotations`` (``image_id``, ``category_id``, ``bbox``: left, top, width, height) and ``categories``.
An image is one sample: all its objects, in the order of the categories, the largest first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmtune.data.boxes import METRICS, MOST_LABELS, Box, BoxError, box_of, boxes_sample
from vlmtune.data.formats.base import LABELS, Format, Source
from vlmtune.data.formats.coco import files_of, image_folders, rows_of, with_id
from vlmtune.data.formats.files import RowError, chosen, find_folder, has_keys, id_prefix, plain_name, samples_of
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import ImageRef, Sample


def detect(path: Path) -> bool:
    """Whether ``path`` is a file of COCO's detection, or a folder that holds some."""
    return bool(_files(path))


def splits(path: Path) -> tuple[str, ...]:
    """Names of the splits: ``train`` for ``instances_train2017.json``; none for a file."""
    return tuple(name for name in _files(path) if name)


def load(source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    """Yield one sample an image, those without objects too; one with a box that is none is set aside."""
    for split, file in chosen(source, _files(source.path)):
        yield from _load_file(file, id_prefix(split), source, quarantine)


def _load_file(file: Path, prefix: str, source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    rows = rows_of(file, "images", "annotations", "categories")
    labels = {row["id"]: str(row["name"]) for row in with_id(rows["categories"]) if row.get("name")}
    images = {row["id"] for row in with_id(rows["images"])}
    of_image: dict[Any, list[Any]] = defaultdict(list)
    for index, row in enumerate(rows["annotations"]):
        place = f"{file.name}, annotations[{index}]"
        if not isinstance(row, dict) or not isinstance(row.get("image_id"), int | str):
            quarantine.add(place, "unreadable row", "it lacks 'image_id'")
        elif row["image_id"] not in images:
            quarantine.add(place, "unknown image", f"no image of the file has the id {row['image_id']}")
        else:
            of_image[row["image_id"]].append(row)
    names = [row["file_name"] for row in rows["images"][:20] if isinstance(row, dict) and row.get("file_name")]
    folder = find_folder(names, image_folders(file, "instances_"), source, file.name)
    used = {str(row.get("category_id")) for found in of_image.values() for row in found}
    ask = [label for number, label in labels.items() if str(number) in used]
    order = {label: place for place, label in enumerate(labels.values())}

    def make(_: str, row: Any) -> Sample:
        size = (row["width"], row["height"]) if row.get("width") and row.get("height") else None
        boxes = [_box(one, labels, size) for one in of_image.get(row["id"], ())]
        return boxes_sample(
            f"{prefix}{row['file_name']}",
            ImageRef(path=str(folder / row["file_name"])),
            sorted(boxes, key=lambda box: (order[box.label], -_area(box))),
            task="detection",
            ask=ask if len(ask) <= MOST_LABELS else (),
            prompt=source.prompt,
            size=size,
            meta={"image": row["file_name"]},
        )

    places = ((f"{file.name}, images[{index}]", row) for index, row in enumerate(rows["images"]))
    yield from samples_of(places, make, quarantine)


def _box(row: dict[str, Any], labels: dict[Any, str], size: tuple[int, int] | None) -> Box:
    if row.get("category_id") not in labels:
        raise RowError(f"annotation {row.get('id')} has the category {row.get('category_id')!r}, which has no name")
    try:
        box = box_of(row.get("bbox"), labels[row["category_id"]], size=size, sides=True)
    except BoxError as error:
        raise RowError(f"annotation {row.get('id')}: {error}", "unusable box") from error
    return Box(box.corners, labels[row["category_id"]], crowd=bool(row.get("iscrowd")))


def _area(box: Box) -> float:
    x1, y1, x2, y2 = box.corners
    return (x2 - x1) * (y2 - y1)


def _files(path: Path) -> dict[str, Path]:
    return files_of(path, _is_instances)


def _is_instances(file: Path) -> bool:
    name = plain_name(file).lower()
    # COCO's other annotations of the same images.
    if not name.endswith(".json") or name.startswith(("person_keypoints", "captions", "stuff", "panoptic")):
        return False
    # RefCOCO's boxes lie in the same form, and its phrases beside it, or in its captions.
    if any(file.parent.glob("refs(*).p")) or has_keys(file, "tokens_positive"):
        return False
    return has_keys(file, "images", "categories", "bbox", "category_id")


FORMAT = Format(
    name="coco_instances",
    looks_like="instances_*.json or _annotations.coco.json ('images', 'annotations' with 'bbox', 'categories')",
    detect=detect,
    splits=splits,
    load=load,
    metrics=METRICS["detection"],
    asks=("", LABELS),
)
