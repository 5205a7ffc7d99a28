"""What a saved model or adapter came from: library versions, and a fingerprint of the base weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from typing import Any

import torch
from torch import nn

PACKAGES = tuple("vlmtune torch transformers peft accelerate datasets bitsandbytes Pillow tokenizers".split())
ROWS = 64


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's result; absent packages are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def quantization_record(model: Any) -> dict[str, Any] | None:
    """Return how bitsandbytes keeps a base model's weights, in the terms of the options, or ``None``."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    if config.load_in_8bit:
        return {"use_8bit": True}
    return {
        "use_4bit": True,
        "bnb_4bit_quant_type": config.bnb_4bit_quant_type,
        "bnb_4bit_compute_dtype": str(config.bnb_4bit_compute_dtype).removeprefix("torch."),
        "bnb_4bit_use_double_quant": config.bnb_4bit_use_double_quant,
    }


def base_model(model: nn.Module) -> Any:
    """Return the transformers model itself, out of PEFT's around it where there is one."""
    get_base = getattr(model, "get_base_model", None)
    return model if get_base is None else get_base()


def base_fingerprint(model: nn.Module) -> str:
    """Return a short hash that tells the base weights of two models apart.

    It is taken from rows of the token embedding, which no quantisation touches, in bfloat16, so that a model
    loaded in another number format keeps it.

    Args:
        model: a loaded model, adapted by PEFT or not.
    """
    embedding = base_model(model).get_input_embeddings()
    # Where it is trained beside an adapter, PEFT keeps the base's own within.
    weight = getattr(embedding, "original_module", embedding).weight
    if hasattr(weight, "ds_id"):
        import deepspeed

        # ZeRO-3 has left a part of it here; all ranks ask for the whole together.
        with deepspeed.zero.GatheredParameters([weight]):
            return _fingerprint(weight.detach())
    return _fingerprint(weight.detach())


def _fingerprint(weight: torch.Tensor) -> str:
    rows = torch.linspace(0, weight.shape[0] - 1, min(ROWS, weight.shape[0])).long().to(weight.device)
    values = weight[rows].to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(repr(tuple(weight.shape)).encode() + values).hexdigest()[:16]
