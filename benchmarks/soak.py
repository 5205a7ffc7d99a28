"""Whether a long run grows: memory, open files, threads and disk over 2,000 steps with evaluations and checkpoints.

The demo model learns easy-VQA by the real ``run_training``. Every 50 steps the process is measured; the growth is that
of the least squares line through the second half, where caches and pools are full. Resident memory holds what the
allocator keeps for later too; "allocated" (glibc's mallinfo2) is what the program holds, and "objects" what Python's
garbage collector knows of.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from _common import header, markdown, write
from transformers import TrainerCallback

from vlmtune.config import parse_recipe
from vlmtune.demo.run import model_folder
from vlmtune.training import run as run_module
from vlmtune.training.trainer import create_trainer

EVERY = 50
UNITS = {
    "rss_mib": "MiB",
    "allocated_mib": "MiB",
    "objects": "objects",
    "open_files": "files",
    "threads": "threads",
    "disk_mib": "MiB",
}


class _Mallinfo(ctypes.Structure):
    """The C library's ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def allocated() -> int:
    """Bytes that the program holds from the C library's allocator."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    return int(found.uordblks + found.hblkhd)


class Watch(TrainerCallback):
    """Measures this process and the run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.process = folder, psutil.Process()
        self.seen: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % EVERY == 0:
            files = (path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
            gc.collect()
            self.seen.append(
                {
                    "step": state.global_step,
                    "rss_mib": self.process.memory_info().rss / 2**20,
                    "allocated_mib": allocated() / 2**20,
                    "objects": len(gc.get_objects()),
                    "open_files": self.process.num_fds(),
                    "threads": threading.active_count(),
                    "disk_mib": sum(files) / 2**20,
                }
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        flags = {
            "model_name_or_path": model_folder(),
            "dataset_path": "easy-vqa",
            "dataset_format": "easy_vqa",
            "train_split": "train",
            "eval_split": "test",
            "max_train_samples": 2000,
            "max_eval_samples": 64,
            "output_dir": folder / "run",
            "cache_dir": folder / "cache",
            "max_steps": options.steps,
            "per_device_train_batch_size": 8,
            "eval_strategy": "steps",
            "eval_steps": 100,
            "eval_answers": 16,
            "max_new_tokens": 4,
            "save_steps": 100,
            "logging_steps": 10,
            "dataloader_num_workers": options.workers,
            "disable_tqdm": "true",
        }
        recipe = parse_recipe([text for name, value in flags.items() for text in (f"--{name}", str(value))])
        watch = Watch(folder)

        def watched(**given: Any) -> Any:
            trainer = create_trainer(**given)
            trainer.add_callback(watch)
            return trainer

        run_module.create_trainer = watched
        result = run_module.run_training(*recipe)
    rows = watch.seen
    late = rows[len(rows) // 2 :]
    table, growth = [], {}
    for name, unit in UNITS.items():
        growth[name] = 1000 * float(np.polyfit([row["step"] for row in late], [row[name] for row in late], 1)[0])
        values = [f"{row[name]:,.1f}" for row in (rows[0], rows[len(rows) // 2], rows[-1])]
        table.append([f"{name.removesuffix('_mib').replace('_', ' ')}, {unit}", *values, f"{growth[name]:+.2f}"])
    columns = ["", f"step {rows[0]['step']}", f"step {rows[len(rows) // 2]['step']}", f"step {rows[-1]['step']}"]
    record = {"about": header(options), "rows": rows, "growth": growth, "seconds": round(result.seconds)}
    write("soak", record, markdown([*columns, "growth in 1,000 steps, second half"], table))


if __name__ == "__main__":
    main()
