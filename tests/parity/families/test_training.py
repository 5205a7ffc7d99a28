"""What is trained of each family: parts, adapters, gradients, the loss, 4 bits."""

from __future__ import annotations

import pytest
import torch
from families.builders import VARIANTS
from parity.conversations import CONVERSATIONS, can_take, make_sample, shake
from torch import nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from vlmtune.models.loading import load_model_for_training
from vlmtune.models.lora import prepare_full_finetuning, setup_lora
from vlmtune.models.quantization import get_quantization_config, quantised_modules
from vlmtune.training.loss import install_supervised_loss, targets_from_labels


class TestTraining:
    """Gradients reach what is trained and nothing else, and the loss is the plain one."""

    def test_parts_cover_every_parameter(self, family, ours) -> None:
        assert family.parts.keys() == {"language", "projector", "vision", "head"}
        assert all(list(ours.get_submodule(place).parameters()) for place in family.parts.values())
        places = tuple(place + "." for place in family.parts.values())
        places += tuple(name + "." for name in family.unused(ours.config))
        outside = {name for name, _ in ours.named_parameters() if not name.startswith(places)}
        assert outside == set(family.projector_parameters)
        assert ours.get_submodule(family.parts["head"]) is ours.get_output_embeddings()
        chosen = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(ours.config)]
        assert type(ours).__name__ == family.model_class == chosen.__name__

    def test_layers_are_the_lists_of_a_part(self, family, ours) -> None:
        for part, place in family.layers.items():
            layers = ours.get_submodule(f"{family.parts[part]}.{place}")
            assert isinstance(layers, torch.nn.ModuleList) and len(layers)

    @pytest.mark.parametrize("scope", ["language", "projector", "vision"])
    def test_lora_targets_are_all_linear_layers(self, scope, checkpoint, family, ours) -> None:
        inner = [p + "." for p in family.parts.values() if p.startswith(family.parts[scope] + ".")]
        found = {
            name.rpartition(".")[2]
            for name, module in ours.named_modules()
            if isinstance(module, nn.Linear)
            and name.startswith(family.parts[scope] + ".")
            and not name.startswith(tuple(family.unused(ours.config)) or "-")
            and not name.startswith(tuple(inner))
        }
        names = set(family.lora_targets[scope])
        assert found == names or (checkpoint in VARIANTS and found < names)

    @pytest.mark.proves("LoRA")
    @pytest.mark.parametrize("scopes", [("language",), ("projector", "vision"), ("language", "projector", "vision")])
    def test_adapters(self, scopes, family, folder, collator, image_folder) -> None:
        if scopes == ("projector", "vision") and not family.lora_targets["projector"]:
            scopes = ("vision",)
        model = setup_lora(load_model_for_training(folder, torch_dtype="float32"), lora_scopes=scopes, lora_dropout=0)
        shake(model)
        _backward(model, collator, image_folder)
        _check_gradients(model)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        places = tuple(f"base_model.model.{family.parts[scope]}" for scope in scopes)
        assert trained and all(name.startswith(places) for name in trained)
        assert all(any(name.startswith(place) for name in trained) for place in places)

    @pytest.mark.parametrize("parts", [("language", "projector"), ("vision",), ("projector",)])
    def test_parts_in_full(self, parts, family, folder, collator, image_folder) -> None:
        model = prepare_full_finetuning(load_model_for_training(folder, torch_dtype="float32"), parts)
        _backward(model, collator, image_folder)
        _check_gradients(model)
        for part in ("language", "projector", "vision"):
            inner = tuple(p + "." for p in family.parts.values() if p.startswith(family.parts[part] + "."))
            flags = {
                p.requires_grad
                for name, p in model.named_parameters()
                if name.startswith(family.parts[part] + ".") and not name.startswith(inner)
                if not name.startswith(tuple(family.unused(model.config)) or "-")
            }
            assert flags == {part in parts}, part

    def test_supervised_loss_is_the_dense_one(self, checkpoint, family, folder, collator, image_folder) -> None:
        names = [name for name in CONVERSATIONS if can_take(checkpoint, name)]
        batch = collator([make_sample(name, image_folder).to_row() for name in names])
        model = load_model_for_training(folder, torch_dtype="float32").eval()
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**inputs).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        dense = nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="sum")
        dense.backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        install_supervised_loss(model, chunk_tokens=3)
        sources, ids = targets_from_labels(batch["labels"])
        loss = model(**inputs, target_sources=sources, target_ids=ids)["loss"]
        loss.backward()
        torch.testing.assert_close(loss, dense)
        for name, gradient in expected.items():
            found = dict(model.named_parameters())[name].grad
            torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-5, msg=name)

    @pytest.mark.proves("4-bit")
    def test_four_bit_only_in_the_language_model(self, family, folder, collator, image_folder) -> None:
        pytest.importorskip("bitsandbytes")
        model = load_model_for_training(
            folder, quantization_config=get_quantization_config(use_4bit=True), torch_dtype="float32"
        )
        place = family.parts["language"] + "."
        linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(place)}
        assert set(quantised_modules(model)) == linear
        adapted = setup_lora(model, lora_scopes=("language",), lora_dropout=0)
        shake(adapted)
        _backward(adapted, collator, image_folder)
        _check_gradients(adapted)


def _backward(model, collator, image_folder) -> None:
    batch = collator([make_sample("three images", image_folder).to_row()])
    model(**batch).loss.backward()


def _check_gradients(model) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} is trained and has no gradient"
            # A bias of the keys changes no softmax.
            assert parameter.grad.any() or name.endswith("k_proj.bias"), f"{name} has a gradient of zero"
        else:
            assert parameter.grad is None, f"{name} is frozen and has a gradient"
