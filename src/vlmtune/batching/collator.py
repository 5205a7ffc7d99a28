"""Rows of a data set to the tensors of one batch.

Shape legend: B rows, L tokens of the longest row, N images or tiles, C channels, H height, W width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from vlmtune.batching.encode import EncodedSample, Encoder, TooLong
from vlmtune.batching.sampler import FILLER
from vlmtune.batching.sharing import collate_rows, group_samples, pack_rows
from vlmtune.data.images import TIMEOUT
from vlmtune.data.sample import Sample
from vlmtune.errors import ConfigError
from vlmtune.models.families import FAMILIES, get_family
from vlmtune.models.family import Family
from vlmtune.models.features import FeatureCache

IGNORE_INDEX = -100

Row = Mapping[str, Any]


class BaseVLMDataCollator:
    """Turns data set rows into a padded batch, ready for the model and any ``transformers.Trainer``.

    The batch holds ``input_ids`` (B, L), ``attention_mask`` (B, L), ``labels`` (B, L; -100 where nothing is
    supervised), for families that need them ``token_type_ids`` (B, L; 1 on image tokens), and the image
    processor's tensors, such as ``pixel_values`` (N, C, H, W), when any row has an image. Rows are padded
    on the right; generation pads on the left (see ``vlmtune.evaluation.generation``).

    Args:
        processor: the model's ``AutoProcessor``.
        family: a family record, or its name, such as ``"gemma"``.
        conversation_formatter: makes a :class:`Sample` of a row; replaces :meth:`format_conversation`, which
            can also be overridden in a subclass.
        max_length: most tokens of a sample; an image is never cut.
        on_too_long: ``error``, ``drop`` (an error here too: rows are dropped before training, where it is
            counted) or ``truncate_text``.
        max_pixels: pixel budget of the image decoder.
        image_timeout: seconds that an image may take to be read and decoded.
        pad_to_multiple_of: round L up to a multiple, for tensor cores.
        return_sample_ids: add ``sample_ids`` (a list of strings) for the trainer's messages; a plain
            ``transformers.Trainer`` would hand it to the model.
    """

    def __init__(
        self,
        processor: Any,
        family: Family | str,
        *,
        conversation_formatter: Callable[[Row], Sample] | None = None,
        max_length: int | None = None,
        on_too_long: TooLong = "error",
        max_pixels: int | None = None,
        image_timeout: float = TIMEOUT,
        pad_to_multiple_of: int | None = None,
        return_sample_ids: bool = False,
    ) -> None:
        self.processor = processor
        self.family = get_family(family)
        self.encoder = Encoder(
            processor,
            self.family,
            max_length=max_length,
            on_too_long=on_too_long,
            max_pixels=max_pixels,
            image_timeout=image_timeout,
        )
        self.conversation_formatter = conversation_formatter
        self.pad_to_multiple_of = pad_to_multiple_of
        self.return_sample_ids = return_sample_ids

    def format_conversation(self, row: Row) -> Sample:
        """Make a sample of a row; override it, or pass ``conversation_formatter``, for rows of another form."""
        return Sample.from_row(row)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Encode and pad ``rows``; errors as :meth:`vlmtune.batching.encode.Encoder.__call__` raises them."""
        to_sample = self.conversation_formatter or self.format_conversation
        batch = self.collate([self.encoder(to_sample(row)) for row in rows])
        if any(row.get(FILLER) for row in rows):
            batch["target_weights"] = torch.zeros(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()))
        return batch

    def collate(self, samples: Sequence[EncodedSample]) -> dict[str, Any]:
        """Pad encoded samples on the right and join their images."""
        batch = pad(
            samples,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            side="right",
            multiple_of=self.pad_to_multiple_of,
            token_type_ids=self.family.needs_token_type_ids,
            family=self.family,
        )
        labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        for index, sample in enumerate(samples):
            flags = torch.tensor(sample.supervised)
            row = batch["input_ids"][index, : len(flags)]
            labels[index, : len(flags)] = torch.where(flags, row, IGNORE_INDEX)
        batch["labels"] = labels
        batch.update(join_images(samples, self.family))
        if self.return_sample_ids:
            batch["sample_ids"] = [sample.id for sample in samples]
        return batch


class SharedImageCollator(BaseVLMDataCollator):
    """Lays the samples of one image in one row, so that the image is computed once for all of them.

    For :class:`~vlmtune.training.trainer.MemoryEfficientTrainer`, which makes the masks; a batch is as
    :func:`~vlmtune.batching.sharing.collate_rows` returns it, with the images' tensors or, when all of them are
    in the cache, their ``image_features`` (images, tokens, features), a list where
    images have different numbers of tokens.

    Rows name their images in the column ``image_key``; without it each sample is a group of its own.

    Args:
        *args: as :class:`BaseVLMDataCollator`.
        cache: features of a frozen tower; images found there are not decoded.
        max_texts_per_row: most samples in one row's group.
        max_tokens_per_row: most tokens of a group's row; larger groups are split evenly.
        **options: as :class:`BaseVLMDataCollator`.
    """

    def __init__(
        self,
        *args: Any,
        cache: FeatureCache | None = None,
        max_texts_per_row: int | None = None,
        max_tokens_per_row: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.cache = cache
        self.max_texts_per_row = max_texts_per_row
        self.max_tokens_per_row = max_tokens_per_row

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Encode the texts, group them by image, and decode each group's images once."""
        to_sample = self.conversation_formatter or self.format_conversation
        samples, sources = [], {}
        for row in rows:
            sample = to_sample(row)
            key = tuple(str(row.get("image_key") or "").split())
            encoded = dataclasses.replace(self.encoder(sample, pixels=False), image_key=key)
            samples.append(encoded)
            sources[id(encoded)] = sample
        groups = group_samples(samples, max_texts=self.max_texts_per_row, max_tokens=self.max_tokens_per_row)
        packed = pack_rows(groups)
        batch = collate_rows(
            packed, pad_token_id=self.processor.tokenizer.pad_token_id, multiple_of=self.pad_to_multiple_of
        )
        firsts = [group[0] for row in packed for group in row.members if group[0].n_images]
        keys = [key for sample in firsts for key in sample.image_key]
        if self.cache is not None and keys and all(key in self.cache for key in keys):
            features = [self.cache.get(key) for key in keys]
            batch["image_features"] = features if self.family.sized else torch.stack(features)
        elif firsts:
            with_pixels = [
                dataclasses.replace(sample, image_inputs=self.encoder.images(sources[id(sample)])) for sample in firsts
            ]
            batch.update(join_images(with_pixels, self.family))
        batch["sample_ids"] = [sample.id for row in packed for group in row.members for sample in group]
        if any(row.get(FILLER) for row in rows):
            batch["target_weights"].zero_()
        types = batch.pop("token_type_ids")
        # Where positions have several axes, the model takes the types for nothing but to compute those.
        if self.family.needs_token_type_ids and "axes" not in batch:
            batch[self.family.token_types_name] = types
        return batch


def pad(
    samples: Sequence[EncodedSample],
    *,
    pad_token_id: int,
    side: str,
    multiple_of: int | None = None,
    token_type_ids: bool = True,
    family: Family | None = None,
) -> dict[str, Any]:
    """Pad token ids, attention mask and token types to one length.

    Args:
        samples: at least one.
        pad_token_id: id in the padding.
        side: ``right`` for training, ``left`` for generation.
        multiple_of: round the length up to a multiple.
        token_type_ids: include ``token_type_ids``.
        family: says under which name token types go, and what they mean; the image tokens' by default.
    """
    length = max(len(sample.input_ids) for sample in samples)
    if multiple_of:
        length = -(-length // multiple_of) * multiple_of
    types_name = family.token_types_name if family else "token_type_ids"
    columns = {"input_ids": pad_token_id, "attention_mask": 0} | ({types_name: 0} if token_type_ids else {})
    batch: dict[str, Any] = {name: torch.full((len(samples), length), fill) for name, fill in columns.items()}
    for index, sample in enumerate(samples):
        n = len(sample.input_ids)
        span = slice(0, n) if side == "right" else slice(length - n, length)
        batch["input_ids"][index, span] = torch.tensor(sample.input_ids)
        batch["attention_mask"][index, span] = 1
        if token_type_ids:
            answers = family is not None and family.attention == "prefix"
            types = sample.supervised if answers else sample.token_type_ids
            batch[types_name][index, span] = torch.tensor(types, dtype=torch.long)
    return batch


def join_images(samples: Sequence[EncodedSample], family: Family) -> dict[str, Any]:
    """Join the image tensors of all samples, in the order of the image tokens.

    They are joined along ``family.image_axis``; where images differ in another axis, such as the number of tiles,
    zeros fill the rest, as the image processor itself does.
    """
    given = [sample.image_inputs for sample in samples if sample.image_inputs]
    if not given:
        return {}
    found = {name: [torch.as_tensor(inputs[name]) for inputs in given] for name in family.image_inputs}
    return {name: _join(tensors, min(family.image_axis, tensors[0].dim() - 1)) for name, tensors in found.items()}


def _join(tensors: list[torch.Tensor], axis: int) -> torch.Tensor:
    largest = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        shape = [n if i == axis else most for i, (n, most) in enumerate(zip(tensor.shape, largest, strict=True))]
        if list(tensor.shape) != shape:
            smaller, tensor = tensor, tensor.new_zeros(shape)
            tensor[tuple(slice(0, n) for n in smaller.shape)] = smaller
        padded.append(tensor)
    return torch.cat(padded, dim=axis)


def create_data_collator(processor: Any, model_type: str = "gemma", **options: Any) -> BaseVLMDataCollator:
    """Make the collator for a model type.

    Args:
        processor: the model's ``AutoProcessor``.
        model_type: a family's name or alias, such as ``"gemma"``.
        **options: options of :class:`BaseVLMDataCollator`.

    Raises:
        UnsupportedModelError: the model type is unknown; the message offers the nearest name.
        ConfigError: the processor is of another family.
    """
    family = get_family(model_type)
    found = type(processor).__name__
    if found != family.processor_class:
        fitting = ", ".join(other.name for other in FAMILIES.values() if other.processor_class == found)
        raise ConfigError(
            f"model_type={model_type!r} goes with a {family.processor_class}; this is a {found}, "
            f"{f'of {fitting}' if fitting else 'which is of no known family'}."
        )
    return BaseVLMDataCollator(processor, family, **options)
