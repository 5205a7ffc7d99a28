"""A tiny model whose norms and images make a difference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText


@pytest.fixture(scope="session")
def lively_dir(tiny_gemma3_dir: Path, processor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model on disk with norms that are not all one and images that matter."""
    model = AutoModelForImageTextToText.from_pretrained(tiny_gemma3_dir, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("lively")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
