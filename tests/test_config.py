"""Options: their defaults and checks, and how a recipe and flags become arguments."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from transformers import HfArgumentParser

from vlmtune.config import (
    EvaluationArguments,
    ModelWithLoRAArguments,
    TrainingArguments,
    VLMDataArguments,
    parse_recipe,
)
from vlmtune.config.convert import Unconvertible, convert
from vlmtune.config.devices import split_batch
from vlmtune.config.options import OptionsError, field_types
from vlmtune.config.recipe import parse_arguments, read_yaml
from vlmtune.errors import ConfigError

CLASSES = (ModelWithLoRAArguments, VLMDataArguments, TrainingArguments, EvaluationArguments)
REQUIRED = ["--model_name_or_path", "m", "--dataset_path", "d"]


@pytest.fixture
def recipe(tmp_path: Path):
    """Write a recipe with the required options and the given lines; return its path."""

    def write(text: str = "", *, complete: bool = True) -> Path:
        path = tmp_path / "recipe.yaml"
        head = f"model_name_or_path: m\ndataset_path: d\noutput_dir: {tmp_path / 'out'}\n" if complete else ""
        path.write_text(head + text, encoding="utf-8")
        return path

    return write


def problems(path: Path | None, *flags: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(flags, path)
    return str(caught.value)


# -- the classes ------------------------------------------------------------------------------------------


def test_the_documented_usage_parses():
    parser = HfArgumentParser((ModelWithLoRAArguments, VLMDataArguments, TrainingArguments))
    model, data, training = parser.parse_args_into_dataclasses([*REQUIRED, "--learning_rate", "1e-3", "--use_4bit"])
    assert (model.model_name_or_path, data.dataset_path) == ("m", "d")
    assert model.use_4bit and training.learning_rate == 1e-3


def test_hf_parser_takes_every_class_at_once_so_no_option_stands_in_two():
    model, *_ = HfArgumentParser(CLASSES).parse_args_into_dataclasses(
        [*REQUIRED, "--lora_scopes", "vision", "language"]
    )
    assert model.lora_scopes == ["vision", "language"]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_option_has_help_that_argparse_can_print(cls: type):
    for field in dataclasses.fields(cls):
        assert field.metadata.get("help"), field.name
    HfArgumentParser(cls, prog="x").format_help()


def test_vlm_defaults_of_training():
    args = TrainingArguments(output_dir="out")
    assert args.remove_unused_columns is False
    assert args.activation_checkpointing_kwargs == {"use_reentrant": False}
    assert args.report_to == []
    assert args.average_tokens_across_devices is True
    assert args.learning_rate == 2e-4
    assert args.dataloader_num_workers >= 0
    assert args.bf16 in (True, False)


def test_gradient_checkpointing_is_accepted_under_its_old_name(recwarn):
    args = TrainingArguments(output_dir="out", gradient_checkpointing=True)
    assert args.activation_checkpointing and args.gradient_checkpointing
    assert not [w for w in recwarn if w.category is FutureWarning]


def test_bf16_is_never_chosen_where_fp16_or_the_cpu_was_asked_for():
    assert TrainingArguments(output_dir="out", use_cpu=True).bf16 is False


@pytest.mark.parametrize(("given", "meant"), [(True, "on"), (False, "off"), ("auto", "auto")])
def test_resume_is_a_switch(given, meant):
    assert TrainingArguments(output_dir="out", resume=given).resume == meant


@pytest.mark.parametrize(("flags", "meant"), [([], "auto"), (["--resume"], "on"), (["--no_resume"], "off")])
def test_the_flag_resume_needs_no_value(flags, meant):
    needed = ["--model_name_or_path", "m", "--dataset_path", ".", "--output_dir", "out"]
    assert parse_recipe([*needed, *flags]).training.resume == meant


def test_training_arguments_can_be_copied():
    args = TrainingArguments(output_dir="out", eval_strategy="epoch", gradient_checkpointing=True)
    assert dataclasses.replace(args, learning_rate=1e-3).learning_rate == 1e-3


def test_wrong_values_are_reported_together():
    with pytest.raises(OptionsError) as caught:
        ModelWithLoRAArguments(model_name_or_path="m", lora_r=0, lora_scopes=["lang"], torch_dtype="bf17")
    assert len(caught.value.problems) == 3
    assert "Did you mean 'language'?" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"use_4bit": True, "use_8bit": True}, "use_8bit"),
        ({"use_4bit": True, "use_lora": False}, "use_lora"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"lora_dropout": float("nan")}, "lora_dropout"),
        ({"lora_scopes": []}, "lora_scopes"),
        ({"lora_r": -1}, "lora_r"),
    ],
)
def test_model_options_refused(values: dict, word: str):
    with pytest.raises(ConfigError, match=word):
        ModelWithLoRAArguments(model_name_or_path="m", **values)


@pytest.mark.parametrize(
    "values",
    [
        {"max_bad_fraction": 1.5},
        {"validation_fraction": 1.0},
        {"max_train_samples": 0},
        {"on_too_long": "cut"},
        {"validation_fraction": 0.1, "eval_split": "dev"},
    ],
)
def test_data_options_refused(values: dict):
    with pytest.raises(ConfigError, match=next(iter(values))):
        VLMDataArguments(dataset_path="d", **values)


def test_what_transformers_refuses_is_a_config_error_too():
    with pytest.raises(ConfigError, match="cosin"):
        TrainingArguments(output_dir="out", lr_scheduler_type="cosin")


# -- conversion -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("1e-4", float, 1e-4),
        ("1_000", int, 1000),
        ("1e3", int, 1000),
        ("9007199254740993", int, 9007199254740993),
        ("yes", bool, True),
        ("off", bool, False),
        ("null", int | None, None),
        ("none", int | None, None),
        ("none", str | None, "none"),
        ("", str | None, None),
        ("5", int | None, 5),
        ("a", list[str], ["a"]),
        (["a", "b"], list[str] | None, ["a", "b"]),
        ("a", None | str | list[str], "a"),
        (["a"], None | str | list[str], ["a"]),
        ({"use_reentrant": "false", "n": "1e-2"}, dict | str | None, {"use_reentrant": False, "n": 0.01}),
        ("file.json", dict | str | None, "file.json"),
    ],
)
def test_convert(text, annotation, value):
    converted = convert(text, annotation)
    assert converted == value and type(converted) is type(value)


@pytest.mark.parametrize(
    ("text", "annotation"),
    [("fast", float), ("1.5", int), ("maybe", bool), (["a"], int), ({"a": "b"}, int), ("null", int), ("a", dict)],
)
def test_convert_refuses(text, annotation):
    with pytest.raises(Unconvertible):
        convert(text, annotation)


# -- recipes ----------------------------------------------------------------------------------------------


def test_flags_override_the_file(recipe):
    path = recipe("learning_rate: 3e-4\nlora_r: 8\n")
    found = parse_recipe(["--learning_rate", "1e-4", "--lora-scopes", "language", "vision", "--no_use_dora"], path)
    assert found.training.learning_rate == 1e-4
    assert found.model.lora_r == 8
    assert found.model.lora_scopes == ["language", "vision"]
    assert found.model.use_dora is False


def test_flags_alone_are_enough(tmp_path: Path):
    model, _, training, _ = parse_recipe([*REQUIRED, f"--output_dir={tmp_path}", "--use_4bit"])
    assert model.use_4bit and training.output_dir == str(tmp_path)


def test_yaml_1_1_traps(recipe):
    found = parse_recipe([], recipe("learning_rate: 1e-4\nshare_images: off\ncache_image_features: true\nprompt: no\n"))
    assert found.training.learning_rate == 1e-4
    assert found.data.share_images == "off"
    assert found.data.cache_image_features == "on"
    assert found.data.prompt == "no"


def test_nested_options_of_transformers_are_typed(recipe):
    found = parse_recipe([], recipe("lr_scheduler_kwargs: {num_cycles: 0.5}\nreport_to: [none]\n"))
    assert found.training.lr_scheduler_kwargs == {"num_cycles": 0.5}


def test_full_finetuning_gets_a_lower_learning_rate_unless_one_is_set(recipe):
    assert parse_recipe([], recipe("use_lora: false\n")).training.learning_rate == 2e-5
    assert parse_recipe([], recipe("use_lora: false\nlearning_rate: 0.1\n")).training.learning_rate == 0.1
    assert parse_recipe([], recipe()).training.learning_rate == 2e-4


def test_an_unknown_key_is_named_with_its_file_and_the_nearest_option(recipe):
    path = recipe("lerning_rate: 1e-4\n")
    assert problems(path) == f"{path}: lerning_rate is not an option. Did you mean 'learning_rate'?"


def test_an_unknown_flag_is_named_with_the_nearest_flag(recipe):
    said = problems(recipe(), "--lora_drop_out", "0.1")
    assert said == "command line: --lora_drop_out is not an option. Did you mean '--lora_dropout'?"


def test_everything_wrong_is_said_at_once(recipe):
    path = recipe("lerning_rate: 1e-4\nlora_r: many\nmax_bad_fraction: 3\n")
    said = problems(path, "--use_dorra", "--lora_dropout", "2", "--warmup_steps", "soon")
    for name in ("lerning_rate", "lora_r", "max_bad_fraction", "--use_dorra", "lora_dropout", "--warmup_steps"):
        assert name in said
    assert said.startswith("6 options cannot be used:")


def test_missing_options_are_named(recipe):
    said = problems(recipe("lora_r: 4\n", complete=False))
    for name in ("model_name_or_path", "dataset_path", "output_dir"):
        assert f"{name} is not set" in said


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: b: c\n", "line 1"),
        ("- lora_r\n", "no options"),
        ("lora_r: 4\nlora_r: 8\n", "second time"),
        ("model:\n  lora_r: 4\n", "top level"),
        ("\tlora_r: 4\n", "cannot be read"),
    ],
)
def test_files_that_are_no_recipe(recipe, text: str, word: str):
    said = problems(recipe(text, complete=False))
    assert word in said and "recipe.yaml" in said


def test_an_absent_or_binary_recipe(tmp_path: Path):
    assert "There is no recipe" in problems(tmp_path / "no.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in problems(tmp_path / "b.yaml")


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--learning_rate"], "needs a value"),
        (["--prompt", "What", "is"], "quotes"),
        (["oops"], "'oops' stands alone"),
        (["--lora_r", "two"], "a whole number"),
    ],
)
def test_flags_refused(recipe, flags: list[str], word: str):
    assert word in problems(recipe(), *flags)


def test_negative_numbers_are_values(recipe):
    assert parse_recipe(["--max_steps", "-1"], recipe()).training.max_steps == -1


def test_paths_count_from_the_current_directory(recipe, tmp_path: Path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "elsewhere").mkdir()
    path = recipe("image_dir: photos\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "beside the recipe" in problems(path)
    monkeypatch.chdir(tmp_path)
    assert parse_recipe([], path).data.image_dir == "photos"


def test_home_is_expanded(recipe):
    assert parse_recipe([], recipe("cache_dir: ~/cache\n")).data.cache_dir == str(Path.home() / "cache")


def test_options_of_other_commands_are_ignored_where_allowed(recipe):
    (evaluation,) = parse_arguments((EvaluationArguments,), [], recipe("lora_r: 4\n"), ignored=CLASSES)
    assert evaluation.max_new_tokens == EvaluationArguments().max_new_tokens


def test_recipe_texts_stay_texts(recipe):
    path = recipe("x: 010\ny: 1:30\nz: 2020-01-01\n", complete=False)
    assert read_yaml(path) == {"x": "010", "y": "1:30", "z": "2020-01-01"}


def test_shipped_recipes_parse():
    folder = Path(__file__).parents[1] / "recipes"
    for path in sorted(folder.glob("*.yaml")):
        known = {name for cls in CLASSES for name in field_types(cls)}
        assert set(yaml.safe_load(path.read_text())) <= known, path


# -- what is trained --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "in_full", "trained"),
    [
        ("", [], {"language"}),
        ("use_lora: false\n", ["language", "projector"], {"language", "projector"}),
        ("use_lora: false\ntrain_parts: [vision]\n", ["vision"], {"vision"}),
        ("train_parts: [projector]\n", ["projector"], {"language", "projector"}),
        ("lora_scopes: [vision]\ntrain_parts: [language]\n", ["language"], {"language", "vision"}),
    ],
)
def test_parts_that_are_trained(text, in_full, trained, recipe):
    model = parse_recipe((), recipe(text)).model
    assert model.train_parts == in_full
    assert model.trained_parts == trained


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train_parts: [language]\n", "language stand both in lora_scopes and in train_parts; .*use_lora: false"),
        ("vision_lora_r: 4\n", "vision_lora_r is set, but lora_scopes has no vision"),
        ("projector_lora_alpha: 4\n", "projector_lora_alpha is set, but lora_scopes has no projector"),
        ("lora_scopes: [vision]\nvision_lora_r: 0\n", "vision_lora_r is 0; it must be at least 1"),
        ("use_4bit: true\nlora_scopes: [vision]\ntrain_parts: [language]\n", "train_parts cannot have language"),
        ("use_8bit: true\nlora_init: pissa\n", "lora_init is pissa, .* take loftq with use_4bit"),
        ("lora_init: loftq\n", "lora_init is loftq, .* set use_4bit: true"),
        ("lora_init: loftq\nuse_4bit: true\nbnb_4bit_quant_type: fp4\n", r"lora_init is loftq, .* \(nf4\)"),
        ("lora_init: pisa\n", "lora_init is 'pisa'.*pissa"),
        ("vision_learning_rate: 0\n", "vision_learning_rate is 0"),
    ],
)
def test_choices_that_cannot_be(text, message, recipe):
    with pytest.raises(ConfigError, match=message):
        parse_recipe((), recipe(text))


@pytest.mark.parametrize(
    ("effective", "most", "devices", "split"),
    [
        (64, 8, 8, (8, 1)),
        (64, 8, 1, (8, 8)),
        (12, 4, 2, (3, 2)),
        (6, 8, 2, (3, 1)),
        (7, 3, 1, (1, 7)),
        (2, 8, 2, (1, 1)),
    ],
)
def test_an_effective_batch_is_split_over_devices_and_accumulation(effective, most, devices, split) -> None:
    assert split_batch(effective, most, devices) == split
    assert split[0] * split[1] * devices == effective


def test_an_effective_batch_decides_batch_and_accumulation() -> None:
    args = TrainingArguments(output_dir="out", use_cpu=True, effective_batch_size=6, per_device_train_batch_size=4)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (3, 2)


@pytest.mark.parametrize(
    ("options", "devices", "said"),
    [
        ({"effective_batch_size": 7}, "2", "effective_batch_size is 7, which cannot be split evenly over 2 devices"),
        ({"effective_batch_size": 8, "gradient_accumulation_steps": 2}, "1", "are both set; the first decides"),
        ({"effective_batch_size": 0}, "1", "effective_batch_size is 0; it must be at least 1"),
    ],
)
def test_an_effective_batch_that_cannot_be(options, devices, said, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", devices)
    with pytest.raises(OptionsError, match=said):
        TrainingArguments(output_dir="out", use_cpu=True, **options)
