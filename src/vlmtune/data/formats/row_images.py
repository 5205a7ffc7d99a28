"""The images that a row names or holds, in the ways that tools write them."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from vlmtune.data.formats.columns import IMAGE_COLUMNS
from vlmtune.data.formats.files import RowError
from vlmtune.data.sample import ImageRef

# A path from a folder on, with nothing in it that Path would change.
_PLAIN = re.compile(r"[^/.~][^/]*(/[^/.][^/]*)*")


def listed_images(row: Mapping[str, Any], images: Path) -> list[ImageRef]:
    """Return the images of a row's own columns, in order.

    Args:
        row: with any of ``IMAGE_COLUMNS``.
        images: the folder that paths count from.

    Raises:
        RowError: one is neither a path, nor an address of a file, nor bytes.
    """
    found = next((row[name] for name in IMAGE_COLUMNS if row.get(name) is not None), None) or []
    return [image_of(item, images) for item in (found if isinstance(found, list) else [found])]


def image_of(item: Any, images: Path) -> ImageRef:
    """Return the image that a path, an address, bytes, or an object of these stands for.

    Raises:
        RowError: it is none of them.
    """
    if isinstance(item, Mapping):
        # "data" is base64 without the beginning of an address: Anthropic's content parts.
        item = item.get("bytes") or item.get("url") or item.get("path") or _base64(item.get("data"))
    if isinstance(item, bytes):
        # Without the name it had: tables give all their images one name, and images are told apart by content.
        return ImageRef(bytes=item)
    if not isinstance(item, str) or not item:
        raise RowError(f"the image {item!r} is not a path")
    try:
        scheme = urlsplit(item).scheme if ":" in item[:10] else ""
    except ValueError as error:
        raise RowError(f"the image {item[:80]!r} is neither a path nor an address ({error})") from error
    if scheme in ("http", "https"):
        return ImageRef(path=item)
    if scheme == "file":
        return ImageRef(path=unquote(urlsplit(item).path))
    if scheme == "data":
        return ImageRef(bytes=_base64(item.partition(",")[2]))
    if _PLAIN.fullmatch(item) and images.name:
        # As below, in a fraction of the time.
        return ImageRef(path=f"{images}/{item}")
    path = Path(item).expanduser()
    return ImageRef(path=str(path if path.is_absolute() else images / path))


def _base64(text: Any) -> bytes | None:
    if not isinstance(text, str):
        return None
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise RowError(f"the image's data are not base64 ({error})") from error
