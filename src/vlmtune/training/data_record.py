"""What a run records of its data: counts, fingerprints, and every sample that was left out with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmtune.batching.scan import Scan
from vlmtune.data.fingerprint import fingerprint
from vlmtune.data.loading import LoadedData
from vlmtune.files import write_whole


def quarantined(data: LoadedData) -> list[tuple[str, str]]:
    """Return (id, reason) of the rows that could not be read."""
    return [(row.id, row.reason) for row in data.quarantine.rows]


def record_left_out(output_dir: Path, left_out: list[tuple[str, str]]) -> None:
    """Write ``left_out.jsonl``, where anything was left out."""
    if left_out:
        lines = [json.dumps({"id": name, "reason": reason}, ensure_ascii=False) for name, reason in left_out]
        write_whole(output_dir / "left_out.jsonl", "\n".join(lines) + "\n")


def describe_data(
    train: LoadedData, train_scan: Scan, evaluation: LoadedData | None, eval_scan: Scan | None
) -> dict[str, Any]:
    """Return the entry of the data in ``run.json``."""
    record: dict[str, Any] = {
        "format": train.format,
        "train": {
            "samples": len(train_scan.kept),
            "left_out": len(train.dataset) - len(train_scan.kept) + len(train.quarantine.rows),
            "tokens": int(train_scan.lengths.sum()),
            "supervised_tokens": int(train_scan.supervised.sum()),
            "fingerprint": fingerprint(train.dataset),
        },
    }
    if evaluation is not None and eval_scan is not None:
        record["evaluation"] = {"samples": len(eval_scan.kept), "fingerprint": fingerprint(evaluation.dataset)}
    return record
