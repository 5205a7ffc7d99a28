"""Learning rates by part: the optimizer's groups, split so that tower and projector can have rates of their own."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from vlmtune.config import ModelWithLoRAArguments
from vlmtune.errors import ConfigError
from vlmtune.models.family import Family
from vlmtune.models.sizing import describe_training, part_of

OWN_RATES = {"vision": "vision_learning_rate", "projector": "projector_learning_rate"}


def learning_rate(args: Any, part: str) -> float:
    """Return the highest learning rate of a part's parameters."""
    own = getattr(args, OWN_RATES[part], None) if part in OWN_RATES else None
    return float(args.learning_rate if own is None else own)


def require_trained(model_args: ModelWithLoRAArguments, args: Any) -> None:
    """Refuse a learning rate for a part that is frozen.

    Raises:
        ConfigError: with the option and the ways out.
    """
    for part, option in OWN_RATES.items():
        if getattr(args, option, None) is not None and part not in model_args.trained_parts:
            where = "lora_scopes or train_parts" if model_args.use_lora else "train_parts"
            raise ConfigError(f"{option} is set, but the {part} is frozen; add {part} to {where}, or leave it out.")


def split_by_part(optimizer: Optimizer, model: nn.Module, family: Family, args: Any) -> None:
    """Split the groups of a new optimizer by part, those of parts with a learning rate of their own.

    Weight decay and everything else of a group stays. Without such rates nothing is changed, so that checkpoints of
    runs without them go on.

    Args:
        optimizer: has taken no step; its groups are replaced.
        model: whose parameters it holds.
        family: of the model.
        args: training options.
    """
    own = [part for part, option in OWN_RATES.items() if getattr(args, option, None) is not None]
    if not own:
        return
    parts = {id(parameter): part_of(family, name) for name, parameter in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        for part in ("", *own):
            members = [p for p in group["params"] if (parts[id(p)] if parts[id(p)] in own else "") == part]
            # The first group stays first, though it be empty: its rate is the one that is logged.
            if members or not part:
                groups.append(group | {"params": members, "lr": learning_rate(args, part)})
    optimizer.param_groups[:] = groups


def record(model: nn.Module, args: Any) -> dict[str, dict[str, Any]]:
    """Return how each part is trained, with its learning rate, for the run's record."""
    return {
        part: entry if entry["how"] == "frozen" else entry | {"learning_rate": learning_rate(args, part)}
        for part, entry in describe_training(model).items()
    }


def as_text(parts: dict[str, dict[str, Any]]) -> str:
    """Return :func:`record` as lines for people."""
    return "\n".join(
        f"{part}: "
        + ", ".join([str(entry["how"]), *(f"{k} {v}".replace("_", " ") for k, v in entry.items() if k != "how")])
        for part, entry in parts.items()
    )
