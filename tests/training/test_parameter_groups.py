"""Learning rates of the parts: every parameter in one group, at the rate of its part."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vlmtune.config import ModelWithLoRAArguments
from vlmtune.errors import ConfigError
from vlmtune.models.families import FAMILIES
from vlmtune.models.loading import load_model_for_training
from vlmtune.models.lora import prepare_full_finetuning, setup_lora
from vlmtune.models.sizing import part_of
from vlmtune.training.parameter_groups import as_text, record, require_trained, split_by_part

EVERYWHERE = ("language", "projector", "vision")


def _args(**rates: float):
    return SimpleNamespace(
        **{"learning_rate": 1e-3, "vision_learning_rate": None, "projector_learning_rate": None} | rates
    )


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_the_rate_of_its_part(family, family_dir) -> None:
    record_ = FAMILIES[family]
    model = load_model_for_training(family_dir(family), torch_dtype="float32")
    prepare_full_finetuning(model, EVERYWHERE)
    optimizer = _optimizer(model)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    split_by_part(optimizer, model, record_, _args(vision_learning_rate=1e-5, projector_learning_rate=1e-4))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(rates) == len(decays)
    wanted = {"vision": 1e-5, "projector": 1e-4}
    inner = record_.parts["projector"].startswith(record_.parts["vision"] + ".")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = part_of(record_, name)
            assert rates[id(parameter)] == wanted.get(part, 1e-3), name
            if name.startswith(record_.parts["projector"] + ".") or name in record_.projector_parameters:
                assert part == "projector"
            elif name.startswith(record_.parts["vision"] + "."):
                assert part == "vision" and (inner or "projector" not in name)
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_without_rates_nothing_is_changed(tiny_model) -> None:
    optimizer = _optimizer(setup_lora(tiny_model))
    before = list(optimizer.param_groups)
    split_by_part(optimizer, tiny_model, FAMILIES["gemma3"], _args())
    assert all(one is other for one, other in zip(before, optimizer.param_groups, strict=True))


def test_the_vision_tower_alone(tiny_model) -> None:
    model = setup_lora(tiny_model, lora_scopes=("vision",))
    optimizer = _optimizer(model)
    split_by_part(optimizer, model, FAMILIES["gemma3"], _args(vision_learning_rate=1e-5))
    assert {group["lr"] for group in optimizer.param_groups if group["params"]} == {1e-5}


@pytest.mark.parametrize(
    "wrapper", ["module.{}", "_orig_mod.{}", "base_model.model.{}", "module._orig_mod.base_model.model.{}"]
)
def test_names_inside_what_wraps_a_model(wrapper) -> None:
    family = FAMILIES["qwen2_vl"]
    for part, name in (
        ("vision", "blocks.0.attn.qkv.weight"),
        ("projector", "mlp.0.weight"),
        ("language", "norm.weight"),
    ):
        assert part_of(family, wrapper.format(f"{family.parts[part]}.{name}")) == part
    assert part_of(family, "layers.module.weight") == "other"


def test_a_rate_for_a_frozen_part() -> None:
    model = ModelWithLoRAArguments(model_name_or_path="x")
    with pytest.raises(
        ConfigError, match=r"vision_learning_rate is set, but the vision is frozen; add vision to lora_sc"
    ):
        require_trained(model, _args(vision_learning_rate=1e-5))
    require_trained(
        ModelWithLoRAArguments(model_name_or_path="x", train_parts=["projector"]), _args(projector_learning_rate=1.0)
    )
    full = ModelWithLoRAArguments(model_name_or_path="x", use_lora=False, train_parts=["language"])
    with pytest.raises(ConfigError, match=r"projector_learning_rate is set, .* to train_parts, or leave it out"):
        require_trained(full, _args(projector_learning_rate=1.0))


def test_the_record_says_how_each_part_is_trained(tiny_model) -> None:
    options = {"lora_scopes": ("language", "vision"), "train_parts": ("projector",), "vision_lora_r": 3}
    model = setup_lora(tiny_model, lora_r=4, lora_alpha=8, **options)
    found = record(model, _args(vision_learning_rate=1e-5))
    assert found == {
        "language": {"how": "LoRA", "layers": 28, "rank": 4, "alpha": 8, "learning_rate": 1e-3},
        "projector": {"how": "in full", "learning_rate": 1e-3},
        "vision": {"how": "LoRA", "layers": 12, "rank": 3, "alpha": 8, "learning_rate": 1e-5},
    }
    assert as_text(found).splitlines()[1:] == [
        "projector: in full, learning rate 0.001",
        "vision: LoRA, layers 12, rank 3, alpha 8, learning rate 1e-05",
    ]
    assert json.loads(json.dumps(found)) == found
