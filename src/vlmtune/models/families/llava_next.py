"""LLaVA-NeXT (1.6): LLaVA with tiles of an image beside the whole of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmtune.models.boxes import whole
from vlmtune.models.families.llava import LLAVA
from vlmtune.models.family import Size


def layout(processor: Any, sizes: Sequence[Size]) -> Mapping[str, Any]:
    """Soft tokens are counted from an image's own size and the size of a tile."""
    crop = processor.image_processor.crop_size
    tile = np.broadcast_to(np.float32(0), (3, crop["height"], crop["width"]))
    return {"image_sizes": [list(size) for size in sizes], "pixel_values": [[tile]] * len(sizes)}


def limit_pixels(processor: Any, pixels: int) -> None:
    """Refuse.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "the grids of its tiles stand in the model's configuration too, which an adapter does not carry; leave it out, "
        "and make the image files smaller"
    )


LLAVA_NEXT = dataclasses.replace(
    LLAVA,
    name="llava_next",
    aliases=("llava-next", "llava-1.6"),
    model_types=("llava_next",),
    model_class="LlavaNextForConditionalGeneration",
    processor_class="LlavaNextProcessor",
    image_inputs=("pixel_values", "image_sizes"),
    projector_parameters=("model.image_newline",),
    sized=True,
    # Beside the tiles it sees the whole image.
    view=whole,
    layout=layout,
    limit_pixels=limit_pixels,
    licence="of its language model: Apache-2.0 (Mistral), Llama 2 Community License (Vicuna), Llama 3",
    source="transformers/models/llava_next/modeling_llava_next.py, processing_llava_next.py",
)
