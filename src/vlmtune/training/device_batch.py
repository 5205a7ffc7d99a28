"""``device_batch_size: auto``: the most samples at once that fit the device, the optimizer step being the same.

The estimate (:mod:`vlmtune.models.memory`) chooses, and one step with the heaviest rows of the data verifies: the
longest, and those with the most images. Where it takes more than there is, the next smaller batch is tried.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from vlmtune.batching.sampler import ImageGroupSampler
from vlmtune.batching.scan import Scan
from vlmtune.config import ModelWithLoRAArguments
from vlmtune.errors import ConfigError, ModelError
from vlmtune.models.memory import MemoryEstimator, Settings, state_bytes
from vlmtune.models.memory_report import USABLE, gigabytes
from vlmtune.models.memory_trace import Batch
from vlmtune.models.sizing import count_parameters
from vlmtune.training.loss import count_targets
from vlmtune.training.memory_plan import run_estimator

logger = logging.getLogger("vlmtune.training")
SECONDS_BETWEEN_LOOKS = 0.002


@dataclass
class DeviceBatch:
    """Chooses the device batch of a trainer.

    Args:
        trainer: ready to train; its arguments and sampler are changed.
        make_sampler: makes the training sampler by the trainer's arguments.
        scan: of the training data.
        model_args: the model's options.
    """

    trainer: Any
    make_sampler: Callable[[], ImageGroupSampler]
    scan: Scan
    model_args: ModelWithLoRAArguments

    def choose(self) -> None:
        """Set the batch.

        Raises:
            ConfigError: not even one sample fits, or the run shards its weights.
        """
        trainer, args = self.trainer, self.trainer.args
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ConfigError(
                "device_batch_size: auto works on one device and under DDP. Where weights are sharded, set "
                "per_device_train_batch_size by what vlmtune estimate says, and leave device_batch_size out."
            )
        trainer.keep_trained_precise()
        per_device = args.per_device_train_batch_size * args.gradient_accumulation_steps
        sizes = [size for size in range(per_device, 0, -1) if per_device % size == 0]
        weights = count_parameters(trainer.model)["all"]["bytes"]
        limit = args.device_memory_gb * 10**9 if args.device_memory_gb else weights + _free(args.device)
        # The tighter device decides for all, so that each takes the same steps.
        limit = -self._most(-limit * USABLE)
        estimator = self._estimator()
        # What the first step of a process takes for good is not the batch's.
        self._verify(1)
        found = self._by_estimate(estimator, sizes, limit) if estimator else self._by_steps(sizes, limit, weights)
        if found is None:
            raise ConfigError(
                f"Not even one sample at once fits the {gigabytes(round(limit))} that the device has for training. Use "
                "activation_checkpointing, use_4bit or a smaller max_length; vlmtune estimate says what each saves."
            )
        size, took = found
        self._set(size, per_device)
        logger.info(
            "device_batch_size auto: %d samples at once, %d batches a step; with the heaviest rows it took %s of %s",
            *(size, per_device // size, gigabytes(round(took)), gigabytes(round(limit))),
        )

    def _by_estimate(self, estimator: MemoryEstimator, sizes: list[int], limit: float) -> tuple[int, float] | None:
        """The largest batch that is estimated to fit, or a smaller one where it does not."""
        for size in sizes:
            estimate = self._estimate(estimator, size)
            # An estimate is no ground to refuse the smallest batch.
            if estimate > limit and size > 1:
                continue
            took = self._verify(size)
            if took <= limit:
                return size, took
            logger.info("device_batch_size auto: %d samples, estimated at %s, took more", size, gigabytes(estimate))
        return None

    def _by_steps(self, sizes: list[int], limit: float, weights: int) -> tuple[int, float] | None:
        """The largest batch up to which real steps fit, from one sample on."""
        best = None
        for size in reversed(sizes):
            # Memory beside the weights grows evenly with the batch, at most.
            if best and weights + (best[1] - weights) * size / best[0] > limit:
                break
            took = self._verify(size)
            if took > limit:
                break
            best = size, took
        return best

    def _estimator(self) -> MemoryEstimator | None:
        try:
            estimator = run_estimator(self.model_args, self.trainer.args, here=True)
        except ModelError as error:
            logger.info("device_batch_size auto: %s Real steps decide instead.", error)
            return None
        if estimator.family.sized:
            logger.info("device_batch_size auto: images differ in size, so real steps decide.")
            return None
        return estimator

    def _estimate(self, estimator: MemoryEstimator, size: int) -> int:
        args = self.trainer.args
        image_token = getattr(estimator.config, estimator.family.image_token_attribute)
        settings = Settings(
            batch_of(self.trainer.data_collator(self._heaviest(size)[0]), image_token),
            args.gradient_accumulation_steps * args.per_device_train_batch_size // size,
            bool(args.activation_checkpointing),
            4 if self.model_args.use_4bit else 8 if self.model_args.use_8bit else 16,
            args.world_size,
            optim=_optimizer(args),
        )
        return estimator.estimate(settings).total

    def _heaviest(self, size: int) -> list[list[Any]]:
        """Rows of the batches of about ``size`` samples that are longest, and that have most images, if others."""
        images, lengths = self.scan.image_tokens, self.scan.lengths
        sampler = self.trainer.train_sampler
        starts = sampler.starts[:-1]
        longest = np.add.reduceat(lengths[sampler.members] - images[sampler.members], starts)
        most = images[sampler.members[starts]]
        found: list[list[int]] = []
        for order in (np.argsort(-(longest + most), kind="stable"), np.lexsort((-longest, -most))):
            rows: list[int] = []
            for group in order:
                # A part of a large group, as the sampler splits it.
                part = sampler.members[starts[group] : sampler.starts[group + 1]][: max(size, 1)]
                if rows and len(rows) + len(part) / 2 > size:
                    break
                rows += part.tolist()
            found.append(rows)
        unique = found[:1] if sorted(found[0]) == sorted(found[1]) else found
        return [[self.trainer.train_dataset[row] for row in rows] for rows in unique]

    def _verify(self, size: int) -> float:
        """Bytes that a step takes with this batch, the most of all devices; infinite where they ran out."""
        try:
            took = float(max(self._step(rows) for rows in self._heaviest(size)))
        except (torch.OutOfMemoryError, MemoryError):
            took = float("inf")
        except RuntimeError as error:
            if "allocate memory" not in str(error):
                raise
            took = float("inf")
        return self._most(took)

    def _step(self, rows: Sequence[Any]) -> float:
        trainer, args = self.trainer, self.trainer.args
        model = trainer.model
        model.train()
        if args.activation_checkpointing:
            model.gradient_checkpointing_enable(args.activation_checkpointing_kwargs)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        devices = [args.device] if args.device.type == "cuda" else []
        batch = trainer._prepare_inputs(trainer.data_collator(rows))
        try:
            # The random numbers of the run stay as they are.
            with torch.random.fork_rng(devices), peak(args.device) as found:
                with trainer.accelerator.autocast():
                    loss = trainer.compute_loss(model, batch)
                loss.backward()
        finally:
            model.zero_grad(set_to_none=True)
        gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
        later = state_bytes(_optimizer(args), sum(p.numel() for p in trained), gradients)
        # DDP's buckets.
        later += gradients * (args.world_size > 1)
        return float(found[0] + later + count_parameters(model)["all"]["bytes"])

    def _set(self, size: int, per_device: int) -> None:
        trainer, args = self.trainer, self.trainer.args
        args.per_device_train_batch_size = size
        args.gradient_accumulation_steps = per_device // size
        trainer._train_batch_size = args.train_batch_size
        passes = trainer.train_sampler.vision_passes
        trainer.train_sampler = self.make_sampler()
        trainer.train_sampler.vision_passes = passes

    def _most(self, value: float) -> float:
        """The largest value of all processes."""
        if self.trainer.args.world_size == 1:
            return value
        found = torch.tensor([value], dtype=torch.float64, device=self.trainer.accelerator.device)
        return float(self.trainer.accelerator.gather(found).max())


def batch_of(batch: dict[str, Any], image_token: int) -> Batch:
    """Return the form of a collated batch, as estimates take it; all its rows as the one with most images.

    Args:
        batch: from a collator.
        image_token: id of a soft token.
    """
    ids = batch["input_ids"]
    samples, length = ids.shape
    pictures = next((batch[name] for name in ("image_features", "pixel_values") if name in batch), ())
    return Batch(
        samples=samples,
        text_tokens=length - int((ids == image_token).sum(1).max()),
        supervised_tokens=-(-count_targets(batch) // samples),
        images=-(-len(pictures) // samples),
        cached="image_features" in batch,
    )


@contextmanager
def peak(device: torch.device) -> Iterator[list[int]]:
    """Measure the most bytes taken inside, beside what was there: on CUDA of its allocator, else of the process."""
    found = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found[0] = torch.cuda.max_memory_allocated(device) - before
        return
    # What was freed and kept by the C library (glibc) would be taken again unseen.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    process, ended = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def look() -> None:
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            found[0] = max(found[0], process.memory_info().rss - before)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def _free(device: torch.device) -> float:
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    available = float(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        # A container has a limit of its own.
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        available = min(available, int((group / "memory.max").read_text()) - used)
    return available / int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def _optimizer(args: Any) -> str:
    return str(getattr(args.optim, "value", args.optim))
