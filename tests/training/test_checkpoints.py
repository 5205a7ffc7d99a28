"""A checkpoint is whole or absent, whatever happens while it is written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlmtune.errors import OutputError, ResumeError
from vlmtune.files import UNFINISHED
from vlmtune.training.checkpoints import (
    MANIFEST,
    checkpoints,
    damage,
    delete_old,
    delete_unfinished,
    last_whole_checkpoint,
    latest_checkpoint,
    require_whole,
    writing_checkpoint,
    writing_files,
)


def write(place: Path, size: int = 1000) -> Path:
    with writing_checkpoint(place) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "a.json").write_text("{}")
        save_file({"x": torch.ones(size)}, folder / "model.safetensors")
    return place


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small disk can be mounted by root alone")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_whole_one(tmp_path: Path) -> None:
    place = write(tmp_path / "checkpoint-2")
    assert damage(place) is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert latest_checkpoint(tmp_path) == last_whole_checkpoint(tmp_path) == place


def test_an_error_leaves_nothing_and_the_old_one(tmp_path: Path) -> None:
    place = write(tmp_path / "checkpoint-2")
    before = (place / "model.safetensors").read_bytes()
    with pytest.raises(ZeroDivisionError), writing_checkpoint(place) as folder:
        (folder / "model.safetensors").touch()
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert (place / "model.safetensors").read_bytes() == before


def test_a_folder_of_the_same_name_is_replaced_whole(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-2")
    place = write(tmp_path / "checkpoint-2", 7)
    assert damage(place) is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert (place / "model.safetensors").stat().st_size < 200


@pytest.mark.parametrize("how", ["cut", "changed", "missing", "no manifest", "odd manifest"])
def test_damage_is_named_and_passed_over(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = write(tmp_path / "checkpoint-2"), write(tmp_path / "checkpoint-10")
    weights = bad / "model.safetensors"
    content = weights.read_bytes()
    said = {
        "cut": "model.safetensors has",
        "changed": "model.safetensors was changed",
        "missing": "model.safetensors is missing",
        "no manifest": "not written to its end",
        "odd manifest": "cannot be read",
    }[how]
    if how == "cut":
        weights.write_bytes(content[:-1])
    elif how == "changed":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "missing":
        weights.unlink()
    elif how == "no manifest":
        (bad / MANIFEST).unlink()
    else:
        (bad / MANIFEST).write_text('{"files": ')
    assert last_whole_checkpoint(tmp_path) == good
    assert str(bad) in caplog.text and said in caplog.text
    with pytest.raises(ResumeError, match=said):
        require_whole(bad)


@pytest.mark.parametrize("kind", ["torch", "safetensors", "text"])
def test_a_full_disk(kind: str, small_disk: Path) -> None:
    """A disk that is really full; each library has an error of its own for it."""
    good = write(small_disk / "checkpoint-2")
    with pytest.raises(OutputError) as caught, writing_checkpoint(small_disk / "checkpoint-4") as folder:
        if kind == "torch":
            torch.save({"x": torch.ones(200_000)}, folder / "optimizer.pt")
        elif kind == "safetensors":
            save_file({"x": torch.ones(200_000)}, folder / "model.safetensors")
        else:
            (folder / "log").write_text("x" * 800_000)
    assert f"The last good checkpoint, {good}, is as it was" in str(caught.value)
    assert "MB are free" in str(caught.value)
    assert [path.name for path in small_disk.iterdir()] == ["checkpoint-2"]
    assert last_whole_checkpoint(small_disk) == good


def test_other_runtime_errors_are_not_taken_for_the_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shape"), writing_checkpoint(tmp_path / "checkpoint-1"):
        raise RuntimeError("a shape")


def test_old_ones_go_by_step_whatever_the_clock_says(tmp_path: Path) -> None:
    """The clock was put back: the newest one looks the oldest, and would be deleted by its time."""
    places = [write(tmp_path / f"checkpoint-{step}") for step in (2, 4, 10)]
    for hours, place in enumerate(reversed(places)):
        os.utime(place, (1e9 + 3600 * hours, 1e9 + 3600 * hours))
    delete_old(tmp_path, keep=2, best=None, newest=places[2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-4"]


def test_the_best_one_is_kept(tmp_path: Path) -> None:
    places = [write(tmp_path / f"checkpoint-{step}") for step in (2, 4, 6)]
    delete_old(tmp_path, keep=2, best=str(places[0]), newest=places[2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-6"]
    delete_old(tmp_path, keep=None, best=None, newest=places[2])
    assert len(list(tmp_path.iterdir())) == 2


def test_nothing_is_deleted_before_the_new_one_is_proved(tmp_path: Path) -> None:
    places = [write(tmp_path / f"checkpoint-{step}") for step in (2, 4)]
    (places[1] / "model.safetensors").write_bytes(b"short")
    with pytest.raises(OutputError, match=r"Older ones were kept"):
        delete_old(tmp_path, keep=1, best=None, newest=places[1])
    assert places[0].is_dir()


def test_a_model_takes_its_place_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(ZeroDivisionError), writing_files(tmp_path) as folder:
        (folder / "a.json").write_text("half")
        raise ZeroDivisionError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "old")]
    with writing_files(tmp_path) as folder:
        (folder / "a.json").write_text("new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "new")]


def test_a_kill_while_an_old_one_is_deleted(tmp_path: Path) -> None:
    """A real process, killed after the first file of the old checkpoint is gone."""
    for step in (1, 2):
        write(tmp_path / f"checkpoint-{step}")
    program = f"""
import os, shutil, signal
from pathlib import Path
from vlmtune.training import checkpoints

def dies(folder, **_):
    next(path for path in sorted(Path(folder).iterdir()) if path.is_file()).unlink()
    os.kill(os.getpid(), signal.SIGKILL)

shutil.rmtree = dies
run = Path({str(tmp_path)!r})
checkpoints.delete_old(run, keep=1, best=None, newest=run / "checkpoint-2")
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    half = tmp_path / f"checkpoint-1.old{UNFINISHED}"
    assert half.is_dir() and not (tmp_path / "checkpoint-1").exists()
    assert checkpoints(tmp_path) == [tmp_path / "checkpoint-2"]
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    delete_unfinished(tmp_path)
    assert not half.exists()
