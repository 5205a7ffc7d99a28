"""What a run trains and evaluates on: loaded, checked and measured before any weight loads."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from vlmtune.batching.collator import BaseVLMDataCollator, SharedImageCollator
from vlmtune.batching.sampler import ImageGroupSampler
from vlmtune.batching.scan import Scan, scan
from vlmtune.batching.sharing import describe_saving
from vlmtune.config import TrainingArguments, VLMDataArguments
from vlmtune.data.loading import LoadedData, load_evaluation, load_train_and_eval
from vlmtune.data.shards import find_shards
from vlmtune.models.family import Family
from vlmtune.training.data_record import describe_evaluation, describe_train, quarantined
from vlmtune.training.image_reuse import check_row_limits, shares_images, with_image_keys
from vlmtune.training.stream_sampler import StreamRows, StreamSampler
from vlmtune.training.streaming import Stream, Window, check_streaming

logger = logging.getLogger("vlmtune.training")

Load = Callable[[VLMDataArguments], tuple[LoadedData, LoadedData | None]]


@dataclass(frozen=True)
class RunData:
    """The samples of a run and what makes batches of them.

    Attributes:
        train: the training data as loaded.
        train_rows: those of its samples that can be used, with the column ``image_key`` where images are shared.
        train_scan: their lengths, and what was left out.
        evaluation: the evaluation data as loaded, where there are any; so are ``eval_rows`` and ``eval_scan``.
        collator: makes batches of both.
        options: how they were asked for.
        stream: reads the training data while training goes on; then ``train`` and ``train_scan`` are ``None``.
        first: the stream's first window.
    """

    train: LoadedData | None
    train_rows: Any
    train_scan: Scan | None
    evaluation: LoadedData | None
    eval_rows: Any
    eval_scan: Scan | None
    collator: BaseVLMDataCollator
    options: VLMDataArguments
    stream: Stream | None = None
    first: Window | None = None

    def left_out(self) -> list[tuple[str, str]]:
        """Return (sample id, reason) of every sample that is not used; without those of a stream."""
        left_out = [] if self.train is None else quarantined(self.train)
        left_out += [] if self.train_scan is None else self.train_scan.left_out
        if self.evaluation is not None and self.eval_scan is not None:
            left_out += [*quarantined(self.evaluation), *self.eval_scan.left_out]
            left_out = list(dict.fromkeys(left_out))
        return left_out

    def record(self) -> dict[str, Any]:
        """Return the entry of the data in ``run.json``."""
        if self.stream is not None:
            record = {"format": self.stream.shards.format, "train": self.stream.record()}
        else:
            assert self.train is not None and self.train_scan is not None
            record = {"format": self.train.format, "train": describe_train(self.train, self.train_scan)}
        if self.evaluation is not None and self.eval_scan is not None:
            record["evaluation"] = describe_evaluation(self.evaluation, self.eval_scan)
        return record

    def train_sampler(self, args: TrainingArguments) -> ImageGroupSampler | StreamSampler:
        """Make batches of the training samples, in another order each epoch."""
        if self.stream is not None:
            return StreamSampler(self.stream, args, self.options.max_texts_per_row, self.first)
        return self.group_sampler(args)

    def group_sampler(self, args: TrainingArguments) -> ImageGroupSampler:
        """Make batches of training samples that are all known: not of a stream."""
        assert self.train_scan is not None
        size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        return self._sampler(self.train_rows, self.train_scan, args, size, accumulation, shuffle=True)

    def eval_sampler(self, args: TrainingArguments) -> ImageGroupSampler | None:
        """Make batches of the evaluation samples, where there are any."""
        if self.eval_scan is None:
            return None
        return self._sampler(self.eval_rows, self.eval_scan, args, args.per_device_eval_batch_size, 1, shuffle=False)

    def _sampler(
        self, rows: Any, found: Scan, args: TrainingArguments, size: int, accumulation: int, *, shuffle: bool
    ) -> ImageGroupSampler:
        shared = "image_key" in rows.column_names
        return ImageGroupSampler(
            rows.with_format("arrow")[:]["image_key"] if shared else [""] * len(rows),
            found.lengths,
            size * max(1, args.n_gpu),
            image_tokens=found.image_tokens,
            max_texts=self.options.max_texts_per_row,
            accumulation=accumulation,
            seed=_seed(args),
            rank=args.process_index,
            world_size=args.world_size,
            shuffle=shuffle,
        )


def load_run_data(
    data_args: VLMDataArguments,
    training_args: TrainingArguments,
    family: Family,
    processor: Any,
    attn_implementation: str | None,
    load: Load = load_train_and_eval,
) -> RunData:
    """Load the data of a run, measure every text, and find which samples share an image.

    With ``streaming`` the first window stands for the training data, so that a mistake is found before weights load.

    Args:
        data_args: which data, and how images are reused.
        training_args: says with ``streaming`` which shards are this process's.
        family: the model's family.
        processor: its processor.
        attn_implementation: the attention code, where one was chosen.
        load: how the data are loaded where they are not streamed.

    Raises:
        VlmtuneError: data that cannot be loaded, too many bad rows, texts that are too long, or images that are to be
            shared and cannot be.
    """
    if data_args.streaming:
        check_streaming(data_args, training_args)
        shards, train, evaluation = find_shards(data_args), None, load_evaluation(data_args)
    else:
        shards, (train, evaluation) = None, load(data_args)
    share = shares_images(family, data_args.share_images, attn_implementation)
    collator = _collator(data_args, family, processor, share=share)
    train_rows, train_scan = _usable(train, collator, data_args, "training") if train else (None, None)
    eval_rows, eval_scan = _usable(evaluation, collator, data_args, "evaluation") if evaluation else (None, None)
    if share:
        train_rows = _with_keys(train_rows, train_scan, data_args) if train_scan is not None else None
        eval_rows = with_image_keys(eval_rows) if eval_rows is not None else None
    data = RunData(train, train_rows, train_scan, evaluation, eval_rows, eval_scan, collator, data_args)
    if shards is None:
        return data
    place = {"rank": training_args.process_index, "world_size": training_args.world_size}
    stream = Stream(shards, data_args, collator, seed=_seed(training_args), **place)
    logger.info(
        "streaming %s shards, %s MB, in %s windows an epoch of this process",
        *(f"{len(shards.files):,}", f"{sum(shards.sizes) / 1e6:,.0f}", f"{stream.per_epoch:,}"),
    )
    first = stream.prepare(0)
    stream.require_few_bad(len(first.bad), len(first.lengths) + len(first.left_out), first.bad)
    logger.info("window 0: %s", first.summary())
    return replace(data, train_rows=StreamRows(stream), stream=stream, first=first)


def _collator(data_args: VLMDataArguments, family: Family, processor: Any, *, share: bool) -> BaseVLMDataCollator:
    limits = {"max_texts_per_row": data_args.max_texts_per_row, "max_tokens_per_row": data_args.max_tokens_per_row}
    collator_class: Any = SharedImageCollator if share else BaseVLMDataCollator
    collator: BaseVLMDataCollator = collator_class(
        processor,
        family,
        max_length=data_args.max_length,
        on_too_long=data_args.on_too_long,
        max_pixels=data_args.max_pixels,
        image_timeout=data_args.image_timeout,
        **(limits if share else {}),
    )
    return collator


def _seed(args: TrainingArguments) -> int:
    return args.data_seed if args.data_seed is not None else args.seed


def _usable(
    data: LoadedData, collator: BaseVLMDataCollator, data_args: VLMDataArguments, name: str
) -> tuple[Any, Scan]:
    found = scan(data.dataset, collator.encoder, max_bad_fraction=data_args.max_bad_fraction)
    logger.info("%s data: %s", name, found.summary())
    dataset = data.dataset if len(found.kept) == len(data.dataset) else data.dataset.select(found.kept)
    return dataset, found


def _with_keys(dataset: Any, found: Scan, data_args: VLMDataArguments) -> Any:
    dataset = with_image_keys(dataset)
    measured = dataset.with_format("arrow")[:]["image_key"], found.lengths, found.image_tokens
    logger.info("sharing images: %s", describe_saving(*measured))
    check_row_limits(*measured, max_texts=data_args.max_texts_per_row, max_tokens=data_args.max_tokens_per_row)
    return dataset
