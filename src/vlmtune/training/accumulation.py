"""Effective batch size from device batch, ranks and accumulation steps, and back."""

from __future__ import annotations

from dataclasses import dataclass

from vlmtune.config.devices import split_batch
from vlmtune.errors import ConfigError


@dataclass(frozen=True)
class GradientAccumulationManager:
    """Relates the effective batch (samples an optimizer step) to what a device holds at once.

    ``effective = per_device_batch_size * world_size * accumulation_steps``

    Attributes:
        per_device_batch_size: samples in one forward pass on one device.
        accumulation_steps: forward passes an optimizer step.
        world_size: number of devices that train.
    """

    per_device_batch_size: int
    accumulation_steps: int = 1
    world_size: int = 1

    def __post_init__(self) -> None:
        for name in ("per_device_batch_size", "accumulation_steps", "world_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")

    @property
    def effective_batch_size(self) -> int:
        """Samples an optimizer step."""
        return self.per_device_batch_size * self.world_size * self.accumulation_steps

    @classmethod
    def from_effective(
        cls, effective_batch_size: int, *, max_per_device_batch_size: int, world_size: int = 1
    ) -> GradientAccumulationManager:
        """Find the largest device batch that gives ``effective_batch_size`` exactly.

        Raises:
            ConfigError: the effective batch is no multiple of the number of devices.
        """
        if effective_batch_size < 1 or max_per_device_batch_size < 1:
            raise ConfigError("The effective and the largest device batch size must be at least 1.")
        if world_size < 1:
            raise ConfigError(f"world_size is {world_size}; it must be at least 1.")
        try:
            size, steps = split_batch(effective_batch_size, max_per_device_batch_size, world_size)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return cls(size, steps, world_size)

    def halve(self) -> GradientAccumulationManager:
        """Keep the effective batch with a smaller device batch, for when memory runs out.

        Raises:
            ConfigError: the device batch is already 1.
        """
        if self.per_device_batch_size == 1:
            raise ConfigError(
                "The device batch is already 1. Use gradient checkpointing, fewer pixels or a quantised model."
            )
        per_rank = self.per_device_batch_size * self.accumulation_steps
        largest = self.per_device_batch_size // 2
        return self.from_effective(
            per_rank * self.world_size, max_per_device_batch_size=largest, world_size=self.world_size
        )

    def steps_per_epoch(self, n_samples: int) -> int:
        """Optimizer steps in one pass over ``n_samples``; the last one may be smaller."""
        return -(-n_samples // self.effective_batch_size)
