"""Experiment trackers that can fail without the run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

logger = logging.getLogger("vlmtune.training")


def let_trackers_fail(callbacks: list[Any]) -> None:
    """Have each tracker among a trainer's callbacks log its first error and be quiet from then on.

    A server that is offline, a full quota or an unwritable folder are no reason to end a training.
    """
    for callback in callbacks:
        if type(callback) in INTEGRATION_TO_CALLBACK.values():
            _guard(callback)


def without_failing(tracker: Any, action: Callable[[], None]) -> None:
    """Do something with a tracker, unless it has failed; should it fail now, say so."""
    if getattr(tracker, "failed", False):
        return
    try:
        action()
    except Exception as error:
        tracker.failed = True
        name = type(tracker).__name__.removesuffix("Callback")
        logger.warning(
            "the tracker %s failed and gets nothing more; the run goes on, and log.jsonl holds every figure (%s: %s)",
            *(name, type(error).__name__, " ".join(str(error).split())[:300]),
        )


def _guard(tracker: Any) -> None:
    for name in dir(tracker):
        if name.startswith("on_"):
            setattr(tracker, name, _guarded(tracker, getattr(tracker, name)))


def _guarded(tracker: Any, event: Callable[..., Any]) -> Callable[..., None]:
    def call(*args: Any, **kwargs: Any) -> None:
        without_failing(tracker, lambda: event(*args, **kwargs))

    return call
