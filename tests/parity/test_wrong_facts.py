"""A wrong fact in a family's record fails the parity suite: each field is made wrong, for every family that has it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from families.builders import VARIANTS
from invariants import test_sharing as sharing
from models import test_boxes as boxes
from models import test_families as records
from models import test_image_max_pixels as pixels
from parity.families import test_logits as logits
from parity.families import test_saving as saving
from parity.families import test_tokens as tokens
from parity.families import test_training as training

from vlmtune.batching.collator import BaseVLMDataCollator
from vlmtune.batching.encode import Encoder
from vlmtune.models.boxes import whole
from vlmtune.models.families import FAMILIES, get_family
from vlmtune.models.family import Family, every_layer, fixed_layout, nothing_unused, unscaled
from vlmtune.models.loading import load_model_for_training, load_processor

CHECKPOINTS = {**{name: name for name in FAMILIES}, **VARIANTS}
SCOPES = ("language", "projector", "vision")


@functools.cache
def loaded(folder, model_class: str, attn_implementation: str | None):
    """The checkpoint as vlmtune loads it; read-only."""
    return load_model_for_training(folder, torch_dtype="float32").eval()


@functools.cache
def plain(folder):
    """The checkpoint as plain transformers loads it; read-only."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), load_processor(folder)


class Check:
    """The suite's tests, called with a wrong record in place of the right one."""

    def __init__(self, checkpoint, family, folder, image_folder, tmp_path) -> None:
        self.checkpoint, self.family, self.folder = checkpoint, family, folder
        self.image_folder, self.tmp_path = image_folder, tmp_path

    @functools.cached_property
    def processor(self):
        return load_processor(self.folder)

    @property
    def encoder(self):
        return Encoder(self.processor, self.family)

    @property
    def ours(self):
        return loaded(self.folder, self.family.model_class, self.family.attn_implementation)

    @property
    def collator(self):
        return BaseVLMDataCollator(self.processor, self.family)

    def found(self) -> None:
        assert get_family(self.ours.config) is self.family
        records.test_no_two_families_share_a_name_or_a_model_type()

    def source(self) -> None:
        records.test_what_is_not_supported_says_why(self.family)

    def version(self) -> None:
        records.test_the_installed_transformers_is_new_enough(self.family)

    def dtype(self) -> None:
        records.test_numbers_that_overflow_are_refused()

    def ids(self) -> None:
        args = (self.checkpoint, self.family, self.encoder, self.processor, self.image_folder)
        tokens.TestTokens().test_ids_are_the_processors("one image", *args)

    def supervised(self) -> None:
        args = (self.checkpoint, self.family, self.encoder, self.processor, self.image_folder)
        tokens.TestTokens().test_answers_and_their_ends_are_supervised("one image", *args)

    def bos(self) -> None:
        tokens.TestTokens().test_one_bos_where_the_family_has_it(
            self.family, self.encoder, self.processor, self.image_folder
        )

    def stops(self) -> None:
        tokens.TestTokens().test_generation_stops_where_the_published_model_does(
            self.family, self.encoder, self.ours, self.processor
        )

    def image_token(self) -> None:
        tokens.TestTokens().test_image_token_is_the_models(self.family, self.ours, self.processor)

    def soft_tokens(self) -> None:
        tokens.TestTokens().test_soft_tokens_are_the_features(
            (31, 47), self.family, self.encoder, self.ours, self.tmp_path
        )

    def resolution(self) -> None:
        tokens.TestTokens().test_resolution_counts_only_where_the_record_says_so(
            self.family, self.encoder, self.tmp_path
        )

    def given(self) -> None:
        for name in ("one image", "three images"):
            args = (self.checkpoint, self.family, self.collator, self.processor, self.image_folder)
            tokens.TestTokens().test_the_model_is_given_what_the_processor_gives(name, *args)

    def positions(self) -> None:
        args = (self.checkpoint, self.family, self.encoder, self.ours, self.processor, self.image_folder)
        tokens.TestTokens().test_positions_are_the_models("one image", *args)

    def logits(self) -> None:
        for name in ("one image", "three images"):
            args = (self.checkpoint, self.family, self.ours, plain(self.folder), self.collator, self.image_folder)
            logits.TestLogits().test_single(name, *args)

    def attention(self) -> None:
        logits.TestLogits().test_attention_is_as_the_record_says(
            self.family, self.ours, self.collator, self.image_folder
        )

    def parts(self) -> None:
        training.TestTraining().test_parts_cover_every_parameter(self.family, self.ours)

    def targets(self) -> None:
        for scope in SCOPES:
            training.TestTraining().test_lora_targets_are_all_linear_layers(
                scope, self.checkpoint, self.family, self.ours
            )

    def layers(self) -> None:
        training.TestTraining().test_layers_are_the_lists_of_a_part(self.family, self.ours)

    def in_full(self) -> None:
        training.TestTraining().test_parts_in_full(SCOPES, self.family, self.folder, self.collator, self.image_folder)

    def loss(self) -> None:
        training.TestTraining().test_supervised_loss_is_the_dense_one(
            self.checkpoint, self.family, self.folder, self.collator, self.image_folder
        )

    def four_bit(self) -> None:
        training.TestTraining().test_four_bit_only_in_the_language_model(
            self.family, self.folder, self.collator, self.image_folder
        )

    def generation(self) -> None:
        saving.TestSavingAndGeneration().test_answers_shared_separate_and_alone(
            self.checkpoint, self.family, self.ours, self.processor, self.image_folder
        )

    def shared(self) -> None:
        with sharing.in_float64(self.family, self.folder) as model:
            args = (model, self.processor, self.image_folder, self.family)
            sharing.test_shared_equals_separate("five captions", *args)

    def written(self) -> None:
        boxes.test_what_a_family_writes(lambda name: self.processor, self.family.name)
        boxes.test_every_family_says_where_its_convention_is_from()

    def limited(self) -> None:
        pixels.limits_or_refuses(self.family, lambda: load_processor(self.folder))
        pixels.test_families_of_one_processor_limit_it_alike()

    def cached(self) -> None:
        with sharing.in_float64(self.family, self.folder) as model:
            args = (model, self.processor, self.image_folder, self.family, self.tmp_path)
            sharing.test_cached_features_equal_recomputed(*args)


def _one_axis(processor, flags, inputs):
    return [list(range(len(flags)))] * 3


def _upper_half(processor, size):
    return dataclasses.replace(whole(processor, size), height=size[0] // 2)


def _no_limit(processor, pixels):
    """Neither refuses nor changes the processor."""


def _other(values: list[str], value: str) -> str:
    return next(candidate for candidate in values if candidate != value)


def wrong_facts(checkpoint: str) -> Iterator[tuple[dict[str, Any], str]]:
    """What is made wrong in the record of a checkpoint's family, and the check that must notice."""
    family = FAMILIES[CHECKPOINTS[checkpoint]]
    if checkpoint not in VARIANTS:
        yield from _of_every_family(family)
        yield from _of_some_families(family)
    if checkpoint == "gemma4_large":
        yield {"opening": ""}, "ids"
        yield {"template_options": {"enable_thinking": True}}, "ids"
        for block_layers in (every_layer, nothing_unused):
            yield {"block_layers": block_layers}, "shared"
        yield {"needs_token_type_ids": False}, "logits"


def _of_every_family(family) -> Iterator[tuple[dict[str, Any], str]]:
    neighbour = FAMILIES[_other(list(FAMILIES), family.name)]
    yield {"name": neighbour.name}, "found"
    yield {"aliases": (neighbour.name,)}, "found"
    yield {"model_types": ("other",)}, "found"
    yield {"model_class": neighbour.model_class}, "parts"
    yield (
        {"processor_class": _other([other.processor_class for other in FAMILIES.values()], family.processor_class)},
        ("image_token"),
    )
    for part, place in family.parts.items():
        yield {"parts": {**family.parts, part: place + "s"}}, "parts"
    for part, place in family.layers.items():
        yield {"layers": {**family.layers, part: place + ".0"}}, "layers"
        yield {"parts": {name: path for name, path in family.parts.items() if name != part}}, "parts"
    for scope, names in family.lora_targets.items():
        yield {"lora_targets": {**family.lora_targets, scope: (*names[1:], *(() if names else ("linear",)))}}, "targets"
        yield {"lora_targets": {**family.lora_targets, scope: (*names, "lm_head")}}, "targets"
    yield {"attention": "causal" if family.attention == "prefix" else "prefix"}, "attention"
    yield {"turn_end": "<bos>"}, "supervised"
    yield {"terminators": (*family.terminators[1:], "none")}, "stops"
    yield {"terminators": (*family.terminators, "a")}, "stops"
    yield {"bos": not family.bos}, "bos"
    yield {"generic": True}, "source"
    yield {"logit_scale": lambda config: 3.0}, "loss"
    yield {"projector_parameters": (*family.projector_parameters, "none")}, "parts"
    yield {"unused": lambda config: (family.parts["language"],)}, "targets"
    yield {"attn_implementation": "none"}, "parts"
    yield {"view": _upper_half}, "written"
    yield {"limit_pixels": _no_limit}, "limited"
    wrong_boxes = {"y_first": not family.boxes.y_first, "scale": 77, "digits": family.boxes.digits + 1, "source": ""}
    for name, value in (wrong_boxes | {"write": lambda found, task: str(found)}).items():
        yield {"boxes": dataclasses.replace(family.boxes, **{name: value})}, "written"
    yield {"image_token_attribute": "vocab_size"}, "image_token"
    yield {"needs_token_type_ids": not family.needs_token_type_ids}, "given"
    yield {"sized": not family.sized}, "resolution"
    if family.name != "paligemma":  # its processor counts from nothing
        layout = (lambda processor, sizes: {}) if family.layout is fixed_layout else fixed_layout
        yield {"layout": layout}, "soft_tokens"
    for name in family.image_inputs:
        yield {"image_inputs": tuple(other for other in family.image_inputs if other != name)}, "given"
    yield {"image_axis": 1 - family.image_axis}, "given"
    yield {"positions_of": None if family.positions_of else _one_axis}, "positions"
    if not family.render:
        yield {"closes_turn": False, "turn_end": "</s>"} if family.closes_turn else {"closes_turn": True}, "ids"
    yield {"min_transformers": "6.0"}, "version"
    for provenance in ("paper", "licence", "source"):
        yield {provenance: ""}, "source"
    if family.sharing:
        yield {"sharing": False, "sharing_reason": ""}, "source"
    else:
        yield {"sharing": True}, "generation"
        yield {"sharing_reason": ""}, "source"
        yield {"feature_cache": True}, "source"
    if family.feature_cache:
        if family.name not in ("idefics3", "smolvlm"):  # they take both
            yield {"features_listed": not family.features_listed}, "cached"
        yield {"feature_cache": False, "cache_reason": ""}, "source"
    else:
        yield {"cache_reason": ""}, "source"


def _of_some_families(family) -> Iterator[tuple[dict[str, Any], str]]:
    if family.name in ("idefics3", "smolvlm", "internvl", "mistral3"):
        yield {"image_options": lambda processor: {}}, "given"
    if family.name == "granite_docling":
        yield {"image_options": lambda processor: {"fine_route": True}}, "soft_tokens"
        yield {"logit_scale": unscaled}, "loss"
    if family.positions_of:
        yield {"positions_of": _one_axis}, "positions"
    if family.needs_token_type_ids:
        yield {"token_types_name": "types"}, "given"
    if family.projector_parameters:
        yield {"projector_parameters": ()}, "parts"
    if family.unused is not nothing_unused:
        yield {"unused": nothing_unused}, "parts" if family.name == "gemma4" else "in_full"
    if family.name == "gemma4":
        yield {"unused": nothing_unused}, "four_bit"
    if family.attn_implementation is None:
        yield {"attn_implementation": "sdpa"}, "parts"
    if family.name == "gemma3":
        yield {"attention": "causal"}, "shared"
        yield {"block_layers": nothing_unused}, "shared"
        yield {"refused_dtypes": {}}, "dtype"
        yield {"needs_token_type_ids": False}, "logits"
    if family.render:
        yield {"render": None}, "ids"
    if family.template_options and family.name == "qwen3_5":
        yield {"template_options": {}}, "ids"
    if family.name == "llava_onevision":
        yield {"feature_cache": True}, "cached"


WRONG = [(name, wrong, check) for name in CHECKPOINTS for wrong, check in wrong_facts(name)]
# By default these say that a family has no such thing, and nothing of it is read.
ABSENT_BY_DEFAULT = {
    "refused_dtypes",
    "token_types_name",
    "image_options",
    "render",
    "block_layers",
    "template_options",
    "opening",
    "estimate_reason",
}
# What makes no difference. PaliGemma's processor counts from nothing, and its ends are rendered here; some families
# take features in either form, or none at all.
INDIFFERENT = {
    "layout": {"paligemma"},
    "closes_turn": {"paligemma"},
    "features_listed": {"paligemma", "qwen3_5", "llava_onevision", "idefics3", "smolvlm"},
    # Its refusal is in tests/models/test_memory_sized.py.
    "estimate_reason": {"gemma4"},
    # Said only where something is not so.
    "sharing_reason": {name for name, family in FAMILIES.items() if family.sharing},
    "cache_reason": {name for name, family in FAMILIES.items() if family.feature_cache},
}


@pytest.mark.parametrize(
    ("name", "wrong", "check"), WRONG, ids=[f"{name}-{'-'.join(wrong)}-{i}" for i, (name, wrong, _) in enumerate(WRONG)]
)
def test_a_wrong_fact_is_noticed(
    name, wrong, check, family_dir, image_folder, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = FAMILIES[CHECKPOINTS[name]]
    record = dataclasses.replace(right, **wrong)
    assert record != right
    folder = family_dir(name)
    monkeypatch.setitem(FAMILIES, right.name, record)
    with pytest.raises((Exception, pytest.fail.Exception)):  # a failed check, or an error of what uses the fact
        getattr(Check(name, record, folder, image_folder, tmp_path), check)()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_checks_pass_with_the_right_record(name, family_dir, image_folder, tmp_path) -> None:
    """Else they would notice everything."""
    family = FAMILIES[CHECKPOINTS[name]]
    right = Check(name, family, family_dir(name), image_folder, tmp_path)
    checks = {check for of, _, check in WRONG if of == name}
    for check in sorted(checks if family.feature_cache else checks - {"cached"}):
        getattr(right, check)()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_field_is_made_wrong(name) -> None:
    made_wrong = {field for of, wrong, _ in WRONG if CHECKPOINTS[of] == name for field in wrong}
    for field in dataclasses.fields(Family):
        absent = field.name in ABSENT_BY_DEFAULT and getattr(FAMILIES[name], field.name) == default(field)
        assert field.name in made_wrong or absent or name in INDIFFERENT.get(field.name, ()), field.name


def default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
