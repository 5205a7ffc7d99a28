"""Memory that stays flat while rows are read, checked, hashed and fingerprinted, whatever their number."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlmtune.data import pages, scratch
from vlmtune.data.loading import load_samples
from vlmtune.data.pages import batches, let_go, number_of_batches

WORDS = "red green blue black gray teal brown yellow dog cat runs sits in on the a".split()
IMAGE_BYTES = 4_000

# VmHWM is of this program alone; what wait4 tells begins with the memory of the process that started it.
MEASURE = """
import sys
from pathlib import Path
from vlmtune.data.fingerprint import fingerprint
from vlmtune.data.hashes import row_hashes
from vlmtune.data.loading import load_samples

data = load_samples(sys.argv[1]).dataset
for _ in row_hashes(data):
    pass
fingerprint(data)
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(len(data), int(status["VmHWM"].split()[0]) / 1024)
"""


def jpeg(number: int) -> bytes:
    """A small image of its own, with a long comment: the size of a small photo's file."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(buffer, "JPEG", comment=f"{number:08}".encode() + b"x" * IMAGE_BYTES)
    return buffer.getvalue()


def texts(rows: int) -> list[str]:
    rng = random.Random(0)
    return [f"{' '.join(rng.choices(WORDS, k=rng.randint(6, 14)))} {number}" for number in range(rows)]


def named_images(folder: Path, rows: int) -> list[str]:
    """Write an image for twenty rows each; returns the name that each row has."""
    (folder / "Images").mkdir()
    for number in range(-(-rows // 20)):
        (folder / "Images" / f"{number}.jpg").write_bytes(jpeg(number))
    return [f"Images/{number // 20}.jpg" for number in range(rows)]


def write_parquet(folder: Path, rows: int) -> None:
    schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "text": pa.string()})
    captions = texts(rows)
    with pq.ParquetWriter(folder / "train.parquet", schema) as writer:
        for start in range(0, rows, 1_000):
            part = range(start, min(rows, start + 1_000))
            content = [{"image": {"bytes": jpeg(row), "path": f"{row}.jpg"}, "text": captions[row]} for row in part]
            writer.write_table(pa.Table.from_pylist(content, schema))


def write_jsonl(folder: Path, rows: int) -> None:
    pairs = zip(named_images(folder, rows), texts(rows), strict=True)
    lines = [json.dumps({"image": name, "question": "What is it?", "answer": text}) for name, text in pairs]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")


def write_csv(folder: Path, rows: int) -> None:
    pairs = zip(named_images(folder, rows), texts(rows), strict=True)
    lines = ["image,question,answer", *(f"{name},What is it?,{text}" for name, text in pairs)]
    (folder / "train.csv").write_text("\n".join(lines) + "\n")


def write_webdataset(folder: Path, rows: int) -> None:
    with tarfile.open(folder / "train-000000.tar", "w") as shard:
        for number, text in enumerate(texts(rows)):
            for name, content in ((f"{number:08}.jpg", jpeg(number)), (f"{number:08}.txt", text.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


def peak(write: Callable[[Path, int], None], folder: Path, rows: int) -> float:
    """Return the most memory that reading so many rows takes, in MiB."""
    folder.mkdir()
    write(folder, rows)
    found = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, check=True)
    read, mebibytes = found.stdout.split()
    assert int(read) == rows
    return float(mebibytes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "rows"),
    # The fewer rows, too, are more than are held at once.
    [(write_parquet, 100_000), (write_jsonl, 100_000), (write_csv, 100_000), (write_webdataset, 50_000)],
    ids=["parquet", "jsonl", "csv", "webdataset"],
)
def test_ten_times_the_rows_take_no_more_memory(
    write: Callable[[Path, int], None], rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    few, many = (peak(write, tmp_path / f"{count}", count) for count in (rows // 10, rows))
    print(f"{few:.0f} MiB, {many:.0f} MiB for ten times the rows")
    # What is kept of each image and row are a few numbers; a file of Parquet rows has 400 MB.
    assert many - few < 75


def held() -> int:
    """Bytes of the files of rows that count as this process's memory now."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            inside = scratch.folder() in line
        elif inside and first == "Rss:":
            total += int(rest[0]) * 1024
    return total


@pytest.fixture
def parquet(tmp_path: Path) -> datasets.Dataset:
    write_parquet(tmp_path, 3_000)
    return load_samples(tmp_path).dataset


def test_batches_hold_every_row_and_few_bytes(parquet: datasets.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    data = parquet
    monkeypatch.setattr(pages, "BYTES_AT_ONCE", 1_000_000)
    parts = list(batches(data, ["id", "images"]))
    assert [start for start, _ in parts] == [sum(len(part) for _, part in parts[:i]) for i in range(len(parts))]
    assert pa.concat_tables([part for _, part in parts]).to_pylist() == list(data.select_columns(["id", "images"]))
    assert len(parts) == number_of_batches(data) > 10
    assert max(part.nbytes for _, part in parts) < 1_100_000
    assert [len(part) for _, part in batches(data, ["id"], 20)] == [20] * 150


def test_rows_are_there_after_they_were_let_go(parquet: datasets.Dataset) -> None:
    before = list(parquet)
    assert held() > 3_000 * IMAGE_BYTES
    let_go()
    assert held() == 0
    assert list(parquet) == before


def test_what_was_read_is_let_go_of_on_the_way(parquet: datasets.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "BYTES_AT_ONCE", 1_000_000)
    let_go()
    most = 0
    for _, part in batches(parquet, ["images"]):
        assert len(part.to_pylist())
        most = max(most, held())
    assert 0 < most < 5_000_000
