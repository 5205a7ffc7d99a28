"""Whole runs agree: shared and separate, cached and computed, trained and reloaded."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from invariants.trainers import WORDS, group_sampler, losses, make_rows, make_trainer, weights
from transformers import set_seed

from vlmtune.batching.collator import BaseVLMDataCollator, SharedImageCollator
from vlmtune.config import ModelWithLoRAArguments, TrainingArguments, VLMDataArguments
from vlmtune.data.sample import ImageRef, Sample
from vlmtune.models.features import FeatureCache, image_features
from vlmtune.models.loading import load_model_for_inference, load_model_for_training
from vlmtune.models.lora import prepare_full_finetuning, setup_lora
from vlmtune.training import run as run_module
from vlmtune.training.loss import install_supervised_loss
from vlmtune.training.run import run_training
from vlmtune.training.trainer import create_trainer


@pytest.fixture(scope="session")
def caption_folder(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Flickr-style folder: 4 images with 5 captions each."""
    folder, rng = tmp_path_factory.mktemp("captions"), random.Random(0)
    shutil.copytree(image_folder, folder / "Images")
    lines = ["image,caption"]
    lines += [f"{i}.jpg,{number} {' '.join(rng.choices(WORDS, k=4))}" for i in range(4) for number in range(5)]
    (folder / "captions.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("options", [{}, {"lora_scopes": ["language", "projector", "vision"]}, {"use_lora": False}])
def test_reloaded_equals_trained(
    options, lively_dir, processor, caption_folder, image_folder, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers = []
    monkeypatch.setattr(
        run_module, "create_trainer", lambda **given: trainers.append(create_trainer(**given)) or trainers[0]
    )
    result = run_training(
        ModelWithLoRAArguments(model_name_or_path=str(lively_dir), torch_dtype="float32", **options),
        VLMDataArguments(dataset_path=str(caption_folder), cache_dir=str(tmp_path / "cache")),
        TrainingArguments(
            output_dir=str(tmp_path / "out"), use_cpu=True, disable_tqdm=True, max_steps=3, learning_rate=1e-2
        ),
    )
    batch = BaseVLMDataCollator(processor, "gemma3")(make_rows(image_folder, 3, 1))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        trained = trainers[0].model.eval()(**inputs).logits
        reloaded, own_processor = load_model_for_inference(result.output_dir, torch_dtype="float32", device="cpu")
        base, _ = load_model_for_inference(lively_dir, torch_dtype="float32", device="cpu")
        torch.testing.assert_close(reloaded(**inputs).logits, trained, rtol=0, atol=0)
        assert (base(**inputs).logits - trained).abs().max() > 1e-2
    again = BaseVLMDataCollator(own_processor, "gemma3")(make_rows(image_folder, 3, 1))
    assert batch.keys() == again.keys()
    for name in batch:
        assert torch.equal(batch[name], again[name]), name


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_shared_run_equals_separate_run(kind, lively_dir, processor, image_folder, tmp_path) -> None:
    rows = make_rows(image_folder, 4, 5, longest=12)
    runs = {}
    for name, collator in (("shared", SharedImageCollator), ("separate", BaseVLMDataCollator)):
        model = load_model_for_training(lively_dir, torch_dtype="float32")
        set_seed(0)
        model = setup_lora(model, lora_r=4, lora_dropout=0.0) if kind == "lora" else prepare_full_finetuning(model)
        trainer = make_trainer(
            model,
            processor,
            rows,
            tmp_path / name,
            collator=collator(processor, "gemma3"),
            sampler=group_sampler(rows, 6),
            eval_rows=rows,
            max_steps=6,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
        )
        trainer.train()
        runs[name] = (losses(trainer), trainer.evaluate()["eval_loss"])
        assert trainer.work.samples == 3 * 20
        # 4 batches, 2 an update: 6 updates are 3 epochs; a shared run sees an image once a batch.
        assert trainer.work.images < 60 if name == "shared" else trainer.work.images == 60
    assert len(runs["shared"][0]) == 6
    assert runs["shared"][0] == pytest.approx(runs["separate"][0], rel=1e-5)
    assert runs["shared"][1] == pytest.approx(runs["separate"][1], rel=1e-5)
    assert runs["shared"][0][-1] < 0.99 * runs["shared"][0][0]


def test_cached_run_equals_computed_run(lively_dir, processor, image_folder, tmp_path) -> None:
    rows = make_rows(image_folder, 4, 5, longest=12)
    runs = {}
    for name in ("computed", "cached"):
        model = load_model_for_training(lively_dir, torch_dtype="float32")
        collator = SharedImageCollator(processor, "gemma3")
        if name == "cached":
            collator.cache = FeatureCache(tmp_path / "cache", {"family": "gemma3"})
            for index in range(4):
                pixels = collator.encoder.images(Sample("x", (ImageRef(str(image_folder / f"{index}.jpg")),), ()))
                collator.cache.put(f"k{index}", image_features(model, {"pixel_values": pixels["pixel_values"]})[0])
            collator.cache.flush()
        set_seed(0)
        model = setup_lora(model, lora_r=4, lora_dropout=0.1)
        calls = []
        base = model.get_base_model()
        base.get_submodule("model.vision_tower").register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer = make_trainer(
            model,
            processor,
            rows,
            tmp_path / name,
            collator=collator,
            sampler=group_sampler(rows, 5),
            max_steps=6,
        )
        trainer.train()
        runs[name] = (losses(trainer), weights(trainer.model))
        assert len(calls) == (0 if name == "cached" else 6)
        assert trainer.work.images > 0
    assert runs["cached"][0] == pytest.approx(runs["computed"][0], rel=1e-5)
    for tensor_name, tensor in runs["computed"][1].items():
        torch.testing.assert_close(runs["cached"][1][tensor_name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("first", [{"share_images": "off"}, {"cache_image_features": "off"}])
def test_run_training_gives_the_same_first_loss(first, lively_dir, caption_folder, tmp_path) -> None:
    """The options change how images are computed and in which order samples come, but not what is learned.

    One step over all 20 samples sees the same samples in any order, so its loss and gradient norm are the same.
    """
    records = []
    for number, options in enumerate((first, {})):
        result = run_training(
            ModelWithLoRAArguments(model_name_or_path=str(lively_dir), torch_dtype="float32", lora_dropout=0.0),
            VLMDataArguments(dataset_path=str(caption_folder), cache_dir=str(tmp_path / "cache"), **options),
            TrainingArguments(
                output_dir=str(tmp_path / str(number)),
                use_cpu=True,
                disable_tqdm=True,
                max_steps=2,
                logging_steps=1,
                warmup_steps=0,
                learning_rate=1e-3,
                per_device_train_batch_size=20,
            ),
        )
        lines = (result.output_dir / "log.jsonl").read_text().splitlines()
        records.append([entry for entry in map(json.loads, lines) if "loss" in entry])
    assert len(records[0]) == 2
    for one, other in zip(*records, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_loss_is_installed_once(lively_dir, processor, image_folder, tmp_path) -> None:
    """Two trainers on one model, as in a notebook that runs a cell twice, give the same evaluation loss."""
    rows = make_rows(image_folder, 2, 2)
    model = load_model_for_training(lively_dir, torch_dtype="float32")
    install_supervised_loss(model)
    first = make_trainer(model, processor, rows, tmp_path / "a", eval_rows=rows).evaluate()["eval_loss"]
    assert make_trainer(model, processor, rows, tmp_path / "b", eval_rows=rows).evaluate()["eval_loss"] == first
