"""Writing files so that a crash never leaves half of one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

# What ends in this is not whole yet, or was left by a process that was killed while it wrote.
UNFINISHED = ".unfinished"


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader, and a run after a crash, sees the old one or the new one, never a part.

    Only one process at a time may write the file.

    Raises:
        OSError: it cannot be written; an old one is as it was.
    """
    temporary = path.with_name(path.name + UNFINISHED)
    try:
        temporary.write_text(text, encoding="utf-8")
        to_disk(temporary)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def to_disk(path: Path) -> None:
    """Have the system write what it holds of a file, or of a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
