"""Mistral Small 3.1 and 3.2 (24B): Pixtral tower of any resolution, a merger of 2 x 2 patches, Mistral."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmtune.models.family import ATTENTION_AND_MLP, Family, Size, require_pixels


def _merged_patch(processor: Any) -> int:
    return int(processor.patch_size * processor.spatial_merge_size)


def image_options(processor: Any) -> Mapping[str, Any]:
    """Sides are multiples of a merged patch."""
    return {"patch_size": _merged_patch(processor)}


def layout(processor: Any, sizes: Sequence[Size]) -> Mapping[str, Any]:
    """An image's tokens are counted from its resized size: a row of them for each row of patches, and a break.

    Raises:
        ValueError: an image is one patch small; transformers' ``get_image_features`` loses an axis of such a one.
    """
    # Records are read where nothing else needs transformers, such as by `vlmtune families`.
    from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

    longest, patch = processor.image_processor.size["longest_edge"], _merged_patch(processor)
    resized = []
    for size in sizes:
        empty = np.broadcast_to(np.uint8(0), (*size, 3))
        resized.append(get_resize_output_image_size(empty, (longest, longest), patch))
        if resized[-1] == (patch, patch):
            raise ValueError(
                f"an image of {size[1]} x {size[0]} pixels is too small: one side must be longer than {patch} pixels"
            )
    return {"image_sizes": resized}


def limit_pixels(processor: Any, pixels: int) -> None:
    """The longest edge is that of a square of so many pixels, in whole merged patches.

    Raises:
        ValueError: fewer pixels than the smallest square that the model takes.
    """
    images, patch = processor.image_processor, _merged_patch(processor)
    require_pixels(pixels, (2 * patch) ** 2)
    images.size = {"longest_edge": min(images.size["longest_edge"], math.isqrt(pixels) // patch * patch)}


MISTRAL3 = Family(
    name="mistral3",
    aliases=("mistral-small-3.1", "pixtral"),
    model_types=("mistral3",),
    model_class="Mistral3ForConditionalGeneration",
    processor_class="PixtralProcessor",
    parts={
        "language": "model.language_model",
        "projector": "model.multi_modal_projector",
        "vision": "model.vision_tower",
        "head": "lm_head",
    },
    lora_targets={
        "language": ATTENTION_AND_MLP,
        "projector": ("merging_layer", "linear_1", "linear_2"),
        "vision": ATTENTION_AND_MLP,
    },
    layers={"language": "layers", "vision": "transformer.layers"},
    attention="causal",
    turn_end="</s>",
    terminators=("</s>",),
    bos=True,
    image_token_attribute="image_token_id",
    needs_token_type_ids=False,
    image_inputs=("pixel_values", "image_sizes"),
    image_options=image_options,
    sized=True,
    layout=layout,
    limit_pixels=limit_pixels,
    sharing=True,
    feature_cache=True,
    features_listed=True,
    min_transformers="5.23",
    paper="https://arxiv.org/abs/2410.07073, https://mistral.ai/news/mistral-small-3-1",
    licence="Apache-2.0",
    source="transformers/models/mistral3/modeling_mistral3.py, ../pixtral/processing_pixtral.py",
)
