"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from families.common import TOWER, spaced_bpe, special, text_config
from families.qwen import qwen_tokenizer
from transformers import LlamaTokenizer

from vlmtune.models.processors import VideoSettings, video_parts_as_settings

# llava-hf/llava-1.5-7b-hf: answers stay open.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


# llava-hf/llava-onevision-qwen2-72b-si-hf.
ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def llava(corpus: Sequence[str]) -> tuple[Any, Any]:
    vocabulary, merges = spaced_bpe(corpus, ["<unk>", "<s>", "</s>", "<pad>"])
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, pad_token="<pad>", add_bos_token=True)
    tokenizer.add_tokens(special("<image>"), special_tokens=True)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **TOWER, "image_size": 32, "patch_size": 8},
        text_config={"model_type": "llama", **text_config(tokenizer)},
        image_token_index=processor.image_token_id,
        image_seq_length=16,
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def llava_next_mistral(corpus: Sequence[str]) -> tuple[Any, Any]:
    """With a language model all of whose layers have a window."""
    return llava_next(corpus, {"model_type": "mistral", "sliding_window": 16, "head_dim": 16})


def llava_next(corpus: Sequence[str], text: Mapping[str, Any] | None = None) -> tuple[Any, Any]:
    model, processor = llava(corpus)
    pinpoints = [[32, 64], [64, 32], [64, 64]]
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints
    )
    processor = transformers.LlavaNextProcessor(
        images,
        processor.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    config = transformers.LlavaNextConfig(
        vision_config=model.config.vision_config,
        text_config={"model_type": "llama", **text_config(processor.tokenizer), **(text or {})},
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=pinpoints,
        image_seq_length=16,
    )
    return transformers.LlavaNextForConditionalGeneration(config), processor


def llava_onevision(corpus: Sequence[str]) -> tuple[Any, Any]:
    tokenizer = qwen_tokenizer(corpus)
    tokenizer.add_tokens(special("<image>", "<video>"), special_tokens=True)
    pinpoints = [[32, 64], [64, 32], [64, 64], [32, 128]]
    images = transformers.LlavaOnevisionImageProcessor(size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints)
    videos = VideoSettings({"video_processor_type": "LlavaOnevisionVideoProcessor"})
    with video_parts_as_settings():
        processor = transformers.LlavaOnevisionProcessor(
            images,
            tokenizer,
            videos,
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            chat_template=ONEVISION_TEMPLATE,
            vision_aspect_ratio="anyres_max_9",
        )
    config = transformers.LlavaOnevisionConfig(
        vision_config={
            **TOWER,
            "model_type": "siglip_vision_model",
            "image_size": 32,
            "patch_size": 8,
            "vision_use_head": False,
        },
        text_config={"model_type": "qwen2", **text_config(tokenizer)},
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_grid_pinpoints=pinpoints,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor
