"""Parquet, Arrow and data sets saved by Hugging Face's ``datasets``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlmtune.data.boxes import read_boxes
from vlmtune.data.formats import table_files, tables
from vlmtune.data.loading import load_samples
from vlmtune.data.sample import ImageRef, Sample
from vlmtune.errors import DataError


def read(place: Path, **options: Any) -> list[Sample]:
    return [Sample.from_row(row) for row in load_samples(place, **options).dataset]


def rows(layouts: Any) -> list[dict[str, Any]]:
    def turns(answer: str) -> list[dict[str, Any]]:
        parts = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
        return [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]

    return [{"images": [{"bytes": layouts.image(n), "path": None}], "messages": turns(f"It is {n}.")} for n in range(4)]


def test_files_of_a_split_are_numbered_through(layouts: Any) -> None:
    place = layouts.tables()
    assert tables.splits(place) == ("train",)
    first, second = read(place, split="train", prompt="What is this?")
    assert (first.id, second.id) == ("train/0", "train/1")
    assert (first.target, first.prompt[0].text) == ("Caption of 8.", "What is this?")
    assert first.images == (ImageRef(bytes=layouts.image(8)),)


def test_messages_with_images_as_bytes(layouts: Any, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows(layouts)), tmp_path / "chat.parquet")
    samples = read(tmp_path / "chat.parquet")
    assert [sample.target for sample in samples] == [f"It is {n}." for n in range(4)]
    assert [part.type for part in samples[0].messages[0].parts] == ["image", "text"]


@pytest.mark.parametrize("whole", [True, False], ids=["dict", "one"])
def test_saved_data_sets(layouts: Any, tmp_path: Path, whole: bool) -> None:
    made = datasets.Dataset.from_list(rows(layouts))
    place = tmp_path / "saved"
    if whole:
        datasets.DatasetDict({"train": made.select([0, 1, 2]), "test": made.select([3])}).save_to_disk(place)
        assert tables.splits(place) == ("test", "train")
        assert [sample.target for sample in read(place, split="test")] == ["It is 3."]
    else:
        made.save_to_disk(place)
        assert tables.splits(place) == ()
    assert len(read(place)) == 4


def test_arrow_files_of_either_layout(layouts: Any, tmp_path: Path) -> None:
    table = pa.Table.from_pylist(rows(layouts))
    for name, make in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        with make(str(tmp_path / f"{name}.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    one, other = (read(tmp_path / f"{name}.arrow") for name in ("stream", "file"))
    assert one == other and len(one) == 4


def test_bad_rows_are_set_aside(layouts: Any, tmp_path: Path) -> None:
    made = [{"image": {"bytes": layouts.image(n), "path": None}, "text": "A dog."} for n in range(3)]
    made[1]["text"] = " "
    made[2]["image"] = None  # type: ignore[assignment]
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "a.parquet")
    data = load_samples(tmp_path / "a.parquet", max_bad_fraction=1)
    assert data.dataset["id"][:] == ["0"]
    assert [row.id for row in data.quarantine.rows] == ["a.parquet, row 1", "a.parquet, row 2"]


def test_columns_that_say_nothing_are_not_recognised(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1], "y": [2]}), tmp_path / "a.parquet")
    assert not tables.detect(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not parquet")
    assert not tables.detect(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet cannot be read"):
        load_samples(tmp_path / "b.parquet", format="tables")


def test_of_parquet_a_row_group_is_in_memory_at_a_time(tmp_path: Path) -> None:
    size, groups = 1 << 20, 12
    rng = np.random.default_rng(0)
    schema = pa.schema({"image": pa.struct({"bytes": pa.binary()}), "text": pa.string()})
    with pq.ParquetWriter(tmp_path / "train.parquet", schema) as writer:
        for group in range(groups):
            rows = [{"image": {"bytes": rng.bytes(size // 4)}, "text": f"{group} {n}"} for n in range(4)]
            writer.write_table(pa.Table.from_pylist(rows, schema))
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in table_files._batches(tmp_path / "train.parquet")]
    assert len(held) == groups and max(held) < 6 * size


@pytest.mark.parametrize("where", ["column", "objects"])
def test_labels_of_no_class_are_set_aside(layouts: Any, tmp_path: Path, where: str) -> None:
    """-1 is how data sets of the Hub are published without their labels; it is not the last class."""
    names = datasets.ClassLabel(names=["cat", "dog"])
    numbers = [1, -1, 0, 2]
    images = [{"bytes": layouts.image(number), "path": None} for number in range(4)]
    if where == "column":
        features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string"), "answer": names})
        content = {"image": images, "question": ["What is it?"] * 4, "answer": numbers}
    else:
        box = datasets.List(datasets.Value("float32"), length=4)
        features = datasets.Features(
            {"image": datasets.Image(), "objects": {"bbox": datasets.List(box), "category": datasets.List(names)}}
        )
        objects = [{"bbox": [[1, 2, 20, 20]], "category": [number]} for number in numbers]
        content = {"image": images, "objects": objects}
    table = pa.Table.from_pydict(content, schema=features.arrow_schema)
    pq.write_table(table, tmp_path / "train.parquet")
    data = load_samples(tmp_path, max_bad_fraction=0.5)
    samples = [Sample.from_row(row) for row in data.dataset]
    labels = [sample.target if where == "column" else read_boxes(sample.target or "")[0].label for sample in samples]
    assert labels == ["dog", "cat"]
    assert [row.id for row in data.quarantine.rows] == ["train.parquet, row 1", "train.parquet, row 3"]
    assert "label -1 is none of the 2" in data.quarantine.rows[0].reason
