"""``vlmtune chat``: a conversation in the terminal, with images by their paths."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmtune.config import GenerationArguments
from vlmtune.data.images import EXTENSIONS, check
from vlmtune.data.sample import ImageRef, Message, Part, Sample
from vlmtune.errors import VlmtuneError
from vlmtune.evaluation.generation import AnswerGenerator

HELP = """\
Write a message. An image goes along by its path in the message, alone or between words: cat.jpg What is this?
  /image PATH   take an image along with the next message
  /system TEXT  tell the model how to answer; starts a new conversation
  /new          start a new conversation
  /help         show this
  /quit         leave (or Ctrl-D)"""
_WORDS = re.compile(r"""'[^']*'|"[^"]*"|(?:\\.|[^\s'"])+|\s+|['"]""")


class Chat:
    """One conversation after another.

    Args:
        model: ready to generate.
        processor: its processor.
        options: of generation.
        max_pixels: of an image.
    """

    def __init__(
        self, model: Any, processor: Any, options: GenerationArguments, *, max_pixels: int | None = None
    ) -> None:
        self.generator = AnswerGenerator(model, processor, options, max_pixels=max_pixels)
        self.max_pixels = max_pixels
        self.messages: list[Message] = []
        self.images: list[ImageRef] = []
        self.waiting: list[ImageRef] = []

    def say(self, line: str) -> str:
        """Take what a person wrote, and return the answer, or what a command has to say.

        Raises:
            VlmtuneError: it cannot be answered; the conversation is as before.
        """
        # A path has a second slash, or an ending.
        if re.fullmatch(r"/\w+", line.split(maxsplit=1)[0]):
            return self._command(*line.partition(" ")[::2])
        parts, images = list[Part](), list[ImageRef]()
        parts += [Part("image")] * len(self.waiting)
        images += self.waiting
        for piece in _pieces(line):
            if isinstance(piece, Path):
                images.append(self._image(piece))
                parts.append(Part("image"))
            else:
                parts.append(Part("text", piece))
        message = Message("user", tuple(parts))
        sample = Sample("chat", (*self.images, *images), (*self.messages, message))
        answer = self.generator([sample])[0]
        self.messages += [message, Message.make("assistant", answer.text or "...")]
        self.images += images
        self.waiting = []
        return answer.text if answer.ended else f"{answer.text} ..."

    def _command(self, name: str, rest: str) -> str:
        rest = rest.strip()
        if name == "/image" and rest:
            paths = shlex.split(rest) if not Path(rest).is_file() else [rest]
            self.waiting += [self._image(Path(path).expanduser()) for path in paths]
            return f"{len(self.waiting)} image(s) go along with the next message."
        if name == "/new" or (name == "/system" and rest):
            self.messages, self.images, self.waiting = [], [], []
            if rest and name == "/system":
                self.messages = [Message.make("system", rest)]
            return "A new conversation."
        return HELP if name == "/help" else f"There is no {name} like that. {HELP}"

    def _image(self, path: Path) -> ImageRef:
        image = ImageRef(path=str(path))
        if problem := check(image, "full", max_pixels=self.max_pixels):
            raise VlmtuneError(problem)
        return image


def talk(chat: Chat, read: Callable[[str], str], write: Callable[[str], None]) -> None:
    """Go on until the person leaves.

    Args:
        chat: the conversation.
        read: gives the next line after a prompt; raises ``EOFError`` at the end.
        write: shows a text.
    """
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            return
        if line in ("/quit", "/exit"):
            return
        if not line:
            continue
        try:
            write(chat.say(line))
        except (VlmtuneError, ValueError) as error:
            write(f"error: {error}")


def _pieces(line: str) -> list[str | Path]:
    """Cut a line into texts and the paths of images in it; terminals put quotes or backslashes in dropped paths."""
    if _is_image(line):
        return [Path(line).expanduser()]
    found: list[str | Path] = []
    text = ""
    for word in _WORDS.findall(line):
        name = _unquoted(word)
        if _is_image(name):
            found += [text.strip()] if text.strip() else []
            found.append(Path(name).expanduser())
            text = ""
        else:
            text += word
    return found + ([text.strip()] if text.strip() else [])


def _is_image(name: str) -> bool:
    """Whether a word names an image: by its ending, and that it is there or reads as a path."""
    path = Path(name)
    if path.suffix.lower() not in EXTENSIONS:
        return False
    return "/" in name or path.is_file()


def _unquoted(word: str) -> str:
    if len(word) > 1 and word[0] == word[-1] and word[0] in "'\"":
        return word[1:-1]
    return re.sub(r"\\(.)", r"\1", word)
