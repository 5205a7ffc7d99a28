"""Samples for the batching tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmtune.batching.encode import Encoder
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.models.families import FAMILIES


@pytest.fixture
def make_sample(image_folder: Path):
    """Make a sample of given images (numbers) and (question, answer) turns; images lie in the first turn."""

    def make(name: str, images: list[int], turns: list[tuple[str, str]], system: str | None = None) -> Sample:
        messages = [Message.make("system", system)] if system else []
        for index, (question, answer) in enumerate(turns):
            messages.append(Message.make("user", question, images=len(images) if index == 0 else 0))
            messages.append(Message.make("assistant", answer))
        refs = tuple(ImageRef(path=str(image_folder / f"{number}.jpg")) for number in images)
        return Sample(name, refs, tuple(messages), references=(turns[-1][1],))

    return make


@pytest.fixture(scope="session")
def encoder(processor) -> Encoder:
    return Encoder(processor, FAMILIES["gemma3"])
