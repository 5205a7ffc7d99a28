"""Training with the model shared out over the ranks (FSDP2, ZeRO), and checkpoints that go on under any strategy.

A checkpoint holds the adapter or model whole, and the optimizer's state by parameter as one process has it. So a run
can go on with another strategy, on other devices, or on one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
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
from vlmtune.errors import ConfigError
from vlmtune.models.checkpoint import load_adapter, load_full_weights
from vlmtune.models.families import get_family
from vlmtune.models.precision import raise_trained, short_formats
from vlmtune.models.provenance import base_model
from vlmtune.training.optimizer_files import (
    SCHEDULER,
    has_parts,
    read_optimizer,
    settings_of,
    with_kinds,
    write_optimizer,
)
from vlmtune.training.zero import MASTER, ZeroOptimizer, gathered, load_weights, under_zero, whole_models, whole_weight

logger = logging.getLogger("vlmtune.training")


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
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    return whole_weight(value) if under_zero(value) else value


def gathered_weights(model: nn.Module, *, trained_only: bool) -> dict[str, Tensor]:
    """Return the weights whole, one tensor after another; all ranks must ask for them together.

    Args:
        model: shared out by FSDP2 or ZeRO.
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
            found = whole(tensor).detach()
            # Only the first rank writes; the others need not hold the model.
            if first:
                gathered[name] = found
        elif first:
            gathered[name] = gathered[named[id(tensor)]]
    return gathered


def gathered_optimizer(state: Mapping[str, Any]) -> Iterator[tuple[int, str, Any]]:
    """Gather each value of an optimizer's ``state_dict`` in turn; all ranks must go through them together."""
    for place, own in sorted(state["state"].items()):
        for name, value in own.items():
            yield place, name, value.full_tensor() if isinstance(value, DTensor) else value


def shared_out_optimizer(saved: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """Return a ``state_dict`` of one process with each tensor shared out as the parameter it belongs to.

    Args:
        saved: from :func:`~vlmtune.training.optimizer_files.read_optimizer`.
        optimizer: of this run; of one process, its parameters are not shared out.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts = {
        place: {name: _as_parameter(value, parameters[place]) for name, value in own.items() if name != MASTER}
        for place, own in saved["state"].items()
    }
    groups = zip(saved["param_groups"], optimizer.param_groups, strict=True)
    return {"state": parts, "param_groups": [with_kinds(group, now) for group, now in groups]}


def _as_parameter(value: Any, parameter: Tensor) -> Any:
    """Share out what has the parameter's shape, such as moments; step counts stay as they are."""
    if not isinstance(value, Tensor):
        return value
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        # Every rank has read the file, so none has to send.
        mesh = parameter.device_mesh
        value = distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)
    # No part of the checkpoint's file, which may be deleted.
    return value.clone()


class ShardingTrainer(Trainer):
    """``transformers.Trainer`` whose checkpoints under FSDP2 and ZeRO go on as those of one process.

    Attributes:
        trained_groups: the optimizer's ``param_groups``, as they were before DeepSpeed put flat pieces in their place.
        loaded_formats: number formats in which weights trained in mixed precision were loaded, where they had 16 bits.
    """

    trained_groups: list[dict[str, Any]]
    loaded_formats: dict[str, torch.dtype]

    def keep_trained_precise(self) -> None:
        """Keep trained weights in float32 where the run computes in fewer bits; accelerate and DeepSpeed do so too."""
        formats = short_formats(self.model)
        if not formats or self.shares_out:
            return
        if self.accelerator.mixed_precision != "no":
            raise_trained(self.model)
            return
        logger.warning(
            "trained weights are in %s, where steps smaller than a weight's last bit are lost: set bf16: true, which "
            "keeps them in float32 and computes in bfloat16, or torch_dtype: float32",
            str(next(iter(formats.values()))).removeprefix("torch."),
        )

    @property
    def shares_out(self) -> bool:
        """Whether no rank has the whole optimizer."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

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

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if self.is_deepspeed_enabled:
            # The base class would have DeepSpeed load a checkpoint of its own, which is a pickle.
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
            self._zero()
            if resume_from_checkpoint is not None:
                self._load_from_checkpoint(resume_from_checkpoint)
                self._load_optimizer_and_scheduler(resume_from_checkpoint)
            return prepared
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            if plugin.fsdp_version != 2:
                raise ConfigError("This run was started with FSDP version 1. Use strategy: fsdp, which is version 2.")
            plugin.transformer_cls_names_to_wrap = layer_classes(self.model)
            if self.accelerator.mixed_precision == "no":
                require_one_dtype(self.model)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the base class's optimizer.

        Raises:
            ConfigError: DeepSpeed is to make one, of parameters in an order of its own.
        """
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if not hasattr(optimizer, "param_groups"):
            raise ConfigError(
                "The DeepSpeed configuration has an optimizer of its own, with which no checkpoint can be written. "
                "Leave optimizer and scheduler out of it: optim, learning_rate and lr_scheduler_type stand in for them."
            )
        return optimizer

    def load_whole(self, model: nn.Module, folder: Path, *, adapted: bool) -> None:
        """Load a checkpoint's weights into a model that may be shared out; on all ranks together."""
        if self.is_deepspeed_enabled:
            if adapted:
                with gathered([one for one in model.parameters() if one.requires_grad], write=True):
                    load_adapter(model, folder)
            else:
                with whole_models(self.args):
                    load_full_weights(model, folder, into=load_weights)
            self._zero().take_up_weights(read_optimizer(folder))
            return
        with implicit_replication() if self.is_fsdp_enabled else nullcontext():
            (load_adapter if adapted else load_full_weights)(model, folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, or of an adapted one the adapter, whole; on all ranks together.

        Weights trained in full are rounded to the number format in which they were loaded, as they are in use; those of
        a checkpoint, which is an internal call, are written as they are trained.
        """
        adapted = hasattr(self.model, "peft_config")
        state = gathered_weights(self.model, trained_only=adapted) if self.shares_out else None
        self._save(output_dir, state, {} if _internal_call or adapted else self.loaded_formats)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.shares_out:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder = Path(output_dir)
        if self.is_deepspeed_enabled:
            zero = self._zero()
            write_optimizer(folder, zero.values(), zero.record())
        else:
            state = self.optimizer.state_dict()
            groups = [{**settings_of(group), "params": group["params"]} for group in state["param_groups"]]
            write_optimizer(folder, gathered_optimizer(state), {"param_groups": groups})
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if not (self.shares_out or has_parts(folder)):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        saved = read_optimizer(folder)
        if self.is_deepspeed_enabled:
            self._zero().restore(saved)
        else:
            self.optimizer.load_state_dict(shared_out_optimizer(saved, self.optimizer))
        schedule = torch.load(folder / SCHEDULER, weights_only=True)
        # It holds figures by group, and DeepSpeed leaves out groups without parameters.
        now = self.lr_scheduler.state_dict()
        fits = {k: not isinstance(value, list) or len(value) == len(now[k]) for k, value in schedule.items()}
        self.lr_scheduler.load_state_dict({k: value if fits[k] else now[k] for k, value in schedule.items()})

    def _zero(self) -> ZeroOptimizer:
        return ZeroOptimizer(self.deepspeed.optimizer, self.trained_groups, self.optimizer.param_groups)
