"""Image features of a frozen vision tower and projector, computed once and kept on disk.

While neither the tower nor the projector is trained, an image's features never change. A cache folder belongs
to one combination of weights, processor settings and number format; another combination gets another folder,
so features can never be taken for those of other weights. Inside lie safetensors shards, each written whole
and then renamed: a killed writer leaves no half shard in place, two writers never touch the same file, and
reading is by memory map.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmtune.data.hashes import user_cache_dir
from vlmtune.errors import ModelError
from vlmtune.models.families import get_family
from vlmtune.models.family import Family
from vlmtune.models.provenance import base_model

logger = logging.getLogger("vlmtune.models")

SHARD_BYTES = 256 * 2**20
# What the cache must leave free on the disk.
RESERVE_BYTES = 2 * 2**30
# A file half written for longer was left by a writer that was killed.
STALE_SECONDS = 24 * 3600


class CacheFullError(ModelError):
    """The next features would pass the cache's limit or fill the disk."""


def default_cache_dir() -> Path:
    """The user's cache folder for image features (``XDG_CACHE_HOME`` is honoured)."""
    return user_cache_dir() / "features"


def features_key(model: nn.Module, family: Family, processor: Any, *, dtype: torch.dtype) -> dict[str, str]:
    """Describe what image features depend on besides the image: weights, processor settings, number format.

    Args:
        model: the loaded base model.
        family: its record; names the tower and the projector.
        processor: its image processor's settings count, its tokenizer does not.
        dtype: number format that the tower computes in.
    """
    weights = hashlib.sha256()
    for part in ("vision", "projector"):
        module = model.get_submodule(family.parts[part])
        for name, tensor in sorted({**dict(module.named_parameters()), **dict(module.named_buffers())}.items()):
            weights.update(f"{part}.{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            weights.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    for name in family.projector_parameters:
        weights.update(f"{name} ".encode())
        weights.update(model.get_parameter(name).detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    settings = json.dumps(processor.image_processor.to_dict(), sort_keys=True, default=str)
    return {
        "weights": weights.hexdigest(),
        "processor": hashlib.sha256(settings.encode()).hexdigest(),
        "dtype": str(dtype).removeprefix("torch."),
        "family": family.name,
    }


class FeatureCache:
    """Features by the content hash of their image.

    Args:
        root: folder of all caches.
        key: from :func:`features_key`; chooses the folder inside ``root``.
        max_gb: most gigabytes that all caches under ``root`` may take.
    """

    def __init__(self, root: str | Path, key: Mapping[str, str], *, max_gb: float = 20.0) -> None:
        self.root = Path(root)
        self.key = dict(key)
        self.max_bytes = int(max_gb * 1e9)
        name = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = self.root / f"{self.key.get('family', 'features')}-{name}"
        self._shards: dict[str, Path] = {}
        self._handles: dict[Path, Any] = {}
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._read_index()

    def __len__(self) -> int:
        return len(self._shards) + len(self._pending)

    def __contains__(self, image_hash: str) -> bool:
        return image_hash in self._shards or image_hash in self._pending

    def __getstate__(self) -> dict[str, Any]:
        # Open memory maps do not travel to worker processes; each opens its own.
        return self.__dict__ | {"_handles": {}}

    def get(self, image_hash: str) -> Tensor:
        """Return an image's features, (tokens, hidden) for one image or tile.

        Raises:
            KeyError: they are not in the cache.
            ModelError: their file was cut or deleted since the cache was opened.
        """
        if image_hash in self._pending:
            return self._pending[image_hash]
        path = self._shards[image_hash]
        try:
            if path not in self._handles:
                self._handles[path] = safe_open(path, framework="pt")
            features: Tensor = self._handles[path].get_tensor(image_hash)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"The feature cache file {path} can no longer be read ({error}). Start the run again: what is broken "
                "or missing is computed anew."
            ) from error
        return features

    def put(self, image_hash: str, features: Tensor) -> None:
        """Add an image's features; they reach the disk with the next full shard or :meth:`flush`.

        Raises:
            CacheFullError: they would pass the limit, or leave too little room on the disk.
        """
        if image_hash in self:
            return
        size = features.numel() * features.element_size()
        self._pending[image_hash] = features.detach().cpu().contiguous().clone()
        self._pending_bytes += size
        if self._pending_bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as one shard."""
        if not self._pending:
            return
        self.check_room(self._pending_bytes)
        path = self.folder / f"shard-{uuid.uuid4().hex}.safetensors"
        temporary = path.with_suffix(".tmp")
        description = self.folder / "key.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not description.exists():
                _write_atomically(description, json.dumps(self.key, indent=2))
            save_file(self._pending, temporary, metadata=self.key)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise CacheFullError(
                f"Image features could not be written to {self.folder}: {error}. Free disk space, name another "
                "folder with cache_dir, or set cache_image_features to off."
            ) from error
        self._shards |= dict.fromkeys(self._pending, path)
        self._pending, self._pending_bytes = {}, 0

    def check_room(self, more_bytes: int) -> None:
        """Refuse to write ``more_bytes`` that pass the limit or fill the disk.

        Raises:
            CacheFullError: with the sizes and the way out.
        """
        used = sum(path.stat().st_size for path in self.root.glob("*/shard-*.safetensors"))
        if used + more_bytes > self.max_bytes:
            raise CacheFullError(
                f"The image features need {more_bytes / 1e9:.2f} GB more, but the caches in {self.root} already take "
                f"{used / 1e9:.2f} of {self.max_bytes / 1e9:.2f} GB. Raise cache_max_gb, delete folders there that are "
                "no longer used, or set cache_image_features to off."
            )
        existing = next(path for path in (self.root, *self.root.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if more_bytes + RESERVE_BYTES > free:
            raise CacheFullError(
                f"The image features need {more_bytes / 1e9:.2f} GB, but the disk of {self.root} has only "
                f"{free / 1e9:.2f} GB free. Name another folder with cache_dir or set cache_image_features to off."
            )

    def _read_index(self) -> None:
        """Read which images each shard holds; a shard that is broken or of another key is deleted and rebuilt."""
        for path in self.folder.glob("*.tmp"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            try:
                with safe_open(path, framework="pt") as shard:
                    if shard.metadata() != self.key:
                        raise SafetensorError("it was written for other weights or settings")
                    self._shards |= dict.fromkeys(shard.keys(), path)
            except (SafetensorError, OSError) as error:
                logger.warning("the feature cache file %s cannot be used (%s); it will be computed again", path, error)
                # What cannot be opened, for want of a right or a file handle, may be whole.
                if isinstance(error, SafetensorError):
                    with suppress(OSError):
                        path.unlink()


@torch.no_grad()
def image_features(model: nn.Module, pixels: Mapping[str, Tensor]) -> Tensor:
    """Return the projected features of processed images, (images, tokens, hidden).

    Where features of deeper tower layers go with them ("deepstack", arXiv:2406.04334), those lie behind each
    token's own: (images, tokens, hidden * (1 + layers)).

    Args:
        model: the loaded base model, or a PEFT model around it.
        pixels: the image processor's tensors.
    """
    base = base_model(model)
    # The language model may lie elsewhere.
    device = next(base.get_submodule(get_family(base).parts["vision"]).parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in pixels.items()}
    outputs = base.get_image_features(**inputs, return_dict=True)
    deeper = getattr(outputs, "deepstack_features", None) or []
    layers = [x if isinstance(x, Tensor) else torch.stack(list(x)) for x in (outputs.pooler_output, *deeper)]
    return torch.cat(layers, dim=-1)


def missing(cache: FeatureCache, hashes: Iterable[str]) -> list[str]:
    """Return the hashes that are not in the cache, each once, in order."""
    return [image_hash for image_hash in dict.fromkeys(hashes) if image_hash not in cache]


def _write_atomically(path: Path, text: str) -> None:
    # Two runs may write it at once, each under a name of its own.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)
