"""Two processes that stream shards of their own make the steps of one that reads the same shards together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shard_files import write_shards

FEW = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "logging_steps": 1, "torch_dtype": "float32"}


def train(model: Path, data: Path, output: Path, **options: object) -> subprocess.CompletedProcess[str]:
    given = (
        {"model_name_or_path": model, "dataset_path": data, "output_dir": output, "streaming": "true"} | FEW | options
    )
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "vlmtune.cli", "train", *flags]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def losses(folder: Path) -> list[float]:
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.slow
def test_two_ranks_are_one_process(tiny_gemma3_dir: Path, image_folder: Path, tmp_path: Path) -> None:
    # One of the shards holds texts alone: a rank has a step without an image then.
    data = write_shards(tmp_path / "shards", image_folder, [2, 2, 2, 2], bad=(2,), text_only=(1,))
    # Adam's first steps hardly look at a gradient's size, and would blow up what is summed in another order.
    optimizer = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "warmup_steps": 0}
    same = {"max_bad_fraction": 0.5, "lora_scopes": "vision", "lora_r": 4, "lora_dropout": 0.0} | optimizer
    one = train(tiny_gemma3_dir, data, tmp_path / "one", **same, streaming_shards=2, per_device_train_batch_size=8)
    two = train(tiny_gemma3_dir, data, tmp_path / "two", **same, devices=2, per_device_train_batch_size=4)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr[-3000:] + two.stderr[-3000:]
    assert len(losses(tmp_path / "one")) == 6
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-5)
    expected = load_file(tmp_path / "one" / "adapter_model.safetensors")
    for name, tensor in load_file(tmp_path / "two" / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    left_out = (tmp_path / "two" / "left_out.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["id"] for line in left_out) == ["bad4", "bad5"], left_out

    # From the checkpoint on two processes the same steps follow; on one it is refused.
    before = losses(tmp_path / "two")
    record = tmp_path / "two" / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"status": "training"}))
    for finished in ("checkpoint-6", "adapter_model.safetensors"):
        (tmp_path / "two" / finished).rename(tmp_path / finished.replace("-", "_"))
    forced = {"force_resume": "true", "per_device_train_batch_size": 8}
    alone = train(tiny_gemma3_dir, data, tmp_path / "two", **same, **forced)
    assert alone.returncode != 0 and "written by 2 processes, and this run has 1" in " ".join(alone.stderr.split())
    again = train(tiny_gemma3_dir, data, tmp_path / "two", **same, devices=2, per_device_train_batch_size=4)
    assert again.returncode == 0, again.stderr[-3000:]
    assert losses(tmp_path / "two")[-2:] == before[-2:]
