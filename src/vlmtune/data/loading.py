"""From a folder or file to a data set: recognise the format, read it, set bad rows aside, check every image."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa
from rich.progress import track

from vlmtune.data import images
from vlmtune.data.formats import Source
from vlmtune.data.formats.base import DEFAULT_CAPTION_PROMPT
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.recognition import choose_format, resolve
from vlmtune.data.sample import TYPE_FIELDS, ImageRef, Sample
from vlmtune.data.splitting import held_out
from vlmtune.errors import DataError, nearest

logger = logging.getLogger("vlmtune.data")

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "images": pa.list_(pa.struct({"path": pa.string(), "bytes": pa.binary()})),
        "messages": pa.list_(
            pa.struct(
                {
                    "role": pa.string(),
                    "content": pa.list_(pa.struct({"type": pa.string(), "text": pa.string()})),
                }
            )
        ),
        "references": pa.list_(pa.string()),
        "meta": pa.string(),
    }
)
ROWS_AT_ONCE = 10_000
PROGRESS_FROM = 5_000


@dataclass(frozen=True)
class LoadedData:
    """A data set and how it came about.

    Attributes:
        dataset: rows in :meth:`~vlmtune.data.sample.Sample.to_row`'s form.
        quarantine: rows set aside, with reasons.
        format: the format's name.
        source: the folder or file, and the split where one was read.
    """

    dataset: datasets.Dataset
    quarantine: Quarantine
    format: str
    source: str


class DataOptions(Protocol):
    """The options that say which data; :class:`vlmtune.config.VLMDataArguments` has them."""

    dataset_path: str
    dataset_format: str
    train_split: str | None
    eval_split: str | None
    eval_dataset_path: str | None
    image_dir: str | None
    prompt: str | None
    max_train_samples: int | None
    max_eval_samples: int | None
    validation_fraction: float
    split_seed: int
    max_bad_fraction: float
    verify_images: images.Check
    max_pixels: int | None


def load_samples(
    path: str | Path,
    *,
    format: str = "auto",
    split: str | None = None,
    image_dir: str | Path | None = None,
    prompt: str | None = None,
    max_bad_fraction: float = 0.01,
    verify_images: images.Check = "header",
    max_pixels: int | None = None,
) -> LoadedData:
    """Read data in any known format.

    Args:
        path: a folder or file, or ``easy-vqa`` for the installed package.
        format: a format's name, or ``auto`` to recognise it.
        split: the split to read; ``None`` reads everything.
        image_dir: folder of the images, where they lie elsewhere.
        prompt: what the user asks about an image in caption data.
        max_bad_fraction: largest share of rows that may be set aside.
        verify_images: as :func:`vlmtune.data.images.check`.
        max_pixels: larger images are refused.

    Raises:
        DataError: nothing is there, the format is unknown, no sample is left, or too many rows are bad.
    """
    place = resolve(path)
    chosen = choose_format(place, format)
    folder = None if image_dir is None else Path(image_dir).expanduser()
    source = Source(place, split, folder, prompt or DEFAULT_CAPTION_PROMPT)
    name = f"{path}, split {split}" if split else str(path)
    quarantine = Quarantine()
    samples = list(_unique(chosen.load(source, quarantine), quarantine))
    total = len(samples) + len(quarantine)
    if not total:
        raise DataError(f"{name} holds no samples in the format {chosen.name} ({chosen.looks_like}).")
    samples = list(_with_good_images(samples, quarantine, verify_images, max_pixels))
    quarantine.require_below(max_bad_fraction, total, name)
    if not samples:
        raise DataError(f"No row of {name} can be used; all were set aside ({quarantine.summary()}).")
    return LoadedData(_dataset(samples), quarantine, chosen.name, name)


def load_train_and_eval(options: DataOptions) -> tuple[LoadedData, LoadedData | None]:
    """Read the training data, and the evaluation data where the options name any.

    Data without splits can be split by image (``validation_fraction``), so that no image is on both sides.
    """
    train_split = options.train_split
    if train_split is None:
        place = resolve(options.dataset_path)
        train_split = "train" if "train" in choose_format(place, options.dataset_format).splits(place) else None
    train = _load(options, options.dataset_path, train_split)
    evaluation: LoadedData | None = None
    if options.validation_fraction:
        train, evaluation = split_by_image(train, options.validation_fraction, options.split_seed)
    elif options.eval_split or options.eval_dataset_path:
        evaluation = _load(options, options.eval_dataset_path or options.dataset_path, options.eval_split)
    if evaluation is not None:
        evaluation = subset(evaluation, options.max_eval_samples, options.split_seed)
    return subset(train, options.max_train_samples, options.split_seed), evaluation


def _load(options: DataOptions, path: str, split: str | None) -> LoadedData:
    return load_samples(
        path,
        format=options.dataset_format,
        split=split,
        image_dir=options.image_dir,
        prompt=options.prompt,
        max_bad_fraction=options.max_bad_fraction,
        verify_images=options.verify_images,
        max_pixels=options.max_pixels,
    )


def subset(data: LoadedData, count: int | None, seed: int) -> LoadedData:
    """Draw ``count`` rows by ``seed``, in their own order; the same rows on every machine."""
    if count is None or count >= len(data.dataset):
        return data
    chosen = np.sort(np.random.default_rng(seed).permutation(len(data.dataset))[:count])
    return LoadedData(data.dataset.select(chosen), data.quarantine, data.format, data.source)


def stratified(data: LoadedData, count: int | None, seed: int) -> LoadedData:
    """Draw ``count`` rows by ``seed`` with each question type in its share; as :func:`subset` where none is known.

    Shares are rounded by the largest remainder; of equal ones the type that comes first in the alphabet is favoured.
    """
    if count is None or count >= len(data.dataset):
        return data
    places: dict[str, list[int]] = {}
    for index, meta in enumerate(data.dataset["meta"]):
        known = json.loads(meta) if isinstance(meta, str) else meta or {}
        places.setdefault(str(next((known[name] for name in TYPE_FIELDS if known.get(name)), "")), []).append(index)
    kinds = sorted(places)
    shares = [count * len(places[kind]) / len(data.dataset) for kind in kinds]
    left = count - sum(map(int, shares))
    ups = set(sorted(range(len(kinds)), key=lambda i: int(shares[i]) - shares[i])[:left])
    rng = np.random.default_rng(seed)
    chosen = [
        place
        for i, kind in enumerate(kinds)
        for place in rng.permutation(places[kind])[: int(shares[i]) + (i in ups)].tolist()
    ]
    return LoadedData(data.dataset.select(sorted(chosen)), data.quarantine, data.format, data.source)


def split_by_image(data: LoadedData, fraction: float, seed: int) -> tuple[LoadedData, LoadedData]:
    """Hold out a share of the images, each with all its texts, as :func:`vlmtune.data.splitting.held_out` chooses.

    Raises:
        DataError: no image is left for one side.
    """
    names = _contents(data.dataset)
    sides: tuple[list[int], list[int]] = ([], [])
    for index, is_held_out in enumerate(held_out(names, fraction, seed)):
        sides[is_held_out].append(index)
    if not all(sides):
        side = "evaluation" if sides[0] else "training"
        raise DataError(
            f"validation_fraction {fraction:g} leaves no image of {data.source} for {side}. Choose another share, or "
            "name an evaluation split."
        )
    kept, other = (data.dataset.select(side) for side in sides)
    rest = LoadedData(kept, data.quarantine, data.format, data.source)
    return rest, LoadedData(other, Quarantine(), data.format, f"{data.source}, held out")


def _contents(dataset: datasets.Dataset) -> list[list[str]]:
    """Return a name by its content of each row's images, or of its text where it has none."""
    names: list[list[str]] = []
    of_file: dict[ImageRef, str] = {}
    with ThreadPoolExecutor(8) as pool:
        for batch in dataset.select_columns(["images", "messages"]).with_format(None).iter(1000):
            rows = [[ImageRef(**image) for image in row] for row in batch["images"]]
            new = list(dict.fromkeys(ref for row in rows for ref in row if ref not in of_file))
            found = of_file | dict(zip(new, pool.map(images.content_hash, new), strict=True))
            # Images given as bytes are not kept.
            of_file |= {ref: found[ref] for ref in new if ref.bytes is None}
            texts = (hashlib.sha256(repr(messages).encode()).hexdigest() for messages in batch["messages"])
            names += [[found[ref] for ref in row] or [text] for row, text in zip(rows, texts, strict=True)]
    return names


def fingerprint(dataset: datasets.Dataset) -> str:
    """Return a hash of the rows' contents and order (of image names, not pixels), the same on every machine."""
    digest = hashlib.sha256()
    for batch in dataset.select_columns(["id", "images", "messages", "references"]).with_format(None).iter(1000):
        batch["images"] = [[_image_name(image) for image in row] for row in batch["images"]]
        digest.update(repr(batch).encode())
    return digest.hexdigest()[:16]


def _unique(samples: Iterator[Sample], quarantine: Quarantine) -> Iterator[Sample]:
    """Set aside samples that repeat another's images and texts, or its id."""
    seen: dict[Any, str] = {}
    ids: set[str] = set()
    for sample in samples:
        content = hash((sample.images, sample.messages))
        if content in seen:
            quarantine.add(sample.id, "duplicate", f"it has the same images and texts as {seen[content]}")
        elif sample.id in ids:
            quarantine.add(sample.id, "repeated id", f"another sample has the id {sample.id!r}")
        else:
            seen[content] = sample.id
            ids.add(sample.id)
            yield sample


def _with_good_images(
    samples: list[Sample], quarantine: Quarantine, how: images.Check, max_pixels: int | None
) -> Iterator[Sample]:
    refs = list(dict.fromkeys(image for sample in samples for image in sample.images))
    with ThreadPoolExecutor(8) as pool:
        found: Iterable[str | None] = pool.map(partial(images.check, how=how, max_pixels=max_pixels), refs)
        if len(refs) >= PROGRESS_FROM:
            found = track(found, description="Checking images", total=len(refs), transient=True)
        problems = {ref: problem for ref, problem in zip(refs, found, strict=True) if problem}
    for sample in samples:
        problem = next((problems[image] for image in sample.images if image in problems), None)
        if problem is None:
            yield sample
        else:
            kind = "missing image" if "does not exist" in problem else "unreadable image"
            quarantine.add(sample.id, kind, problem)


def _dataset(samples: list[Sample]) -> datasets.Dataset:
    rows = iter(samples)
    tables = []
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        tables.append(pa.Table.from_pylist([sample.to_row() for sample in chunk], schema=SCHEMA))
    return datasets.Dataset(pa.concat_tables(tables) if tables else SCHEMA.empty_table())


def _image_name(image: dict[str, Any]) -> str:
    if image.get("path"):
        return Path(image["path"]).name
    return hashlib.sha256(image["bytes"]).hexdigest()


class GenericVLMDatasetLoader:
    """Reads a data set in whichever known format it lies."""

    @staticmethod
    def load(dataset_path: str, **options: Any) -> datasets.Dataset:
        """Recognise the format and return the training rows.

        Args:
            dataset_path: a folder, a file, or ``easy-vqa``.
            **options: any of the fields of ``VLMDataArguments``; those that do not concern reading are passed over,
                so that ``load(**vars(data_args))`` works.

        Returns:
            A data set with the columns ``id``, ``images``, ``messages``, ``references`` and ``meta``.

        Raises:
            DataError: nothing is there, the format is unknown, or too many rows are bad; the message names them.
        """
        return load_train_and_eval(_options(dataset_path, options))[0].dataset


class FlickrDatasetLoader:
    """Reads Flickr8k, Flickr30k and folders laid out like them, passing over rows and files that are bad."""

    @staticmethod
    def load(dataset_path: str, **options: Any) -> datasets.Dataset:
        """Return the training rows of a Flickr-style folder; as :meth:`GenericVLMDatasetLoader.load`."""
        return load_train_and_eval(_options(dataset_path, options | {"dataset_format": "flickr"}))[0].dataset


def _options(dataset_path: str, options: dict[str, Any]) -> DataOptions:
    from vlmtune.config import VLMDataArguments

    known = set(VLMDataArguments.__dataclass_fields__)
    unknown = next((name for name in options if name not in known and not name.startswith("_")), None)
    if unknown:
        raise DataError(f"{unknown} is not an option of data loading.{nearest(unknown, known)}")
    return VLMDataArguments(dataset_path=dataset_path, **{k: v for k, v in options.items() if k in known})
