"""An evaluation that is killed by the system goes on where it was, and ends as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def rows(folder: Path) -> list[dict]:
    lines = (folder / "predictions.jsonl").read_bytes().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


@pytest.fixture
def command(tiny_gemma3_dir: Path, image_folder: Path, tmp_path: Path):
    lines = [
        {"image": str(image_folder / f"{i % 12}.jpg"), "question": f"What is {i}?", "answer": "red"} for i in range(60)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = {"model_name_or_path": tiny_gemma3_dir, "dataset_path": tmp_path / "data.jsonl", "honesty": "off"}
    flags |= {"max_new_tokens": 16, "eval_batch_size": 1, "torch_dtype": "float32", "metrics": "exact_match"}
    given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]

    def made(folder: Path) -> list[str]:
        return [sys.executable, "-m", "vlmtune.cli", "evaluate", *given, "--evaluation_dir", str(folder)]

    return made


def test_sigkill(command, tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    options = {"env": env, "capture_output": True, "text": True, "timeout": 200}
    whole = subprocess.run(command(tmp_path / "whole"), **options)
    assert whole.returncode == 0, whole.stderr[-4000:]

    killed = tmp_path / "killed"
    process = subprocess.Popen(command(killed), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        # As soon as the first answers are on disk; 52 are then left.
        while not (killed / "predictions.jsonl").is_file() or not (killed / "predictions.jsonl").stat().st_size:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    kept = (killed / "predictions.jsonl").read_bytes()
    assert 0 < len(kept.splitlines()) < 60 and not (killed / "scores.json").exists()

    done = subprocess.run(command(killed), **options)
    assert done.returncode == 0, done.stderr[-4000:]
    assert rows(killed) == rows(tmp_path / "whole")
    # What was there is not asked again: its times are still those of the killed process.
    complete = kept[: kept.rindex(b"\n") + 1]
    assert complete and (killed / "predictions.jsonl").read_bytes().startswith(complete)
    scores = [json.loads((folder / "scores.json").read_text()) for folder in (killed, tmp_path / "whole")]
    assert scores[0]["metrics"] == scores[1]["metrics"]
    assert done.stdout.replace(str(killed), str(tmp_path / "whole")) == whole.stdout
