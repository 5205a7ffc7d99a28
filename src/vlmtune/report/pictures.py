"""Thumbnails as data addresses, so that a page carries its pictures with it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from vlmtune.data.images import decode
from vlmtune.data.sample import ImageRef
from vlmtune.errors import ImageError

# (longest side, JPEG quality), the first that keeps all pictures within the budget.
STEPS = ((480, 80), (320, 80), (240, 75), (200, 70), (160, 60), (112, 45), (72, 30))
BUDGET = 4_000_000
# Up to this side a picture is drawn with sharp pixels.
SMALL = 96


@dataclass(frozen=True)
class Picture:
    """A thumbnail.

    Attributes:
        address: its data address.
        size: its width and height in pixels.
        original: those of the image.
        small: it is the image itself, and drawn with sharp pixels.
    """

    address: str
    size: tuple[int, int]
    original: tuple[int, int]
    small: bool


def thumbnails(shown: Sequence[str]) -> dict[str, Picture]:
    """Return a thumbnail of each image that can be read.

    Args:
        shown: files, each as often as the page shows it; all of that together takes at most 4 MB.
    """
    originals: dict[str, tuple[Image.Image, tuple[int, int]]] = {}
    for name in dict.fromkeys(shown):
        try:
            image = decode(ImageRef(path=name))
        except ImageError:
            continue
        size = image.size
        image.thumbnail((STEPS[0][0],) * 2, Image.Resampling.LANCZOS)
        originals[name] = image, size
    made: dict[str, Picture] = {}
    for side, quality in STEPS:
        made = {name: _encode(image, size, side, quality) for name, (image, size) in originals.items()}
        if sum(len(made[name].address) for name in shown if name in made) <= BUDGET:
            break
    return made


def _encode(image: Image.Image, original: tuple[int, int], side: int, quality: int) -> Picture:
    copy = image.copy()
    copy.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small = max(original) <= SMALL and copy.size == original
    if small:
        copy.save(file, "PNG", optimize=True)
    else:
        copy.save(file, "JPEG", quality=quality, optimize=True)
    kind = "png" if small else "jpeg"
    address = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    return Picture(address, copy.size, original, small)
