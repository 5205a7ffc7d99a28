"""InternVL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from families.common import TOWER, byte_bpe, text_config
from transformers import Qwen2Tokenizer

from vlmtune.models.processors import VideoSettings, video_parts_as_settings

# OpenGVLab/InternVL3-1B-hf: pictures stand before their text, each on a line.
INTERNVL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<IMG_CONTEXT>\n"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def internvl(corpus: Sequence[str]) -> tuple[Any, Any]:
    vocabulary, merges = byte_bpe(corpus, ["<|endoftext|>"])
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={**named, "turn_token": "<|im_start|>"},
    )
    images = transformers.GotOcr2ImageProcessor(size={"height": 16, "width": 16}, min_patches=1, max_patches=6)
    videos = VideoSettings({"video_processor_type": "InternVLVideoProcessor"})
    with video_parts_as_settings():
        processor = transformers.InternVLProcessor(
            images, tokenizer, videos, image_seq_length=4, chat_template=INTERNVL_TEMPLATE
        )
    config = transformers.InternVLConfig(
        vision_config={**TOWER, "image_size": 16, "patch_size": 4},
        text_config={"model_type": "qwen2", **text_config(tokenizer)},
        image_token_id=processor.image_token_id,
        image_seq_length=4,
    )
    return transformers.InternVLForConditionalGeneration(config), processor
