"""The one normal form between files on disk and tensors: :class:`Sample`, made of :class:`Message`.

A data set is a ``datasets.Dataset`` whose rows are ``Sample.to_row()``: the columns ``id``, ``images``
(paths or bytes, never pixels), ``messages``, ``references`` and ``meta``. Arrow fills absent struct
fields with ``None`` (an image part gains ``text: None``); :meth:`Sample.from_row` takes that out again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlmtune.data import archives
from vlmtune.errors import DataError

Role = Literal["system", "user", "assistant"]
# Entries of a sample's meta that say what kind of question it is; the first found counts.
TYPE_FIELDS = ("answer_type", "question_type", "type", "category", "task", "dataset", "split")
# What an image without a name is called.
UNNAMED = "(image given as bytes)"
ROLES: tuple[str, ...] = ("system", "user", "assistant")


@dataclass(frozen=True)
class Part:
    """One piece of a message: a text, or the place of the sample's next image."""

    type: Literal["text", "image"]
    text: str | None = None

    def to_template(self) -> dict[str, str]:
        """Return the form that chat templates read: ``{"type": "image"}`` or ``{"type": "text", "text": ...}``."""
        return {"type": "image"} if self.type == "image" else {"type": "text", "text": self.text or ""}


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    parts: tuple[Part, ...]

    @classmethod
    def make(cls, role: Role, text: str | None = None, *, images: int = 0) -> Message:
        """Make a message of ``images`` image places followed by ``text``."""
        parts = [Part("image")] * images
        if text is not None:
            parts.append(Part("text", text))
        return cls(role, tuple(parts))

    @property
    def text(self) -> str:
        """The message's texts, joined."""
        return "".join(part.text or "" for part in self.parts if part.type == "text")

    @property
    def n_images(self) -> int:
        """Number of image places in the message."""
        return sum(part.type == "image" for part in self.parts)

    def to_template(self) -> dict[str, Any]:
        """Return the form that chat templates read."""
        return {"role": self.role, "content": [part.to_template() for part in self.parts]}


@dataclass(frozen=True)
class ImageRef:
    """Where an image's bytes lie: a file, a member of an archive by its address, or the bytes themselves."""

    path: str | None = None
    bytes: bytes | None = None

    @property
    def name(self) -> str:
        """A name for messages to people."""
        return self.path or UNNAMED

    @property
    def filename(self) -> str:
        """The file's own name, without its folder or archive; empty for bytes."""
        member = archives.parse(self.path) if self.path else None
        return Path(member.name if member else self.path or "").name


@dataclass(frozen=True)
class Sample:
    """A conversation about zero or more images.

    Attributes:
        id: unique in its data set; every message about the sample names it.
        images: as many as there are image parts in ``messages``, in their order.
        messages: turns in order; a training sample holds at least one assistant turn.
        references: texts to score the last assistant turn against; empty when that turn is the only one.
        meta: whatever the format knows besides (question type, split, caption number); JSON values only.
    """

    id: str
    images: tuple[ImageRef, ...]
    messages: tuple[Message, ...]
    references: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The turns before the last assistant turn: what generation is given."""
        messages = self.messages
        return messages[:-1] if messages and messages[-1].role == "assistant" else messages

    @property
    def target(self) -> str | None:
        """The last assistant turn's text, or ``None`` when the sample ends in a question."""
        return self.messages[-1].text if self.messages and self.messages[-1].role == "assistant" else None

    def problem(self) -> str | None:
        """Return what makes the sample unusable, in words, or ``None``."""
        if not self.messages:
            return "has no messages"
        places = sum(message.n_images for message in self.messages)
        if places != len(self.images):
            return f"has {places} image place(s) in its messages but {len(self.images)} image(s)"
        for message in self.messages:
            if message.role not in ROLES:
                return f"has a message of unknown role {message.role!r} (use one of {', '.join(ROLES)})"
            if message.role == "assistant" and not message.text.strip():
                return "has an empty assistant text"
            if message.role == "assistant" and message.n_images:
                return "has an image in an assistant turn"
        if next((message.role for message in self.messages if message.role != "system"), "user") == "assistant":
            return "begins with an assistant's turn, before anything is asked"
        return None

    def to_row(self) -> dict[str, Any]:
        """Return the data set row; ``meta`` travels as JSON text since its keys differ from row to row."""
        return {
            "id": self.id,
            "images": [{"path": image.path, "bytes": image.bytes} for image in self.images],
            "messages": [
                {"role": m.role, "content": [{"type": p.type, "text": p.text} for p in m.parts]} for m in self.messages
            ],
            "references": list(self.references),
            "meta": meta_text(self.meta),
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Sample:
        """Read a row made by :meth:`to_row`, also after Arrow has added ``None`` fields to it.

        Raises:
            DataError: a column is missing or of another form; the message names the row.
        """
        try:
            return cls(
                id=str(row["id"]),
                images=tuple(_image_ref(image) for image in row.get("images") or ()),
                messages=tuple(_message(message) for message in row["messages"]),
                references=tuple(row.get("references") or ()),
                meta=_meta(row.get("meta")),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"Row {row.get('id', '(no id)')!r} is not in vlmtune's form ({type(error).__name__}: {error}). "
                "A row needs the columns id, images, messages, references and meta; load the data with "
                "GenericVLMDatasetLoader, which makes them."
            ) from error


def meta_text(meta: Mapping[str, Any]) -> str:
    """Return a sample's ``meta`` as it stands in a data set's row."""
    return json.dumps(meta, ensure_ascii=False, sort_keys=True)


def _image_ref(image: Any) -> ImageRef:
    if isinstance(image, str):
        return ImageRef(path=image)
    return ImageRef(path=image.get("path"), bytes=image.get("bytes"))


def _message(message: Mapping[str, Any]) -> Message:
    content: str | Sequence[Mapping[str, Any]] = message["content"]
    if isinstance(content, str):
        return Message(message["role"], (Part("text", content),))
    parts = []
    for part in content:
        if part["type"] not in ("text", "image"):
            raise ValueError(f"unknown content type {part['type']!r}; use 'text' or 'image'")
        parts.append(Part("image") if part["type"] == "image" else Part("text", part.get("text") or ""))
    return Message(message["role"], tuple(parts))


def _meta(meta: Any) -> dict[str, Any]:
    if not meta:
        return {}
    return dict(json.loads(meta)) if isinstance(meta, str) else dict(meta)
