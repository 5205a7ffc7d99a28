"""Broken files of every format: a named error or a named quarantine, never a traceback or a silent skip."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from vlmtune.data.formats import FORMATS
from vlmtune.data.loading import load_samples
from vlmtune.errors import VlmtuneError

VALUES: list[Any] = [
    None,
    0,
    -1,
    1e308,
    True,
    "",
    " ",
    "../../etc/passwd",
    "\x00",
    "x" * 5000,
    "<image>",
    [],
    {},
    [[]],
    [{}],
]


def annotation_file(place: Path, rng: random.Random) -> Path:
    if place.is_file():
        return place
    known = {".json", ".jsonl", ".csv", ".txt", ".parquet", ".tar"}
    # Where the folders' names are the annotations, an image.
    return rng.choice(sorted(file for file in place.rglob("*") if file.suffix in known) or sorted(place.rglob("*.jpg")))


def altered(value: Any, rng: random.Random) -> Any:
    """Replace one value, at any depth, by another type's."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        return (
            {**value, key: altered(value[key], rng)}
            if rng.random() < 0.8
            else {k: v for k, v in value.items() if k != key}
        )
    if isinstance(value, list) and value and rng.random() < 0.85:
        index = rng.randrange(len(value))
        return [altered(item, rng) if number == index else item for number, item in enumerate(value)]
    return rng.choice(VALUES)


def broken(content: bytes, rng: random.Random) -> bytes:
    how = rng.randrange(5)
    if how == 0:
        return content[: rng.randrange(len(content))]
    if how == 1:
        place = rng.randrange(len(content))
        return content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]
    if how == 2:
        return content.decode("latin-1").encode("utf-16")
    if how == 3:
        return b""
    place = rng.randrange(len(content))
    return content[:place] + b"\xff\x00" + content[place:]


# The last six are kept since they once ended in tracebacks.
CASES = [(by, name, seed) for by in ("bytes", "values") for name in FORMATS for seed in range(9)] + [
    *(("values", "chartqa", seed) for seed in (27, 55, 62)),
    *(("values", "docvqa", seed) for seed in (63, 73)),
    ("values", "scienceqa", 74),
]


@pytest.mark.parametrize(("by", "name", "seed"), CASES)
def test_broken_files_end_in_named_errors(layouts: Any, name: str, seed: int, by: str) -> None:
    rng = random.Random(f"{name}{seed}{by}")
    place = getattr(layouts, name)()
    file = annotation_file(place, rng)
    content = file.read_bytes()
    if by == "bytes" or file.suffix not in (".json", ".jsonl"):
        file.write_bytes(broken(content, rng))
    else:
        rows = [json.loads(line) for line in content.splitlines()]
        file.write_text("\n".join(json.dumps(altered(row, rng)) for row in rows))
    for chosen in ("auto", name):
        try:
            data = load_samples(place, format=chosen, max_bad_fraction=1)
        except VlmtuneError as error:
            assert str(error)
        else:
            assert len(data.dataset) and all(row.id and row.reason for row in data.quarantine.rows)
