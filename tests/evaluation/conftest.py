"""A tiny model whose answers differ, what answers with it, and samples of every kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from evaluation.answers import LONG, NEW_TOKENS, own_words

from vlmtune.config import GenerationArguments
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.evaluation.generation import AnswerGenerator


@pytest.fixture(scope="module")
def model(tiny_gemma3_dir: Path, processor):
    """The tiny model in float64 with noise on its weights and a head of its own, so that its answers differ."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(tiny_gemma3_dir, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        # Tied to the embedding, the head would repeat the last token.
        head = torch.randn(model.lm_head.weight.shape, generator=generator, dtype=torch.float64)
        # Words only: no byte, which has no text of its own, and no control token.
        head[: processor.tokenizer.convert_tokens_to_ids("<0xFF>") + 1] = 0
        head[len(processor.tokenizer) :] = 0
        model.lm_head.weight = torch.nn.Parameter(head)
    return model.eval()


@pytest.fixture
def make(image_folder: Path):
    """Make a sample of images (numbers), a question and an answer; earlier turns come before them."""

    def make(images=(), question="What?", answer="red", *, system=None, earlier=(), name=None) -> Sample:
        turns = [*earlier, (question, answer)]
        messages = [Message.make("system", system)] if system else []
        for number, (asked, said) in enumerate(turns):
            messages.append(Message.make("user", asked, images=0 if number else len(images)))
            messages.append(Message.make("assistant", said))
        refs = tuple(ImageRef(path=str(image_folder / f"{image}.jpg")) for image in images)
        return Sample(name or f"{images} {question}", refs, tuple(messages), references=(answer,))

    return make


@pytest.fixture
def answering(model, processor):
    def make(share: bool = True, **options) -> AnswerGenerator:
        arguments = GenerationArguments(**{"max_new_tokens": NEW_TOKENS, "eval_batch_size": 3} | options)
        return AnswerGenerator(model, processor, arguments, share=share)

    return make


@pytest.fixture
def mixed(make) -> list[Sample]:
    return [
        make([0], "What color is the shape?"),
        make([0], "Is there a dog?"),
        make([], "What color is red?"),
        make([1], "What color is the shape?"),
        make([0], f"Describe this image. {LONG}?"),
        make([2, 3], "Is there a dog or a cat?"),
        make([3, 2], "Is there a dog or a cat?"),
        make([], f"{LONG} {LONG}"),
        make([1], "no?", earlier=[("Is there a dog?", "yes, a dog")]),
        make([4, 4, 5], "What shape is present?"),
        make([1], "Is there a dog?"),
        make([0], "one?", system="Be brief."),
    ]


@pytest.fixture(scope="module")
def oracle(model, processor):
    known: dict[object, str] = {}

    def answer(sample: Sample) -> str:
        key = (sample.images, sample.prompt)
        if key not in known:
            known[key] = own_words(model, processor, sample)
        return known[key]

    return answer
