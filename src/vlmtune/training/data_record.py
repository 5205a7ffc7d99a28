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


def describe_train(train: LoadedData, found: Scan) -> dict[str, Any]:
    """Return the entry of the training data in ``run.json``."""
    return {
        "samples": len(found.kept),
        "left_out": len(train.dataset) - len(found.kept) + len(train.quarantine.rows),
        "tokens": int(found.lengths.sum()),
        "supervised_tokens": int(found.supervised.sum()),
        "fingerprint": fingerprint(train.dataset),
    }


def describe_evaluation(evaluation: LoadedData, found: Scan) -> dict[str, Any]:
    """Return the entry of the evaluation data in ``run.json``."""
    return {"samples": len(found.kept), "fingerprint": fingerprint(evaluation.dataset)}
