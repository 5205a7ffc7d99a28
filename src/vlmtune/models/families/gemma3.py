"""Gemma-3 (4B, 12B, 27B): SigLIP tower, average-pooling projector, sliding and full attention layers."""

from vlmtune.models.boxes import json_codec
from vlmtune.models.family import ATTENTION_AND_MLP, Family

GEMMA3 = Family(
    name="gemma3",
    aliases=("gemma", "gemma-3"),
    model_types=("gemma3",),
    model_class="Gemma3ForConditionalGeneration",
    processor_class="Gemma3Processor",
    parts={
        "language": "model.language_model",
        "projector": "model.multi_modal_projector",
        "vision": "model.vision_tower",
        "head": "lm_head",
    },
    lora_targets={
        "language": ATTENTION_AND_MLP,
        # One bare matrix and a norm, no linear layer: trained in full.
        "projector": (),
        "vision": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    },
    attention="image_block",
    turn_end="<end_of_turn>",
    terminators=("<end_of_turn>", "<eos>"),
    bos=True,
    image_token_attribute="image_token_id",
    needs_token_type_ids=True,
    refused_dtypes={"float16": "its activations pass 65,504, the largest float16, and become infinite"},
    sharing=True,
    feature_cache=True,
    boxes=json_codec(
        "box_2d",
        "Gemini's (ai.google.dev/gemini-api/docs/image-understanding), whose smaller kin it is; Gemma-3's own "
        "report names none",
        y_first=True,
    ),
    min_transformers="5.23",
    paper="https://arxiv.org/abs/2503.19786",
    licence="Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
    source="transformers/models/gemma3/modeling_gemma3.py",
)
