"""Tiny runs for the training tests: rows, trainers, a folder of captions, and one finished run shared by a session."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlmtune.batching.collator import SharedImageCollator
from vlmtune.config import ModelWithLoRAArguments, TrainingArguments, VLMDataArguments
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.models.loading import load_model_for_training
from vlmtune.models.lora import prepare_full_finetuning, setup_lora
from vlmtune.training import run as run_module
from vlmtune.training.run import run_training
from vlmtune.training.trainer import MemoryEfficientTrainer, create_trainer

WORDS = "red green blue circle square triangle dog cat man woman left right".split()
QUICK: dict[str, Any] = {
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_steps": 1,
    "warmup_steps": 0,
    "dataloader_num_workers": 0,
}


@pytest.fixture(scope="session")
def rows(image_folder: Path) -> list[dict[str, Any]]:
    """Ten texts of very unequal length, five about each of two images; ids ``0#0`` to ``1#4``."""
    rng, made = random.Random(0), []
    for image in range(2):
        for number in range(5):
            answer = " ".join(rng.choices(WORDS, k=(1, 2, 12, 3, 7)[number]))
            messages = (Message.make("user", "Describe this image.", images=1), Message.make("assistant", answer))
            sample = Sample(f"{image}#{number}", (ImageRef(str(image_folder / f"{image}.jpg")),), messages)
            made.append(sample.to_row() | {"image_key": f"k{image}"})
    return made


@pytest.fixture
def fresh_model(tiny_gemma3_dir: Path) -> Callable[..., Any]:
    """Load the tiny model and make it trainable: by adapters, or in full."""

    def make(kind: str = "lora", **options: Any) -> Any:
        model = load_model_for_training(tiny_gemma3_dir, torch_dtype="float32")
        return setup_lora(model, lora_r=4, **options) if kind == "lora" else prepare_full_finetuning(model, **options)

    return make


@pytest.fixture
def make_trainer(fresh_model, processor, rows, tmp_path: Path) -> Callable[..., MemoryEfficientTrainer]:
    """Make a trainer of the ten rows in ``tmp_path/run``; four steps of two samples unless told otherwise."""

    def make(kind: str = "lora", **options: Any) -> MemoryEfficientTrainer:
        given = {
            name: options.pop(name)
            for name in ("eval_dataset", "callbacks", "train_sampler", "train_dataset")
            if name in options
        }
        settings = QUICK | {"output_dir": str(tmp_path / "run"), "max_steps": 4, "per_device_train_batch_size": 2}
        model, collator = options.pop("model", None), options.pop("data_collator", None)
        return create_trainer(
            model=model if model is not None else fresh_model(kind),
            args=TrainingArguments(**(settings | {"save_strategy": "no"} | options)),
            data_collator=collator or SharedImageCollator(processor, "gemma3"),
            processor=processor,
            **({"train_dataset": rows} | given),
        )

    return make


@pytest.fixture(scope="session")
def caption_folder(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Flickr-style folder of 4 images with 5 captions each, two bad rows and a caption of 60 words."""
    folder = tmp_path_factory.mktemp("flickr")
    (folder / "Images").mkdir()
    rng, lines = random.Random(0), ["image,caption"]
    for image in range(4):
        shutil.copy(image_folder / f"{image}.jpg", folder / "Images")
        lines += [f"{image}.jpg,{number} {' '.join(rng.choices(WORDS, k=2 + number))}" for number in range(5)]
    lines += ["absent.jpg,a dog", "0.jpg,", f"1.jpg,{' '.join(['dog'] * 60)}"]
    (folder / "captions.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def eval_folder(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions to evaluate on: 2 images with 2 captions each, and one whose image is missing."""
    folder = tmp_path_factory.mktemp("flickr_eval")
    (folder / "Images").mkdir()
    for image in (4, 5):
        shutil.copy(image_folder / f"{image}.jpg", folder / "Images")
    captions = ["4.jpg,a dog", "4.jpg,a cat", "5.jpg,a red square", "5.jpg,a man", "gone.jpg,a woman"]
    (folder / "captions.txt").write_text("\n".join(["image,caption", *captions]) + "\n")
    return folder


@pytest.fixture(scope="session")
def run_arguments(tiny_gemma3_dir: Path, caption_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """Make the three argument objects of a run; options go to whichever knows them."""
    cache = tmp_path_factory.mktemp("features")

    def make(output_dir: Path, **options: Any) -> tuple[ModelWithLoRAArguments, VLMDataArguments, TrainingArguments]:
        given = {
            ModelWithLoRAArguments: {"model_name_or_path": str(tiny_gemma3_dir), "torch_dtype": "float32"},
            VLMDataArguments: {
                "dataset_path": str(caption_folder),
                "max_bad_fraction": 0.5,
                "max_length": 50,
                "on_too_long": "drop",
                "cache_dir": str(cache),
            },
            TrainingArguments: QUICK | {"output_dir": str(output_dir), "max_steps": 2},
        }
        for name, value in options.items():
            owner = next(cls for cls in given if name in cls.__dataclass_fields__)
            given[owner][name] = value
        return tuple(cls(**values) for cls, values in given.items())

    return make


@pytest.fixture
def made_trainers(monkeypatch: pytest.MonkeyPatch) -> list[MemoryEfficientTrainer]:
    """The trainers that runs make."""
    trainers: list[MemoryEfficientTrainer] = []

    def keep(**given: Any) -> MemoryEfficientTrainer:
        trainers.append(create_trainer(**given))
        return trainers[-1]

    monkeypatch.setattr(run_module, "create_trainer", keep)
    return trainers


@pytest.fixture(scope="session")
def finished_run(run_arguments, eval_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run of four steps with evaluation and two checkpoints; treat as read-only."""
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    arguments = run_arguments(
        output_dir,
        max_steps=4,
        per_device_train_batch_size=10,
        eval_dataset_path=str(eval_folder),
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        hub_token="hf_planted_secret",
        # Its own: it says how many features it computed.
        cache_dir=str(tmp_path_factory.mktemp("finished_features")),
    )
    trainers: list[MemoryEfficientTrainer] = []
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vlmtune.training")
    level = logger.level

    def keep(**given: Any) -> MemoryEfficientTrainer:
        trainers.append(create_trainer(**given))
        return trainers[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "create_trainer", keep)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            result = run_training(*arguments)
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
    return SimpleNamespace(result=result, trainer=trainers[0], folder=output_dir, arguments=arguments, messages=records)


@pytest.fixture
def same_trainer(make_trainer, fresh_model) -> Any:
    """Make trainers that begin with the same adapters."""

    def make(*, dropout: float = 0.2, **options: Any) -> MemoryEfficientTrainer:
        torch.manual_seed(0)
        return make_trainer(model=fresh_model(lora_dropout=dropout), **options)

    return make
