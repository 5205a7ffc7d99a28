"""A family without a record gets a conservative one from its checkpoint, or is refused with the reason."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
import transformers
from torch import nn

from vlmtune.errors import UnsupportedModelError
from vlmtune.evaluation import probe
from vlmtune.evaluation.probe import require_sound
from vlmtune.models import generic
from vlmtune.models.families import FAMILIES, REFUSED, get_family
from vlmtune.models.loading import load_config, load_model_for_training, load_processor
from vlmtune.models.lora import setup_lora
from vlmtune.models.quantization import get_quantization_config, quantised_modules
from vlmtune.training import loss as loss_module
from vlmtune.training.loss import install_supervised_loss
from vlmtune.training.probe import require_trainable


@pytest.fixture(scope="module")
def folder(family_dir):
    return family_dir("aya_vision")


@pytest.fixture(scope="module")
def record(folder):
    return get_family(load_config(folder))


@pytest.fixture
def model(folder):
    return load_model_for_training(folder, torch_dtype="float32")


@pytest.fixture
def processor(folder):
    return load_processor(folder)


def test_the_record_is_conservative(record, model) -> None:
    assert record.generic and record.name == "aya_vision" and record.name not in FAMILIES
    assert not record.sharing and not record.feature_cache and record.sharing_reason
    assert record.lora_targets.keys() == {"language"}
    language = model.get_submodule(record.parts["language"])
    linear = {n.rpartition(".")[2] for n, m in language.named_modules() if isinstance(m, nn.Linear)}
    assert linear == set(record.lora_targets["language"])
    assert get_family(model) == record == get_family(setup_lora(model))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("paligemma", "gemma3")])
def test_it_reads_what_the_records_of_known_families_say(name, family_dir) -> None:
    """Read off the checkpoints of families that have a record, most facts are those of the record."""
    known, config = FAMILIES[name], load_config(family_dir(name))
    if name == "llava":
        with pytest.raises(UnsupportedModelError, match="closes an answer with no token"):
            generic.generic_family(config)
        return
    if name in ("llava_next", "granite_docling"):
        return
    found = generic.generic_family(config)
    same = ["name", "model_class", "processor_class", "needs_token_type_ids", "turn_end", "image_axis"]
    assert {field: getattr(found, field) for field in same} == {field: getattr(known, field) for field in same}
    assert found.parts["language"] == known.parts["language"] and found.parts["vision"] == known.parts["vision"]
    assert set(found.image_inputs) == set(known.image_inputs)
    assert set(found.lora_targets["language"]) == set(known.lora_targets["language"])


def test_it_passes_the_checks(record, model, processor, caplog) -> None:
    with caplog.at_level("WARNING", "vlmtune"):
        require_sound(model, processor, record)
        require_sound(model, processor, record)
    assert [r.message for r in caplog.records if "does not know: it passed the checks at start" in r.message] != []
    assert sum("passed the checks" in r.message for r in caplog.records) == 1
    adapted = setup_lora(model, lora_dropout=0)
    install_supervised_loss(adapted)
    require_trainable(adapted, processor, record)
    assert all(parameter.grad is None for parameter in adapted.parameters())


def test_four_bit_only_in_the_language_model(record, folder, processor) -> None:
    pytest.importorskip("bitsandbytes")
    quantised = load_model_for_training(
        folder, quantization_config=get_quantization_config(use_4bit=True), torch_dtype="float32"
    )
    place = record.parts["language"] + "."
    linear = {n for n, m in quantised.named_modules() if isinstance(m, nn.Linear) and n.startswith(place)}
    assert set(quantised_modules(quantised)) == linear


WRONG = {
    "image_token_attribute": ({"image_token_attribute": "downsample_factor"}, "0 places in the text and"),
    "turn_end": ({"turn_end": "<EOS_TOKEN>"}, "does not close the assistant's turn"),
    "image_inputs": ({"image_inputs": ()}, "a first sample fails with"),
    "image_axis": ({"image_axis": 1}, "pixel_values|first sample fails"),
    "needs_token_type_ids": ({"needs_token_type_ids": True}, "token_type_ids"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_fact_is_refused_at_start(name, record, model, processor) -> None:
    wrong, message = WRONG[name]
    with pytest.raises(UnsupportedModelError, match=rf"aya_vision.*a check at start failed: .*({message})"):
        require_sound(model, processor, dataclasses.replace(record, **wrong))


def test_images_that_change_nothing_are_refused(record, model, processor) -> None:
    with torch.no_grad():
        for parameter in model.get_submodule(record.parts["projector"]).parameters():
            parameter.zero_()
    with pytest.raises(UnsupportedModelError, match="another image changes nothing"):
        require_sound(model, processor, record)


@pytest.mark.parametrize(
    ("mixed", "message"), [("tokens", "seen before they are predicted"), ("samples", "not what it is alone")]
)
def test_a_model_that_mixes_what_it_must_not_is_refused(mixed, message, record, model, processor, monkeypatch) -> None:
    forward = model.forward

    def wrong(**inputs):
        found = forward(**inputs)
        if mixed == "tokens":
            found.logits = found.logits.flip(1).cumsum(1).flip(1) if len(found.logits) == 1 else found.logits
        else:
            found.logits = found.logits + found.logits.mean(0, keepdim=True)
        return found

    monkeypatch.setattr(model, "forward", wrong)
    monkeypatch.setattr(probe._Probe, "_together", probe._Probe._together if mixed == "samples" else lambda self: None)
    with pytest.raises(UnsupportedModelError, match=message):
        require_sound(model, processor, record)


def test_a_loss_that_is_not_of_the_models_logits_is_refused(record, model, processor, monkeypatch) -> None:
    adapted = setup_lora(model, lora_dropout=0)
    wrong = dataclasses.replace(record, logit_scale=lambda config: 3.0)
    monkeypatch.setattr(loss_module, "get_family", lambda model: wrong)
    install_supervised_loss(adapted)
    with pytest.raises(UnsupportedModelError, match=r"the loss is [\d.]+ and that of the model's logits is [\d.]+"):
        require_trainable(adapted, processor, record)


def test_gradients_in_other_places_are_refused(record, model, processor) -> None:
    adapted = setup_lora(model, lora_dropout=0)
    install_supervised_loss(adapted)
    frozen = next(model.get_submodule(record.parts["vision"]).parameters())
    frozen.grad = torch.ones_like(frozen)
    with pytest.raises(UnsupportedModelError, match="frozen and has a gradient"):
        require_trainable(adapted, processor, record)


def test_a_part_that_gets_no_gradient_is_refused(record, model, processor) -> None:
    adapted = setup_lora(model, lora_dropout=0)
    install_supervised_loss(adapted)
    adapted.register_parameter("idle", nn.Parameter(torch.ones(1)))
    with pytest.raises(UnsupportedModelError, match="idle is trained and has no gradient"):
        require_trainable(adapted, processor, record)


def test_what_no_record_describes_is_refused(family_dir, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason for refusing Mllama is found without being told."""
    folder = family_dir("mllama")
    with pytest.raises(UnsupportedModelError, match="cross-attention"):
        get_family(load_config(folder))
    # As if it were not there; taken away and put back, it would stand last for the tests that follow.
    monkeypatch.setitem(REFUSED, "mllama", ("", ()))
    with pytest.raises(UnsupportedModelError, match=r"mllama.*makes cross_attention_mask of the text and its images"):
        get_family(load_config(folder))


def test_an_encoder_and_decoder_is_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers.Florence2Config().save_pretrained(tmp_path)
    monkeypatch.setitem(REFUSED, "florence2", ("", ()))
    with pytest.raises(UnsupportedModelError, match=r"florence2.*(encoder and a decoder)"):
        get_family(load_config(tmp_path))


@pytest.mark.parametrize("broken", ["no processor", "no template"])
def test_a_checkpoint_without_its_processor_is_refused(broken, folder, tmp_path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    if broken == "no template":
        (copy / "chat_template.jinja").unlink()
    else:
        for name in ("processor_config.json", "preprocessor_config.json"):
            (copy / name).unlink(missing_ok=True)
        settings = json.loads((copy / "tokenizer_config.json").read_text())
        settings.pop("processor_class", None)
        (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UnsupportedModelError, match=r"aya_vision.*its processor (has no|cannot be loaded|does not)"):
        get_family(load_config(copy))
