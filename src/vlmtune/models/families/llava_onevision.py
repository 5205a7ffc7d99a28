"""LLaVA-OneVision (0.5B, 7B, 72B): SigLIP tower over crops, two-layer projector, Qwen2."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmtune.models.families.llava_next import LLAVA_NEXT
from vlmtune.models.family import Size


def layout(processor: Any, sizes: Sequence[Size]) -> Mapping[str, Any]:
    """One image is cut into crops by its size; several in one sample are not cut."""
    side = processor.image_processor.size
    tile = np.broadcast_to(np.float32(0), (3, side["height"], side["width"]))
    return {
        "image_sizes": [list(size) for size in sizes],
        "pixel_values": [[tile]] * len(sizes),
        "batch_num_images": [len(sizes)],
    }


LLAVA_ONEVISION = dataclasses.replace(
    LLAVA_NEXT,
    name="llava_onevision",
    aliases=("llava-onevision",),
    model_types=("llava_onevision",),
    model_class="LlavaOnevisionForConditionalGeneration",
    processor_class="LlavaOnevisionProcessor",
    turn_end="<|im_end|>",
    terminators=("<|im_end|>", "<|endoftext|>"),
    closes_turn=True,
    bos=False,
    image_inputs=("pixel_values", "image_sizes", "batch_num_images"),
    layout=layout,
    feature_cache=False,
    cache_reason="an image is cut into crops where it is its sample's only one, so its features are not its own alone",
    paper="https://arxiv.org/abs/2408.03326",
    licence="Apache-2.0",
    source="transformers/models/llava_onevision/modeling_llava_onevision.py, processing_llava_onevision.py",
)
