"""Trainer callbacks: adapter saving and readable progress."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import ProgressCallback, TrainerCallback

from vlmtune.files import write_whole
from vlmtune.models.checkpoint import save_model_and_processor

logger = logging.getLogger("vlmtune.training")


class SavePeftModelCallback(TrainerCallback):
    """Saves the adapter with the processor into each checkpoint of a plain ``transformers.Trainer``.

    :class:`~vlmtune.training.trainer.MemoryEfficientTrainer` does this itself; this callback is for people
    who keep their own trainer.

    Args:
        processor: saved beside the adapter.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write adapter and processor into the checkpoint just made."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_model_and_processor(kwargs["model"], self.processor, folder)


class TowerAside(TrainerCallback):
    """Keeps parts that no step calls, because every image's features are cached, out of the accelerator's memory.

    Args:
        parts: the vision tower and the projector.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self.parts = parts

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move them to the host's memory."""
        if args.device.type != "cpu":
            self._move("cpu")
            torch.cuda.empty_cache()
            logger.info("the vision tower waits in the host's memory: every image's features are cached")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move them back."""
        self._move(args.device)

    def _move(self, device: torch.device | str) -> None:
        for part in self.parts:
            part.to(device)


class LoggingCallback(ProgressCallback):
    """Shows a progress bar, and logs one readable line at each logging step to the ``vlmtune.training`` logger."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar, unless bars are turned off."""
        if not args.disable_tqdm:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar on."""
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the evaluation's bar on."""
        if not args.disable_tqdm:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write the step's figures."""
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            parts = [f"loss {logs['loss']:.4f}", f"lr {logs.get('learning_rate', 0):.2e}"]
            if "grad_norm" in logs:
                parts.append(f"grad {logs['grad_norm']:.3f}")
            if "samples_per_second" in logs:
                parts.append(f"{logs['samples_per_second']:.1f} samples/s")
                parts.append(f"data wait {logs['data_wait_share']:.0%}")
            if "peak_memory_gib" in logs:
                parts.append(f"peak memory {logs['peak_memory_gib']:.2f} GiB")
            logger.info("step %d/%d: %s", state.global_step, state.max_steps, ", ".join(parts))
        elif "eval_loss" in logs:
            parts = [f"evaluation loss {logs['eval_loss']:.4f}"]
            if "eval_answers" in logs:
                timing = ("runtime", "samples_per_second", "steps_per_second", "loss", "answers", "answer_seconds")
                scores = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
                parts += [f"{name} {value:.4f}" for name, value in scores.items() if name not in timing]
                parts.append(f"{logs['eval_answers']} answers in {logs['eval_answer_seconds']:.1f} s")
            logger.info("step %d/%d: %s", state.global_step, state.max_steps, ", ".join(parts))


class LogFile(TrainerCallback):
    """Brings ``log.jsonl`` up to date with each checkpoint, so that a run that is killed leaves its log.

    Args:
        output_dir: the run's.
    """

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the log of all steps so far."""
        write_log(self.output_dir, state.log_history)


def write_log(output_dir: Path, history: list[dict[str, Any]]) -> None:
    """Write ``log.jsonl``, a line for each logged step."""
    write_whole(output_dir / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in history))
