"""Gemma 4 (E2B, E4B, 26B-A4B, 31B): a tower of any resolution, linear projector, sliding and full attention layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vlmtune.models.boxes import json_codec
from vlmtune.models.family import ATTENTION_AND_MLP, Family, Size, require_pixels

# Tokens of an image among which a processor's `max_soft_tokens` chooses.
BUDGETS = (70, 140, 280, 560, 1120)


def layout(processor: Any, sizes: Sequence[Size]) -> Mapping[str, Any]:
    """An image is resized to as many patches as the budget holds, and 3 x 3 of them become one token."""
    # Records are read where nothing else needs transformers, such as by `vlmtune families`.
    from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

    images = processor.image_processor
    pooled = images.pooling_kernel_size
    counts = []
    for size in sizes:
        height, width = get_aspect_ratio_preserving_size(
            *size,
            patch_size=images.patch_size,
            max_patches=images.max_soft_tokens * pooled**2,
            pooling_kernel_size=pooled,
        )
        counts.append((height // images.patch_size) * (width // images.patch_size) // pooled**2)
    return {"num_soft_tokens_per_image": counts}


def limit_pixels(processor: Any, pixels: int) -> None:
    """The largest budget of tokens whose pixels are no more.

    Raises:
        ValueError: fewer pixels than the smallest budget's.
    """
    images = processor.image_processor
    pixels_of_token = (images.pooling_kernel_size * images.patch_size) ** 2
    require_pixels(pixels, BUDGETS[0] * pixels_of_token)
    images.max_soft_tokens = max(
        budget for budget in BUDGETS if budget * pixels_of_token <= pixels and budget <= images.max_soft_tokens
    )


def block_layers(config: Any) -> Collection[str]:
    """In the larger models an image's tokens see each other in the layers with a window, and in no other."""
    larger = config.get_text_config().use_bidirectional_attention == "vision"
    return ("sliding_attention",) if larger else ()


def unused(config: Any) -> Sequence[str]:
    """What hears; there is no sound here."""
    return ("model.audio_tower", "model.embed_audio") if config.audio_config is not None else ()


GEMMA4 = Family(
    name="gemma4",
    aliases=("gemma-4",),
    model_types=("gemma4",),
    model_class="Gemma4ForConditionalGeneration",
    processor_class="Gemma4Processor",
    parts={
        "language": "model.language_model",
        "projector": "model.embed_vision",
        "vision": "model.vision_tower",
        "head": "lm_head",
    },
    lora_targets={
        # The last three are of E2B and E4B: each layer's own embedding of a token.
        "language": (
            *ATTENTION_AND_MLP,
            "per_layer_input_gate",
            "per_layer_projection",
            "per_layer_model_projection",
        ),
        "projector": ("embedding_projection",),
        "vision": ("linear", "input_proj"),
    },
    attention="image_block",
    block_layers=block_layers,
    turn_end="<turn|>",
    terminators=("<turn|>", "<eos>"),
    bos=True,
    image_token_attribute="image_token_id",
    needs_token_type_ids=True,
    estimate_reason="its language layers differ, and its tower leaves patches out by their values",
    token_types_name="mm_token_type_ids",
    image_inputs=("pixel_values", "image_position_ids"),
    sized=True,
    layout=layout,
    limit_pixels=limit_pixels,
    unused=unused,
    # The audio tower has eager attention only.
    attn_implementation=None,
    # ai.google.dev/gemma/docs/core/prompt-formatting-gemma4: without thinking, 26B and 31B answer after empty thoughts.
    template_options={"enable_thinking": False},
    opening="<|channel>thought\n<channel|>",
    sharing=True,
    feature_cache=True,
    boxes=json_codec("box_2d", "ai.google.dev/gemma/docs/capabilities/vision, object detection", y_first=True),
    features_listed=True,
    min_transformers="5.23",
    paper="https://ai.google.dev/gemma/docs/core/model_card_4",
    licence="Apache-2.0",
    source="transformers/models/gemma4/modeling_gemma4.py, processing_gemma4.py",
)
