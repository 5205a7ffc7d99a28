"""Where a run may begin: nothing is overwritten, and a run that cannot begin leaves nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from training.run_files import contents

from vlmtune.errors import ConfigError, ModelError, OutputError, QuarantineError, ResumeError
from vlmtune.training.checkpoints import seal
from vlmtune.training.output_dir import Start, find_start
from vlmtune.training.run import run_training
from vlmtune.training.run_info import save_training_info


def test_another_run_is_not_overwritten(finished_run, run_arguments, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_run.folder, folder)
    before = contents(folder)
    with pytest.raises(OutputError, match="already holds a finished run"):
        run_training(*run_arguments(folder))
    with pytest.raises(OutputError, match=r"already holds another run, .*--resume"):
        run_training(*run_arguments(folder, resume="off"))
    assert contents(folder) == before


def test_other_files_are_not_overwritten(run_arguments, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="already holds other files"):
        run_training(*run_arguments(tmp_path))
    assert contents(tmp_path) == {"letter.txt": b"dear"}


def test_a_model_of_another_family_than_named(run_arguments, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model_type is llava, but the model is of the family gemma3"):
        run_training(*run_arguments(tmp_path, model_type="llava"))
    assert not list(tmp_path.iterdir())


def test_resume_without_a_checkpoint(run_arguments, tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="no finished checkpoint"):
        run_training(*run_arguments(tmp_path, resume_from_checkpoint="true"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("resume", [None, False, "", "false", "off", "auto"])
def test_a_new_directory(resume, tmp_path: Path) -> None:
    assert find_start(tmp_path / "a" / "b", resume=resume) == Start()
    assert (tmp_path / "a" / "b").is_dir()
    assert find_start(tmp_path / "a" / "b", resume=resume) == Start()


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be made"):
        find_start(tmp_path / "file" / "run")
    with pytest.raises(OutputError, match="cannot be made"):
        find_start(tmp_path / "file")


def finished_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt"):
        (folder / name).touch()
    seal(folder)
    return folder


@pytest.mark.parametrize("resume", [True, "true", "on", "auto"])
def test_the_latest_checkpoint_is_found(resume, tmp_path: Path) -> None:
    save_training_info(tmp_path, status="training")
    for step in (2, 10, 9):
        finished_checkpoint(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-11").mkdir()
    finished_checkpoint(tmp_path / "checkpoint-best")
    assert find_start(tmp_path, resume=resume).checkpoint == tmp_path / "checkpoint-10"


def test_a_named_checkpoint(tmp_path: Path) -> None:
    own = finished_checkpoint(tmp_path / "run" / "checkpoint-2")
    assert find_start(tmp_path / "run", resume=str(own)) == Start(own)
    with pytest.raises(ResumeError, match="not written to its end"):
        find_start(tmp_path / "run", resume=str(tmp_path))


def test_going_on_elsewhere(tmp_path: Path) -> None:
    """Another run's checkpoint may be continued in a new directory, but not over a third run."""
    other = finished_checkpoint(tmp_path / "other" / "checkpoint-2")
    assert find_start(tmp_path / "new", resume=str(other)) == Start(other)
    assert (tmp_path / "new").is_dir()
    finished_checkpoint(tmp_path / "third" / "checkpoint-1")
    with pytest.raises(OutputError, match="already holds"):
        find_start(tmp_path / "third", resume=str(other))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model_name_or_path": "/no/such/model"}, ModelError),
        ({"max_bad_fraction": 0.0}, QuarantineError),
        ({"lora_target_modules": ["no_such_layer"]}, ConfigError),
        ({"cache_image_features": "on", "lora_scopes": ["language", "vision"]}, ConfigError),
        ({"cache_image_features": "on", "use_lora": False}, ConfigError),
    ],
)
def test_a_run_that_cannot_begin_leaves_nothing(options, error, run_arguments, tmp_path: Path) -> None:
    """Else the corrected run would be refused: its directory would not be empty."""
    with pytest.raises(error):
        run_training(*run_arguments(tmp_path / "run", **options))
    assert not list((tmp_path / "run").iterdir())
