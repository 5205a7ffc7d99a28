"""Images with a text file of the same stem beside each: ``dog.jpg`` and ``dog.txt``, or ``dog.caption``.

The whole file is the caption. The pairs lie in the folder; or in ``train/``, ``test/`` and so on; or in folders of any
other names, as img2dataset and kohya's scripts write them, whose pairs then are one data set.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from vlmtune.data.formats.base import CAPTION_METRICS, Format, Source, first_line
from vlmtune.data.formats.captions import Caption, caption_samples
from vlmtune.data.formats.files import SPLITS, chosen, id_prefix, visible
from vlmtune.data.images import EXTENSIONS
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import Sample

# Texts that lie beside images without being a caption.
OTHER_TEXTS = frozenset({"readme", "license", "licence", "classes", "labels", "notes", "captions"})
TEXTS = (".txt", ".caption")
# YOLO's boxes lie beside images in the same way.
_NUMBERS = re.compile(r"^[\d\s.,eE+-]+$")


def detect(path: Path) -> bool:
    """Whether a folder holds images with a text of the same stem."""
    return path.is_dir() and bool(_folders(path))


def splits(path: Path) -> tuple[str, ...]:
    """Names of the split folders; none for a folder without."""
    return tuple(name for name in _folders(path) if name)


def load(source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    """Yield one sample a pair; an image without text, or a text without image, is set aside."""
    for split, folders in chosen(source, _folders(source.path)):
        root = source.path / split
        captions = chain.from_iterable(_captions(folder, root, quarantine) for folder in folders)
        yield from caption_samples(captions, root, source.prompt, quarantine, prefix=id_prefix(split))


def _captions(folder: Path, root: Path, quarantine: Quarantine) -> Iterator[Caption]:
    images, texts = _listed(folder)
    inside = "" if folder == root else f"{folder.name}/"
    for stem in sorted(images.keys() | texts.keys()):
        if stem not in texts:
            for name in images[stem]:
                quarantine.add(f"{inside}{name}", "missing caption", f"there is no {stem}.txt beside {folder / name}")
            continue
        file = folder / texts[stem]
        place = f"{inside}{file.name}"
        if stem not in images:
            quarantine.add(place, "missing image", f"there is no image named {stem} beside {file}")
            continue
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError):
            quarantine.add(place, "unreadable row", f"{file} is not UTF-8 text")
            continue
        for name in images[stem]:
            yield Caption(place, f"{inside}{name}", text)


def _listed(folder: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Stem -> images, and stem -> text, in one reading of the folder."""
    images: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    if folder.is_dir():
        for file in visible(folder):
            name, stem, suffix = file.name, file.stem, file.suffix
            if suffix.lower() in EXTENSIONS:
                images.setdefault(stem, []).append(name)
            elif suffix.lower() in TEXTS and stem.lower() not in OTHER_TEXTS:
                texts[stem] = name
    return images, texts


def _has_pairs(folder: Path) -> bool:
    images, texts = _listed(folder)
    stem = next((stem for stem in images if stem in texts), None)
    return stem is not None and not _NUMBERS.match(first_line(folder / texts[stem]) or "0")


def _folders(path: Path) -> dict[str, list[Path]]:
    """Split name -> folders of pairs; the name is empty for a folder without splits."""
    if _has_pairs(path):
        return {"": [path]}
    splits = {name: [path / name] for name in SPLITS if _has_pairs(path / name)}
    others = [folder for folder in visible(path) if _has_pairs(folder)] if not splits and path.is_dir() else []
    return splits or ({"": others} if others else {})


FORMAT = Format(
    name="image_text_pairs",
    looks_like="images and .txt files of the same stem, side by side, also in train/ and test/",
    detect=detect,
    splits=splits,
    load=load,
    metrics=CAPTION_METRICS,
)
