"""Images with a text file of the same stem beside each: ``dog.jpg`` and ``dog.txt``.

The whole file is the caption. The pairs lie in the folder, or in ``train/``, ``test/`` and so on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from vlmtune.data.formats.base import CAPTION_METRICS, Format, Source, first_line
from vlmtune.data.formats.captions import Caption, caption_samples
from vlmtune.data.formats.files import SPLITS, chosen, id_prefix
from vlmtune.data.images import EXTENSIONS
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import Sample

# Texts that lie beside images without being a caption.
OTHER_TEXTS = frozenset({"readme", "license", "licence", "classes", "labels", "notes", "captions"})
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
    for split, folder in chosen(source, _folders(source.path)):
        captions = _captions(folder, quarantine)
        yield from caption_samples(captions, folder, source.prompt, quarantine, prefix=id_prefix(split))


def _captions(folder: Path, quarantine: Quarantine) -> Iterator[Caption]:
    images, texts = _listed(folder)
    for stem in sorted(images.keys() | texts.keys()):
        if stem not in texts:
            for name in images[stem]:
                quarantine.add(name, "missing caption", f"there is no {stem}.txt beside {folder / name}")
        elif stem not in images:
            quarantine.add(
                texts[stem], "missing image", f"there is no image named {stem} beside {folder / texts[stem]}"
            )
        else:
            try:
                text = (folder / texts[stem]).read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError):
                quarantine.add(texts[stem], "unreadable row", f"{folder / texts[stem]} is not UTF-8 text")
                continue
            for name in images[stem]:
                yield Caption(texts[stem], name, text)


def _listed(folder: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Stem -> images, and stem -> text, in one reading of the folder."""
    images: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    if folder.is_dir():
        for file in sorted(folder.iterdir()):
            name, stem, suffix = file.name, file.stem, file.suffix
            if suffix.lower() in EXTENSIONS:
                images.setdefault(stem, []).append(name)
            elif suffix.lower() == ".txt" and stem.lower() not in OTHER_TEXTS:
                texts[stem] = name
    return images, texts


def _has_pairs(folder: Path) -> bool:
    images, texts = _listed(folder)
    stem = next((stem for stem in images if stem in texts), None)
    return stem is not None and not _NUMBERS.match(first_line(folder / texts[stem]) or "0")


def _folders(path: Path) -> dict[str, Path]:
    """Split name -> folder of pairs; the name is empty for a folder without splits."""
    if _has_pairs(path):
        return {"": path}
    return {name: path / name for name in SPLITS if _has_pairs(path / name)}


FORMAT = Format(
    name="image_text_pairs",
    looks_like="images and .txt files of the same stem, side by side, also in train/ and test/",
    detect=detect,
    splits=splits,
    load=load,
    metrics=CAPTION_METRICS,
)
