"""Two processes answer as one does: each its blocks, the first writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def predict(*flags: str) -> str:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "vlmtune.cli", "predict", *flags]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def test_the_same_answers_in_the_same_order(family_dir, image_folder, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    asked = [(str(image_folder / f"{n % 6}.jpg"), f"What {'is this ' * (n % 4)}?") for n in range(15)]
    questions.write_text("".join(json.dumps({"image": image, "question": text}) + "\n" for image, text in asked))
    model = str(family_dir("gemma3"))
    options = ["--torch_dtype", "float32", "--max_new_tokens", "4", "--eval_batch_size", "1"]
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    predict(model, str(questions), *options, "--output", str(one))
    predict(model, str(questions), *options, "--devices", "2", "--output", str(two))
    assert one.read_text() == two.read_text()
    assert one.read_text().count("answer") == len(asked)
    # What is missing is asked by two, and printed by one of them.
    two.write_text("".join(one.read_text().splitlines(keepends=True)[:9]))
    said = predict(model, str(questions), *options, "--devices", "2", "--output", str(two))
    assert one.read_text() == two.read_text()
    assert said == ""
