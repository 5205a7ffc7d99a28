"""What the processes of one run share out between them before the first step."""

from __future__ import annotations

import os
from typing import Any

import datasets
import torch

from vlmtune.batching.collator import SharedImageCollator
from vlmtune.config import VLMDataArguments
from vlmtune.models.features import FeatureCache
from vlmtune.models.provenance import base_model
from vlmtune.training.image_reuse import Progress, fill_feature_cache, open_feature_cache, try_fill


def fill_between_ranks(
    trainer: Any,
    collator: SharedImageCollator,
    data_args: VLMDataArguments,
    sets: list[datasets.Dataset],
    progress: Progress | None = None,
) -> FeatureCache | None:
    """Open the feature cache and compute what it lacks, each rank its share; the same answer on every rank.

    Where machines have cache folders of their own, each fills in what the others computed elsewhere.

    Returns:
        The filled cache, or ``None`` where it is off, not exact, or found no room on some rank.

    Raises:
        CacheFullError: it was asked for (``on``) and there is no room.
        ConfigError: it was asked for and is not exact.
    """
    accelerator, args = trainer.accelerator, trainer.args
    model = accelerator.unwrap_model(trainer.model)
    cache = open_feature_cache(model, collator.family, collator.processor, data_args)
    if cache is None or not any(any(dataset["image_key"]) for dataset in sets):
        return None
    if trainer.is_fsdp_enabled:
        # The base class leaves the model on the CPU until its weights are shared out.
        for part in ("vision", "projector"):
            base_model(model).get_submodule(collator.family.parts[part]).to(accelerator.device)
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or args.world_size)
    shares = [(args.process_index, args.world_size)]
    if local < args.world_size:
        shares.append((args.local_process_index, local))
    for rank, world_size in shares:
        # What one rank has written before another looks would be shared out differently by the two.
        accelerator.wait_for_everyone()
        opened, number, ranks, choice = cache, rank, world_size, data_args.cache_image_features

        def fill(opened: FeatureCache = opened, number: int = number, ranks: int = ranks) -> int:
            options: dict[str, Any] = {"rank": number, "world_size": ranks, "progress": progress}
            return fill_feature_cache(opened, model, collator.encoder, *sets, **options)

        filled = torch.tensor(int(try_fill(fill, choice)), device=accelerator.device)
        if int(accelerator.reduce(filled, "sum")) < args.world_size:
            return None
        cache = FeatureCache(cache.root, cache.key, max_gb=data_args.cache_max_gb)
    return cache
