"""Two workers keep two cores busy: while batches are asked for, they run or wait for a core, and for nothing else."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from vlmtune.batching.collator import SharedImageCollator
from vlmtune.batching.sampler import ImageGroupSampler
from vlmtune.batching.scan import scan
from vlmtune.data import images
from vlmtune.data.loading import load_samples
from vlmtune.models.families import FAMILIES
from vlmtune.training.image_reuse import with_image_keys
from vlmtune.training.loaders import batch_loader

WORKERS = 2
IMAGES = 400


class Usage(NamedTuple):
    """Seconds: of the clock, on a core, and in the queue for one while others had it."""

    clock: float
    running: float
    queued: float

    def since(self, before: Usage) -> Usage:
        return Usage(*(after - earlier for after, earlier in zip(self, before, strict=True)))


def queued(thread: str) -> float:
    return int(Path(f"/proc/{thread}/schedstat").read_text().split()[1]) / 1e9


class Measured:
    """A collator that writes down, before and after each batch, what its process has used."""

    def __init__(self, collator: SharedImageCollator, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.collator, self.folder = collator, folder
        self.queued_of_threads = 0.0
        decode = images._decode

        def measured(*args: Any) -> Image.Image:
            found = decode(*args)
            # Each image is decoded in a thread of its own, which ends here.
            self.queued_of_threads += queued("thread-self")
            return found

        monkeypatch.setattr(images, "_decode", measured)

    def __call__(self, rows: list[Any]) -> Any:
        before = self.usage()
        batch = self.collator(rows)
        with (self.folder / f"{os.getpid()}").open("a") as file:
            file.write(json.dumps([before, self.usage()]) + "\n")
        return batch

    def usage(self) -> Usage:
        return Usage(time.perf_counter(), time.process_time(), queued("thread-self") + self.queued_of_threads)


def write_photos(folder: Path) -> None:
    rng = np.random.default_rng(0)
    (folder / "Images").mkdir(parents=True)
    lines = ["image,caption"]
    for number in range(IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        noise = rng.integers(-12, 13, (375, 500, 3))
        picture = np.clip(np.asarray(coarse.resize((500, 375))) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(folder / "Images" / f"{number}.jpg", quality=90)
        lines.append(f"{number}.jpg,a dog runs on the grass {number}")
    (folder / "captions.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the kernel tells no time in the queue")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < WORKERS, reason="there are fewer cores than workers")
def test_workers_keep_as_many_cores_busy(tmp_path: Path, processor, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photos(tmp_path / "data")
    rows = with_image_keys(load_samples(tmp_path / "data").dataset)
    collator = SharedImageCollator(processor, FAMILIES["gemma3"])
    found = scan(rows, collator.encoder)
    sampler = ImageGroupSampler(rows["image_key"], found.lengths, 8, image_tokens=found.image_tokens, seed=0)
    args = SimpleNamespace(
        dataloader_num_workers=WORKERS,
        dataloader_pin_memory=False,
        dataloader_persistent_workers=False,
        dataloader_prefetch_factor=None,
        process_index=0,
    )
    usage = tmp_path / "usage"
    usage.mkdir()
    loader = batch_loader(rows, sampler, Measured(collator, usage, monkeypatch), args, Accelerator(cpu=True))
    assert sum(1 for _ in loader) == IMAGES // 8
    files = list(usage.iterdir())
    assert len(files) == WORKERS
    for file in files:
        # The first batch sets up what is set up once.
        _, *spans = [[Usage(*one) for one in json.loads(line)] for line in file.read_text().splitlines()]
        whole = spans[-1][1].since(spans[0][0])
        working = [end.since(begin) for begin, end in spans]
        between = [begin.since(end) for (_, end), (begin, _) in itertools.pairwise(spans)]
        idle = sum(gap.clock - gap.running - gap.queued for gap in between) / whole.clock
        busy = sum(span.running + span.queued for span in working) / sum(span.clock for span in working)
        print(f"{whole.clock:.2f} s: {whole.running / whole.clock:.0%} on a core, {idle:.1%} waiting for work")
        assert idle < 0.15
        # A thread that decodes and the one that waits for it can both be in the queue for a moment.
        assert busy > 0.9
