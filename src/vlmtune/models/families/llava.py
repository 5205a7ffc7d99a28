"""LLaVA-1.5 (7B, 13B): CLIP tower, two-layer projector, Vicuna."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmtune.models.boxes import NOTHING, BoxCodec, View, Written, read_lists, whole
from vlmtune.models.family import ATTENTION_AND_MLP, Family, Size


def layout(processor: Any, sizes: Sequence[Size]) -> Mapping[str, Any]:
    """Every image is cropped to one size, and its soft tokens are counted from the cropped pixels' shape."""
    crop = processor.image_processor.crop_size
    pixels = np.broadcast_to(np.float32(0), (3, crop["height"], crop["width"]))
    return {"pixel_values": [pixels] * len(sizes)}


def view(processor: Any, size: Size) -> View:
    """The square in the middle where the processor crops, or the square that it fills the image up to."""
    images, (height, width) = processor.image_processor, size
    if getattr(images, "do_pad", False):
        side = max(size)
    elif images.do_center_crop:
        side = min(size)
    else:
        return whole(processor, size)
    return View((width - side) / 2, (height - side) / 2, side, side, (side, side))


def write_boxes(boxes: Sequence[Written], task: str) -> str:
    """``[x1, y1, x2, y2]`` for a phrase; for objects a line each, the label before it."""
    rows = [str(list(numbers)) if task == "grounding" else f"{label} {list(numbers)}" for numbers, label in boxes]
    return "\n".join(rows) or NOTHING


def unused(config: Any) -> Sequence[str]:
    """The tower's layers behind the one whose output is taken, the second to last, and the norm after them."""
    layers = config.vision_config.num_hidden_layers
    taken = config.vision_feature_layer
    chosen = [taken] if isinstance(taken, int) else taken
    last = max(layer if layer >= 0 else layers + 1 + layer for layer in chosen)
    behind = [f"model.vision_tower.encoder.layers.{layer}" for layer in range(last, layers)]
    return [*behind, "model.vision_tower.post_layernorm"]


LLAVA = Family(
    name="llava",
    aliases=("llava-1.5", "llava1.5"),
    model_types=("llava",),
    model_class="LlavaForConditionalGeneration",
    processor_class="LlavaProcessor",
    parts={
        "language": "model.language_model",
        "projector": "model.multi_modal_projector",
        "vision": "model.vision_tower",
        "head": "lm_head",
    },
    lora_targets={
        "language": ATTENTION_AND_MLP,
        "projector": ("linear_1", "linear_2"),
        "vision": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    },
    attention="causal",
    # The published chat template leaves answers open; LLaVA was trained with Vicuna's "ASSISTANT: answer</s>"
    # (github.com/haotian-liu/LLaVA, llava/conversation.py, conv_vicuna_v1). The others are of other language models.
    turn_end="</s>",
    terminators=("</s>", "<|im_end|>", "<|eot_id|>"),
    closes_turn=False,
    bos=True,
    image_token_attribute="image_token_id",
    needs_token_type_ids=False,
    layout=layout,
    unused=unused,
    sharing=True,
    feature_cache=True,
    # Two digits in LLaVA's own data; three keep a box of a large image within a pixel.
    boxes=BoxCodec(
        write_boxes,
        read_lists,
        "github.com/haotian-liu/LLaVA, llava_v1_5_mix665k (RefCOCO, Visual Genome), issue 606",
        scale=1,
        digits=3,
        asks={
            "grounding": "Please provide the bounding box coordinate of the region this sentence describes: {phrase}."
        },
    ),
    view=view,
    features_listed=True,
    min_transformers="5.23",
    paper="https://arxiv.org/abs/2310.03744",
    licence="Llama 2 Community License (https://ai.meta.com/llama/license/)",
    source="transformers/models/llava/modeling_llava.py, processing_llava.py",
)
