"""RefCOCO, RefCOCO+, RefCOCOg: which object a phrase describes (Yu et al. 2016, arXiv:1608.00272).

As published (github.com/lichengunc/refer): a folder with ``instances.json`` and ``refs(unc).p`` (``refs(google).p``,
``refs(umd).p``), or that file itself; its pickle is read as plain lists and numbers, and runs nothing. Or as MDETR
writes it: ``finetune_refcoco_train.json``, a COCO file with a ``caption`` in each of its images. Images are COCO's of
2014. A phrase is one sample.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlmtune.data.boxes import METRICS, BoxError, box_of, boxes_sample
from vlmtune.data.formats.base import PHRASE, Format, Source
from vlmtune.data.formats.coco import files_of, rows_of, with_id
from vlmtune.data.formats.files import (
    RowError,
    chosen,
    find_folder,
    has_keys,
    id_prefix,
    require_split,
    samples_of,
)
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import ImageRef, Sample
from vlmtune.errors import DataError

# Who divided the phrases: each data set's usual division first.
DIVISIONS = ("refs(unc).p", "refs(umd).p", "refs(google).p")
IMAGES = (
    "train2014", "images/train2014", "images/mscoco/images/train2014", "images/mscoco", "images/mscoco/train2014",
    "coco/train2014", "coco/images/train2014", "mscoco/train2014", "images", "",
)  # fmt: skip


def detect(path: Path) -> bool:
    """Whether ``path`` is a file of RefCOCO's phrases, or a folder that holds some."""
    return _refs(path) is not None or bool(_mdetr(path))


def splits(path: Path) -> tuple[str, ...]:
    """Names of the splits: ``train``, ``val``, ``testA`` and so on, as the phrases or the files name them."""
    file = _refs(path)
    if file is None:
        return tuple(name for name in _mdetr(path) if name)
    return tuple(sorted({str(ref["split"]) for ref in _phrases(file) if isinstance(ref, dict) and ref.get("split")}))


def load(source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    """Yield one sample a phrase."""
    file = _refs(source.path)
    if file is not None:
        require_split(source, splits(source.path))
        yield from _load_refs(file, source, quarantine)
        return
    for split, found in chosen(source, _mdetr(source.path)):
        yield from _load_mdetr(found, id_prefix(split), source, quarantine)


def _load_refs(file: Path, source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    rows = rows_of(file.with_name("instances.json"), "images", "annotations")
    images = {row["id"]: row for row in with_id(rows["images"])}
    boxes = {row["id"]: row.get("bbox") for row in with_id(rows["annotations"])}
    names = [row["file_name"] for row in list(images.values())[:20] if row.get("file_name")]
    roots = [file.parent, file.parent.parent, file.parent.parent.parent]
    folder = find_folder(names, [root / place for root in roots for place in IMAGES], source, file.name)

    def make(_: str, item: Any) -> Sample:
        ref, sentence = item
        if ref["image_id"] not in images:
            raise RowError(f"no image of instances.json has the id {ref['image_id']}", "unknown image")
        if ref["ann_id"] not in boxes:
            raise RowError(f"no annotation of instances.json has the id {ref['ann_id']}", "unusable box")
        return _sample(
            f"{ref['split']}/{ref['ref_id']}#{sentence['sent_id']}",
            images[ref["image_id"]],
            folder,
            boxes[ref["ann_id"]],
            sentence["sent"],
            source,
            {"split": ref["split"]},
        )

    def sentences() -> Iterator[tuple[str, Any]]:
        for index, ref in enumerate(_phrases(file)):
            found = ref.get("sentences") if isinstance(ref, dict) else None
            if not isinstance(found, list) or not found:
                quarantine.add(f"{file.name}, {index}", "unreadable row", "it has no list of sentences")
            elif source.split in (None, ref.get("split")):
                yield from ((f"{file.name}, {index}, sentence {n}", (ref, one)) for n, one in enumerate(found))

    yield from samples_of(sentences(), make, quarantine)


def _load_mdetr(file: Path, prefix: str, source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    rows = rows_of(file, "images", "annotations")
    boxes: dict[Any, list[Any]] = {}
    images = {row["id"] for row in with_id(rows["images"])}
    for index, row in enumerate(rows["annotations"]):
        of_image = row.get("image_id") if isinstance(row, dict) else None
        if isinstance(of_image, int | str) and of_image in images:
            boxes.setdefault(of_image, []).append(row.get("bbox"))
        else:
            quarantine.add(
                f"{file.name}, annotations[{index}]", "unknown image", f"no image of the file has the id {of_image!r}"
            )
    names = [row["file_name"] for row in rows["images"][:20] if isinstance(row, dict) and row.get("file_name")]
    roots = [file.parent, file.parent.parent]
    folder = find_folder(names, [root / place for root in roots for place in IMAGES], source, file.name)

    def make(_: str, row: Any) -> Sample:
        own = boxes.get(row["id"], [])
        if len(own) != 1:
            raise RowError(f"it has {len(own)} boxes; a phrase describes one", "unusable box")
        return _sample(f"{prefix}{row['id']}", row, folder, own[0], row["caption"], source, {})

    places = ((f"{file.name}, images[{index}]", row) for index, row in enumerate(rows["images"]))
    yield from samples_of(places, make, quarantine)


def _sample(
    name: str, image: Mapping[str, Any], folder: Path, box: Any, text: Any, source: Source, meta: dict[str, Any]
) -> Sample:
    phrase = " ".join(str(text or "").split())
    if not phrase:
        raise RowError("its phrase is empty", "empty text")
    size = (image["width"], image["height"]) if image.get("width") and image.get("height") else None
    try:
        found = box_of(box, phrase, size=size, sides=True)
    except BoxError as error:
        raise RowError(str(error), "unusable box") from error
    return boxes_sample(
        name,
        ImageRef(path=str(folder / image["file_name"])),
        [found],
        task="grounding",
        ask=phrase,
        prompt=source.prompt,
        size=size,
        meta={"image": image["file_name"], **meta},
    )


class _Plain(pickle.Unpickler):
    """Reads a pickle of lists, dictionaries, texts and numbers; anything that would run code is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _phrases(file: Path) -> list[Any]:
    try:
        with file.open("rb") as opened:
            content = _Plain(opened, encoding="utf-8").load()
    # A damaged pickle can raise almost anything.
    except Exception as error:
        raise DataError(
            f"{file} is not a plain list of phrases ({type(error).__name__}: {error}). Download it again, from "
            "github.com/lichengunc/refer."
        ) from error
    if not isinstance(content, list):
        raise DataError(f"{file} is not a list of phrases. Download it again.")
    return content


def _refs(path: Path) -> Path | None:
    """The file of phrases that ``path`` is or holds; of several divisions the usual one."""
    places = [path] if path.is_file() else [path / name for name in DIVISIONS]
    found = (file for file in places if file.name in DIVISIONS and file.is_file())
    return next((file for file in found if file.with_name("instances.json").is_file()), None)


def _mdetr(path: Path) -> dict[str, Path]:
    return files_of(path, _is_mdetr)


def _is_mdetr(file: Path) -> bool:
    return file.suffix.lower() == ".json" and has_keys(file, "images", "caption", "bbox", "tokens_positive")


FORMAT = Format(
    name="refcoco",
    looks_like="refs(unc).p beside instances.json, or MDETR's finetune_refcoco_*.json",
    detect=detect,
    splits=splits,
    load=load,
    metrics=METRICS["grounding"],
    asks=(PHRASE,),
)
