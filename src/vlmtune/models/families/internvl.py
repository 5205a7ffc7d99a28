"""InternVL 3 (1B to 78B, the -hf checkpoints): InternViT over tiles, pixel shuffle, two-layer projector, Qwen2.5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmtune.models.boxes import BoxCodec, read_lists, write_ref_box
from vlmtune.models.family import ATTENTION_AND_MLP, Family, Size, fewer_tiles


def layout(processor: Any, sizes: Sequence[Size]) -> Mapping[str, Any]:
    """An image is cut into as many tiles as its shape asks for, with the whole of it beside them."""
    cut = {"crop_to_patches": True}
    return {"num_patches": [processor.image_processor.get_number_of_image_patches(*size, cut) for size in sizes]}


INTERNVL = Family(
    name="internvl",
    aliases=("internvl3",),
    model_types=("internvl",),
    model_class="InternVLForConditionalGeneration",
    processor_class="InternVLProcessor",
    parts={
        "language": "model.language_model",
        "projector": "model.multi_modal_projector",
        "vision": "model.vision_tower",
        "head": "lm_head",
    },
    lora_targets={
        "language": ATTENTION_AND_MLP,
        "projector": ("linear_1", "linear_2"),
        "vision": ("q_proj", "k_proj", "v_proj", "projection_layer", "fc1", "fc2"),
    },
    layers={"language": "layers", "vision": "encoder.layer"},
    attention="causal",
    turn_end="<|im_end|>",
    terminators=("<|im_end|>", "<|endoftext|>"),
    bos=False,
    image_token_attribute="image_token_id",
    needs_token_type_ids=False,
    sized=True,
    layout=layout,
    limit_pixels=fewer_tiles,
    sharing=True,
    feature_cache=True,
    boxes=BoxCodec(
        write_ref_box,
        read_lists,
        "internvl.readthedocs.io, chat data format, grounding and detection data",
        asks={
            "detection": "Please detect and label all objects of these kinds in the following image and mark their "
            "positions: {labels}.",
            "everything": "Please detect and label all objects in the following image and mark their positions.",
            "grounding": "Please provide the bounding box coordinate of the region this sentence describes: "
            "<ref>{phrase}</ref>",
        },
    ),
    min_transformers="5.23",
    paper="https://arxiv.org/abs/2504.10479",
    licence="Apache-2.0, and of its language model: Qwen License",
    source="transformers/models/internvl/modeling_internvl.py, processing_internvl.py",
)
