"""Tiny random checkpoints of every family, with their real processor and tokenizer classes, made without a download.

``build(name, folder)`` writes one. Chat templates render as the published ones do.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, GemmaTokenizer, GenerationConfig, GPT2Tokenizer, LlamaTokenizer, Qwen2Tokenizer

from vlmtune.models.processors import VideoSettings, video_parts_as_settings

WORDS = 400

# llava-hf/llava-1.5-7b-hf: answers stay open.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# HuggingFaceTB/SmolVLM-256M-Instruct.
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Qwen/Qwen2.5-VL-3B-Instruct, without videos and numbered pictures.
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# OpenGVLab/InternVL3-1B-hf: pictures stand before their text, each on a line.
INTERNVL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<IMG_CONTEXT>\n"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# llava-hf/llava-onevision-qwen2-72b-si-hf.
ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
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
# mistralai/Mistral-Small-3.1-24B-Instruct-2503, without its system prompt.
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST]"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}[IMG]{% else %}{{ content['text'] }}"
    "{% endif %}{% endfor %}[/INST]{% else %}{{ message['content'][0]['text'] + eos_token }}{% endif %}{% endfor %}"
)
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
# ibm-granite/granite-docling-258M, whose language model is of the same family.
GRANITE_TEMPLATE = (
    "{% for message in messages %}<|start_of_role|>{{ message['role'] }}<|end_of_role|>"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<image>{% else %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}


def _spaced_bpe(corpus: Sequence[str], special: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a tokenizer that writes spaces as ``▁`` and falls back to bytes: Llama's, Gemma's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Split(Regex(r"[.,?!:;\n]"), "isolated")]
    )
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=len(tokens) + WORDS, special_tokens=tokens, show_progress=False)
    tokenizer.train_from_iterator([*corpus, "\n"], trainer)
    return _vocabulary(tokenizer)


def _byte_bpe(corpus: Sequence[str], special: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a tokenizer over bytes: GPT-2's, Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS + 256,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return _vocabulary(tokenizer)


def _vocabulary(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def _special(*tokens: str) -> list[AddedToken]:
    return [AddedToken(token, normalized=False, special=True) for token in tokens]


def _text_config(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return {
        **TEXT,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **more,
    }


def _llava(corpus: Sequence[str]) -> tuple[Any, Any]:
    vocabulary, merges = _spaced_bpe(corpus, ["<unk>", "<s>", "</s>", "<pad>"])
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, pad_token="<pad>", add_bos_token=True)
    tokenizer.add_tokens(_special("<image>"), special_tokens=True)
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
        text_config={"model_type": "llama", **_text_config(tokenizer)},
        image_token_index=processor.image_token_id,
        image_seq_length=16,
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def _llava_next_mistral(corpus: Sequence[str]) -> tuple[Any, Any]:
    """With a language model all of whose layers have a window."""
    return _llava_next(corpus, {"model_type": "mistral", "sliding_window": 16, "head_dim": 16})


def _llava_next(corpus: Sequence[str], text: Mapping[str, Any] | None = None) -> tuple[Any, Any]:
    model, processor = _llava(corpus)
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
        text_config={"model_type": "llama", **_text_config(processor.tokenizer), **(text or {})},
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=pinpoints,
        image_seq_length=16,
    )
    return transformers.LlavaNextForConditionalGeneration(config), processor


def _smol_tokenizer(corpus: Sequence[str]) -> Any:
    first = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocabulary, merges = _byte_bpe(corpus, first)
    names = {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"}
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=merges, **names)
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    more = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *tiles)
    tokenizer.add_tokens(_special(*more), special_tokens=True)
    return tokenizer


def _idefics3(corpus: Sequence[str], kind: str = "Idefics3") -> tuple[Any, Any]:
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
        text_config={"model_type": "llama", **_text_config(tokenizer)},
        image_token_id=processor.image_token_id,
        scale_factor=2,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config), processor


def _smolvlm(corpus: Sequence[str]) -> tuple[Any, Any]:
    return _idefics3(corpus, "SmolVLM")


def _qwen_tokenizer(corpus: Sequence[str]) -> Any:
    vocabulary, merges = _byte_bpe(corpus, ["<|endoftext|>"])
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    names = ("im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
    tokenizer.add_tokens(_special(*(f"<|{name}|>" for name in names)), special_tokens=True)
    return tokenizer


def _qwen(corpus: Sequence[str], kind: str, vision: dict[str, Any], **text: Any) -> tuple[Any, Any]:
    processor = _qwen_processor(corpus, kind)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10_000.0}
    return _qwen_model(processor, kind, vision, rope_parameters=rope, **text), processor


def _qwen_processor(corpus: Sequence[str], kind: str, template: str = QWEN_TEMPLATE) -> Any:
    tokenizer = _qwen_tokenizer(corpus)
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
        text_config=_text_config(tokenizer, **text),
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def _qwen2_vl(corpus: Sequence[str]) -> tuple[Any, Any]:
    return _qwen(corpus, "Qwen2VL", {"embed_dim": 32, "hidden_size": TEXT["hidden_size"], "mlp_ratio": 2})


def _qwen2_5_vl(corpus: Sequence[str]) -> tuple[Any, Any]:
    tower = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": TEXT["hidden_size"]}
    return _qwen(corpus, "Qwen2_5_VL", {**tower, "window_size": 16, "fullatt_block_indexes": [1]})


def _qwen3_vl(corpus: Sequence[str]) -> tuple[Any, Any]:
    tower = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": TEXT["hidden_size"]}
    return _qwen(
        corpus, "Qwen3VL", {**tower, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, head_dim=16
    )


def _qwen3_5(corpus: Sequence[str]) -> tuple[Any, Any]:
    processor = _qwen_processor(corpus, "Qwen3VL", QWEN3_5_TEMPLATE)
    tower = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": TEXT["hidden_size"]}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    linear = {"linear_key_head_dim": 16, "linear_value_head_dim": 4}
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 32, "head_dim": 16}
    layers = ["linear_attention", "full_attention"]
    text = {**linear, **heads, "layer_types": layers, "rope_parameters": rope}
    return _qwen_model(processor, "Qwen3_5", {**tower, "num_position_embeddings": 16}, **text), processor


def _llava_onevision(corpus: Sequence[str]) -> tuple[Any, Any]:
    tokenizer = _qwen_tokenizer(corpus)
    tokenizer.add_tokens(_special("<image>", "<video>"), special_tokens=True)
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
        text_config={"model_type": "qwen2", **_text_config(tokenizer)},
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_grid_pinpoints=pinpoints,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


def _mistral3(corpus: Sequence[str]) -> tuple[Any, Any]:
    vocabulary, merges = _spaced_bpe(corpus, ["<unk>", "<s>", "</s>", "<pad>"])
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, pad_token="<pad>", add_bos_token=True)
    tokenizer.add_tokens(_special("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"), special_tokens=True)
    images = transformers.PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8})
    with video_parts_as_settings():
        processor = importlib.import_module("transformers.models.pixtral").PixtralProcessor(
            images, tokenizer, patch_size=8, spatial_merge_size=2, chat_template=MISTRAL_TEMPLATE
        )
    config = transformers.Mistral3Config(
        vision_config={**TOWER, "model_type": "pixtral", "image_size": 64, "patch_size": 8, "head_dim": 16},
        text_config={"model_type": "mistral", **_text_config(tokenizer, head_dim=16, sliding_window=None)},
        image_token_index=processor.image_token_id,
        spatial_merge_size=2,
    )
    return transformers.Mistral3ForConditionalGeneration(config), processor


def _gemma4_processor(corpus: Sequence[str], template: str) -> Any:
    vocabulary, merges = _spaced_bpe(corpus, ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    named = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
    heard = {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, extra_special_tokens={**named, **heard})
    tokenizer.add_tokens(_special("<|turn>", "<turn|>", "<|channel>", "<channel|>"), special_tokens=True)
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
        text_config=_text_config(tokenizer, sliding_window=16, **text),
        video_token_id=processor.video_token_id,
        **ids,
        **more,
    )


def _gemma4(corpus: Sequence[str]) -> tuple[Any, Any]:
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


def _gemma4_large(corpus: Sequence[str]) -> tuple[Any, Any]:
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


def _granite_docling(corpus: Sequence[str]) -> tuple[Any, Any]:
    vocabulary, merges = _byte_bpe(corpus, ["<|pad|>", "<|end_of_text|>"])
    names = {"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|pad|>"}
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=merges, **names)
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    more = ("<fake_token_around_image>", "<image>", "<global-img>", "<|start_of_role|>", "<|end_of_role|>", *tiles)
    tokenizer.add_tokens(_special(*more), special_tokens=True)
    images = transformers.GraniteDoclingImageProcessor(size={"height": 16, "width": 16}, max_patches=6)
    processor = transformers.GraniteDoclingProcessor(images, tokenizer, image_seq_len=4, chat_template=GRANITE_TEMPLATE)
    # Scaled up, a token's own embedding would hide all else of so small a model.
    unscaled = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0}
    text = _text_config(tokenizer, logits_scaling=4.0, attention_multiplier=0.25, **unscaled)
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


def _internvl(corpus: Sequence[str]) -> tuple[Any, Any]:
    vocabulary, merges = _byte_bpe(corpus, ["<|endoftext|>"])
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
        text_config={"model_type": "qwen2", **_text_config(tokenizer)},
        image_token_id=processor.image_token_id,
        image_seq_length=4,
    )
    return transformers.InternVLForConditionalGeneration(config), processor


def _paligemma(corpus: Sequence[str]) -> tuple[Any, Any]:
    vocabulary, merges = _spaced_bpe(corpus, ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges)
    images = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(images, tokenizer)
    text = _text_config(tokenizer, head_dim=16, query_pre_attn_scalar=16, sliding_window=16)
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


# CohereLabs/aya-vision-8b, without its system prompt.
AYA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|START_OF_TURN_TOKEN|>"
    "{{ '<|USER_TOKEN|>' if message['role'] == 'user' else '<|CHATBOT_TOKEN|>' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<image>{% else %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)


def _aya_vision(corpus: Sequence[str]) -> tuple[Any, Any]:
    """A family without a record."""
    vocabulary, merges = _byte_bpe(corpus, ["<PAD>", "<BOS_TOKEN>", "<EOS_TOKEN>"])
    names = {"bos_token": "<BOS_TOKEN>", "eos_token": "<EOS_TOKEN>", "pad_token": "<PAD>"}
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=merges, **names)
    turns = ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")
    of_images = ("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE", "TILE_GLOBAL")
    tokenizer.add_tokens(_special(*turns, *of_images), special_tokens=True)
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
        text_config={"model_type": "cohere2", **_text_config(tokenizer), "logit_scale": 0.25},
        image_token_index=processor.image_token_id,
    )
    return transformers.AyaVisionForConditionalGeneration(config), processor


def _mllama(corpus: Sequence[str]) -> tuple[Any, Any]:
    """A family that is refused."""
    vocabulary, merges = _byte_bpe(corpus, ["<|begin_of_text|>", "<|eot_id|>", "<|pad|>"])
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|pad|>"}
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=merges, **names)
    tokenizer.add_tokens(_special("<|image|>"), special_tokens=True)
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
        text_config={**_text_config(tokenizer), "cross_attention_layers": [1], "rope_scaling": None},
        image_token_index=processor.image_token_id,
    )
    return transformers.MllamaForConditionalGeneration(config), processor


BUILDERS: dict[str, Callable[[Sequence[str]], tuple[Any, Any]]] = {
    "llava": _llava,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "paligemma": _paligemma,
    "llava_next": _llava_next,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "qwen3_5": _qwen3_5,
    "llava_onevision": _llava_onevision,
    "mistral3": _mistral3,
    "gemma4": _gemma4,
    "gemma4_large": _gemma4_large,
    "llava_next_mistral": _llava_next_mistral,
    "granite_docling": _granite_docling,
    "aya_vision": _aya_vision,
    "mllama": _mllama,
}
# Further checkpoints of a family, for what differs inside it.
VARIANTS = {"gemma4_large": "gemma4", "llava_next_mistral": "llava_next"}

# The tokens at which the published generation_config.json of each stops.
ENDS = {
    "llava": ("</s>",),
    "llava_next": ("</s>",),
    "llava_next_mistral": ("</s>",),
    "llava_onevision": ("<|im_end|>",),
    "idefics3": ("<end_of_utterance>",),
    "smolvlm": ("<end_of_utterance>",),
    "paligemma": ("<eos>",),
    "mistral3": ("</s>",),
    "granite_docling": ("<|end_of_text|>",),
    "aya_vision": ("<|END_OF_TURN_TOKEN|>",),
    "mllama": ("<|eot_id|>",),
    "gemma4": ("<eos>", "<turn|>"),
    "gemma4_large": ("<eos>", "<turn|>"),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"), ("<|im_end|>", "<|endoftext|>")),
    "internvl": ("<|im_end|>",),
}


def build(name: str, folder: Path, corpus: Sequence[str]) -> None:
    """Write the family's checkpoint: weights drawn so that images matter, processor and tokenizer beside them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = BUILDERS[name](corpus)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.03 * torch.randn_like(parameter)
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.convert_tokens_to_ids(token) for token in ENDS[name]],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
