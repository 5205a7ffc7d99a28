"""A process group of two ranks on gloo, started once for all jobs, beside the same jobs in one process."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

HERE = Path(__file__).parent
WORDS = "red green blue circle square triangle dog cat man woman left right".split()


def launch(ranks: int, jobs: list[dict[str, Any]], folder: Path) -> None:
    """Do the jobs on ``ranks`` processes, in turn."""
    for job in jobs:
        Path(job["job"]).mkdir(parents=True, exist_ok=True)
    listed = folder / f"jobs-{ranks}.json"
    listed.write_text(json.dumps(jobs))
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *start, str(HERE / "worker.py"), str(listed)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]


def outcome(folder: str | Path) -> SimpleNamespace:
    """What a job left: gradients of each step, weights, log, and what each rank did."""
    folder = Path(folder)
    return SimpleNamespace(
        gradients=load_file(folder / "gradients.safetensors"),
        weights=load_file(folder / "run" / "adapter_model.safetensors"),
        log=[json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()],
        ranks=json.loads((folder / "ranks.json").read_text()),
        folder=folder / "run",
    )


def write_rows(path: Path, images: Path, per_image: list[int], text_only: int, seed: int) -> Path:
    """Write conversations about ``len(per_image)`` images, and some without, of very unequal length."""
    rng, lines = random.Random(seed), []
    for number, texts in enumerate([*per_image, *[1] * text_only]):
        image = number < len(per_image)
        for text in range(texts):
            content = ([{"type": "image"}] if image else []) + [{"type": "text", "text": "Describe this image."}]
            answer = " ".join(rng.choices(WORDS, k=rng.choice((1, 2, 3, 7, 12))))
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            row = {"id": f"{number}#{text}", "messages": messages}
            lines.append(json.dumps(row | ({"images": [str(images / f"{number}.jpg")]} if image else {})))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def data(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Uneven data: 23 texts about 7 images; those with 12 texts without an image; five to evaluate on; and four."""
    folder = tmp_path_factory.mktemp("distributed_data")

    def rows(name: str, per_image: list[int], text_only: int = 0) -> str:
        return str(write_rows(folder / f"{name}.jsonl", image_folder, per_image, text_only, len(name)))

    return SimpleNamespace(
        images=rows("images", [5, 1, 4, 2, 5, 3, 3]),
        mixed=rows("mixed", [2, 1, 2], 9),
        few=rows("few", [1, 1], 2),
        evaluation=rows("evaluation", [2, 1], 2),
    )


@pytest.fixture(scope="session")
def jobs(data, family_dir, tmp_path_factory) -> Callable[[str, int], dict[str, dict[str, Any]]]:
    """The jobs by name, for a folder and a number of ranks; all have one effective batch on any number of ranks."""
    cache = tmp_path_factory.mktemp("distributed_cache")

    def listed(place: str, ranks: int) -> dict[str, dict[str, Any]]:
        root = tmp_path_factory.mktemp(place)

        def job(name: str, family: str, dataset: str, size: int = 6, **options: Any) -> dict[str, Any]:
            return {
                "job": str(root / name),
                "model_name_or_path": str(family_dir(family)),
                "dataset_path": dataset,
                "per_device_train_batch_size": size // ranks,
                "cache_dir": str(cache / f"{place}-{name}"),
                "num_train_epochs": 2,
                **options,
            }

        vision = {"lora_scopes": ["language", "vision"]}
        small = {"eval_dataset_path": data.evaluation, "per_device_eval_batch_size": 1}
        return {
            "gemma3": job("gemma3", "gemma3", data.images, **small, save_strategy="steps", save_steps=3),
            "llava": job("llava", "llava", data.images),
            "qwen2_vl": job("qwen2_vl", "qwen2_vl", data.mixed, cache_image_features="off", max_steps=3),
            "paligemma": job("paligemma", "paligemma", data.images, max_steps=3),
            "text_only_rank": job("text_only_rank", "gemma3", data.mixed, **vision),
            "few": job("few", "gemma3", data.few, num_train_epochs=1, gradient_accumulation_steps=2),
        }

    return listed


@pytest.fixture(scope="session")
def one(jobs, tmp_path_factory) -> Callable[[str], SimpleNamespace]:
    """The outcome of a job in one process."""
    made = jobs("one", 1)
    launch(1, list(made.values()), tmp_path_factory.mktemp("one_jobs"))
    return lambda name: outcome(made[name]["job"])


@pytest.fixture(scope="session")
def two(jobs, tmp_path_factory) -> Callable[[str], SimpleNamespace]:
    """The outcome of a job on two ranks."""
    made = jobs("two", 2)
    launch(2, list(made.values()), tmp_path_factory.mktemp("two_jobs"))
    return lambda name: outcome(made[name]["job"])
