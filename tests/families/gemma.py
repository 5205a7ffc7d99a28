"""Gemma 4 and PaliGemma; Gemma-3's tiny checkpoint is made by ``tests/conftest.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from families.common import TEXT, TOWER, spaced_bpe, special, text_config
from transformers import GemmaTokenizer

from vlmtune.models.processors import VideoSettings, video_parts_as_settings

# google/gemma-4-E2B-it; google/gemma-4-31B-it opens answers with empty thoughts.
GEMMA4_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<|image|>"
    "{% else %}{{ content['text'] | trim }}{% endif %}{% endfor %}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)
GEMMA4_LARGE_TEMPLATE = GEMMA4_TEMPLATE.removesuffix("{% endif %}") + (
    "{% if not enable_thinking | default(false) %}{{ '<|channel>thought\n<channel|>' }}{% endif %}{% endif %}"
)


def _gemma4_processor(corpus: Sequence[str], template: str) -> Any:
    vocabulary, merges = spaced_bpe(corpus, ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    named = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
    heard = {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, extra_special_tokens={**named, **heard})
    tokenizer.add_tokens(special("<|turn>", "<turn|>", "<|channel>", "<channel|>"), special_tokens=True)
    images = transformers.Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70, pooling_kernel_size=3)
    videos = VideoSettings({"video_processor_type": "Gemma4VideoProcessor"})
    with video_parts_as_settings():
        return transformers.Gemma4Processor(
            transformers.Gemma4AudioFeatureExtractor(), images, tokenizer, videos, chat_template=template
        )


def _gemma4_config(processor: Any, text: dict[str, Any], **more: Any) -> Any:
    tokenizer = processor.tokenizer
    # One layer: every image has the patches of 70 tokens at least.
    tower = {**TOWER, "num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4}
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in (("image", "<|image|>"), ("boi", "<|image>"), ("eoi", "<image|>"), ("audio", "<|audio|>"))
    }
    layers = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    text = {"layer_types": layers, "num_hidden_layers": 4, "head_dim": 16, "global_head_dim": 32, **text}
    return transformers.Gemma4Config(
        vision_config={**tower, "pooling_kernel_size": 3, "position_embedding_size": 700},
        text_config=text_config(tokenizer, sliding_window=16, **text),
        video_token_id=processor.video_token_id,
        **ids,
        **more,
    )


def gemma4(corpus: Sequence[str]) -> tuple[Any, Any]:
    """As E2B: each layer's own embeddings, later layers that take keys and values of earlier ones, an audio tower."""
    processor = _gemma4_processor(corpus, GEMMA4_TEMPLATE)
    text = {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": len(processor.tokenizer),
        "num_kv_shared_layers": 2,
        "final_logit_softcapping": 30.0,
    }
    audio = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 32}
    return transformers.Gemma4ForConditionalGeneration(_gemma4_config(processor, text, audio_config=audio)), processor


def gemma4_large(corpus: Sequence[str]) -> tuple[Any, Any]:
    """As 31B: an image's tokens see each other in layers with a window; keys are values in the others."""
    processor = _gemma4_processor(corpus, GEMMA4_LARGE_TEMPLATE)
    text = {
        "hidden_size_per_layer_input": 0,
        "use_bidirectional_attention": "vision",
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "final_logit_softcapping": 30.0,
    }
    return transformers.Gemma4ForConditionalGeneration(_gemma4_config(processor, text, audio_config=None)), processor


def paligemma(corpus: Sequence[str]) -> tuple[Any, Any]:
    vocabulary, merges = spaced_bpe(corpus, ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges)
    images = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(images, tokenizer)
    text = text_config(tokenizer, head_dim=16, query_pre_attn_scalar=16, sliding_window=16)
    config = transformers.PaliGemmaConfig(
        vision_config={
            **TOWER,
            "model_type": "siglip_vision_model",
            "image_size": 32,
            "patch_size": 8,
            "vision_use_head": False,
        },
        # PaliGemma 2: its logits are capped, and every second layer has a window.
        text_config={"model_type": "gemma2", **text, "final_logit_softcapping": 30.0},
        image_token_index=processor.image_token_id,
        projection_dim=TEXT["hidden_size"],
        hidden_size=TEXT["hidden_size"],
    )
    return transformers.PaliGemmaForConditionalGeneration(config), processor
