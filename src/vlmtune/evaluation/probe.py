"""Checks of a model whose family vlmtune does not know, made on the loaded checkpoint before it is used.

They are those of the parity suite (``tests/parity/families``) that can be made on any checkpoint.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmtune.batching.collator import IGNORE_INDEX, BaseVLMDataCollator
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.errors import UnsupportedModelError, VlmtuneError
from vlmtune.models.family import Family
from vlmtune.models.provenance import base_model

logger = logging.getLogger("vlmtune.evaluation")

QUESTION, ANSWER = "What is in the image?", "a red circle and a dog"
# Largest difference of logits, as a share of the largest logit, between two ways of computing the same.
TOLERANCE, ROUNDED_TOLERANCE = 1e-3, 0.05

_sound: weakref.WeakSet[Any] = weakref.WeakSet()


def require_sound(model: Any, processor: Any, family: Family) -> None:
    """Check once what the generic record says of a model; models of a family that has a record are passed over.

    Args:
        model: in place on its device, adapted by PEFT or not.
        processor: its processor.
        family: its record.

    Raises:
        UnsupportedModelError: a check failed; the message says which.
    """
    base = base_model(model)
    if not family.generic or base in _sound:
        return
    probe = _Probe(model, processor, family)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            problem = probe.problem()
    except (VlmtuneError, ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError) as error:
        problem = f"a first sample fails with {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    finally:
        model.train(was_training)
    if problem:
        raise refused(family, problem)
    _sound.add(base)
    logger.warning(
        "%s is a family that vlmtune does not know: it passed the checks at start, only its language model is adapted, "
        "and no image is shared or kept",
        family.name,
    )


def refused(family: Family, problem: str) -> UnsupportedModelError:
    """The error for a model that failed a check."""
    return UnsupportedModelError(
        f"This is a {family.name} model, a family that vlmtune does not know, and a check at start failed: {problem}. "
        "It cannot be used. `vlmtune families` lists the families that are proved."
    )


def probe_batch(model: Any, processor: Any, family: Family) -> dict[str, Any]:
    """Return a batch of one sample with an image, on the model's device."""
    return _Probe(model, processor, family).batch(_sample("red"))


def _sample(color: str, size: tuple[int, int] = (60, 44), images: int = 1) -> Sample:
    file = io.BytesIO()
    picture = Image.new("RGB", size, color)
    picture.paste("white", (size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2))
    picture.save(file, "PNG")
    refs = tuple(ImageRef(bytes=file.getvalue()) for _ in range(images))
    return Sample(
        f"probe {color}", refs, (Message.make("user", QUESTION, images=images), Message.make("assistant", ANSWER))
    )


class _Probe:
    def __init__(self, model: Any, processor: Any, family: Family) -> None:
        self.model, self.processor, self.family = model, processor, family
        self.collator = BaseVLMDataCollator(processor, family)
        self.device = next(model.parameters()).device
        exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
        self.tolerance = TOLERANCE if exact else ROUNDED_TOLERANCE

    def batch(self, *samples: Sample) -> dict[str, Any]:
        made = self.collator([sample.to_row() for sample in samples])
        return {name: value.to(self.device) for name, value in made.items()}

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        found: Tensor = self.model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        return found.float()

    def problem(self) -> str | None:
        """Return what is wrong, or ``None``."""
        return (
            next(
                (found for sample in (_sample("red"), _sample("red", (131, 37))) if (found := self._sample(sample))),
                None,
            )
            or self._together()
            or self._order()
        )

    def _sample(self, sample: Sample) -> str | None:
        batch = self.batch(sample)
        official = self._official(sample)
        if batch["input_ids"].tolist() != official["input_ids"].tolist():
            return "the token ids of a conversation are not those of its processor"
        for name, value in batch.items():
            if name != "labels" and not torch.equal(value.cpu(), torch.as_tensor(official[name])):
                return f"{name} is not what its processor gives"
        learned = batch["input_ids"][batch["labels"] != IGNORE_INDEX].tolist()
        if self.processor.tokenizer.decode(learned).strip() != ANSWER + self.family.turn_end:
            return "the learned tokens are not the answer and its end"
        base = base_model(self.model)
        images = {name: batch[name] for name in self.family.image_inputs if name in batch}
        features = base.get_image_features(**images, return_dict=True).pooler_output
        numbers = sum(part.numel() for part in features) // base.config.get_text_config().hidden_size
        places = int((batch["input_ids"] == getattr(base.config, self.family.image_token_attribute)).sum())
        return None if places == numbers else f"an image has {places} places in the text and {numbers} features"

    def _official(self, sample: Sample) -> Mapping[str, Any]:
        turns = [message.to_template() for message in sample.messages]
        text = self.processor.apply_chat_template(turns, tokenize=False, **self.family.template_options)
        bos = self.processor.tokenizer.bos_token
        pictures = [Image.open(io.BytesIO(image.bytes or b"")) for image in sample.images]
        twice = bool(bos) and text.startswith(bos)
        made: Mapping[str, Any] = self.processor(
            text=[text], images=[pictures], return_tensors="pt", add_special_tokens=not twice
        )
        return made

    def _together(self) -> str | None:
        """Images matter, and a sample in a padded batch is what it is alone."""
        first, second = _sample("red"), _sample("blue")
        longer = dataclasses.replace(_sample("green", images=2), id="probe of two images")
        alone = self.logits(self.batch(first))[0]
        if torch.equal(alone, self.logits(self.batch(second))[0]):
            return "another image changes nothing"
        both = self.logits(self.batch(longer, first))[1, : len(alone)]
        if self._differ(alone, both):
            return "a sample in a batch with a longer one is not what it is alone"
        return None

    def _order(self) -> str | None:
        """No answer's token changes what was computed before it."""
        batch = self.batch(_sample("red"))
        place = int((batch["labels"][0] != IGNORE_INDEX).nonzero()[1])
        before = self.logits(batch)[0, :place]
        changed = batch["input_ids"].clone()
        changed[0, place] = batch["input_ids"][0, place - 1]
        after = self.logits(batch | {"input_ids": changed})[0, :place]
        return "an answer's tokens are seen before they are predicted" if self._differ(before, after) else None

    def _differ(self, first: Tensor, second: Tensor) -> bool:
        return not bool((first - second).abs().max() <= self.tolerance * first.abs().max())
