"""Tiny random checkpoints of every family, with their real processor and tokenizer classes, made without a download.

``build(name, folder)`` writes one. Chat templates render as the published ones do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from families.gemma import gemma4, gemma4_large, paligemma
from families.internvl import internvl
from families.llava import llava, llava_next, llava_next_mistral, llava_onevision
from families.mistral3 import mistral3
from families.qwen import qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_vl
from families.smolvlm import granite_docling, idefics3, smolvlm
from families.unrecorded import aya_vision, mllama
from transformers import GenerationConfig

BUILDERS: dict[str, Callable[[Sequence[str]], tuple[Any, Any]]] = {
    "llava": llava,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "paligemma": paligemma,
    "llava_next": llava_next,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "qwen3_5": qwen3_5,
    "llava_onevision": llava_onevision,
    "mistral3": mistral3,
    "gemma4": gemma4,
    "gemma4_large": gemma4_large,
    "llava_next_mistral": llava_next_mistral,
    "granite_docling": granite_docling,
    "aya_vision": aya_vision,
    "mllama": mllama,
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
