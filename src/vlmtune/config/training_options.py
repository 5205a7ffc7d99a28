"""The training options that people set most, and those that are ours, without importing transformers.

:class:`~vlmtune.config.training.TrainingArguments` takes them over, together with all others of
``transformers.TrainingArguments``; ``vlmtune train --help`` shows them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vlmtune.config.devices import DeviceOptions, Strategy
from vlmtune.config.options import (
    AT_LEAST_ONE,
    AT_LEAST_ZERO,
    POSITIVE,
    Limit,
    Limits,
    option,
)


@dataclass
class TrainingOptions(DeviceOptions):
    """Options of training with vlmtune's defaults."""

    _argument_group_name = "training"

    output_dir: str | None = option(
        None,
        help="Folder for the adapter or model, its checkpoints, records and log. It must be absent or empty, or hold "
        "this run, unfinished.",
    )
    num_train_epochs: float = option(1.0, help="Passes over the training data; fractions work.")
    max_steps: int = option(-1, help="Stop after this many optimizer steps; overrides num_train_epochs when positive.")
    per_device_train_batch_size: int = option(8, help="Samples a device takes at once in training.")
    per_device_eval_batch_size: int = option(8, help="Samples a device takes at once for the evaluation loss.")
    gradient_accumulation_steps: int = option(
        1, help="Batches gathered into one optimizer step; 4 batches of 1 give the same step as 1 batch of 4."
    )
    device_batch_size: Literal["auto"] | None = option(
        None,
        help="auto takes as many samples at once as fit the device's memory, by an estimate and a step with the "
        "heaviest rows, and adapts gradient_accumulation_steps: the optimizer's step stays "
        "per_device_train_batch_size times gradient_accumulation_steps samples a device.",
    )
    device_memory_gb: float | None = option(
        None, help="Memory of a device, in gigabytes, that device_batch_size auto may fill; by default what is free."
    )
    effective_batch_size: int | None = option(
        None,
        help="Samples of one optimizer step over all devices. Sets gradient_accumulation_steps, so that a recipe is "
        "the same run on any number of devices; per_device_train_batch_size is then the most a device takes at once.",
    )
    strategy: Strategy = option(
        "ddp",
        help="What the devices share out: ddp nothing, each holds the whole model; fsdp the weights, gradients and "
        "optimizer (FSDP2); zero2 gradients and optimizer, zero3 the weights too (by DeepSpeed). One device shares "
        "nothing.",
    )
    learning_rate: float = option(
        2e-4,
        help="Highest learning rate. The default suits LoRA; a recipe without LoRA that does not set it gets 2e-5.",
    )
    vision_learning_rate: float | None = option(
        None, help="Highest learning rate of the vision tower, where it is trained; by default learning_rate."
    )
    projector_learning_rate: float | None = option(
        None, help="Highest learning rate of the projector, where it is trained; by default learning_rate."
    )
    lr_scheduler_type: str = option("cosine", help="How the learning rate falls: cosine, linear, constant and others.")
    warmup_steps: float = option(
        0.03, help="Steps in which the learning rate rises from 0; a number below 1 is a share of all steps."
    )
    weight_decay: float = option(0.0, help="Weight decay of AdamW.")
    max_grad_norm: float = option(1.0, help="Gradients are scaled down to this norm; 0 turns that off.")
    bf16: bool | None = option(
        None, help="Compute in bfloat16 (mixed precision); by default on where a GPU has it, off elsewhere."
    )
    fp16: bool = option(False, help="Compute in float16 (mixed precision). Gemma-3 cannot: it overflows.")
    activation_checkpointing: bool | None = option(
        None, help="Compute activations again in the backward pass instead of keeping them: less memory, slower."
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = option(
        None, help="Options of activation checkpointing; by default use_reentrant: false."
    )
    gradient_checkpointing: bool | None = option(None, help="The older name of activation_checkpointing; both work.")
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = option(
        None, help="The older name of activation_checkpointing_kwargs; both work."
    )
    loss_chunk_tokens: int = option(
        0, help="Supervised tokens whose logits are formed at once; 0 chooses by the size of the vocabulary."
    )
    average_tokens_across_devices: bool = option(
        True, help="Must stay on: every supervised token of a step weighs alike, on whichever device it lies."
    )
    eval_strategy: str = option("no", help="When the evaluation loss is taken: no, steps or epoch.")
    eval_steps: float | None = option(None, help="Steps between evaluations, with eval_strategy steps.")
    eval_answers: int = option(
        0,
        help="Also answer this many evaluation samples at each evaluation, the same each time, and score them with "
        "metrics; 0 takes the loss alone.",
    )
    max_eval_seconds: float | None = option(
        None, help="Begin no further answers of an evaluation after this time; the log says how many were scored."
    )
    metric_for_best_model: str | None = option(
        None, help="What the best checkpoint is chosen by: loss, or a metric of the answers such as cider."
    )
    early_stopping_patience: int | None = option(
        None, help="Stop after this many evaluations in a row that were not better than the best one."
    )
    save_strategy: str = option("steps", help="When checkpoints are written: no, steps, epoch or best.")
    save_steps: float = option(500, help="Steps between checkpoints; a number below 1 is a share of all steps.")
    save_total_limit: int | None = option(2, help="Checkpoints to keep; older ones are deleted.")
    load_best_model_at_end: bool = option(
        False, help="Finish with the best checkpoint, by metric_for_best_model, instead of the last one."
    )
    resume: Literal["auto", "on", "off"] = option(
        "auto",
        help="Go on with the unfinished run in output_dir from its last whole checkpoint. auto does so where recipe "
        "and data are the same, and begins where output_dir is empty; on makes it an error where there is nothing to "
        "go on from.",
    )
    resume_from_checkpoint: str | None = option(
        None, help="Go on from this checkpoint-N folder; true means the last one in output_dir."
    )
    force_resume: bool = option(
        False, help="Go on although the recipe, the data or the model has changed since the run began."
    )
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop",
        help="What a loss or gradient that is NaN or infinite does: stop the run, or leave out that step and count it.",
    )
    on_oom: Literal["shrink", "stop"] = option(
        "shrink",
        help="What running out of memory does: halve the device's batch, double the batches of a step and do the step "
        "again, or stop the run.",
    )
    stall_seconds: float = option(
        600.0, help="Log what every thread is doing when no step has ended for this long; 0 turns that off."
    )
    logging_steps: float = option(10, help="Steps between log lines; a number below 1 is a share of all steps.")
    logging_first_step: bool = option(True, help="Log the first step too, so that a wrong start is seen at once.")
    # HfArgumentParser reads the second member as the flag's type.
    report_to: None | str | list[str] = option(  # noqa: RUF036
        "none", help="Experiment trackers, such as tensorboard or wandb; none writes log.jsonl alone."
    )
    seed: int = option(42, help="Seed of the adapters' first weights, dropout and the order of the samples.")
    dataloader_num_workers: int = option(
        -1, help="Processes that decode images for one training process; -1 chooses by the number of cores."
    )
    remove_unused_columns: bool = option(
        False, help="Must stay off: the collator makes tensors of columns that the model does not know."
    )

    limits: ClassVar[Limits] = {
        "num_train_epochs": POSITIVE,
        "per_device_train_batch_size": AT_LEAST_ONE,
        "per_device_eval_batch_size": AT_LEAST_ONE,
        "gradient_accumulation_steps": AT_LEAST_ONE,
        "device_memory_gb": POSITIVE,
        "effective_batch_size": AT_LEAST_ONE,
        "learning_rate": POSITIVE,
        "vision_learning_rate": POSITIVE,
        "projector_learning_rate": POSITIVE,
        "warmup_steps": AT_LEAST_ZERO,
        "weight_decay": AT_LEAST_ZERO,
        "max_grad_norm": AT_LEAST_ZERO,
        "loss_chunk_tokens": AT_LEAST_ZERO,
        "eval_strategy": Limit(choices=("no", "steps", "epoch")),
        "eval_steps": POSITIVE,
        "eval_answers": AT_LEAST_ZERO,
        "max_eval_seconds": POSITIVE,
        "early_stopping_patience": AT_LEAST_ONE,
        "save_strategy": Limit(choices=("no", "steps", "epoch", "best")),
        "save_steps": POSITIVE,
        "save_total_limit": AT_LEAST_ONE,
        "logging_steps": POSITIVE,
        "stall_seconds": AT_LEAST_ZERO,
        "dataloader_num_workers": Limit(low=-1),
    }
