"""What the model is given for rows that hold several samples, and for features from the cache."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmtune.batching.encode import Encoder
from vlmtune.batching.masks import prepared, tree_masks
from vlmtune.data.sample import ImageRef, Sample
from vlmtune.models.family import Family, attention_window


@dataclass
class _EncoderOutputs(BaseModelOutputWithPooling):
    """With all that one family or another reads of what its tower returned."""

    deepstack_features: list[list[torch.Tensor]] | None = None
    router_logits: torch.Tensor | None = None


def shared_row_inputs(family: Family, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Take ``layout``, ``axes`` and ``image_features`` out of a batch and return what the model takes instead.

    Args:
        family: the model's record.
        model: the model, adapted by PEFT or not.
        inputs: a batch, changed in place.

    Returns:
        ``attention_mask``, prepared for each kind of attention layer, ``position_ids`` where they have several axes,
        and ``mm_encoder_outputs``; those of them that the batch calls for.
    """
    made: dict[str, Any] = {}
    config: Any = model.config
    text_config = config.get_text_config()
    features = inputs.pop("image_features", None)
    if features is not None:
        made["mm_encoder_outputs"] = {"image": _encoder_outputs(family, list(features), text_config.hidden_size)}
    layout = inputs.pop("layout", None)
    if layout is None:
        return made
    window, in_some_layers = attention_window(text_config)
    masks = tree_masks(
        layout,
        inputs["position_ids"],
        block_layers=family.block_layers(config) if family.attention == "image_block" else (),
        sliding_window=window,
    )
    masks = prepared(masks, text_config._attn_implementation, next(model.parameters()).dtype)
    axes = inputs.pop("axes", None)
    if axes is not None:
        made["position_ids"] = axes
    made["attention_mask"] = masks if in_some_layers else masks["sliding_attention" if window else "full_attention"]
    return made


def _encoder_outputs(family: Family, features: list[torch.Tensor], hidden: int) -> _EncoderOutputs:
    """What the tower would have returned; ``features`` as :func:`~vlmtune.models.features.image_features` gives them.

    Shapes of the features: (tokens, hidden * (1 + deeper layers)) for each image.
    """
    layers = [
        list(layer) for layer in zip(*(torch.split(feature, hidden, dim=-1) for feature in features), strict=True)
    ]
    own: Any = layers[0]
    if not family.features_listed:
        own = torch.cat(own)[None] if family.sized else torch.stack(own)
    return _EncoderOutputs(pooler_output=own, deepstack_features=layers[1:] or None)


def dummy_image(encoder: Encoder) -> dict[str, torch.Tensor]:
    """Return the tensors of a black square, as the family's image processor makes them."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    inputs = encoder.images(Sample("dummy", (ImageRef(bytes=file.getvalue()),), ()))
    return {name: torch.as_tensor(inputs[name]) for name in encoder.family.image_inputs}
