"""Says what every thread is doing when a run stands still."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger("vlmtune.training")


class Watchdog(TrainerCallback):
    """Logs the stack of every thread when neither a step nor a batch of an evaluation has ended for a while.

    Args:
        seconds: how long that is; logged again after each further such time.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._last = time.monotonic()
        self._ended: threading.Event | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to watch."""
        self.stop()
        self._beat(state)
        self._ended = threading.Event()
        threading.Thread(target=self._watch, args=(self._ended,), name="watchdog", daemon=True).start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step has ended."""
        self._beat(state)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A batch of an evaluation has ended."""
        self._beat(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation has ended."""
        self._beat(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint was written."""
        self._beat(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch no more."""
        self.stop()

    def stop(self) -> None:
        """Watch no more."""
        if self._ended is not None:
            self._ended.set()
        self._ended = None

    def _beat(self, state: Any) -> None:
        self._last, self._step = time.monotonic(), state.global_step

    def _watch(self, ended: threading.Event) -> None:
        said = 0
        while not ended.wait(min(self.seconds / 4, 10.0)):
            silent = time.monotonic() - self._last
            times = int(silent / self.seconds)
            if times > said:
                logger.warning("no step has ended for %.0f s, since step %d. %s", silent, self._step, stacks())
            said = times


def stacks() -> str:
    """Return the stack of every thread but the one that asks, as text."""
    frames = sys._current_frames()
    threads = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
    return "Threads:\n" + "\n".join(
        f"{thread.name}:\n{''.join(traceback.format_stack(frames[thread.ident])).rstrip()}"
        for thread in threads
        if thread.ident in frames
    )
