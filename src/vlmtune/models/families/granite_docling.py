"""Granite for Docling (500M, 2B): SigLIP tower over tiles, a connector with deeper features, Granite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmtune.models.family import ATTENTION_AND_MLP, Family, Size, fewer_tiles


def image_options(processor: Any) -> Mapping[str, Any]:
    """The coarse path, as the checkpoints' processors have it; the fine one is chosen page by page at inference."""
    return {"fine_route": False}


def layout(processor: Any, sizes: Sequence[Size]) -> Mapping[str, Any]:
    """A page is cut into rows and columns of tiles, by its size; a small one is not cut."""
    grids = [processor.image_processor.get_tile_grid(*size) for size in sizes]
    return {"rows": [[rows for rows, _ in grids]], "cols": [[columns for _, columns in grids]]}


def unused(config: Any) -> Sequence[str]:
    """The connector's fine path, and what chooses between it and the coarse one."""
    fine = ["model.vision_model.connector.fine"] if config.vision_config.use_fine_route else []
    return [*fine, "model.density_router"] if config.density_router_hidden_size is not None else fine


def logit_scale(config: Any) -> float:
    """Granite divides its logits."""
    return 1 / float(config.text_config.logits_scaling)


GRANITE_DOCLING = Family(
    name="granite_docling",
    aliases=("granite-docling",),
    model_types=("granite_docling",),
    model_class="GraniteDoclingForConditionalGeneration",
    processor_class="GraniteDoclingProcessor",
    parts={
        "language": "model.text_model",
        "projector": "model.vision_model.connector",
        "vision": "model.vision_model",
        "head": "lm_head",
    },
    lora_targets={
        "language": ATTENTION_AND_MLP,
        "projector": ("projection", "mlp_fc2", "linear_1", "linear_2"),
        "vision": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    },
    attention="causal",
    turn_end="<|end_of_text|>",
    terminators=("<|end_of_text|>",),
    bos=False,
    image_token_attribute="image_token_id",
    needs_token_type_ids=False,
    image_inputs=("pixel_values", "pixel_attention_mask"),
    # (samples, tiles, ...): all tiles as of one sample, so that no sample is padded with empty tiles.
    image_axis=1,
    image_options=image_options,
    sized=True,
    layout=layout,
    limit_pixels=fewer_tiles,
    unused=unused,
    logit_scale=logit_scale,
    sharing=True,
    feature_cache=True,
    features_listed=True,
    min_transformers="5.23",
    paper="https://huggingface.co/ibm-granite/granite-for-docling-500m",
    licence="Apache-2.0",
    source="transformers/models/granite_docling/modeling_granite_docling.py, image_processing_pil_granite_docling.py",
)
