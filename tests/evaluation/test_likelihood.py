"""Likelihoods of given texts are those that training takes its loss from."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from vlmtune.batching.collator import BaseVLMDataCollator
from vlmtune.config import GenerationArguments
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.evaluation.generation import AnswerGenerator
from vlmtune.evaluation.likelihood import TextScorer
from vlmtune.models.families import FAMILIES
from vlmtune.models.loading import load_model_for_inference
from vlmtune.training.loss import install_supervised_loss, targets_from_labels

TEXTS = ["red", "a red circle above the blue square", "no", "red", "a dog"]


def samples_of(folder: Path, *, text_only: bool) -> list[Sample]:
    def sample(name: str, question: str, images: tuple[int, ...]) -> Sample:
        refs = tuple(ImageRef(path=str(folder / f"{number}.jpg")) for number in images)
        return Sample(name, refs, (Message.make("user", question, images=len(refs)),))

    return [
        sample("a", "What color is it?", (0,)),
        sample("b", "Describe this image.", (0,)),
        sample("c", "Is there a dog?", (1,)),
        sample("d", "What color is red?", () if text_only else (2,)),
        sample("e", "Describe this image.", (1,)),
    ]


@pytest.fixture(scope="module", params=list(FAMILIES))
def scored(request, family_dir, image_folder: Path):
    """A family's model in float64, its scorer, and samples it can take."""
    model, processor = load_model_for_inference(str(family_dir(request.param)), torch_dtype="float32")
    model.double()
    generator = AnswerGenerator(model, processor, GenerationArguments(eval_batch_size=2))
    return model, processor, TextScorer(generator), samples_of(image_folder, text_only=request.param != "paligemma")


def trained_loss(model, processor, sample: Sample, text: str) -> tuple[float, int]:
    """The loss and supervised tokens of one sample as training computes them."""
    answered = Sample(sample.id, sample.images, (*sample.messages, Message.make("assistant", text)))
    collator = BaseVLMDataCollator(processor, model)
    batch = collator([answered.to_row()])
    sources, ids = targets_from_labels(batch.pop("labels"))
    model.train()
    install_supervised_loss(model)
    with torch.no_grad():
        loss = model(**batch, target_sources=sources, target_ids=ids)["loss"]
    model.eval()
    return float(loss), len(ids)


def test_losses_are_those_of_training(scored) -> None:
    model, processor, scorer, samples = scored
    found = scorer(samples, TEXTS)
    assert not model.training
    for sample, text, loss in zip(samples, TEXTS, found, strict=True):
        expected, tokens = trained_loss(model, processor, sample, text)
        assert loss.tokens == tokens
        assert loss.loss == pytest.approx(expected, rel=1e-6), sample.id


def test_an_option_is_scored_without_the_end(scored) -> None:
    _, _, scorer, samples = scored
    (found,) = scorer.choose(samples[:1], [["red", "no", "a dog"]])
    assert list(found.values()) == sorted(found.values(), reverse=True)
    ended = scorer([samples[0]] * 3, list(found))
    alone = scorer([samples[0]] * 3, list(found), ended=False)
    for option, whole, part in zip(found, ended, alone, strict=True):
        assert found[option] == pytest.approx(-part.loss, rel=1e-9)
        assert whole.tokens == part.tokens + 1
        assert whole.loss > part.loss
        assert math.isfinite(whole.loss)
