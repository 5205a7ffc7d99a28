"""``--devices``, ``--nodes`` and other launchers start one run; what stops one process is told once and ends all."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vlmtune.cli import main
from vlmtune.cli.launch import first_host, require_devices, slurm_place
from vlmtune.errors import ConfigError

STEP = {"SLURM_STEP_NUM_TASKS": "6", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2"}
FEW = ["--max_steps", "2", "--per_device_train_batch_size", "1", "--logging_steps", "1", "--torch_dtype", "float32"]
ENDLESS = ["--max_steps", "100000", "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "1"]


@pytest.fixture
def data(image_folder: Path, tmp_path: Path) -> Path:
    rows = [{"image": str(image_folder / f"{index}.jpg"), "caption": f"a red circle {index}"} for index in range(6)]
    file = tmp_path / "rows.jsonl"
    contents = (
        {
            "id": str(number),
            "images": [row["image"]],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe this image."}]},
                {"role": "assistant", "content": row["caption"]},
            ],
        }
        for number, row in enumerate(rows)
    )
    file.write_text("\n".join(map(json.dumps, contents)) + "\n")
    return file


def arguments(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(model), "--dataset_path", str(data), "--output_dir", str(output)),
        *("--cache_image_features", "off", *FEW, *more),
    ]


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    quiet = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | quiet | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-4000:]
    return out, err


def started_long(model: Path, data: Path, output: Path, *more: str) -> tuple[subprocess.Popen[str], list[int]]:
    """Start a run that does not end, and return it with its ranks once it trains."""
    flags = arguments(model, data, output, *more, *ENDLESS)
    process = start(["-m", "vlmtune.cli", "train", *flags])
    until = time.monotonic() + 240
    while not list(output.glob("checkpoint-*/manifest.json")):
        assert process.poll() is None and time.monotonic() < until, process.communicate()[1][-4000:]
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("this system does not list a process's children")
    return process, [int(pid) for pid in children.read_text().split()]


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in lines if "loss" in entry]


def test_a_command_ends_its_connections(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        assert main(["metrics"]) == 0
        assert not torch.distributed.is_initialized()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_devices_start_as_many_processes_and_say_things_once(tiny_gemma3_dir, data, tmp_path) -> None:
    folder = tmp_path / "run"
    flags = arguments(tiny_gemma3_dir, data, folder, "--devices", "2", "--strategy", "fsdp")
    out, err = finish(start(["-m", "vlmtune.cli", "train", *flags]))
    assert "starting 2 processes on the CPU" in err
    assert out.count("Done: 2 steps") == err.count("trainable parameters") == err.count("step 2/2") == 1
    assert len(losses(folder)) == 2
    assert (folder / "adapter_model.safetensors").exists()


def test_an_error_is_told_once_with_its_exit_code(tmp_path, tiny_gemma3_dir) -> None:
    flags = arguments(tiny_gemma3_dir, tmp_path / "absent", tmp_path / "run", "--devices", "2")
    process = start(["-m", "vlmtune.cli", "train", *flags])
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1
    assert err.count("error: ") == 1
    assert "absent" in err
    assert "Traceback" not in err


def test_a_rank_that_dies_ends_the_others_with_the_reason(tiny_gemma3_dir, data, tmp_path) -> None:
    process, ranks = started_long(tiny_gemma3_dir, data, tmp_path / "run", "--devices", "2")
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert time.monotonic() - killed < 30
    assert process.returncode == 128 + signal.SIGKILL
    assert "Rank 1 of 2" in err
    assert "was ended by SIGKILL" in err
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("signalled", ["every process", pytest.param("the launcher", marks=pytest.mark.slow)])
def test_a_signal_saves_and_its_exit_code_is_handed_on(signalled, tiny_gemma3_dir, data, tmp_path) -> None:
    """Slurm signals every process of a task; a rank then gets its launcher's copy too, which is no second signal."""
    process, ranks = started_long(tiny_gemma3_dir, data, tmp_path / "run", "--devices", "2")
    for pid in [*(ranks if signalled == "every process" else []), process.pid]:
        os.kill(pid, signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err[-3000:]
    assert err.count("stopped: ") == 1
    assert "error: " not in err and "again" not in err
    step = re.search(r"stopped: SIGTERM came; step (\d+) was finished", err)
    assert step is not None
    assert (tmp_path / "run" / f"checkpoint-{step[1]}" / "manifest.json").exists()


@pytest.mark.slow
def test_a_signal_to_one_node_stops_the_others_with_its_exit_code(tiny_gemma3_dir, data, tmp_path) -> None:
    flags = ["--nodes", "2", "--rendezvous", "localhost:29513"]
    train = ["-m", "vlmtune.cli", "train", *arguments(tiny_gemma3_dir, data, tmp_path / "run", *flags, *ENDLESS)]
    other = start(train)
    process, _ = started_long(tiny_gemma3_dir, data, tmp_path / "run", *flags)
    process.send_signal(signal.SIGTERM)
    for node in (process, other):
        _, err = node.communicate(timeout=120)
        assert node.returncode == 75, err[-3000:]


@pytest.mark.slow
def test_every_launcher_starts_the_same_run(tiny_gemma3_dir, data, tmp_path) -> None:
    """Two processes by ours, by torchrun, accelerate and srun's variables, and as two nodes."""

    def flags(name: str, *more: str) -> list[str]:
        return ["vlmtune.cli", "train", *arguments(tiny_gemma3_dir, data, tmp_path / name, *more)]

    finish(start(["-m", *flags("ours", "--devices", "2")]))
    finish(start(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *flags("torchrun")]))
    accelerate = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    finish(start([*accelerate, "--mixed_precision", "no", "--dynamo_backend", "no", "-m", *flags("accelerate")]))
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost"}
    tasks = [
        start(["-m", *flags("srun")], **step, SLURM_PROCID=str(number), SLURM_LOCALID=str(number), SLURM_JOB_ID="77")
        for number in range(2)
    ]
    for task in tasks:
        finish(task)
    nodes = [start(["-m", *flags("nodes", "--nodes", "2", "--rendezvous", "localhost:29512")]) for _ in range(2)]
    for node in nodes:
        finish(node)
    expected = losses(tmp_path / "ours")
    for name in ("torchrun", "accelerate", "srun", "nodes"):
        assert losses(tmp_path / name) == expected, name


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--nodes", "4"], "nodes is 4, but rendezvous is not set.*--rendezvous host:29500"),
        (["--devices", "2", "--rendezvous", "host"], "rendezvous is 'host'; it takes host:port"),
        (["--devices", "0"], "devices is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_started_is_refused(flags, said, tiny_gemma3_dir, data, tmp_path, capsys) -> None:
    assert main(["train", *arguments(tiny_gemma3_dir, data, tmp_path / "run", *flags)]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_more_devices_than_there_are(monkeypatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    require_devices(4)
    with pytest.raises(ConfigError, match=r"devices is 8, but this machine has 4 .*at most 4, or more nodes"):
        require_devices(8)


def test_the_place_that_srun_gives() -> None:
    nodes = {"SLURM_STEP_NODELIST": "gpu[007-008,011]", "SLURM_STEP_TASKS_PER_NODE": "2(x3)", "SLURM_JOB_ID": "41234"}
    assert slurm_place(STEP | nodes) == {
        "RANK": "5",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": "21234",
    }
    uneven = slurm_place(STEP | nodes | {"SLURM_STEP_TASKS_PER_NODE": "1,4,1"})
    assert uneven is not None
    assert uneven["LOCAL_WORLD_SIZE"] == "1"


@pytest.mark.parametrize("environment", [{}, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_a_batch_script_is_no_task_of_a_step(environment) -> None:
    assert slurm_place(environment) is None


@pytest.mark.parametrize(
    ("listed", "first"),
    [("node1", "node1"), ("a,b", "a"), ("gpu[07-12],cpu1", "gpu07"), ("a1,gpu[07-12]", "a1")],
)
def test_the_first_host(listed, first) -> None:
    assert first_host(listed) == first
