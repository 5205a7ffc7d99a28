"""Training on shards that are read while it goes on: no index of the whole is ever in memory.

A rank reads shards of its own, a few at a time: a window. A window's rows are loaded, checked, measured and grouped by
image as a whole data set is, and trained on; the next window follows (:mod:`vlmtune.training.stream_sampler`). So texts
share an image where both lie in one window. With data loading processes, one more of them prepares the next window
while this one is trained on.

Which window comes when depends on the shards, the seed and the rank alone. To go on, a checkpoint names the window and
the step it began at.

Shape legend: N rows of a window.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vlmtune.batching.collator import BaseVLMDataCollator, SharedImageCollator
from vlmtune.batching.groups import Keys
from vlmtune.batching.scan import scan
from vlmtune.batching.sharing import describe_saving
from vlmtune.config import TrainingArguments, VLMDataArguments
from vlmtune.data import scratch
from vlmtune.data.loading import load_samples
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.shards import Shards
from vlmtune.data.store import discard
from vlmtune.errors import ConfigError, DataError, QuarantineError
from vlmtune.training.image_reuse import check_row_limits, with_image_keys

logger = logging.getLogger("vlmtune.training")

ROWS_AT_ONCE = 2_000
# Before as many rows are read, max_bad_fraction is taken of this number.
ROWS_TO_JUDGE = 1_000


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
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="windows-", dir=scratch.folder())))

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


def _write(rows: datasets.Dataset, place: Path) -> None:
    table = rows.with_format("arrow")
    schema = rows.features.arrow_schema
    with pa.OSFile(str(place), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in table.iter(ROWS_AT_ONCE):
            writer.write_table(batch.cast(schema))
