"""Two processes exchange the bytes that docs/scaling.md counts."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCALING = runpy.run_path(str(HERE.parents[1] / "scripts" / "write_scaling.py"))
FP32 = 4


@pytest.mark.slow
@pytest.mark.parametrize("use_lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_bytes_of_a_step(strategy, use_lora, data, family_dir, tmp_path) -> None:
    training = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "max_steps": 2, "save_strategy": "no"}
    training |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "strategy": strategy}
    model = {"model_name_or_path": str(family_dir("gemma3")), "torch_dtype": "float32", "use_lora": use_lora}
    job = {"model": model, "data": {"dataset_path": data.images, "cache_image_features": "off"}}
    (tmp_path / "job.json").write_text(json.dumps(job | {"training": training | {"dataloader_num_workers": 0}}))
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(HERE / "communication.py")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *start, str(tmp_path / "job.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "communication.json").read_text())
    sizes, (first, second, *_) = found["sizes"], found["batches"]
    moved = {name: first.get(name, 0) + second.get(name, 0) for name in first | second}
    # Each of two ranks sends half of what is gathered or scattered, and all of what is reduced on both.
    if strategy == "ddp":
        sent, own = moved["allreduce_"], "ddp"
        assert "allreduce_" not in first
    else:
        sent, own = (moved["_allgather_base_"] + moved["_reduce_scatter_base_"]) / 2, "fsdp"
        assert "_reduce_scatter_base_" not in first
    expected = SCALING["exchanged"](sizes["trained"], sizes["all"], sizes["layers"], 2, batches=2, computed=FP32)
    assert sent == expected[own]
