"""The loader of batches that a sampler has dealt to this rank, and what replaces its processes when one is killed."""

from __future__ import annotations

import inspect
import logging
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.multiprocessing import reductions as torch_reductions
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling as torch_signals
from transformers.trainer_utils import seed_worker

from vlmtune.batching.sampler import ImageGroupSampler, WithFillers
from vlmtune.errors import TrainingError
from vlmtune.training.stream_sampler import StreamSampler

logger = logging.getLogger("vlmtune.training")

# Of data loading processes, with no batch between one loss and the next.
REPLACEMENTS = 3
# What a loader may raise when one of its processes was killed.
WORKER_ERRORS = (RuntimeError, OSError, EOFError)


def batch_loader(
    rows: Any, sampler: ImageGroupSampler | StreamSampler, collator: Any, args: Any, accelerator: Any
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
        rows if isinstance(rows, WithFillers) else WithFillers(rows),
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        worker_init_fn=_Worker(args.dataloader_num_workers, args.process_index),
    )
    # The sampler knows its rank; accelerate must not deal its batches out a second time.
    prepared: DataLoader[dict[str, Any]] = prepare_data_loader(
        loader, device=accelerator.device, num_processes=1, process_index=0, put_on_device=accelerator.device_placement
    )
    return prepared


class SteadyBatches(Iterator[Any]):
    """An epoch's batches that go on where they were when a process that loads them was killed.

    Args:
        batches: of the whole epoch.
        again: gives the epoch's batches from a number on.
        given: batches of the epoch that ``batches`` leaves out at its beginning.
    """

    def __init__(self, batches: Iterator[Any], again: Callable[[int], Iterator[Any]], given: int = 0) -> None:
        self.batches, self.again, self.given = batches, again, given
        self.replaced = 0

    def __next__(self) -> Any:
        while True:
            try:
                # Starting a loader draws a random number; after a fault that must not change what follows.
                with kept_random_state() if self.replaced else nullcontext():
                    batch = next(self.batches)
            except WORKER_ERRORS as error:
                if not worker_died(error):
                    raise
                self._replace(error)
                continue
            self.given, self.replaced = self.given + 1, 0
            return batch

    def _replace(self, error: Exception) -> None:
        if self.replaced == REPLACEMENTS:
            raise TrainingError(
                f"The processes that load data were killed {REPLACEMENTS + 1} times in a row ({error}). Most often the "
                "system's memory is full: lower dataloader_num_workers (0 loads in the training process itself)."
            ) from error
        self.replaced += 1
        logger.warning("a data loading process was killed; others load its batches again, none is lost (%s)", error)
        self.batches = self.again(self.given)


def batches_from(loader: Any, epoch: int, given: int) -> Iterator[Any]:
    """Return the batches of an epoch after the first ``given``, as transformers' trainer does after resuming."""
    loader = skip_first_batches(loader, given) if given else loader
    loader.set_epoch(epoch)
    sampler: Any = getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    return iter(loader)


def kept_random_state() -> AbstractContextManager[None]:
    """Leave PyTorch's random numbers after the block as they were before it."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices=devices)


def worker_died(error: BaseException) -> bool:
    """Whether ``error``, which came from PyTorch's loader, means that one of its processes is gone.

    The loader says so, or a batch had come whose tensors only the process that made them could hand over.
    """
    said = "DataLoader worker" in str(error) and ("exited unexpectedly" in str(error) or "killed by" in str(error))
    places = traceback.walk_tb(error.__traceback__)
    return said or any(frame.f_globals.get("__name__") == torch_reductions.__name__ for frame, _ in places)


class _Worker:
    """Sets up a process that loads data."""

    def __init__(self, num_workers: int, rank: int) -> None:
        self.num_workers, self.rank = num_workers, rank

    def __call__(self, worker: int) -> None:
        # Ctrl-C goes to every process of the terminal; the training process decides what happens.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        seed_worker(worker, num_workers=self.num_workers, rank=self.rank)


def calm_worker_deaths() -> None:
    """Have a killed process found when its batch is asked for.

    PyTorch would raise from a signal handler, wherever the training process then is: in the midst of changing
    weights, or of writing a checkpoint. The handler may be there already, from another loader of the process.
    """
    torch_signals._SIGCHLD_handler_set = True
    handler = signal.getsignal(signal.SIGCHLD)
    main = threading.current_thread() is threading.main_thread()
    if main and callable(handler) and handler.__module__ == torch_signals.__name__:
        before = inspect.getclosurevars(handler).nonlocals["previous_handler"]
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
