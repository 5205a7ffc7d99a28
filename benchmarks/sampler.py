"""CPU seconds and memory that the sampler takes to start, to begin an epoch and to give a step; to 10^7 groups.

No data are read: image keys are random SHA-256 hashes as the run gives them, an Arrow column in chunks of 1,000 rows.
Each point is a process of its own. Memory is what the process grew by, apart from the column of keys, at its peak.

python benchmarks/sampler.py [--groups 100000,1000000,10000000] [--texts 1] [--world_size 64]
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _common import header, in_own_process, markdown, write

BATCH, ACCUMULATION, STEPS = 8, 2, 100
IMAGE_TOKENS = 256


def keys_of(groups: int, texts: int) -> Any:
    """Return the keys of ``groups * texts`` rows, the texts of an image side by side, as an Arrow column."""
    import numpy as np
    import pyarrow as pa

    rng = np.random.default_rng(0)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    rows_at_once = 1_000
    chunks = []
    for start in range(0, groups * texts, rows_at_once):
        count = min(rows_at_once, groups * texts - start)
        numbers = np.arange(start, start + count) // texts
        first, last = numbers[0], numbers[-1]
        # The hash of an image that lies on both sides of a chunk's end must be the same in both.
        hashes = np.stack([np.random.default_rng(int(n)).integers(0, 16, 64) for n in (first, last)])
        made = rng.integers(0, 16, (last - first + 1, 64), dtype=np.uint8)
        made[0], made[-1] = hashes
        text = digits[made[numbers - first]].tobytes()
        offsets = np.arange(0, 64 * count + 1, 64, dtype=np.int32)
        chunks.append(pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(text)))
    return pa.chunked_array(chunks)


def memory_mib(what: str) -> float:
    """Return this process's memory now (``VmRSS``) or at its peak since :func:`forget_peak` (``VmHWM``), in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) / 1024


def forget_peak() -> None:
    """Begin the peak anew."""
    Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def measured(name: str, figures: dict[str, float]) -> Iterator[None]:
    """Note the seconds of CPU that a block takes."""
    began = time.process_time()
    yield
    figures[f"{name}_cpu_s"] = time.process_time() - began


def worker(args: argparse.Namespace) -> None:
    """Measure one point and print it as the last line."""
    import numpy as np

    from vlmtune.batching.sampler import ImageGroupSampler
    from vlmtune.batching.sharing import describe_saving

    keys = keys_of(args.groups, args.texts)
    rows = len(keys)
    lengths = np.random.default_rng(1).integers(IMAGE_TOKENS + 10, IMAGE_TOKENS + 60, rows)
    soft = np.full(rows, IMAGE_TOKENS)
    figures: dict[str, float] = {"keys_mib": keys.nbytes / 2**20}
    with measured("lines", figures):
        describe_saving(keys, lengths, soft)
    forget_peak()
    before = memory_mib("VmRSS")
    with measured("start", figures):
        sampler = ImageGroupSampler(
            keys, lengths, BATCH, image_tokens=soft, accumulation=ACCUMULATION, world_size=args.world_size
        )
    figures["start_peak_mib"] = memory_mib("VmHWM") - before
    held = (sampler.members, sampler.starts, sampler.lengths, sampler.image_tokens)
    figures["held_mib"] = sum(array.nbytes for array in held) / 2**20
    steps = sampler.step_batches()
    with measured("epoch", figures):
        next(steps)
    with measured("step", figures):
        given = sum(1 for _ in itertools.islice(steps, STEPS))
    figures["step_ms"] = figures.pop("step_cpu_s") / given * 1000
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", default="100000,1000000,10000000", help="images, each with its texts")
    parser.add_argument("--texts", default="1", help="texts an image")
    parser.add_argument("--world_size", type=int, default=64, help="devices; a step takes 16 samples of each")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        args.groups, args.texts = int(args.groups), int(args.texts)
        worker(args)
        return
    points = []
    for texts, groups in itertools.product(map(int, args.texts.split(",")), map(int, args.groups.split(","))):
        flags = ["--groups", str(groups), "--texts", str(texts), "--world_size", str(args.world_size)]
        points.append({"groups": groups, "texts": texts} | in_own_process(__file__, "sampler", flags))
        print(points[-1], file=sys.stderr)
    report(points, args)


def report(points: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Write the results."""
    table = []
    for point in points:
        mib = [f"{point[name]:,.0f}" for name in ("keys_mib", "start_peak_mib", "held_mib")]
        seconds = [f"{point[name]:.1f}" for name in ("lines_cpu_s", "start_cpu_s", "epoch_cpu_s")]
        table.append(
            [f"{point['groups']:,}", f"{point['groups'] * point['texts']:,}", *seconds, f"{point['step_ms']:.1f}", *mib]
        )
    columns = [
        *("groups", "rows", "first lines, s", "start, s", "epoch, s", "step, ms"),
        *("keys, MiB", "start's peak, MiB", "held, MiB"),
    ]
    text = markdown(columns, table)
    text += (
        "\n\nTimes are CPU time. First lines: counting what sharing saves. Start: making the sampler, with the peak of "
        "memory that this adds. Epoch: its order, and the first step. Step: dealing the samples of one step to the "
        "devices. Keys are the column of image hashes."
    )
    write("sampler", {"about": header(args), "points": points}, text)


if __name__ == "__main__":
    main()
