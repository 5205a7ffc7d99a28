"""Idefics3 and SmolVLM (256M, 500M, 2.2B): SigLIP tower over tiles, pixel-shuffle connector, Llama or SmolLM2."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from vlmtune.models.family import ATTENTION_AND_MLP, Family, Size, require_pixels


def layout(processor: Any, sizes: Sequence[Size]) -> Mapping[str, Any]:
    """An image is cut into rows and columns of tiles, by its size; a small one is not cut."""
    grids = [processor.image_processor.get_number_of_image_patches(*size)[1:] for size in sizes]
    return {"rows": [[rows for rows, _ in grids]], "cols": [[columns for _, columns in grids]]}


def limit_pixels(processor: Any, pixels: int) -> None:
    """The longest edge is as many tiles as a square of so many pixels has; the whole image comes beside them.

    Raises:
        ValueError: fewer pixels than one tile.
    """
    images = processor.image_processor
    tile = images.max_image_size["longest_edge"]
    require_pixels(pixels, tile**2)
    images.size = {"longest_edge": min(images.size["longest_edge"], math.isqrt(pixels) // tile * tile)}


IDEFICS3 = Family(
    name="idefics3",
    aliases=("idefics-3",),
    model_types=("idefics3",),
    model_class="Idefics3ForConditionalGeneration",
    processor_class="Idefics3Processor",
    parts={
        "language": "model.text_model",
        "projector": "model.connector",
        "vision": "model.vision_model",
        "head": "lm_head",
    },
    lora_targets={
        "language": ATTENTION_AND_MLP,
        "projector": ("proj",),
        "vision": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    },
    attention="causal",
    turn_end="<end_of_utterance>",
    terminators=("<end_of_utterance>", "<|im_end|>"),
    bos=True,
    image_token_attribute="image_token_id",
    needs_token_type_ids=False,
    image_inputs=("pixel_values", "pixel_attention_mask"),
    # (samples, tiles, ...): all tiles as of one sample, so that no sample is padded with empty tiles.
    image_axis=1,
    sized=True,
    layout=layout,
    limit_pixels=limit_pixels,
    sharing=True,
    feature_cache=True,
    features_listed=True,
    min_transformers="5.23",
    paper="https://arxiv.org/abs/2408.12637",
    licence="Apache-2.0",
    source="transformers/models/idefics3/modeling_idefics3.py, image_processing_pil_idefics3.py",
)

SMOLVLM = dataclasses.replace(
    IDEFICS3,
    name="smolvlm",
    aliases=("smolvlm2",),
    model_types=("smolvlm",),
    model_class="SmolVLMForConditionalGeneration",
    processor_class="SmolVLMProcessor",
    paper="https://arxiv.org/abs/2504.05299",
    source="transformers/models/smolvlm/modeling_smolvlm.py, image_processing_pil_smolvlm.py",
)
