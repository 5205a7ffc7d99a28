"""What the tests of answers share."""

from __future__ import annotations

import torch
from PIL import Image

from vlmtune.data.sample import Sample

NEW_TOKENS = 10


LONG = "red green blue black gray teal brown yellow circle rectangle triangle square dog cat man woman child"


def own_words(model, processor, sample: Sample, count: int = NEW_TOKENS) -> str:
    """The greedy answer with the processor's own inputs, one row, without any cache."""
    pictures = iter([Image.open(ref.path).convert("RGB") for ref in sample.images])
    conversation = [
        {
            "role": message.role,
            "content": [
                {"type": "image", "image": next(pictures)} if part.type == "image" else part.to_template()
                for part in message.parts
            ],
        }
        for message in sample.prompt
    ]
    inputs = dict(
        processor.apply_chat_template(
            conversation, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
    )
    inputs = {name: inputs[name] for name in ("input_ids", "token_type_ids", "pixel_values") if name in inputs}
    start, ends = inputs["input_ids"].shape[1], {processor.tokenizer.eos_token_id}
    ends.add(processor.tokenizer.convert_tokens_to_ids("<end_of_turn>"))
    for _ in range(count):
        with torch.no_grad():
            token = model(**inputs, use_cache=False).logits[0, -1].argmax()
        if token.item() in ends:
            break
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token.view(1, 1)], dim=1)
        inputs["token_type_ids"] = torch.nn.functional.pad(inputs["token_type_ids"], (0, 1))
    return processor.tokenizer.decode(inputs["input_ids"][0, start:], skip_special_tokens=True).strip()


def texts(answers) -> list[str]:
    return [answer.text for answer in answers]
