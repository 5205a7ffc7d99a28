"""Several data sets as one: how much of each, what each brings of its own, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlmtune.data.loading import load_samples, split_by_image
from vlmtune.data.recognition import choose_format
from vlmtune.data.sample import Sample
from vlmtune.errors import DataError


@pytest.fixture
def mix(tmp_path: Path):
    """Write a mixture of the given entries."""

    def write(*entries: Any, **options: Any) -> Path:
        path = tmp_path / "mix.yaml"
        path.write_text(yaml.safe_dump({"datasets": list(entries), **options}))
        return path

    return write


@pytest.fixture
def rows(tmp_path: Path):
    """Write a file of conversations without images; in "big" 40 of them, in "small" 10."""

    def write(name: str, count: int) -> str:
        lines = []
        for number in range(count):
            turns = [("user", f"{name} {number}?"), ("assistant", f"{number}")]
            messages = [{"role": role, "content": text} for role, text in turns]
            lines.append(json.dumps({"id": str(number), "messages": messages}))
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write


def names(path: Path, **options: Any) -> list[str]:
    return load_samples(path, **options).dataset["id"][:]


def counts(path: Path) -> dict[str, int]:
    return dict(Counter(name.partition("/")[0] for name in names(path)))


def test_everything_by_default(mix, rows) -> None:
    path = mix(rows("big", 40), {"path": rows("small", 10), "name": "little"})
    assert counts(path) == {"big": 40, "little": 10}
    sample = Sample.from_row(load_samples(path).dataset[45])
    assert (sample.id, sample.meta) == ("little/5", {"dataset": "little"})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (({"weight": 1}, {"weight": 1}), {"big": 10, "small": 10}),
        (({"weight": 3}, {"weight": 1}), {"big": 30, "small": 10}),
        (({"weight": 8}, {"weight": 0.5}), {"big": 40, "small": 2}),
        (({"weight": 1, "max_samples": 5}, {"weight": 1}), {"big": 5, "small": 5}),
        (({"max_samples": 7}, {}), {"big": 7, "small": 10}),
        (({"max_samples": 700}, {}), {"big": 40, "small": 10}),
    ],
)
def test_how_much_of_each(options, expected, mix, rows) -> None:
    big, small = (
        {"path": rows(*which)} | own for which, own in zip((("big", 40), ("small", 10)), options, strict=True)
    )
    assert counts(mix(big, small)) == expected


def test_draws_depend_on_the_seed_alone(mix, rows) -> None:
    entries = {"path": rows("big", 40), "max_samples": 20}, {"path": rows("small", 10), "max_samples": 5}
    first = names(mix(*entries))
    assert first == names(mix(*entries)) != names(mix(*entries, seed=1))
    assert len(set(first)) == 25


def test_each_has_its_own_prompt_format_and_split(mix, layouts) -> None:
    path = mix(
        {"path": str(layouts.flickr()), "prompt": "What is to be seen?"},
        {"path": str(layouts.coco_captions()), "split": "val", "format": "coco_captions"},
        str(layouts.easy_vqa()),
    )
    samples = [Sample.from_row(row) for row in load_samples(path, prompt="Tell.").dataset]
    said = {(one.meta["dataset"], one.prompt[-1].text) for one in samples}
    assert ("flickr", "What is to be seen?") in said and ("coco", "Tell.") in said
    assert {
        image.path.rpartition("/")[2] for one in samples if one.meta["dataset"] == "coco" for image in one.images
    } == {"000000000002.jpg"}
    assert choose_format(path).splits(path) == ()


def test_a_split_of_all(mix, layouts) -> None:
    val = {"path": str(layouts.coco_captions()), "name": "always", "split": "train"}
    path = mix(str(layouts.coco_captions()), val)
    assert choose_format(path).splits(path) == ("train", "val")
    data = load_samples(path, split="val")
    images = {(row["id"].partition("/")[0], Path(row["images"][0]["path"]).name[11]) for row in data.dataset}
    assert images == {("coco", "2"), ("always", "0"), ("always", "1")}


def test_an_image_stays_on_one_side(mix, layouts) -> None:
    """Also where two data sets show it."""
    path = mix(str(layouts.coco_captions()), {"path": str(layouts.coco_captions()), "name": "again", "split": "train"})
    train, held_out = split_by_image(load_samples(path, max_bad_fraction=1), 0.5, 0)
    sides = [{image["path"] for images in side.dataset["images"] for image in images} for side in (train, held_out)]
    assert all(sides) and not sides[0] & sides[1]


def test_bad_rows_are_named_with_their_data_set(mix, rows, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(Path(rows("big", 40)).read_text() + "{broken\n")
    data = load_samples(mix(rows("small", 10), str(tmp_path / "bad.jsonl")), max_bad_fraction=0.5)
    assert [row.id.partition("/")[0] for row in data.quarantine.rows] == ["bad"]
    assert len(data.dataset) == 50


@pytest.mark.parametrize(
    ("entries", "options", "message"),
    [
        ([], {}, "must list one data set or more"),
        ([3], {}, "data set 1: it is 3; it takes a path"),
        (["nowhere"], {}, "data set 1: There is no data at nowhere"),
        ([{"name": "x"}], {}, "it has no path"),
        ([{"path": "BIG", "wieght": 2}], {}, "there is no option 'wieght'.*weight"),
        ([{"path": "BIG", "weight": "two"}], {}, "weight is 'two', which is no number"),
        ([{"path": "BIG", "weight": 0}], {}, "weight is 0; it must be above 0"),
        ([{"path": "BIG", "max_samples": True}], {}, "max_samples is True, which is no number"),
        ([{"path": "BIG", "format": "flikr"}], {}, "flikr.*unknown"),
        (["BIG", "BIG"], {}, "two data sets have the name 'big'; set name"),
        ([{"path": "BIG", "weight": 1}, {"path": "BIG", "name": "b"}], {}, "some data sets have a weight"),
        (["BIG"], {"sed": 1}, "there is no option 'sed'"),
        (["BIG"], {"seed": -1}, "seed is -1"),
        (["SELF"], {}, "is a mixture itself"),
    ],
)
def test_what_is_refused(entries, options, message, mix, rows) -> None:
    big = rows("big", 40)

    def real(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {key: real(value) for key, value in entry.items()}
        return {"BIG": big, "SELF": str(mix(big))}.get(entry, entry) if isinstance(entry, str) else entry

    path = mix(*[real(entry) for entry in entries], **options)
    with pytest.raises(DataError, match=message):
        load_samples(path, format="mixture")


def test_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text("datasets: [a, b\n")
    with pytest.raises(DataError, match="cannot be read as YAML"):
        load_samples(path, format="mixture")
    path.write_text("learning_rate: 1e-4\n")
    with pytest.raises(DataError, match="in no format that vlmtune knows"):
        load_samples(path)
