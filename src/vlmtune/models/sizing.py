"""How many parameters a model has in each part, how many are trained, and the memory they take."""

from __future__ import annotations

import re
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from vlmtune.errors import UnsupportedModelError
from vlmtune.models.families import get_family
from vlmtune.models.family import Family

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """Return part -> ``total``, ``trainable``, ``adapter`` parameters and ``bytes``.

    Parts are the family's; ``all`` is their sum. A tied head counts once, in the part that owns it. Quantised
    weights count by the number of values they stand for.
    """
    try:
        family = get_family(model)
    except UnsupportedModelError:
        family = None
    counts: dict[str, dict[str, int]] = {}
    everything = {"total": 0, "trainable": 0, "adapter": 0, "bytes": 0}
    for name, parameter in model.named_parameters():
        part = part_of(family, name) if family else "other"
        numbers = _numel(parameter)
        for entry in (counts.setdefault(part, dict.fromkeys(everything, 0)), everything):
            entry["total"] += numbers
            entry["trainable"] += numbers if parameter.requires_grad else 0
            entry["adapter"] += numbers if ".lora_" in name else 0
            entry["bytes"] += parameter.numel() * parameter.element_size()
    return counts | {"all": everything}


def part_of(family: Family, name: str) -> str:
    """Return the part that a parameter lies in, ``other`` for none.

    Args:
        family: of the model.
        name: the parameter's, in a model that PEFT, DDP, FSDP or ``torch.compile`` may have put inside theirs.
    """
    path = _WRAPPERS.sub("", name).removeprefix("base_model.model.")
    if path in family.projector_parameters:
        return "projector"
    # The longest place first: a part may lie inside another.
    places = sorted(family.parts.items(), key=lambda item: -len(item[1]))
    return next((part for part, place in places if path.startswith(place + ".")), "other")


def describe_training(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return part -> how it is trained: ``how`` is ``LoRA``, ``in full`` or ``frozen``.

    Adapted parts also have the number of adapted ``layers``, their ``rank`` and ``alpha``.
    """
    family = get_family(model)
    parts: dict[str, dict[str, Any]] = {part: {"how": "frozen"} for part in ("language", "projector", "vision")}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" not in name and (part := part_of(family, name)) in parts:
            parts[part] = {"how": "in full"}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            entry = parts[part_of(family, name)]
            entry |= {"how": "LoRA", "layers": entry.get("layers", 0) + 1}
            entry |= {"rank": module.r["default"], "alpha": module.lora_alpha["default"]}
    return parts


def format_parameter_table(counts: dict[str, dict[str, int]]) -> str:
    """Return :func:`count_parameters` as an aligned table for people."""
    rows = [("part", "parameters", "trainable", "share", "memory")]
    for part, entry in counts.items():
        share = entry["trainable"] / entry["total"] if entry["total"] else 0
        memory = f"{entry['bytes'] / 2**20:,.1f} MiB"
        rows.append((part, f"{entry['total']:,}", f"{entry['trainable']:,}", f"{share:.2%}", memory))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def estimate_model_size(model: nn.Module) -> dict[str, Any]:
    """Return the model's parameter counts and the memory its weights take.

    Returns:
        ``total_parameters``, ``trainable_parameters``, ``trainable_share``, ``size_mb`` (10**6 bytes, weights
        as they are stored) and ``parts`` as :func:`count_parameters` gives them.
    """
    counts = count_parameters(model)
    everything = counts["all"]
    return {
        "total_parameters": everything["total"],
        "trainable_parameters": everything["trainable"],
        "trainable_share": everything["trainable"] / max(everything["total"], 1),
        "size_mb": everything["bytes"] / 1e6,
        "parts": counts,
    }


def _numel(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    if state is not None and getattr(state, "shape", None) is not None:
        return int(state.shape.numel())
    return parameter.numel()
