"""How each family reads and writes boxes: in which numbers, in which order, in which words.

Families differ: pixels of the image after their own resize, thousandths of its sides, tokens. A codec takes boxes in
pixels of the upright image to a family's text and back, through the view that its processor has of the image.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmtune.data.boxes import BOXES, Box, Corners, Task, asked, boxes_text, read_boxes
from vlmtune.data.sample import Message, Sample

# (height, width) of an upright image, in pixels.
Size = tuple[int, int]
# Four numbers as they stand in a text, and the label beside them.
Written = tuple[Corners, str]
NOTHING = "none"

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_LIST = re.compile(r"\[\s*" + r"\s*,\s*".join([_NUMBER] * 4) + r"\s*\]")
_PAIRS = re.compile(rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)\s*,\s*\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)")
_LOCATIONS = re.compile(r"<loc(\d{4})>" * 4 + r"\s*([^;<]*)")
_OBJECT = re.compile(r"\{[^{}]*\}")
# What stands around boxes and labels and belongs to neither.
_AROUND = re.compile(r"</?(?:ref|box)>|<\|(?:object_ref|box)_(?:start|end)\|>|[\[\](),;:\s]+$|^[\[\](),;:\s]+")


@dataclass(frozen=True)
class View:
    """The part of an image that a model sees, and the size in which it sees it.

    Attributes:
        left, top, width, height: the part, in pixels of the upright image; it may reach beyond it.
        seen: (width, height) of the part after the processor's resize, in pixels.
    """

    left: float
    top: float
    width: float
    height: float
    seen: tuple[int, int]


ViewOf = Callable[[Any, Size], View]


def whole(processor: Any, size: Size) -> View:
    """For families that see the whole image, whose numbers are shares of its sides."""
    height, width = size
    return View(0, 0, width, height, (width, height))


@dataclass(frozen=True)
class BoxCodec:
    """A family's way to write boxes.

    Attributes:
        write: (numbers and label of each box, the task) -> text.
        read: the other way; ``None`` for a text without boxes. Reads what a model may write beside its usual form.
        scale: the number that stands for the whole side; ``None`` for pixels of the image as the model sees it.
        largest: the largest number; ``scale`` by default.
        digits: after the point.
        y_first: top and left, bottom and right, instead of left and top.
        asks: prompts with ``{labels}`` or ``{phrase}``, for a task or for ``everything``; by default plain ones.
        joiner: stands between labels in a prompt.
        source: where this convention is published, or why it was chosen.
    """

    write: Callable[[Sequence[Written], Task], str]
    read: Callable[[str], list[Written] | None]
    source: str
    scale: float | None = 1000
    largest: float | None = None
    digits: int = 0
    y_first: bool = False
    asks: Mapping[str, str] = field(default_factory=dict)
    joiner: str = ", "

    def to_text(self, boxes: Sequence[Box], view: View, task: Task) -> str:
        """Return boxes in the family's words; what lies outside of the view is cut off."""
        written = []
        for box in boxes:
            x1, y1, x2, y2 = (
                self._number(value, *along) for value, along in zip(box.corners, self._axes(view) * 2, strict=True)
            )
            written.append(((y1, x1, y2, x2) if self.y_first else (x1, y1, x2, y2), box.label))
        return self.write(written, task)

    def from_text(self, text: str, view: View, size: Size) -> list[Box] | None:
        """Return the boxes of an answer, cut to the image; ``None`` where it holds none and does not say so."""
        found = self.read(text)
        if found is None:
            return None
        boxes = []
        for numbers, label in found:
            x1, y1, x2, y2 = (numbers[1], numbers[0], numbers[3], numbers[2]) if self.y_first else numbers
            pixels = [
                min(max(number / full * length + start, 0.0), float(side))
                for number, (start, length, full), side in zip(
                    (x1, y1, x2, y2), self._axes(view) * 2, (size[1], size[0]) * 2, strict=True
                )
            ]
            boxes.append(Box(tuple(round(pixel, 2) for pixel in pixels), label))  # type: ignore[arg-type]
        return boxes

    def _axes(self, view: View) -> tuple[tuple[float, float, float], ...]:
        """Start, length, and the number that stands for the length, across and down."""
        across, down = (self.scale, self.scale) if self.scale is not None else view.seen
        return (view.left, view.width, across), (view.top, view.height, down)

    def _number(self, pixel: float, start: float, length: float, full: float) -> float:
        number = min(max((pixel - start) / length * full, 0.0), full if self.largest is None else self.largest)
        return round(number, self.digits) if self.digits else int(number + 0.5)


def tell(sample: Sample, codec: BoxCodec, view: View) -> Sample:
    """Return a sample of boxes in a family's words: its question, where a person has not chosen it, and its answer."""
    told = sample.meta[BOXES]
    messages = list(sample.messages)
    if "ask" in told:
        ask = told["ask"]
        words = codec.asks.get(told["task"] if ask else "everything")
        if words is not None:
            text = asked(words, ask, codec.joiner)
            messages[0] = Message.make("user", text, images=messages[0].n_images)
    boxes = read_boxes(messages[-1].text) if messages[-1].role == "assistant" else None
    if boxes is not None:
        answer = codec.to_text([box for box in boxes if not box.crowd], view, told["task"])
        messages[-1] = Message.make("assistant", answer)
    meta = {name: value for name, value in sample.meta.items() if name != BOXES}
    return dataclasses.replace(sample, messages=tuple(messages), meta=meta)


def understand(answer: str, codec: BoxCodec, view: View, size: Size) -> str:
    """Return a model's answer in the form of samples; one without boxes stays as it is."""
    boxes = codec.from_text(answer, view, size)
    return answer if boxes is None else boxes_text(boxes)


def json_codec(key: str, source: str, *, fenced: bool = False, **options: Any) -> BoxCodec:
    """Make a codec that writes a JSON list of objects, each with ``key`` and ``label``.

    Args:
        key: of the numbers.
        source: as :class:`BoxCodec` has it.
        fenced: between Markdown's fences, a line each.
        **options: of :class:`BoxCodec`.
    """

    def write(boxes: Sequence[Written], task: Task) -> str:
        rows = [json.dumps({key: list(numbers), "label": label}, ensure_ascii=False) for numbers, label in boxes]
        if not rows:
            return "[]"
        return "```json\n[\n\t" + ",\n\t".join(rows) + "\n]\n```" if fenced else f"[{', '.join(rows)}]"

    return BoxCodec(write, read_json_boxes, source, **options)


def read_json_boxes(text: str) -> list[Written] | None:
    """Read JSON objects of boxes, also of a list that was cut off, or bare lists of four numbers."""
    found: list[Written] = []
    for piece in _OBJECT.findall(text):
        try:
            row = json.loads(piece)
            numbers = next(row[name] for name in ("bbox_2d", "box_2d", "bbox", "box") if name in row)
            x1, y1, x2, y2 = (float(number) for number in numbers)
        except (StopIteration, TypeError, ValueError):
            continue
        found.append(((x1, y1, x2, y2), str(row.get("label", ""))))
    if found:
        return found
    found = [(_four(match.groups()), "") for match in _LIST.finditer(text)]
    return found or ([] if re.search(r"\[\s*\]", text) or says_nothing(text) else None)


def write_pairs(boxes: Sequence[Written], task: Task) -> str:
    """``<|object_ref_start|>dog<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>``, one after the other."""
    return "".join(
        f"<|object_ref_start|>{label}<|object_ref_end|><|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"
        for (x1, y1, x2, y2), label in boxes
    ) or NOTHING  # fmt: skip


def read_pairs(text: str) -> list[Written] | None:
    """Read ``dog(x1,y1),(x2,y2)``, with the tokens around label and box or without."""
    return _labelled_before(text, _PAIRS)


def write_ref_box(boxes: Sequence[Written], task: Task) -> str:
    """``<ref>dog</ref><box>[[x1, y1, x2, y2], [x1, y1, x2, y2]]</box>``, a line for each label."""
    by_label: dict[str, list[list[float]]] = {}
    for numbers, label in boxes:
        by_label.setdefault(label, []).append(list(numbers))
    return "\n".join(f"<ref>{label}</ref><box>{rows}</box>" for label, rows in by_label.items()) or NOTHING


def read_lists(text: str) -> list[Written] | None:
    """Read ``dog [x1, y1, x2, y2]``, also several lists behind one label, or JSON."""
    return read_json_boxes(text) if "{" in text else _labelled_before(text, _LIST)


def write_locations(boxes: Sequence[Written], task: Task) -> str:
    """``<loc0123><loc0045><loc0678><loc0910> dog ; ...``."""
    rows = ["".join(f"<loc{int(number):04d}>" for number in numbers) + f" {label}" for numbers, label in boxes]
    return " ; ".join(rows) or NOTHING


def read_locations(text: str) -> list[Written] | None:
    """Read four location tokens and the label behind them."""
    found = [(_four(match.groups()[:4]), match[5].strip()) for match in _LOCATIONS.finditer(text)]
    return found or ([] if says_nothing(text) else None)


def says_nothing(text: str) -> bool:
    """Whether an answer says that there is no box."""
    return text.strip().lower().rstrip(".") == NOTHING


def _labelled_before(text: str, pattern: re.Pattern[str]) -> list[Written] | None:
    found: list[Written] = []
    end, label = 0, ""
    for match in pattern.finditer(text):
        before = text[end : match.start()]
        while (bare := _AROUND.sub("", before)) != before:
            before = bare
        # Boxes behind one label share it.
        label = before.strip() or label
        found.append((_four(match.groups()), label))
        end = match.end()
    return found or ([] if says_nothing(text) else None)


def _four(numbers: Sequence[str]) -> Corners:
    x1, y1, x2, y2 = map(float, numbers)
    return x1, y1, x2, y2


THOUSANDTHS = json_codec(
    "bbox_2d",
    "none published for this family; the numbers of Qwen3-VL, which most families understand, without fences",
)
