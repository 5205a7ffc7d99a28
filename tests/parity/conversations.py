"""Conversations that every family is tested with, as samples and as a user of plain transformers gives them.

What is compared with is made as a user of plain transformers would, from the table and not from our samples.
"""

from __future__ import annotations

import functools

import torch
from PIL import Image

from vlmtune.data.sample import ImageRef, Message, Sample

CONVERSATIONS = {
    "one image": ([0], [("What color is the shape?", "red")]),
    "three images": ([1, 2, 3], [("Describe these images.", "a dog, a cat and a red circle")]),
    "text only": ([], [("What color is red?", "red")]),
    "two turns": ([4], [("What color is the shape?", "red"), ("Is there a dog?", "no dog is in the image")]),
}


def can_take(checkpoint: str, name: str) -> bool:
    """Whether family and template can say the conversation, with nothing changed by later turns."""
    images, turns = CONVERSATIONS[name]
    if checkpoint == "paligemma":
        return bool(images) and len(turns) == 1
    # Their templates drop what stood before an answer once another turn follows.
    return checkpoint not in ("qwen3_5", "gemma4_large") or len(turns) == 1


def make_sample(name: str, image_folder, n_turns: int | None = None) -> Sample:
    images, turns = CONVERSATIONS[name]
    messages = []
    for index, (question, answer) in enumerate(turns[:n_turns]):
        messages.append(Message.make("user", question, images=len(images) if index == 0 else 0))
        messages.append(Message.make("assistant", answer))
    return Sample(name, tuple(ImageRef(path=str(image_folder / f"{i}.jpg")) for i in images), tuple(messages))


def official(family, processor, name: str, image_folder, *, generate: bool = False):
    """The inputs that plain transformers makes of the whole conversation, or of its prompt."""
    images, turns = CONVERSATIONS[name]
    pictures = [Image.open(image_folder / f"{number}.jpg").convert("RGB") for number in images]
    conversation = []
    for index, (question, answer) in enumerate(turns):
        places = [{"type": "image"} for _ in pictures] if index == 0 else []
        conversation.append({"role": "user", "content": [*places, {"type": "text", "text": question}]})
        conversation.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    given = {"images": [pictures]} if pictures else {}
    if family.name == "paligemma":
        ((question, answer),) = turns
        text = processor.image_token * len(pictures) + question
        return processor(text=text, return_tensors="pt", **given, **({} if generate else {"suffix": answer}))
    # As the model cards of those that can think say it for answers without thoughts.
    template = functools.partial(processor.apply_chat_template, tokenize=False, enable_thinking=False)
    text = template(conversation[:-1] if generate else conversation, add_generation_prompt=generate)
    if family.opening and template(conversation[:-1], add_generation_prompt=True).endswith(family.opening):
        # What the model is given stays before the answer that is learned.
        text = text.replace("<|turn>model\n", f"<|turn>model\n{family.opening}") if not generate else text
    if not family.closes_turn:
        # The paper's code ends each answer so (llava/conversation.py); the published template has a space.
        for _, answer in turns[: len(turns) - generate]:
            assert text.count(f"ASSISTANT: {answer} ") == 1
            text = text.replace(f"ASSISTANT: {answer} ", f"ASSISTANT: {answer}</s>")
    bos = processor.tokenizer.bos_token
    twice = bool(bos) and text.startswith(bos)
    return processor(text=text, return_tensors="pt", add_special_tokens=not twice, **given)


def forward(model, batch) -> torch.Tensor:
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "sample_ids")}
    with torch.no_grad():
        return model(**inputs).logits


def shake(model) -> None:
    """Adapters begin at zero, where half of them have no gradient."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
