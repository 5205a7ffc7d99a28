"""Arguments of a memory estimate that a recipe does not hold."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from vlmtune.config.data import Switch
from vlmtune.config.options import AT_LEAST_ONE, AT_LEAST_ZERO, POSITIVE, Checked, Limit, Limits, option

SIZE = re.compile("[1-9][0-9]*x[1-9][0-9]*")


@dataclass
class EstimateArguments(Checked):
    """What the samples look like, and what the run is on."""

    _argument_group_name = "estimate"

    text_tokens: int = option(64, help="Tokens of the longest sample, beside its image tokens.")
    supervised_tokens: int = option(32, help="How many of them are learned: the answer's.")
    images_per_sample: int = option(1, help="Images of a sample; of samples that share one, count each.")
    image_size: str | None = option(
        None,
        help="Width and height of the largest image, as 1024x768, where a model's tokens depend on it; by default the "
        "size of which its processor makes the most tokens.",
    )
    devices: int = option(1, help="Devices of the run, 1 to 64.")
    strategy: Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] = option(
        "ddp", help="How several devices divide the work: DDP keeps everything on each; FSDP and ZeRO-3 divide all."
    )
    optim: str = option("adamw_torch", help="The optimizer, as in training; those of 8 bits keep smaller numbers.")
    gpu_gb: float | None = option(
        None,
        help="List every change with which it would fit a GPU of this memory, the one that costs least speed first.",
    )
    cache_image_features: Switch = option(
        "auto", help="As in training: features of a frozen tower and projector come from the cache."
    )

    limits: ClassVar[Limits] = {
        "text_tokens": AT_LEAST_ONE,
        "supervised_tokens": AT_LEAST_ONE,
        "images_per_sample": AT_LEAST_ZERO,
        "devices": Limit(low=1, high=64),
        "gpu_gb": POSITIVE,
    }

    def problems(self) -> list[str]:
        """Return what is wrong with the values, one sentence each."""
        found = super().problems()
        if self.supervised_tokens > self.text_tokens:
            found.append("supervised_tokens is more than text_tokens, which they are part of.")
        if self.image_size is not None and not SIZE.fullmatch(self.image_size):
            found.append(f"image_size must be a width and a height such as 1024x768, and is {self.image_size!r}.")
        return found

    @property
    def height_and_width(self) -> tuple[int, int] | None:
        """``image_size`` as height and width."""
        if self.image_size is None:
            return None
        width, height = (int(side) for side in self.image_size.split("x"))
        return height, width
