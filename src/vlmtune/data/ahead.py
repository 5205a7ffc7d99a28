"""A run's data are read in a process of their own while this one imports torch and transformers.

Both take seconds, and neither needs the other. What is read is what :func:`~vlmtune.data.loading.load_train_and_eval`
returns; whatever goes wrong there is left to be met again by the caller, in its turn.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
from copy import deepcopy
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.data import scratch

if TYPE_CHECKING:
    from vlmtune.data.loading import DataOptions, LoadedData


class Ahead:
    """Data that are being read.

    Args:
        options: which data; they must be worth it (:func:`worthwhile`).
    """

    def __init__(self, options: DataOptions) -> None:
        self._options = deepcopy(options)
        # Made here, so that it stays when the other process ends.
        scratch.folder()
        context: Any = multiprocessing.get_context("fork")
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_read, args=(self._options, sender), name="reading data", daemon=True)
        self._process.start()
        sender.close()

    def load(self, options: DataOptions) -> tuple[LoadedData, LoadedData | None]:
        """Return what :func:`~vlmtune.data.loading.load_train_and_eval` does, with what it logs.

        Raises:
            DataError: as that does.
        """
        from vlmtune.data.loading import load_train_and_eval

        found = self._received() if options == self._options else None
        self._receiver.close()
        self._process.terminate()
        self._process.join()
        if found is None:
            return load_train_and_eval(options)
        loaded: tuple[LoadedData, LoadedData | None] = found[0]
        records: list[logging.LogRecord] = found[1]
        for record in records:
            logging.getLogger(record.name).handle(record)
        return loaded

    def _received(self) -> Any:
        try:
            return self._receiver.recv()
        except EOFError:
            return None


def worthwhile(options: DataOptions) -> bool:
    """Whether there is something to gain, and nothing is fetched from elsewhere before the run itself asks for it."""
    can = sys.platform == "linux" and threading.active_count() == 1 and len(os.sched_getaffinity(0)) > 1
    whole = not (options.streaming or options.allow_remote_images)
    return can and whole and "torch" not in sys.modules and Path(options.dataset_path).exists()


class _Kept(logging.Handler):
    """Keeps what is logged, in a form that can be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args = record.getMessage(), None
        self.records.append(record)


def _read(options: DataOptions, sender: Connection) -> None:
    # Ctrl-C reaches both; the other one says so, and this one ends with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    kept = _Kept()
    logging.getLogger("vlmtune").handlers = [kept]
    try:
        from vlmtune.data.loading import load_train_and_eval

        gc.freeze()
        sender.send((load_train_and_eval(options), kept.records))
    except Exception:
        # The caller reads again and meets it; here there is nobody to tell.
        sender.close()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
