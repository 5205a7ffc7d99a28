"""How much a training has computed, how fast, and with how much memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch

from vlmtune.training.loss import count_targets


@dataclass
class Work:
    """What this process has taken from its loader since training began.

    Attributes:
        samples: texts.
        images: pictures, each as often as it, or its kept features, went into the model.
        supervised_tokens: of all texts.
        wait_seconds: spent waiting for data.
    """

    samples: int = 0
    images: int = 0
    supervised_tokens: int = 0
    wait_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.restart_clock()

    def restart_clock(self) -> None:
        """Take the next rates from now on."""
        self._since, self._then = time.perf_counter(), astuple(self)

    def add(self, batches: Sequence[Mapping[str, Any]], wait_seconds: float) -> None:
        """Count a step's batches, which took ``wait_seconds`` to come."""
        self.wait_seconds += wait_seconds
        for batch in batches:
            self.samples += len(batch.get("sample_ids", batch["input_ids"]))
            self.images += sum(len(batch[key]) for key in ("pixel_values", "image_features") if key in batch)
            self.supervised_tokens += count_targets(batch)

    def rates(self) -> dict[str, float]:
        """Return what was done a second and the share of time spent waiting, since the last call, and the peak memory.

        The names are those of ``log.jsonl``.
        """
        seconds = max(time.perf_counter() - self._since, 1e-9)
        samples, images, tokens, wait = (new - old for new, old in zip(astuple(self), self._then, strict=True))
        self.restart_clock()
        found = {
            "samples_per_second": round(samples / seconds, 3),
            "images_per_second": round(images / seconds, 3),
            "supervised_tokens_per_second": round(tokens / seconds, 1),
            "data_wait_share": round(wait / seconds, 4),
        }
        if memory := peak_memory():
            found["peak_memory_gib"] = round(memory / 2**30, 3)
        return found


def peak_memory() -> int:
    """Return the most bytes held so far: of tensors on this rank's GPU, else of the process; 0 where unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    # Linux counts KiB, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
