"""One row, whatever its columns, to a sample: what JSON lines, lists, tables and image folders share.

Columns, the first that fit: ``messages``; ``conversations`` (LLaVA and ShareGPT: ``from`` and ``value``); ``prompt``
and ``completion`` (TRL); ``texts`` (the Cauldron: ``user`` and ``assistant``); ``question`` with ``answer`` or
``answers`` (and ``choices``); ``objects`` with ``bbox`` and their labels, boxes as COCO has them (imagefolder, many
data sets on the Hub); ``bbox`` with ``sent``, ``expression`` or ``phrase`` (RefCOCO as Shikra, Qwen-VL and InternVL
write it: left, top, right, bottom); ``text`` or ``caption``. Images stand in ``images``, ``image``, ``image_path`` or
``file_name``, ``img_path``.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from vlmtune.data.boxes import MOST_LABELS, BoxError, box_of, boxes_sample
from vlmtune.data.formats.base import DEFAULT_CAPTION_PROMPT, LABELS, PHRASE, Source, own_prompt
from vlmtune.data.formats.files import RowError
from vlmtune.data.formats.questions import LETTERS, choice_question, question_sample
from vlmtune.data.sample import ROLES, ImageRef, Message, Part, Sample
from vlmtune.errors import DataError, nearest

PLACE = "<image>"
# Names that other tools write for the same roles.
ROLE_NAMES = {role: role for role in ROLES} | {"human": "user", "gpt": "assistant", "model": "assistant"}
IMAGE_COLUMNS = ("images", "image", "image_path", "file_name", "img_path")
PHRASE_COLUMNS = ("sent", "expression", "phrase")
LABEL_FIELDS = ("category", "categories", "label", "labels", "category_id", "name")
CAPTION_COLUMNS = ("caption", "captions", "text")
# All that a row may have.
COLUMNS = (
    *("messages", "conversations", "system", "prompt", "completion", "texts", "question", "answer", "answers"),
    *("choices", "hint", "multiple_choice_answer", "objects", "bbox", "width", "height", "id", "references", "meta"),
    *(*IMAGE_COLUMNS, *PHRASE_COLUMNS, *CAPTION_COLUMNS),
)


def shape_of(columns: Collection[str]) -> str | None:
    """Return which kind of row has these columns: the column that says so, or ``None``."""
    has_image = any(name in columns for name in IMAGE_COLUMNS)
    if "messages" in columns or "conversations" in columns:
        return "messages" if "messages" in columns else "conversations"
    if "prompt" in columns and "completion" in columns:
        return "completion"
    if "texts" in columns and has_image:
        return "texts"
    if "question" in columns and ("answer" in columns or "answers" in columns):
        return "question"
    if has_image and "objects" in columns:
        return "objects"
    if has_image and "bbox" in columns and any(name in columns for name in PHRASE_COLUMNS):
        return "bbox"
    # A row with a number of a question and a text asks something; its text is no caption.
    if has_image and "question_id" not in columns:
        return next((name for name in CAPTION_COLUMNS if name in columns), None)
    return None


def make_sample(
    row: Any, default_id: str, images: Path, source: Source | None = None, *, labels: Sequence[str] = ()
) -> Sample:
    """Make a sample of a row.

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
        raise RowError("it has no 'messages' list, nor columns that vlmtune knows: it is no object")
    prompt = source.prompt if source else None
    if source and source.columns:
        row = _renamed(row, source.columns)
    shape = shape_of([name for name, value in row.items() if value is not None])
    name = default_id if row.get("id") is None else str(row["id"])
    if shape == "question":
        return _question(row, name, images, prompt)
    if shape == "objects":
        return _objects(row, name, images, prompt, labels)
    if shape == "bbox":
        return _grounding(row, name, images, prompt)
    if shape in CAPTION_COLUMNS:
        given = row[shape]
        texts = [str(text).strip() for text in (given if isinstance(given, list) else [given])]
        if not texts or not all(texts):
            raise RowError("its caption is empty", "empty caption")
        turns: Any = _turns(own_prompt(prompt, "") or DEFAULT_CAPTION_PROMPT, texts[0])
        row = {"references": list(dict.fromkeys(texts))} | dict(row)
    elif shape == "completion":
        turns = _turns(row["prompt"], row["completion"])
    elif shape == "texts":
        pairs = row["texts"]
        if not isinstance(pairs, list) or not all(isinstance(pair, Mapping) for pair in pairs):
            raise RowError(f"its texts are {str(pairs)[:80]!r}, not a list of 'user' and 'assistant'")
        turns = [turn for pair in pairs for turn in _turns(pair.get("user"), pair.get("assistant"))]
    elif shape == "conversations":
        turns = [_turn(turn) for turn in row["conversations"]] if isinstance(row["conversations"], list) else None
        system = row.get("system")
        if turns is not None and isinstance(system, str) and system.strip():
            turns = [{"role": "system", "content": system}, *turns]
    else:
        turns = row.get("messages")
    if not isinstance(turns, list):
        raise RowError(f"it has no {shape or 'messages'!r} list, nor other columns that vlmtune knows")
    return _conversation(row, turns, name, images)


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    if lacking := next((theirs for theirs in columns.values() if theirs not in row), None):
        raise RowError(f"it has no column {lacking!r}.{nearest(lacking, row)}")
    others = {name: value for name, value in row.items() if name not in columns.values()}
    return others | {ours: row[theirs] for ours, theirs in columns.items()}


def renaming(columns: Sequence[str]) -> dict[str, str]:
    """Read ``OURS=THEIRS`` pairs to name -> the data's column.

    Raises:
        DataError: one is no pair, or names nothing that rows may have.
    """
    found = {}
    for pair in columns:
        ours, equals, theirs = str(pair).partition("=")
        if not equals or not theirs:
            raise DataError(f"columns has {pair!r}; write NAME=COLUMN, such as image=photo")
        if ours not in COLUMNS:
            raise DataError(f"columns: {ours!r} is not a column that vlmtune reads.{nearest(ours, COLUMNS)}")
        found[ours] = theirs
    return found


def listed_images(row: Mapping[str, Any], images: Path) -> list[ImageRef]:
    """Return the images of a row's own columns, in order.

    Raises:
        RowError: one is neither a path, nor an address of a file, nor bytes.
    """
    found = next((row[name] for name in IMAGE_COLUMNS if row.get(name) is not None), None) or []
    return [_image(item, images) for item in (found if isinstance(found, list) else [found])]


def _turns(question: Any, answer: Any) -> list[Any]:
    """Join a prompt and an answer, each a text or a list of messages already."""
    asked = question if isinstance(question, list) else [{"role": "user", "content": question}]
    said = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    return [*asked, *said]


def _turn(turn: Any) -> Any:
    if isinstance(turn, Mapping) and "from" in turn:
        return {"role": turn["from"], "content": turn.get("value")}
    return turn


def _question(row: Mapping[str, Any], name: str, images: Path, prompt: str | None) -> Sample:
    refs = listed_images(row, images)
    meta = _meta(row)
    if row.get("choices"):
        question, letter, letters = choice_question(row["question"], row["choices"], row.get("answer"), row.get("hint"))
        return question_sample(name, refs, question, [letter], prompt=prompt, meta={**meta, LETTERS: letters})
    answer, answers = row.get("answer"), row.get("answers")
    if answers is None and isinstance(answer, list):
        answer, answers = None, answer
    given = answers if isinstance(answers, list) else [answer if answers is None else answers]
    texts = [item.get("answer") if isinstance(item, Mapping) else item for item in given]
    question = str(row["question"]).replace(PLACE, "").strip("\n") if refs else row["question"]
    target = row.get("multiple_choice_answer", answer)
    return question_sample(name, refs, question, texts, target=target, prompt=prompt, meta=meta)


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


def _conversation(row: Mapping[str, Any], turns: list[Any], name: str, images: Path) -> Sample:
    pending = listed_images(row, images)
    # Where the parts name the images' places, all of them, "<image>" in a text is only a text.
    places = [part for message in turns for part in _image_parts(message)]
    marks = not places or (bool(pending) and len(places) != len(pending))
    messages, used = [], list[ImageRef]()
    for message in turns:
        messages.append(_message(message, pending, used, images, marks))
    if pending:
        first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
        if used or first is None:
            raise RowError(f"{len(pending)} image(s) in 'images' have no place in the messages")
        unplaced = tuple(Part("image") for _ in pending)
        messages[first] = Message(messages[first].role, unplaced + messages[first].parts)
        used = pending
    references = row.get("references") or ()
    if isinstance(references, str):
        references = (references,)
    if not isinstance(references, list | tuple):
        raise RowError(f"its references are {references!r}, neither a text nor a list of texts")
    meta = _meta(row)
    last = messages[-1] if messages else None
    if not references and last is not None and last.role == "assistant":
        references = (last.text.strip(),)
    sample = Sample(
        id=name,
        images=tuple(used),
        messages=tuple(messages),
        references=tuple(str(text) for text in references),
        meta=meta,
    )
    if problem := sample.problem():
        raise RowError(f"it {problem}")
    return sample


def _image_parts(message: Any) -> list[Any]:
    content = message.get("content") if isinstance(message, Mapping) else None
    parts = content if isinstance(content, list) else []
    return [part for part in parts if isinstance(part, Mapping) and part.get("type") in ("image", "image_url")]


def _message(message: Any, pending: list[ImageRef], used: list[ImageRef], images: Path, marks: bool) -> Message:
    if not isinstance(message, Mapping) or "role" not in message or message.get("content") is None:
        raise RowError("a message lacks 'role' or 'content'")
    role = ROLE_NAMES.get(str(message["role"]))
    if role is None:
        raise RowError(f"the role {message['role']!r} is unknown (use {', '.join(ROLES)})")
    parts: list[Part] = []

    def place(image: ImageRef | None = None) -> None:
        if image is None:
            if not pending:
                raise RowError("it has more image places than images")
            image = pending.pop(0)
        used.append(image)
        parts.append(Part("image"))

    def text(value: str) -> None:
        for index, piece in enumerate(value.split(PLACE) if marks else [value]):
            if index:
                place()
            if piece.strip():
                parts.append(Part("text", piece.strip("\n") if marks and PLACE in value else piece))

    content = message["content"]
    if not isinstance(content, str | list):
        raise RowError(f"the content {content!r} is neither a text nor a list of parts")
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            text(str(part.get("text") or ""))
        elif kind in ("image", "image_url"):
            named = next((part[key] for key in ("image", "path", "url", "image_url") if part.get(key)), None)
            place(None if named is None else _image(named, images))
        else:
            raise RowError(f"the content part {part!r} is neither text nor image")
    return Message(role, tuple(parts))  # type: ignore[arg-type]


def _image(item: Any, images: Path) -> ImageRef:
    if isinstance(item, Mapping):
        item = item.get("bytes") or item.get("url") or item.get("path")
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
        try:
            return ImageRef(bytes=base64.b64decode(item.partition(",")[2], validate=True))
        except ValueError as error:
            raise RowError(f"the image's data address is not base64 ({error})") from error
    path = Path(item).expanduser()
    return ImageRef(path=str(path if path.is_absolute() else images / path))
