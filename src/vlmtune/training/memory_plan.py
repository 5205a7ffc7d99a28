"""Memory estimates of a run, from its options."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from vlmtune.config import ModelWithLoRAArguments
from vlmtune.models.families import get_family
from vlmtune.models.memory import MemoryEstimator, adapter_from
from vlmtune.models.quantization import get_torch_dtype
from vlmtune.training.loss import chunked_cross_entropy


def run_estimator(model_args: ModelWithLoRAArguments, training_args: Any, *, here: bool = False) -> MemoryEstimator:
    """Return the estimator of a run's memory.

    Args:
        model_args: the model, its precision and adapters.
        training_args: ``bf16`` and ``fp16`` are read.
        here: the run is on this machine; else on a GPU that computes in bfloat16, which decides what is left open.

    Raises:
        ConfigError: a model of another family than ``model_type``.
        ModelError: no such model, or one of a family whose memory cannot be estimated.
    """
    assumed = torch.bfloat16 if model_args.torch_dtype == "auto" and not here else None
    mixed = training_args.bf16 or (training_args.bf16 is None and not here)
    estimator = MemoryEstimator(
        model_args.model_name_or_path,
        chunked_cross_entropy,
        adapter_from(model_args),
        assumed or get_torch_dtype(model_args.torch_dtype),
        torch.float16 if training_args.fp16 else torch.bfloat16 if mixed else None,
        "cpu" if here and not torch.cuda.is_available() else "cuda",
        {"revision": model_args.model_revision, "trust_remote_code": model_args.trust_remote_code},
        model_args.image_max_pixels,
    )
    get_family(estimator.family, model_args.model_type)
    return estimator


def ways_to_train(
    model_args: ModelWithLoRAArguments, training_args: Any, own: MemoryEstimator
) -> dict[str, tuple[MemoryEstimator, int]]:
    """Return estimators of full fine-tuning, LoRA and QLoRA, with the bits of the frozen weights, by name.

    Args:
        model_args: the run's; the ways that it does not take are made of its other options.
        training_args: as in :func:`run_estimator`.
        own: the run's estimator.
    """
    other_args = dataclasses.replace(
        model_args, use_lora=not model_args.use_lora, train_parts=[], use_4bit=False, use_8bit=False
    )
    other = run_estimator(other_args, training_args)
    lora, full = (own, other) if model_args.use_lora else (other, own)
    in_full = other_args if model_args.use_lora else model_args
    trained, scopes = ", ".join(in_full.train_parts), ", ".join(model_args.lora_scopes)
    return {f"in full: {trained}": (full, 16), f"LoRA: {scopes}": (lora, 16), f"QLoRA: {scopes}": (lora, 4)}
