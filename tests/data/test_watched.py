"""Many images by a few threads: order, errors, and those that hang."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlmtune.data import images, watched
from vlmtune.data.sample import ImageRef
from vlmtune.data.watched import THREADS, on_each

REFS = [ImageRef(path=str(number)) for number in range(100)]


@pytest.fixture
def hung() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def late(image: ImageRef) -> str:
    return f"{image.path} is late"


def test_results_are_in_the_images_order() -> None:
    assert on_each(REFS, lambda image: f"did {image.path}", 10, late) == [f"did {number}" for number in range(100)]
    assert on_each([], lambda image: "x", 10, late) == []


def test_those_that_hang_are_left_and_the_rest_done(hung: threading.Event) -> None:
    def action(image: ImageRef) -> str:
        if int(image.path or 0) % 7 == 0:
            hung.wait(30)
        return f"did {image.path}"

    found = on_each(REFS, action, 0.05, late)
    assert found == [f"{number} is late" if number % 7 == 0 else f"did {number}" for number in range(100)]


def test_what_the_action_raises_is_raised_at_once() -> None:
    seen: list[str] = []

    def action(image: ImageRef) -> str:
        seen.append(str(image.path))
        raise MemoryError(image.path)

    with pytest.raises(MemoryError):
        on_each(REFS, action, 10, late)
    assert len(seen) <= THREADS


def test_an_image_that_hangs_is_named(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, hung: threading.Event
) -> None:
    opened = images._open

    def slow(image: ImageRef, max_pixels: int | None) -> object:
        if image.filename == "1.jpg":
            hung.wait(30)
        return opened(image, max_pixels)

    monkeypatch.setattr(images, "_open", slow)
    refs = [ImageRef(path=str(image_folder / f"{number}.jpg")) for number in range(3)]
    first, second, third = images.check_all(refs, timeout=0.1)
    assert first is third is None
    assert second is not None and "1.jpg could not be read and decoded within 0.1 s" in second


def test_few_threads_for_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread an image takes five times as long."""
    started: list[object] = []
    start = watched._Thread.start
    monkeypatch.setattr(watched._Thread, "start", lambda self: (started.append(self), start(self)))
    on_each(REFS, lambda image: image.path, 10, late)
    assert len(started) == THREADS
