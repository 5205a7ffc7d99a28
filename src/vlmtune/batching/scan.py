"""One pass over the texts before any weight loads: lengths, supervised tokens and samples that cannot be encoded."""

from __future__ import annotations

import logging
import multiprocessing
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import datasets
import numpy as np
import numpy.typing as npt

from vlmtune.batching.counting import UNKNOWN, Counter
from vlmtune.batching.encode import Encoder
from vlmtune.data.sample import Sample
from vlmtune.errors import EncodingError, ImageError, TooLongError

logger = logging.getLogger("vlmtune.batching")

Row = Mapping[str, Any]
Counts = npt.NDArray[np.int64]


class Fault(NamedTuple):
    """Why a row cannot be trained on, and whether that is its length."""

    reason: str
    too_long: bool


# Below this many rows, starting worker processes takes longer than the pass itself.
PARALLEL_FROM = 20_000
# Below this many rows, finding out how to count them takes longer than encoding them.
COUNTED_FROM = 2_000
# Counted rows that are encoded too, spread over the data, to see that the counts are right.
COMPARED = 200


@dataclass(frozen=True)
class Scan:
    """What the pass found.

    Attributes:
        kept: indices of the rows that can be trained on, in order.
        lengths: tokens of each kept row, soft tokens included.
        supervised: supervised tokens of each kept row.
        left_out: (sample id, reason) of every other row.
        image_tokens: soft tokens of each kept row.
    """

    kept: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    supervised: npt.NDArray[np.int64]
    left_out: list[tuple[str, str]] = field(default_factory=list)
    image_tokens: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def summary(self) -> str:
        """One line for people."""
        if not len(self.lengths):
            return "no sample can be trained on"
        return (
            f"{len(self.kept):,} samples of {self.lengths.min()} to {self.lengths.max()} tokens "
            f"(median {int(np.median(self.lengths))}), {int(self.supervised.sum()):,} supervised tokens, "
            f"{self.supervised.sum() / self.lengths.sum():.1%} of all"
        )


def scan(
    dataset: datasets.Dataset,
    encoder: Encoder,
    *,
    to_sample: Callable[[Mapping[str, Any]], Sample] = Sample.from_row,
    max_bad_fraction: float = 0.01,
    processes: int | None = None,
) -> Scan:
    """Count every row's tokens by :func:`count_rows` and report what cannot be trained on.

    Rows above ``max_length`` are left out when the encoder's policy is ``drop``, and are an error when it is
    ``error``. Rows that cannot be encoded for another reason are left out up to ``max_bad_fraction`` of all.

    Raises:
        EncodingError: too many rows cannot be encoded; the message names the first of them and says how many.
    """
    counts, faults = count_rows(dataset, encoder, to_sample, processes)
    bad = sorted(faults)
    left_out = [(str(dataset[index]["id"]), faults[index].reason) for index in bad]
    fatal = [faults[index] for index in bad if not faults[index].too_long or encoder.on_too_long != "drop"]
    strict = any(fault.too_long for fault in fatal)
    if fatal and (strict or len(fatal) > max_bad_fraction * len(dataset)):
        shown = "\n".join(f"  {fault.reason}" for fault in fatal[:5])
        more = f"\n  and {len(fatal) - 5:,} more" if len(fatal) > 5 else ""
        raise EncodingError(f"{len(fatal):,} of {len(dataset):,} samples cannot be trained on:\n{shown}{more}")
    for name, reason in left_out[:5]:
        logger.warning("left out %s: %s", name, reason)
    if left_out:
        logger.warning("%d of %d samples were left out; every one is named in the run's record", len(bad), len(dataset))
    kept = np.setdiff1d(np.arange(len(dataset)), np.asarray(bad, dtype=np.int64))
    lengths, supervised, image_tokens = counts[kept].T
    return Scan(kept, lengths, supervised, left_out, image_tokens)


def count_rows(
    dataset: datasets.Dataset,
    encoder: Encoder,
    to_sample: Callable[..., Sample] = Sample.from_row,
    processes: int | None = None,
) -> tuple[Counts, dict[int, Fault]]:
    """Count each row's tokens, supervised tokens and soft tokens, and find what is wrong with the others.

    Many rows are counted by :class:`~vlmtune.batching.counting.Counter`, and encoded where that leaves a doubt.

    Args:
        dataset: rows; no image is decoded.
        encoder: of the model; a row beyond its limit has a fault.
        to_sample: makes a sample of a row.
        processes: worker processes; by default one a CPU core, and none for few rows.

    Returns:
        Counts (N, 3), nought for a row that has a fault, and the faults by row.
    """
    counts = np.full((len(dataset), len(_MEASURES)), UNKNOWN, dtype=np.int64)
    if len(dataset) >= COUNTED_FROM and to_sample == Sample.from_row:
        counts = Counter(encoder).count(dataset)
    tokens, supervised, _ = counts.T
    doubtful = (tokens == UNKNOWN) | (tokens > (encoder.max_length or np.inf)) | (supervised < 1)
    compared = np.zeros(len(dataset), dtype=bool)
    compared[:: max(1, len(dataset) // COMPARED)] = True
    rows = np.flatnonzero(doubtful | compared)
    found, faults = _encoded(dataset, rows, encoder, to_sample, processes)
    same = doubtful[rows] | (found == counts[rows]).all(axis=1)
    if not same.all():
        logger.info("sample %r is not of the length that was counted: all are encoded", dataset[rows[~same][0]]["id"])
        return _encoded(dataset, np.arange(len(dataset)), encoder, to_sample, processes)
    counts[rows] = found
    return counts, faults


def _encoded(
    dataset: datasets.Dataset, rows: Counts, encoder: Encoder, to_sample: Callable[..., Sample], processes: int | None
) -> tuple[Counts, dict[int, Fault]]:
    chosen = dataset if len(rows) == len(dataset) else dataset.select(rows)
    table = _measure_rows(chosen, partial(_measure, encoder=encoder, to_sample=to_sample), _COLUMNS, processes)
    reasons, too_long = table["reason"][:], table["too_long"][:]
    faults = {
        int(row): Fault(reason, late) for row, reason, late in zip(rows, reasons, too_long, strict=True) if reason
    }
    return np.stack([np.asarray(table[name], dtype=np.int64) for name in _MEASURES], axis=1), faults


def _measure_rows(
    dataset: datasets.Dataset,
    measure: Callable[[Row], dict[str, Any]],
    columns: Mapping[str, str],
    processes: int | None,
) -> datasets.Dataset:
    """Return a table of what ``measure`` finds in each row.

    Args:
        dataset: rows.
        measure: of one row, a value for each column; it must be picklable.
        columns: name and Arrow type of each column.
        processes: worker processes; by default one a CPU core, and none below 20,000 rows.
    """
    # A process that loads data may not start others.
    alone = multiprocessing.current_process().daemon
    cores = len(os.sched_getaffinity(0)) if len(dataset) >= PARALLEL_FROM and not alone else None
    return dataset.map(
        _measure_batch,
        fn_kwargs={"measure": measure},
        batched=True,
        batch_size=500,
        remove_columns=dataset.column_names,
        features=datasets.Features({name: datasets.Value(kind) for name, kind in columns.items()}),
        num_proc=processes or cores,
        # A fingerprint of our own: hashing the processor takes longer than the pass, and nothing is reused.
        new_fingerprint=uuid.uuid4().hex,
        keep_in_memory=True,
        desc="Checking texts",
    )


def _measure_batch(batch: Mapping[str, list[Any]], measure: Callable[[Row], dict[str, Any]]) -> dict[str, list[Any]]:
    rows = [measure(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
    return {name: [row[name] for row in rows] for name in rows[0]}


_MEASURES = ("length", "supervised", "image_tokens")
_COLUMNS = dict.fromkeys(_MEASURES, "int64") | {"too_long": "bool", "reason": "string"}


def _measure(row: Row, encoder: Encoder, to_sample: Callable[..., Sample]) -> dict[str, Any]:
    try:
        encoded = encoder(to_sample(row), pixels=False)
    except (EncodingError, ImageError) as error:
        return dict.fromkeys(_COLUMNS, 0) | {"too_long": isinstance(error, TooLongError), "reason": str(error)}
    return {
        "length": len(encoded.input_ids),
        "supervised": encoded.n_supervised,
        "image_tokens": sum(map(bool, encoded.token_type_ids)),
        "too_long": False,
        "reason": "",
    }
