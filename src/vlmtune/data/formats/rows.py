"""One row, whatever its columns, to samples: what JSON lines, lists, tables and image folders share.

Columns, the first that fit:

* ``messages`` (``role`` and ``content``); ``conversations`` (LLaVA and ShareGPT: ``from`` and ``value``);
  ``conversation`` (ms-swift: ``human`` and ``assistant``)
* a prompt and an answer: ``prompt`` and ``completion`` (TRL), ``prefix`` and ``suffix`` (PaliGemma), ``query`` and
  ``response`` (ms-swift), ``instruction``, ``input`` and ``output`` (Alpaca), with ``system`` and ``history``
* ``texts`` (the Cauldron: ``user`` and ``assistant``)
* ``question`` or ``query`` with ``answer``, ``answers`` or ``label`` (and ``choices`` or ``options``)
* ``objects`` with ``bbox`` and their labels, boxes as COCO has them (imagefolder, many data sets on the Hub); ``bbox``
  with ``sent``, ``expression`` or ``phrase`` (RefCOCO as Shikra, Qwen-VL and InternVL write it)
* ``ground_truth`` (Donut, CORD: JSON of ``gt_parse``)
* ``caption``, ``captions``, ``text`` or ``sentences``; of several, each is a sample
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmtune.data.boxes import MOST_LABELS, BoxError, box_of, boxes_sample
from vlmtune.data.formats.base import DEFAULT_CAPTION_PROMPT, LABELS, PHRASE, Source, own_prompt
from vlmtune.data.formats.columns import (
    CAPTION_COLUMNS,
    CHOICE_COLUMNS,
    IMAGE_COLUMNS,
    PHRASE_COLUMNS,
    QUESTION_COLUMNS,
    TURN_COLUMNS,
    gathered,
    pair_of,
    renamed,
    shape_of,
)
from vlmtune.data.formats.files import RowError
from vlmtune.data.formats.questions import LETTERS, choice_question, question_sample
from vlmtune.data.formats.row_images import listed_images
from vlmtune.data.formats.swift_boxes import BOX_PLACES, placed_boxes_sample
from vlmtune.data.formats.turns import PLACE, conversation_sample, pair_turns, turns_of
from vlmtune.data.sample import ImageRef, Sample

# Asked where the answer is a document's contents as JSON.
PARSE_PROMPT = "Give the contents of this document as JSON."
LABEL_FIELDS = ("category", "categories", "label", "labels", "category_id", "name")


def make_samples(
    row: Any, default_id: str, images: Path, source: Source | None = None, *, labels: Sequence[str] = ()
) -> list[Sample]:
    """Make the samples of a row: one, but where an image has several captions one of each.

    Args:
        row: an object of any of the shapes above.
        default_id: its id where it has none.
        images: the folder that paths count from.
        source: its ``prompt`` is for the rows that it fits, and its ``columns`` say what the row calls the names above.
        labels: of the numbers that stand for objects' labels, where they are known.

    Raises:
        RowError: the row has none of the shapes, or what it holds cannot be used.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"it is {str(row)[:60]!r}: it is no object")
    row = gathered(renamed(row, source.columns) if source and source.columns else row)
    shape = shape_of([name for name, value in row.items() if value is not None])
    if shape not in CAPTION_COLUMNS or not isinstance(row[shape], list) or len(row[shape]) < 2:
        return [make_sample(row, default_id, images, source, labels=labels)]
    texts = [_caption(text) for text in row[shape]]
    if not all(texts):
        raise RowError("one of its captions is empty", "empty caption")
    name = default_id if row.get("id") is None else str(row["id"])
    whole = {"references": list(dict.fromkeys(texts))} | dict(row)
    return [
        make_sample(whole | {shape: text, "id": f"{name}#{number}"}, default_id, images, source)
        for number, text in enumerate(texts)
    ]


def make_sample(
    row: Mapping[str, Any],
    default_id: str,
    images: Path,
    source: Source | None = None,
    *,
    labels: Sequence[str] = (),
) -> Sample:
    """Make the one sample of a row; as :func:`make_samples`, which renames and gathers columns before."""
    prompt = source.prompt if source else None
    shape = shape_of([name for name, value in row.items() if value is not None])
    name = default_id if row.get("id") is None else str(row["id"])
    if shape == "question":
        return _question(row, name, images, prompt)
    if shape == "objects":
        return _objects(row, name, images, prompt, labels)
    if shape == "bbox":
        return _grounding(row, name, images, prompt)
    if shape is None:
        raise _unknown(row)
    turns: Any
    if shape in CAPTION_COLUMNS:
        given = row[shape]
        text = _caption(given[0] if isinstance(given, list) and given else given)
        if not text:
            raise RowError("its caption is empty", "empty caption")
        turns = pair_turns(own_prompt(prompt, "") or DEFAULT_CAPTION_PROMPT, text)
    elif shape == "ground_truth":
        turns = pair_turns(own_prompt(prompt, "") or PARSE_PROMPT, _parse(row[shape]))
    elif shape == "completion":
        turns = _pair(row)
    else:
        turns = turns_of(row[shape], row.get("system"))
    if turns is None or (shape == "texts" and not all(isinstance(turn, Mapping) for turn in turns)):
        raise RowError(f"its {shape} are {str(row[shape])[:80]!r}: it has no {shape!r} list")
    about_image = shape in CAPTION_COLUMNS or shape == "ground_truth"
    if about_image and not any(row.get(name) for name in IMAGE_COLUMNS):
        raise RowError("it names no image", "missing image")
    meta = _meta(row)
    if shape in TURN_COLUMNS and row.get("objects") and any(place in str(turns) for place in BOX_PLACES):
        return placed_boxes_sample(row["objects"], turns, name, listed_images(row, images), _size(row), meta)
    return conversation_sample(row, turns, name, images, meta)


def _unknown(row: Mapping[str, Any]) -> RowError:
    shape = shape_of(row)
    if shape in CAPTION_COLUMNS:
        return RowError("its caption is empty", "empty caption")
    if shape is not None:
        return RowError(f"it has no {' and no '.join(name for name in row if row[name] is None)}", "empty text")
    listed = ", ".join(str(column)[:30] for column in list(row)[:12]) or "none"
    return RowError(f"its columns ({listed}) are not such that vlmtune knows; say by 'columns' what they are")


def _caption(value: Any) -> str:
    # Karpathy's sentences are objects.
    text = value.get("raw") if isinstance(value, Mapping) else value
    return "" if text is None else str(text).strip()


def _parse(value: Any) -> str:
    """The answer that a document's ground truth is: its ``gt_parse``, else the text itself."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return str(value)
    parse = found.get("gt_parse", found) if isinstance(found, Mapping) else found
    return json.dumps(parse, ensure_ascii=False)


def _pair(row: Mapping[str, Any]) -> list[Any]:
    asked, said = pair_of([name for name, value in row.items() if value is not None]) or ("prompt", "completion")
    question = row[asked]
    if isinstance(question, str) and asked == "instruction" and str(row.get("input") or "").strip():
        question = f"{question}\n{row['input']}"
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowError(f"its history is {str(history)[:60]!r}, not a list of pairs")
    before = [turn for pair in history for turn in pair_turns(*pair)]
    return turns_of([*before, *pair_turns(question, row[said])], row.get("system")) or []


def _question(row: Mapping[str, Any], name: str, images: Path, prompt: str | None) -> Sample:
    refs = listed_images(row, images)
    meta = _meta(row)
    asked = next(row[column] for column in QUESTION_COLUMNS if row.get(column) is not None)
    if isinstance(asked, Mapping):
        # The same in several languages.
        asked = asked.get("en", next(iter(asked.values()), None))
    answer, answers = row.get("answer"), row.get("answers")
    if answer is None and answers is None:
        answer = row.get("label")
    choices = next((row[column] for column in CHOICE_COLUMNS if row.get(column)), None)
    if choices:
        if isinstance(choices, str):
            choices = _literal(choices)
        question, letter, letters = choice_question(asked, choices, answer, row.get("hint"))
        return question_sample(name, refs, question, [letter], prompt=prompt, meta={**meta, LETTERS: letters})
    # Of documents, the answer and where it stands.
    answer, answers = (one.get("text", one) if isinstance(one, Mapping) else one for one in (answer, answers))
    if answers is None and isinstance(answer, list):
        answer, answers = None, answer
    given = answers if isinstance(answers, list) else [answer if answers is None else answers]
    texts = [item.get("answer") if isinstance(item, Mapping) else item for item in given]
    question = str(asked).replace(PLACE, "").strip("\n") if refs else asked
    target = row.get("multiple_choice_answer", answer)
    return question_sample(name, refs, question, texts, target=target, prompt=prompt, meta=meta)


def _literal(text: str) -> Any:
    """A list that was written as text, by Python or as JSON (MMMU, CSV)."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


def _objects(row: Mapping[str, Any], name: str, images: Path, prompt: str | None, labels: Sequence[str]) -> Sample:
    found = row["objects"]
    # A list of objects, or an object of lists: Arrow and datasets write either.
    if isinstance(found, Mapping):
        keys = [key for key in found if isinstance(found[key], list)]
        found = [dict(zip(keys, values, strict=True)) for values in zip(*(found[key] for key in keys), strict=True)]
    size = _size(row)
    try:
        boxes = [box_of(one["bbox"], _label(one, labels), size=size, sides=True) for one in found]
    except BoxError as error:
        raise RowError(str(error), "unusable box") from error
    ask = labels if len(labels) <= MOST_LABELS else ()
    own = own_prompt(prompt, "", LABELS)
    return boxes_sample(
        name, _one_image(row, images), boxes, task="detection", ask=ask, prompt=own, size=size, meta=_meta(row)
    )


def _label(one: Mapping[str, Any], labels: Sequence[str]) -> str:
    label = next((one[field] for field in LABEL_FIELDS if one.get(field) is not None), None)
    if label is None or not str(label).strip():
        raise RowError(f"the object {str(one)[:80]} has no label", "unusable box")
    if isinstance(label, int) and labels:
        if not 0 <= label < len(labels):
            raise RowError(f"the label {label} is none of the {len(labels)} that the data names", "unusable box")
        return labels[label]
    return str(label)


def _grounding(row: Mapping[str, Any], name: str, images: Path, prompt: str | None) -> Sample:
    phrase = next(str(row[column]).strip() for column in PHRASE_COLUMNS if row.get(column) is not None)
    if not phrase:
        raise RowError("its phrase is empty", "empty text")
    size = _size(row)
    try:
        box = box_of(row["bbox"], phrase, size=size)
    except BoxError as error:
        raise RowError(str(error), "unusable box") from error
    own = own_prompt(prompt, PHRASE)
    return boxes_sample(
        name, _one_image(row, images), [box], task="grounding", ask=phrase, prompt=own, size=size, meta=_meta(row)
    )


def _one_image(row: Mapping[str, Any], images: Path) -> ImageRef:
    found = listed_images(row, images)
    if len(found) != 1:
        raise RowError(f"it has boxes and {len(found)} images; it needs one")
    return found[0]


def _size(row: Mapping[str, Any]) -> tuple[int, int] | None:
    width, height = row.get("width"), row.get("height")
    return (width, height) if isinstance(width, int) and isinstance(height, int) else None


def _meta(row: Mapping[str, Any]) -> dict[str, Any]:
    meta = row.get("meta") or {}
    if isinstance(meta, str):
        # Tables hold it as JSON text, since its keys differ from row to row.
        try:
            meta = json.loads(meta)
        except (ValueError, RecursionError):
            raise RowError(f"its meta is {meta[:80]!r}, neither an object nor JSON") from None
    if not isinstance(meta, Mapping):
        raise RowError(f"its meta is {meta!r}, not an object")
    return dict(meta)
