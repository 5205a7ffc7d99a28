"""Each family's checkpoint, as vlmtune loads it and as plain transformers does."""

from __future__ import annotations

import pytest
import torch
import transformers
from families.builders import VARIANTS

from vlmtune.batching.collator import BaseVLMDataCollator
from vlmtune.batching.encode import Encoder
from vlmtune.models.families import FAMILIES
from vlmtune.models.loading import load_model_for_training, load_processor
from vlmtune.models.processors import load_auto_processor


@pytest.fixture(params=[*FAMILIES, *VARIANTS], scope="module")
def checkpoint(request):
    return request.param


@pytest.fixture(scope="module")
def family(checkpoint):
    return FAMILIES[VARIANTS.get(checkpoint, checkpoint)]


@pytest.fixture(scope="module")
def folder(checkpoint, family_dir):
    return family_dir(checkpoint)


@pytest.fixture(scope="module")
def processor(folder):
    return load_processor(folder)


@pytest.fixture(scope="module")
def ours(folder):
    return load_model_for_training(folder, torch_dtype="float32").eval()


@pytest.fixture(scope="module")
def encoder(processor, family):
    return Encoder(processor, family)


@pytest.fixture(scope="module")
def plain(folder, family):
    """The model and processor as plain transformers loads them."""
    # The attention code of ours, so that sums run in the same order.
    model = getattr(transformers, family.model_class).from_pretrained(folder, dtype=torch.float32)
    return model.eval(), load_auto_processor(folder)


@pytest.fixture
def collator(processor, family):
    return BaseVLMDataCollator(processor, family)
