"""Training computes what it should: accumulating, resuming, sharing, caching and saving change nothing in it.

Gradients are compared in float64 to 1e-10 where two ways of computing differ in the order of sums; losses of
whole runs are in float32, exact where the computation is the same and to 1e-5 where it is not.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, TrainerCallback, set_seed

from vlmtune.batching.collator import BaseVLMDataCollator, SharedImageCollator
from vlmtune.batching.sampler import ImageGroupSampler
from vlmtune.config import ModelWithLoRAArguments, TrainingArguments, VLMDataArguments
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.errors import AdapterError, ResumeError
from vlmtune.models.features import FeatureCache, image_features
from vlmtune.models.loading import load_model_for_inference, load_model_for_training
from vlmtune.models.lora import prepare_full_finetuning, setup_lora
from vlmtune.training import run as run_module
from vlmtune.training.loss import install_supervised_loss
from vlmtune.training.run import run_training
from vlmtune.training.trainer import MemoryEfficientTrainer, create_trainer

WORDS = "red green blue circle square triangle dog cat man woman left right above below two three".split()


# -- the pieces of a run ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def lively_dir(tiny_gemma3_dir: Path, processor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model on disk with norms that are not all one and images that matter."""
    model = AutoModelForImageTextToText.from_pretrained(tiny_gemma3_dir, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("lively")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def float64_base(lively_dir: Path) -> nn.Module:
    """A model in float64 throughout, to be copied."""
    model = AutoModelForImageTextToText.from_pretrained(lively_dir, dtype=torch.float64)
    # The norms compute in float32 whatever the weights are, which limits agreement to 2e-7.
    for module in model.modules():
        if type(module).__name__ == "Gemma3RMSNorm":
            module.forward = types.MethodType(lambda self, x: self._norm(x) * (1.0 + self.weight), module)
    return model


def make_rows(folder: Path, images: int, texts: int, seed: int = 0, longest: int = 20) -> list[dict[str, Any]]:
    """Rows of texts about images, the answers' lengths very unequal, some with the same question and first word.

    Tokens that such answers begin with lie once in a shared row and count once for each of them.
    """
    rng, rows = random.Random(seed), []
    for image in range(images):
        for text in range(texts):
            answer = rng.choice(["a dog ", ""]) + " ".join(rng.choices(WORDS, k=rng.choice([1, 2, longest])))
            question = "What is it?" if image % 2 else " ".join(rng.choices(WORDS, k=3))
            messages = (Message.make("user", question, images=1), Message.make("assistant", answer))
            sample = Sample(f"{image}#{text}", (ImageRef(str(folder / f"{image}.jpg")),), messages)
            rows.append(sample.to_row() | {"image_key": f"k{image}"})
    return rows


class _Doubles:
    """Gives a float64 model its pixels in float64."""

    def __call__(self, rows):
        batch = super().__call__(rows)
        return batch | {name: batch[name].double() for name in ("pixel_values",) if name in batch}


class SeparateDoubles(_Doubles, BaseVLMDataCollator):
    pass


class SharedDoubles(_Doubles, SharedImageCollator):
    pass


class FixedBatches(ImageGroupSampler):
    """Yields the batches it is given, in every epoch."""

    def __init__(self, batches: list[list[int]], total: int) -> None:
        super().__init__([""] * total, [1] * total, max(1, total // len(batches)))
        self.given = batches

    def __len__(self) -> int:
        return len(self.given)

    def step_batches(self):
        return ([[batch]] for batch in self.given)


class Gradients(TrainerCallback):
    """Keeps the gradients that each optimizer step is given."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


class At(TrainerCallback):
    """Does something at the end or the beginning of one step."""

    def __init__(self, step: int, action, *, begin: bool = False) -> None:
        self.step, self.action, self.begin = step, action, begin

    def on_step_begin(self, args, state, control, **kwargs):
        if self.begin and state.global_step + 1 == self.step:
            self.action(control=control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if not self.begin and state.global_step == self.step:
            self.action(control=control, **kwargs)


def stop(control, **_: Any) -> None:
    control.should_training_stop = True


def make_trainer(
    model, processor, rows, output_dir, *, collator=None, sampler=None, callbacks=(), eval_rows=None, **options
) -> MemoryEfficientTrainer:
    settings = {
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "warmup_steps": 0,
        "dataloader_num_workers": 0,
    }
    return create_trainer(
        model=model,
        args=TrainingArguments(output_dir=str(output_dir), **(settings | options)),
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=collator or SharedImageCollator(processor, "gemma3"),
        processor=processor,
        callbacks=list(callbacks),
        train_sampler=sampler,
    )


def losses(trainer) -> list[float]:
    """The loss of each step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def one_step(model, processor, rows, batches, collator_class, output_dir, **options):
    """Loss and gradients of one optimizer step over ``batches``."""
    seen = Gradients()
    trainer = make_trainer(
        model,
        processor,
        rows,
        output_dir,
        collator=collator_class(processor, "gemma3"),
        sampler=FixedBatches(batches, len(rows)),
        callbacks=[seen],
        max_steps=1,
        max_grad_norm=0,
        gradient_accumulation_steps=len(batches),
        **options,
    )
    trainer.train()
    return losses(trainer)[0], seen.steps[0]


def assert_equal(first, second, tolerance: float = 1e-10) -> None:
    # The trainer logs the loss from float32.
    assert first[0] == pytest.approx(second[0], rel=1e-6)
    assert first[1].keys() == second[1].keys()
    floor = 1e-6 * max(gradient.norm() for gradient in first[1].values())
    for name, gradient in first[1].items():
        difference = (gradient - second[1][name]).norm() / gradient.norm().clamp_min(floor)
        assert difference < tolerance, f"gradient of {name} differs by {difference:.1e}"


# -- one step ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def unequal_rows(image_folder: Path) -> list[dict[str, Any]]:
    """Four texts about two images, with answers of 1, 40, 2 and 17 words; the first two begin alike."""
    rows = make_rows(image_folder, 2, 2)
    for row, words in zip(rows, (1, 40, 2, 17), strict=True):
        row["messages"][0]["content"][1]["text"] = "What is it?"
        row["messages"][1]["content"][0]["text"] = " ".join(random.Random(words).choices(WORDS, k=words))
    rows[1]["messages"][1]["content"][0]["text"] = f"{rows[0]['messages'][1]['content'][0]['text']} and a cat" * 10
    return rows


@pytest.mark.parametrize("collator", [SeparateDoubles, SharedDoubles])
def test_four_batches_of_one_equal_one_of_four(collator, float64_base, processor, unequal_rows, tmp_path) -> None:
    one = one_step(copy.deepcopy(float64_base), processor, unequal_rows, [[0, 1, 2, 3]], collator, tmp_path / "1")
    four = one_step(
        copy.deepcopy(float64_base), processor, unequal_rows, [[0], [1], [2], [3]], collator, tmp_path / "4"
    )
    uneven = one_step(copy.deepcopy(float64_base), processor, unequal_rows, [[0, 2, 3], [1]], collator, tmp_path / "2")
    assert_equal(one, four)
    assert_equal(one, uneven)


def test_a_mean_of_means_would_be_noticed(float64_base, processor, unequal_rows) -> None:
    """The comparison above proves something only where averaging the batches' means gives another loss."""
    collate, model = SeparateDoubles(processor, "gemma3"), float64_base
    dense = [plain_loss(model, collate([row])) for row in unequal_rows]
    mean_of_means = sum(total / count for total, count in dense) / 4
    by_token = sum(total for total, _ in dense) / sum(count for _, count in dense)
    assert abs(mean_of_means - by_token) > 1e-3 * by_token


def plain_loss(model, batch) -> tuple[Any, int]:
    """Sum of the dense cross entropy of transformers' own logits, and the number of targets."""
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "sample_ids")}
    logits = model(**inputs).logits
    total = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total, int((labels[:, 1:] != -100).sum())


@pytest.mark.parametrize("collator", [SeparateDoubles, SharedDoubles])
@pytest.mark.parametrize("chunk", [0, 3])
def test_step_equals_dense_loss(collator, chunk, float64_base, processor, unequal_rows, tmp_path) -> None:
    dense = copy.deepcopy(float64_base)
    total, count = plain_loss(dense, SeparateDoubles(processor, "gemma3")(unequal_rows))
    (total / count).backward()
    expected = {name: p.grad for name, p in dense.named_parameters() if p.grad is not None}
    own = one_step(
        copy.deepcopy(float64_base),
        processor,
        unequal_rows,
        [[0, 1], [2, 3]],
        collator,
        tmp_path,
        loss_chunk_tokens=chunk,
    )
    assert_equal((float(total.detach() / count), expected), own)


def test_step_of_adapters_equals_dense_loss(float64_base, processor, unequal_rows, tmp_path) -> None:
    def adapted():
        set_seed(1)
        model = setup_lora(copy.deepcopy(float64_base), lora_scopes=["language", "vision"], lora_dropout=0.0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        # PEFT makes adapters in float32.
        return model.double()

    dense = adapted()
    total, count = plain_loss(dense, SeparateDoubles(processor, "gemma3")(unequal_rows))
    (total / count).backward()
    expected = {name: p.grad for name, p in dense.named_parameters() if p.requires_grad}
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())
    own = one_step(adapted(), processor, unequal_rows, [[0, 1], [2, 3]], SharedDoubles, tmp_path)
    assert_equal((float(total.detach() / count), expected), own)


# -- resuming ---------------------------------------------------------------------------------------------


def fresh_model(folder: Path, kind: str, seed: int) -> nn.Module:
    """The model of a run, with dropout; ``seed`` draws what the checkpoint must replace."""
    set_seed(seed)
    model = load_model_for_training(folder, torch_dtype="float32")
    if kind == "lora":
        return setup_lora(model, lora_r=4, lora_dropout=0.2)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    model = prepare_full_finetuning(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn_like(parameter)
    return model


def group_sampler(rows, batch_size: int = 2) -> ImageGroupSampler:
    return ImageGroupSampler([row["image_key"] for row in rows], [20 + i for i in range(len(rows))], batch_size, seed=3)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_weights(first, second, what: str = "") -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


# (kind, gradient accumulation, step of the checkpoint): an epoch has 7 batches, so that the ten steps after the
# checkpoint cross an epoch's end; step 7 is an epoch's end itself.
RESUMED = [("lora", 1, 10), ("full", 1, 10), ("lora", 1, 7)]


@pytest.mark.parametrize(("kind", "accumulate", "at"), RESUMED)
def test_resumed_equals_uninterrupted(kind, accumulate, at, lively_dir, processor, image_folder, tmp_path) -> None:
    rows = make_rows(image_folder, 7, 2, longest=10)
    assert len(group_sampler(rows)) == 7
    options = {"max_steps": 20, "gradient_accumulation_steps": accumulate, "save_strategy": "steps", "save_steps": at}

    def trainer(output_dir: Path, seed: int, **more: Any) -> MemoryEfficientTrainer:
        model = fresh_model(lively_dir, kind, seed)
        sampler = group_sampler(rows)
        return make_trainer(model, processor, rows, output_dir, sampler=sampler, **(options | more))

    whole = trainer(tmp_path / "whole", 0, save_strategy="no")
    whole.train()
    first = trainer(tmp_path / "parts", 0, callbacks=[At(at, stop)])
    first.train()
    assert first.state.global_step == at
    assert losses(first) == losses(whole)[:at]

    second = trainer(tmp_path / "parts", 99, save_strategy="no")
    torch.rand(17)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / f"checkpoint-{at}"))
    assert second.state.global_step == 20
    assert losses(second) == pytest.approx(losses(whole), rel=1e-6)
    assert_same_weights(weights(whole.model), weights(second.model))
    assert_same_optimizer(whole.optimizer.state_dict(), second.optimizer.state_dict())
    assert whole.lr_scheduler.state_dict() == second.lr_scheduler.state_dict()


def assert_same_optimizer(first, second) -> None:
    assert first["state"].keys() == second["state"].keys()
    assert len(first["state"]) > 0
    for index, state in first["state"].items():
        for name, tensor in state.items():
            torch.testing.assert_close(second["state"][index][name], tensor, rtol=0, atol=0)
    assert first["param_groups"] == second["param_groups"]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_dropout_is_on_in_these_runs(kind, lively_dir, processor, image_folder) -> None:
    """Resuming proves nothing about the random state where nothing is random."""
    model = fresh_model(lively_dir, kind, 0).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    batch = BaseVLMDataCollator(processor, "gemma3")(make_rows(image_folder, 1, 2))
    with torch.no_grad():
        assert plain_loss(model, batch)[0] != plain_loss(model, batch)[0]


def test_resumed_in_the_base_order(lively_dir, processor, image_folder, tmp_path) -> None:
    """The base class's own order resumes as well, with separate rows and accumulated batches."""
    rows = make_rows(image_folder, 5, 2, longest=10)

    # 5 batches of 2 an epoch, the last update of an epoch with one batch: step 4 stands within the second epoch.
    options = {"max_steps": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}

    def trainer(name: str, seed: int, **more: Any) -> MemoryEfficientTrainer:
        collator = BaseVLMDataCollator(processor, "gemma3")
        model = fresh_model(lively_dir, "lora", seed)
        return make_trainer(model, processor, rows, tmp_path / name, collator=collator, **(options | more))

    whole = trainer("whole", 0)
    whole.train()
    first = trainer("parts", 0, save_strategy="steps", save_steps=4, callbacks=[At(4, stop)])
    first.train()
    second = trainer("parts", 5)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert losses(second) == pytest.approx(losses(whole), rel=1e-6)


# -- the best checkpoint ----------------------------------------------------------------------------------


def spoil(model, **_: Any) -> None:
    """Make the trained weights worse, so that an earlier checkpoint is the best."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))


def best_trainer(kind, lively_dir, processor, image_folder, output_dir, *callbacks) -> MemoryEfficientTrainer:
    rows = make_rows(image_folder, 2, 2, longest=5)
    return make_trainer(
        fresh_model(lively_dir, kind, 0),
        processor,
        rows,
        output_dir,
        eval_rows=rows,
        callbacks=callbacks,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    )


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_best_model_is_loaded_at_the_end(kind, lively_dir, processor, image_folder, tmp_path) -> None:
    at_two: dict[str, torch.Tensor] = {}
    keep = At(2, lambda model, **_: at_two.update(weights(model)))
    worse = At(4, spoil)
    trainer = best_trainer(kind, lively_dir, processor, image_folder, tmp_path, keep, worse)
    trainer.train()
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluations[1] > evaluations[0]
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"
    assert_same_weights(at_two, weights(trainer.model))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluations[0], rel=1e-6)


@pytest.mark.parametrize(("kind", "error"), [("lora", AdapterError), ("full", ResumeError)])
def test_best_model_without_a_tensor_is_an_error(kind, error, lively_dir, processor, image_folder, tmp_path) -> None:
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"

    def damage(model, **_: Any) -> None:
        spoil(model)
        file = tmp_path / "checkpoint-2" / name
        tensors = load_file(file)
        tensors.pop(next(key for key in tensors if "layers.0.mlp" in key and "vision" not in key))
        save_file(tensors, file, metadata={"format": "pt"})

    trainer = best_trainer(kind, lively_dir, processor, image_folder, tmp_path, At(4, damage))
    with pytest.raises(error, match="missing"):
        trainer.train()


# -- reloading --------------------------------------------------------------------------------------------


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


# -- whole runs -------------------------------------------------------------------------------------------


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


def test_shared_rows_hold_targets_of_several_samples(processor, unequal_rows) -> None:
    """The comparisons of shared and separate rows prove something about weights only where some are above one."""
    batch = SharedImageCollator(processor, "gemma3")(unequal_rows)
    assert batch["target_weights"].max() == 2
    assert batch["target_weights"].sum() > len(batch["target_ids"])
