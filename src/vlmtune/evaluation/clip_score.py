"""CLIPScore: how well a caption fits its image, without a reference (Hessel et al. 2021, arXiv:2104.08718)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from vlmtune.data.images import decode
from vlmtune.data.sample import ImageRef
from vlmtune.errors import ConfigError
from vlmtune.evaluation.metrics.base import Metric, Scores

# The paper's: so that values spread over 0 to 1; and what every caption begins with.
WEIGHT, PREFIX = 2.5, "A photo depicts "
BATCH = 32


@cache
def _clip(checkpoint: str) -> tuple[Any, Any, Any]:
    """Load a CLIP's model, tokenizer and image processor."""
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel

    try:
        if AutoConfig.from_pretrained(checkpoint).model_type != "clip":
            raise ConfigError(f"clip_score needs a CLIP, and {checkpoint} is none. Name its folder or Hub name.")
        model = CLIPModel.from_pretrained(checkpoint).eval()
        tokenizer, processor = AutoTokenizer.from_pretrained(checkpoint), AutoImageProcessor.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"clip_score cannot load a CLIP from {checkpoint}: {first}") from error
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return model.to(device), tokenizer, processor


@torch.no_grad()
def clip_score(
    answers: Sequence[str], references: Sequence[Sequence[str]], images: Sequence[Sequence[str]], *, checkpoint: str
) -> Scores:
    """Return 2.5 * max(cos(image, caption), 0) of each sample and their mean.

    Args:
        answers: captions; what does not fit into the text model is cut.
        references: not looked at.
        images: file names, one a sample.
        checkpoint: folder or Hub name of a CLIP.

    Raises:
        ValueError: a sample has not exactly one image in a file.
        ImageError: an image cannot be read.
    """
    model, tokenizer, processor = _clip(checkpoint)
    for index, names in enumerate(images):
        if len(names) != 1:
            raise ValueError(f"sample {index} has {len(names)} images; a caption is held against one")
    values: list[float] = []
    most = model.config.text_config.max_position_embeddings
    for start in range(0, len(answers), BATCH):
        pictures = [decode(ImageRef(path=names[0])) for names in images[start : start + BATCH]]
        texts = [PREFIX + answer for answer in answers[start : start + BATCH]]
        tokens = tokenizer(
            texts, padding=True, padding_side="right", truncation=True, max_length=most, return_tensors="pt"
        )
        pixels = processor(pictures, return_tensors="pt")["pixel_values"]
        output = model(
            **{name: tensor.to(model.device) for name, tensor in tokens.items()}, pixel_values=pixels.to(model.device)
        )
        cosine = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
        values += (WEIGHT * cosine.clamp(min=0)).tolist()
    return Scores(np.asarray(values))


def make_clip_score(name: str, checkpoint: str) -> Metric:
    """Return CLIPScore by a checkpoint; it is loaded when the first captions are scored."""
    return Metric(
        name=f"{name}:{checkpoint}",
        summary="how well a caption fits its image, by CLIP",
        compute=partial(clip_score, checkpoint=checkpoint),
        paper="arXiv:2104.08718",
        code="jmhessel/clipscore",
        percent=False,
        reads="images",
    )
