"""Load processors without torchvision: images need none, and a processor's video part is kept but not used."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import AutoProcessor, processing_utils
from transformers.video_processing_utils import VideoProcessorMixin

from vlmtune.errors import MissingDependencyError

_AUTO = "transformers.models.auto.video_processing_auto"
_PIXTRAL = "transformers.models.pixtral"
_SMOLVLM = "transformers.models.smolvlm.processing_smolvlm"


class VideoSettings(VideoProcessorMixin):
    """Stands for a processor's video part: keeps its settings, so that they are saved again, and takes no video."""

    def __init__(self, settings: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.settings = dict(settings or {})
        for name, value in self.settings.items():
            setattr(self, name, value)
        # What templates of text and images ask for although they hold no video.
        for name in ("num_frames", "fps"):
            if not hasattr(self, name):
                setattr(self, name, None)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> VideoSettings:
        """Read the settings that lie beside a model."""
        options = {key: value for key, value in options.items() if key in ("revision", "cache_dir", "subfolder")}
        settings, _ = cls.get_video_processor_dict(name, **options)
        return cls(settings)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as they were read."""
        return dict(self.settings)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Refuse.

        Raises:
            MissingDependencyError: always; videos need torchvision.
        """
        raise MissingDependencyError("Videos need the package torchvision. Install it by: pip install torchvision")


def load_auto_processor(name: str | Path, **options: Any) -> Any:
    """Return ``AutoProcessor.from_pretrained(name)``; its video part is read as settings where torchvision is absent.

    Args:
        name: a folder, or a name on the Hub.
        **options: of ``from_pretrained``.
    """
    with video_parts_as_settings():
        return AutoProcessor.from_pretrained(name, **options)


@contextmanager
def video_parts_as_settings() -> Iterator[None]:
    """While it lasts, processors that hold a video part are built without the packages that only videos need.

    So is Pixtral's, whose image processor has a Pillow form, but which takes a function for sizes from the other one.
    """
    with ExitStack() as stack:
        if importlib.util.find_spec("torchvision") is None:
            stack.enter_context(_pixtral_with_pillow())
            stack.enter_context(mock.patch.object(importlib.import_module(_AUTO), "AutoVideoProcessor", VideoSettings))
            # The class that a video part is checked against is not exported without torchvision.
            exported = processing_utils.transformers_module
            stack.enter_context(mock.patch.object(exported, "VideoProcessorMixin", VideoProcessorMixin, create=True))
        if importlib.util.find_spec("num2words") is None:
            # It spells the number of a video's frames; the processor asks for it when it is made.
            stack.enter_context(mock.patch.object(importlib.import_module(_SMOLVLM), "num2words", str))
        yield


@contextmanager
def _pixtral_with_pillow() -> Iterator[None]:
    package = importlib.import_module(_PIXTRAL)
    pillow = importlib.import_module(f"{_PIXTRAL}.image_processing_pil_pixtral")
    # The Pillow module has a function of the same name, for the same sizes.
    with mock.patch.dict(sys.modules, {f"{_PIXTRAL}.image_processing_pixtral": pillow}):
        found = importlib.import_module(f"{_PIXTRAL}.processing_pixtral").PixtralProcessor
    with mock.patch.object(package, "PixtralProcessor", found):
        yield
