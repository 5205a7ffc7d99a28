"""The demo's model, loaded once, and a server of it."""

from __future__ import annotations

import pytest

from vlmtune.config import GenerationArguments
from vlmtune.config.serving import ServeArguments
from vlmtune.demo.run import model_folder
from vlmtune.models.loading import load_model_for_inference
from vlmtune.serving import server as serving

KEY = "a-long-enough-key"


@pytest.fixture(scope="session")
def demo_model():
    """The model that comes with the package, and its processor; treat as read-only."""
    return load_model_for_inference(model_folder(), torch_dtype="float32")


@pytest.fixture(scope="module")
def served(demo_model):
    """A server of the demo's model with an API key; gives its address."""
    pytest.importorskip("uvicorn")
    args = ServeArguments(port=0, max_request_mb=1, max_pixels=100_000)
    with serving._listen(args) as opened:
        options = GenerationArguments(max_new_tokens=12)
        with serving._running(*demo_model, "demo", KEY, options, args, opened):
            yield f"http://127.0.0.1:{opened.getsockname()[1]}/v1"
