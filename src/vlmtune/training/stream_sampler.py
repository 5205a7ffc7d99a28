"""Batches of windows of streamed shards, where a run goes on, and the record of what they leave out.

See :mod:`vlmtune.training.streaming` for what a window is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader, Dataset

from vlmtune.batching.sampler import ImageGroupSampler, WithFillers
from vlmtune.config import TrainingArguments
from vlmtune.data.progress import hidden_progress
from vlmtune.errors import DataError, ResumeError, VlmtuneError
from vlmtune.training.streaming import Stream, Window

logger = logging.getLogger("vlmtune.training")

LEFT_OUT = "left_out.jsonl"
# The windows whose files are kept, at least: batches of the one before may still be on their way.
WINDOWS_KEPT = 2


class _Windows(Dataset[Any]):
    """Windows by number, prepared where they are asked for; an error a user can mend comes back as a value."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __getitem__(self, number: int) -> Window | VlmtuneError:
        try:
            with hidden_progress():
                return self.stream.prepare(number)
        except VlmtuneError as error:
            return error


class StreamRows(WithFillers):
    """The rows of the windows in use, by ``(window, index)``; an index from the window's length on is a filler."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._opened: dict[int, WithFillers] = {}

    def __len__(self) -> int:
        raise TypeError("the number of streamed rows is not known")

    def __getitem__(self, index: Any) -> dict[str, Any]:
        window, row = index
        if window not in self._opened:
            for old in sorted(self._opened)[:-1]:
                del self._opened[old]
            self._opened[window] = WithFillers(datasets.Dataset.from_file(str(self.stream.place(window))))
        return self._opened[window][row]


class StreamSampler:
    """Yields batches of ``(window, index)``, window after window, for ``max_steps`` steps.

    The steps of a window are :class:`~vlmtune.batching.sampler.ImageGroupSampler`'s of its rows: of about the size
    asked for, evenly. Every rank makes ``max_steps`` steps of its own windows, however many rows they have; a rank that
    has read its shards of an epoch goes on with those of the next.

    Args:
        stream: prepares the windows.
        args: batch size, accumulation, steps and data loading processes.
        max_texts: as :class:`~vlmtune.batching.sampler.ImageGroupSampler`'s.
        window: one that is prepared already.

    Attributes:
        done: tells how many steps are finished; the trainer sets it.
        left_out: (sample id, reason) of the rows left out in the windows read so far.
    """

    def __init__(
        self, stream: Stream, args: TrainingArguments, max_texts: int | None = None, window: Window | None = None
    ) -> None:
        self.stream = stream
        self.batch_size, self.accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        self.batch_size *= max(1, args.n_gpu)
        self.steps = args.max_steps
        self.max_texts = max_texts
        self.vision_passes = True
        self.done: Callable[[], int] = lambda: 0
        self.left_out: list[tuple[str, str]] = []
        self._in_background = args.dataloader_num_workers > 0
        self._record = Path(str(args.output_dir)) / LEFT_OUT
        # Step at which each window begins, and its number; the last ones.
        self._begun = [(0, 0)]
        self._ready = window
        self._counted = -1
        self._read = self._bad = 0

    def __len__(self) -> int:
        """Number of batches of one rank in the run."""
        return self.steps * self.accumulation

    def set_batches(self, batch_size: int, accumulation: int) -> None:
        """Share the same steps out over more and smaller batches."""
        assert batch_size * accumulation == self.batch_size * self.accumulation, "the steps would be others"
        self.batch_size, self.accumulation = batch_size, accumulation

    def position(self) -> tuple[int, int]:
        """Return the window that the next step belongs to, or the one before, and the step it began at."""
        return max(begun for begun in self._begun if begun[0] <= self.done())

    def go_on(self, positions: Sequence[Sequence[int]]) -> None:
        """Begin at the window a checkpoint names.

        Args:
            positions: :meth:`position` of every rank.

        Raises:
            ResumeError: they are those of another number of processes.
        """
        self.require_as_many(positions)
        step, number = positions[self.stream.rank]
        self._begun, self._counted = [(step, number)], number - 1
        if self.stream.rank == 0:
            _keep_lines(self._record, [position[1] for position in positions])

    def require_as_many(self, positions: Sequence[Sequence[int]]) -> None:
        """Refuse the positions of another number of processes; as :meth:`go_on`."""
        if len(positions) != self.stream.world_size:
            raise ResumeError(
                f"The checkpoint was written by {len(positions)} processes, and this run has {self.stream.world_size}. "
                "With streaming each process has read shards of its own, so go on with as many as before."
            )

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield this rank's batches; those of windows before the one in progress are empty, and to be skipped."""
        step, number = self.position()
        yield from ([] for _ in range(step * self.accumulation))
        without_rows = 0
        for window in self._windows(number):
            self._count(window)
            self._begin(step, window.number)
            sampler = ImageGroupSampler(
                window.keys,
                window.lengths,
                self.batch_size,
                image_tokens=window.image_tokens,
                max_texts=self.max_texts,
                accumulation=self.accumulation,
                seed=self.stream.seed,
            )
            # Another order in every window.
            sampler.set_epoch(window.number)
            left = (self.steps - step) * self.accumulation
            yield from ([(window.number, row) for row in batch] for batch in islice(sampler, left))
            step += sampler.steps
            if step >= self.steps:
                return
            without_rows = 0 if sampler.steps else without_rows + 1
            if without_rows >= self.stream.per_epoch:
                raise DataError(f"No row of {self.stream.shards.source} can be trained on; see {self._record}.")

    def _windows(self, number: int) -> Iterator[Window]:
        if self._ready is not None and self._ready.number == number:
            ready, self._ready = self._ready, None
            yield ready
            number += 1
        loader: DataLoader[Any] = DataLoader(
            _Windows(self.stream),
            batch_size=None,
            sampler=count(number),
            num_workers=int(self._in_background),
            prefetch_factor=1 if self._in_background else None,
            # A loader draws a seed, by default from the numbers that training takes.
            generator=torch.Generator(),
        )
        for found in loader:
            if isinstance(found, VlmtuneError):
                raise found
            yield found

    def _begin(self, step: int, number: int) -> None:
        if (step, number) not in self._begun:
            self._begun.append((step, number))
        needed = self.position()
        for old in self._begun[: max(0, self._begun.index(needed) - WINDOWS_KEPT)]:
            self.stream.place(old[1]).unlink(missing_ok=True)
            self._begun.remove(old)

    def _count(self, window: Window) -> None:
        """Record what is left out, and stop where that is too much."""
        if window.number <= self._counted:
            return
        self._counted = window.number
        # The first was told of when it was prepared, before the weights were loaded.
        if window.number:
            logger.info("window %d: %s", window.number, window.summary())
        epoch, _ = divmod(window.number, self.stream.per_epoch)
        if epoch == 0:
            self.left_out += window.left_out
            _add_lines(self._record, self.stream.rank, window)
        self._bad += len(window.bad)
        self._read += len(window.lengths) + len(window.left_out)
        self.stream.require_few_bad(self._bad, self._read, window.bad)


def positions(sampler: Any, accelerator: Any) -> list[list[int]]:
    """Return every rank's :meth:`StreamSampler.position`, for a checkpoint; nothing without streaming."""
    if not isinstance(sampler, StreamSampler):
        return []
    mine = torch.tensor([sampler.position()], device=accelerator.device)
    found: list[list[int]] = accelerator.gather(mine).tolist()
    return found


def go_on(sampler: Any, before: Sequence[Sequence[int]]) -> None:
    """Begin where a checkpoint says; see :meth:`StreamSampler.go_on`."""
    if isinstance(sampler, StreamSampler):
        sampler.go_on(before)


def _add_lines(record: Path, rank: int, window: Window) -> None:
    if not window.left_out:
        return
    entries = [
        {"id": name, "reason": reason, "rank": rank, "window": window.number} for name, reason in window.left_out
    ]
    with record.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))


def _keep_lines(record: Path, windows: Sequence[int]) -> None:
    """Drop what was recorded of windows that are read again; of each rank those from ``windows`` on."""
    if not record.is_file():
        return
    kept = []
    for line in record.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "rank" not in entry or entry["window"] < windows[entry["rank"]]:
            kept.append(line)
    record.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
