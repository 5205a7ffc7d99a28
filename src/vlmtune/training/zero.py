"""DeepSpeed's ZeRO without DeepSpeed's checkpoints, which are pickles and of one number of ranks.

ZeRO keeps the optimizer's state in flat pieces: here it is taken apart into the parameters', as every other strategy
has it, and put together again. Weights computed with in 16 bits have float32 ones behind them in the optimizer
(``master``), which are what is saved.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from vlmtune.errors import ConfigError
from vlmtune.training.optimizer_files import settings_of, with_kinds

MASTER = "master"


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 has left a part of a parameter here."""
    return hasattr(tensor, "ds_id")


def under_zero(tensor: Tensor) -> bool:
    """Whether ZeRO has a parameter, which it may share out."""
    return is_partitioned(tensor) or hasattr(tensor, "_hp_mapping")


def gathered(parameters: Sequence[Tensor], *, write: bool = False) -> AbstractContextManager[Any]:
    """Return the context in which parameters are whole on every rank; with ``write``, as the first rank leaves them."""
    parts = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not parts:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parts, modifier_rank=0 if write else None)  # type: ignore[no-any-return]


def whole_weight(parameter: Tensor) -> Tensor:
    """Return a parameter whole, in the precision it is trained in; all ranks must ask for it together."""
    from deepspeed.utils import safe_get_full_fp32_param

    # What the optimizer does not train has nothing behind it.
    trained: Tensor | None = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
    if trained is not None:
        return trained.detach().cpu()
    with gathered([parameter]):
        return parameter.detach().to("cpu", copy=True)


@contextmanager
def whole_models(args: Any) -> Iterator[None]:
    """Load models whole: with ZeRO-3, transformers shares out whatever it loads.

    Args:
        args: the run's ``TrainingArguments``.
    """
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(args.hf_deepspeed_config)


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a full model's weights, one tensor after another; on all ranks together.

    Raises:
        KeyError: one is missing.
    """
    for name, parameter in model.state_dict(keep_vars=True).items():
        with gathered([parameter], write=True):
            parameter.data.copy_(weights[name])


class ZeroOptimizer:
    """The state of a ZeRO optimizer, by parameter.

    Args:
        zero: DeepSpeed's optimizer.
        groups: ``param_groups`` of the optimizer that DeepSpeed was given.
        now: DeepSpeed's, which has none without parameters.

    Raises:
        ConfigError: DeepSpeed was set up to keep its state otherwise.
    """

    def __init__(self, zero: Any, groups: Sequence[Mapping[str, Any]], now: Sequence[dict[str, Any]]) -> None:
        by_stage = {
            "DeepSpeedZeroOptimizer": ("bit16_groups", "single_partition_of_fp32_groups"),
            "DeepSpeedZeroOptimizer_Stage3": ("fp16_groups", "fp32_partitioned_groups_flat"),
        }
        kind = type(zero).__name__
        if kind not in by_stage or getattr(zero, "swap_optimizer", False):
            what = "on a disk (NVMe)" if kind in by_stage else f"in a {kind}"
            raise ConfigError(
                f"This DeepSpeed configuration keeps the optimizer {what}, which no checkpoint can be written of. "
                "Use strategy zero2, zero3 or fsdp, or ZeRO of stage 1 to 3 without NVMe."
            )
        self.zero, self.now = zero, now
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.groups = groups
        packed, flat = (getattr(zero, name) for name in by_stage[kind])
        self.flat: dict[int, Tensor] = {
            id(parameter): piece for pack, piece in zip(packed, flat, strict=True) for parameter in pack
        }
        # Of the optimizer that takes the steps, on the flat pieces.
        self.state: dict[Tensor, dict[str, Any]] = zero.optimizer.state

    def values(self) -> Iterator[tuple[int, str, Any]]:
        """Gather each parameter's values in turn; all ranks must go through them together.

        Raises:
            ConfigError: a value belongs to a flat piece as a whole.
        """
        for place, parameter in enumerate(self.parameters):
            piece = self.flat[id(parameter)]
            for name, value in sorted(self.state.get(piece, {}).items()):
                if not isinstance(value, Tensor) or value.dim() == 0:
                    yield place, name, value
                elif value.shape == piece.shape:
                    yield place, name, self._whole(parameter, value)
                else:
                    raise ConfigError(
                        f"The optimizer {type(self.zero.optimizer).__name__} keeps {name} otherwise than a number for "
                        "each weight, which ZeRO cannot share out. Use optim adamw_torch_fused, or strategy fsdp."
                    )
            if parameter.dtype != torch.float32 and parameter.requires_grad:
                yield place, MASTER, whole_weight(parameter)

    def record(self) -> dict[str, Any]:
        """What JSON can hold of it."""
        scaler = vars(self.zero.loss_scaler) if self.zero.dynamic_loss_scale else {}
        scale = {name: value for name, value in scaler.items() if isinstance(value, int | float)}
        saved, now, places = [], iter(self.now), itertools.count()
        for group in self.groups:
            settings = settings_of(next(now) if group["params"] else group)
            saved.append({**settings, "params": list(itertools.islice(places, len(group["params"])))})
        return {"param_groups": saved, "loss_scaler": scale}

    @torch.no_grad()
    def take_up_weights(self, saved: Mapping[str, Any]) -> None:
        """Have the optimizer go on from the model's weights as they are now.

        Args:
            saved: as :meth:`restore`; where it has no float32 weights, those are the model's own.
        """
        self.zero.refresh_fp32_params()
        for place, parameter in enumerate(self.parameters):
            if (value := saved["state"].get(place, {}).get(MASTER)) is not None:
                self._put(parameter, self.flat[id(parameter)], value)

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take up a ``state_dict`` of one process.

        Args:
            saved: from :func:`~vlmtune.training.optimizer_files.read_optimizer`.
        """
        # As torch's own optimizers place it.
        defaults = self.zero.optimizer.defaults
        counts_aside = not (defaults.get("fused") or defaults.get("capturable"))
        for place, parameter in enumerate(self.parameters):
            piece = self.flat[id(parameter)]
            state = self.state.setdefault(piece, {})
            for name, value in saved["state"].get(place, {}).items():
                if name == MASTER:
                    continue
                if isinstance(value, Tensor) and value.dim() > 0:
                    self._put(parameter, state.setdefault(name, torch.zeros_like(piece)), value)
                else:
                    device = "cpu" if counts_aside else piece.device
                    state[name] = value.to(device, copy=True) if isinstance(value, Tensor) else value
        filled = (group for group in saved["param_groups"] if group["params"])
        for group, own in zip(self.now, filled, strict=True):
            group.update({name: value for name, value in with_kinds(own, group).items() if name != "params"})
        if self.zero.dynamic_loss_scale:
            vars(self.zero.loss_scaler).update(saved.get("loss_scaler", {}))

    def _whole(self, parameter: Tensor, piece: Tensor) -> Tensor:
        """Gather a value of a parameter from the flat pieces of all ranks."""
        whole = torch.zeros(self._size(parameter), dtype=piece.dtype, device=parameter.device)
        start, first, count = self._part(parameter)
        whole.narrow(0, first, count).copy_(piece.narrow(0, start, count))
        torch.distributed.all_reduce(whole)
        return whole.view(getattr(parameter, "ds_shape", parameter.shape))

    def _put(self, parameter: Tensor, piece: Tensor, value: Tensor) -> None:
        """Copy this rank's part of a whole value to its place in a flat piece."""
        start, first, count = self._part(parameter)
        piece.narrow(0, start, count).copy_(value.flatten().narrow(0, first, count))

    def _part(self, parameter: Any) -> tuple[int, int, int]:
        """Where this rank's part begins in its flat piece, where in the whole, and its numbers."""
        if is_partitioned(parameter):
            _, start, count = self.zero.grad_position[self.zero.get_param_id(parameter)]
            size = self._size(parameter)
            # The last ranks' parts are filled up.
            first = min(size, count * torch.distributed.get_rank())
            return start, first, min(count, size - first)
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, 0, 0
        piece, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
        return piece.start, whole.start, piece.numel

    def _size(self, parameter: Any) -> int:
        return int(getattr(parameter, "ds_numel", parameter.numel()))
