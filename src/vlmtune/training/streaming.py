"""Training on shards that are read while it goes on: no index of the whole is ever in memory.

A rank reads shards of its own, a few at a time: a window. A window's rows are loaded, checked, measured and grouped by
image as a whole data set is, and its batches are :class:`~vlmtune.batching.sampler.ImageGroupSampler`'s; the next
window follows. So texts share an image where both lie in one window. With data loading processes, one more of them
prepares the next window while this one is trained on.

Which window comes when depends on the shards, the seed and the rank alone. To go on, a checkpoint names the window and
the step it began at.

Shape legend: N rows of a window.
"""

from __future__ import annotations

import atexit
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from vlmtune.batching.collator import BaseVLMDataCollator, SharedImageCollator
from vlmtune.batching.groups import Keys
from vlmtune.batching.sampler import ImageGroupSampler, WithFillers
from vlmtune.batching.scan import scan
from vlmtune.batching.sharing import describe_saving
from vlmtune.config import TrainingArguments, VLMDataArguments
from vlmtune.data.loading import load_samples
from vlmtune.data.progress import hidden_progress
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.shards import Shards
from vlmtune.data.store import discard
from vlmtune.errors import ConfigError, DataError, QuarantineError, ResumeError, VlmtuneError
from vlmtune.training.image_reuse import check_row_limits, with_image_keys

logger = logging.getLogger("vlmtune.training")

LEFT_OUT = "left_out.jsonl"
ROWS_AT_ONCE = 2_000
# Before as many rows are read, max_bad_fraction is taken of this number.
ROWS_TO_JUDGE = 1_000
# The windows whose files are kept, at least: batches of the one before may still be on their way.
WINDOWS_KEPT = 2


def check_streaming(data: VLMDataArguments, training: TrainingArguments) -> None:
    """Refuse what needs to know all samples before the first step.

    Raises:
        ConfigError: naming the option.
    """
    if training.max_steps <= 0:
        raise ConfigError(
            "streaming needs max_steps: how many steps an epoch has is not known before the shards are read. Set "
            "max_steps to the samples you want to see, divided by the samples of a step on all devices."
        )
    if training.device_batch_size == "auto":
        raise ConfigError(
            "device_batch_size auto looks for the longest sample of all, which streaming does not know. Set "
            "per_device_train_batch_size, or find it on a part of the data without streaming."
        )
    if data.cache_image_features == "on":
        raise ConfigError(
            "cache_image_features is on, but streaming does not keep image features: each window's images would have "
            "to be computed before its first step. Set it to auto or off."
        )


@dataclass(frozen=True)
class Window:
    """What is known of the rows of a few shards.

    Attributes:
        number: counted from 0 over all epochs of the rank.
        keys: (N,) names of each row's images; a list of empty ones without sharing.
        lengths: (N,) tokens of each row, soft tokens included.
        image_tokens: (N,) soft tokens.
        left_out: (sample id, reason) of the rows that are not trained on.
        bad: those of them that are bad; too long ones are left out by choice.
    """

    number: int
    keys: Keys
    lengths: npt.NDArray[np.int64]
    image_tokens: npt.NDArray[np.int64]
    left_out: list[tuple[str, str]]
    bad: Quarantine

    def summary(self) -> str:
        """One line for people."""
        if not len(self.lengths):
            return "no sample can be trained on"
        counts = f"{len(self.lengths):,} samples of {self.lengths.min()} to {self.lengths.max()} tokens"
        return (
            counts
            if isinstance(self.keys, list)
            else f"{counts}; {describe_saving(self.keys, self.lengths, self.image_tokens)}"
        )


@dataclass
class Stream:
    """Prepares the windows of one rank.

    Attributes:
        shards: of all ranks.
        options: how the data is read.
        collator: its encoder measures the texts; images are named where it shares them.
        seed: of the order of the shards and of the samples in a window.
        rank: this process's number.
        world_size: number of processes.
        folder: holds the rows of the windows in use; it goes with the process.
    """

    shards: Shards
    options: VLMDataArguments
    collator: BaseVLMDataCollator
    seed: int
    rank: int = 0
    world_size: int = 1
    folder: Path = field(default_factory=lambda: _temporary_folder())

    def __post_init__(self) -> None:
        if len(self.shards.files) < self.world_size:
            raise DataError(
                f"{self.shards.source} has {len(self.shards.files)} shards for {self.world_size} processes, and with "
                "streaming each reads shards of its own. Write smaller shards by vlmtune convert, or use fewer devices."
            )

    @property
    def per_epoch(self) -> int:
        """Windows of this rank in one epoch."""
        return -(-len(range(self.rank, len(self.shards.files), self.world_size)) // self.options.streaming_shards)

    def files(self, number: int) -> list[Path]:
        """Return the shards of a window."""
        epoch, place = divmod(number, self.per_epoch)
        size = self.options.streaming_shards
        return self.shards.order(self.seed, epoch, self.rank, self.world_size)[place * size : (place + 1) * size]

    def place(self, number: int) -> Path:
        """Return the file that a window's rows lie in."""
        return self.folder / f"window-{number}.arrow"

    def prepare(self, number: int) -> Window:
        """Read a window's shards, write the rows that can be trained on, and measure them.

        Raises:
            VlmtuneError: a shard cannot be read, or a text is too long where that is an error.
        """
        options, bad, parts = self.options, Quarantine(), []
        for file in self.files(number):
            loaded = load_samples(
                file,
                format=self.shards.format,
                image_dir=options.image_dir,
                prompt=options.prompt,
                columns=options.columns or (),
                max_bad_fraction=1.0,
                verify_images=options.verify_images,
                max_pixels=options.max_pixels,
                image_timeout=options.image_timeout,
                allow_remote_images=options.allow_remote_images,
                private_image_hosts=options.private_image_hosts or (),
            )
            bad.rows += loaded.quarantine.rows
            parts.append(loaded.dataset)
        rows = datasets.concatenate_datasets(parts)
        found = scan(rows, self.collator.encoder, max_bad_fraction=1.0)
        rows = rows.select(found.kept) if len(found.kept) < len(rows) else rows
        keys: Keys = [""] * len(rows)
        if isinstance(self.collator, SharedImageCollator) and len(rows):
            rows = with_image_keys(rows, remember=False)
            keys = rows.with_format("arrow")[:]["image_key"]
            limits = {"max_texts": options.max_texts_per_row, "max_tokens": options.max_tokens_per_row}
            check_row_limits(keys, found.lengths, found.image_tokens, **limits)
        _write(rows, self.place(number))
        for part in parts:
            discard(part)
        left_out = [*((row.id, row.reason) for row in bad.rows), *found.left_out]
        return Window(number, keys, found.lengths, found.image_tokens, left_out, bad)

    def require_few_bad(self, bad: int, read: int, last: Quarantine) -> None:
        """Refuse too many bad rows.

        Args:
            bad: how many were set aside so far.
            read: rows so far, the good and the bad.
            last: those of the last window, for the message.

        Raises:
            QuarantineError: more than ``max_bad_fraction`` allows, taken of ``ROWS_TO_JUDGE`` rows at least.
        """
        fraction = self.options.max_bad_fraction
        if bad > fraction * max(read, ROWS_TO_JUDGE):
            raise QuarantineError(
                f"{bad:,} of the first {read:,} rows of {self.shards.source} cannot be used ({last.summary()}), more "
                f"than max_bad_fraction {fraction:g} allows (of {ROWS_TO_JUDGE:,} rows at least):\n{last.listed()}\n"
                "Mend or remove them, or raise max_bad_fraction to go on without them."
            )

    def record(self) -> dict[str, Any]:
        """Return the entry of the training data in ``run.json``."""
        return {
            "shards": len(self.shards.files),
            "bytes": sum(self.shards.sizes),
            "fingerprint": self.shards.fingerprint(),
        }


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
        if len(positions) != self.stream.world_size:
            raise ResumeError(
                f"The checkpoint was written by {len(positions)} processes, and this run has {self.stream.world_size}. "
                "With streaming each process has read shards of its own, so go on with as many as before."
            )
        step, number = positions[self.stream.rank]
        self._begun, self._counted = [(step, number)], number - 1
        if self.stream.rank == 0:
            _keep_lines(self._record, [position[1] for position in positions])

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


def _write(rows: datasets.Dataset, place: Path) -> None:
    table = rows.with_format("arrow")
    schema = rows.features.arrow_schema
    with pa.OSFile(str(place), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in table.iter(ROWS_AT_ONCE):
            writer.write_table(batch.cast(schema))


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


def _temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="vlmtune-windows-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
