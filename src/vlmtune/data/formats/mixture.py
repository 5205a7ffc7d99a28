"""Several data sets as one: a YAML file that lists them under ``datasets``.

Each entry has a ``path`` and, where needed, ``format``, ``split``, ``image_dir``, ``prompt``, ``columns``,
``max_samples``, ``weight`` and ``name``. Weights say in which proportion samples are drawn; none is drawn twice, so the
data set that is the smallest for its weight is used whole. Without weights all samples are used. Draws depend on
``seed`` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vlmtune.data import hub
from vlmtune.data.formats.base import Format, Source
from vlmtune.data.formats.columns import renaming
from vlmtune.data.placing import Placer, absolute
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import Sample
from vlmtune.errors import DataError, nearest

SUFFIXES = (".yaml", ".yml")
OPTIONS: dict[str, type | tuple[type, ...]] = {
    "path": str,
    "name": str,
    "format": str,
    "split": str,
    "image_dir": str,
    "prompt": str,
    "columns": list,
    "max_samples": int,
    "weight": (int, float),
}


_KINDS: dict[Any, str] = {str: "text", list: "list"}


@dataclass(frozen=True)
class _Entry:
    """One data set of a mixture: where it lies, its format, and how much of it is used."""

    name: str
    place: Path
    format: Format
    split: str | None
    image_dir: Path | None
    prompt: str | None
    columns: dict[str, str]
    max_samples: int | None
    weight: float | None


def detect(path: Path) -> bool:
    """Whether a file is YAML with a list of data sets."""
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        return False
    try:
        return "datasets" in _content(path)
    except DataError:
        return False


def splits(path: Path) -> tuple[str, ...]:
    """Return the splits that every entry holds which names none of its own."""
    named = [entry.format.splits(entry.place) for entry in _entries(path)[0] if entry.split is None]
    return tuple(split for split in named[0] if all(split in other for other in named[1:])) if named else ()


def load(source: Source, quarantine: Quarantine) -> Iterator[Sample]:
    """Yield the samples of all entries, one entry after the other; ids begin with the entry's name."""
    entries, seed = _entries(source.path)
    if source.columns:
        raise DataError(f"columns cannot be set for {source.path} as a whole; set it for each data set there.")
    loaded = []
    for entry in entries:
        own = Quarantine()
        image_dir = entry.image_dir or source.image_dir
        # What the recipe asks is for those data sets that it fits.
        inherited = None if entry.format.prompt_problem(source.prompt) else source.prompt
        place = Source(entry.place, entry.split or source.split, image_dir, entry.prompt or inherited, entry.columns)
        loaded.append(list(Placer(entry.place, image_dir).samples(entry.format.load(place, own), own)))
        for row in own.rows:
            quarantine.add(f"{entry.name}/{row.id}", row.kind, row.reason)
    counts = _counts(entries, [len(samples) for samples in loaded])
    for number, (entry, samples, count) in enumerate(zip(entries, loaded, counts, strict=True)):
        chosen = np.sort(np.random.default_rng([seed, number]).permutation(len(samples))[:count])
        for place in chosen:
            one = samples[place]
            meta = {**one.meta, "dataset": entry.name}
            yield Sample(f"{entry.name}/{one.id}", one.images, one.messages, one.references, meta)


def _counts(entries: list[_Entry], sizes: list[int]) -> list[int]:
    """How many samples of each entry are used."""
    most = [min(size, entry.max_samples or size) for entry, size in zip(entries, sizes, strict=True)]
    if entries[0].weight is None:
        return most
    weights = [float(entry.weight or 0) for entry in entries]
    unit = min(count / weight for count, weight in zip(most, weights, strict=True))
    return [min(count, round(unit * weight)) for count, weight in zip(most, weights, strict=True)]


def _content(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}.") from error
    return content if isinstance(content, dict) else {}


def _entries(path: Path) -> tuple[list[_Entry], int]:
    """Read and check a mixture: its entries and its seed.

    Raises:
        DataError: something in the file is wrong; all of it in one message.
    """
    content = _content(path)
    rows, seed = content.get("datasets"), content.get("seed", 0)
    problems = [
        f"there is no option {name!r}.{nearest(name, ('datasets', 'seed'))}"
        for name in map(str, content)
        if name not in ("datasets", "seed")
    ]
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        problems.append(f"seed is {seed!r}; it takes a whole number from 0")
        seed = 0
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path}: datasets must list one data set or more, each with a path.")
    entries: list[_Entry] = []
    for number, row in enumerate(rows, 1):
        found = _entry(row)
        if isinstance(found, _Entry):
            entries.append(found)
        else:
            problems += [f"data set {number}: {problem}" for problem in found]
    names = [entry.name for entry in entries]
    problems += [
        f"two data sets have the name {name!r}; set name" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    weighted = sum(entry.weight is not None for entry in entries)
    if 0 < weighted < len(entries):
        problems.append("some data sets have a weight and some have none; give one to each, or to none")
    if problems:
        raise DataError("\n".join([f"{path} cannot be used:", *(f"  {problem}" for problem in problems)]))
    return entries, seed


def _entry(row: Any) -> _Entry | list[str]:
    """Return an entry, or what is wrong with it."""
    # They know all formats, this one too.
    from vlmtune.data.recognition import choose_format, resolve

    if isinstance(row, str):
        row = {"path": row}
    if not isinstance(row, dict):
        return [f"it is {row!r}; it takes a path, or options with one"]
    problems = [f"there is no option {name!r}.{nearest(str(name), OPTIONS)}" for name in row if name not in OPTIONS]
    problems += [
        f"{name} is {row[name]!r}, which is no {_KINDS.get(kind, 'number')}"
        for name, kind in OPTIONS.items()
        if name in row and (not isinstance(row[name], kind) or isinstance(row[name], bool))
    ]
    if "path" not in row:
        problems.append("it has no path")
    if not problems:
        problems = [
            f"{name} is {row[name]}; it must be above 0" for name in ("max_samples", "weight") if row.get(name, 1) <= 0
        ]
    if problems:
        return problems
    try:
        columns = renaming(row.get("columns", ()))
        place = resolve(row["path"])
        format = choose_format(place, row.get("format", "auto"))
    except DataError as error:
        return [str(error).splitlines()[0]]
    if format is FORMAT:
        return [f"{place} is a mixture itself; list its data sets here"]
    if problem := format.prompt_problem(row.get("prompt")) or format.columns_problem(columns):
        return [problem]
    folder = absolute(row["image_dir"]) if "image_dir" in row else None
    path = row["path"]
    name = row.get("name") or (hub.parse(path).name if hub.is_address(path) else absolute(path).stem)
    return _Entry(
        *(name, place, format, row.get("split"), folder),
        *(row.get("prompt"), columns, row.get("max_samples"), row.get("weight")),
    )


FORMAT = Format(
    name="mixture",
    looks_like="a .yaml file that lists data sets under 'datasets', each with a 'path'",
    detect=detect,
    splits=splits,
    load=load,
    asks=(),
)
