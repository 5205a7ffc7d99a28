"""Four samples learned by heart through train, save, load and merge: a new process that generates gives them back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import vlmtune
from transformers import AutoModelForImageTextToText

from vlmtune.models.families import FAMILIES

# One question, so that only the image tells which answer is asked for; of several lengths, for their ends.
QUESTION = "What shape is present?"
ANSWERS = ("red", "a dog and a cat", "the woman is left of a blue square", "no triangle")
IN_MAKE_TEST = ("gemma3", "qwen2_5_vl")
FRESH = """
import json, sys
from vlmtune.config import GenerationArguments
from vlmtune.evaluation.generation import AnswerGenerator
from vlmtune.evaluation.prediction import read_questions
from vlmtune.models.loading import load_model_for_inference

questions, *folders = sys.argv[1:]
found = {}
for folder in folders:
    model, processor = load_model_for_inference(folder, torch_dtype="float32", device="cpu")
    generator = AnswerGenerator(model, processor, GenerationArguments(max_new_tokens=32))
    found[folder] = [answer.text for answer in generator(read_questions([questions]).samples)]
print(json.dumps(found))
"""


def certain(name: str, folder: Path, copy: Path) -> Path:
    """A copy of the checkpoint that can be certain of a token: logits of random weights are all close to 0."""
    shutil.copytree(folder, copy)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    scale = 10 * getattr(model.config.get_text_config(), "logits_scaling", 1)
    with torch.no_grad():
        model.get_submodule(FAMILIES[name].parts["language"]).norm.weight.fill_(scale)
    model.save_pretrained(copy)
    return copy


def answers_in_a_new_process(questions: Path, *folders: Path) -> list[list[str]]:
    """What the model or adapter in each folder answers, in the order of the questions."""
    command = [sys.executable, "-c", FRESH, str(questions), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return [found[str(folder)] for folder in folders]


@pytest.fixture(scope="module")
def data(image_folder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Files of the samples to learn, and of their questions alone."""
    folder = tmp_path_factory.mktemp("four")
    images = [str(image_folder / f"{number}.jpg") for number in range(len(ANSWERS))]
    samples, questions = [], []
    for image, answer in zip(images, ANSWERS, strict=True):
        asked = {"role": "user", "content": f"<image>{QUESTION}"}
        samples.append({"images": [image], "messages": [asked, {"role": "assistant", "content": answer}]})
        questions.append({"image": image, "question": QUESTION})
    files = (folder / "samples.jsonl", folder / "questions.jsonl")
    for file, rows in zip(files, (samples, questions), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


@pytest.mark.parametrize(
    "name", [name if name in IN_MAKE_TEST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_four_samples_come_back(name, family_dir, data, tmp_path) -> None:
    samples, questions = data
    base = certain(name, family_dir(name), tmp_path / "base")
    options = {
        "model_name_or_path": base,
        "dataset_path": samples,
        "output_dir": tmp_path / "run",
        "torch_dtype": "float32",
        "lora_dropout": 0.0,
        "learning_rate": 5e-3,
        "max_steps": 200,
        "per_device_train_batch_size": len(ANSWERS),
        "warmup_steps": 5,
        "logging_steps": 10,
        "save_strategy": "no",
        "dataloader_num_workers": 0,
        "cache_dir": tmp_path / "cache",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    flags = [part for key, value in options.items() for part in (f"--{key}", value)]
    assert vlmtune("train", *flags, "--lora_scopes", "language", "projector") == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[0] > 2 and losses[-1] < 0.02, f"{losses}"
    compare = ("--dataset_path", samples, "--samples", len(ANSWERS), "--max_new_tokens", 8)
    assert vlmtune("merge", tmp_path / "run", tmp_path / "merged", *compare) == 0
    folders = base, tmp_path / "run", tmp_path / "merged"
    untrained, adapter, merged = answers_in_a_new_process(questions, *folders)
    assert adapter == list(ANSWERS) and merged == adapter
    assert not set(untrained) & set(ANSWERS)
