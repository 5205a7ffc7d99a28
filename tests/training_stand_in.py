"""What stands in for training where only changed weights matter."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def shift_trainable(model: Model, size: float = 0.1) -> Model:
    """Shift every trainable weight by seeded normal noise of a standard deviation, and return the model."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return model
