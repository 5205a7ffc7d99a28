"""Qwen3.5 (0.8B to 27B): Qwen3-VL's tower without deeper features, and a language model of mostly linear attention."""

from __future__ import annotations

import dataclasses

from vlmtune.models.families.qwen2_vl import QWEN2_VL, QWEN3_VL
from vlmtune.models.family import ATTENTION_AND_MLP

QWEN3_5 = dataclasses.replace(
    QWEN2_VL,
    name="qwen3_5",
    aliases=("qwen3.5", "qwen3.5-vl"),
    model_types=("qwen3_5",),
    model_class="Qwen3_5ForConditionalGeneration",
    processor_class="Qwen3VLProcessor",
    lora_targets={
        "language": (*ATTENTION_AND_MLP, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
        "projector": ("linear_fc1", "linear_fc2"),
        "vision": ("qkv", "proj", "linear_fc1", "linear_fc2"),
    },
    # Answers without thinking aloud: else the template opens an answer with "<think>" and expects thoughts.
    template_options={"enable_thinking": False},
    sharing=False,
    sharing_reason=(
        "its layers of linear attention carry one state along the row, so a second text would go on from the first "
        "and not from the image"
    ),
    feature_cache=False,
    cache_reason="features are kept for rows that share images, which this family cannot have",
    boxes=QWEN3_VL.boxes,
    paper="https://qwen.ai/blog?id=qwen3.5",
    licence="Apache-2.0",
    source="transformers/models/qwen3_5/modeling_qwen3_5.py, ../qwen3_vl/processing_qwen3_vl.py",
)
