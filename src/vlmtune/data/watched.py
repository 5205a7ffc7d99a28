"""One thing done with each of many images, by a few threads that are watched: one that hangs is left behind.

Nothing else ends a decoder or a disk that hangs, for it is C code. A thread an image would be simpler, and takes five
times as long for a header.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from vlmtune.data.sample import ImageRef

T = TypeVar("T")
THREADS = 8


def on_each(
    images: Sequence[ImageRef], action: Callable[[ImageRef], T], seconds: float, late: Callable[[ImageRef], T]
) -> list[T]:
    """Return what ``action`` gives for each image.

    Args:
        images: to be worked on, ``THREADS`` at once.
        action: what is done; what it raises is raised here.
        seconds: that an image may take.
        late: gives the value for an image that takes longer.
    """
    work = _Work(images, action)
    threads = [_Thread(work) for _ in range(min(THREADS, len(images)))]
    while threads:
        due = min(thread.began for thread in threads) + seconds
        threads[0].join(max(0.0, due - time.monotonic()))
        threads = [thread for thread in threads if thread.is_alive()]
        if work.error is not None:
            raise work.error
        for place, thread in enumerate(threads):
            if thread.began + seconds <= time.monotonic() and (left := thread.leave()) is not None:
                work.results[left] = late(images[left])
                threads[place] = _Thread(work)
    return [work.results[index] for index in range(len(images))]


class _Work(Generic[T]):
    """What the threads share."""

    def __init__(self, images: Sequence[ImageRef], action: Callable[[ImageRef], T]) -> None:
        self.action = action
        self.results: dict[int, T] = {}
        self.error: BaseException | None = None
        self._rest: Iterator[tuple[int, ImageRef]] = iter(enumerate(images))
        self._lock = threading.Lock()

    def next(self) -> tuple[int, ImageRef] | None:
        with self._lock:
            return None if self.error else next(self._rest, None)


class _Thread(threading.Thread):
    """Works until nothing is left, or until it is left behind itself."""

    def __init__(self, work: _Work[Any]) -> None:
        super().__init__(daemon=True)
        self.began = time.monotonic()
        self._work, self._lock = work, threading.Lock()
        self._index: int | None = None
        self._left = False
        self.start()

    def leave(self) -> int | None:
        """Give the thread up and return the image it hangs at; ``None`` where it has just done it."""
        with self._lock:
            self._left = self._index is not None
            return self._index

    def run(self) -> None:
        while not self._left and (item := self._work.next()) is not None:
            index, image = item
            self.began, self._index = time.monotonic(), index
            try:
                result = self._work.action(image)
            except BaseException as error:
                if not self._left:
                    self._work.error = self._work.error or error
                return
            with self._lock:
                if not self._left:
                    self._work.results[index] = result
                self._index = None
