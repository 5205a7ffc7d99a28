"""``vlmtune train`` that is killed (SIGKILL) at a chosen moment: ``victim.py PHASE NUMBER DELAY train RECIPE ...``.

At the NUMBER-th time that PHASE begins, a thread waits DELAY seconds and kills the process, wherever it then is.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any


def arm(phase: str, number: int, delay: float) -> None:
    from vlmtune.batching.collator import SharedImageCollator
    from vlmtune.models import features
    from vlmtune.training import checkpoints
    from vlmtune.training.trainer import MemoryEfficientTrainer

    places: dict[str, tuple[Any, str]] = {
        "data": (SharedImageCollator, "__call__"),
        "step": (MemoryEfficientTrainer, "training_step"),
        "update": (MemoryEfficientTrainer, "_get_grad_norm"),
        "cache": (features, "save_file"),
        "checkpoint": (MemoryEfficientTrainer, "_save_checkpoint"),
        "manifest": (checkpoints, "seal"),
        "rename": (checkpoints, "_rename"),
        "old": (checkpoints, "delete_old"),
        "evaluation": (MemoryEfficientTrainer, "prediction_step"),
        "model": (MemoryEfficientTrainer, "save_model"),
    }
    owner, name = places[phase]
    whole, begun = getattr(owner, name), 0

    def begin(*args: Any, **kwargs: Any) -> Any:
        nonlocal begun
        begun += 1
        if begun == number:
            threading.Thread(target=kill, daemon=True).start()
        return whole(*args, **kwargs)

    def kill() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, begin)
    if phase == "old":
        from vlmtune.training import steady

        steady.delete_old = begin


if __name__ == "__main__":
    from vlmtune.cli import main

    arm(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
    sys.exit(main(sys.argv[4:]))
