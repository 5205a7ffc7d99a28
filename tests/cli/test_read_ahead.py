"""``vlmtune train`` reads the data while it imports, where it is the process that will train on them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import vlmtune.training.run
from vlmtune.cli import main
from vlmtune.config import VLMDataArguments

FLAGS = "--model_name_or_path tiny --output_dir out --learning_rate 1e-3 --split_seed 5".split()


class Recorder:
    """Stands for :class:`vlmtune.data.ahead.Ahead`."""

    made: list[VLMDataArguments]

    def __init__(self, options: VLMDataArguments) -> None:
        self.made.append(options)

    def load(self, options: VLMDataArguments) -> Any:
        raise NotImplementedError


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command gives ``run_training``, which ends there."""
    module = sys.modules["vlmtune.cli.train"]
    given: dict[str, Any] = {}

    def run_training(model: Any, data: Any, *_: Any, **named: Any) -> None:
        given.update(named, data=data)
        raise KeyboardInterrupt

    Recorder.made = []
    monkeypatch.setattr(module, "worthwhile", lambda options: True)
    monkeypatch.setattr(module, "Ahead", Recorder)
    monkeypatch.setattr(module, "on_devices", lambda *_: None)
    monkeypatch.setattr(vlmtune.training.run, "run_training", run_training)
    return given


def test_the_data_of_recipe_and_flags_are_read_ahead(taken: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"dataset_path: {tmp_path}\nlora_r: 4\nmax_length: 99\nuse_lora: true\n")
    assert main(["train", str(recipe), *FLAGS, "--max-steps", "1"]) == 130
    assert Recorder.made == [VLMDataArguments(dataset_path=str(tmp_path), split_seed=5, max_length=99)]
    assert taken["data"] == Recorder.made[0]
    assert taken["load"].__func__ is Recorder.load


@pytest.mark.parametrize("flags", [["--devices", "2"], ["--nodes", "2"], ["--validation_fraction", "2"]])
def test_nothing_is_read_ahead_for_other_processes_or_with_options_that_are_wrong(
    taken: dict[str, Any], tmp_path: Path, flags: list[str]
) -> None:
    main(["train", "--dataset_path", str(tmp_path), *FLAGS, *flags])
    assert not Recorder.made
    assert "load" not in taken


def test_a_process_that_a_launcher_started_reads_ahead(
    taken: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["vlmtune.cli.train"], "in_a_group", lambda: True)
    main(["train", "--dataset_path", str(tmp_path), *FLAGS, "--devices", "2"])
    assert len(Recorder.made) == 1
