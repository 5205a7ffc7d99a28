"""Family records are found by name, configuration or model, and each agrees with the transformers class it names."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig

from vlmtune.cli import main
from vlmtune.errors import ConfigError, UnsupportedModelError
from vlmtune.models.architecture import get_model_config_for_architecture
from vlmtune.models.families import FAMILIES, REFUSED, get_family
from vlmtune.models.overview import as_markdown
from vlmtune.models.proved import proved, record_digest

GEMMA = FAMILIES["gemma3"]


def _installed(packages) -> bool:
    return bool(packages) and all(map(importlib.util.find_spec, packages))


@pytest.mark.parametrize("name", ["gemma3", "gemma", "gemma-3", "Gemma3", "GEMMA-3"])
def test_by_name_or_alias(name) -> None:
    assert get_family(name) is GEMMA


def test_a_record_is_returned_as_it_is() -> None:
    assert get_family(GEMMA) is GEMMA


def test_by_config_as_object_and_as_dict(tiny_gemma3_dir) -> None:
    config = AutoConfig.from_pretrained(tiny_gemma3_dir)
    assert get_family(config) is GEMMA
    assert get_family(config.to_dict()) is GEMMA


def test_by_model_adapted_or_not(tiny_model) -> None:
    from vlmtune.models.lora import setup_lora

    assert get_family(tiny_model) is GEMMA
    assert get_family(setup_lora(tiny_model)) is GEMMA


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'gema3'.*gemma3.*Did you mean 'gemma3'\?"):
        get_family("gema3")
    with pytest.raises(UnsupportedModelError, match="'blip'; use") as caught:
        get_family("blip")
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_another_family_than_expected(family) -> None:
    record, other = FAMILIES[family], "gemma" if family != "gemma3" else "qwen"
    for name in ("auto", family, family.upper(), *record.aliases):
        assert get_family(record, name) is record
    with pytest.raises(ConfigError, match=rf"model_type is {other}, but .* of the family {family}\..*name a "):
        get_family(record, other)
    with pytest.raises(UnsupportedModelError, match=r"'gema'.*Did you mean 'gemma'\?"):
        get_family(record, "gema")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_settings_for_scripts_are_the_records(family) -> None:
    for name in (family.name, *family.aliases):
        settings = get_model_config_for_architecture(name)
        assert settings["family"] == family.name and hasattr(transformers, settings["model_class"])
        assert settings["lora_target_modules"] == list(family.lora_targets["language"])
        assert settings["lora_scopes"] == ["language", "projector", "vision"]
        assert settings["terminators"][0] == family.turn_end
        assert (settings["share_images"], settings["cache_image_features"]) == (family.sharing, family.feature_cache)
    with pytest.raises(UnsupportedModelError):
        get_model_config_for_architecture("blip")


@pytest.mark.parametrize("text_config", [transformers.LlamaConfig(), transformers.Gemma3TextConfig()])
def test_a_text_only_model_is_told_apart(text_config) -> None:
    for which in (text_config, text_config.to_dict()):
        with pytest.raises(UnsupportedModelError, match=rf"{text_config.model_type} .*no vision tower.*gemma3"):
            get_family(which)


@pytest.mark.parametrize("as_dict", [False, True])
def test_an_unknown_vision_language_model_is_not_called_text_only(as_dict) -> None:
    config = transformers.AyaVisionConfig()
    with pytest.raises(UnsupportedModelError, match=r"aya_vision.*does not know yet") as caught:
        get_family(config.to_dict() if as_dict else config)
    assert "no vision tower" not in str(caught.value)


@pytest.mark.parametrize("which", [None, object(), nn.Linear(1, 1), {}])
def test_something_without_a_model_type_is_unsupported(which) -> None:
    with pytest.raises(UnsupportedModelError):
        get_family(which)


class TestRecordAgainstModel:
    """What a record says is so in the model that transformers builds."""

    def test_parts_cover_every_parameter(self, tiny_model) -> None:
        places = tuple(place + "." for place in GEMMA.parts.values())
        outside = [name for name, _ in tiny_model.named_parameters() if not name.startswith(places)]
        assert outside == []
        assert all(tiny_model.get_submodule(place) is not None for place in GEMMA.parts.values())
        assert type(tiny_model).__name__ == GEMMA.model_class

    @pytest.mark.parametrize("scope", ["language", "projector", "vision"])
    def test_lora_targets_are_all_linear_layers_of_the_part(self, scope, tiny_model) -> None:
        part = tiny_model.get_submodule(GEMMA.parts[scope])
        found = {name.rpartition(".")[2] for name, module in part.named_modules() if isinstance(module, nn.Linear)}
        assert found == set(GEMMA.lora_targets[scope])

    def test_tokens_are_in_the_vocabulary(self, tiny_model, processor) -> None:
        tokenizer = processor.tokenizer
        assert GEMMA.turn_end in GEMMA.terminators
        for token in GEMMA.terminators:
            assert tokenizer.convert_tokens_to_ids(token) != tokenizer.unk_token_id
        assert getattr(tiny_model.config, GEMMA.image_token_attribute) == tokenizer.convert_tokens_to_ids(
            "<image_soft_token>"
        )


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_the_installed_transformers_is_new_enough(family) -> None:
    installed = tuple(int(number) for number in transformers.__version__.split(".")[:2])
    assert installed >= tuple(int(number) for number in family.min_transformers.split("."))


def test_numbers_that_overflow_are_refused() -> None:
    assert "float16" in FAMILIES["gemma3"].refused_dtypes
    assert str(torch.bfloat16).removeprefix("torch.") not in FAMILIES["gemma3"].refused_dtypes


def test_no_two_families_share_a_name_or_a_model_type() -> None:
    names = [name for family in FAMILIES.values() for name in (family.name, *family.aliases)]
    types = [kind for family in FAMILIES.values() for kind in family.model_types]
    assert len(names) == len(set(names)) and len(types) == len(set(types))
    assert all(name == name.lower() for name in names)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_what_is_not_supported_says_why(family) -> None:
    assert family.sharing or family.sharing_reason
    assert family.feature_cache or family.cache_reason
    # Features are kept for rows that share images; and a generic record is no known family's.
    assert family.sharing or not family.feature_cache
    assert not family.generic
    assert family.paper.startswith("https://") and family.licence and family.source.startswith("transformers/models/")
    first, *others = family.source.split(", ")
    first = Path(transformers.__file__).parent.parent / first
    assert first.is_file() and all((first.parent / file).is_file() for file in others)


def test_proofs_are_of_known_families() -> None:
    assert list(proved()) == list(FAMILIES), "run `make families`"


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_what_is_shown_as_supported_was_proved_of_this_record(family) -> None:
    found = proved()[family.name]
    assert found["record"] == record_digest(family), "the record has changed since: run `make families`"
    assert {"LoRA", "4-bit", "merge"} <= set(found["supports"])
    shared, kept = ("share_images" in found["supports"]), ("feature cache" in found["supports"])
    assert (shared, kept) == (family.sharing, family.feature_cache)
    changed = dataclasses.replace(family, bos=not family.bos)
    assert record_digest(changed) != found["record"]


def test_the_table_in_the_docs_is_the_records() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "families.md"
    assert as_markdown() in page.read_text(encoding="utf-8"), "run `make families`"


def test_the_command_lists_every_family(capsys) -> None:
    assert main(["families"]) == 0
    shown = capsys.readouterr().out
    assert all(family.name in shown and family.sharing_reason in shown for family in FAMILIES.values())
    assert main(["families", "--all"]) == 2


@pytest.mark.parametrize("model_type", [name for name, (_, packages) in REFUSED.items() if not _installed(packages)])
def test_a_refused_family_is_refused_with_the_reason(model_type) -> None:
    config = transformers.AutoConfig.for_model(model_type)
    with pytest.raises(UnsupportedModelError) as caught:
        get_family(config)
    assert REFUSED[model_type][0] in str(caught.value) and model_type in str(caught.value)
    assert model_type not in {kind for family in FAMILIES.values() for kind in family.model_types}


def test_the_reason_for_refusing_still_holds() -> None:
    """Those of Mllama and Florence-2: tests/models/test_generic.py."""
    if importlib.util.find_spec("torchvision"):
        pytest.skip("torchvision is installed")
    with pytest.raises(ImportError, match=r"(?i)torchvision"):
        importlib.import_module("transformers.models.lfm2_vl").Lfm2VlImageProcessor()
    if not importlib.util.find_spec("timm"):
        with torch.device("meta"), pytest.raises(ImportError, match=r"(?i)timm"):
            transformers.Gemma3nForConditionalGeneration(transformers.Gemma3nConfig())
