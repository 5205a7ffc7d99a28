"""Help, the overview, unknown names, the environment and interrupts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import vlmtune

from vlmtune import cli
from vlmtune.config.options import field_types

COMMANDS = ("train", "evaluate", "predict", "demo", "env")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_a_command(command: str, flag: str, capsys):
    assert vlmtune(command, flag) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"usage: vlmtune {command}") and not said.err
    assert all(len(line) <= 120 for line in said.out.splitlines())


@pytest.mark.parametrize(("arguments", "code"), [((), 2), (("--help",), 0), (("-h",), 0), (("help",), 0)])
def test_overview_names_every_command(arguments, code, capsys):
    assert vlmtune(*arguments) == code
    said = capsys.readouterr().out
    assert all(f"\n  {command} " in said for command in COMMANDS)


def test_version(capsys):
    assert vlmtune("--version") == 0
    assert capsys.readouterr().out.startswith("vlmtune 0.")


def test_train_help_shows_every_option_once_and_what_must_be_set(capsys):
    from vlmtune.config import ModelWithLoRAArguments, VLMDataArguments
    from vlmtune.config.training_options import TrainingOptions

    vlmtune("train", "--help")
    said = capsys.readouterr().out
    for cls in (ModelWithLoRAArguments, VLMDataArguments, TrainingOptions):
        for name in field_types(cls):
            assert said.count(f"\n  --{name} ") == 1, name
    assert said.count("[required]") == 3


def test_help_of_check_calls_nothing_required_that_is_not(capsys):
    vlmtune("check", "--help")
    assert "[required]" not in capsys.readouterr().out
    vlmtune("preview", "--help")
    assert capsys.readouterr().out.count("[required]") == 1


def test_help_leaves_out_what_does_not_concern_a_command(capsys):
    vlmtune("evaluate", "--help")
    evaluate = capsys.readouterr().out
    assert "--adapter " in evaluate and "--metrics " in evaluate
    assert "--share_images" not in evaluate and "--learning_rate" not in evaluate
    vlmtune("predict", "--help")
    predict = capsys.readouterr().out
    assert "--torch_dtype " in predict and "--model_name_or_path" not in predict


@pytest.mark.parametrize(
    ("arguments", "asked", "offered"),
    [
        (("trian",), "trian", "train"),
        (("train", "--lerning_rate", "1e-4"), "--lerning_rate", "--learning_rate"),
        (("evaluate", "--metric", "exact_match"), "--metric", "--metrics"),
        (("predict", "model", "a.jpg", "--max_new_token", "3"), "--max_new_token", "--max_new_tokens"),
        (("demo", "--output-dri", "x"), "--output-dri", "--output_dir"),
        (("env", "--jsn"), "--jsn", "--json"),
    ],
)
def test_an_unknown_command_or_option_gets_the_nearest_name(arguments, asked, offered, refused):
    said = refused(2, *arguments)
    assert asked in said and f"Did you mean '{offered}'?" in said


def test_a_recipe_after_the_options_is_said_to_be_misplaced(recipe: Path, refused):
    assert "stands before the options" in refused(2, "train", "--lora_r", "8", recipe)


def test_numbers_of_the_demo_are_checked(refused):
    assert "--questions is 'many'" in refused(2, "demo", "--questions", "many")
    assert "--output_dir needs a value" in refused(2, "demo", "--output_dir")


def test_env(capsys):
    assert vlmtune("env") == 0
    said = capsys.readouterr().out
    assert "\n  torch: " in said and "\n  cores: " in said
    assert vlmtune("env", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["transformers"] and found["hardware"]["cores"]


@pytest.mark.parametrize("arguments", [("--debug", "train"), ("train", "--debug")])
def test_debug_shows_the_traceback(arguments, capsys):
    assert vlmtune(*arguments) == 2
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said and "error: 3 options cannot be used" in said


def test_an_interrupt_ends_quietly(monkeypatch: pytest.MonkeyPatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "env", interrupted)
    assert vlmtune("env") == 130
    assert "stopped" in capsys.readouterr().err
