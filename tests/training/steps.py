"""Callbacks, collators and samplers of the tests that act within one step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from vlmtune.batching.collator import SharedImageCollator
from vlmtune.batching.sampler import ImageGroupSampler


class Before(TrainerCallback):
    """Does something before one step, and keeps the weights as they then are."""

    def __init__(self, step: int, action) -> None:
        self.step, self.action = step, action
        self.weights: dict[str, torch.Tensor] = {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            self.action(model)
            self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    def assert_unchanged(self, model) -> None:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, self.weights[name], rtol=0, atol=0, equal_nan=True)


def some_parameter(model) -> nn.Parameter:
    return next(p for p in model.parameters() if p.requires_grad)


def plant_in_weights(model) -> None:
    with torch.no_grad():
        some_parameter(model).view(-1)[0] = torch.nan


def plant_in_gradient(model) -> None:
    some_parameter(model).register_hook(lambda gradient: gradient * torch.nan)


class Recorded(SharedImageCollator):
    """Keeps the ids of every batch it made."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ids: list[list[str]] = []

    def __call__(self, rows):
        batch = super().__call__(rows)
        self.ids.append(batch["sample_ids"])
        return batch


def sampler(batch_size: int = 2, **options: Any) -> ImageGroupSampler:
    return ImageGroupSampler([""] * 10, [20] * 10, batch_size, **options)


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def losses(trainer: Any) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


class At(TrainerCallback):
    """Does something at one event of one step."""

    def __init__(self, event: str, step: int, action: Any) -> None:
        def act(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                action()

        setattr(self, event, act)
