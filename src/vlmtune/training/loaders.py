"""The loader of batches that a sampler has dealt to this rank."""

from __future__ import annotations

from functools import partial
from typing import Any

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers.trainer_utils import seed_worker

from vlmtune.batching.sampler import ImageGroupSampler, WithFillers


def batch_loader(
    rows: Any, sampler: ImageGroupSampler, collator: Any, args: Any, accelerator: Any
) -> DataLoader[dict[str, Any]]:
    """Return a loader of ``sampler``'s batches of ``rows``, put on this rank's device.

    Args:
        rows: the data set.
        sampler: made for this rank.
        collator: makes a batch of rows.
        args: ``TrainingArguments``.
        accelerator: the trainer's.
    """
    loader: DataLoader[dict[str, Any]] = DataLoader(
        WithFillers(rows),
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
    )
    # The sampler knows its rank; accelerate must not deal its batches out a second time.
    prepared: DataLoader[dict[str, Any]] = prepare_data_loader(
        loader, device=accelerator.device, num_processes=1, process_index=0, put_on_device=accelerator.device_placement
    )
    return prepared
