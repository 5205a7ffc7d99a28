"""Options that say on how many devices a command runs, and how training shares the model out between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vlmtune.config.options import AT_LEAST_ONE, Limits, option

Strategy = Literal["ddp", "fsdp", "zero2", "zero3"]


@dataclass
class DeviceOptions:
    """Where a command runs. A launcher that started it already (torchrun, accelerate, srun) decides instead."""

    _argument_group_name = "devices"

    devices: int | None = option(
        None,
        help="Devices of this machine to run on, a process each: GPUs, or on a machine without any, processes on its "
        "CPU. By default one.",
    )
    nodes: int | None = option(
        None, help="Machines that run it together: start the same command on each. By default one, or Slurm's number."
    )
    rendezvous: str | None = option(
        None, help="With several nodes: host:port of one of them, where all meet; the same on each."
    )

    limits: ClassVar[Limits] = {"devices": AT_LEAST_ONE, "nodes": AT_LEAST_ONE}


def fsdp_settings(asked: dict[str, Any] | None) -> dict[str, Any]:
    """Return the settings of FSDP2 in the terms of ``transformers.TrainingArguments.fsdp_config``.

    Which layers become units of their own is filled in from the loaded model, by its family's record.

    Args:
        asked: settings of a person's own, which win.
    """
    return {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        # Checkpoints are the files that one process writes, so that any number of devices can go on from them.
        "state_dict_type": "FULL_STATE_DICT",
        **(asked or {}),
    }


def zero_settings(stage: Literal[2, 3]) -> dict[str, Any]:
    """Return a DeepSpeed configuration for ZeRO (arXiv:1910.02054); ``auto`` takes the value of the training options.

    Args:
        stage: 2 shares gradients and optimizer state out over the ranks, 3 the weights too.
    """
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": "auto", "overlap_comm": True}
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        # The optimizer is torch's own, as with every other strategy.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def split_batch(effective: int, most: int, world_size: int) -> tuple[int, int]:
    """Return the largest device batch up to ``most``, and its accumulation steps, that give ``effective`` samples.

    Raises:
        ValueError: ``effective`` is no multiple of the number of devices.
    """
    if effective % world_size:
        raise ValueError(
            f"An effective batch of {effective} cannot be split evenly over {world_size} devices. "
            f"Use a multiple of {world_size}."
        )
    per_rank = effective // world_size
    size = next(size for size in range(min(most, per_rank), 0, -1) if per_rank % size == 0)
    return size, per_rank // size
