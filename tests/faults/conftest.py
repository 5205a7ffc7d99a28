"""A short real run: the demo model, 48 questions of easy-VQA, twelve steps, evaluations, checkpoints and a cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from vlmtune.demo.run import model_folder
from vlmtune.files import UNFINISHED
from vlmtune.training.checkpoints import checkpoints, damage

VICTIM = Path(__file__).with_name("victim.py")
STEPS = 12
RECIPE = f"""
model_name_or_path: {model_folder()}
dataset_path: easy-vqa
dataset_format: easy_vqa
train_split: train
eval_split: test
max_train_samples: 48
max_eval_samples: 8
lora_r: 4
lora_dropout: 0.1
max_steps: {STEPS}
per_device_train_batch_size: 8
learning_rate: 1.0e-3
logging_steps: 3
eval_strategy: steps
eval_steps: 4
save_steps: 2
use_cpu: true
seed: 0
"""


class Run:
    """An output directory and the command that trains into it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.output, self.cache = folder / "run", folder / "cache"
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(f"{RECIPE}output_dir: {self.output}\ncache_dir: {self.cache}\n")

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

    def start(self, *flags: str, kill: tuple[str, int, float] | None = None, **given: object) -> subprocess.Popen[str]:
        program = ["-m", "vlmtune.cli"] if kill is None else [str(VICTIM), *map(str, kill)]
        command = [sys.executable, *program, "train", str(self.recipe), *flags]
        environment = self.environment | dict(given.pop("env", {}))  # type: ignore[call-overload]
        return subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **given
        )

    def finish(self, *flags: str, kill: tuple[str, int, float] | None = None, **given: object) -> tuple[int, str]:
        """Run to the end, and return the exit code (negative: the signal) with everything it said."""
        process = self.start(*flags, kill=kill, **given)
        said, _ = process.communicate(timeout=300)
        return process.returncode, said

    def record(self) -> dict[str, object]:
        return dict(json.loads((self.output / "run.json").read_text()))

    def adapter(self) -> bytes:
        return (self.output / "adapter_model.safetensors").read_bytes()

    def losses(self) -> list[tuple[int, float]]:
        lines = map(json.loads, (self.output / "log.jsonl").read_text().splitlines())
        return [
            (entry["step"], entry.get("loss", entry.get("eval_loss"))) for entry in lines if "train_loss" not in entry
        ]

    def assert_nothing_is_broken(self) -> None:
        """Every file that is in its place is whole; after a kill, too."""
        for checkpoint in self.output.glob("checkpoint-*"):
            if not checkpoint.name.endswith(UNFINISHED):
                assert damage(checkpoint) is None
        for path in [*self.output.glob("*.json"), *self.output.glob("*.jsonl")]:
            for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
                json.loads(line)
        for path in [*self.output.glob("*.safetensors"), *self.cache.rglob("*.safetensors")]:
            with safe_open(path, framework="pt") as opened:
                assert opened.keys()

    def assert_finished_as(self, whole: Run) -> None:
        self.assert_nothing_is_broken()
        assert self.adapter() == whole.adapter(), "the adapter differs from the uninterrupted run's"
        assert self.losses() == whole.losses()
        assert self.record()["status"] == "finished"
        assert len(checkpoints(self.output)) == 2
        assert not list(self.output.glob(f"*{UNFINISHED}")) and not (self.output / ".vlmtune.lock").exists()


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Run]:
    pytest.importorskip("easy_vqa")
    return lambda: Run(tmp_path_factory.mktemp("faults") / "r")


@pytest.fixture(scope="session")
def whole(make_run: Callable[[], Run]) -> Run:
    """The uninterrupted run; treat as read-only."""
    run = make_run()
    code, said = run.finish()
    assert code == 0, said
    return run
