"""Decide whether a run shares images between texts and caches their features, and prepare both."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import nn

from vlmtune.batching.encode import Encoder
from vlmtune.batching.groups import Ints, Keys, grouped
from vlmtune.batching.masks import why_not_shared
from vlmtune.config import ModelWithLoRAArguments, VLMDataArguments
from vlmtune.data.hashes import row_hashes
from vlmtune.data.images import content_hash
from vlmtune.data.loading import load_train_and_eval
from vlmtune.data.pages import batches
from vlmtune.data.sample import ImageRef, Sample
from vlmtune.errors import ConfigError, ImageError
from vlmtune.models.families import get_family
from vlmtune.models.family import Family
from vlmtune.models.features import (
    CacheFullError,
    FeatureCache,
    default_cache_dir,
    features_key,
    image_features,
    missing,
)
from vlmtune.models.loading import load_config, load_model_for_training, load_processor
from vlmtune.models.provenance import base_model

logger = logging.getLogger("vlmtune.training")

# Called with (images done, images in all).
Progress = Callable[[int, int], None]
IMAGES_AT_ONCE = 16


def with_image_keys(dataset: datasets.Dataset, *, remember: bool = True) -> datasets.Dataset:
    """Add the column ``image_key``: the content hashes of the row's images, in order, joined by spaces.

    Args:
        dataset: rows.
        remember: keep the hashes on disk, for other runs.

    Raises:
        ImageError: an image cannot be read.
    """
    keys = pa.chunked_array(
        [pa.array(map(" ".join, batch), pa.string()) for batch in row_hashes(dataset, remember=remember)], pa.string()
    )
    # The default fingerprint would hash every key; nothing here is reused by it.
    return dataset.add_column("image_key", keys, new_fingerprint=uuid.uuid4().hex)


def shares_images(family: Family, choice: str, attn_implementation: str | None = None) -> bool:
    """Whether the run shares images, by the option ``share_images``, the family and the attention code.

    Raises:
        ConfigError: it was asked for, and is not exact.
    """
    reason = why_not_shared(family, attn_implementation)
    if choice == "on" and reason:
        raise ConfigError(f"share_images is on, but {reason}. Set share_images to auto or off.")
    if choice == "auto" and reason:
        logger.info("every text is computed with its image by itself: %s", reason)
    return choice != "off" and not reason


def check_row_limits(
    image_keys: Keys,
    lengths: Sequence[int] | Ints,
    image_tokens: Sequence[int] | Ints,
    *,
    max_texts: int | None,
    max_tokens: int | None,
) -> None:
    """Say how many images have more texts than one row may hold.

    Args:
        image_keys: a name of each sample's images; empty for text alone.
        lengths: tokens of each sample.
        image_tokens: soft tokens of each sample.
        max_texts: the option ``max_texts_per_row``.
        max_tokens: the option ``max_tokens_per_row``.

    Raises:
        ConfigError: a sample alone is longer than ``max_tokens``: no split can keep that limit.
    """
    lengths, image_tokens = np.asarray(lengths, np.int64), np.asarray(image_tokens, np.int64)
    longest = lengths.max(initial=0)
    if max_tokens and longest > max_tokens:
        raise ConfigError(
            f"max_tokens_per_row is {max_tokens:,}, but the longest sample has {longest:,} tokens by itself. Raise it "
            f"to at least {longest}, or leave longer samples out by max_length {max_tokens} and on_too_long drop."
        )
    members, starts = grouped(image_keys, with_empty=False)
    if not len(members):
        return
    shared = image_tokens[members[starts[:-1]]]
    tokens = np.add.reduceat(lengths[members], starts[:-1]) - shared * (np.diff(starts) - 1)
    above = np.diff(starts) > max_texts if max_texts else np.zeros(len(shared), np.bool_)
    split = int((above | (tokens > max_tokens)).sum() if max_tokens else above.sum())
    if split:
        limits = (("max_texts_per_row", max_texts), ("max_tokens_per_row", max_tokens))
        names = " and ".join(f"{name} {limit:,}" for name, limit in limits if limit)
        logger.info(
            "%s of %s images have more texts than %s allows in one row; where a batch holds that many they are "
            "split evenly over several rows, and the image is computed once in each",
            *(f"{split:,}", f"{len(shared):,}", names),
        )


def why_not_cached(model: Any, family: Family) -> str | None:
    """Return why image features cannot be kept, or ``None``: they must not change while the model is trained."""
    if not family.feature_cache:
        return f"{family.name} does not take prepared image features: {family.cache_reason}"
    base = base_model(model)
    if hasattr(next(base.parameters()), "ds_id"):
        return "strategy zero3 shares the tower out over the ranks, and none can compute features alone"
    for part in ("vision", "projector"):
        place = family.parts[part]
        if any(parameter.requires_grad for parameter in base.get_submodule(place).parameters()):
            return f"the {part} part is trained, so image features change from step to step"
    return None


def open_feature_cache(model: Any, family: Family, processor: Any, data_args: VLMDataArguments) -> FeatureCache | None:
    """Return the cache of a run's image features, or ``None`` where it is off or not exact; the log says why.

    Raises:
        ConfigError: it was asked for and is not exact.
    """
    if data_args.cache_image_features == "off":
        return None
    reason = why_not_cached(model, family)
    if reason is not None:
        if data_args.cache_image_features == "on":
            raise ConfigError(f"cache_image_features is on, but {reason}. Set it to auto or off.")
        logger.info("image features are computed in every step: %s", reason)
        return None
    base = base_model(model)
    root = Path(data_args.cache_dir).expanduser() if data_args.cache_dir else default_cache_dir()
    key = features_key(base, family, processor, dtype=next(base.parameters()).dtype)
    return FeatureCache(root, key, max_gb=data_args.cache_max_gb)


def fill_feature_cache(
    cache: FeatureCache,
    model: nn.Module,
    encoder: Encoder,
    *sets: datasets.Dataset,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress | None = None,
) -> int:
    """Compute the features of the images that are not in the cache, this rank's share of them.

    Args:
        cache: where they go; flushed at the end.
        model: with its tower on the device that computes.
        encoder: decodes the images.
        *sets: rows with ``image_key``. All of a run's at once: ranks that look at the cache again while others write
            would share the rest out differently.
        rank: this process's number.
        world_size: number of processes.
        progress: called after each batch of images.

    Returns:
        How many were computed.

    Raises:
        CacheFullError: they would pass the cache's limit, or the disk's room; found before the first is written.
        ImageError: an image's file has changed since the data was read.
    """
    by_hash: dict[str, ImageRef] = {}
    for dataset in sets:
        for key, row_images in _first_rows(dataset):
            for name, image in zip(key.split(), row_images, strict=True):
                by_hash.setdefault(name, ImageRef(**image))
    absent = missing(cache, by_hash)
    mine = absent[rank::world_size]
    for start in range(0, len(mine), IMAGES_AT_ONCE):
        names = mine[start : start + IMAGES_AT_ONCE]
        features = _features(model, encoder, [by_hash[name] for name in names])
        # After decoding: the features of other content must never be kept under this name.
        _require_unchanged({name: by_hash[name] for name in names})
        if start == 0:
            cache.check_room(len(absent) * features[0].numel() * features[0].element_size())
        for name, feature in zip(names, features, strict=True):
            cache.put(name, feature)
        if progress:
            progress(min(start + IMAGES_AT_ONCE, len(mine)), len(mine))
    cache.flush()
    return len(mine)


def _first_rows(dataset: datasets.Dataset) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield key and images of the first row with each key: most texts have an image that is known already."""
    seen: set[str] = set()
    for _, batch in batches(dataset, ["image_key", "images"]):
        for index, key in enumerate(batch["image_key"].to_pylist()):
            if key not in seen:
                seen.add(key)
                yield key, batch["images"][index].as_py()


def _require_unchanged(images: Mapping[str, ImageRef]) -> None:
    for name, image in images.items():
        if content_hash(image) != name:
            raise ImageError(
                f"{image.name} has changed since the data was read. Its features were not kept; leave the images "
                "alone while a run reads them, and start it again."
            )


def _features(model: nn.Module, encoder: Encoder, refs: Sequence[ImageRef]) -> Sequence[torch.Tensor]:
    """Features of each image, (tokens, hidden); where their number depends on the image, each image by itself."""
    if encoder.family.sized and len(refs) > 1:
        return [_features(model, encoder, [ref])[0] for ref in refs]
    inputs = encoder.images(Sample("features", tuple(refs), ()))
    used = {name: inputs[name] for name in encoder.family.image_inputs}
    features = image_features(model, used)
    # An image's tiles are one image's features.
    return [features.flatten(0, -2)] if encoder.family.sized else list(features)


def cache_ahead(
    model_args: ModelWithLoRAArguments, data_args: VLMDataArguments, *, progress: Progress | None = None
) -> tuple[int, int, Path]:
    """Compute the features of a recipe's training and evaluation images before any training.

    Returns:
        How many were computed, how many images there are, and the cache's folder.

    Raises:
        ConfigError: the recipe trains the tower or the projector, or turns the cache off.
        CacheFullError: they would pass ``cache_max_gb`` or fill the disk.
    """
    if data_args.cache_image_features == "off":
        raise ConfigError("cache_image_features is off in this recipe; set it to auto or on to compute features ahead.")
    if data_args.streaming:
        raise ConfigError("The recipe streams its data, and streaming does not keep image features. Turn it off first.")
    trained = model_args.trained_parts & {"vision", "projector"}
    if trained:
        raise ConfigError(
            f"The recipe trains the {' and the '.join(sorted(trained))}, so image features change from step to "
            "step and cannot be kept. Take them out of lora_scopes or train_parts, or train without the cache."
        )
    train, evaluation = load_train_and_eval(data_args)
    sets = [with_image_keys(data.dataset) for data in (train, evaluation) if data is not None]
    name = model_args.model_name_or_path
    origin: dict[str, Any] = {
        "revision": model_args.model_revision,
        "trust_remote_code": model_args.trust_remote_code,
    }
    get_family(load_config(name, **origin))
    processor = load_processor(name, **origin, image_max_pixels=model_args.image_max_pixels)
    model = load_model_for_training(
        name,
        torch_dtype=model_args.torch_dtype,
        attn_implementation=model_args.attn_implementation,
        **origin,
    )
    model.requires_grad_(False)
    if torch.cuda.is_available():
        model.to("cuda")
    family = get_family(model)
    cache = open_feature_cache(model, family, processor, data_args)
    if cache is None:
        raise ConfigError(f"Image features of {family.name} cannot be kept: {family.cache_reason}.")
    encoder = Encoder(processor, family, max_pixels=data_args.max_pixels)
    computed = fill_feature_cache(cache, model, encoder, *sets, progress=progress)
    return (
        computed,
        len({name for dataset in sets for key in dataset["image_key"] for name in key.split()}),
        cache.folder,
    )


def try_fill(fill: Callable[[], int], choice: str) -> bool:
    """Fill the cache; with ``auto`` a full cache or disk is a log line and the run goes on without.

    Raises:
        CacheFullError: the cache was asked for (``on``).
    """
    try:
        computed = fill()
    except CacheFullError as error:
        if choice == "on":
            raise
        logger.warning("image features are computed in every step: %s", error)
        return False
    if computed:
        logger.info("computed the features of %s images", f"{computed:,}")
    return True
