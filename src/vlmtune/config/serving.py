"""Arguments of answering: many questions at once, behind an address, and of publishing a model."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import ClassVar, Literal

from vlmtune.config.options import AT_LEAST_ONE, AT_LEAST_ZERO, Checked, Limit, Limits, option


@dataclass
class PixelArguments(Checked):
    """How large an image may be."""

    _argument_group_name = "images"

    max_pixels: int | None = option(None, help="Refuse images of more pixels than this; 179 million by default.")

    limits: ClassVar[Limits] = {"max_pixels": AT_LEAST_ONE}


@dataclass
class PredictArguments(PixelArguments):
    """What is asked, and where the answers go."""

    _argument_group_name = "predict"

    prompt: str | None = option(None, help="The question about images that come without one. [Describe this image.]")
    output: str | None = option(
        None,
        help="JSON lines file for the answers. A run that was stopped goes on where it was, and images that cannot be "
        "read get a line with the reason. Without it answers are printed.",
    )


@dataclass
class ServeArguments(PixelArguments):
    """Where a model is served, by what, and to whom."""

    _argument_group_name = "serve"

    host: str = option("127.0.0.1", help="Address to listen on; anything but this machine's own needs an API key.")
    port: int = option(8000, help="Port to listen on; 0 takes a free one.")
    engine: Literal["vlmtune", "vllm"] = option(
        "vlmtune",
        help="What answers: vlmtune's own generation, whose answers are those of predict, or vLLM where it is "
        "installed, which serves many users faster.",
    )
    served_model_name: str | None = option(
        None, help="The model's name in requests; by default the last part of its folder or Hub name."
    )
    api_key: str | None = option(
        None,
        help="Key that requests must carry. Other users of this machine can see options; the environment variable "
        "VLMTUNE_API_KEY keeps it from them.",
    )
    max_request_mb: int = option(50, help="Largest request, images included, in megabytes.")
    max_images: int = option(16, help="Most images of one request.")
    check: bool = option(
        False, help="Start the server, compare its answers with predict's on drawn pictures, and stop it."
    )

    limits: ClassVar[Limits] = {
        "port": Limit(low=0, high=65535),
        "max_request_mb": AT_LEAST_ONE,
        "max_images": AT_LEAST_ZERO,
    }

    def problems(self) -> list[str]:
        """Return what is wrong with the values, one sentence each."""
        found = super().problems()
        if self.api_key is not None and len(self.api_key) < 8:
            found.append("api_key is shorter than 8 characters, which can be guessed.")
        return found

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass
class PushArguments(Checked):
    """What is published, and to whom."""

    _argument_group_name = "push"

    public: bool = option(False, help="Let everyone see the repository; by default only you and your organisation can.")
    revision: str | None = option(None, help="Branch to push to; made where it is absent. By default the main one.")
    message: str | None = option(None, help="Message of the commit.")
