"""What the tests found supported of each family, as they wrote it down (``make families``)."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

from vlmtune.models.family import Family

FILE = Path(__file__).parent / "families" / "proved.json"
# Facts that nothing computed depends on.
_BESIDE = {"aliases", "paper", "licence", "source", "sharing_reason", "cache_reason", "boxes", "view", "limit_pixels"}


def proved() -> dict[str, dict[str, Any]]:
    """Return what was written of each family: ``record``, the digest of the record that was tested; ``transformers``,
    the version; ``supports``, what was proved.
    """
    content: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
    return content


def record_digest(family: Family) -> str:
    """Digest of a record; where it is another than the one that was tested, nothing is proved of it."""
    digest = hashlib.sha256()
    for field in dataclasses.fields(family):
        if field.name in _BESIDE:
            continue
        value = getattr(family, field.name)
        digest.update(f"{field.name}={inspect.getsource(value) if callable(value) else value!r}\n".encode())
    return digest.hexdigest()[:16]
