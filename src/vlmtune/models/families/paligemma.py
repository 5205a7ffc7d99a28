"""PaliGemma 1 and 2 (3B, 10B, 28B): SigLIP tower, linear projector, Gemma; a prompt that sees itself whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmtune.models.boxes import BoxCodec, read_locations, write_locations
from vlmtune.models.family import ATTENTION_AND_MLP, Family


def render(processor: Any, messages: Sequence[Mapping[str, Any]], generate: bool) -> str:
    r"""``<image>...<bos>question\n`` and then ``answer<eos>``, as the processor joins text and suffix.

    Raises:
        ValueError: the conversation is not one question with an image and one answer, which is all it was made for.
    """
    roles = [message["role"] for message in messages]
    if roles not in (["user"], ["user", "assistant"]):
        raise ValueError(
            f"it takes one question and one answer, not the turns {', '.join(roles)}. Make each question a sample of "
            "its own, and put instructions into it"
        )
    parts = messages[0]["content"]
    images = sum(part["type"] == "image" for part in parts)
    if not images:
        raise ValueError("it takes no question without an image. Leave out samples of text alone")
    tokenizer = processor.tokenizer
    question = "".join(part["text"] for part in parts if part["type"] == "text")
    text = f"{processor.image_token * images}{tokenizer.bos_token}{question}\n"
    if len(messages) > 1:
        text += "".join(part["text"] for part in messages[1]["content"]) + tokenizer.eos_token
    return text


PALIGEMMA = Family(
    name="paligemma",
    aliases=("paligemma2", "paligemma-2"),
    model_types=("paligemma",),
    model_class="PaliGemmaForConditionalGeneration",
    processor_class="PaliGemmaProcessor",
    parts={
        "language": "model.language_model",
        "projector": "model.multi_modal_projector",
        "vision": "model.vision_tower",
        "head": "lm_head",
    },
    lora_targets={
        "language": ATTENTION_AND_MLP,
        "projector": ("linear",),
        "vision": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    },
    attention="prefix",
    turn_end="<eos>",
    terminators=("<eos>",),
    bos=True,
    image_token_attribute="image_token_id",
    needs_token_type_ids=True,
    render=render,
    boxes=BoxCodec(
        write_locations,
        read_locations,
        "arXiv:2407.07726, appendix; ai.google.dev/gemma/docs/paligemma/prompt-system-instructions",
        scale=1024,
        largest=1023,
        y_first=True,
        asks={"detection": "detect {labels}", "everything": "detect objects", "grounding": "detect {phrase}"},
        joiner=" ; ",
    ),
    sharing_reason="its image tokens attend to the question, so they are others for every question",
    cache_reason="features are kept for rows that share images, which this family cannot have",
    # Gemma 2, of PaliGemma 2, has eager attention only; Gemma, of PaliGemma 1, has the others too.
    attn_implementation=None,
    min_transformers="5.23",
    paper="https://arxiv.org/abs/2407.07726, https://arxiv.org/abs/2412.03555",
    licence="Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
    source="transformers/models/paligemma/modeling_paligemma.py, processing_paligemma.py",
)
