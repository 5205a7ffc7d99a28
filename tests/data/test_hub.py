"""Data sets by hf:// addresses, offline: a folder laid out as on the Hub stands for one there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from vlmtune.data import hub
from vlmtune.data.boxes import Box, read_boxes
from vlmtune.data.formats import FORMATS
from vlmtune.data.loading import load_samples, load_train_and_eval
from vlmtune.data.recognition import resolve
from vlmtune.data.sample import Sample
from vlmtune.errors import DataError, QuarantineError

FEATURES = datasets.Features(
    {
        "photo": datasets.Image(),
        "ask": datasets.Value("string"),
        "kind": datasets.ClassLabel(names=["cat", "dog"]),
        "objects": {
            "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
            "category": datasets.List(datasets.ClassLabel(names=["ear", "tail"])),
        },
    }
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of ``datasets``, empty."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub.prepare.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def repository(tmp_path: Path, image_folder: Path) -> Path:
    """Parquet files of two splits, one of a name that no file name tells."""
    root = tmp_path / "repository"
    (root / "data").mkdir(parents=True)
    for split, numbers in (("train", (0, 1, 2)), ("testA", (3,))):
        rows = [
            {"photo": str(image_folder / f"{n}.jpg"), "ask": f"What is {n}?", "kind": n % 2}
            | {"objects": {"bbox": [[1, 2, 10, 12]], "category": [n % 2]}}
            for n in numbers
        ]
        table = datasets.Dataset.from_list(rows, features=FEATURES)
        table.to_parquet(str(root / "data" / f"{split}-00000-of-00001.parquet"))
    return root


def read(address: str, **options: Any) -> list[Sample]:
    return [Sample.from_row(row) for row in load_samples(address, **options).dataset]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf://owner/name", hub.Address("owner/name")),
        ("hf://datasets/owner/name@main", hub.Address("owner/name", "main")),
        (
            "hf://owner/name@v1?config=en&data_files=a/*.parquet&data_files=b.parquet",
            hub.Address("owner/name", "v1", "en", ("a/*.parquet", "b.parquet")),
        ),
    ],
    ids=str,
)
def test_addresses(text: str, address: hub.Address) -> None:
    assert hub.parse(text) == address


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("hf://", "must have one name"),
        ("hf://owner/name?confg=en", "no option 'confg'.*Did you mean 'config'"),
        ("hf://owner/name?config=en&config=de", "one config at most"),
    ],
)
def test_addresses_that_cannot_be(text: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        hub.parse(text)


def test_splits_and_columns_of_a_data_set(repository: Path) -> None:
    address = f"hf://{repository}"
    place = resolve(address)
    assert [format.name for format in FORMATS.values() if format.detect(place)] == ["tables"]
    assert FORMATS["tables"].splits(place) == ("train", "testA")
    samples = read(address, split="train", columns=["image=photo", "question=ask", "answer=kind"])
    assert [sample.prompt[0].text for sample in samples] == ["What is 0?", "What is 1?", "What is 2?"]
    assert [sample.target for sample in samples] == ["cat", "dog", "cat"]
    assert all(sample.images[0].bytes or sample.images[0].path for sample in samples)
    assert read(address, split="testA", columns=["image=photo", "question=ask", "answer=kind"])[0].id == "testA/0"


def test_objects_have_the_names_of_their_class_labels(repository: Path) -> None:
    data = load_samples(f"hf://{repository}", split="train", columns=["image=photo"])
    assert data.metrics == ("map", "map50")
    first, second, _ = map(Sample.from_row, data.dataset)
    assert read_boxes(second.target or "") == [Box((1, 2, 11, 14), "tail")]
    assert first.meta["boxes"]["ask"] == ["ear", "tail"]


def test_kinds_of_pictures_are_captions(repository: Path) -> None:
    """A data set of pictures and their kinds, as for classification."""
    file = repository / "data" / "train-00000-of-00001.parquet"
    table = datasets.load_dataset("parquet", data_files=str(file), split="train")
    table.remove_columns(["objects", "ask"]).to_parquet(str(file))
    samples = read(str(file), format="tables", columns=["image=photo", "caption=kind"], prompt="What is this?")
    assert [(sample.prompt[0].text, sample.target) for sample in samples] == [
        ("What is this?", "cat"),
        ("What is this?", "dog"),
        ("What is this?", "cat"),
    ]


def test_readers_and_files(repository: Path) -> None:
    address = f"hf://parquet?data_files={repository}/data/testA*.parquet"
    assert len(read(address, columns=["image=photo", "question=ask", "answer=kind"])) == 1


def test_what_was_prepared_is_found_again_without_its_source(repository: Path, cache: Path) -> None:
    """As on a machine without network: the cache alone is left."""
    address = f"hf://{repository}"
    first = resolve(address)
    assert first.is_relative_to(cache)
    files = {file: file.stat().st_mtime_ns for file in first.iterdir()}
    hub.prepare.cache_clear()
    assert resolve(address) == first
    assert {file: file.stat().st_mtime_ns for file in first.iterdir()} == files


def test_code_of_a_data_set_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scripted").mkdir()
    (tmp_path / "scripted" / "scripted.py").write_text("open('ran', 'w')\n")
    with pytest.raises(DataError, match=r"scripts are no longer supported.*Convert it to Parquet files"):
        load_samples("hf://scripted")
    assert not (tmp_path / "ran").exists()


def test_a_data_set_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(DataError, match=r"hf://nobody/nothing cannot be loaded: .*Correct the address, or download"):
        load_samples("hf://nobody/nothing")


def test_in_a_mixture_and_through_the_options(repository: Path, tmp_path: Path) -> None:
    from vlmtune.config import VLMDataArguments

    pairs = ["image=photo", "question=ask", "answer=kind"]
    args = VLMDataArguments(dataset_path=f"hf://{repository}", columns=pairs, eval_split="testA")
    train, evaluation = load_train_and_eval(args)
    assert len(train.dataset) == 3 and evaluation is not None and len(evaluation.dataset) == 1
    mix = tmp_path / "mix.yaml"
    entry = f"  - path: hf://{repository}\n    split: train\n    columns: [{', '.join(pairs)}]\n    name: hub\n"
    mix.write_text(f"datasets:\n{entry}")
    assert [sample.id for sample in read(str(mix))] == ["hub/train/0", "hub/train/1", "hub/train/2"]
    with pytest.raises(DataError, match=r"columns cannot be set for .*mix\.yaml as a whole"):
        load_samples(mix, columns=pairs)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        (["photo"], "columns has 'photo'; write NAME=COLUMN"),
        (["imag=photo"], "'imag' is not a column that vlmtune reads. Did you mean 'image'"),
    ],
)
def test_columns_that_cannot_be(repository: Path, columns: list[str], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        load_samples(f"hf://{repository}", columns=columns)


def test_a_column_that_the_rows_lack_is_named(repository: Path, layouts: Any) -> None:
    with pytest.raises(QuarantineError, match=r"it has no column 'foto'\. Did you mean 'photo'"):
        load_samples(f"hf://{repository}", columns=["image=foto"])
    with pytest.raises(DataError, match="columns is for rows of any columns; flickr has its own"):
        load_samples(layouts.flickr(), columns=["image=photo"])
