"""The trainer saves whole checkpoints and goes on from nothing less."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from vlmtune.batching.collator import SharedImageCollator, create_data_collator
from vlmtune.config import TrainingArguments
from vlmtune.errors import ResumeError, TrainingError
from vlmtune.training.checkpoints import latest_checkpoint, seal
from vlmtune.training.trainer import create_trainer

OWN_FILES = {"trainer_state.json", "training_args.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_every_checkpoint_is_whole(kind, make_trainer, processor, rows, tmp_path: Path) -> None:
    trainer = make_trainer(kind, max_steps=2, save_strategy="steps", save_steps=1, hub_token="hf_planted_secret")
    trainer.train()
    expected = create_data_collator(processor, "gemma3")(rows)
    for step in (1, 2):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        names = {path.name for path in folder.iterdir()}
        assert names >= OWN_FILES | {"chat_template.jinja", "tokenizer.json", "processor_config.json"}
        assert ("adapter_model.safetensors" in names) == (kind == "lora")
        assert ("model.safetensors" in names) == (kind == "full")
        # What is pickled is the base class's and holds tensors and numbers; arguments are JSON.
        assert {path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")} == {
            "optimizer.pt",
            "scheduler.pt",
            "rng_state.pth",
        }
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(folder / name, weights_only=True)
        arguments = (folder / "training_args.json").read_text()
        assert json.loads(arguments)["max_steps"] == 2
        assert "hf_planted_secret" not in arguments
        own = create_data_collator(AutoProcessor.from_pretrained(folder), "gemma3")(rows)
        assert expected.keys() == own.keys()
        assert all(torch.equal(expected[name], own[name]) for name in expected)


def test_save_model_writes_the_processor(make_trainer, tmp_path: Path) -> None:
    make_trainer().save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "chat_template.jinja").exists()
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "saved" / "training_args.bin").exists()


@pytest.fixture(scope="module")
def checkpoints(tiny_gemma3_dir, processor, rows, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of one step of an adapter and one of full weights; treat as read-only."""
    from vlmtune.models.loading import load_model_for_training
    from vlmtune.models.lora import prepare_full_finetuning, setup_lora

    found = {}
    for kind in ("lora", "full"):
        model = load_model_for_training(tiny_gemma3_dir, torch_dtype="float32")
        folder = tmp_path_factory.mktemp(kind)
        create_trainer(
            model=setup_lora(model, lora_r=4) if kind == "lora" else prepare_full_finetuning(model),
            args=TrainingArguments(
                output_dir=str(folder), use_cpu=True, disable_tqdm=True, max_steps=1, save_steps=1, logging_steps=1
            ),
            train_dataset=rows,
            data_collator=SharedImageCollator(processor, "gemma3"),
        ).train()
        found[kind] = folder / "checkpoint-1"
    return found


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_resuming_from_the_other_kind_is_refused(kind, make_trainer, checkpoints) -> None:
    other, holds, trains = (
        ("full", "full weights", "an adapter") if kind == "lora" else ("lora", "an adapter", "full weights")
    )
    with pytest.raises(ResumeError, match=f"holds {holds}, but this run trains {trains}"):
        make_trainer(kind).train(resume_from_checkpoint=str(checkpoints[other]))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_resuming_from_no_checkpoint_is_refused(kind, make_trainer, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "nothing", tmp_path / "empty"):
        trainer = make_trainer(kind)
        with pytest.raises(ResumeError, match=str(folder)):
            trainer.train(resume_from_checkpoint=str(folder))
        assert trainer.state.global_step == 0


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("absent", ["trainer_state.json", "optimizer.pt", "scheduler.pt"])
def test_resuming_from_half_a_checkpoint_is_refused(kind, absent, make_trainer, checkpoints, tmp_path: Path) -> None:
    """The base class would go on with a new optimizer and say nothing."""
    shutil.copytree(checkpoints[kind], tmp_path / "copy")
    (tmp_path / "copy" / absent).unlink()
    with pytest.raises(ResumeError, match=absent):
        make_trainer(kind).train(resume_from_checkpoint=str(tmp_path / "copy"))


def test_resume_true_takes_the_last_finished_checkpoint(make_trainer, checkpoints, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ResumeError, match="no finished checkpoint"):
        make_trainer().train(resume_from_checkpoint=True)
    shutil.copytree(checkpoints["lora"], run / "checkpoint-1")
    (run / "checkpoint-3").mkdir()
    trainer = make_trainer(max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2]


def test_latest_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best"):
        (tmp_path / name).mkdir()
        seal(tmp_path / name)
    (tmp_path / "checkpoint-11").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_no_best_checkpoint(make_trainer) -> None:
    with pytest.raises(TrainingError, match="no best checkpoint"):
        make_trainer()._load_best_model()
