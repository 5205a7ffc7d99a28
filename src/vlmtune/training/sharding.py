"""Training with the model shared out over the ranks (FSDP2), and checkpoints that do not show it.

A checkpoint is the same files under every strategy and on any number of devices: the adapter or model whole, and the
optimizer's state as one process writes it. So a run can go on with other devices, or with one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from transformers import Trainer

from vlmtune.config import ModelWithLoRAArguments, TrainingArguments
from vlmtune.errors import ConfigError, ResumeError
from vlmtune.models.families import get_family
from vlmtune.models.provenance import base_model

logger = logging.getLogger("vlmtune.training")
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"


def check_strategy(args: TrainingArguments, model_args: ModelWithLoRAArguments) -> None:
    """Refuse what a run's strategy cannot do, before any weight loads; with one device there is nothing to share out.

    Raises:
        ConfigError: with the reason and the way out.
    """
    if args.strategy == "ddp":
        return
    if args.world_size == 1:
        logger.info("strategy %s: this run has one device, which shares nothing out", args.strategy)
        return
    reasons = []
    shares_weights = args.strategy in ("fsdp", "zero3")
    if args.eval_answers and shares_weights:
        reasons.append(
            "eval_answers answers on each rank by itself, which no rank can with a part of the weights; leave it out "
            "and score the result by vlmtune evaluate"
        )
    if model_args.use_8bit and shares_weights:
        reasons.append("8-bit weights of bitsandbytes cannot be shared out; use_4bit can, with strategy fsdp")
    if model_args.use_4bit and args.strategy == "zero3":
        reasons.append("4-bit weights are shared out by strategy fsdp alone; use that")
    if args.strategy in ("zero2", "zero3") and not model_args.use_lora:
        reasons.append("full weights are written with other names than the base's with it; use strategy fsdp")
    if reasons:
        raise ConfigError(f"strategy {args.strategy} cannot be used here: {'; '.join(reasons)}. Or use ddp.")


def layer_classes(model: nn.Module) -> list[str]:
    """Return the names of the classes of a model's layers, in its language model and its tower."""
    base, family = base_model(model), get_family(model)
    lists = [base.get_submodule(f"{family.parts[part]}.{place}") for part, place in family.layers.items()]
    return sorted({type(layer).__name__ for layers in lists for layer in layers})


def require_one_dtype(model: nn.Module) -> None:
    """Check that all trained tensors have one number format, which the units of FSDP need.

    Raises:
        ConfigError: they have several.
    """
    formats: dict[torch.dtype, str] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            formats.setdefault(parameter.dtype, name)
    if len(formats) > 1:
        named = " and ".join(f"{str(dtype).removeprefix('torch.')} ({name})" for dtype, name in formats.items())
        raise ConfigError(
            f"strategy fsdp needs all trained weights in one number format, but they are in {named}. Set bf16: true, "
            "which keeps them in float32 and computes in bfloat16, or torch_dtype: float32."
        )


def whole(value: Any) -> Any:
    """Return a tensor that was shared out as one tensor on the CPU; all ranks must ask for it together."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def gathered_weights(model: nn.Module, *, trained_only: bool) -> dict[str, Tensor]:
    """Return the weights whole, one tensor after another; all ranks must ask for them together.

    Args:
        model: shared out by FSDP2.
        trained_only: those that are trained, which is what an adapter consists of.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    first = torch.distributed.get_rank() == 0
    gathered: dict[str, Tensor] = {}
    # Tied weights are gathered once, and stay one tensor.
    named: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if trained_only and name not in trained:
            continue
        if id(tensor) not in named:
            named[id(tensor)] = name
            found = whole(tensor.detach())
            # Only the first rank writes; the others need not hold the model.
            if first:
                gathered[name] = found
        elif first:
            gathered[name] = gathered[named[id(tensor)]]
    return gathered


def gathered_optimizer(optimizer: Any) -> dict[str, Any]:
    """Return an optimizer's ``state_dict`` as one process has it; all ranks must ask for it together."""
    state = optimizer.state_dict()
    parts = {key: {name: whole(value) for name, value in own.items()} for key, own in state["state"].items()}
    return {"state": parts, "param_groups": state["param_groups"]}


def shared_out_optimizer(state: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """Return a ``state_dict`` of one process with each tensor shared out as the parameter it belongs to."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts = {
        key: {name: _as_parameter(value, parameters[key]) for name, value in own.items()}
        for key, own in state["state"].items()
    }
    return {"state": parts, "param_groups": state["param_groups"]}


def _as_parameter(value: Any, parameter: Tensor) -> Any:
    """Share out what has the parameter's shape, such as moments; step counts stay as they are."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    # Every rank has read the file, so none has to send.
    mesh = parameter.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)


def require_as_many_ranks(folder: Path, ranks: int) -> None:
    """Check that a checkpoint is DeepSpeed's, and of as many ranks, without which it cannot be gone on from.

    Raises:
        ResumeError: it is not.
    """
    wrote = len(list(folder.glob("global_step*/*_optim_states.pt")))
    if wrote != ranks:
        found = f"was written by {wrote} ranks" if wrote else "was not written by DeepSpeed"
        raise ResumeError(
            f"The checkpoint {folder} {found}, and this run has {ranks} ranks under DeepSpeed, which goes on from its "
            f"own checkpoints on as many ranks alone. Use {f'{wrote} devices' if wrote else 'strategy ddp or fsdp'}. "
            "Checkpoints of ddp and fsdp go on with either, on any number of devices."
        )


class ShardingTrainer(Trainer):
    """``transformers.Trainer`` whose checkpoints under FSDP2 are those of one process."""

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator; accelerate itself turns FSDP on beside an accelerator alone, though gloo has it too."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.args.fsdp_plugin_args is None or state.distributed_type != DistributedType.MULTI_CPU:
            return
        plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        if self.accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(self.accelerator.mixed_precision)
        state.fsdp_plugin, self.is_fsdp_enabled = plugin, True
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            if plugin.fsdp_version != 2:
                raise ConfigError("This run was started with FSDP version 1. Use strategy: fsdp, which is version 2.")
            plugin.transformer_cls_names_to_wrap = layer_classes(self.model)
            if self.accelerator.mixed_precision == "no":
                require_one_dtype(self.model)
        return super()._prepare_for_training(*args, **kwargs)

    def loading_whole_tensors(self) -> AbstractContextManager[Any]:
        """Return the context in which whole tensors can be copied into weights that are shared out."""
        return implicit_replication() if self.is_fsdp_enabled else nullcontext()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, or of an adapted one the adapter, whole; on all ranks together."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        adapted = hasattr(self.model, "peft_config")
        self._save(output_dir, state_dict=gathered_weights(self.model, trained_only=adapted))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = gathered_optimizer(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / OPTIMIZER, map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(shared_out_optimizer(state, self.optimizer))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))
