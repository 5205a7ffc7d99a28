"""From a folder or file to a data set: recognise the format, read it, set bad rows aside, check every image."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track

from vlmtune.data import images, remote
from vlmtune.data.boxes import BOXES, METRICS
from vlmtune.data.formats import FORMATS, Source
from vlmtune.data.formats.columns import renaming
from vlmtune.data.hashes import row_hashes
from vlmtune.data.pages import batches, number_of_batches
from vlmtune.data.placing import Placer, absolute
from vlmtune.data.progress import shows_progress
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.recognition import choose_format, resolve
from vlmtune.data.sample import TYPE_FIELDS, ImageRef
from vlmtune.data.splitting import held_out
from vlmtune.data.store import Store
from vlmtune.errors import DataError, nearest

logger = logging.getLogger("vlmtune.data")

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

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics that answers are scored with by default: the format's, or those of boxes where all answers are."""
        tasks = {json.loads(meta or "{}").get(BOXES, {}).get("task") for meta in self.dataset["meta"]}
        task = tasks.pop() if len(tasks) == 1 else None
        return METRICS[task] if task else FORMATS[self.format].metrics


class DataOptions(Protocol):
    """The options that say which data; :class:`vlmtune.config.VLMDataArguments` has them."""

    dataset_path: str
    dataset_format: str
    train_split: str | None
    eval_split: str | None
    eval_dataset_path: str | None
    image_dir: str | None
    prompt: str | None
    columns: list[str] | None
    max_train_samples: int | None
    max_eval_samples: int | None
    validation_fraction: float
    split_seed: int
    streaming: bool
    max_bad_fraction: float
    verify_images: images.Check
    max_pixels: int | None
    allow_remote_images: bool
    private_image_hosts: list[str] | None
    image_timeout: float


def load_samples(
    path: str | Path,
    *,
    format: str = "auto",
    split: str | None = None,
    image_dir: str | Path | None = None,
    prompt: str | None = None,
    columns: Sequence[str] = (),
    max_bad_fraction: float = 0.01,
    verify_images: images.Check = "header",
    max_pixels: int | None = None,
    allow_remote_images: bool = False,
    private_image_hosts: Sequence[str] = (),
    image_timeout: float = images.TIMEOUT,
) -> LoadedData:
    """Read data in any known format.

    Args:
        path: a folder or file, or ``easy-vqa`` for the installed package.
        format: a format's name, or ``auto`` to recognise it.
        split: the split to read; ``None`` reads everything.
        image_dir: folder of the images, where they lie elsewhere.
        prompt: what the user asks about an image; in question data with ``{question}`` for each row's own.
        columns: ``NAME=COLUMN`` pairs, for rows that call by another name what vlmtune reads.
        max_bad_fraction: largest share of rows that may be set aside.
        verify_images: as :func:`vlmtune.data.images.check`.
        max_pixels: larger images are refused.
        allow_remote_images: download images that rows name by web address; else such rows are set aside.
        private_image_hosts: hosts of this machine or its private network that such addresses may lead to.
        image_timeout: seconds that an image may take to be read.

    Raises:
        DataError: nothing is there, the format is unknown, no sample is left, or too many rows are bad.
    """
    place = resolve(path)
    chosen = choose_format(place, format)
    folder = None if image_dir is None else absolute(image_dir)
    if problem := chosen.prompt_problem(prompt) or chosen.columns_problem(columns):
        raise DataError(f"{problem}.")
    source = Source(place, split, folder, prompt, renaming(columns))
    name = f"{path}, split {split}" if split else str(path)
    quarantine = Quarantine()
    placer = Placer(place, folder)
    store = Store()
    local = remote.Downloader(private_image_hosts).samples if allow_remote_images else remote.refuse
    store.add_all(local(placer.samples(chosen.load(source, quarantine), quarantine), quarantine), quarantine)
    dataset = store.dataset()
    total = len(dataset) + len(quarantine)
    if not total:
        raise DataError(f"{name} holds no samples in the format {chosen.name} ({chosen.looks_like}).")
    bad = store.repeats(dataset, quarantine)
    dataset = store.with_own_ids(dataset, bad)
    bad |= _with_bad_images(
        dataset,
        bad,
        quarantine,
        partial(images.check_all, how=verify_images, max_pixels=max_pixels, timeout=image_timeout),
    )
    quarantine.require_below(max_bad_fraction, total, name)
    if bad.all():
        raise DataError(
            f"No row of {name} can be used; all were set aside ({quarantine.summary()}):\n{quarantine.listed()}"
        )
    return LoadedData(dataset.select(np.flatnonzero(~bad)) if bad.any() else dataset, quarantine, chosen.name, name)


def load_train_and_eval(options: DataOptions) -> tuple[LoadedData, LoadedData | None]:
    """Read the training data, and the evaluation data where the options name any.

    Data without splits can be split by image (``validation_fraction``), so that no image is on both sides.
    """
    train_split = options.train_split
    if train_split is None:
        place = resolve(options.dataset_path)
        train_split = "train" if "train" in choose_format(place, options.dataset_format).splits(place) else None
    train = load_split(options, options.dataset_path, train_split)
    if options.validation_fraction:
        train, evaluation = split_by_image(train, options.validation_fraction, options.split_seed)
        return subset(train, options.max_train_samples, options.split_seed), _evaluated(evaluation, options)
    return subset(train, options.max_train_samples, options.split_seed), load_evaluation(options)


def load_evaluation(options: DataOptions) -> LoadedData | None:
    """Read the evaluation data, where the options name a split or data of its own for it."""
    if not (options.eval_split or options.eval_dataset_path):
        return None
    path = options.eval_dataset_path or options.dataset_path
    return _evaluated(load_split(options, path, options.eval_split), options)


def _evaluated(data: LoadedData, options: DataOptions) -> LoadedData:
    return subset(data, options.max_eval_samples, options.split_seed)


def load_split(options: DataOptions, path: str, split: str | None) -> LoadedData:
    """Read one split of the data at a path, as the options say."""
    return load_samples(
        path,
        format=options.dataset_format,
        split=split,
        image_dir=options.image_dir,
        prompt=options.prompt,
        columns=options.columns or (),
        max_bad_fraction=options.max_bad_fraction,
        verify_images=options.verify_images,
        max_pixels=options.max_pixels,
        allow_remote_images=options.allow_remote_images,
        private_image_hosts=options.private_image_hosts or (),
        image_timeout=options.image_timeout,
    )


def subset(data: LoadedData, count: int | None, seed: int) -> LoadedData:
    """Draw ``count`` rows by ``seed``, in their own order; the same rows on every machine."""
    if count is None or count >= len(data.dataset):
        return data
    chosen = drawn(len(data.dataset), count, seed)
    return LoadedData(data.dataset.select(chosen), data.quarantine, data.format, data.source)


def drawn(total: int, count: int | None, seed: int) -> npt.NDArray[np.int64]:
    """Return which of ``total`` rows are drawn by ``seed``, in their own order; all of them without a smaller count."""
    if count is None or count >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).permutation(total)[:count])


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
    hashes = chain.from_iterable(row_hashes(dataset))
    return [
        found or [hashlib.sha256(repr(row["messages"]).encode()).hexdigest()]
        for found, row in zip(hashes, dataset.select_columns(["messages"]), strict=True)
    ]


def _with_bad_images(
    dataset: datasets.Dataset,
    passed_over: npt.NDArray[np.bool_],
    quarantine: Quarantine,
    check: Callable[[Sequence[ImageRef]], list[str | None]],
) -> npt.NDArray[np.bool_]:
    """Set aside the rows with an image that cannot be used; returns (N,) which they are."""
    bad = np.zeros(len(dataset), dtype=bool)
    checked: set[int] = set()
    problems: dict[ImageRef, str] = {}
    parts: Iterable[tuple[int, Any]] = batches(dataset, ["id", "images"])
    if len(dataset) >= PROGRESS_FROM and shows_progress():
        bar = partial(track, total=number_of_batches(dataset), console=Console(stderr=True))
        parts = bar(parts, description="Checking images", transient=True)
    for start, batch in parts:
        refs = [tuple(ImageRef(**image) for image in row) for row in batch["images"].to_pylist()]
        new = [ref for ref in dict.fromkeys(chain.from_iterable(refs)) if hash(ref) not in checked]
        # Of an image that was checked its hash is kept alone: the names of millions of them take gigabytes.
        checked.update(map(hash, new))
        found = check(new)
        problems |= {ref: problem for ref, problem in zip(new, found, strict=True) if problem}
        if not problems:
            continue
        for index, row in enumerate(refs, start):
            problem = next((problems[ref] for ref in row if ref in problems), None)
            if problem is not None and not passed_over[index]:
                bad[index] = True
                kind = "missing image" if "does not exist" in problem else "unreadable image"
                quarantine.add(batch["id"][index - start].as_py(), kind, problem)
    return bad


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
