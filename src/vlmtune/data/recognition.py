"""From what a person names as data to the folder or file, and its format."""

from __future__ import annotations

from pathlib import Path

from vlmtune.data import hub
from vlmtune.data.formats import FORMATS, Format, easy_vqa
from vlmtune.data.formats.files import first_keys, outer_keys, visible
from vlmtune.data.formats.row_files import has_rows
from vlmtune.data.formats.table_files import BINARY, TEXT, columns_of
from vlmtune.data.images import EXTENSIONS
from vlmtune.data.placing import absolute
from vlmtune.errors import DataError, FormatError, nearest

# Names listed in a message.
SHOWN = 12
# Folders that are tried, in one of no format.
LOOKED_INTO = 100
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar")


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
    raise FormatError(
        "\n".join([f"{place} is in no format that vlmtune knows.", *_hints(place), f"It reads:\n{known}"])
    )


def _hints(place: Path) -> list[str]:
    """What is seen in a folder or file of no format, and what would make it one; a line each."""
    if place.name.lower().endswith(ARCHIVES):
        return ["Unpack it: archives are read where they are shards of samples, or the images alone (image_dir)."]
    if place.is_file():
        return _columns_hint([place])
    entries = visible(place)
    inside = [entry for entry in entries if entry.is_dir()][:LOOKED_INTO]
    folders = {folder: format for folder in inside if (format := _only_format(folder))}
    if folders:
        listed = ", ".join(f"{folder.name} ({format})" for folder, format in list(folders.items())[:SHOWN])
        more = f" and {len(folders) - SHOWN:,} more" if len(folders) > SHOWN else ""
        return [f"Folders in it hold data: {listed}{more}. Name one of them, or list them in a mixture (a .yaml file)."]
    if hint := _columns_hint([file for file in entries if file.is_file()]):
        return hint
    names = {entry.name.lower() for entry in entries}
    if names & {"data.yaml", "dataset.yaml", "classes.txt", "labels", "annotations", "jpegimages"}:
        return ["Boxes of YOLO or Pascal VOC are not read: export them as COCO, which every tool for boxes can."]
    if any(entry.suffix.lower() in EXTENSIONS for entry in entries):
        return ["It holds images but no texts that go with them: a metadata.csv with the columns file_name,text does."]
    if not entries:
        return ["The folder is empty."]
    return []


def _only_format(folder: Path) -> str | None:
    try:
        found = [format.name for format in FORMATS.values() if format.detect(folder)]
    except DataError:  # it is of a format, but holds too much of it
        return None
    return found[0] if len(found) == 1 else None


def _columns_hint(files: list[Path]) -> list[str]:
    """What to do about files of rows whose columns have other names."""
    for file in files:
        if file.suffix.lower() in BINARY + TEXT:
            columns, format = columns_of(file), "tables"
        else:
            columns, format = (sorted(first_keys(file)), "messages") if has_rows(file) else ([], "")
        if file.suffix.lower() == ".json" and not columns and (keys := outer_keys(file)):
            return [f"{file.name} is one object ({', '.join(keys[:SHOWN])}); rows are a list, or an object a line."]
        if columns and file.name.lower().startswith("metadata."):
            format = "imagefolder"
        if columns:
            listed = ", ".join(str(column)[:30] for column in columns[:SHOWN])
            return [
                f"{file.name} has the columns {listed}. Say which is which, as in dataset_format: {format} and "
                "columns: [image=COLUMN, question=COLUMN, answer=COLUMN], or [image=COLUMN, caption=COLUMN]."
            ]
    return []
