"""Four families learn a few easy-VQA questions by ``vlmtune train``, and answer the same in every new process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlmtune.data.formats.easy_vqa import package_folder

pytest.importorskip("easy_vqa")
FAMILIES = ("llava", "qwen2_5_vl", "smolvlm", "paligemma")


def in_a_new_process(*arguments: object) -> None:
    command = [sys.executable, "-m", "vlmtune.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_train_and_answer(family, family_dir, tmp_path) -> None:
    run, asked = tmp_path / "run", tmp_path / "questions.jsonl"
    options = {
        "dataset_path": "easy-vqa",
        "max_train_samples": 64,
        "torch_dtype": "float32",
        "lora_dropout": 0.0,
        "learning_rate": 1e-2,
        "max_steps": 40,
        "per_device_train_batch_size": 8,
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_num_workers": 0,
        "cache_dir": tmp_path / "cache",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    flags = [part for key, value in options.items() for part in (f"--{key}", value)]
    in_a_new_process("train", "--model_name_or_path", family_dir(family), "--output_dir", run, *flags)
    losses = [entry["loss"] for entry in rows(run / "log.jsonl") if "loss" in entry]
    assert sum(losses[-8:]) / 8 < losses[0] - 1, losses

    test = package_folder() / "test"
    questions = json.loads((test / "questions.json").read_text(encoding="utf-8"))[:16]
    lines = [{"image": str(test / "images" / f"{image}.png"), "question": text} for text, _, image in questions]
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    fixed = ("--max_new_tokens", 8, "--torch_dtype", "float32")
    found = {}
    for name, model in (("base", family_dir(family)), ("once", run), ("twice", run)):
        output = tmp_path / f"{name}.jsonl"
        in_a_new_process("predict", model, asked, "--output", output, *fixed)
        found[name] = [row["answer"] for row in rows(output)]
    assert found["once"] == found["twice"] != found["base"]
