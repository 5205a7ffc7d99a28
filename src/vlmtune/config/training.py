"""``transformers.TrainingArguments`` with defaults for vision-language models."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import transformers
from transformers.utils import is_torch_bf16_gpu_available

from vlmtune.config.options import OptionsError, limit_problems, raise_problems
from vlmtune.config.training_options import TrainingOptions


@dataclass
class TrainingArguments(TrainingOptions, transformers.TrainingArguments):
    """Every option of ``transformers.TrainingArguments``, with defaults for vision-language models.

    What is ours, or has another default, is declared with its help in
    :class:`~vlmtune.config.training_options.TrainingOptions`. ``bf16`` and ``dataloader_num_workers`` left at
    their defaults are chosen by the hardware.

    Raises:
        ConfigError: a value is of the wrong kind or out of range, or the hardware cannot do what is asked.
    """

    _argument_group_name = "training"

    def __post_init__(self) -> None:
        """Choose what is left to the hardware, then check as the base class does."""
        raise_problems(self.problems())
        if self.resume:
            self.resume_from_checkpoint = self.resume_from_checkpoint or "true"
        # transformers keeps the old names and warns; people know them, and both mean the same.
        if self.activation_checkpointing is None and self.gradient_checkpointing is not None:
            self.activation_checkpointing, self.gradient_checkpointing = self.gradient_checkpointing, None
        if self.gradient_checkpointing_kwargs is not None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        elif self.activation_checkpointing_kwargs is None:
            # Re-entrant checkpointing loses the gradients of adapters behind frozen inputs.
            self.activation_checkpointing_kwargs = {"use_reentrant": False}
        self.gradient_checkpointing_kwargs = None
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        if not torch.cuda.is_available():
            # Pinned memory serves copies to an accelerator; without one PyTorch warns.
            self.dataloader_pin_memory = False
        if self.early_stopping_patience is not None:
            self.metric_for_best_model = self.metric_for_best_model or "loss"
        if self.dataloader_num_workers < 0:
            self.dataloader_num_workers = default_workers()
        try:
            super().__post_init__()
        except (ValueError, TypeError, ImportError, OSError) as error:
            raise OptionsError([f"The training options cannot be used: {' '.join(str(error).split())}"]) from error

    def problems(self) -> list[str]:
        """Return what is wrong with the values, one sentence each, before the base class sees them."""
        found = limit_problems(self)
        if self.fp16 and self.bf16:
            found.append("fp16 and bf16 are both on; choose one of them.")
        if self.eval_strategy == "no":
            found += [
                f"{name} is set, but eval_strategy is no; set it to steps or epoch."
                for name in ("eval_answers", "early_stopping_patience")
                if getattr(self, name)
            ]
        return found


def default_workers() -> int:
    """Number of data-loading processes for one training process on this machine.

    With one or two cores the training itself needs them; else a core is left to it, and more than four
    processes seldom help.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1))
    return 0 if share <= 2 else min(4, share - 1)
