"""Boxes that references and answers name, and where they lie on the picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vlmtune.evaluation.metrics.detection import parse_boxes
from vlmtune.evaluation.metrics.grounding import parse_box

Size = tuple[int, int]
Corners = tuple[float, float, float, float]
UNITS = {"shares": "shares of the image", "pixels": "pixels of the image", "thousandths": "thousandths of the image"}
# An image must be this much larger than its boxes reach for thousandths to be the better guess.
MARGIN = 1.2


@dataclass(frozen=True)
class Box:
    """A box as (x1, y1, x2, y2), in the text's own units, with its label where it has one."""

    corners: Corners
    label: str = ""


def boxes_of(text: str) -> tuple[Box, ...]:
    """Return the boxes of a text: those of its JSON list, else the first ``[x1, y1, x2, y2]``, as the metrics do."""
    found = [Box(_corners(*one["bbox"]), one["label"]) for one in parse_boxes(text) or ()]
    if not found and (corners := parse_box(text)):
        found = [Box(corners)]
    return tuple(found)


def _corners(x: float, y: float, width: float, height: float) -> Corners:
    return x, y, x + width, y + height


def units_of(samples: Iterable[tuple[Sequence[Box], Size]]) -> str:
    """Tell what the references' boxes count in, from all of them together.

    Args:
        samples: boxes of the references, and the image's width and height in pixels.

    Returns:
        ``shares`` where no number passes 1; ``thousandths`` where a box does not fit into its image, or where none
        passes 1,000 although images are much larger; else ``pixels``.
    """
    placed = [(box.corners, size) for boxes, size in samples for box in boxes]
    most = max((max(corners) for corners, _ in placed), default=0)
    if most <= 1:
        return "shares"
    fits = all(corners[2] <= width and corners[3] <= height for corners, (width, height) in placed)
    larger = all(min(size) >= MARGIN * 1000 for _, size in placed)
    return "thousandths" if not fits or (most <= 1000 and larger) else "pixels"


def on_picture(box: Box, units: str, image: Size, shown: Size) -> tuple[float, float, float, float] | None:
    """Return (x, y, width, height) of a box on a picture of another size, or ``None`` where it encloses nothing.

    Args:
        box: to place.
        units: as :func:`units_of` tells.
        image: width and height of the original, in pixels.
        shown: of the picture.
    """
    full = {"shares": (1, 1), "pixels": image, "thousandths": (1000, 1000)}[units]
    scale = [side / whole for side, whole in zip(shown, full, strict=True)]
    x1, y1, x2, y2 = (value * scale[place % 2] for place, value in enumerate(box.corners))
    if x1 >= x2 or y1 >= y2:
        return None
    return round(x1, 1), round(y1, 1), round(x2 - x1, 1), round(y2 - y1, 1)
