"""What formats share: compressed files, JSON in its layouts, splits in names, folders of images."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, cast

from vlmtune.data import archives
from vlmtune.data.formats.base import Source
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import Sample
from vlmtune.errors import DataError, nearest

COMPRESSIONS = (".gz", ".zst")
SPLITS = ("train", "validation", "valid", "val", "test", "dev")
# What stands before the number of a file of no split.
UNNAMED = ("data", "part", "shard")
HEAD = 65_536
NO_TEXT = "it is not UTF-8 text"

Layout = Literal["lines", "list", "object"]
# What holds a split: a file, several, a folder.
Part = TypeVar("Part")

_SPLIT = re.compile(r"(?<![a-z])(train|validation|valid|val|test|dev)(?![a-z])", re.IGNORECASE)
_NUMBERED = re.compile(r"(?P<name>.+)-\d{5,}(-of-\d+)?\.\w+$")
_KEY = re.compile(r'"(\w+)"\s*:')
_DECODER = json.JSONDecoder()


class RowError(ValueError):
    """What is wrong with one row, and in two or three words its kind."""

    def __init__(self, reason: str, kind: str = "unusable row") -> None:
        super().__init__(reason)
        self.kind = kind


def samples_of(
    rows: Iterable[tuple[str, Any]], make: Callable[[str, Any], Sample | list[Sample]], quarantine: Quarantine
) -> Iterator[Sample]:
    """Make a sample of each (place, row), or several, and set aside by its place what cannot become one."""
    for place, row in rows:
        try:
            made = make(place, row)
            samples = made if isinstance(made, list) else [made]
            if problem := next(filter(None, (sample.problem() for sample in samples)), None):
                raise RowError(f"it {problem}")
        except RowError as error:
            quarantine.add(place, error.kind, str(error))
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            quarantine.add(place, "unreadable row", f"{str(row)[:80]!r} has another form ({type(error).__name__})")
        else:
            yield from samples


def is_text(line: str) -> bool:
    """Whether a line that was decoded by ``surrogateescape`` was all UTF-8."""
    return not any("\udc80" <= sign <= "\udcff" for sign in line)


def visible(folder: Path) -> list[Path]:
    """Return what lies in a folder, by name, but for what systems put there unseen, such as ``._dog.jpg``."""
    return [file for file in sorted(folder.iterdir()) if not file.name.startswith((".", "__MACOSX"))]


def plain_name(file: Path) -> str:
    """A file's name without the ending of a compression."""
    return file.name[: -len(file.suffix)] if file.suffix.lower() in COMPRESSIONS else file.name


def open_binary(file: Path) -> BinaryIO:
    """Open a file, unpacking ``.gz`` and ``.zst`` on the way."""
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(file, "rb"))
    if suffix == ".zst":
        import pyarrow as pa

        return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(file), compression="zstd")))
    return file.open("rb")


def head_of(file: Path, size: int = HEAD) -> str:
    """Return a file's first characters, those alone that are UTF-8, or an empty string when it is no text."""
    try:
        with open_binary(file) as opened:
            start = opened.read(size)
    except (OSError, EOFError, zlib.error):
        return ""
    return "" if b"\0" in start else start.decode("utf-8-sig", "ignore")


def layout_of(file: Path, head: str | None = None) -> Layout:
    """Tell JSON lines, one list and one object apart by the name and the first characters."""
    if plain_name(file).lower().endswith((".jsonl", ".ndjson")):
        return "lines"
    text = (head_of(file) if head is None else head).lstrip()
    if text.startswith("["):
        return "list"
    first, _, rest = text.partition("\n")
    return "lines" if rest.lstrip().startswith("{") and isinstance(_parsed(first), dict) else "object"


def first_keys(file: Path) -> frozenset[str]:
    """Return the keys of the first row of JSON lines or of a list of objects; none for anything else.

    Where the first row is broken or longer than what is read, the keys seen in it count, nested ones too.
    """
    head = head_of(file)
    layout = layout_of(file, head)
    text = head.lstrip()
    if layout == "object":
        return frozenset()
    if layout == "list":
        text = text[1:].lstrip()
        if not text.startswith("{"):
            return frozenset()
    else:
        text = text.partition("\n")[0]
    row = _parsed(text, whole=False)
    if row is None:
        return frozenset(_KEY.findall(text))
    return frozenset(row) if isinstance(row, dict) else frozenset()


def outer_keys(file: Path) -> list[str]:
    """Return the keys in the first characters of a JSON object, nested ones too; none for anything else."""
    head = head_of(file)
    return list(dict.fromkeys(_KEY.findall(head))) if head.lstrip().startswith("{") else []


def has_keys(file: Path, *keys: str) -> bool:
    """Whether the beginning or the end of a JSON object names all these keys, at any depth; cheap."""
    head = head_of(file)
    if not head.lstrip().startswith("{"):
        return False
    found = set(_KEY.findall(head))
    if not found.issuperset(keys) and file.suffix.lower() not in COMPRESSIONS and file.stat().st_size > HEAD:
        with file.open("rb") as opened:
            opened.seek(-HEAD, io.SEEK_END)
            found |= set(_KEY.findall(opened.read().decode("utf-8", "ignore")))
    return found.issuperset(keys)


def read_json(file: Path) -> Any:
    """Return a JSON file's content.

    Raises:
        DataError: it is not JSON, not UTF-8, or not whole.
    """
    try:
        with open_binary(file) as opened:
            return json.loads(opened.read().decode("utf-8-sig"))
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise DataError(f"{file} is not JSON ({_short(error)}). Download or write it again.") from error


def json_list(file: Path, key: str) -> list[Any]:
    """Return the list under a key of a JSON object.

    Raises:
        DataError: it is not JSON, or has no such list.
    """
    content = read_json(file)
    rows = content.get(key) if isinstance(content, Mapping) else None
    if not isinstance(rows, list):
        raise DataError(f"{file} has no list {key!r}. Download it again.")
    return rows


def json_rows(file: Path, quarantine: Quarantine) -> Iterator[tuple[str, str, Any]]:
    """Yield the place, the number and the content of every row of JSON lines or of a list.

    Lines are streamed; a list is read whole. Broken lines are set aside.

    Raises:
        DataError: a list is broken, or a compressed file is not whole.
    """
    if layout_of(file) != "lines":
        content = read_json(file)
        if not isinstance(content, list):
            raise DataError(f"{file} is a JSON object, not a list of rows.")
        for index, row in enumerate(content):
            yield f"{file.name}, row {index}", str(index), row
        return
    try:
        with open_binary(file) as opened:
            for number, raw in enumerate(opened, 1):
                if raw.strip():
                    place = f"{file.name}, line {number}"
                    try:
                        row = json.loads(raw.decode("utf-8-sig"))
                    except UnicodeDecodeError:
                        quarantine.add(place, "unreadable row", NO_TEXT)
                    except json.JSONDecodeError as error:
                        quarantine.add(place, "unreadable row", f"it is not JSON ({error.msg})")
                    except RecursionError:
                        quarantine.add(place, "unreadable row", "it is nested too deeply")
                    else:
                        yield place, str(number), row
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read to its end ({_short(error)}). Download or write it again.") from error


def split_name(text: str) -> str | None:
    """Return the split that a file's or folder's name holds: ``val`` of ``captions_val2014.json``."""
    found = _SPLIT.search(re.sub(r"\d+", " ", text.replace("_", " ")))
    return found[1].lower() if found else None


def split_folders(path: Path) -> dict[str, Path]:
    """Split name -> the folder of that name; none where ``path`` is no folder."""
    return {name: path / name for name in SPLITS if (path / name).is_dir()}


def shard_split(file: Path) -> str:
    """Return the split of a numbered file: one that its name holds, or what stands before the number; else nothing."""
    numbered = _NUMBERED.match(file.name)
    before = numbered["name"] if numbered and numbered["name"] not in UNNAMED else ""
    return split_name(file.name) or before


def name_splits(files: Iterable[Path]) -> dict[str, Path]:
    """Split name -> file; files of the same split go by their whole name, one without a split by its stem."""
    listed = list(files)
    names = [split_name(file.name) or file.name.partition(".")[0] for file in listed]
    return {(name if names.count(name) == 1 else file.name): file for name, file in zip(names, listed, strict=True)}


def require_split(source: Source, known: Collection[str]) -> None:
    """Refuse a split that the data does not have.

    Raises:
        DataError: naming those it has.
    """
    if source.split is None or source.split in known:
        return
    names = [name for name in known if name]
    has = f"it has {', '.join(names)}" if names else "its rows are not split; leave the split out"
    raise DataError(f"{source.path} has no split {source.split!r}; {has}.{nearest(source.split, names)}")


def chosen(source: Source, parts: Mapping[str, Part]) -> Iterator[tuple[str, Part]]:
    """Yield the split asked for, or all of them, each with what holds it.

    Raises:
        DataError: the data does not have that split.
    """
    require_split(source, parts)
    yield from ((split, part) for split, part in parts.items() if source.split in (None, split))


def id_prefix(split: str) -> str:
    """What a split's sample ids begin with; nothing where the data names no split."""
    return f"{split}/" if split else ""


def find_folder(names: Sequence[str], candidates: Iterable[Path], source: Source, what: str) -> Path:
    """Return the first folder that holds one of the images named.

    Args:
        names: some of the images' names.
        candidates: folders where they usually lie, the likeliest first.
        source: its ``image_dir`` is taken as it is.
        what: the file that names the images, for the message.

    Raises:
        DataError: ``image_dir`` is no folder, or no candidate holds any.
    """
    if source.image_dir is not None:
        return named_folder(source.image_dir)
    tried = [folder for folder in dict.fromkeys(candidates) if folder.is_dir()]
    for folder in tried:
        if any(is_file(folder, name) for name in names):
            return folder
    shown = ", ".join(str(folder) for folder in tried) or "no folder of a usual name"
    example = f" such as {str(names[0])[:80]}" if names else ""
    raise DataError(f"The images of {what}{example} are not found (looked in {shown}). Set image_dir to their folder.")


def named_folder(image_dir: Path) -> Path:
    """Return the folder or the archive that a person named for the images.

    Raises:
        DataError: it is neither.
    """
    if not image_dir.is_dir() and not archives.is_archive(image_dir):
        raise DataError(f"image_dir {image_dir} is neither a folder nor a .tar or .zip archive. Name one that is.")
    return image_dir


def is_file(folder: Path, name: Any) -> bool:
    """Whether a folder or an archive holds a file of this name; anything that cannot be a name is none."""
    try:
        if isinstance(name, str) and archives.is_archive(folder):
            return name in archives.open_archive(folder)
        return isinstance(name, str) and any((folder / one).is_file() for one in {name, name.replace("\\", "/")})
    except (OSError, ValueError):
        return False


def _parsed(text: str, *, whole: bool = True) -> Any:
    try:
        return json.loads(text) if whole else _DECODER.raw_decode(text)[0]
    except (ValueError, RecursionError):
        return None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
