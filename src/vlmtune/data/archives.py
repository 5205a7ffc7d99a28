"""Members of tar and zip archives as images, read in place by their offset; nothing is unpacked to disk.

An image in an archive has an address, which stands wherever a path stands, in records of a run too:
``photos.tar#a/dog.jpg@1536+20481`` is the 20,481 bytes of ``photos.tar`` from byte 1,536 on. A ``z`` at the end marks
bytes that a zip holds deflated.
"""

from __future__ import annotations

import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from vlmtune.errors import DataError, ImageError

SUFFIXES = (".tar", ".zip")
# An image's file of more bytes than this is no image; a zip could unfold to any size.
MOST_BYTES = 1 << 30
# Length of a zip's local header, before the name and the extra field.
_LOCAL_HEADER = 30

_ADDRESS = re.compile(r"(?P<archive>.+\.(?:tar|zip))#(?P<member>.+)@(?P<offset>\d+)\+(?P<size>\d+)(?P<packed>z?)", re.I)


@dataclass(frozen=True)
class Member:
    """Where a member of an archive lies.

    Attributes:
        archive: the archive's path.
        name: the member's name in it.
        offset: its first byte in the archive.
        size: its number of bytes there.
        packed: whether they are deflated.
    """

    archive: str
    name: str
    offset: int
    size: int
    packed: bool = False

    def __str__(self) -> str:
        return f"{self.archive}#{self.name}@{self.offset}+{self.size}{'z' if self.packed else ''}"


def parse(path: str) -> Member | None:
    """Return the member that an address names, or ``None`` for any other path."""
    found = _ADDRESS.fullmatch(path) if "#" in path else None
    if found is None:
        return None
    numbers = int(found["offset"]), int(found["size"])
    return Member(found["archive"], found["member"], *numbers, bool(found["packed"]))


def read(member: Member) -> bytes:
    """Return a member's bytes.

    Raises:
        ImageError: the archive is gone or shorter than it was, or the bytes cannot be inflated.
    """
    try:
        with Path(member.archive).open("rb") as file:
            content = os.pread(file.fileno(), member.size, member.offset)
    except OSError as error:
        raise ImageError(f"{member} cannot be read: {error.strerror}.") from error
    if len(content) < member.size:
        raise ImageError(f"{member} cannot be read: the archive ends before it. Download or copy the archive again.")
    if not member.packed:
        return content
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = inflater.decompress(content, MOST_BYTES)
    except zlib.error as error:
        raise ImageError(f"{member} cannot be inflated ({error}). Download or copy the archive again.") from error
    if not inflater.eof:
        raise ImageError(f"{member} is cut short, or has more than {MOST_BYTES:,} bytes. Replace the archive.")
    return content


def is_archive(path: Path) -> bool:
    """Whether a path is a file that its name calls a tar or zip archive."""
    return path.suffix.lower() in SUFFIXES and os.path.isfile(path)  # noqa: PTH113 - no name is too long for it


def tar_members(path: Path) -> Iterator[Member]:
    """Yield the files of an uncompressed tar archive in its order; links and folders are passed over.

    Raises:
        DataError: it is no such archive, or is cut short; what stands before the damage has been yielded.
    """
    try:
        with tarfile.open(path, "r:") as opened:
            size = path.stat().st_size
            for info in opened:
                # The list of members that tarfile keeps would grow with the archive.
                opened.members = []  # type: ignore[attr-defined]
                if not info.isreg() or info.sparse is not None:
                    continue
                if info.offset_data + info.size > size:
                    raise DataError(f"{path} is cut short within {info.name}. Download or copy it again.")
                yield Member(str(path), info.name, info.offset_data, info.size)
    except (OSError, tarfile.TarError, UnicodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(
            f"{path} cannot be read as a tar archive ({reason}). Download it again; compressed ones are to be "
            "uncompressed first, since images are read from their places in it."
        ) from error


class Archive:
    """The files of an archive by name; those of its only folder go by their names within it too.

    Raises:
        DataError: the archive cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: Mapping[str, Member | zipfile.ZipInfo]
        if path.suffix.lower() == ".tar":
            self._files = {_plain(member.name): member for member in tar_members(path)}
        else:
            try:
                with zipfile.ZipFile(path) as opened:
                    self._files = {_plain(info.filename): info for info in opened.infolist() if not info.is_dir()}
            except (OSError, zipfile.BadZipFile, UnicodeError, ValueError, NotImplementedError) as error:
                reason = getattr(error, "strerror", None) or " ".join(str(error).split())
                raise DataError(f"{path} cannot be read as a zip archive ({reason}). Download it again.") from error
        tops = {name.partition("/")[0] for name in self._files}
        self._top = f"{tops.pop()}/" if len(tops) == 1 else ""

    def __contains__(self, name: str) -> bool:
        return _plain(name) in self._files or self._top + _plain(name) in self._files

    def __getitem__(self, name: str) -> Member:
        """Return a file's place.

        Raises:
            KeyError: there is none of this name.
            ImageError: it is encrypted, or packed by another method than deflate.
        """
        plain = _plain(name)
        found = self._files[plain] if plain in self._files else self._files[self._top + plain]
        return found if isinstance(found, Member) else self._in_zip(found)

    def _in_zip(self, info: zipfile.ZipInfo) -> Member:
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            how = "encrypted" if info.flag_bits & 1 else "packed by another method than deflate"
            raise ImageError(f"{self.path}#{info.filename} is {how}. Unpack the archive, and name its folder.")
        try:
            with self.path.open("rb") as file:
                header = os.pread(file.fileno(), _LOCAL_HEADER, info.header_offset)
        except OSError as error:
            raise ImageError(f"{self.path} cannot be read: {error.strerror}.") from error
        # The local header's own lengths: its extra field may differ from the directory's.
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        offset = info.header_offset + _LOCAL_HEADER + lengths
        packed = info.compress_type == zipfile.ZIP_DEFLATED
        return Member(str(self.path), info.filename, offset, info.compress_size, packed)


@lru_cache(maxsize=8)
def _opened(path: Path, size: int, changed: int) -> Archive:
    return Archive(path)


def open_archive(path: Path) -> Archive:
    """Return an archive's index, made once as long as the file does not change.

    Raises:
        DataError: the archive cannot be read.
    """
    stat = path.stat()
    return _opened(path, stat.st_size, stat.st_mtime_ns)


def _plain(name: str) -> str:
    return name.replace("\\", "/").removeprefix("./")
