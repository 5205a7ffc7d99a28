"""From what a person names as data to the folder or file, and its format."""

from __future__ import annotations

from pathlib import Path

from vlmtune.data import hub
from vlmtune.data.formats import FORMATS, Format, easy_vqa
from vlmtune.data.placing import absolute
from vlmtune.errors import DataError, FormatError, nearest


def resolve(path: str | Path) -> Path:
    """Return the folder or file that ``path`` means; data of the Hub is downloaded.

    Raises:
        DataError: there is none.
    """
    if hub.is_address(path):
        return hub.prepare(str(path))
    place = absolute(path)
    if place.exists():
        return place
    if str(path).replace("_", "-") == easy_vqa.PACKAGE_NAME:
        return easy_vqa.package_folder()
    raise DataError(
        f"There is no data at {path}. Correct dataset_path: a folder, a captions file or a .jsonl file, "
        "or hf:// and the name of a data set on the Hugging Face Hub."
    )


def choose_format(place: Path, name: str = "auto") -> Format:
    """Return the format named, or the one that recognises ``place``.

    Raises:
        FormatError: the name is unknown, or no format or several recognise the data.
    """
    if name != "auto":
        if name not in FORMATS:
            raise FormatError(f"dataset_format {name!r} is unknown; use {', '.join(FORMATS)}.{nearest(name, FORMATS)}")
        return FORMATS[name]
    found = [format for format in FORMATS.values() if format.detect(place)]
    if len(found) == 1:
        return found[0]
    known = "\n".join(f"  {format.name}: {format.looks_like}" for format in FORMATS.values())
    if found:
        names = " and ".join(format.name for format in found)
        raise FormatError(f"{place} looks like {names}. Choose one by dataset_format.\n{known}")
    raise FormatError(f"{place} is in no format that vlmtune knows. It reads:\n{known}")
