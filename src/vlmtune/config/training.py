"""``transformers.TrainingArguments`` with defaults for vision-language models."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.utils import is_torch_bf16_gpu_available

from vlmtune.config.devices import fsdp_settings, split_batch, zero_settings
from vlmtune.config.options import OptionsError, limit_problems, raise_problems
from vlmtune.config.secrets import SECRET_NAME, keep_secret
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
        # As in Python; a recipe's true and false are read as on and off.
        switches: dict[Any, Any] = {True: "on", False: "off"}
        self.resume = switches.get(self.resume, self.resume)
        for name, value in vars(self).items():
            if SECRET_NAME.search(name) and isinstance(value, str):
                keep_secret(value)
        raise_problems(self.problems())
        world_size = int(os.environ.get("WORLD_SIZE") or 1)
        if world_size > 1 and not torch.accelerator.is_available():
            # Without an accelerator it must be told, or every process takes itself for the only one.
            self.use_cpu = True
        if self.effective_batch_size:
            self.per_device_train_batch_size, self.gradient_accumulation_steps = split_batch(
                self.effective_batch_size, self.per_device_train_batch_size, world_size
            )
        if world_size > 1:
            self._share_out()
        if getattr(self, "ddp_find_unused_parameters", None) is None:
            # None is unused: what no image went through in a step gets a dummy one.
            self.ddp_find_unused_parameters = False
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
        # The base class would deal every batch out to all devices it sees; a process takes one, and says so by rank.
        self._n_gpu = min(self.n_gpu, 1)
        if getattr(self, "deepspeed", None) and self.use_cpu:
            import deepspeed

            # Beside an accelerator the base class does so; ZeRO-3 asks for the number of ranks when weights load.
            deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)

    def _share_out(self) -> None:
        """Give the base class the settings of the strategy."""
        if self.strategy == "fsdp":
            self.fsdp = True
            self.fsdp_config = fsdp_settings(getattr(self, "fsdp_config", None))
        elif self.strategy in ("zero2", "zero3"):
            self.deepspeed = zero_settings(2 if self.strategy == "zero2" else 3)

    def problems(self) -> list[str]:
        """Return what is wrong with the values, one sentence each, before the base class sees them."""
        found = limit_problems(self)
        if self.fp16 and self.bf16:
            found.append("fp16 and bf16 are both on; choose one of them.")
        if self.remove_unused_columns:
            found.append("remove_unused_columns is true, but batches are made of columns that the model does not know.")
        world_size = int(os.environ.get("WORLD_SIZE") or 1)
        if self.effective_batch_size and self.effective_batch_size % world_size:
            found.append(
                f"effective_batch_size is {self.effective_batch_size}, which cannot be split evenly over {world_size} "
                f"devices; use a multiple of {world_size}."
            )
        if self.effective_batch_size and self.gradient_accumulation_steps != 1:
            found.append(
                "effective_batch_size and gradient_accumulation_steps are both set; the first decides the second, so "
                "leave the second out."
            )
        if self.strategy != "ddp" and (self.fsdp or self.deepspeed):
            found.append(
                f"strategy is {self.strategy}, and {'fsdp' if self.fsdp else 'deepspeed'} is set too; "
                "leave one of them out."
            )
        if self.strategy in ("zero2", "zero3") and importlib.util.find_spec("deepspeed") is None:
            found.append(
                f"strategy {self.strategy} needs the package deepspeed, which is not installed. Install it by: "
                "pip install 'vlmtune[deepspeed]', or use fsdp, which needs nothing more."
            )
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
