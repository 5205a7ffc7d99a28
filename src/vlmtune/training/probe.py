"""What is checked of a model of an unknown family before its first step, beside what it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlmtune.batching.collator import IGNORE_INDEX
from vlmtune.evaluation.probe import probe_batch, refused, require_sound
from vlmtune.models.family import Family
from vlmtune.training.loss import targets_from_labels


def require_trainable(model: Any, processor: Any, family: Family) -> None:
    """Check that the loss is that of the model's own logits, and that gradients are where something is trained.

    Args:
        model: in place on its device, with the loss of :func:`~vlmtune.training.loss.install_supervised_loss`.
        processor: its processor.
        family: its record; families that have one of their own are passed over.

    Raises:
        UnsupportedModelError: a check failed; the message says which.
    """
    if not family.generic:
        return
    require_sound(model, processor, family)
    batch = probe_batch(model, processor, family)
    labels = batch.pop("labels")
    was_training = model.training
    model.eval()
    sources, targets = targets_from_labels(labels)
    loss = model(**batch, target_sources=sources, target_ids=targets)["loss"]
    loss.backward()
    with torch.no_grad():
        logits = model(**batch).logits[:, :-1].float()
    model.train(was_training)
    dense = nn.functional.cross_entropy(logits[labels[:, 1:] != IGNORE_INDEX], targets, reduction="sum")
    exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
    if not torch.isclose(loss.float(), dense, rtol=1e-4 if exact else 0.02):
        raise refused(family, f"the loss is {loss.item():.4f} and that of the model's logits is {dense.item():.4f}")
    for name, parameter in model.named_parameters():
        found = parameter.grad is not None and bool(parameter.grad.any())
        if found and not parameter.requires_grad:
            raise refused(family, f"{name} is frozen and has a gradient")
        # An adapter's second matrix begins at zero, so its first has no gradient yet.
        if parameter.requires_grad and not found and ".lora_A." not in name:
            raise refused(family, f"{name} is trained and has no gradient")
    model.zero_grad(set_to_none=True)
