"""Data in many files of which only the list is kept: which there are, and in which order each process reads them.

Shape legend: S shards.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vlmtune.data.formats import FORMATS
from vlmtune.data.loading import DataOptions
from vlmtune.data.recognition import choose_format, resolve
from vlmtune.errors import DataError

logger = logging.getLogger("vlmtune.data")

# Of the type of ``vlmtune.config.VLMDataArguments``.
Options = TypeVar("Options", bound=Any)


@dataclass(frozen=True)
class Shards:
    """The files of one split.

    Attributes:
        files: in the order of their names.
        sizes: bytes of each.
        format: the format's name.
        source: what a person named, for messages.
    """

    files: tuple[Path, ...]
    sizes: tuple[int, ...]
    format: str
    source: str

    def order(self, seed: int, epoch: int, rank: int = 0, world_size: int = 1) -> list[Path]:
        """Return the shards that a rank reads in an epoch: over the ranks each shard once, drawn anew each epoch."""
        drawn = np.random.default_rng([seed, epoch]).permutation(len(self.files))
        return [self.files[index] for index in drawn[rank::world_size]]

    def fingerprint(self) -> str:
        """Return a hash of the shards' names and sizes, the same on every machine."""
        listed = "\n".join(f"{file.name} {size}" for file, size in zip(self.files, self.sizes, strict=True))
        return hashlib.sha256(listed.encode()).hexdigest()[:16]


def find_shards(options: DataOptions) -> Shards:
    """List the shards of the split to train on.

    Raises:
        DataError: the data is not in shards, or has no such split.
    """
    place = resolve(options.dataset_path)
    chosen = choose_format(place, options.dataset_format)
    if chosen.shards is None:
        known = ", ".join(name for name, format in FORMATS.items() if format.shards is not None)
        raise DataError(
            f"streaming is on, but {options.dataset_path} is in the format {chosen.name}, which is read as a whole. "
            f"Streaming reads {known}: write the data so by vlmtune convert, or turn streaming off."
        )
    splits = chosen.shards(place)
    split = options.train_split or ("train" if "train" in splits else None)
    if split is not None and split not in splits:
        has = ", ".join(name for name in splits if name) or "none"
        raise DataError(f"{options.dataset_path} has no split {split!r}; splits of its shards: {has}.")
    files = [file for name, parts in splits.items() if split in (None, name) for file in parts]
    return Shards(tuple(files), tuple(file.stat().st_size for file in files), chosen.name, options.dataset_path)


def first_shard(options: Options) -> Options:
    """Return options that read one shard as a whole, for what looks at data before training; others as they are.

    Raises:
        DataError: as :func:`find_shards`.
    """
    if not options.streaming:
        return options
    file = find_shards(options).files[0]
    logger.info("streaming: of the training data its first shard alone is looked at, %s", file)
    apart = options.eval_dataset_path or (options.dataset_path if options.eval_split else None)
    return dataclasses.replace(
        options, dataset_path=str(file), train_split=None, eval_dataset_path=apart, streaming=False
    )
