"""A list of turns, as tools write conversations, to a sample; what in it would be learned wrongly is named."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmtune.data.formats.files import RowError
from vlmtune.data.formats.row_images import image_of, listed_images
from vlmtune.data.sample import ROLES, ImageRef, Message, Part, Sample

PLACE = "<image>"
# Names that other tools write for the same roles.
ROLE_NAMES = {role: role for role in ROLES} | {
    "human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "developer": "system",
}  # fmt: skip
# Columns of what is neither text nor image, and what marks its places in texts.
OTHER_MEDIA = {"video": "<video>", "videos": "<video>", "audio": "<audio>", "audios": "<audio>"}
# What says, where it is false or 0, that a turn is not to be learned: OpenAI, Axolotl, ms-swift.
LEARNED = ("weight", "train", "training", "loss")
# Qwen-VL's places of images hold their names.
_NAMED_PLACE = re.compile(r"<img>([^<>]+)</img>")


def turns_of(found: Any, system: Any = None) -> list[Any] | None:
    """Return turns of ``role`` and ``content`` made of what a row calls its conversation, or ``None``.

    Args:
        found: a list of turns; of pairs of ``user`` (or ``human``) and ``assistant``; or either as JSON text.
        system: a text that stands before the first turn.
    """
    if isinstance(found, str) and found.lstrip().startswith("["):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError):
            return None
    if not isinstance(found, list):
        return None
    usual = all(isinstance(item, dict) and "role" in item for item in found)
    turns = found if usual else [turn for item in found for turn in _turns(item)]
    return [{"role": "system", "content": system}, *turns] if isinstance(system, str) and system.strip() else turns


def _turns(item: Any) -> list[Any]:
    if not isinstance(item, Mapping):
        return [item]
    if "from" in item:
        return [{**item, "role": item["from"], "content": item.get("value")}]
    if "role" not in item and "assistant" in item:
        return pair_turns(item.get("user", item.get("human")), item["assistant"])
    return [item]


def pair_turns(question: Any, answer: Any) -> list[Any]:
    """Join a prompt and an answer, each a text or a list of messages already."""
    asked = question if isinstance(question, list) else [{"role": "user", "content": question}]
    said = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    return [*asked, *said]


def conversation_sample(
    row: Mapping[str, Any], turns: list[Any], name: str, images: Path, meta: dict[str, Any]
) -> Sample:
    """Make a sample of a row's turns.

    Args:
        row: holds images and ``references``, where the turns do not hold them.
        turns: as :func:`turns_of` gives them.
        name: the sample's id.
        images: the folder that paths count from.
        meta: of the sample.

    Raises:
        RowError: they cannot be used.
    """
    pending = listed_images(row, images)
    # Where the parts name the images' places, all of them, "<image>" in a text is only a text.
    places = [part for message in turns for part in _image_parts(message)]
    _require_usual(row, turns, has_images=bool(pending or places))
    if not pending and not places:
        turns = [_with_places(message, pending, images) for message in turns]
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


def _require_usual(row: Mapping[str, Any], turns: list[Any], *, has_images: bool) -> None:
    """Refuse what would be learned as if it were not there: videos and sounds, tools, turns not to be learned."""
    for column, mark in OTHER_MEDIA.items():
        if row.get(column) and (not has_images or any(mark in str(turn) for turn in turns)):
            raise RowError(f"it is about {column} {str(row[column])[:60]!r}; vlmtune trains on texts and images")
    if row.get("tools"):
        raise RowError("it has 'tools', which vlmtune does not show to the model. Write them into the system's text")
    for number, turn in enumerate(turns, 1):
        if isinstance(turn, Mapping) and len(turn) > 2 and _role(turn.get("role")) == "assistant":
            flag = next((name for name in LEARNED if name in turn and turn[name] in (0, False)), None)
            if flag is not None:
                raise RowError(
                    f"its message {number} has {flag} {turn[flag]!r}: it is not to be learned, but every assistant's "
                    "turn is. Make it a part of the question before the last answer, or take it out"
                )


def _with_places(message: Any, pending: list[ImageRef], images: Path) -> Any:
    """Collect the images that a text names by ``<img>dog.jpg</img>``, and mark their places as others do."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, str) or not (names := _NAMED_PLACE.findall(content)):
        return message
    pending += [image_of(name.strip(), images) for name in names]
    return {**message, "content": _NAMED_PLACE.sub(PLACE, content)}


def _image_parts(message: Any) -> list[Any]:
    content = message.get("content") if isinstance(message, Mapping) else None
    parts = content if isinstance(content, list) else []
    return [part for part in parts if isinstance(part, Mapping) and part.get("type") in ("image", "image_url")]


def _role(name: Any) -> str | None:
    return ROLE_NAMES.get(str(name).lower())


def _message(message: Any, pending: list[ImageRef], used: list[ImageRef], images: Path, marks: bool) -> Message:
    if not isinstance(message, Mapping) or "role" not in message or message.get("content") is None:
        raise RowError("a message lacks 'role' or 'content'")
    role = _role(message["role"])
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
            named = next((part[key] for key in ("image", "path", "url", "image_url", "source") if part.get(key)), None)
            named = {"data": part["base64"]} if named is None and part.get("base64") else named
            place(None if named is None else image_of(named, images))
        else:
            raise RowError(f"the content part {part!r} is neither text nor image")
    return Message(role, tuple(parts))  # type: ignore[arg-type]
