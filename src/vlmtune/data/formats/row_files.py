"""Formats of JSON rows: each is told by the keys of its first row alone, the files and splits are the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from vlmtune.data.formats.base import Format, Source
from vlmtune.data.formats.files import chosen, first_keys, id_prefix, json_rows, plain_name, samples_of
from vlmtune.data.formats.rows import make_sample
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import Sample

SUFFIXES = (".jsonl", ".json")


def row_format(*, name: str, looks_like: str, wants: Callable[[Collection[str]], bool]) -> Format:
    """Make a format of JSON lines or lists, a file or a folder of files.

    Args:
        name: the format's name.
        looks_like: one line on its files.
        wants: whether rows with these keys are of this format.
    """

    def is_mine(file: Path) -> bool:
        return plain_name(file).lower().endswith(SUFFIXES) and wants(first_keys(file))

    def files(folder: Path) -> dict[str, Path]:
        found = [file for file in sorted(folder.iterdir()) if file.is_file() and is_mine(file)]
        stems = [Path(plain_name(file)).stem for file in found]
        # train.json beside train.jsonl: each goes by its whole name.
        return {stem if stems.count(stem) == 1 else file.name: file for stem, file in zip(stems, found, strict=True)}

    def detect(path: Path) -> bool:
        return bool(files(path)) if path.is_dir() else is_mine(path)

    def splits(path: Path) -> tuple[str, ...]:
        return tuple(files(path)) if path.is_dir() else ()

    def load(source: Source, quarantine: Quarantine) -> Iterator[Sample]:
        found = files(source.path) if source.path.is_dir() else {"": source.path}
        for split, file in chosen(source, found):
            yield from _load_file(file, id_prefix(split), source, quarantine)

    return Format(name=name, looks_like=looks_like, detect=detect, splits=splits, load=load, asks=())


def _load_file(file: Path, prefix: str, source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    images = source.image_dir or file.parent
    numbered = ((place, (number, row)) for place, number, row in json_rows(file, quarantine))
    yield from samples_of(
        numbered,
        lambda _, item: make_sample(item[1], f"{prefix}{item[0]}", images, source),
        quarantine,
    )
