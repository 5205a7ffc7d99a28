"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from families.common import TEXT, byte_bpe, special, text_config
from transformers import Qwen2Tokenizer

from vlmtune.models.processors import VideoSettings, video_parts_as_settings

# Qwen/Qwen2.5-VL-3B-Instruct, without videos and numbered pictures.
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# Qwen/Qwen3.5-9B: the last answer keeps its thoughts, and earlier ones lose them.
QWEN3_5_TEMPLATE = (
    "{% set ns = namespace(last=-1) %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% else %}{{ '<think>\n' }}{% endif %}{% endif %}"
)


def qwen_tokenizer(corpus: Sequence[str]) -> Any:
    vocabulary, merges = byte_bpe(corpus, ["<|endoftext|>"])
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    names = ("im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
    tokenizer.add_tokens(special(*(f"<|{name}|>" for name in names)), special_tokens=True)
    return tokenizer


def _qwen(corpus: Sequence[str], kind: str, vision: dict[str, Any], **text: Any) -> tuple[Any, Any]:
    processor = _qwen_processor(corpus, kind)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10_000.0}
    return _qwen_model(processor, kind, vision, rope_parameters=rope, **text), processor


def _qwen_processor(corpus: Sequence[str], kind: str, template: str = QWEN_TEMPLATE) -> Any:
    tokenizer = qwen_tokenizer(corpus)
    images = transformers.Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, size={"shortest_edge": 8 * 8 * 2, "longest_edge": 8 * 8 * 20}
    )
    videos = VideoSettings({"video_processor_type": "Qwen2VLVideoProcessor", "merge_size": 2})
    with video_parts_as_settings():
        return getattr(transformers, f"{kind}Processor")(images, tokenizer, videos, chat_template=template)


def _qwen_model(processor: Any, kind: str, vision: dict[str, Any], **text: Any) -> Any:
    tokenizer = processor.tokenizer
    config = getattr(transformers, f"{kind}Config")(
        vision_config={"patch_size": 4, "spatial_merge_size": 2, "num_heads": 2, "depth": 2, **vision},
        text_config=text_config(tokenizer, **text),
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def qwen2_vl(corpus: Sequence[str]) -> tuple[Any, Any]:
    return _qwen(corpus, "Qwen2VL", {"embed_dim": 32, "hidden_size": TEXT["hidden_size"], "mlp_ratio": 2})


def qwen2_5_vl(corpus: Sequence[str]) -> tuple[Any, Any]:
    tower = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": TEXT["hidden_size"]}
    return _qwen(corpus, "Qwen2_5_VL", {**tower, "window_size": 16, "fullatt_block_indexes": [1]})


def qwen3_vl(corpus: Sequence[str]) -> tuple[Any, Any]:
    tower = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": TEXT["hidden_size"]}
    return _qwen(
        corpus, "Qwen3VL", {**tower, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, head_dim=16
    )


def qwen3_5(corpus: Sequence[str]) -> tuple[Any, Any]:
    processor = _qwen_processor(corpus, "Qwen3VL", QWEN3_5_TEMPLATE)
    tower = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": TEXT["hidden_size"]}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    linear = {"linear_key_head_dim": 16, "linear_value_head_dim": 4}
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 32, "head_dim": 16}
    layers = ["linear_attention", "full_attention"]
    text = {**linear, **heads, "layer_types": layers, "rope_parameters": rope}
    return _qwen_model(processor, "Qwen3_5", {**tower, "num_position_embeddings": 16}, **text), processor
