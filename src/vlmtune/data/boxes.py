"""Answers that are boxes, in the one form that samples hold: pixels of the upright image, as JSON text.

``[{"bbox": [x1, y1, x2, y2], "label": "dog"}]`` is the answer to learn, and the reference to score against. What a
model reads and writes instead is its family's own (:mod:`vlmtune.models.boxes`); ``meta["boxes"]`` says that a sample
is to be told in it, and what is asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vlmtune.data.sample import ImageRef, Message, Sample

# Entry of a sample's meta: {"task": ..., "ask": labels or a phrase, "size": [width, height]}, the last two optional.
BOXES = "boxes"
Task = Literal["detection", "grounding"]
Corners = tuple[float, float, float, float]

# Prompts of families that have no words of their own for it, and the fields that a person's own prompt may hold.
ASK_LABELS = "Detect all objects of these kinds: {labels}. Give the box and the label of each."
ASK_ALL = "Detect all objects in this image. Give the box and the label of each."
ASK_PHRASE = "Give the box of what this describes: {phrase}"
# What answers are scored with by default.
METRICS: dict[Task, tuple[str, ...]] = {"detection": ("map", "map50"), "grounding": ("iou", "acc@0.5")}
# More labels are not listed in a prompt.
MOST_LABELS = 100


@dataclass(frozen=True)
class Box:
    """A box and what it holds.

    Attributes:
        corners: left, top, right, bottom in pixels of the upright image.
        label: its kind, or the phrase that describes it.
        crowd: it holds many objects; never learned, and not counted against an answer.
    """

    corners: Corners
    label: str = ""
    crowd: bool = False


class BoxError(ValueError):
    """Why numbers are no box."""


def box_of(numbers: Any, label: Any, *, size: tuple[int, int] | None = None, sides: bool = False) -> Box:
    """Make a box of four numbers.

    Args:
        numbers: left, top, right, bottom; or, with ``sides``, left, top, width, height, as COCO has it.
        label: what it holds.
        size: (width, height) of the image; what stands out by rounding is cut off.
        sides: see above.

    Raises:
        BoxError: they are no four finite numbers, enclose nothing, or lie outside of the image.
    """
    try:
        x1, y1, x2, y2 = (float(number) for number in numbers)
    except (TypeError, ValueError):
        raise BoxError(f"the box {numbers!r} is not four numbers") from None
    if sides:
        x2, y2 = x1 + x2, y1 + y2
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        raise BoxError(f"the box {list(numbers)} is not four finite numbers")
    if x2 <= x1 or y2 <= y1:
        form = "[x, y, width, height]" if sides else "[x1, y1, x2, y2]"
        raise BoxError(f"the box {list(numbers)} encloses nothing as {form}")
    if size is not None:
        width, height = size
        # Annotators' tools round: a pixel outside is no mistake.
        if x1 < -1 or y1 < -1 or x2 > width + 1 or y2 > height + 1 or x1 >= width or y1 >= height:
            raise BoxError(f"the box {list(numbers)} lies outside of its image of {width} x {height} pixels")
        x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    x1, y1, x2, y2 = (round(number, 2) for number in (x1, y1, x2, y2))
    return Box((x1, y1, x2, y2), " ".join(str(label).split()))


def boxes_text(boxes: Iterable[Box]) -> str:
    """Return boxes as the text of an answer."""
    rows = [
        {"bbox": [int(n) if n == int(n) else n for n in box.corners], "label": box.label}
        | ({"iscrowd": 1} if box.crowd else {})
        for box in boxes
    ]
    return json.dumps(rows, ensure_ascii=False)


def read_boxes(text: str) -> list[Box] | None:
    """Return the boxes of a text made by :func:`boxes_text`, or ``None`` for any other."""
    try:
        return [
            Box(tuple(float(n) for n in row["bbox"]), row["label"], bool(row.get("iscrowd")))  # type: ignore[arg-type]
            for row in json.loads(text)
        ]
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def boxes_sample(
    id: str,
    image: ImageRef,
    boxes: Sequence[Box],
    *,
    task: Task,
    ask: str | Sequence[str],
    prompt: str | None = None,
    size: tuple[int, int] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Sample:
    """Make a sample whose answer is boxes.

    Args:
        id: the sample's id.
        image: the image they lie in.
        boxes: all of them; for grounding the one.
        task: what is asked for: objects of some kinds, or what a phrase describes.
        ask: the kinds, none for all of them; or the phrase.
        prompt: a person's own, where ``{labels}`` or ``{phrase}`` stands for ``ask``; by default the family's.
        size: (width, height) of the image that the boxes were drawn on, to be compared with the file's.
        meta: whatever the format knows besides.
    """
    told: dict[str, Any] = {"task": task}
    if prompt is None:
        told["ask"] = ask if isinstance(ask, str) else list(ask)
    if size is not None:
        told["size"] = list(size)
    learned = [box for box in boxes if not box.crowd]
    return Sample(
        id=id,
        images=(image,),
        messages=(
            Message.make("user", asked(prompt or default_ask(ask), ask), images=1),
            Message.make("assistant", boxes_text(learned)),
        ),
        references=(boxes_text(boxes),),
        meta={**(meta or {}), BOXES: told},
    )


def default_ask(ask: str | Sequence[str]) -> str:
    """Return the prompt of families that have none of their own."""
    return ASK_PHRASE if isinstance(ask, str) else ASK_LABELS if ask else ASK_ALL


def asked(prompt: str, ask: str | Sequence[str], joiner: str = ", ") -> str:
    """Put labels or a phrase into a prompt."""
    if isinstance(ask, str):
        return prompt.replace("{phrase}", ask)
    return prompt.replace("{labels}", joiner.join(ask))
