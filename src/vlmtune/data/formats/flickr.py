"""Flickr8k, Flickr30k and every folder laid out like them: images with a few captions each.

Layouts, by the captions file in the folder:

* ``captions.txt``, ``captions.csv``: CSV with the header ``image,caption`` (Kaggle), or of Flickr30k
  ``image_name,comment_number,comment``
* ``*.token.txt``, ``*.token``: ``name#number<TAB>caption`` (the official files), splits in
  ``Flickr_8k.{train,dev,test}Images.txt``
* ``results.csv``, ``results*.csv``: ``image_name| comment_number| comment`` (Flickr30k); one row of the
  published file lacks its second bar and is read all the same
* ``dataset*.json``: Karpathy's splits, ``{"images": [{"filename", "split", "sentences"}]}``
* ``flickr_annotations_30k.csv``: the same as CSV, with the columns ``raw`` (a JSON list), ``split`` and ``filename``

The file lies in the folder named, or in that of the archive: ``Flickr8k_text/`` beside ``Flicker8k_Dataset/``, or
``flickr30k_images/`` with the images in a folder of the same name.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

from vlmtune.data.formats.base import CAPTION_METRICS, Format, Source, first_line
from vlmtune.data.formats.captions import Caption, caption_samples
from vlmtune.data.formats.files import NO_TEXT, is_text, named_folder
from vlmtune.data.images import EXTENSIONS
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import Sample
from vlmtune.errors import DataError, nearest

IMAGE_FOLDERS = (
    "Images", "images", "Flicker8k_Dataset", "Flickr8k_Dataset", "Flicker8k_Images", "flickr30k_images",
    "flickr30k-images", "Flickr30k_Images",
)  # fmt: skip
# Of Flickr30k with commas.
NUMBERED = ["image_name", "comment_number", "comment"]
# Folders of the archives that hold the captions file.
TEXT_FOLDER = "Flickr8k_text"
CAPTION_FOLDERS = (TEXT_FOLDER, "flickr30k_images")
# "2199200615.jpg| 4   A dog runs across the grass ." is the row without its second bar.
_BARS = re.compile(r"^(?P<name>[^|]+?)\s*\|\s*(?P<number>\d+)\s*(?:\|\s*|\s+)(?P<caption>.*)$")
_HASH = re.compile(r"^(?P<name>.+?)#(?P<number>\d+)\s*\t\s*(?P<caption>.*)$")
_ROW_START = re.compile(rf"^[^,]+({'|'.join(re.escape(end) for end in sorted(EXTENSIONS))})\s*,", re.IGNORECASE)
_SPLIT_FILE = re.compile(r"^flickr_?\w*\.(?P<split>train|dev|val|test)images\.txt$", re.IGNORECASE)


def load(source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    """Yield one sample a caption, the captions of an image together, its references all of them."""
    file = captions_file(source.path)
    if file is None:
        raise DataError(f"{source.path} holds no captions file: {FORMAT.looks_like}.")
    folder = file.parent
    images = image_folder(folder, source.image_dir)
    chosen = _names_of_split(folder, source.split)
    wanted = (
        caption
        for caption in _rows(file, quarantine)
        if source.split is None or _in_split(caption, source.split, chosen)
    )
    found = False
    for sample in caption_samples(wanted, images, source.prompt, quarantine):
        found = True
        yield sample
    if source.split is not None and not found and source.split not in (known := splits(source.path)):
        has = f"it has {', '.join(known)}" if known else "its captions are not split; leave the split out"
        raise DataError(f"{source.path} has no split {source.split!r}; {has}.{nearest(source.split, known)}")


def detect(path: Path) -> bool:
    """Whether ``path`` is a captions file, or a folder that holds one."""
    return captions_file(path) is not None


def splits(path: Path) -> tuple[str, ...]:
    """Names of the splits: from Karpathy's file, or from the official lists of images."""
    file = captions_file(path)
    if file is None:
        return ()
    if file.suffix == ".json":
        return tuple(sorted({split for image in _karpathy(file) if (split := _karpathy_split(image))}))
    if _kind(file) == "lists":
        return tuple(sorted({caption.split for caption in _list_rows(file, Quarantine()) if caption.split}))
    return tuple(sorted(_split_files(file.parent)))


def captions_file(path: Path) -> Path | None:
    """Return the captions file that ``path`` is or holds, or ``None``.

    Raises:
        DataError: a folder holds more than one.
    """
    if path.is_file():
        return path if _kind(path) else None
    if not path.is_dir():
        return None
    return next(
        (file for folder in (path, *(path / name for name in CAPTION_FOLDERS)) if (file := _in_folder(folder))), None
    )


def _in_folder(path: Path) -> Path | None:
    if not path.is_dir():
        return None
    found = [file for file in sorted(path.iterdir()) if file.is_file() and _kind(file)]
    # The tokenized and lemmatized files of the official archives hold the same captions as the plain one.
    plain = [file for file in found if "lemma" not in file.name.lower()]
    if len(plain) > 1:
        names = ", ".join(file.name for file in plain)
        raise DataError(f"{path} holds more than one captions file ({names}). Name the file itself as dataset_path.")
    return plain[0] if plain else None


def image_folder(folder: Path, named: Path | None) -> Path:
    """Return the folder of the images: as named, or one of the usual names, or the captions' own folder.

    Raises:
        DataError: the folder named is none, or no image lies where they usually do.
    """
    if named is not None:
        return named_folder(named)
    for root in [folder, folder.parent] if folder.name == TEXT_FOLDER else [folder]:
        for name in IMAGE_FOLDERS:
            if (root / name).is_dir():
                inside = root / name / name
                return inside if inside.is_dir() else root / name
    if any(file.suffix.lower() in EXTENSIONS for file in folder.iterdir()):
        return folder
    raise DataError(
        f"{folder} holds captions but no images: neither a folder of a usual name ({', '.join(IMAGE_FOLDERS[:3])}, "
        "...) nor image files lie there. Set image_dir to the images' folder."
    )


def _kind(file: Path) -> str | None:
    name = file.name.lower()
    if name.endswith((".token.txt", ".token")):
        return "hash"
    if name.endswith(".json") and name.startswith("dataset"):
        with file.open("rb") as opened:
            start = opened.read(65536)
        return "karpathy" if (b'"images"' in start and b'"sentences"' in start) or b'"sentids"' in start else None
    if file.suffix.lower() not in (".txt", ".csv"):
        return None
    line = first_line(file)
    columns = [column.strip().lower() for column in line.split(",")]
    if columns in (["image", "caption"], ["image_name", "caption"], NUMBERED):
        return "csv"
    if {"raw", "split", "filename"} <= set(columns):
        return "lists"
    if re.match(r"^image_name\s*\|\s*comment_number\s*\|\s*comment", line, re.IGNORECASE):
        return "bars"
    return "hash" if _HASH.match(line) and name.startswith("captions") else None


def _rows(file: Path, quarantine: Quarantine) -> Iterator[Caption]:
    kind = _kind(file)
    if kind == "karpathy":
        yield from _karpathy_rows(file, quarantine)
        return
    if kind == "lists":
        yield from _list_rows(file, quarantine)
        return
    if kind == "csv":
        yield from _csv_rows(file, quarantine)
        return
    pattern = _BARS if kind == "bars" else _HASH
    for place, line in _lines(file, quarantine, header=kind == "bars"):
        match = pattern.match(line)
        if match is None:
            shape = "name| number| caption" if kind == "bars" else "name#number<TAB>caption"
            quarantine.add(place, "unreadable row", f"{line.strip()[:80]!r} is not '{shape}'")
            continue
        # Flickr8k's official file lists one name with a number glued on: "2258277193_586949ec62.jpg.1".
        yield Caption(place, re.sub(r"(\.jpe?g)\.\d+$", r"\1", match["name"].strip()), match["caption"])


def _lines(file: Path, quarantine: Quarantine, *, header: bool) -> Iterator[tuple[str, str]]:
    """Yield the place and text of every line that is neither empty nor the header."""
    for place, line in _raw_lines(file, header=header):
        if is_text(line):
            yield place, line
        else:
            quarantine.add(place, "unreadable row", NO_TEXT)


def _raw_lines(file: Path, *, header: bool) -> Iterator[tuple[str, str]]:
    """As :func:`_lines`, with lines that are no text, since they may be a part of a row."""
    with file.open("rb") as opened:
        for number, raw in enumerate(opened, 1):
            place = f"{file.name}, line {number}"
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape").rstrip("\r\n")
            if line.strip() and not (header and number == 1):
                yield place, line


def _csv_rows(file: Path, quarantine: Quarantine) -> Iterator[Caption]:
    """Read CSV row by row, so that a stray quote spoils its own row and no other."""
    before = 2 if first_line(file).lower().replace(" ", "").split(",") == NUMBERED else 1
    lines = _raw_lines(file, header=True)
    following = next(lines, None)
    while following is not None:
        place, text = following
        following = next(lines, None)
        # A quote left open goes on in the next line, unless that begins a row itself.
        while (row := _csv_row(text)) is None and following is not None and not _ROW_START.match(following[1]):
            text = f"{text}\n{following[1]}"
            following = next(lines, None)
        if not is_text(text):
            quarantine.add(place, "unreadable row", NO_TEXT)
        elif row is None:
            quarantine.add(place, "unreadable row", f"{text[:80]!r} has a quote that is never closed")
        elif len(row) <= before:
            quarantine.add(place, "unreadable row", f"{text[:80]!r} has no caption after the image's name")
        else:
            # A caption with commas that nobody quoted runs over several fields.
            yield Caption(place, row[0].strip(), ",".join(row[before:]))


def _csv_row(text: str) -> list[str] | None:
    """Return a row's fields, or ``None`` when a quote in it is still open."""
    try:
        return next(csv.reader([text], strict=True))
    except csv.Error as error:
        # A caption that begins with a quoted word, as in: a.jpg,"Stop" says the sign
        return None if "end of data" in str(error) else text.split(",", 1)


def _list_rows(file: Path, quarantine: Quarantine) -> Iterator[Caption]:
    """Read CSV whose ``raw`` is a JSON list of captions; such a file has no text of several lines."""
    columns: list[str] = []
    for place, text in _lines(file, quarantine, header=False):
        fields = _csv_row(text) or []
        if not columns:
            columns = fields
            continue
        row = dict(zip(columns, fields, strict=False))
        try:
            captions = json.loads(row["raw"])
        except (KeyError, ValueError, RecursionError):
            captions = None
        if not isinstance(captions, list) or not captions or not row.get("filename"):
            quarantine.add(place, "unreadable row", f"{text[:80]!r} lacks 'filename', or a list of captions in 'raw'")
            continue
        for caption in captions:
            yield Caption(place, row["filename"], str(caption), _karpathy_split({"split": row.get("split")}))


def _karpathy(file: Path) -> list[dict[str, object]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        return [image if isinstance(image, dict) else {} for image in content["images"]]
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as Karpathy's splits ({error}). Download it again.") from error


def _karpathy_rows(file: Path, quarantine: Quarantine) -> Iterator[Caption]:
    for index, image in enumerate(_karpathy(file)):
        place = f"{file.name}, images[{index}]"
        name, sentences = image.get("filename"), image.get("sentences")
        if not isinstance(name, str) or not isinstance(sentences, list) or not sentences:
            quarantine.add(place, "unreadable row", "it lacks 'filename' or 'sentences'")
            continue
        if isinstance(image.get("filepath"), str):
            name = f"{image['filepath']}/{name}"
        for sentence in sentences:
            if isinstance(sentence, dict):
                words = sentence.get("tokens") or []
                yield Caption(place, name, str(sentence.get("raw") or " ".join(words)), _karpathy_split(image))
            else:
                quarantine.add(place, "unreadable row", f"the sentence {sentence!r} has neither 'raw' nor 'tokens'")


def _karpathy_split(image: dict[str, object]) -> str | None:
    """Return the image's split; COCO's ``restval`` is trained on, as Karpathy did."""
    split = image.get("split")
    return "train" if split == "restval" else split if isinstance(split, str) else None


def _split_files(folder: Path) -> dict[str, Path]:
    found = {}
    for file in folder.iterdir():
        if (match := _SPLIT_FILE.match(file.name)) and file.is_file():
            found[match["split"].lower()] = file
    return found


def _names_of_split(folder: Path, split: str | None) -> set[str] | None:
    files = _split_files(folder)
    if split is None or not files:
        return None
    if split not in files:
        raise DataError(f"{folder} has no split {split!r}; it has {', '.join(sorted(files))}.{nearest(split, files)}")
    try:
        text = files[split].read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{files[split]} cannot be read as a list of images ({error}). Download it again.") from error
    return {line.strip() for line in text.splitlines() if line.strip()}


def _in_split(caption: Caption, split: str, names: set[str] | None) -> bool:
    return caption.name in names if names is not None else caption.split == split


FORMAT = Format(
    name="flickr",
    looks_like="captions.txt, *.token.txt, results.csv or dataset*.json beside a folder of images",
    detect=detect,
    splits=splits,
    load=load,
    metrics=CAPTION_METRICS,
)
