"""SIGTERM and SIGINT end a run after its step, saved; a second one ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

# Slurm signals every process of a task, and a launcher among them hands the signal on to its ranks.
HANDED_ON_WITHIN_SECONDS = 2


class StopNow(BaseException):
    """A signal came where the run can end at once: between two steps."""


class StopSignals:
    """Notes the first SIGTERM or SIGINT while it is entered, for the trainer to stop by.

    Slurm, spot machines and ``torchrun`` send SIGTERM some seconds before they kill; Ctrl-C sends SIGINT. Only a
    process's main thread can receive them: entered elsewhere, this does nothing.

    Attributes:
        received: the signal's number; 0 while there was none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._at_once = False
        self._moment = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextmanager
    def at_once(self, allowed: bool = True) -> Iterator[None]:
        """Raise :class:`StopNow` inside the block as soon as a signal comes, or has come.

        Waiting for data can take longer than the time until the process is killed.
        """
        self._at_once = allowed
        try:
            if allowed and self.received:
                raise StopNow
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        # No logging here: the signal may have come while the logger's lock is held.
        name = signal.Signals(number).name
        if self.received == number and self._is_handed_on():
            return
        if self.received:
            _say(f"{name} again: ended at once")
            os._exit(128 + number)
        self.received, self._moment = number, time.monotonic()
        _say(f"{name}: the run ends after this step and a checkpoint; once more ends it at once")
        if self._at_once:
            raise StopNow

    def _is_handed_on(self) -> bool:
        """Whether this may be a launcher's copy of the signal that this process has received already."""
        launched = "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_STEP_ID" in os.environ
        return launched and time.monotonic() - self._moment < HANDED_ON_WITHIN_SECONDS


def _say(text: str) -> None:
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())
