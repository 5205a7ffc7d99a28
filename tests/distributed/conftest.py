"""Process groups of two and three ranks on gloo, each started once for all jobs, beside those in one process."""

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
        weights=load_file(next((folder / "run").glob("*model.safetensors"))),
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


Jobs = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def jobs(data, family_dir, tmp_path_factory) -> Callable[[str, int, str], Jobs]:
    """The jobs by name, for a folder, a number of ranks and a strategy; all have one effective batch on any number."""
    cache = tmp_path_factory.mktemp("distributed_cache")

    def listed(place: str, ranks: int, strategy: str = "ddp") -> Jobs:
        root = tmp_path_factory.mktemp(f"{place}_{strategy}")

        def job(name: str, family: str, dataset: str, **options: Any) -> dict[str, Any]:
            return {
                "job": str(root / name),
                "model_name_or_path": str(family_dir(family)),
                "dataset_path": dataset,
                "effective_batch_size": 6,
                "cache_dir": str(cache / f"{place}-{strategy}-{name}"),
                "num_train_epochs": 2,
                "strategy": strategy,
                **options,
            }

        vision = {"lora_scopes": ["language", "vision"]}
        small = {"eval_dataset_path": data.evaluation, "per_device_eval_batch_size": 1}
        saved = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 3}
        few = {"effective_batch_size": 12, "per_device_train_batch_size": 6 // ranks}
        auto = {"device_batch_size": "auto"}
        half = {"torch_dtype": "bfloat16", "bf16": True, "max_steps": 4}
        best = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
        made = {
            "gemma3": job("gemma3", "gemma3", data.images, **small, **saved),
            "llava": job("llava", "llava", data.images, max_steps=3),
            "qwen2_vl": job("qwen2_vl", "qwen2_vl", data.mixed, cache_image_features="off", max_steps=3),
            "text_only_rank": job("text_only_rank", "gemma3", data.mixed, **vision),
            "full": job("full", "gemma3", data.images, use_lora=False, max_steps=4, **saved),
            "bf16": job("bf16", "gemma3", data.images, use_lora=False, bf16=True, max_steps=4, **saved),
            "half": job("half", "gemma3", data.images, use_lora=False, **half, **saved),
            "half_lora": job("half_lora", "gemma3", data.images, lora_scopes=["language", "vision"], **half),
            "best": job("best", "gemma3", data.images, **small, **saved | best, learning_rate=0.05),
            "quantised": job("quantised", "gemma3", data.images, use_4bit=True, max_steps=2),
            "paligemma": job("paligemma", "paligemma", data.images, max_steps=3),
            "auto": job("auto", "gemma3", data.images, max_steps=2, per_device_train_batch_size=1, **auto),
            "few": job("few", "gemma3", data.few, num_train_epochs=1, **few),
        }
        return {name: options for name, options in made.items() if name in JOBS[strategy]}

    return listed


# With DeepSpeed, 4-bit weights are refused.
JOBS = {
    "ddp": (
        *("gemma3", "llava", "qwen2_vl", "paligemma", "text_only_rank", "auto", "few", "full", "quantised"),
        *("half", "half_lora"),
    ),
    "fsdp": ("gemma3", "llava", "qwen2_vl", "text_only_rank", "full", "best", "quantised", "half", "half_lora"),
    "zero2": ("gemma3", "llava", "qwen2_vl", "text_only_rank", "full", "bf16", "best", "half"),
    "zero3": ("gemma3", "text_only_rank", "full", "best"),
}
ZERO_GOES_ON = (
    *("zero2<zero2/gemma3", "zero3<zero3/gemma3", "zero2<zero2/full", "zero3<zero3/full"),
    *("zero2<zero3/full", "zero3<ddp/full", "zero2<fsdp/full", "zero2<ddp/gemma3"),
    *("one<zero2/gemma3", "one<zero3/full", "three<zero2/full"),
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test the runs that go on with another strategy in turn."""
    if "goes_on" in metafunc.fixturenames:
        metafunc.parametrize("goes_on", ZERO_GOES_ON)


Outcomes = Callable[[str], SimpleNamespace]


def resumed(jobs: Jobs, name: str, checkpoint: Path) -> dict[str, Any]:
    """The job of that name, gone on from a checkpoint."""
    folder = f"{jobs[name]['job']}_{checkpoint.parents[1].name}_{checkpoint.parents[2].name}"
    return {**jobs[name], "job": folder, "resume_from_checkpoint": str(checkpoint)}


@pytest.fixture(scope="session")
def two(jobs, tmp_path_factory) -> Outcomes:
    """The outcome of a job on two ranks; ``fsdp/gemma3`` with FSDP2."""
    made = {f"{strategy}/{name}": job for strategy in ("ddp", "fsdp") for name, job in jobs("two", 2, strategy).items()}
    launch(2, list(made.values()), tmp_path_factory.mktemp("two_jobs"))
    return lambda name: outcome(made[name if "/" in name else f"ddp/{name}"]["job"])


@pytest.fixture(scope="session")
def one(jobs, two, tmp_path_factory) -> Outcomes:
    """The outcome of a job in one process; ``fsdp/full`` gone on from what two ranks with FSDP2 left."""
    made = jobs("one", 1)
    for name, step in (("ddp/gemma3", 3), ("fsdp/gemma3", 3), ("fsdp/full", 3), ("fsdp/half", 3)):
        made[name] = resumed(made, name.partition("/")[2], two(name).folder / f"checkpoint-{step}")
    launch(1, list(made.values()), tmp_path_factory.mktemp("one_jobs"))
    return lambda name: outcome(made[name]["job"])


@pytest.fixture(scope="session")
def three(jobs, two, tmp_path_factory) -> Outcomes:
    """The outcome of a job on three ranks, and of those of two ranks gone on with on three: ``resumed/ddp``."""
    made = {f"{kind}/{name}": job for kind in ("ddp", "fsdp") for name, job in jobs("three", 3, kind).items()}
    kept = ("ddp/gemma3", "ddp/text_only_rank", "fsdp/gemma3", "fsdp/text_only_rank", "fsdp/qwen2_vl")
    made = {name: job for name, job in made.items() if name in kept}
    for strategy in ("ddp", "fsdp"):
        plain = {"gemma3": made[f"{strategy}/gemma3"]}
        made[f"resumed/{strategy}"] = resumed(plain, "gemma3", two(f"{strategy}/gemma3").folder / "checkpoint-3")
    launch(3, list(made.values()), tmp_path_factory.mktemp("three_jobs"))
    return lambda name: outcome(made[name]["job"])


@pytest.fixture(scope="session")
def zero(jobs, two, tmp_path_factory) -> Outcomes:
    """The outcome of a job on two ranks with ZeRO, and of those gone on with from a checkpoint of another strategy.

    ``zero2<zero3/full`` is ZeRO-2 from what ZeRO-3 left; ``one<`` and ``three<`` are without it on as many ranks.
    """
    made = {f"{s}/{name}": job for s in ("zero2", "zero3") for name, job in jobs("two", 2, s).items()}
    folder = tmp_path_factory.mktemp("zero_jobs")
    launch(2, list(made.values()), folder)

    def left(run: str) -> Path:
        place = two(run).folder if run.startswith(("ddp", "fsdp")) else Path(made[run]["job"]) / "run"
        return place / "checkpoint-3"

    rest: dict[int, Jobs] = {1: {}, 2: {}, 3: {}}
    for name in ZERO_GOES_ON:
        where, _, source = name.partition("<")
        ranks = {"one": 1, "three": 3}.get(where, 2)
        kind = source.rpartition("/")[2]
        base = jobs("rest", ranks, where if ranks == 2 else "fsdp" if ranks == 3 else "ddp")
        rest[ranks][name] = resumed(base, kind, left(source))
    rest[2]["resumed/bf16"] = resumed(jobs("rest", 2, "zero2"), "bf16", left("zero2/bf16"))
    for ranks, more in rest.items():
        launch(ranks, list(more.values()), folder)
        made |= more
    return lambda name: outcome(made[name]["job"])
