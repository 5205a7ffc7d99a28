"""A whole run: what it writes, what its record says, how it goes on, and which images it computes once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training.run_files import contents, log, record
from transformers import AutoProcessor

from vlmtune.batching.collator import SharedImageCollator, create_data_collator
from vlmtune.data.fingerprint import fingerprint
from vlmtune.data.loading import load_samples
from vlmtune.errors import ConfigError, ModelError, NonFiniteError
from vlmtune.evaluation.card import CARD, leave_card
from vlmtune.models.families import FAMILIES
from vlmtune.models.loading import load_model_for_inference
from vlmtune.models.provenance import versions
from vlmtune.models.sizing import count_parameters
from vlmtune.training.callbacks import TowerAside
from vlmtune.training.image_reuse import shares_images
from vlmtune.training.run import run_training
from vlmtune.training.trainer import MemoryEfficientTrainer


def test_result(finished_run) -> None:
    result = finished_run.result
    assert result.output_dir == finished_run.folder
    assert result.steps == 4
    assert result.seconds > 0
    assert result.metrics["train_loss"] > 0
    assert result.metrics["eval_loss"] > 0


def test_output_files(finished_run) -> None:
    names = {path.name for path in finished_run.folder.iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "processor_config.json",
        "tokenizer.json",
        "run.json",
        "log.jsonl",
        "left_out.jsonl",
        "README.md",
        "checkpoint-2",
        "checkpoint-4",
    }
    assert not any(name.endswith((".bin", ".tmp")) for name in names)
    assert AutoProcessor.from_pretrained(finished_run.folder).chat_template


def test_model_card(finished_run) -> None:
    text = (finished_run.folder / CARD).read_text(encoding="utf-8")
    assert "[More Information Needed]" not in text
    assert "torch " in text and record(finished_run.folder)["data"]["train"]["fingerprint"] in text


def test_a_card_that_cannot_be_written_loses_no_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    leave_card(tmp_path / "gone")
    assert "no model card was written into" in caplog.text


def test_record(finished_run, tiny_gemma3_dir: Path, caption_folder: Path, eval_folder: Path) -> None:
    found = record(finished_run.folder)
    assert found["status"] == "finished"
    assert found["versions"] == versions()
    assert found["hardware"]["cores"] >= 1
    arguments = found["arguments"]
    assert arguments["model"]["model_name_or_path"] == str(tiny_gemma3_dir)
    assert arguments["model"]["lora_r"] == 16
    assert arguments["data"]["dataset_path"] == str(caption_folder)
    assert arguments["training"]["max_steps"] == 4
    assert found["model"]["name"] == str(tiny_gemma3_dir)
    assert found["model"]["family"] == "gemma3"
    assert found["model"]["parameters"] == count_parameters(finished_run.trainer.model)
    assert found["metrics"]["eval_loss"] == finished_run.result.metrics["eval_loss"]
    assert found["metrics"]["training_seconds"] > 0
    data = found["data"]
    assert data["format"] == "flickr"
    assert (data["train"]["samples"], data["train"]["left_out"]) == (20, 3)
    assert data["train"]["fingerprint"] == fingerprint(load_samples(caption_folder, max_bad_fraction=0.5).dataset)
    assert data["train"]["tokens"] > data["train"]["supervised_tokens"] > 20
    assert data["evaluation"]["samples"] == 4
    assert data["evaluation"]["fingerprint"] == fingerprint(load_samples(eval_folder, max_bad_fraction=0.5).dataset)


def test_bad_rows_are_all_named(finished_run) -> None:
    lines = [json.loads(line) for line in (finished_run.folder / "left_out.jsonl").read_text().splitlines()]
    reasons = {line["id"]: line["reason"] for line in lines}
    assert len(lines) == len(reasons) == 4
    assert "absent.jpg" in reasons["absent.jpg#0"]
    assert "empty" in reasons["captions.txt, line 23"]
    assert "50" in reasons["1.jpg#5"]
    # Of the data to evaluate on.
    assert "gone.jpg" in reasons["gone.jpg#0"]
    assert finished_run.result.left_out == [(line["id"], line["reason"]) for line in lines]


def test_log(finished_run) -> None:
    entries = log(finished_run.folder)
    assert entries == finished_run.trainer.state.log_history
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4]
    # The last step's evaluation is that of the finished model: it is not made twice.
    assert [entry["step"] for entry in entries if "eval_loss" in entry] == [2, 4]
    first = entries[0]
    assert {"loss", "grad_norm", "learning_rate", "samples_per_second", "data_wait_share"} <= first.keys()
    assert 0 <= first["data_wait_share"] <= 1
    assert 0.1 < first["peak_memory_gib"] < 100
    text = "\n".join(finished_run.messages)
    assert "trainable parameters" in text
    assert "4 images, 20 texts, 20 of them share an image" in text
    assert "step 4/4: loss" in text
    assert "evaluation loss" in text
    assert "computed the features of 6 images" in text


def test_no_secret_is_written(finished_run) -> None:
    assert finished_run.arguments[2].hub_token == "hf_planted_secret"
    for name, content in contents(finished_run.folder).items():
        assert b"planted_secret" not in content, name
    assert record(finished_run.folder)["arguments"]["training"]["hub_token"] == "(hidden)"


def test_the_saved_adapter_is_the_trained_one(finished_run, rows) -> None:
    reloaded, processor = load_model_for_inference(finished_run.folder, torch_dtype="float32", device="cpu")
    inputs = {name: v for name, v in create_data_collator(processor, "gemma3")(rows).items() if name != "labels"}
    with torch.no_grad():
        trained = finished_run.trainer.model.eval()(**inputs).logits
        torch.testing.assert_close(reloaded(**inputs).logits, trained, rtol=0, atol=0)


def test_parts_with_ranks_and_rates_of_their_own(run_arguments, tmp_path: Path, caplog) -> None:
    """From options to steps, record, log and adapter; stopped and resumed, PiSSA's start included."""
    options = {
        "max_steps": 4,
        "save_steps": 2,
        "lora_scopes": ["language", "vision"],
        "train_parts": ["projector"],
        "lora_r": 4,
        "vision_lora_r": 2,
        "lora_init": "pissa",
        "learning_rate": 1e-3,
        "vision_learning_rate": 1e-30,
        "projector_learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
    }
    with caplog.at_level("INFO", logger="vlmtune"):
        run_training(*run_arguments(tmp_path / "whole", **options))
    assert "\nvision: LoRA, layers 12, rank 2, alpha 32, learning rate 1e-30" in caplog.text
    # Said before training, so that nobody learns it from a server that answers as the base does.
    assert "do not apply LoRA on the vision and modules trained in full (projector) of an adapter: merge" in caplog.text
    parts = record(tmp_path / "whole")["model"]["parts"]
    assert parts["projector"] == {"how": "in full", "learning_rate": 5e-3}
    assert (parts["language"]["rank"], parts["language"]["learning_rate"]) == (4, 1e-3)
    saved = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    # What was learned is what the saved pair of adapters differ by: in the tower, nothing.
    for name in (name for name in saved if ".lora_A." in name):
        trained, start = saved[name].chunk(2)
        assert torch.equal(trained, start) == ("vision_tower" in name), name
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    run_training(*run_arguments(tmp_path / "parts", **options, resume_from_checkpoint="true"))
    again = load_file(tmp_path / "parts" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())


def test_a_rate_for_a_frozen_part_is_found_before_weights_load(run_arguments, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vision_learning_rate is set, but the vision is frozen"):
        run_training(*run_arguments(tmp_path, vision_learning_rate=1e-5))


def test_resumed_run_equals_uninterrupted(finished_run, run_arguments, eval_folder, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_run.folder, folder)
    shutil.rmtree(folder / "checkpoint-4")
    for name in ("adapter_model.safetensors", "log.jsonl"):
        (folder / name).unlink()
    created = record(folder)["created"]
    result = run_training(
        *run_arguments(
            folder,
            max_steps=4,
            per_device_train_batch_size=10,
            eval_dataset_path=str(eval_folder),
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            resume_from_checkpoint="true",
        )
    )
    assert result.steps == 4
    figures = ("loss", "eval_loss", "grad_norm", "learning_rate")
    own, whole = (
        [{name: entry[name] for name in figures if name in entry} for entry in log(place)]
        for place in (folder, finished_run.folder)
    )
    assert own == whole
    weights = "adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (finished_run.folder / weights).read_bytes()
    assert record(folder)["created"] == created
    assert record(folder)["status"] == "finished"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NonFiniteError("a NaN"), "stopped by NonFiniteError: a NaN"),
        (KeyboardInterrupt(), "stopped by KeyboardInterrupt"),
    ],
)
def test_a_stopped_run_is_recorded(
    error, status, run_arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = MemoryEfficientTrainer.training_step

    def stopping(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 2:
            raise error
        return step(self, *args, **kwargs)

    monkeypatch.setattr(MemoryEfficientTrainer, "training_step", stopping)
    with pytest.raises(type(error)):
        run_training(*run_arguments(tmp_path / "run", max_steps=4, save_steps=2))
    assert record(tmp_path / "run")["status"] == status
    assert [entry["step"] for entry in log(tmp_path / "run")] == [1, 2]
    assert (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").exists()
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


# -- images computed once ---------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["auto", "on", "off"])
def test_share_images(choice, run_arguments, made_trainers, tmp_path: Path) -> None:
    run_training(*run_arguments(tmp_path / "run", share_images=choice, max_steps=1, per_device_train_batch_size=20))
    trainer = made_trainers[0]
    assert trainer.work.samples == 20
    assert trainer.work.images == (20 if choice == "off" else 4)
    assert isinstance(trainer.data_collator, SharedImageCollator) == (choice != "off")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_sharing_where_the_family_allows(family) -> None:
    assert shares_images(family, "auto") == bool(family.sharing)
    assert not shares_images(family, "off")
    if family.sharing:
        assert shares_images(family, "on")
    else:
        with pytest.raises(ConfigError, match="share_images is on"):
            shares_images(family, "on")


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "paged|sdpa"])
def test_attention_code_without_masks_shares_nothing(attention, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="vlmtune.training")
    assert all(shares_images(FAMILIES["gemma3"], "on", exact) for exact in ("sdpa", "eager", "flex_attention", None))
    assert not caplog.messages
    assert not shares_images(FAMILIES["gemma3"], "auto", attention)
    assert f"attn_implementation {attention} takes no mask" in caplog.text
    with pytest.raises(ConfigError, match=r"share_images is on, but attn_implementation"):
        shares_images(FAMILIES["gemma3"], "on", attention)


@pytest.mark.parametrize("choice", ["auto", "on", "off"])
def test_cache_image_features(choice, run_arguments, made_trainers, tmp_path: Path) -> None:
    shown: list[tuple[int, int]] = []
    arguments = run_arguments(
        tmp_path / "run", cache_image_features=choice, max_steps=1, cache_dir=str(tmp_path / "features")
    )
    run_training(*arguments, progress=lambda done, total: shown.append((done, total)))
    cache = made_trainers[0].data_collator.cache
    assert (cache is None) == (choice == "off")
    callbacks = made_trainers[0].callback_handler.callbacks
    assert any(isinstance(one, TowerAside) for one in callbacks) == (cache is not None)
    assert shown == ([] if choice == "off" else [(4, 4)])
    assert len(list((tmp_path / "features").glob("*/*.safetensors"))) == (0 if choice == "off" else 1)
    if cache is not None:
        assert len(cache) == 4


@pytest.mark.parametrize(
    ("options", "part"),
    [({"lora_scopes": ["language", "vision"]}, "vision"), ({"use_lora": False}, "projector")],
)
def test_a_trained_tower_is_not_cached(options, part, run_arguments, made_trainers, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{part}.*image features change from step to step"):
        run_training(*run_arguments(tmp_path / "on", cache_image_features="on", **options))
    run_training(*run_arguments(tmp_path / "auto", cache_image_features="auto", max_steps=1, **options))
    assert made_trainers[-1].data_collator.cache is None


def test_a_full_cache(run_arguments, made_trainers, tmp_path: Path) -> None:
    small = {"cache_max_gb": 1e-9, "cache_dir": str(tmp_path / "features"), "max_steps": 1}
    run_training(*run_arguments(tmp_path / "auto", **small))
    assert made_trainers[-1].data_collator.cache is None
    with pytest.raises(ModelError, match="cache_max_gb"):
        run_training(*run_arguments(tmp_path / "on", cache_image_features="on", **small))
    assert not list((tmp_path / "on").iterdir())
