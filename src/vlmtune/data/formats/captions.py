"""What caption formats share: captions of an image together, each the others' reference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from vlmtune.data.formats.base import DEFAULT_CAPTION_PROMPT, own_prompt
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import ImageRef, Message, Sample


class Caption(NamedTuple):
    """One caption: where it stands, the image's name there, and the text."""

    place: str
    name: str
    text: str
    split: str | None = None


def caption_samples(
    captions: Iterable[Caption], images: Path, prompt: str | None, quarantine: Quarantine, *, prefix: str = ""
) -> Iterator[Sample]:
    """Yield one sample a caption, the captions of an image together, its references all of them.

    Args:
        captions: in any order; empty ones are set aside.
        images: the folder that the images' names count from.
        prompt: what the user asks, where a person chose it.
        quarantine: where empty captions go.
        prefix: begins every sample's id.
    """
    question = Message.make("user", own_prompt(prompt, "") or DEFAULT_CAPTION_PROMPT, images=1)
    by_image: dict[str, list[Caption]] = {}
    for caption in captions:
        if caption.text.strip():
            by_image.setdefault(caption.name, []).append(caption)
        else:
            quarantine.add(caption.place, "empty caption", f"the caption of {caption.name} is empty")
    for name, of_image in by_image.items():
        texts = [caption.text.strip() for caption in of_image]
        image = ImageRef(path=str(images / name))
        for number, text in enumerate(texts):
            split = of_image[number].split
            yield Sample(
                id=f"{prefix}{name}#{number}",
                images=(image,),
                messages=(question, Message.make("assistant", text)),
                references=tuple(dict.fromkeys(texts)),
                meta={"image": name} | ({"split": split} if split else {}),
            )
