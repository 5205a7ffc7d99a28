"""Mistral Small 3.1."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import transformers
from families.common import TOWER, spaced_bpe, special, text_config
from transformers import LlamaTokenizer

from vlmtune.models.processors import video_parts_as_settings

# mistralai/Mistral-Small-3.1-24B-Instruct-2503, without its system prompt.
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST]"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}[IMG]{% else %}{{ content['text'] }}"
    "{% endif %}{% endfor %}[/INST]{% else %}{{ message['content'][0]['text'] + eos_token }}{% endif %}{% endfor %}"
)


def mistral3(corpus: Sequence[str]) -> tuple[Any, Any]:
    vocabulary, merges = spaced_bpe(corpus, ["<unk>", "<s>", "</s>", "<pad>"])
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, pad_token="<pad>", add_bos_token=True)
    tokenizer.add_tokens(special("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"), special_tokens=True)
    images = transformers.PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8})
    with video_parts_as_settings():
        processor = importlib.import_module("transformers.models.pixtral").PixtralProcessor(
            images, tokenizer, patch_size=8, spatial_merge_size=2, chat_template=MISTRAL_TEMPLATE
        )
    config = transformers.Mistral3Config(
        vision_config={**TOWER, "model_type": "pixtral", "image_size": 64, "patch_size": 8, "head_dim": 16},
        text_config={"model_type": "mistral", **text_config(tokenizer, head_dim=16, sliding_window=None)},
        image_token_index=processor.image_token_id,
        spatial_merge_size=2,
    )
    return transformers.Mistral3ForConditionalGeneration(config), processor
