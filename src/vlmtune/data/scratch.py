"""A folder for files of this process alone, which goes with it."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import lru_cache


@lru_cache(maxsize=1)
def folder() -> str:
    """Return the folder, made where ``TMPDIR`` says when it is first asked for."""
    made = tempfile.mkdtemp(prefix="vlmtune-rows-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made
