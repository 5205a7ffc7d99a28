"""Samples to rows: the same in memory and in a file, and no growth of memory with their number."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from vlmtune.data import store
from vlmtune.data.loading import load_samples
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.data.store import Store, table_of


def sample(number: int, text: str = "", **changes: object) -> Sample:
    images = (ImageRef(f"/d/{number}.jpg"), ImageRef(bytes=b"x" * number))
    messages = (Message.make("user", "What?", images=2), Message.make("assistant", text or f"Thing {number}."))
    made = {"id": str(number), "images": images, "messages": messages, "references": ("a", "b"), "meta": {"k": number}}
    return Sample(**made | changes)  # type: ignore[arg-type]


def test_a_table_holds_the_samples_rows() -> None:
    samples = [
        sample(1),
        sample(2, references=(), meta={}),
        sample(3, images=(), messages=(Message.make("user", "?"),)),
    ]
    rows = table_of(samples).to_pylist()
    assert rows == [one.to_row() for one in samples]
    assert [Sample.from_row(row) for row in rows] == samples


@pytest.mark.parametrize("at_once", [4, 100])
def test_rows_are_the_same_in_memory_and_in_a_file(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ROWS_AT_ONCE", at_once)
    made, quarantine = Store(), Quarantine()
    samples = [sample(number) for number in range(10)]
    made.add_all([*samples, sample(3, id="again"), sample(11, id="5"), sample(12, text="half \ud800")], quarantine)
    dataset = made.dataset()
    assert bool(dataset.cache_files) == (at_once == 4)
    assert [Sample.from_row(row) for row in pickle.loads(pickle.dumps(dataset))][:10] == samples
    repeated = made.repeats(dataset, quarantine)
    assert repeated.nonzero()[0].tolist() == [10]
    assert [(row.id, row.kind) for row in quarantine.rows] == [
        ("12", "unreadable row"),
        ("again", "duplicate"),
    ]
    assert quarantine.rows[1].reason.endswith("as 3")
    named = made.with_own_ids(dataset, repeated)
    assert named["id"][:] == [*map(str, range(10)), "again", "5#2"]
    assert [Sample.from_row(row) for row in pickle.loads(pickle.dumps(named))][:10] == samples


def test_half_a_character_in_a_file_is_set_aside(messages_file) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]}
        for text in ("whole", "half \ud83d", "pair \ud83d\ude00")
    ]
    path = messages_file([json.dumps(row).encode() for row in rows])
    data = load_samples(path, max_bad_fraction=0.5)
    assert data.dataset["id"][:] == ["1", "3"]
    assert [(row.id, row.kind) for row in data.quarantine.rows] == [("2", "unreadable row")]


# The peak of what is the process's own: pages of a mapped file are the system's to take back.
MEMORY = """
import re, sys, threading, time
from vlmtune.data.loading import load_samples

peak = 0

def watch():
    global peak
    while True:
        peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]))
        time.sleep(0.01)

threading.Thread(target=watch, daemon=True).start()
load_samples(sys.argv[1], verify_images="off")
time.sleep(0.05)
print(peak // 1024)
"""


def peak_mb(path: Path) -> int:
    ended = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True)
    return int(ended.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_memory_does_not_grow_with_the_rows(name: str, tmp_path: Path) -> None:
    """Ten times the rows, 60 MB of text in all, cost less than that in the process's peak."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    peaks = []
    for count in (3_000, 30_000):
        path = tmp_path / str(count) / name
        path.parent.mkdir()
        answers = (f"{number} " + "word " * 400 for number in range(count))
        rows = [{"question": f"What is {number}?", "answer": text} for number, text in enumerate(answers)]
        if path.suffix == ".jsonl":
            with path.open("w") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1000)
        peaks.append(peak_mb(path))
    assert peaks[1] - peaks[0] < 50, peaks
