"""Families without a record: one that is taken all the same, and one that is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from families.common import TOWER, byte_bpe, special, text_config
from families.qwen import QWEN_TEMPLATE
from transformers import GPT2Tokenizer

# CohereLabs/aya-vision-8b, without its system prompt.
AYA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|START_OF_TURN_TOKEN|>"
    "{{ '<|USER_TOKEN|>' if message['role'] == 'user' else '<|CHATBOT_TOKEN|>' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<image>{% else %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)


def aya_vision(corpus: Sequence[str]) -> tuple[Any, Any]:
    """A family without a record."""
    vocabulary, merges = byte_bpe(corpus, ["<PAD>", "<BOS_TOKEN>", "<EOS_TOKEN>"])
    names = {"bos_token": "<BOS_TOKEN>", "eos_token": "<EOS_TOKEN>", "pad_token": "<PAD>"}
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=merges, **names)
    turns = ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")
    of_images = ("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE", "TILE_GLOBAL")
    tokenizer.add_tokens(special(*turns, *of_images), special_tokens=True)
    images = transformers.GotOcr2ImageProcessor(
        size={"height": 16, "width": 16}, min_patches=1, max_patches=4, crop_to_patches=True
    )
    processor = transformers.AyaVisionProcessor(
        images, tokenizer, patch_size=4, downsample_factor=2, img_size=16, chat_template=AYA_TEMPLATE
    )
    config = transformers.AyaVisionConfig(
        vision_config={
            **TOWER,
            "model_type": "siglip_vision_model",
            "image_size": 16,
            "patch_size": 4,
            "vision_use_head": False,
        },
        text_config={"model_type": "cohere2", **text_config(tokenizer), "logit_scale": 0.25},
        image_token_index=processor.image_token_id,
    )
    return transformers.AyaVisionForConditionalGeneration(config), processor


def mllama(corpus: Sequence[str]) -> tuple[Any, Any]:
    """A family that is refused."""
    vocabulary, merges = byte_bpe(corpus, ["<|begin_of_text|>", "<|eot_id|>", "<|pad|>"])
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|pad|>"}
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=merges, **names)
    tokenizer.add_tokens(special("<|image|>"), special_tokens=True)
    images = transformers.MllamaImageProcessor(size={"height": 16, "width": 16}, max_image_tiles=4)
    template = QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<|image|>")
    processor = transformers.MllamaProcessor(images, tokenizer, chat_template=template.replace("im_end", "eot_id"))
    config = transformers.MllamaConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "vision_output_dim": 64,
            "image_size": 16,
            "patch_size": 4,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1], [2, 2]],
        },
        text_config={**text_config(tokenizer), "cross_attention_layers": [1], "rope_scaling": None},
        image_token_index=processor.image_token_id,
    )
    return transformers.MllamaForConditionalGeneration(config), processor
