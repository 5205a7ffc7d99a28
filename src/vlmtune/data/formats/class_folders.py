"""Images in a folder for each class, as for image classification: ``cat/1.jpg``, ``dog/2.jpg``.

The folders of classes lie in the folder named, or in ``train/``, ``test/`` and so on. The answer is the folder's name,
with spaces for underscores; the question lists the classes where they are few.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from vlmtune.data.boxes import asked
from vlmtune.data.formats.base import LABELS, Format, Source, own_prompt
from vlmtune.data.formats.files import SPLITS, chosen, id_prefix, split_name, visible
from vlmtune.data.formats.flickr import IMAGE_FOLDERS
from vlmtune.data.images import EXTENSIONS
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import ImageRef, Message, Sample

ASK = "What is in this image?"
ASK_ONE_OF = "What is in this image? Answer with one of these: {labels}."
# More classes are not listed in a prompt.
MOST_LISTED = 30
# Files of a folder that are looked at to tell whether it holds images alone.
LOOKED_AT = 20
# Folders of images that are no class.
OTHER_FOLDERS = frozenset(name.lower() for name in IMAGE_FOLDERS) | {"png", "jpg", "masks", "photos", "labels"}
ABOUT = ("readme", "license", "licence", "copying")


def detect(path: Path) -> bool:
    """Whether a folder holds folders of images alone, and nothing else."""
    return bool(_roots(path))


def splits(path: Path) -> tuple[str, ...]:
    """Names of the split folders; none for a folder without."""
    return tuple(name for name in _roots(path) if name)


def load(source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    """Yield one sample an image, class after class; other files are set aside."""
    for split, root in chosen(source, _roots(source.path)):
        folders = [folder for folder in visible(root) if folder.is_dir()]
        labels = [_label(folder) for folder in folders]
        usual = ASK_ONE_OF if len(labels) <= MOST_LISTED else ASK
        question = Message.make("user", asked(own_prompt(source.prompt, "", LABELS) or usual, labels), images=1)
        for folder, label in zip(folders, labels, strict=True):
            for file in visible(folder):
                name = f"{id_prefix(split)}{folder.name}/{file.name}"
                if file.suffix.lower() not in EXTENSIONS:
                    quarantine.add(name, "unreadable image", f"{file} is not an image by its name")
                    continue
                yield Sample(
                    id=name,
                    images=(ImageRef(path=str(file)),),
                    messages=(question, Message.make("assistant", label)),
                    references=(label,),
                    meta={"image": f"{folder.name}/{file.name}", "category": label},
                )


def _label(folder: Path) -> str:
    return " ".join(folder.name.replace("_", " ").split()) or folder.name


def _roots(path: Path) -> dict[str, Path]:
    """Split name -> folder of classes; the name is empty for a folder without splits."""
    if not path.is_dir():
        return {}
    if _holds_classes(path):
        return {"": path}
    return {name: path / name for name in SPLITS if _holds_classes(path / name)}


def _holds_classes(root: Path) -> bool:
    entries = visible(root) if root.is_dir() else []
    folders = [entry for entry in entries if entry.is_dir()]
    return (
        len(folders) > 1
        and all(entry.is_dir() or entry.name.lower().startswith(ABOUT) for entry in entries)
        and not any(split_name(folder.name) or folder.name.lower() in OTHER_FOLDERS for folder in folders)
        and all(map(_holds_images, folders))
    )


def _holds_images(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        shown = list(islice((entry.name for entry in entries if not entry.name.startswith(".")), LOOKED_AT))
    return bool(shown) and all(Path(name).suffix.lower() in EXTENSIONS for name in shown)


FORMAT = Format(
    name="class_folders",
    looks_like="a folder of images for each class, cat/1.jpg and dog/2.jpg, also in train/ and test/",
    detect=detect,
    splits=splits,
    load=load,
    metrics=("exact_match",),
    asks=("", LABELS),
)
