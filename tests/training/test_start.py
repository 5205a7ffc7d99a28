"""From the command to the first step of many rows: in seconds of CPU time, and in memory that hardly grows."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from vlmtune.batching.encode import Encoder
from vlmtune.batching.scan import scan
from vlmtune.data.loading import load_samples
from vlmtune.data.sample import Sample
from vlmtune.models.families import FAMILIES

TEXTS = 5
WORDS = "red green blue black gray teal brown yellow dog cat runs sits in on the a".split()


def write_captions(folder: Path, rows: int) -> Path:
    """Write a Flickr-style folder of small JPEGs, each other than the rest, with five captions an image."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 24), "teal").save(buffer, "JPEG")
    start, rest = buffer.getvalue()[:2], buffer.getvalue()[2:]
    (folder / "Images").mkdir(parents=True)
    rng = random.Random(0)
    lines = ["image,caption"]
    for number in range(rows // TEXTS):
        comment = f"{number:08}".encode()
        name = f"{number}.jpg"
        (folder / "Images" / name).write_bytes(start + b"\xff\xfe\x00\x0a" + comment + rest)
        lines += [f"{name},{' '.join(rng.choices(WORDS, k=rng.randint(6, 14)))} {turn}" for turn in range(TEXTS)]
    (folder / "captions.txt").write_text("\n".join(lines) + "\n")
    return folder


class Cost(NamedTuple):
    cpu_seconds: float
    peak_mib: float


def train_one_step(data: Path, model: Path, output: Path) -> Cost:
    command = [sys.executable, "-m", "vlmtune.cli", "train", "--dataset_path", str(data), "--output_dir", str(output)]
    command += ["--model_name_or_path", str(model), "--max_steps", "1", "--cache_image_features", "off"]
    command += ["--save_strategy", "no", "--report_to", "none"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=dict(os.environ))
    assert process.stderr is not None
    log = process.stderr.read().decode()
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, log
    return Cost(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


@pytest.mark.slow
def test_a_hundred_thousand_rows_start_in_seconds(
    tmp_path: Path, tiny_gemma3_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    few, many = (
        train_one_step(write_captions(tmp_path / f"{rows}", rows), tiny_gemma3_dir, tmp_path / f"out {rows}")
        for rows in (10_000, 100_000)
    )
    # Cores that do other work beside take twice as much CPU time for the same. One text at a time took 49 to 105 s.
    print(few, many)
    assert many.cpu_seconds < 30
    assert many.peak_mib - few.peak_mib < 150


def test_counting_takes_a_fraction_of_encoding(tmp_path: Path, processor) -> None:
    data = load_samples(write_captions(tmp_path / "data", 5_000), verify_images="off").dataset
    encoder = Encoder(processor, FAMILIES["gemma3"])
    started = time.process_time()
    found = scan(data, encoder)
    counted = time.process_time() - started
    started = time.process_time()
    lengths = [len(encoder(Sample.from_row(row), pixels=False).input_ids) for row in data.select(range(500))]
    encoded = (time.process_time() - started) * len(data) / 500
    assert found.lengths[:500].tolist() == lengths
    assert counted < encoded / 2
