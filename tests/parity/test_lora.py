"""Each part of each family frozen, adapted or trained in full, with its own rank and scale, and loaded exactly."""

from __future__ import annotations

import pytest
import torch
from training_stand_in import shift_trainable

from vlmtune.batching.collator import BaseVLMDataCollator
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.errors import ConfigError
from vlmtune.models.checkpoint import attach_adapter, save_model_and_processor
from vlmtune.models.families import FAMILIES
from vlmtune.models.loading import load_model_for_training, load_processor
from vlmtune.models.lora import setup_lora
from vlmtune.models.quantization import get_quantization_config, quantised_modules
from vlmtune.models.sizing import describe_training

SCOPES = ("language", "projector", "vision")
# (adapted, in full); the rest is frozen.
CHOICES = [
    (("language",), ("projector",)),
    *(
        pytest.param(*choice, marks=pytest.mark.slow)
        for choice in [
            (("projector", "vision"), ("language",)),
            (("vision",), ("language",)),
            (("language",), ("projector", "vision")),
            (("language", "projector", "vision"), ()),
        ]
    ),
]


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def folder(family, family_dir):
    return family_dir(family.name)


@pytest.fixture(scope="module")
def collator(folder, family):
    return BaseVLMDataCollator(load_processor(folder), family)


@pytest.fixture(scope="module")
def batch(collator, image_folder):
    ref = ImageRef(path=str(image_folder / "1.jpg"))
    messages = (Message.make("user", "What color is the shape?", images=1), Message.make("assistant", "red"))
    return collator([Sample("a", (ref,), messages).to_row()])


def _base(folder):
    return load_model_for_training(folder, torch_dtype="float32").eval()


def _logits(model, batch):
    with torch.no_grad():
        return model.eval()(**{key: value for key, value in batch.items() if key != "labels"}).logits


@pytest.mark.parametrize(("adapted", "in_full"), CHOICES)
def test_each_part_as_chosen(adapted, in_full, family, folder, collator, batch, tmp_path) -> None:
    model = setup_lora(
        _base(folder),
        lora_scopes=adapted,
        train_parts=in_full,
        lora_r=4,
        lora_alpha=8,
        vision_lora_r=3 if "vision" in adapted else None,
        vision_lora_alpha=5 if "vision" in adapted else None,
        projector_lora_r=2 if "projector" in adapted else None,
        lora_dropout=0,
    )
    ranks = {"language": (4, 8), "projector": (2, 8), "vision": (3, 5)}
    for part, entry in describe_training(model).items():
        if part in in_full or (part in adapted and not family.lora_targets[part]):
            assert entry == {"how": "in full"}, part
        elif part in adapted:
            assert (entry["how"], entry["rank"], entry["alpha"]) == ("LoRA", *ranks[part])
        else:
            assert entry == {"how": "frozen"}, part
    shift_trainable(model, 0.05)
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        # A bias of the keys changes no softmax, and a picture of one tile leaves some positions unused.
        idle = name.endswith("k_proj.bias") or not parameter.requires_grad
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert idle or parameter.grad.any(), name
    save_model_and_processor(model, collator.processor, tmp_path)
    loaded = attach_adapter(_base(folder), tmp_path)
    own = dict(model.named_parameters())
    assert own.keys() == dict(loaded.named_parameters()).keys()
    assert all(torch.equal(parameter, own[name]) for name, parameter in loaded.named_parameters())
    assert torch.equal(_logits(loaded, batch), _logits(model, batch))
    assert not torch.allclose(_logits(model, batch), _logits(_base(folder), batch), atol=1e-3)


def test_embedding_and_head_stay_tied(family, folder, collator, batch, tmp_path) -> None:
    base = _base(folder)
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    model = setup_lora(base, lora_r=2, modules_to_save=["embed_tokens"])
    inner = model.get_base_model()
    assert (inner.get_output_embeddings().weight is inner.get_input_embeddings().weight) == tied
    with torch.no_grad():
        inner.get_input_embeddings().weight.mul_(1.5)
    save_model_and_processor(model, collator.processor, tmp_path)
    loaded = attach_adapter(_base(folder), tmp_path)
    assert torch.equal(_logits(loaded, batch), _logits(model, batch))
    again = loaded.get_base_model()
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied
    # Were it not tied any more, the head would be the base's.
    head = again.get_output_embeddings().weight
    assert torch.equal(head, _base(folder).get_output_embeddings().weight) != tied


def test_a_scope_without_such_layers_is_an_error(family, folder) -> None:
    with pytest.raises(ConfigError, match=r"no_such matches no linear layer in vision of .*Linear layers there: "):
        setup_lora(_base(folder), lora_scopes=["vision"], lora_target_modules=["no_such"])
    if family.lora_targets["projector"]:
        with pytest.raises(ConfigError, match="q_proj matches no linear layer in projector"):
            setup_lora(_base(folder), lora_scopes=["language", "projector"], lora_target_modules=["q_proj"])


def test_all_linear_is_the_language_models(family, folder) -> None:
    model = setup_lora(_base(folder), lora_target_modules=["all-linear"])
    place = f"base_model.model.{family.parts['language']}."
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted and all(name.startswith(place) for name in adapted)


# In 4 bits, tests/parity/families counts them too.
@pytest.mark.parametrize("bits", [pytest.param(4, marks=pytest.mark.slow), 8])
def test_nothing_quantised_outside_the_language_model(bits, family, folder, batch) -> None:
    pytest.importorskip("bitsandbytes")
    config = get_quantization_config(use_4bit=bits == 4, use_8bit=bits == 8)
    base = load_model_for_training(folder, quantization_config=config, torch_dtype="float32")
    place = family.parts["language"] + "."
    linear = {n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith(place)}
    assert set(quantised_modules(base)) == linear
    # In training mode: for evaluation, bitsandbytes packs weights anew on the CPU, which tiny ones cannot be.
    whole, quantised = (float(one.train()(**batch).loss) for one in (_base(folder), base))
    assert 0 < abs(quantised - whole) < 0.3 * whole
    model = setup_lora(base, lora_scopes=("language", "vision"), lora_dropout=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)
    model(**batch).loss.backward()
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)
