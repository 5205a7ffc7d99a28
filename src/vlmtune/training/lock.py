"""One run at a time in an output directory."""

from __future__ import annotations

import importlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vlmtune.errors import OutputError

fcntl: Any
try:
    fcntl = importlib.import_module("fcntl")
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = ".vlmtune.lock"


@contextmanager
def only_run(output_dir: Path) -> Iterator[None]:
    """Hold the lock of an output directory; the system frees it when this process ends, however it ends.

    A POSIX record lock rather than ``flock``: data loading processes do not inherit it, so it ends with the run that
    was killed and not some seconds later with them, and it works on NFS.

    Raises:
        OutputError: another run holds it, or nothing can be written in the directory.
    """
    path = output_dir / LOCK_FILE
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OutputError(
            f"Nothing can be written in the output directory {output_dir} ({error.strerror}). Choose another "
            "output_dir, or change its permissions."
        ) from error
    try:
        _lock(handle, path, output_dir)
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()
    finally:
        os.close(handle)


def _lock(handle: int, path: Path, output_dir: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A run that has just ended may have deleted the file that was opened here.
        held = path.exists() and os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        held = False
    if not held:
        holder = "another process"
        with suppress(OSError, ValueError):
            found = json.loads(path.read_text())
            holder = f"process {found['pid']} on {found['host']}"
        raise OutputError(
            f"Another run is writing into {output_dir} ({holder}). Wait until it has ended, or choose another "
            "output_dir."
        )
