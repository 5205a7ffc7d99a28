"""Boxes as ms-swift has them: ``<ref-object>`` and ``<bbox>`` in the turns stand for the entries of ``objects``.

::

    {"messages": [{"role": "user", "content": "<image>Find the <ref-object>."},
                  {"role": "assistant", "content": "<bbox><bbox>"}], "images": ["farm.jpg"],
     "objects": {"ref": ["sheep"], "bbox": [[90, 160, 135, 212], [360, 480, 495, 532]]}}

Boxes are left, top, right, bottom in pixels; with ``"bbox_type": "norm1"`` in shares of the image, whose ``width`` and
``height`` the row then needs. An answer that is boxes and what they hold alone is told as each family tells boxes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlmtune.data.boxes import Box, BoxError, Task, box_of, boxes_sample
from vlmtune.data.formats.files import RowError
from vlmtune.data.formats.turns import ROLE_NAMES
from vlmtune.data.sample import ImageRef, Sample

REF, BOX = BOX_PLACES = ("<ref-object>", "<bbox>")
_PLACES = re.compile(f"({REF}|{BOX})")
_KIND = "unusable box"


def placed_boxes_sample(
    objects: Any,
    turns: Sequence[Any],
    name: str,
    images: Sequence[ImageRef],
    size: tuple[int, int] | None,
    meta: Mapping[str, Any],
) -> Sample:
    """Make a sample of one question and its boxes.

    Raises:
        RowError: the answer holds other words beside boxes, or places and entries do not match.
    """
    texts = [turn.get("content") if isinstance(turn, Mapping) else None for turn in turns]
    roles = [ROLE_NAMES.get(str(turn.get("role"))) if isinstance(turn, Mapping) else None for turn in turns]
    if roles != ["user", "assistant"] or len(images) != 1 or not all(isinstance(text, str) for text in texts):
        raise RowError(f"it has {REF} or {BOX} in other than one question about one image and its answer", _KIND)
    question, answer = str(texts[0]).replace("<image>", "").strip("\n"), str(texts[1])
    if not isinstance(objects, Mapping) or not isinstance(objects.get("bbox"), list):
        raise RowError("its objects have no 'bbox' list", _KIND)
    refs, corners = [str(ref) for ref in objects.get("ref") or ()], list(objects["bbox"])
    needed = {REF: question.count(REF) + answer.count(REF), BOX: answer.count(BOX)}
    if BOX in question or needed[BOX] == 0 or _PLACES.sub("", answer).strip(" ,;.\n"):
        raise RowError(
            f"{BOX} or {REF} stand among other words, or in the question, and families of models write boxes "
            "differently. Write the numbers and words themselves, as your model has them",
            _KIND,
        )
    if needed != {REF: len(refs), BOX: len(corners)}:
        raise RowError(f"it has {needed[BOX]} {BOX} and {needed[REF]} {REF} for {len(corners)} and {len(refs)}", _KIND)
    if objects.get("bbox_type") == "norm1":
        corners = _in_pixels(corners, size)
    asked = refs[: question.count(REF)]
    for ref in asked:
        question = question.replace(REF, ref, 1)
    # The only thing asked for is what all boxes hold, unless the answer says otherwise.
    boxes = _boxes(answer, asked[0] if len(asked) == 1 else "", refs[len(asked) :], corners, size)
    task: Task = "grounding" if len(boxes) == 1 and REF not in answer else "detection"
    if task == "detection" and not all(box.label for box in boxes):
        raise RowError(f"no {REF} says what its {len(boxes)} boxes hold", _KIND)
    return boxes_sample(name, images[0], boxes, task=task, ask=question, prompt=question, size=size, meta=meta)


def _boxes(
    answer: str, label: str, refs: Sequence[str], corners: Sequence[Any], size: tuple[int, int] | None
) -> list[Box]:
    left, numbers = iter(refs), iter(corners)
    boxes = []
    try:
        for place in _PLACES.findall(answer):
            if place == REF:
                label = next(left)
            else:
                boxes.append(box_of(next(numbers), label, size=size))
    except BoxError as error:
        raise RowError(str(error), _KIND) from error
    return boxes


def _in_pixels(corners: list[Any], size: tuple[int, int] | None) -> list[Any]:
    if size is None:
        raise RowError("its boxes are shares of an image whose 'width' and 'height' it does not say", _KIND)
    return [[number * side for number, side in zip(one, (*size, *size), strict=True)] for one in corners]
