"""What `vlmtune train` takes of time and memory until its first step, and while it goes on, with and without streaming.

WebDataset shards of 500 tiny pictures with 2 captions each, a tiny random Gemma-3, LoRA; each run is a process of its
own, with the image hashes of no earlier run. Memory is the process's peak (VmHWM), CPU seconds are all of it.

python benchmarks/streaming.py [--shards 10,100]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from _common import demo_model, header, markdown, write

PICTURES, TEXTS, BATCH = 500, 2, 50
WINDOW_STEPS = PICTURES * TEXTS // BATCH


def make_shards(folder: Path, count: int) -> Path:
    """Write ``count`` shards."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(count):
        with tarfile.open(folder / f"train-{shard:05}.tar", "w") as tar:
            for number in range(PICTURES):
                content = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((32, 32)).save(content, "JPEG")
                rows = [
                    {"caption": f"a dog and {shard * PICTURES + number} {'big ' * text}cats"} for text in range(TEXTS)
                ]
                for kind, data in (("jpg", content.getvalue()), ("json", json.dumps(rows).encode())):
                    info = tarfile.TarInfo(f"{shard * PICTURES + number:08}.{kind}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def run(model: str, data: Path, steps: int, *, streaming: bool) -> dict[str, Any]:
    """Train for so many steps in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        options = {
            "model_name_or_path": model, "dataset_path": data, "output_dir": f"{scratch}/run", "max_steps": steps,
            "per_device_train_batch_size": BATCH, "save_strategy": "no", "report_to": "none", "lora_r": 4,
            "cache_image_features": "off", "streaming": str(streaming).lower(), "logging_steps": 50,
        }  # fmt: skip
        flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        environment = os.environ | {"XDG_CACHE_HOME": scratch, "HF_HUB_OFFLINE": "1"}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        peak = Path(scratch) / "peak"
        watch = f"import sys; from vlmtune.cli import main; code = main(); open({str(peak)!r}, 'w').write("
        watch += "next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))); sys.exit(code)"
        subprocess.run([sys.executable, "-c", watch, "train", *flags], check=True, env=environment, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {"cpu_s": round(seconds, 1), "peak_mib": round(int(peak.read_text().split()[1]) / 1024)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", default="10,100", help="numbers of shards, separated by commas")
    args = parser.parse_args()
    points = []
    with tempfile.TemporaryDirectory() as scratch:
        model = demo_model("tiny", scratch)
        for count in map(int, args.shards.split(",")):
            data = make_shards(Path(scratch) / str(count), count)
            for streaming in (True, False):
                for steps in (1, WINDOW_STEPS * count) if streaming else (1,):
                    found = run(model, data, steps, streaming=streaming)
                    points.append({"texts": count * PICTURES * TEXTS, "streaming": streaming, "steps": steps} | found)
                    print(points[-1], file=sys.stderr, flush=True)
    rows = []
    for one in points:
        figures = f"{one['cpu_s']:.1f}", f"{one['peak_mib']:,}"
        rows.append([f"{one['texts']:,}", "yes" if one["streaming"] else "no", f"{one['steps']:,}", *figures])
    table = markdown(["texts", "streaming", "steps", "CPU seconds", "peak memory, MiB"], rows)
    table += f"\n\nA shard has {PICTURES * TEXTS:,} texts, a step {BATCH}; the longer runs take each text once."
    write("streaming", {"about": header(args), "points": points}, table)


if __name__ == "__main__":
    main()
