"""What becomes of the rows in the model's own tokens: lengths, image tokens, supervised tokens, what a limit cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import numpy.typing as npt

from vlmtune.batching.encode import Encoder, TooLong
from vlmtune.batching.scan import count_rows
from vlmtune.batching.sharing import describe_saving
from vlmtune.data.sample import Sample
from vlmtune.errors import VlmtuneError
from vlmtune.inspection.findings import Report, histogram, many


@dataclass(frozen=True)
class TokenFacts:
    """Tokens of each row, by its place in the data.

    Attributes:
        lengths: all tokens, image tokens included; 0 where a row cannot be encoded.
        supervised: tokens that are learned.
        image_tokens: image tokens.
        reasons: why a row cannot be encoded, by its place.
    """

    lengths: npt.NDArray[np.int64]
    supervised: npt.NDArray[np.int64]
    image_tokens: npt.NDArray[np.int64]
    reasons: dict[int, str]


def measure(dataset: datasets.Dataset, encoder: Encoder, *, processes: int | None = None) -> TokenFacts:
    """Count every row's tokens, as training does; images are not decoded.

    Args:
        dataset: rows in the samples' form.
        encoder: without a length limit.
        processes: worker processes; by default one a CPU core, and none for few rows.
    """
    counts, faults = count_rows(dataset, encoder, processes=processes)
    lengths, supervised, image_tokens = counts.T
    return TokenFacts(lengths, supervised, image_tokens, {row: fault.reason for row, fault in faults.items()})


def report_tokens(
    report: Report,
    side: str,
    dataset: datasets.Dataset,
    facts: TokenFacts,
    encoder: Encoder,
    *,
    max_length: int | None,
    on_too_long: TooLong,
    max_bad_fraction: float,
) -> None:
    """Add what the tokens of one side tell, and refuse what training refuses.

    Args:
        report: receives the findings.
        side: ``training`` or ``evaluation``.
        dataset: the rows measured.
        facts: from :func:`measure`.
        encoder: that measured them.
        max_length: the run's limit.
        on_too_long: what the run does above it.
        max_bad_fraction: largest share of rows that may be left out.
    """
    bad = [f"{dataset[row]['id']}: {reason}" for row, reason in sorted(facts.reasons.items())]
    report.add("error", "cannot be encoded", bad,
               f"{many(len(bad), f'{side} row', f'{side} rows')} cannot become tokens of this model.",
               "Mend or remove them.")  # fmt: skip
    good = facts.lengths[facts.lengths > 0]
    if len(good):
        report.histograms[f"Tokens of a row, {side}"] = histogram(good.tolist())
        report.histograms[f"Supervised tokens of a row, {side}"] = histogram(
            facts.supervised[facts.lengths > 0].tolist()
        )
    long = [] if max_length is None else np.flatnonzero(facts.lengths > max_length).tolist()
    refused = [] if max_length is None else _cut(report, side, dataset, facts, encoder, long, max_length, on_too_long)
    if refused:
        report.refused.append(f"{_rows_are(len(refused), side)} longer than max_length {max_length:,}")
    if len(bad) > max_bad_fraction * len(dataset):
        report.refused.append(
            f"{len(bad):,} of {len(dataset):,} {side} rows cannot be encoded, more than max_bad_fraction "
            f"{max_bad_fraction:g} allows"
        )
    total = int(facts.lengths.sum())
    report.numbers[f"{side} tokens"] = {
        "tokens": total,
        "image_tokens": int(facts.image_tokens.sum()),
        "supervised_tokens": int(facts.supervised.sum()),
        "supervised_share": round(float(facts.supervised.sum()) / max(total, 1), 4),
        "shortest": int(good.min()) if len(good) else 0,
        "median": int(np.median(good)) if len(good) else 0,
        "longest": int(good.max()) if len(good) else 0,
        "longer_than_max_length": len(long),
    }


def _cut(
    report: Report,
    side: str,
    dataset: datasets.Dataset,
    facts: TokenFacts,
    encoder: Encoder,
    long: Sequence[int],
    max_length: int,
    on_too_long: TooLong,
) -> list[str]:
    """Report the rows above the limit; return those that training refuses."""
    names = [f"{dataset[index]['id']}: {facts.lengths[index]:,} tokens" for index in long[:20]]
    over = f"{_rows_are(len(long), side)} longer than max_length {max_length:,}"
    if on_too_long != "truncate_text":
        level, what = ("error", "training stops") if on_too_long == "error" else ("warning", "they are left out")
        advice = f"Raise max_length to {int(facts.lengths.max()):,}, or set on_too_long."
        report.add(level, "too long", names, f"{over}: {what}.", advice, count=len(long))  # type: ignore[arg-type]
        return [str(index) for index in long] if on_too_long == "error" else []
    limited = Encoder(
        encoder.processor, encoder.family, max_length=max_length, on_too_long=on_too_long, max_pixels=encoder.max_pixels
    )
    refused, lost = list[str](), 0
    for index in long:
        try:
            encoded = limited(Sample.from_row(dataset[index]), pixels=False)
            lost += int(facts.supervised[index]) - encoded.n_supervised
        except VlmtuneError as error:
            refused.append(str(error))
    learned = int(facts.supervised[long].sum())
    report.add("warning", "cut", names, f"{over}: {lost:,} of their {learned:,} supervised tokens are cut off.",
               f"Raise max_length to {int(facts.lengths.max()):,}.", count=len(long))  # fmt: skip
    report.add("error", "nothing left after cutting", refused,
               f"{many(len(refused), f'{side} row', f'{side} rows')} would lose an image, or every supervised "
               "token.")  # fmt: skip
    return refused


def _rows_are(count: int, side: str) -> str:
    return many(count, f"{side} row is", f"{side} rows are")


def sharing(keys: Sequence[str], facts: TokenFacts) -> str:
    """Say what computing an image once for all its texts saves; see :func:`describe_saving`."""
    return describe_saving(keys, facts.lengths, facts.image_tokens)
