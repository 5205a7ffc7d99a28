"""Idefics3, SmolVLM and Granite for Docling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from families.common import TEXT, TOWER, byte_bpe, special, text_config
from transformers import GPT2Tokenizer

from vlmtune.models.processors import VideoSettings, video_parts_as_settings

# HuggingFaceTB/SmolVLM-256M-Instruct.
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


# ibm-granite/granite-docling-258M, whose language model is of the same family.
GRANITE_TEMPLATE = (
    "{% for message in messages %}<|start_of_role|>{{ message['role'] }}<|end_of_role|>"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<image>{% else %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)


def _smol_tokenizer(corpus: Sequence[str]) -> Any:
    first = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocabulary, merges = byte_bpe(corpus, first)
    names = {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"}
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=merges, **names)
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    more = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *tiles)
    tokenizer.add_tokens(special(*more), special_tokens=True)
    return tokenizer


def idefics3(corpus: Sequence[str], kind: str = "Idefics3") -> tuple[Any, Any]:
    tokenizer = _smol_tokenizer(corpus)
    images = getattr(transformers, f"{kind}ImageProcessor")(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 16}, do_image_splitting=True
    )
    parts = [images, tokenizer]
    if kind == "SmolVLM":
        parts.append(VideoSettings({"video_processor_type": "SmolVLMVideoProcessor", "num_frames": 64, "fps": 1}))
    with video_parts_as_settings():
        processor = getattr(transformers, f"{kind}Processor")(*parts, image_seq_len=4, chat_template=SMOLVLM_TEMPLATE)
    config = getattr(transformers, f"{kind}Config")(
        vision_config={**TOWER, "image_size": 16, "patch_size": 4},
        text_config={"model_type": "llama", **text_config(tokenizer)},
        image_token_id=processor.image_token_id,
        scale_factor=2,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config), processor


def smolvlm(corpus: Sequence[str]) -> tuple[Any, Any]:
    return idefics3(corpus, "SmolVLM")


def granite_docling(corpus: Sequence[str]) -> tuple[Any, Any]:
    vocabulary, merges = byte_bpe(corpus, ["<|pad|>", "<|end_of_text|>"])
    names = {"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|pad|>"}
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=merges, **names)
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    more = ("<fake_token_around_image>", "<image>", "<global-img>", "<|start_of_role|>", "<|end_of_role|>", *tiles)
    tokenizer.add_tokens(special(*more), special_tokens=True)
    images = transformers.GraniteDoclingImageProcessor(size={"height": 16, "width": 16}, max_patches=6)
    processor = transformers.GraniteDoclingProcessor(images, tokenizer, image_seq_len=4, chat_template=GRANITE_TEMPLATE)
    # Scaled up, a token's own embedding would hide all else of so small a model.
    unscaled = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0}
    text = text_config(tokenizer, logits_scaling=4.0, attention_multiplier=0.25, **unscaled)
    config = transformers.GraniteDoclingConfig(
        vision_config={
            **TOWER,
            "image_size": 16,
            "patch_size": 2,
            "out_hidden_size": TEXT["hidden_size"],
            "scale_factor": 4,
            "deepstack_visual_indexes": [0],
        },
        text_config=text,
        image_token_id=processor.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        density_router_hidden_size=8,
        tie_word_embeddings=False,
    )
    return transformers.GraniteDoclingForConditionalGeneration(config), processor
