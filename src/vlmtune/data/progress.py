"""Whether reading and checking data shows how far it is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import datasets

_hidden = False


def shows_progress() -> bool:
    """Whether progress bars are shown: to a person at a terminal."""
    return sys.stderr.isatty() and not _hidden


@contextmanager
def hidden_progress() -> Iterator[None]:
    """Show no bars, nor those of ``datasets``: beside a training that shows its own."""
    global _hidden
    before, others = _hidden, datasets.is_progress_bar_enabled()
    _hidden = True
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        _hidden = before
        if others:
            datasets.enable_progress_bars()
